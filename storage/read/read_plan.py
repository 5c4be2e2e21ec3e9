"""From a wanted box to byte ranges of chunk files, and from their bytes to the wanted box.

Pure: no file is touched here. Chunks are cut along dimension 0 only, so a chunk's real rows stand in
row-major order at the start of its file. Legend: a *span* is a stretch of a chunk's file that is
worth reading in one go; its ends are wanted, what lies between may be gaps.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gockpt.core.boxes import Box, Overlap, overlap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gockpt.core.array_spec import ArraySpec

__all__ = ["ByteRange", "ChunkRead", "Grid", "plan_reads", "scatter"]

_DENSE = 4  # a span is read as a whole when at least 1/4 of it is wanted


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A stretch of bytes.

    Attributes:
        start: First byte.
        nbytes: Length.
    """

    start: int
    nbytes: int

    @property
    def stop(self) -> int:
        """First byte behind it."""
        return self.start + self.nbytes


@dataclass(frozen=True, slots=True)
class Grid:
    """How an array is cut into chunks. Everything is computed, nothing is stored per chunk.

    Attributes:
        spec: The array.
        chunk_shape: Shape of every chunk; beyond dimension 0 it spans the array.
        block: Bytes per checksummed block.
    """

    spec: ArraySpec
    chunk_shape: tuple[int, ...]
    block: int

    @property
    def rows(self) -> int:
        """Extent of dimension 0; 1 for a 0-d array."""
        return self.spec.shape[0] if self.spec.shape else 1

    @property
    def chunk_rows(self) -> int:
        """Rows of dimension 0 in a whole chunk; 1 for a 0-d array."""
        return self.chunk_shape[0] if self.chunk_shape else 1

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row of dimension 0."""
        return math.prod(self.spec.shape[1:]) * self.spec.itemsize

    def first_block(self, chunk: int) -> int:
        """Return how many blocks the chunks before ``chunk`` have."""
        if chunk == 0:
            return 0
        whole = -(-self.chunk_rows * self.row_nbytes // self.block)
        return (chunk - 1) * whole + -(-self.real_nbytes(chunk - 1) // self.block)

    def real_nbytes(self, chunk: int) -> int:
        """Return the bytes of a chunk's real rows, which stand at the start of its file."""
        return min(self.chunk_rows, self.rows - chunk * self.chunk_rows) * self.row_nbytes

    def box(self, chunk: int) -> Box:
        """Return the region of the array that a chunk really holds."""
        first = chunk * self.chunk_rows
        start = (first, *(0 for _ in self.spec.shape[1:]))
        rows = min(self.chunk_rows, self.rows - first)
        return Box(start, (rows, *self.spec.shape[1:])) if self.spec.shape else Box((), ())


@dataclass(frozen=True, slots=True)
class ChunkRead:
    """What to read of one chunk's file, and where it belongs.

    Attributes:
        chunk: Index of the chunk along dimension 0.
        shared: The wanted region inside the chunk, and where it starts inside the wanted box.
        run: The wanted bytes of the file where they are one unbroken stretch, in the file and in the
            target alike; else ``None``, and what was read is to be scattered.
        target: Where ``run`` goes: a byte offset in the wanted box; 0 without a run.
        ranges: What to read, in file order, apart from each other, none longer than a piece.
    """

    chunk: int
    shared: Overlap
    run: ByteRange | None
    target: int
    ranges: tuple[ByteRange, ...]


