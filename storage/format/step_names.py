"""Names of the entries of a checkpoint path: formatting and parsing.

``step-0000001200``, a directory, and ``step-0000001200.zip``, an archive, are complete;
``step-0000001200.partial-<attempt>`` is being written, or was when its writer died;
``step-0000001200.old-<attempt>`` is complete too, and was replaced by a newer publication of the same step;
``.trash-<attempt>`` is being deleted; each of these three may be a directory or an archive.
``.owner-<attempt>`` names the writer of a partial. Any other entry isn't gockpt's and is never touched.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "LOCK_FILE",
    "EntryName",
    "UploadedName",
    "of_old",
    "of_owner",
    "of_partial",
    "of_step",
    "of_trash",
    "of_uploaded",
    "parse",
    "parse_uploaded",
]

LOCK_FILE = ".gockpt.lock"

Kind = Literal["step", "partial", "old", "trash", "owner"]

_NAME = re.compile(
    r"step-(?P<step>[0-9]{10,19})((?P<zip>\.zip)|\.(?P<kind>partial|old)-(?P<attempt>[0-9a-f]{8,64}))?"
    r"|\.(?P<aside>trash|owner)-(?P<of>[0-9a-f]{8,64})",
    re.ASCII,
)

_UPLOADED = re.compile(r"step-([0-9]{10,19})-([0-9]{1,19})-([0-9a-f]{8,64})(\.zip)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class EntryName:
    """Parts of a directory entry's name.

    Attributes:
        kind: ``step``, ``partial``, ``old``, ``trash`` or ``owner``.
        step: The step, or ``None`` for trash and owners.
        attempt: The attempt, or ``None`` for a published step.
        archive: Whether the name is an archive's; those of the other kinds don't say it.
    """

    kind: Kind
    step: int | None
    attempt: str | None
    archive: bool = False


@dataclass(frozen=True, slots=True)
class UploadedName:
    """Parts of an uploaded checkpoint's name: the prefix of its files, or the key of its archive.

    Attributes:
        step: The step.
        seq: Its number among the path's publications.
        attempt: The attempt.
        archive: Whether the name is an archive's.
    """

    step: int
    seq: int
    attempt: str
    archive: bool = False


def of_step(step: int, *, archive: bool = False) -> str:
    """Return the name of a published step: of a directory, or of an archive.

    Examples:
        >>> of_step(1200), of_step(1200, archive=True)
        ('step-0000001200', 'step-0000001200.zip')
    """
    return f"step-{step:010d}.zip" if archive else f"step-{step:010d}"


def of_partial(step: int, attempt: str) -> str:
    """Return the name of a step that is being written."""
    return f"{of_step(step)}.partial-{attempt}"


def of_old(step: int, attempt: str) -> str:
    """Return the name of a complete checkpoint that a newer one of the same step replaced."""
    return f"{of_step(step)}.old-{attempt}"


def of_trash(attempt: str) -> str:
    """Return the name of a checkpoint that is being deleted."""
    return f".trash-{attempt}"


def of_owner(attempt: str) -> str:
    """Return the name of the file that names a partial's writer."""
    return f".owner-{attempt}"


def parse(name: str) -> EntryName | None:
    """Return the parts of a directory entry's name, or ``None`` if gockpt never writes such a name.

    Examples:
        >>> parse("step-0000001200.old-00ff00ff")
        EntryName(kind='old', step=1200, attempt='00ff00ff', archive=False)
        >>> parse("step-12"), parse("step-0000001200.bak")
        (None, None)
    """
    match = _NAME.fullmatch(name)
    if not match:
        return None
    aside: Kind | None = match["aside"]  # type: ignore[assignment]
    if aside:
        return EntryName(aside, None, match["of"])
    step = int(match["step"])
    if name[5 : 5 + len(match["step"])] != f"{step:010d}":
        return None  # more zeros than are ever written: two names would mean one step
    kind: Kind = match["kind"] or "step"  # type: ignore[assignment]
    return EntryName(kind, step, match["attempt"], archive=bool(match["zip"]))


def of_uploaded(step: int, seq: int, attempt: str, *, archive: bool = False) -> str:
    """Return the name of a checkpoint in an object store, which nothing is ever renamed to or from.

    Examples:
        >>> of_uploaded(1200, 12, "00ff00ff")
        'step-0000001200-12-00ff00ff'
        >>> of_uploaded(1200, 12, "00ff00ff", archive=True)
        'step-0000001200-12-00ff00ff.zip'
    """
    return f"{of_step(step)}-{seq}-{attempt}{'.zip' if archive else ''}"


def parse_uploaded(name: str) -> UploadedName | None:
    """Return the parts of an uploaded checkpoint's name, or ``None`` if gockpt never makes such a one.

    Examples:
        >>> parse_uploaded("step-0000001200-12-00ff00ff")
        UploadedName(step=1200, seq=12, attempt='00ff00ff', archive=False)
        >>> parse_uploaded("step-0000001200-12-00ff00ff.zip").archive
        True
    """
    match = _UPLOADED.fullmatch(name)
    if not match:
        return None
    found = UploadedName(int(match[1]), int(match[2]), match[3], archive=bool(match[4]))
    made = of_uploaded(found.step, found.seq, found.attempt, archive=found.archive)
    return found if made == name else None
