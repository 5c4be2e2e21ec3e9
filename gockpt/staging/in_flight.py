"""Copies under way: results, each sent by one call, copies of their batches, and slots they take."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from gockpt.kernels.fingerprint_numba import MODULUS
from gockpt.staging.stager import CopyResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt

    from gockpt.staging.copy_batches import Batch
    from gockpt.staging.device import Event, Prints
    from gockpt.staging.stager import CopyRequest, Urgency

    Bytes = npt.NDArray[np.uint8]

__all__ = ["BatchCopy", "DeviceCopyResult", "Slot"]


class DeviceCopyResult(CopyResult):
    """Copies off a device that one call sent; with ``look``, fingerprints alone."""

    def __init__(
        self,
        requests: Sequence[CopyRequest],
        urgency: Urgency,
        prints: Prints,
        boundary: Event,
        on_done: Callable[[], None] | None,
        *,
        look: bool = False,
    ) -> None:
        super().__init__(requests, on_done)
        self.urgency = urgency
        self.prints = prints
        self.boundary = boundary
        self.batches_left = 0
        self._look = look
        self._arrived = [0] * len(requests)
        self._made: dict[int, int] = {}
        self._first: tuple[float, int] | None = None

    @property
    def sample(self) -> tuple[int, float]:
        """Bytes and seconds for the measured copy rate, once it is ``done``.

        From the first batch's end to the last one's, since before that it may have waited for the boundary;
        of a single batch, all of its time.
        """
        began, before = self._first or (self.began, 0)
        if self.error is not None or before == self.nbytes or self.ended <= began:
            began, before = self.began, 0
        return (0, 0.0) if self.error is not None else (self.nbytes - before, self.ended - began)

    def add(self, number: int, value: int) -> None:
        """Count a fingerprint of what arrived of one request."""
        self._arrived[number] = (self._arrived[number] + value) % MODULUS

    def made(self, number: int, value: int) -> None:
        """Note the fingerprint of what the device has made of a request that was encoded on the way."""
        self._made[number] = value

    def landed(self, nbytes: int) -> None:
        """One more batch has arrived."""
        self.batches_left -= 1
        if self._first is None:
            self._first = (perf_counter(), nbytes)

    def recall(self) -> None:
        """Take what the device saw at the boundary, although nothing arrives. Waits; raises nothing."""
        try:
            self.boundary.synchronize()
            self.expected = self.prints.values()
        except Exception:  # noqa: BLE001 - whatever the driver raises: nothing is known then
            self.expected = []

    def judge(self) -> None:
        """Compare what arrived with what the device saw at the boundary, once all has arrived.

        Another thread may cancel it meanwhile, and so drop its requests: then nobody asks any longer.
        """
        requests = self.requests
        if len(requests) != len(self._arrived):
            return
        if self._look:
            self.expected = self.prints.values()
            return
        if self.nbytes:
            stood = iter(self.prints.values())
            self.expected = [
                next(stood) if request.form is None else self._made[number]
                for number, request in enumerate(requests)
            ]
        else:  # nothing had to be moved, so nothing was awaited
            self.expected = [0] * len(requests)
        rows = zip(requests, self.expected, self._arrived, strict=True)
        self.lost = [request for request, expected, arrived in rows if expected != arrived]


@dataclass(slots=True, eq=False)
class Slot:
    """One place of the staging ring.

    Attributes:
        memory: Device memory that a batch is packed into.
        bounce: Pinned memory that it goes to, where the arena itself is not registered.
        copy: The batch that it was given to last, until that has landed.
    """

    memory: Any
    bounce: Bytes | None = None
    copy: BatchCopy | None = None


@dataclass(slots=True, eq=False)
class BatchCopy:
    """One batch on its way.

    Attributes:
        batch: What it carries; holds the sources.
        result: What it is part of.
        order: When it may leave, among those that wait: by urgency, and then in the order of sending.
        memory: Device memory that it is packed in, or waits in; ``None`` before.
        base: Byte of that memory where the batch starts.
        slot: Its slot of the ring, if it has one.
        packed: Once this is complete, its sources may be overwritten; ``None`` before that was queued.
        landed: Once this is complete, it has left the device; ``None`` before that was queued.
        prints: Of what was encoded into its slot, in the order of the slices; ``None`` if nothing was.
        keep: What else must be kept alive until it has landed.
        beside: Whether it was packed on a stream of its own, so that an update has to wait for it.
        claimed: Whether a thread is about to receive it on the host.
        over: Whether it was received.
    """

    batch: Batch
    result: DeviceCopyResult
    order: tuple[int, int]
    memory: Any = None
    base: int = 0
    slot: Slot | None = None
    packed: Event | None = None
    landed: Event | None = None
    prints: Prints | None = None
    keep: list[object] = field(default_factory=list)
    beside: bool = True
    claimed: bool = False
    over: bool = False

    def __lt__(self, other: BatchCopy) -> bool:
        """Order by urgency, for a heap."""
        return self.order < other.order
