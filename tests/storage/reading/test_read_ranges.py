"""A plan, carried out on memory, gives numpy's own slice, and reads no more than it must."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.core.array_spec import ArraySpec
from gockpt.core.boxes import Box
from gockpt.storage.read.read_plan import ByteRange, Grid, plan_reads, scatter

DTYPE_OF = {1: "uint8", 2: "int16", 4: "float32", 8: "int64", 16: "complex128"}


def grid_of(shape, chunk_rows, itemsize, block):
    spec = ArraySpec(("a",), shape, DTYPE_OF[itemsize])
    chunk = (chunk_rows, *(max(1, n) for n in shape[1:])) if shape else ()
    return Grid(spec, chunk, block)


def contents(grid):
    """Return distinct bytes for every element, row-major, as ``shape + (itemsize,)``."""
    n = grid.spec.numel
    counted = np.arange(1, n + 1, dtype="<u8").view(np.uint8).reshape(n, 8)
    wide = np.concatenate([counted, counted ^ 0xA5], axis=1)[:, : grid.spec.itemsize]
    return np.ascontiguousarray(wide).reshape(*grid.spec.shape, grid.spec.itemsize)


def chunk_bytes(grid, data, chunk):
    if not grid.spec.shape:
        return data.reshape(-1)
    return data[chunk * grid.chunk_rows : (chunk + 1) * grid.chunk_rows].reshape(-1)


def carry_out(grid, box, plan, data):
    """Fill the box as the plan says, from memory; returns it with the number of bytes taken."""
    out = np.full(box.numel * grid.spec.itemsize, 0xEE, np.uint8)
    taken = 0
    for read in plan:
        file = chunk_bytes(grid, data, read.chunk)
        assert file.nbytes == grid.real_nbytes(read.chunk)
        for part in read.ranges:
            piece = file[part.start : part.stop]
            assert piece.nbytes == part.nbytes
            taken += part.nbytes
            if read.run is None:
                scatter(grid, box, read, part.start, piece, out)
            else:
                low, high = max(part.start, read.run.start), min(part.stop, read.run.stop)
                at = read.target + low - read.run.start
                out[at : at + high - low] = file[low:high]
    return out, taken


@st.composite
def cases(draw):
    ndim = draw(st.integers(0, 4))
    shape = tuple(draw(st.integers(1, 7)) for _ in range(ndim))
    itemsize = draw(st.sampled_from(sorted(DTYPE_OF)))
    grid = grid_of(shape, draw(st.integers(1, max(1, shape[0] if shape else 1))), itemsize, 16)
    start = tuple(draw(st.integers(0, n)) for n in shape)
    extent = tuple(draw(st.integers(0, n - at)) for n, at in zip(shape, start, strict=True))
    return grid, Box(start, extent)


@given(cases(), st.booleans(), st.sampled_from([16, 48, 1 << 20]), st.integers(0, 64))
def test_plan_gives_the_slice(case, verify, piece, max_gap):
    grid, box = case
    data = contents(grid)
    plan = plan_reads(grid, box, verify=verify, piece=piece, max_gap=max_gap)
    out, taken = carry_out(grid, box, plan, data)
    where = tuple(slice(at, at + n) for at, n in zip(box.start, box.shape, strict=True))
    assert out.tobytes() == data[where].tobytes()
    assert [read.chunk for read in plan] == sorted({read.chunk for read in plan})
    for read in plan:
        assert read.ranges
        for part in read.ranges:
            assert 0 < part.nbytes <= piece
            if verify:
                assert part.start % 16 == 0
                assert part.stop % 16 == 0 or part.stop == grid.real_nbytes(read.chunk)
        for one, other in zip(read.ranges, read.ranges[1:], strict=False):
            assert one.stop <= other.start if piece < 1 << 20 else one.stop < other.start
    if not verify and all(read.run is not None for read in plan):
        assert taken == box.numel * grid.spec.itemsize


@given(cases())
def test_no_gap_allowed_reads_at_most_four_times_what_is_wanted(case):
    grid, box = case
    plan = plan_reads(grid, box, verify=False, piece=1 << 20, max_gap=0)
    taken = sum(part.nbytes for read in plan for part in read.ranges)
    assert taken <= 4 * box.numel * grid.spec.itemsize


def test_rows_are_read_exactly_and_straight():
    grid = grid_of((100, 8), 30, 4, 1 << 20)
    plan = plan_reads(grid, Box((20, 0), (50, 8)), verify=False, piece=1 << 23, max_gap=0)
    assert [(read.chunk, read.run, read.target) for read in plan] == [
        (0, ByteRange(20 * 32, 10 * 32), 0),
        (1, ByteRange(0, 30 * 32), 10 * 32),
        (2, ByteRange(0, 10 * 32), 40 * 32),
    ]
    assert all(read.ranges == (read.run,) for read in plan)


def test_verified_rows_are_widened_to_their_blocks():
    block = 1 << 20
    grid = grid_of((1 << 20, 4), 1 << 20, 4, block)  # 16 MiB
    (read,) = plan_reads(grid, Box((70_000, 0), (10, 4)), verify=True, piece=1 << 23, max_gap=1 << 16)
    assert read.run == ByteRange(1_120_000, 160)
    assert read.ranges == (ByteRange(block, block),)
    (read,) = plan_reads(grid, Box((65_530, 0), (10, 4)), verify=True, piece=1 << 23, max_gap=1 << 16)
    assert read.ranges == (ByteRange(0, 2 * block),)


def test_columns_far_apart_are_not_read_as_one_span():
    wide = 1 << 20
    grid = grid_of((8, wide), 8, 1, 1 << 20)
    box = Box((0, 100), (8, 1000))
    (read,) = plan_reads(grid, box, verify=False, piece=1 << 23, max_gap=1 << 16)
    assert read.run is None
    assert read.ranges == tuple(ByteRange(row * wide + 100, 1000) for row in range(8))
    (read,) = plan_reads(grid, box, verify=False, piece=1 << 23, max_gap=wide - 1000)
    assert len(read.ranges) == 8
    (read,) = plan_reads(grid, box, verify=False, piece=1 << 23, max_gap=wide - 999)
    assert read.ranges == (ByteRange(100, 7 * wide + 1000),)
    (read,) = plan_reads(grid, Box((0, 0), (8, wide // 4)), verify=False, piece=1 << 23, max_gap=0)
    assert read.ranges == (ByteRange(0, 7 * wide + wide // 4),)


def test_blocks_that_touch_are_read_as_one():
    grid = grid_of((4, 16), 4, 1, 16)
    (read,) = plan_reads(grid, Box((0, 0), (4, 2)), verify=True, piece=1 << 20, max_gap=0)
    assert read.ranges == (ByteRange(0, 64),)
    (read,) = plan_reads(grid, Box((0, 0), (4, 2)), verify=False, piece=1 << 20, max_gap=0)
    assert read.ranges == tuple(ByteRange(16 * row, 2) for row in range(4))


def test_rows_that_only_share_a_block_with_wanted_ones_are_left_alone():
    grid = grid_of((4, 20), 4, 1, 16)
    box = Box((1, 1), (2, 18))
    (read,) = plan = plan_reads(grid, box, verify=True, piece=1 << 20, max_gap=16)
    assert read.ranges == (ByteRange(16, 48),)  # from within row 0 to within row 3
    data = contents(grid)
    assert carry_out(grid, box, plan, data)[0].tobytes() == data[1:3, 1:19].tobytes()


def test_a_plan_for_more_than_an_exabyte_is_only_arithmetic():
    rows = 1 << 50
    grid = grid_of((rows, 1024), rows // 4, 4, 1 << 20)
    (read,) = plan_reads(grid, Box((rows - 2, 1), (2, 3)), verify=True, piece=1 << 23, max_gap=1 << 16)
    assert read.chunk == 3
    assert read.ranges[-1].stop == grid.real_nbytes(3) == rows // 4 * 4096
    assert grid.first_block(3) == 3 * (rows // 4 * 4096 >> 20)


@given(cases())
def test_blocks_are_counted_chunk_by_chunk(case):
    grid, _ = case
    counted = 0
    chunks = range(math.ceil(grid.rows / grid.chunk_rows))
    for chunk in chunks:
        assert grid.first_block(chunk) == counted
        counted += math.ceil(grid.real_nbytes(chunk) / grid.block)
    assert grid.first_block(len(chunks)) == counted
    assert sum(grid.real_nbytes(chunk) for chunk in chunks) == grid.spec.nbytes


@pytest.mark.parametrize("box", [Box((0,), (1,)), Box((0, 0), (6, 1)), Box((5, 2), (0, 2)), Box((), ())])
def test_a_box_outside_is_refused(box):
    with pytest.raises(ValueError, match="does not lie inside an array of shape"):
        plan_reads(grid_of((5, 3), 2, 4, 16), box, verify=True, piece=16, max_gap=0)
