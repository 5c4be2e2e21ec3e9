"""Budget of device memory for staging, and its cost in training time: plain arithmetic.

The *staging ring* is a few slots that batches pass through. *Scratch* memory holds a snapshot: what is packed
into it at the boundary leaves later, and no update waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from gockpt.staging.copy_batches import ALIGNMENT

__all__ = ["COPY_BYTES", "Room", "make_room"]

COPY_BYTES = 32 << 20
"""The most one copy moves: others that share the bus, such as collectives, get in between."""

SLOTS = 4
"""Slots of the ring: one is packed, one is copied, and two stand by while the host looks what has landed."""

GRAIN = 512
"""Granularity of device allocators."""


@dataclass(frozen=True, slots=True)
class Room:
    """Device memory of a stager.

    Attributes:
        slot_bytes: Size of one slot of the staging ring.
        slots: How many there are.
        scratch_bytes: Room for a snapshot.
    """

    slot_bytes: int
    slots: int
    scratch_bytes: int

    @property
    def ring_bytes(self) -> int:
        """Size of the staging ring."""
        return self.slot_bytes * self.slots

    @property
    def nbytes(self) -> int:
        """Device memory that it takes."""
        return self.ring_bytes + self.scratch_bytes

    def stall(self, nbytes: int, *, bytes_per_second: float, hidden_seconds: float) -> float:
        """Return the seconds for which an update waits at the most.

        Args:
            nbytes: What leaves before it may overwrite the last of its own, in the order it leaves; nothing
                of a snapshot.
            bytes_per_second: Rate of copies to the host.
            hidden_seconds: Time from the boundary to the update.
        """
        # What is still in the ring has been packed: it needs not have left.
        return max(0.0, (nbytes - self.ring_bytes + self.slot_bytes) / bytes_per_second - hidden_seconds)


def make_room(limit: int, *, free: int, state_bytes: int) -> Room:
    """Share a bound of device memory between the staging ring and a snapshot.

    The ring comes first, up to four slots of 32 MB; what is left is scratch, up to the size of the state.

    Args:
        limit: ``Options.device_memory``.
        free: Bytes of device memory that nobody uses.
        state_bytes: What a save moves.
    """
    # More slots than the state fills would never be used.
    wanted = min(COPY_BYTES, max(GRAIN, state_bytes))
    slot = min(wanted, limit // SLOTS) // GRAIN * GRAIN
    slot = max(ALIGNMENT, slot)
    ring = slot * SLOTS
    scratch = max(0, min(limit, free) - ring)
    return Room(slot, SLOTS, min(scratch, -(-state_bytes // GRAIN) * GRAIN) // GRAIN * GRAIN)
