"""The command line: ``gockpt ls``, ``show``, ``verify``, ``diff`` and ``prune``.

Each command is a call of the library and a way to print what it returned. None needs a GPU or torch.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command that the process's arguments ask for, and exit with its code."""
    import sys

    from gockpt.cli.run import run

    sys.exit(run(sys.argv[1:]))
