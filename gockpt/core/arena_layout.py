"""Layout of the arena: the offset of every chunk of every array, in memory as in its file.

Pure integer geometry. The arena's pages are written to disk unchanged: a *slot* holds one chunk's bytes,
4096-aligned, with room for the 4-byte checksum and zeros up to the next page. Arrays of less than 64 KiB are
written through the page cache, so their slots are 64-aligned: thousands of them need not take a page each.
Arrays are cut along dimension 0 only, on a regular grid, so that a chunk is contiguous in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gockpt.core.array_spec import ArraySpec  # noqa: TC001 - as in descriptors

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "ALIGNMENT",
    "CHECKSUM_BYTES",
    "SMALL_ALIGNMENT",
    "SMALL_LIMIT",
    "ArenaLayout",
    "ArrayLayout",
    "Slot",
    "chunk_rows",
    "lay_out",
    "slot_bytes",
]

ALIGNMENT = 4096
CHECKSUM_BYTES = 4
SMALL_ALIGNMENT = 64
SMALL_LIMIT = 64 << 10
"""Arrays of one chunk are small if they have fewer bytes."""
WHOLE_LIMIT = 96 * 10**6
CHUNK_TARGET = 64 * 10**6


@dataclass(frozen=True, slots=True)
class Slot:
    """One chunk's place in the arena.

    Attributes:
        chunk: Index of the chunk along dimension 0.
        row: First row (index of dimension 0) it holds; 0 for a 0-d array.
        rows: Rows it holds; fewer than the chunk's for the last chunk of an array.
        offset: Byte offset in the arena, a multiple of :data:`ALIGNMENT`; of :data:`SMALL_ALIGNMENT` if the
            array is small.
        nbytes: Bytes of the rows held (no padding, no checksum).
        capacity: Bytes reserved, a multiple of the same, ``>= nbytes + 4``.
    """

    chunk: int
    row: int
    rows: int
    offset: int
    nbytes: int
    capacity: int


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """One array, its chunk shape and its slots in chunk order (none for an empty array)."""

    spec: ArraySpec
    chunk_shape: tuple[int, ...]
    slots: tuple[Slot, ...]

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of one whole chunk as Zarr stores it, with edge padding, without checksum."""
        return math.prod(self.chunk_shape) * self.spec.itemsize


@dataclass(frozen=True, slots=True)
class ArenaLayout:
    """All arrays of one checkpoint and the arena bytes they take."""

    arrays: tuple[ArrayLayout, ...]
    nbytes: int


def slot_bytes(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """Return the bytes reserved for a chunk of ``nbytes`` and its checksum: whole pages, by default."""
    return -(-(nbytes + CHECKSUM_BYTES) // alignment) * alignment


def chunk_rows(shape: tuple[int, ...], itemsize: int) -> int:
    """Return the number of rows of dimension 0 in one chunk.

    Whole arrays up to 96 MB are one chunk; larger ones are cut into ``ceil(bytes / 64 MB)`` parts
    of equal rows (the last may hold fewer). Always at least 1.

    Examples:
        >>> chunk_rows((50257, 768), 4)
        16753
        >>> chunk_rows((3,), 4)
        3
    """
    rows = max(1, shape[0]) if shape else 1
    nbytes = math.prod(shape) * itemsize
    if nbytes <= WHOLE_LIMIT:
        return rows
    parts = min(rows, -(-nbytes // CHUNK_TARGET))
    return -(-rows // parts)


def lay_out(specs: Iterable[ArraySpec], *, base: int = 0) -> ArenaLayout:
    """Return the layout of all chunks of all arrays, in order from arena offset ``base``.

    Returns:
        The layout; ``nbytes`` is the offset of the next free byte, counted from offset 0.

    Raises:
        ValueError: If ``base`` is not a multiple of :data:`ALIGNMENT`.
    """
    if base % ALIGNMENT:
        msg = f"base must be a multiple of {ALIGNMENT}, got {base}"
        raise ValueError(msg)
    offset = base
    arrays = []
    for spec in specs:
        per_chunk = chunk_rows(spec.shape, spec.itemsize)
        chunk_shape = (per_chunk, *(max(1, n) for n in spec.shape[1:])) if spec.shape else ()
        total_rows = spec.shape[0] if spec.shape else 1
        row_nbytes = spec.nbytes // total_rows if total_rows else 0
        slots = []
        # A chunk that is written with padding is written in whole pages.
        small = spec.nbytes < SMALL_LIMIT and per_chunk >= total_rows
        alignment = SMALL_ALIGNMENT if small else ALIGNMENT
        if spec.numel:
            offset = -(-offset // alignment) * alignment
            for chunk, row in enumerate(range(0, total_rows, per_chunk)):
                rows = min(per_chunk, total_rows - row)
                nbytes = rows * row_nbytes
                capacity = slot_bytes(nbytes, alignment)
                slots.append(Slot(chunk, row, rows, offset, nbytes, capacity))
                offset += capacity
        arrays.append(ArrayLayout(spec, chunk_shape, tuple(slots)))
    return ArenaLayout(tuple(arrays), offset)
