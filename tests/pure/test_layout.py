"""The arena's layout: every element has one place, chunks never touch, and pages are whole."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.core import arena_layout as layout_module
from gockpt.core.arena_layout import (
    ALIGNMENT,
    CHECKSUM_BYTES,
    SMALL_ALIGNMENT,
    SMALL_LIMIT,
    chunk_rows,
    lay_out,
    slot_bytes,
)
from gockpt.core.array_spec import DTYPES, ArraySpec

SHAPES = st.lists(st.integers(0, 40), max_size=4).map(tuple)
BIG = st.tuples(st.integers(1, 1 << 22), st.integers(1, 1 << 12))


@st.composite
def specs(draw):
    shapes = draw(st.lists(SHAPES | BIG, max_size=8))
    return [
        ArraySpec(("model", str(i)), shape, draw(st.sampled_from(sorted(DTYPES))))
        for i, shape in enumerate(shapes)
    ]


@given(specs(), st.integers(0, 3))
def test_slots_are_aligned_disjoint_and_inside(arrays, pages):
    base = pages * ALIGNMENT
    laid = lay_out(arrays, base=base)
    slots = sorted(((s, a) for a in laid.arrays for s in a.slots), key=lambda pair: pair[0].offset)
    end = base
    for slot, array in slots:
        unit = ALIGNMENT if array.spec.nbytes >= SMALL_LIMIT else SMALL_ALIGNMENT
        assert slot.offset % unit == slot.capacity % unit == 0
        assert 0 < slot.nbytes + CHECKSUM_BYTES <= slot.capacity < slot.nbytes + CHECKSUM_BYTES + unit
        # One behind the other: nothing overlaps, and nothing but the start of a page is waited for.
        assert 0 <= slot.offset - end < unit
        end = slot.offset + slot.capacity
    assert laid.nbytes == end


def test_small_arrays_share_pages():
    laid = lay_out([ArraySpec(("m", str(i)), (16,), "float32") for i in range(1000)])
    assert laid.nbytes == 1000 * 128
    assert all(array.slots[0].nbytes == array.chunk_nbytes for array in laid.arrays)


@given(specs())
def test_slots_hold_every_row_once_in_order(arrays):
    laid = lay_out(arrays)
    assert [a.spec for a in laid.arrays] == arrays
    for array in laid.arrays:
        spec = array.spec
        if not spec.numel:
            assert array.slots == ()
            continue
        rows = spec.shape[0] if spec.shape else 1
        assert sum(s.rows for s in array.slots) == rows
        assert sum(s.nbytes for s in array.slots) == spec.nbytes
        assert [s.chunk for s in array.slots] == list(range(len(array.slots)))
        assert [s.row for s in array.slots] == [0, *itertools.accumulate(s.rows for s in array.slots)][:-1]
        for slot in array.slots:
            assert slot.nbytes == slot.rows * spec.nbytes // rows


@given(specs())
def test_chunks_are_a_regular_grid_along_dimension_0(arrays):
    for array in lay_out(arrays).arrays:
        shape = array.spec.shape
        assert len(array.chunk_shape) == len(shape)
        assert all(n >= 1 for n in array.chunk_shape)
        if not array.spec.numel:
            continue
        assert array.chunk_shape[1:] == shape[1:]
        full = array.chunk_shape[0] if shape else 1
        assert all(s.rows == full for s in array.slots[:-1])
        assert 1 <= array.slots[-1].rows <= full
        assert array.chunk_nbytes >= array.slots[0].nbytes
        assert array.slots[0].nbytes == array.chunk_nbytes or len(array.slots) == 1


@given(SHAPES | BIG, st.sampled_from([1, 2, 4, 8, 16]))
def test_the_chunk_rule(shape, itemsize):
    rows = chunk_rows(shape, itemsize)
    total = shape[0] if shape else 1
    assert 1 <= rows <= max(1, total)
    nbytes = math.prod(shape) * itemsize
    if nbytes <= 96_000_000:
        assert rows == max(1, total)
        return
    row = nbytes // total
    # Equal parts of about 64 MB, never more, but for single rows that are larger.
    assert rows * row <= 64_000_000 + row or rows == 1
    assert (total - 1) // rows + 1 <= -(-nbytes // 64_000_000)


def test_96_mb_are_one_chunk_and_a_byte_more_are_two():
    assert chunk_rows((96_000_000,), 1) == 96_000_000
    assert chunk_rows((96_000_001,), 1) == 48_000_001


def test_a_row_is_never_cut():
    assert chunk_rows((3, 1 << 30), 4) == 1


@given(st.integers(0, 1 << 40))
def test_a_slot_is_the_fewest_pages_with_room_for_the_checksum(nbytes):
    capacity = slot_bytes(nbytes)
    assert capacity % ALIGNMENT == 0
    assert capacity - ALIGNMENT < nbytes + CHECKSUM_BYTES <= capacity


def test_a_base_inside_a_page_is_refused():
    with pytest.raises(ValueError, match="multiple of 4096, got 4095"):
        lay_out([], base=4095)


def test_scalars_and_empty_arrays():
    scalar, empty = lay_out([ArraySpec(("a",), (), "float32"), ArraySpec(("b",), (0, 3), "int8")]).arrays
    assert (scalar.chunk_shape, scalar.chunk_nbytes, len(scalar.slots)) == ((), 4, 1)
    assert (empty.chunk_shape, empty.slots) == ((1, 3), ())
    assert layout_module.lay_out([]).nbytes == 0
