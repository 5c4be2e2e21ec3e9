"""How results are shown: tables for people, one JSON document for programs.

Promise: whatever a checkpoint's names hold, nothing that moves a cursor, colours or reorders text reaches
the terminal. With ``--json``, standard output is one ASCII document and nothing else.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = ["byte_size", "print_json", "print_line", "print_table", "printable", "progress", "tell"]

_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_WIDE = 4096  # columns of what is no terminal: nothing is cut or wrapped there


def printable(text: object) -> str:
    r"""Return a text with everything that is not seen as itself written as an escape.

    That is: control characters, escape sequences, marks that reverse the direction, characters without
    width, unpaired surrogates, and the backslash, so that no escape can be mistaken.

    Examples:
        >>> printable("a\x1b[31m"), printable("x\u202ey"), printable("back\\slash")
        ('a\\x1b[31m', 'x\\u202ey', 'back\\\\slash')
    """
    return "".join(
        char.encode("unicode_escape").decode("ascii")
        if char == "\\" or unicodedata.category(char) in _UNSEEN
        else char
        for char in str(text)
    )


def byte_size(nbytes: int) -> str:
    """Return a number of bytes in words.

    Examples:
        >>> byte_size(999), byte_size(1_500), byte_size(2_000_000_000)
        ('999 B', '1.5 kB', '2.0 GB')
    """
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 999.95:
            break
        value, unit = value / 1000, larger
    return f"{nbytes} B" if unit == "B" else f"{value:.1f} {unit}"


def print_json(document: Any) -> None:
    """Print one JSON document."""
    sys.stdout.write(json.dumps(document, allow_nan=False, indent=2) + "\n")


def print_line(text: str) -> None:
    """Print one line; what comes from a checkpoint must be :func:`printable` already."""
    sys.stdout.write(text + "\n")


def tell(text: str) -> None:
    """Print one line beside the results, on standard error."""
    sys.stderr.write(text + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; a column whose name ends in ``>`` stands flush right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.endswith(">")
        table.add_column(
            column.rstrip(">"), justify="right" if right else "left", overflow="fold", no_wrap=right
        )
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    # Not printed by rich itself: it ends the program in its own way when nobody reads any more.
    console = Console(width=None if terminal else _WIDE, highlight=False)
    with console.capture() as captured:
        console.print(table)
    sys.stdout.write(captured.get())


@contextmanager
def progress(what: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Give a function that moves a bar on standard error: ``(bytes done, bytes there are)``.

    There is no bar where nobody watches: with ``--json``, or if standard error is no terminal.
    """
    if not shown or not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
