"""Regular chunk grid of an array: chunk names, rows, and the check that a layout is on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gockpt.core.arena_layout import ArrayLayout, Slot, slot_bytes

if TYPE_CHECKING:
    from gockpt.core.array_spec import ArraySpec

__all__ = ["chunk_key", "chunked_layout", "is_regular"]


def chunk_key(chunk: int, ndim: int) -> str:
    """Return the file name of a chunk inside its array's directory.

    Examples:
        >>> chunk_key(2, 3), chunk_key(0, 0)
        ('c.2.0.0', 'c')
    """
    return f"c.{chunk}" + ".0" * (ndim - 1) if ndim else "c"


def chunked_layout(spec: ArraySpec, chunk_shape: tuple[int, ...]) -> ArrayLayout:
    """Return an array's chunks on the grid that ``chunk_shape`` gives; slot offsets count from 0."""
    slots = []
    if spec.numel:
        total = spec.shape[0] if spec.shape else 1
        per_chunk = chunk_shape[0] if chunk_shape else 1
        row_nbytes = spec.nbytes // total
        offset = 0
        for chunk, row in enumerate(range(0, total, per_chunk)):
            rows = min(per_chunk, total - row)
            nbytes = rows * row_nbytes
            slots.append(Slot(chunk, row, rows, offset, nbytes, slot_bytes(nbytes)))
            offset += slot_bytes(nbytes)
    return ArrayLayout(spec, chunk_shape, tuple(slots))


def is_regular(layout: ArrayLayout) -> bool:
    """Whether an array's chunks are the ones that readers derive from its chunk shape."""
    shape, chunk = layout.spec.shape, layout.chunk_shape
    if len(shape) != len(chunk) or chunk[1:] != tuple(max(1, n) for n in shape[1:]):
        return False
    if any(not 1 <= rows <= max(1, total) for rows, total in zip(chunk[:1], shape, strict=False)):
        return False
    if len(layout.slots) == 1 and chunk == shape:
        # One chunk, as small arrays have: what is derived below, sooner.
        (slot,) = layout.slots
        rows = shape[0] if shape else 1
        return (slot.chunk, slot.row, slot.rows, slot.nbytes) == (0, 0, rows, layout.spec.nbytes)
    derived = chunked_layout(layout.spec, chunk).slots
    return [(slot.chunk, slot.row, slot.rows, slot.nbytes) for slot in layout.slots] == [
        (slot.chunk, slot.row, slot.rows, slot.nbytes) for slot in derived
    ]
