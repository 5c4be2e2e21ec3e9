"""Messages as bytes: one frame each, a length and a JSON array. No pickle: nothing that arrives is run.

A frame is eight bytes of length, big-endian, and as many bytes of JSON: the message's name, then its
fields in order. Numbers, NaN and -0.0 among them, come back as they were.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
from collections import deque
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from gockpt.core.arena_layout import ArrayLayout, Slot
from gockpt.core.array_spec import ArraySpec
from gockpt.core.descriptors import ArrayPlace, Capture, Gradient, ReplayPiece, Stretch
from gockpt.core.exactness import Deviation
from gockpt.core.nonfinite import NonFinite
from gockpt.errors import WorkerError
from gockpt.storage.local.transaction import Published
from gockpt.workers import notices

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Frames", "Inbox", "decode", "encode"]

_LENGTH = struct.Struct(">Q")
_MOST = 1 << 32
"""No message is that large; a length beyond it means that the stream is broken."""


def encode(message: Any) -> bytes:
    """Return a message's frame.

    Raises:
        TypeError: If it is no message, or holds what is not JSON.
    """
    name = type(message).__name__
    if _KINDS.get(name) is not type(message):
        msg = f"{name} is no message"
        raise TypeError(msg)
    special = _TO_PLAIN.get(name)
    body = special(message) if special else [getattr(message, field) for field in _FIELDS[name]]
    data = json.dumps([name, *body], separators=(",", ":")).encode("ascii")
    return _LENGTH.pack(len(data)) + data


def decode(data: bytes) -> Any:
    """Return the message that a frame's JSON stands for.

    Raises:
        WorkerError: If it is none.
    """
    try:
        name, *body = json.loads(data)
        special = _FROM_PLAIN.get(name)
        return special(*body) if special else _KINDS[name](*(_frozen(value) for value in body))
    except (ValueError, TypeError, KeyError) as error:
        msg = f"what arrived between trainer and worker is no message: {error!r}"
        raise WorkerError(msg) from error


class Frames:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """Return the messages that ``data`` completes.

        Raises:
            WorkerError: If it is no stream of messages.
        """
        self._buffer += data
        found = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > _MOST:
                msg = f"the stream between trainer and worker is broken: a message of {length} bytes"
                raise WorkerError(msg)
            begin, end = start + _LENGTH.size, start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            found.append(decode(bytes(self._buffer[begin:end])))
            start = end
        del self._buffer[:start]
        return found


class Inbox:
    """Messages from a process, and whether it has ended: its children may hold its end of the socket.

    Attributes:
        descriptors: Those that came with messages, oldest first.
    """

    def __init__(self, sock: socket.socket, pid: int, *, descriptors: int = 0) -> None:
        """Read from ``sock``; at most so many ``descriptors`` may come at once."""
        self._most = descriptors
        self.descriptors: deque[int] = deque()
        self._sock = sock
        self._frames = Frames()
        self._poller = select.poll()  # not `select`, which takes no descriptor from 1024 up
        self._poller.register(sock, select.POLLIN)
        try:
            self._pidfd = os.pidfd_open(pid)
        except (OSError, AttributeError):  # an older kernel: the owner looks with every beat
            self._pidfd = -1
        else:
            self._poller.register(self._pidfd, select.POLLIN)

    def wait(self, seconds: float) -> tuple[bool, bool]:
        """Wait until something can be read or the process has ended; return which of the two it is."""
        ready = dict(self._poller.poll(1000 * seconds))
        return self._sock.fileno() in ready, self._pidfd in ready

    def read(self) -> list[Any] | None:
        """Wait for data and return the messages it completes; ``None`` at the end of the stream.

        Raises:
            WorkerError: If it is no stream of messages, or a descriptor was lost.
        """
        try:
            data, descriptors, flags, _ = socket.recv_fds(self._sock, 1 << 18, self._most)
        except ConnectionError:
            # So ends the stream of a process that had not read all it was told. All it sent came before this.
            return None
        self.descriptors.extend(descriptors)
        if flags & socket.MSG_CTRUNC:
            # Which of several arenas came without its memory can't be told: none may be taken for another.
            msg = "memory could not be taken over: the process has too many open files (ulimit -n)"
            raise WorkerError(msg)
        return self._frames.feed(data) if data else None

    def close(self) -> None:
        """Look after the process no more. The socket is the owner's to close."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if type(value) is list else value


# Plain forms of what has an inside.


def _stretch(s: Stretch) -> tuple[Any, ...]:
    return (s.name, s.offset, s.start, s.stop, s.itemsize)


def _piece(p: ReplayPiece) -> tuple[Any, ...]:
    return (p.index, p.kernel, p.flags, [_stretch(s) for s in p.stretches], p.tail)


