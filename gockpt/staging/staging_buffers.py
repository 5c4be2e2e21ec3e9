"""What loads pass through: the staging ring, scratch memory for a snapshot, pinned memory on the detour."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gockpt.staging.in_flight import Slot

if TYPE_CHECKING:
    from gockpt.staging.device import Device
    from gockpt.staging.device_budget import Room
    from gockpt.staging.in_flight import Flight

__all__ = ["Staging"]


class Staging:
    """All memory of one road, within its room. Taken when first needed, kept until released.

    Loads get slots in turn, so the next one is always the one whose load leaves first.
    """

    def __init__(self, device: Device, room: Room, *, bounced: bool) -> None:
        self._device = device
        self._room = room
        self._bounced = bounced
        self._slots: list[Slot] = []
        self._next = 0
        self._scratch: Any = None
        self._filled = 0
        self._undrained = 0

    @property
    def next(self) -> Slot:
        """The slot whose turn it is."""
        if self._next == len(self._slots):
            # Filled in as they are needed: a small state takes less.
            bounce = self._device.pinned(self._room.slot_bytes) if self._bounced else None
            self._slots.append(Slot(self._device.allocate(self._room.slot_bytes), bounce))
        return self._slots[self._next]

    def take(self, flight: Flight) -> Slot:
        """Give the next slot to a load."""
        slot = self.next
        slot.flight = flight
        self._next = (self._next + 1) % self._room.slots
        return slot

    def scratch(self, nbytes: int) -> tuple[Any, int] | None:
        """Return scratch memory and the place in it for a load; ``None`` if there is not that much free."""
        if not self._undrained:
            self._filled = 0
        if self._room.scratch_bytes - self._filled < nbytes:
            return None
        if self._scratch is None:
            self._scratch = self._device.allocate(self._room.scratch_bytes)
        place = self._filled
        self._filled += -(-nbytes // 64) * 64
        self._undrained += 1
        return self._scratch, place

    def drained(self) -> None:
        """Take note that one load has left the scratch memory."""
        self._undrained -= 1

    def free(self) -> None:
        """Forget which load had what: nothing is under way any more."""
        self._undrained = 0
        for slot in self._slots:
            slot.flight = None

    def release(self) -> None:
        """Give all of it back. Nothing may be under way."""
        self.free()
        slots, self._slots, self._next = self._slots, [], 0
        scratch, self._scratch = self._scratch, None
        for slot in slots:
            self._device.release(slot.memory)
        if scratch is not None:
            self._device.release(scratch)
