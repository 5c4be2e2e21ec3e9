"""Where live state is cut: at whole words of a fingerprint, whatever an array's shape and dtype."""

from __future__ import annotations

import itertools

import pytest

from gockpt.core.arena_layout import lay_out
from gockpt.core.array_spec import ArraySpec
from gockpt.saving.write_items import _behind_ranges, _ranges

LARGE = [
    ((100_000_001,), "uint8"),  # its second chunk begins inside a word
    ((50_000_003,), "bfloat16"),
    ((7, 20_000_001), "uint8"),
    ((30_001, 1_667), "float16"),
    ((3, 33_333_335), "bool"),
    ((25_000_003,), "float32"),
    ((33_333, 1_001), "float32"),
    ((6_250_001, 2), "float64"),
]
SMALL = [
    ((), "uint8"),
    ((5,), "int8"),
    ((70_001, 3), "bfloat16"),
    ((80_001, 9), "float32"),
    ((0, 4), "int64"),
]


def layout_of(shape, dtype):
    spec = ArraySpec(("model", "w"), shape, dtype)
    (array,) = lay_out([spec]).arrays
    return array


@pytest.mark.parametrize(("shape", "dtype"), LARGE + SMALL)
@pytest.mark.parametrize("size", [65_552, 1 << 20])
def test_pieces_begin_at_words_and_follow_each_other_within_a_chunk(shape, dtype, size):
    array = layout_of(shape, dtype)
    stretches = list(_behind_ranges(array, size))
    assert sum(s.nbytes for s in stretches) == array.spec.nbytes
    for stretch in stretches:
        assert stretch.position % 8 == 0
        assert 0 <= stretch.position - stretch.start * stretch.itemsize < 8
        assert stretch.offset % 8 == 0
    for before, after in itertools.pairwise(stretches):
        if after.offset == before.offset + before.nbytes:
            assert after.position == before.position + before.nbytes


@pytest.mark.parametrize(("shape", "dtype"), LARGE)
def test_pieces_that_are_replayed_stand_at_words_of_the_array(shape, dtype):
    array = layout_of(shape, dtype)
    for stretches, _ in _ranges([array, array], 65_552) or ():
        for stretch in stretches:
            assert stretch.position == stretch.start * stretch.itemsize


def test_a_chunk_may_begin_inside_a_word():
    first, second = layout_of(*LARGE[0]).slots
    assert (first.rows * 1) % 8
    assert (
        next(s for s in _behind_ranges(layout_of(*LARGE[0]), 1 << 20) if s.offset == second.offset).start % 8
    )
