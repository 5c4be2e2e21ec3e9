"""Copies from a device, cut into loads: plain integers, no device.

A *shipment* is one stretch of device memory and its place on the host. Shipments are cut into *loads*, each
of which is packed into one slot of the staging ring by one launch, and copied from it in one or a few copies.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING

from gockpt.kernels.fingerprint_numba import WORD

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from gockpt.kernels.gradient16_launch import Form
    from gockpt.staging.device import Source

__all__ = ["HostCopy", "Load", "Shipment", "Slice", "Urgency", "load_up"]

ALIGNMENT = 64
"""Runs start at multiples of it in a slot, and shipments are cut at such: whole words, wide accesses."""


class Urgency(IntEnum):
    """In which order loads leave that wait at the same time."""

    BUFFER = 0
    """Due before the next forward pass: packed inside the call."""
    GRADIENT = 1
    """Due before the next backward pass: packed inside the call."""
    STATE = 2
    """Due before the next update: packed behind the step."""
    SNAPSHOT = 3
    """Packed inside the call into scratch memory of its own: due when that is needed again."""


@dataclass(frozen=True, slots=True, eq=False)
class Shipment:
    """One stretch on its way.

    Attributes:
        source: Where it is.
        arena: Index of the arena it goes to.
        offset: Byte of the arena where it goes.
        owner: Who overwrites the source; see ``DeviceTransfer.guard``.
        form: How it travels if it is encoded on the way, in one piece; see
            ``gockpt.kernels.gradient16_launch``. What arrives is then proven by what the device has made of
            it, at ``source.position``.
    """

    source: Source
    arena: int
    offset: int
    owner: Hashable
    form: Form | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return self.source.nbytes if self.form is None else self.form.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """The bytes of one shipment that travel in one load.

    Attributes:
        number: Which shipment, counted from 0.
        shipment: That shipment.
        low: First byte within it.
        nbytes: How many.
        place: Where they stand in the slot (or the arena's piece).
    """

    number: int
    shipment: Shipment
    low: int
    nbytes: int
    place: int

    @property
    def offset(self) -> int:
        """Byte of the arena where they go."""
        return self.shipment.offset + self.low


@dataclass(slots=True)
class HostCopy:
    """One copy from a slot into an arena: ``nbytes`` from ``place`` to ``offset`` of arena ``arena``."""

    place: int
    arena: int
    offset: int
    nbytes: int


@dataclass(slots=True)
class Load:
    """Contents of one launch of the packing kernel.

    Attributes:
        slices: What is in it, in order.
        copies: How it leaves its slot. None for a load that is stored into the arena directly.
        used: Bytes of the slot that it takes.
        piece: For a load that is stored directly: the arena, and the first byte of the piece of it.
    """

    slices: list[Slice] = field(default_factory=list)
    copies: list[HostCopy] = field(default_factory=list)
    used: int = 0
    piece: tuple[int, int] | None = None

    @property
    def owners(self) -> frozenset[Hashable]:
        """Owners of its sources, which may overwrite them."""
        return frozenset(piece.shipment.owner for piece in self.slices)

    @property
    def nbytes(self) -> int:
        """Bytes it carries."""
        return sum(piece.nbytes for piece in self.slices)


def load_up(
    shipments: Iterable[Shipment],
    *,
    slot_bytes: int,
    copy_bytes: int,
    piece_bytes: int,
    direct: bool = False,
) -> list[Load]:
    """Cut shipments into loads, in their order.

    Only what is adjacent in an arena travels in one copy: no byte between two shipments is ever written.

    Args:
        shipments: What is to be moved.
        slot_bytes: The most a load takes of its slot; a multiple of 64.
        copy_bytes: The most one copy moves.
        piece_bytes: Arenas are registered in pieces of this size; no copy crosses from one into another.
        direct: Whether loads are stored into the arena, each into one piece of it.

    Raises:
        ValueError: If a size is not usable, an offset of what is encoded no multiple of 64, or a slot too
            small for it, since it travels in one piece; or if what is stored directly would be cut inside a
            word of a fingerprint.
    """
    if slot_bytes < ALIGNMENT or slot_bytes % ALIGNMENT or copy_bytes < 1 or piece_bytes % ALIGNMENT:
        msg = f"slots of {slot_bytes}, copies of {copy_bytes}, pieces of {piece_bytes} bytes don't work"
        raise ValueError(msg)
    loads: list[Load] = []
    load = Load()
    for number, shipment in enumerate(shipments):
        source = shipment.source
        if shipment.form is not None:
            load = _encoded(loads, load, Slice(number, shipment, 0, shipment.nbytes, 0), slot_bytes)
            whole = HostCopy(load.slices[-1].place, shipment.arena, shipment.offset, shipment.nbytes)
            _extend(load.copies, whole, copy_bytes, piece_bytes)
            continue
        low = 0
        while low < source.nbytes:
            offset = shipment.offset + low
            piece = (shipment.arena, offset // piece_bytes * piece_bytes)
            nbytes = source.nbytes - low
            if direct:
                nbytes = min(nbytes, piece[1] + piece_bytes - offset)
            place = load.used if _follows(load, shipment.arena, offset) else _aligned(load.used)
            room = slot_bytes - place
            if (direct and load.slices and load.piece != piece) or (room < nbytes and room < ALIGNMENT):
                loads.append(load)
                load = Load()
                continue
            if room < nbytes:
                nbytes = room // ALIGNMENT * ALIGNMENT
            if nbytes % WORD and low + nbytes < source.nbytes:
                msg = f"{source.nbytes} bytes at {shipment.offset} would be cut inside a word of {WORD} bytes"
                raise ValueError(msg)
            if direct:
                load.piece = piece
            else:
                _extend(load.copies, HostCopy(place, shipment.arena, offset, nbytes), copy_bytes, piece_bytes)
            load.slices.append(Slice(number, shipment, low, nbytes, offset - piece[1] if direct else place))
            load.used = place + nbytes
            low += nbytes
    if load.slices:
        loads.append(load)
    return loads


def _encoded(loads: list[Load], load: Load, whole: Slice, slot_bytes: int) -> Load:
    """Put what is encoded on the way into one load; return that load."""
    shipment = whole.shipment
    if shipment.offset % ALIGNMENT or shipment.nbytes > slot_bytes:
        msg = f"{shipment.form} at {shipment.offset} can't leave by a slot of {slot_bytes} bytes"
        raise ValueError(msg)
    if load.slices and _aligned(load.used) + shipment.nbytes > slot_bytes:
        loads.append(load)
        load = Load()
    place = _aligned(load.used)
    load.slices.append(replace(whole, place=place))
    load.used = place + shipment.nbytes
    return load


def _aligned(place: int) -> int:
    return -(-place // ALIGNMENT) * ALIGNMENT


def _follows(load: Load, arena: int, offset: int) -> bool:
    """Whether a place in an arena is right behind what the load holds last."""
    if not load.slices:
        return False
    last = load.slices[-1]
    return last.shipment.arena == arena and last.offset + last.nbytes == offset


def _extend(copies: list[HostCopy], more: HostCopy, copy_bytes: int, piece_bytes: int) -> None:
    """Add one stretch to the copies of a load: to the last of them, as far as that may grow."""
    while more.nbytes:
        last = copies[-1] if copies else None
        most = min(more.nbytes, piece_bytes - more.offset % piece_bytes)
        if (
            last is not None
            and last.nbytes < copy_bytes
            and last.arena == more.arena
            and last.offset + last.nbytes == more.offset
            and last.place + last.nbytes == more.place
            and more.offset % piece_bytes
        ):
            step = min(most, copy_bytes - last.nbytes)
            last.nbytes += step
        else:
            step = min(most, copy_bytes)
            copies.append(HostCopy(more.place, more.arena, more.offset, step))
        more = HostCopy(more.place + step, more.arena, more.offset + step, more.nbytes - step)