def _to_piece(index: int, kernel: str, flags: Any, stretches: Any, tail: bool) -> ReplayPiece:  # noqa: FBT001
    found = tuple(Stretch(tuple(name), *rest) for name, *rest in stretches)
    return ReplayPiece(index, kernel, _frozen(flags), found, tail)


def _place(place: ArrayPlace) -> tuple[Any, ...]:
    layout, spec = place.layout, place.layout.spec
    slots = [(s.chunk, s.row, s.rows, s.offset, s.nbytes, s.capacity) for s in layout.slots]
    return (spec.name, spec.shape, spec.dtype, layout.chunk_shape, slots, place.arena, place.strides)


def _to_place(
    name: Any, shape: Any, dtype: str, chunk: Any, slots: Any, arena: int, strides: Any
) -> ArrayPlace:
    spec = ArraySpec(tuple(name), tuple(shape), dtype)
    layout = ArrayLayout(spec, tuple(chunk), tuple(Slot(*slot) for slot in slots))
    return ArrayPlace(layout, arena, None if strides is None else tuple(strides))


def _begin(m: notices.Begin) -> list[Any]:
    return [m.job, m.arenas, [_piece(p) for p in m.pieces], m.root]


def _to_begin(job: int, arenas: Any, pieces: Any, root: str | None) -> notices.Begin:
    return notices.Begin(job, tuple(arenas), tuple(_to_piece(*p) for p in pieces), root)


def _gradients(m: notices.Gradients) -> list[Any]:
    # Most pieces of one update share their scalars: each row travels once. By their bits, since 0.0
    # equals -0.0 and no NaN equals itself.
    rows: dict[bytes, int] = {}
    body = [
        (
            g.piece,
            g.offset,
            g.nbytes,
            g.encoding,
            g.probes,
            g.seal,
            g.number,
            rows.setdefault(struct.pack(f"{len(g.scalars)}d", *g.scalars), len(rows)),
        )
        for g in m.gradients
    ]
    table = {number: g.scalars for g, (*_, number) in zip(m.gradients, body, strict=True)}
    return [m.job, [table[number] for number in range(len(rows))], body]


def _to_gradients(job: int, table: Any, body: Any) -> notices.Gradients:
    rows = [tuple(row) for row in table]
    found = (
        Gradient(piece, offset, nbytes, rows[row], encoding, tuple(probes), seal, number)
        for piece, offset, nbytes, encoding, probes, seal, number, row in body
    )
    return notices.Gradients(job, tuple(found))


def _close(m: notices.Close) -> list[Any]:
    c = m.capture
    proofs = list(c.proofs.items())
    places = [_place(place) for place in c.arrays]
    inexact = [c.exact, c.grad_dtype, list(c.samples.items())]
    return [m.job, m.arenas, m.verified, c.step, places, proofs, c.state, c.attributes, *inexact]


def _to_close(job: int, arenas: Any, verified: Any, step: int, *rest: Any) -> notices.Close:
    places, proofs, state, attributes, exact, grad_dtype, samples = rest
    capture = Capture(
        step,
        tuple(_to_place(*place) for place in places),
        {index: tuple(values) for index, values in proofs},
        state,
        attributes,
        exact,
        grad_dtype,
        {index: tuple(sample) for index, sample in samples},
    )
    return notices.Close(job, tuple(arenas), tuple(verified), capture)


def _publication(m: notices.Publication) -> list[Any]:
    deviation = None if m.deviation is None else asdict(m.deviation)
    published = (getattr(m.published, field.name) for field in fields(Published))
    return [m.job, m.defect, deviation, asdict(m.nonfinite), *published]


def _to_publication(job: int, defect: str, deviation: Any, counts: Any, *rest: Any) -> notices.Publication:
    found = None if deviation is None else Deviation(**deviation)
    first = {name: tuple(pair) for name, pair in counts["first"].items()}
    nonfinite = NonFinite(**{**counts, "first": first})
    return notices.Publication(job, Published(*rest), defect, found, nonfinite)


_KINDS: dict[str, type[Any]] = {name: getattr(notices, name) for name in notices.__all__}
_FIELDS = {name: tuple(field.name for field in fields(kind)) for name, kind in _KINDS.items()}
_TO_PLAIN: dict[str, Callable[[Any], list[Any]]] = {
    "Begin": _begin,
    "Gradients": _gradients,
    "Close": _close,
    "Publication": _publication,
}
_FROM_PLAIN: dict[str, Callable[..., Any]] = {
    "Begin": _to_begin,
    "Gradients": _to_gradients,
    "Close": _to_close,
    "Publication": _to_publication,
    "Open": notices.Open,
}
