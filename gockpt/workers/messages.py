"""Every message between trainer and worker process: one tagged union, over msgpack.

Numbers, NaN and -0.0 among them, come back as they were. Types are checked when a message is read, and
nothing that arrives is run: there is no pickle. Texts are UTF-8, so paths travel as bytes.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Any

import msgspec

from gockpt.core.descriptors import Capture, Gradient, ReplayPiece
from gockpt.core.exactness import Deviation
from gockpt.core.nonfinite import NonFinite
from gockpt.errors import WorkerError
from gockpt.options import Keep
from gockpt.storage.local.store import Follow
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
    "Message",
    "Mismatched",
    "Open",
    "Opened",
    "Publication",
    "Refused",
    "Release",
    "Spans",
    "Taken",
    "decode",
    "encode",
    "printable",
]


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages; the class's name is the tag."""


# -- from the trainer


class Open(Message, frozen=True):
    """The first: which path to write into, and how.

    Attributes:
        path: Where checkpoints go.
        follow: As which run.
        parent: ``seq`` of the checkpoint that the run continues from, if any.
        options: Those fields of ``Options`` that concern the worker, by name.
        keep: ``Options.keep``.
    """

    path: bytes
    follow: Follow
    parent: int | None
    options: dict[str, Any]
    keep: Keep | int | None


class GiveArena(Message, frozen=True):
    """A shared arena, whose descriptor travels with the message.

    Attributes:
        arena: Its number.
        nbytes: Its size.
        live: Numbers of all the arenas that are still there; the worker lets the others go.
    """

    arena: int
    nbytes: int
    live: tuple[int, ...]


class Begin(Message, frozen=True):
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
    root: bytes | None


class Gradients(Message, frozen=True):
    """Gradients of one update or several, in order."""

    job: int
    gradients: tuple[Gradient, ...]


class Hurry(Message, frozen=True):
    """Replay what is pending without gathering more, or gather again."""

    job: int
    on: bool


class Discard(Message, frozen=True):
    """Forget pieces; answered by :class:`Done` once nothing touches their memory."""

    job: int
    pieces: tuple[int, ...]
    reply: int


class Close(Message, frozen=True):
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


class Abort(Message, frozen=True):
    """Give the attempt up; answered by :class:`Done` once nothing touches the arenas."""

    job: int
    reply: int


class Boost(Message, frozen=True):
    """Add a thread of normal priority."""

    job: int


class Hold(Message, frozen=True):
    """Keep a publication from being pruned; answered by :class:`Done`."""

    seq: int
    reply: int


class Release(Message, frozen=True):
    """The publication may be pruned again."""

    seq: int


class ContinueAfter(Message, frozen=True):
    """Number publications from above ``seq`` on."""

    seq: int


class Leave(Message, frozen=True):
    """Finish what was captured and end."""


# -- from the worker


class Opened(Message, frozen=True):
    """The path is taken for writing."""


class Refused(Message, frozen=True):
    """The path can't be written into: the name of the error's class, and its text."""

    kind: str
    text: str


class Beat(Message, frozen=True):
    """A sign of life."""


class Done(Message, frozen=True):
    """The answer to a request."""

    reply: int


class Freed(Message, frozen=True):
    """Replay has consumed the gradients that stood there."""

    job: int
    offsets: tuple[int, ...]


class Spans(Message, frozen=True):
    """What happened when: (lane, start, end) in the seconds of the clock that both processes share.

    Attributes:
        job: Of which attempt.
        written: Bytes written so far.
        spans: What ended since the last of these.
    """

    job: int
    written: int
    spans: tuple[tuple[str, float, float], ...]


class Taken(Message, frozen=True):
    """The capture has arrived: from here on it does not depend on the trainer."""

    job: int


class Publication(Message, frozen=True):
    """The checkpoint is durable, and what was too old is pruned.

    Attributes:
        job: Of which attempt.
        published: The checkpoint, but for its path.
        path: Its path.
        defect: What went wrong with the pruning that must not; empty if nothing did.
        deviation: How far it is from exact; ``None`` if it is.
        nonfinite: The NaN and Inf in it.
    """

    job: int
    published: Published
    path: bytes
    defect: str
    deviation: Deviation | None
    nonfinite: NonFinite


class Mismatched(Message, frozen=True):
    """Replayed pieces differ from the live state; nothing was published."""

    job: int
    pieces: tuple[int, ...]


class Failed(Message, frozen=True):
    """The background failed: the name of the error's class, its text, and its notes."""

    job: int
    kind: str
    text: str
    notes: tuple[str, ...]


class Log(Message, frozen=True):
    """A line for the trainer's log."""

    level: int
    text: str


def _exact(value: Any) -> Any:
    """Return a value of a subclass, such as ``numpy.float64``, as the built-in type that it is."""
    for kind in (str, float, int):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    msg = f"{type(value).__name__} has no place in a message"
    raise TypeError(msg)


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_exact)
_DECODER: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(reduce(or_, Message.__subclasses__()))


def encode(message: Any) -> bytes:
    """Return a message as bytes.

    Raises:
        TypeError: If it is no message, or holds what has no place in one.
    """
    if not isinstance(message, Message):
        msg = f"{type(message).__name__} is no message"
        raise TypeError(msg)
    return _ENCODER.encode(message)


def decode(data: bytes) -> Any:
    """Return the message that bytes stand for.

    Raises:
        WorkerError: If it is none, or a field has not the type that is declared.
    """
    try:
        return _DECODER.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        msg = f"what arrived between trainer and worker is no message: {error!r}"
        raise WorkerError(msg) from error


def printable(text: str) -> str:
    """Return a text for people as UTF-8 can hold it: unpaired surrogates of a path as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
