"""Protocol of a stager: copies tensors of one kind of memory into the arenas, behind training.

A caller makes requests and gets results. A request says which bytes go where; a result tells when the bytes
have arrived, and the fingerprints that they had when they were asked for. A backend may need time for it, as
a device does, or have the result ready when the call returns. Callers treat both alike.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import IntEnum
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Sequence

    import torch

    from gockpt.kernels.gradient16_launch import Form
    from gockpt.staging.gradient_ring import Ring

__all__ = ["CopyRequest", "CopyResult", "Source", "Stager", "Urgency"]


class Urgency(IntEnum):
    """Moment from which the sources of a copy may be overwritten; more urgent copies go first."""

    BUFFER = 0
    """From the end of the call: before the next forward pass."""
    GRADIENT = 1
    """From the end of the call: before the next backward pass."""
    STATE = 2
    """After :meth:`Stager.guard`: before the next update."""
    SNAPSHOT = 3
    """From the end of the call, as far as device memory allows a snapshot; the rest is ``STATE``."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Consecutive bytes of a tensor.

    Attributes:
        memory: The tensor, or device memory of the stager's own; holds it alive. Its elements fill one
            contiguous range, and bytes are counted in storage order.
        low: First byte within it.
        nbytes: Number of bytes.
        position: Where the first one is in its array, as far as fingerprints go: a multiple of 8.
    """

    memory: Any
    low: int
    nbytes: int
    position: int

    def part(self, low: int, nbytes: int) -> Source:
        """Return some of it, from byte ``low`` of it on, which must be a multiple of 8."""
        return Source(self.memory, self.low + low, nbytes, self.position + low)


@dataclass(frozen=True, slots=True, eq=False)
class CopyRequest:
    """One range of bytes to be copied into an arena.

    Attributes:
        source: What is copied.
        arena: Index of the arena.
        offset: Byte of the arena where it goes.
        owner: Who overwrites the source; see :meth:`Stager.guard`.
        form: Encoding and size of a gradient that is encoded, in one piece; see
            ``gockpt.kernels.gradient16_launch``. It is verified by the fingerprint of its encoded bytes, at
            ``source.position``.
        arrived: Fingerprint at the target, where the bytes are in place before the request is sent (0 if
            nobody needs it); else ``None``.
    """

    source: Source
    arena: int
    offset: int
    owner: Hashable
    form: Form | None = None
    arrived: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are copied."""
        return self.source.nbytes if self.form is None else self.form.nbytes


class CopyResult:
    """The copies of one call.

    Attributes:
        requests: What was asked for, in order; empty once ``done``, since sources need not live longer.
        nbytes: Bytes to copy.
        began: Time of the call, in ``perf_counter`` seconds.
        ended: Time at which it was ``done``.
        done: Set when all of it has arrived, or nothing of it can arrive any longer.
        lost: Requests whose bytes arrived other than they were at the call. Complete when ``done`` is set.
        error: Why it will not arrive; ``None`` if it did, or still may.
        expected: Fingerprints of the sources at the call, in order, or those of the encoded bytes; filled
            when ``done``, after an error too if they are known, else empty.
        on_done: Called once when it is done, if that is after the call has returned.
    """

    def __init__(self, requests: Sequence[CopyRequest], on_done: Callable[[], None] | None) -> None:
        self.requests: Sequence[CopyRequest] = tuple(requests)
        self.began = self.ended = perf_counter()
        self.nbytes = sum(request.nbytes for request in requests)
        self.done = threading.Event()
        self.lost: list[CopyRequest] = []
        self.expected: list[int] = []
        self.error: BaseException | None = None
        self.on_done = on_done

    @property
    def proven(self) -> bool:
        """Whether all of it has arrived as it was at the call."""
        return self.done.is_set() and self.error is None and not self.lost

    @property
    def sample(self) -> tuple[int, float]:
        """Bytes and seconds for the measured copy rate, once it is ``done``."""
        return (0, 0.0) if self.error is not None else (self.nbytes, self.ended - self.began)

    def end(self) -> None:
        """Let nobody wait for it any more."""
        self.requests = ()
        self.ended = perf_counter()
        self.done.set()

    def tell(self) -> None:
        """Tell whoever wants to know that it has ended, once."""
        self.end()
        on_done, self.on_done = self.on_done, None
        if on_done is not None:
            on_done()


class Stager(Protocol):
    """Copies tensors of one kind of memory into the arenas.

    A result is ``proven`` only if the bytes in the arena are, bit for bit, those of the sources at the call.
    Everything may be called from any thread, but for ``copy``, ``fingerprint``, ``place_gradient``, ``guard``
    and ``collect``, which belong to the training thread. Errors of a device are raised as ``SaveError``.

    Attributes:
        broken: Whether it must no longer be used.
    """

    broken: bool

    @property
    def variant(self) -> str | None:
        """Way of the bytes into the arena, in a few words; ``None`` if there is nothing to say."""

    @property
    def behind(self) -> Urgency:
        """Urgency of state that is copied behind training."""

    @property
    def waits_for_room(self) -> bool:
        """Whether room for gradients may be waited for: what holds it can always be replayed."""

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is in its memory."""

    def value(self, tensor: torch.Tensor) -> float | None:
        """Return a number in its memory; ``None`` if reading it would wait."""

    def fingerprint(
        self, sources: Sequence[Source], *, on_done: Callable[[], None] | None = None
    ) -> CopyResult:
        """Take the sources' fingerprints as of now, ``expected`` of the result; copy nothing."""

    def copy(
        self,
        requests: Sequence[CopyRequest],
        urgency: Urgency,
        *,
        on_done: Callable[[], None] | None = None,
        seen: CopyResult | None = None,
    ) -> CopyResult:
        """Copy the sources as they are now.

        Args:
            requests: What is copied, in the order in which it should leave.
            urgency: When the sources may be overwritten.
            on_done: Called once it has arrived, or failed, if that is after this call has returned; on
                whichever thread saw that.
            seen: A result of :meth:`fingerprint` of the same moment, so that it need not be taken again.
        """

    def place_gradient(self, source: Source, grad_dtype: str | None, ring: Ring) -> CopyRequest | None:
        """Find room in the ring for a gradient; return its request for :meth:`copy`, or ``None``.

        With ``grad_dtype`` it is encoded, where that makes it smaller.
        """

    def collect(self) -> None:
        """Finish those copies that only the training thread can finish: it is about to go on."""

    def guard(self, owners: Collection[Hashable] | None) -> None:
        """Let what runs next overwrite what belongs to ``owners``; ``None`` means to anyone."""

    def flush(self) -> None:
        """Let what is sent from now on arrive behind all that was sent before."""

    def fingerprint_now(self, sources: Sequence[Source]) -> list[int]:
        """Return the sources' fingerprints now; waits for them."""

    def finish(self, result: CopyResult) -> None:
        """Wait until it has arrived. Raises its error."""

    def give_up(self, error: BaseException) -> None:
        """Stop using it: it failed."""

    def cancel(self) -> None:
        """Drop all that is in flight; afterwards nothing writes into the arenas."""
