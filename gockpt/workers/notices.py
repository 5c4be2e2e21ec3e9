"""What trainer and worker process tell each other beside the messages of :mod:`gockpt.core.descriptors`.

All fields are plain: numbers, texts, tuples of them, and JSON documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gockpt.core.descriptors import Capture, Gradient, ReplayPiece
    from gockpt.core.exactness import Deviation
    from gockpt.core.nonfinite import NonFinite
    from gockpt.storage.local.transaction import Published

__all__ = [
    "Abort",
    "Beat",
    "Begin",
    "Boost",
    "Close",
    "ContinueAfter",
    "Discard",
    "Done",
    "Failed",
    "Freed",
    "GiveArena",
    "Gradients",
    "Hold",
    "Hurry",
    "Leave",
    "Log",
    "Mismatched",
    "Open",
    "Opened",
    "Publication",
    "Refused",
    "Release",
    "Spans",
    "Taken",
]

# -- from the trainer


@dataclass(frozen=True, slots=True)
class Open:
    """The first: which path to write into, and how.

    Attributes:
        path: Where checkpoints go.
        follow: As which run: the fields of a :class:`~gockpt.storage.local.store.Follow`.
        parent: ``seq`` of the checkpoint that the run continues from, if any.
        options: Those fields of ``Options`` that concern the worker, by name.
        keep: ``Options.keep``; the fields of a ``Keep``.
    """

    path: str
    follow: dict[str, Any]
    parent: int | None
    options: dict[str, Any]
    keep: dict[str, Any] | int | None


@dataclass(frozen=True, slots=True)
class GiveArena:
    """A shared arena, whose descriptor travels with the message.

    Attributes:
        arena: Its number.
        nbytes: Its size.
        live: Numbers of all the arenas that are still there; the worker lets the others go.
    """

    arena: int
    nbytes: int
    live: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Begin:
    """An attempt begins.

    Attributes:
        job: Its number.
        arenas: Numbers of the state's arena and of the ring's.
        pieces: What may be replayed.
        root: The library with MKL's square root, if a piece needs it.
    """

    job: int
    arenas: tuple[int, ...]
    pieces: tuple[ReplayPiece, ...]
    root: str | None


@dataclass(frozen=True, slots=True)
class Gradients:
    """Gradients of one update or several, in order."""

    job: int
    gradients: tuple[Gradient, ...]


@dataclass(frozen=True, slots=True)
class Hurry:
    """Replay what is pending without gathering more, or gather again."""

    job: int
    on: bool


@dataclass(frozen=True, slots=True)
class Discard:
    """Forget pieces; answered by :class:`Done` once nothing touches their memory."""

    job: int
    pieces: tuple[int, ...]
    reply: int


@dataclass(frozen=True, slots=True)
class Close:
    """All has arrived: answered by :class:`Taken`, and in the end by the outcome.

    Attributes:
        job: Which attempt.
        arenas: Numbers of the arenas of state, ring and additions.
        verified: Attempts that the trainer has verified as a whole, for retention.
        capture: The checkpoint.
    """

    job: int
    arenas: tuple[int, ...]
    verified: tuple[str, ...]
    capture: Capture


@dataclass(frozen=True, slots=True)
class Abort:
    """Give the attempt up; answered by :class:`Done` once nothing touches the arenas."""

    job: int
    reply: int


@dataclass(frozen=True, slots=True)
class Boost:
    """Add a thread of normal priority."""

    job: int


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep a publication from being pruned; answered by :class:`Done`."""

    seq: int
    reply: int


@dataclass(frozen=True, slots=True)
class Release:
    """The publication may be pruned again."""

    seq: int


@dataclass(frozen=True, slots=True)
class ContinueAfter:
    """Number publications from above ``seq`` on."""

    seq: int


@dataclass(frozen=True, slots=True)
class Leave:
    """Finish what was captured and end."""


# -- from the worker


@dataclass(frozen=True, slots=True)
class Opened:
    """The path is taken for writing."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The path can't be written into: the name of the error's class, and its text."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Beat:
    """A sign of life."""


@dataclass(frozen=True, slots=True)
class Done:
    """The answer to a request."""

    reply: int


@dataclass(frozen=True, slots=True)
class Freed:
    """Replay has consumed the gradients that stood there."""

    job: int
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Spans:
    """What happened when: (lane, start, end) in the seconds of the clock that both processes share.

    Attributes:
        job: Of which attempt.
        written: Bytes written so far.
        spans: What ended since the last of these.
    """

    job: int
    written: int
    spans: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True, slots=True)
class Taken:
    """The capture has arrived: from here on it does not depend on the trainer."""

    job: int


@dataclass(frozen=True, slots=True)
class Publication:
    """The checkpoint is durable, and what was too old is pruned.

    Attributes:
        job: Of which attempt.
        published: The checkpoint.
        defect: What went wrong with the pruning that must not; empty if nothing did.
        deviation: How far it is from exact; ``None`` if it is.
        nonfinite: The NaN and Inf in it.
    """

    job: int
    published: Published
    defect: str
    deviation: Deviation | None
    nonfinite: NonFinite


@dataclass(frozen=True, slots=True)
class Mismatched:
    """Replayed pieces differ from the live state; nothing was published."""

    job: int
    pieces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """The background failed: the name of the error's class, its text, and its notes."""

    job: int
    kind: str
    text: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Log:
    """A line for the trainer's log."""

    level: int
    text: str
