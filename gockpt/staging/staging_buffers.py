"""Memory that copies off a device pass through: staging slots, scratch for a snapshot, pinned memory."""

from __future__ import annotations

import logging
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch

from gockpt.staging.in_flight import Slot

if TYPE_CHECKING:
    from gockpt.staging.device import Device
    from gockpt.staging.device_budget import Room
    from gockpt.staging.in_flight import BatchCopy

__all__ = ["StagingBuffers"]

RETRY_SECONDS = 60.0
"""Scratch memory that the device had no room for is asked for again after so long."""

_log = logging.getLogger("gockpt")


class StagingBuffers:
    """All memory of one device stager, within its room. Taken when first needed, kept until released.

    Batches get slots in turn, so the next one is always the one whose batch leaves first.
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
        self._scratch_from = 0.0

    @property
    def next(self) -> Slot:
        """The slot whose turn it is."""
        if self._next == len(self._slots):
            # Filled in as they are needed: a small state takes less.
            bounce = self._device.pinned(self._room.slot_bytes) if self._bounced else None
            self._slots.append(Slot(self._device.allocate(self._room.slot_bytes), bounce))
        return self._slots[self._next]

    def take(self, copy: BatchCopy) -> Slot:
        """Give the next slot to a batch."""
        slot = self.next
        slot.copy = copy
        self._next = (self._next + 1) % self._room.slots
        return slot

    def scratch(self, nbytes: int) -> tuple[Any, int] | None:
        """Return scratch memory and the place in it for a batch; ``None`` if there is not that much free."""
        if not self._undrained:
            self._filled = 0
        if self._room.scratch_bytes - self._filled < nbytes:
            return None
        if self._scratch is None and not self._allocate_scratch():
            return None
        place = self._filled
        self._filled += -(-nbytes // 64) * 64
        self._undrained += 1
        return self._scratch, place

    def _allocate_scratch(self) -> bool:
        """Take the scratch memory; whether there was room. Without it, updates wait for copies instead."""
        if monotonic() < self._scratch_from:
            return False
        try:
            self._scratch = self._device.allocate(self._room.scratch_bytes)
        except torch.OutOfMemoryError as error:
            self._scratch_from = monotonic() + RETRY_SECONDS
            _log.warning(
                "%s has no room for %d bytes of snapshot, so updates wait for copies: %s",
                *(self._device.name, self._room.scratch_bytes, error),
            )
            return False
        return True

    def drained(self) -> None:
        """Take note that one batch has left the scratch memory."""
        self._undrained -= 1

    def free(self) -> None:
        """Forget which batch had what: nothing is under way any more."""
        self._undrained = 0
        for slot in self._slots:
            slot.copy = None

    def release(self) -> None:
        """Give all of it back. Nothing may be under way."""
        self.free()
        slots, self._slots, self._next = self._slots, [], 0
        scratch, self._scratch = self._scratch, None
        for slot in slots:
            self._device.release(slot.memory)
        if scratch is not None:
            self._device.release(scratch)