def plan_reads(grid: Grid, box: Box, *, verify: bool, piece: int, max_gap: int) -> tuple[ChunkRead, ...]:
    """Return what to read so that ``box`` can be filled: chunks in order, bytes in file order.

    Args:
        grid: The array and its chunks.
        box: The wanted region, inside the array.
        verify: Whether ranges are widened to whole checksummed blocks.
        piece: Longest range, a multiple of the block.
        max_gap: Gaps below this many bytes are read rather than skipped, whatever their share.

    Raises:
        ValueError: If the box has another rank or reaches out of the array.
    """
    shape = grid.spec.shape
    if len(box.shape) != len(shape) or any(
        at + n > extent for at, n, extent in zip(box.start, box.shape, shape, strict=True)
    ):
        msg = f"{box} does not lie inside an array of shape {shape}"
        raise ValueError(msg)
    if not box.numel:
        return ()
    if box.shape == shape and grid.chunk_rows >= grid.rows:
        # All of an array of one chunk: what is worked out below, sooner.
        run = ByteRange(0, grid.spec.nbytes)
        return (ChunkRead(0, Overlap(shape, box.start, box.start), run, 0, tuple(_pieces([run], piece))),)
    first, rows = (box.start[0], box.shape[0]) if shape else (0, 1)
    reads = []
    for chunk in range(first // grid.chunk_rows, -(-(first + rows) // grid.chunk_rows)):
        shared = overlap(grid.box(chunk), box)
        if shared is not None:  # never: these chunks do overlap; said to the type checker
            reads.append(_plan_chunk(grid, box, chunk, shared, verify=verify, piece=piece, max_gap=max_gap))
    return tuple(reads)


def _plan_chunk(
    grid: Grid, box: Box, chunk: int, shared: Overlap, *, verify: bool, piece: int, max_gap: int
) -> ChunkRead:
    """Return what to read of one chunk."""
    strides = _strides(grid.chunk_shape, grid.spec.itemsize)
    spans = _spans(shared, strides, grid.spec.itemsize, max_gap)
    wanted = math.prod(shared.shape) * grid.spec.itemsize
    first = next(spans)
    run = first if first.nbytes == wanted else None
    limit = grid.real_nbytes(chunk)
    block = grid.block if verify else 1
    ranges: list[ByteRange] = []
    for span in itertools.chain([first], spans):
        start = span.start // block * block
        stop = min(-(-span.stop // block) * block, limit)
        if ranges and start <= ranges[-1].stop:
            ranges[-1] = ByteRange(ranges[-1].start, stop - ranges[-1].start)
        else:
            ranges.append(ByteRange(start, stop - start))
    target = 0
    if run is not None:
        inside = _strides(box.shape, grid.spec.itemsize)
        target = sum(at * stride for at, stride in zip(shared.in_wanted, inside, strict=True))
    return ChunkRead(chunk, shared, run, target, tuple(_pieces(ranges, piece)))


def _strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the bytes between neighbours in every dimension of a row-major array."""
    return tuple(math.prod(shape[d + 1 :]) * itemsize for d in range(len(shape)))


def _spans(shared: Overlap, strides: tuple[int, ...], itemsize: int, max_gap: int) -> Iterator[ByteRange]:
    """Yield the spans of a chunk's file to read, in file order; never none.

    Seen from the innermost dimension, the gaps between a region's stretches only grow and its
    density only falls. So there is one dimension up to which stretches are read with their gaps.
    """
    span, wanted, apart = itemsize, itemsize, len(strides)
    for d in reversed(range(len(strides))):
        n = shared.shape[d]
        whole = (n - 1) * strides[d] + span
        if n > 1 and strides[d] - span >= max_gap and wanted * n * _DENSE < whole:
            break
        span, wanted, apart = whole, wanted * n, d
    start = sum(at * stride for at, stride in zip(shared.in_saved, strides, strict=True))
    for index in itertools.product(*(range(n) for n in shared.shape[:apart])):
        at = sum(i * stride for i, stride in zip(index, strides[:apart], strict=True))
        yield ByteRange(start + at, span)


def _pieces(ranges: list[ByteRange], piece: int) -> Iterator[ByteRange]:
    """Cut ranges into pieces of at most ``piece`` bytes."""
    for whole in ranges:
        for start in range(whole.start, whole.stop, piece):
            yield ByteRange(start, min(piece, whole.stop - start))


def scatter(grid: Grid, box: Box, read: ChunkRead, start: int, data: np.ndarray, out: np.ndarray) -> None:
    """Copy from bytes of a chunk's file whatever is wanted into its place in the target.

    Args:
        grid: The array and its chunks.
        box: The wanted region.
        read: The plan for this chunk.
        start: Where in the chunk's file ``data`` begins; a multiple of the item size.
        data: The bytes, 1-D ``uint8``; whole elements.
        out: The target, 1-D ``uint8`` of the box's bytes; only wanted elements are written.
    """
    dtype = _carrier(grid.spec.itemsize)
    where = tuple(slice(at, at + n) for at, n in zip(read.shared.in_wanted, read.shared.shape, strict=True))
    target = out.view(dtype).reshape(box.shape)[where]
    first = start // grid.spec.itemsize
    _scatter(data.view(dtype), first, grid.chunk_shape, read.shared.in_saved, target)


def _carrier(itemsize: int) -> np.dtype:
    """Return a dtype whose assignment moves the bits of an element as they are."""
    return np.dtype(f"u{itemsize}" if itemsize <= 8 else f"V{itemsize}")


def _scatter(
    data: np.ndarray, first: int, chunk: tuple[int, ...], begin: tuple[int, ...], target: np.ndarray
) -> None:
    """Copy elements ``first...`` of a row-major ``chunk`` to ``target``, whose origin is at ``begin``.

    Whole rows go by one strided copy; the broken rows at either end are the same task with one
    dimension fewer. So at most two copies per dimension, however many stretches there are.
    """
    row = math.prod(chunk[1:])
    stop = first + len(data)
    low, high = -(-first // row), stop // row
    if low > high:
        _broken_row(data, first, low - 1, row, chunk, begin, target)
        return
    if first < low * row:
        _broken_row(data[: low * row - first], first, low - 1, row, chunk, begin, target)
    a, b = max(low, begin[0]), min(high, begin[0] + target.shape[0])
    if a < b:
        rows = data[a * row - first : b * row - first].reshape(b - a, *chunk[1:])
        inner = tuple(slice(at, at + n) for at, n in zip(begin[1:], target.shape[1:], strict=True))
        target[a - begin[0] : b - begin[0]] = rows[(slice(None), *inner)]
    if high * row < stop:
        _broken_row(data[high * row - first :], high * row, high, row, chunk, begin, target)


def _broken_row(
    data: np.ndarray,
    first: int,
    index: int,
    row: int,
    chunk: tuple[int, ...],
    begin: tuple[int, ...],
    target: np.ndarray,
) -> None:
    """Copy a part of row ``index``: the same task one dimension further in."""
    if begin[0] <= index < begin[0] + target.shape[0]:
        _scatter(data, first - index * row, chunk[1:], begin[1:], target[index - begin[0]])
