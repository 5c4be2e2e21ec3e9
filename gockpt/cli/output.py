"""Output of results: tables for people, one JSON document for programs.

Promise: whatever a checkpoint's names hold, nothing that moves a cursor, colours, hides or reorders text
reaches the terminal, be it in results, errors or log lines. With ``--json``, standard output is one ASCII
document and nothing else.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import unicodedata
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = [
    "OutputError",
    "byte_size",
    "finish",
    "log_lines_told",
    "print_json",
    "print_line",
    "print_table",
    "printable",
    "progress",
    "tell",
]

_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"})
# What the categories don't tell: letters and marks that are blank or that a terminal ignores, as Unicode's
# Default_Ignorable_Code_Point lists them, and the empty Braille pattern.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_WIDE = 4096  # columns of what is no terminal: nothing is cut or wrapped there


def printable(text: object) -> str:
    r"""Return a text with everything that is not seen as itself written as an escape.

    That is: control characters, escape sequences, marks that reverse the direction, characters without
    width or ink (all spaces but the plain one, variation selectors, fillers), unpaired surrogates, and the
    backslash, so that no escape can be mistaken.

    Examples:
        >>> printable("a\x1b[31m"), printable("x\u202ey"), printable("a\ufe0f"), printable("back\\slash")
        ('a\\x1b[31m', 'x\\u202ey', 'a\\ufe0f', 'back\\\\slash')
    """
    return "".join(
        char.encode("unicode_escape").decode("ascii") if _is_unseen(char) else char for char in str(text)
    )


def _is_unseen(char: str) -> bool:
    if char == " ":
        return False
    return char == "\\" or unicodedata.category(char) in _UNSEEN or _BLANK.match(char) is not None


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


class OutputError(Exception):
    """Standard output can't be written; says why. Not for a reader that left: that is ``BrokenPipeError``."""


def print_json(document: Any) -> None:
    """Print one JSON document."""
    _put(json.dumps(document, allow_nan=False, indent=2) + "\n")


def print_line(text: str) -> None:
    """Print one line; what comes from a checkpoint must be :func:`printable` already."""
    _put(text + "\n")


def finish() -> None:
    """Hand on what was printed.

    Raises:
        OutputError: If standard output can't be written.
        BrokenPipeError: If its reader is gone.
    """
    if sys.stdout is not None:
        with _explained():
            sys.stdout.flush()


def _put(text: str) -> None:
    out = sys.stdout
    if out is None:
        msg = "it is closed"
        raise OutputError(msg)
    encoding = out.encoding or "utf-8"
    with _explained():
        # What this encoding has no character for is written as an escape, like what can't be seen.
        out.write(text.encode(encoding, "backslashreplace").decode(encoding))


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(error.strerror or str(error)) from error


def tell(text: str) -> None:
    """Print one line beside the results, on standard error; where that can't be written, nobody is told."""
    with suppress(OSError, AttributeError):
        sys.stderr.write(text + "\n")


class _Told(logging.Handler):
    """Tells what the library logs, one line each, escaped like all that comes from a checkpoint."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(f"gockpt: {record.levelname.lower()}: {printable(record.getMessage())}")


@contextmanager
def log_lines_told() -> Iterator[None]:
    """Show the library's warnings on standard error while the context is open."""
    handler, logger = _Told(logging.WARNING), logging.getLogger("gockpt")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; a column whose name ends in ``>`` stands flush right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout is not None and sys.stdout.isatty()
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
    _put(captured.get())


@contextmanager
def progress(what: str, *, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Give a function that moves a bar on standard error: ``(bytes done, bytes there are)``.

    There is no bar where nobody watches: with ``--json``, or if standard error is no terminal.
    """
    if not shown or sys.stderr is None or not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
