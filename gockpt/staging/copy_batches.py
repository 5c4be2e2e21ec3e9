"""Copies from a device, cut into batches: plain integers, no device.

A *request* is one stretch of device memory and its place on the host. Requests are cut into *batches*, each
of which is packed into one slot of the staging ring by one launch, and copied from it in one or a few copies.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from gockpt.kernels.fingerprint_numba import WORD

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from gockpt.staging.stager import CopyRequest

__all__ = ["Batch", "HostCopy", "Slice", "cut_batches"]

ALIGNMENT = 64
"""Runs start at multiples of it in a slot, and requests are cut at such: whole words, wide accesses."""


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """The bytes of one request that travel in one batch.

    Attributes:
        number: Which request, counted from 0.
        request: That request.
        low: First byte within it.
        nbytes: How many.
        place: Where they stand in the slot (or the arena's piece).
    """

    number: int
    request: CopyRequest
    low: int
    nbytes: int
    place: int

    @property
    def offset(self) -> int:
        """Byte of the arena where they go."""
        return self.request.offset + self.low


@dataclass(slots=True)
class HostCopy:
    """One copy from a slot into an arena: ``nbytes`` from ``place`` to ``offset`` of arena ``arena``."""

    place: int
    arena: int
    offset: int
    nbytes: int


@dataclass(slots=True)
class Batch:
    """Contents of one launch of the packing kernel.

    Attributes:
        slices: What is in it, in order.
        copies: How it leaves its slot. None for a batch that is stored into the arena directly.
        used: Bytes of the slot that it takes.
        piece: For a batch that is stored directly: the arena, and the first byte of the piece of it.
    """

    slices: list[Slice] = field(default_factory=list)
    copies: list[HostCopy] = field(default_factory=list)
    used: int = 0
    piece: tuple[int, int] | None = None

    @property
    def owners(self) -> frozenset[Hashable]:
        """Owners of its sources, which may overwrite them."""
        return frozenset(piece.request.owner for piece in self.slices)

    @property
    def nbytes(self) -> int:
        """Bytes it carries."""
        return sum(piece.nbytes for piece in self.slices)


def cut_batches(
    requests: Iterable[CopyRequest],
    *,
    slot_bytes: int,
    copy_bytes: int,
    piece_bytes: int,
    direct: bool = False,
) -> list[Batch]:
    """Cut requests into batches, in their order.

    Only what is adjacent in an arena travels in one copy: no byte between two requests is ever written.

    Args:
        requests: What is to be moved.
        slot_bytes: The most a batch takes of its slot; a multiple of 64.
        copy_bytes: The most one copy moves.
        piece_bytes: Arenas are registered in pieces of this size; no copy crosses from one into another.
        direct: Whether batches are stored into the arena, each into one piece of it.

    Raises:
        ValueError: If a size is not usable, an offset of what is encoded no multiple of 64, or a slot too
            small for it, since it travels in one piece; or if what is stored directly would be cut inside a
            word of a fingerprint.
    """
    if slot_bytes < ALIGNMENT or slot_bytes % ALIGNMENT or copy_bytes < 1 or piece_bytes % ALIGNMENT:
        msg = f"slots of {slot_bytes}, copies of {copy_bytes}, pieces of {piece_bytes} bytes don't work"
        raise ValueError(msg)
    batches: list[Batch] = []
    batch = Batch()
    for number, request in enumerate(requests):
        source = request.source
        if request.form is not None:
            batch = _encoded(batches, batch, Slice(number, request, 0, request.nbytes, 0), slot_bytes)
            whole = HostCopy(batch.slices[-1].place, request.arena, request.offset, request.nbytes)
            _extend(batch.copies, whole, copy_bytes, piece_bytes)
            continue
        low = 0
        while low < source.nbytes:
            offset = request.offset + low
            piece = (request.arena, offset // piece_bytes * piece_bytes)
            nbytes = source.nbytes - low
            if direct:
                nbytes = min(nbytes, piece[1] + piece_bytes - offset)
            place = batch.used if _follows(batch, request.arena, offset) else _aligned(batch.used)
            room = slot_bytes - place
            if (direct and batch.slices and batch.piece != piece) or (room < nbytes and room < ALIGNMENT):
                batches.append(batch)
                batch = Batch()
                continue
            if room < nbytes:
                nbytes = room // ALIGNMENT * ALIGNMENT
            if nbytes % WORD and low + nbytes < source.nbytes:
                msg = f"{source.nbytes} bytes at {request.offset} would be cut inside a word of {WORD} bytes"
                raise ValueError(msg)
            if direct:
                batch.piece = piece
            else:
                _extend(batch.copies, HostCopy(place, request.arena, offset, nbytes), copy_bytes, piece_bytes)
            batch.slices.append(Slice(number, request, low, nbytes, offset - piece[1] if direct else place))
            batch.used = place + nbytes
            low += nbytes
    if batch.slices:
        batches.append(batch)
    return batches


def _encoded(batches: list[Batch], batch: Batch, whole: Slice, slot_bytes: int) -> Batch:
    """Put what is encoded on the way into one batch; return that batch."""
    request = whole.request
    if request.offset % ALIGNMENT or request.nbytes > slot_bytes:
        msg = f"{request.form} at {request.offset} can't leave by a slot of {slot_bytes} bytes"
        raise ValueError(msg)
    if batch.slices and _aligned(batch.used) + request.nbytes > slot_bytes:
        batches.append(batch)
        batch = Batch()
    place = _aligned(batch.used)
    batch.slices.append(replace(whole, place=place))
    batch.used = place + request.nbytes
    return batch


def _aligned(place: int) -> int:
    return -(-place // ALIGNMENT) * ALIGNMENT


def _follows(batch: Batch, arena: int, offset: int) -> bool:
    """Whether a place in an arena is right behind what the batch holds last."""
    if not batch.slices:
        return False
    last = batch.slices[-1]
    return last.request.arena == arena and last.offset + last.nbytes == offset


def _extend(copies: list[HostCopy], more: HostCopy, copy_bytes: int, piece_bytes: int) -> None:
    """Add one stretch to the copies of a batch: to the last of them, as far as that may grow."""
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
