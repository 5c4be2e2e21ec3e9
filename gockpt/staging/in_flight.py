"""Copies under way: consignments, each sent by one call, flights of their loads, and slots they take."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from gockpt.kernels.fingerprint_numba import MODULUS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt

    from gockpt.staging.copy_batches import Load, Shipment, Urgency
    from gockpt.staging.device import Event, Prints

    Bytes = npt.NDArray[np.uint8]

__all__ = ["Consignment", "Flight", "Slot"]


class Consignment:
    """Copies that one call sent.

    Attributes:
        shipments: What was sent, in order; empty once ``done``, since sources need not live longer.
        nbytes: Bytes that it moves.
        began: When it was sent, in ``perf_counter`` seconds.
        ended: When it was ``done``.
        done: Set when all of it has arrived, or nothing of it can arrive any longer.
        lost: Shipments that did not arrive as they were at the boundary. Complete when ``done`` is set.
        error: Why it will not arrive; ``None`` if it did, or still may.
        expected: The fingerprints at the boundary, in order: the shipments', of what was encoded on the way
            as the device has made it, or those of what was only looked at; filled when ``done``, after an
            error too if the device still says them, else empty.
    """

    def __init__(
        self,
        shipments: Sequence[Shipment],
        urgency: Urgency,
        prints: Prints,
        boundary: Event,
        on_done: Callable[[], None] | None,
        *,
        look: bool = False,
    ) -> None:
        self.shipments: Sequence[Shipment] = tuple(shipments)
        self.began = self.ended = perf_counter()
        self.nbytes = sum(shipment.nbytes for shipment in shipments)
        self.urgency = urgency
        self.prints = prints
        self.boundary = boundary
        self.done = threading.Event()
        self.lost: list[Shipment] = []
        self.expected: list[int] = []
        self.error: BaseException | None = None
        self.on_done = on_done
        self.loads_left = 0
        self._look = look
        self._arrived = [0] * len(shipments)
        self._made: dict[int, int] = {}
        self._first: tuple[float, int] | None = None

    @property
    def proven(self) -> bool:
        """Whether all of it has arrived as it was at the boundary."""
        return self.done.is_set() and self.error is None and not self.lost

    @property
    def sample(self) -> tuple[int, float]:
        """Bytes and seconds that tell how fast it moved, once it is ``done``.

        From the first load's end to the last one's, since before that it may have waited for the boundary;
        of a single load, all of its time.
        """
        began, before = self._first or (self.began, 0)
        if self.error is not None or before == self.nbytes or self.ended <= began:
            began, before = self.began, 0
        return (0, 0.0) if self.error is not None else (self.nbytes - before, self.ended - began)

    def add(self, number: int, value: int) -> None:
        """Count a fingerprint of what arrived of one shipment."""
        self._arrived[number] = (self._arrived[number] + value) % MODULUS

    def made(self, number: int, value: int) -> None:
        """Note the fingerprint of what the device has made of a shipment that was encoded on the way."""
        self._made[number] = value

    def landed(self, nbytes: int) -> None:
        """One more load has arrived."""
        self.loads_left -= 1
        if self._first is None:
            self._first = (perf_counter(), nbytes)

    def end(self) -> None:
        """Let nobody wait for it any more."""
        self.shipments = ()
        self.ended = perf_counter()
        self.done.set()

    def tell(self) -> None:
        """Tell whoever wants to know that it has ended, once."""
        self.end()
        on_done, self.on_done = self.on_done, None
        if on_done is not None:
            on_done()

    def recall(self) -> None:
        """Take what the device saw at the boundary, although nothing arrives. Waits; raises nothing."""
        try:
            self.boundary.synchronize()
            self.expected = self.prints.values()
        except Exception:  # noqa: BLE001 - whatever the driver raises: nothing is known then
            self.expected = []

    def judge(self) -> None:
        """Compare what arrived with what the device saw at the boundary, once all has arrived."""
        if self._look:
            self.expected = self.prints.values()
            return
        if self.nbytes:
            stood = iter(self.prints.values())
            self.expected = [
                next(stood) if shipment.form is None else self._made[number]
                for number, shipment in enumerate(self.shipments)
            ]
        else:  # nothing had to be moved, so nothing was awaited
            self.expected = [0] * len(self.shipments)
        rows = zip(self.shipments, self.expected, self._arrived, strict=True)
        self.lost = [shipment for shipment, expected, arrived in rows if expected != arrived]


@dataclass(slots=True, eq=False)
class Slot:
    """One place of the staging ring.

    Attributes:
        memory: Device memory that a load is packed into.
        bounce: Pinned memory that it goes to, where the arena itself is not registered.
        flight: The load that it was given to last, until that has landed.
    """

    memory: Any
    bounce: Bytes | None = None
    flight: Flight | None = None


@dataclass(slots=True, eq=False)
class Flight:
    """One load on its way.

    Attributes:
        load: What it carries; holds the sources.
        consignment: What it is part of.
        order: When it may leave, among those that wait: by urgency, and then in the order of sending.
        memory: Device memory that it is packed in, or waits in; ``None`` before.
        base: Byte of that memory where the load starts.
        slot: Its slot of the ring, if it has one.
        packed: Once this is complete, its sources may be overwritten; ``None`` before that was queued.
        landed: Once this is complete, it has left the device; ``None`` before that was queued.
        prints: Of what was encoded into its slot, in the order of the slices; ``None`` if nothing was.
        keep: What else must be kept alive until it has landed.
        beside: Whether it was packed on a stream of its own, so that an update has to wait for it.
        claimed: Whether a thread is about to receive it on the host.
        over: Whether it was received.
    """

    load: Load
    consignment: Consignment
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

    def __lt__(self, other: Flight) -> bool:
        """Order by urgency, for a heap."""
        return self.order < other.order
