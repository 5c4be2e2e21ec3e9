"""``python -m gockpt.cli``: the same as the installed command."""

from gockpt.cli import main

if __name__ == "__main__":
    main()
