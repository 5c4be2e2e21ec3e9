"""Overlap of boxes against numpy, which marks both in one grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.core.boxes import Box, overlap


def marked(box: Box, grid: tuple[int, ...]) -> np.ndarray:
    """Return the grid with the box's cells true."""
    cells = np.zeros(grid, bool)
    cells[tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))] = True
    return cells


@st.composite
def pairs_of_boxes(draw):
    rank = draw(st.integers(0, 3))
    corner = st.tuples(*[st.integers(0, 5)] * rank)
    extent = st.tuples(*[st.integers(0, 5)] * rank)
    return Box(draw(corner), draw(extent)), Box(draw(corner), draw(extent))


@given(pairs_of_boxes())
def test_overlap_is_what_both_boxes_cover(pair):
    saved, wanted = pair
    grid = (11,) * len(saved.start)
    both = marked(saved, grid) & marked(wanted, grid)
    shared = overlap(saved, wanted)
    if shared is None:
        assert not both.any()
        return
    assert math.prod(shared.shape) == both.sum() > 0
    for box, inside in ((saved, shared.in_saved), (wanted, shared.in_wanted)):
        start = tuple(a + b for a, b in zip(box.start, inside, strict=True))
        assert (marked(Box(start, shared.shape), grid) == both).all()


@given(pairs_of_boxes())
def test_overlap_is_symmetric(pair):
    one, other = overlap(*pair), overlap(*reversed(pair))
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert (one.shape, one.in_saved, one.in_wanted) == (other.shape, other.in_wanted, other.in_saved)


@given(pairs_of_boxes())
def test_a_box_overlaps_itself_wholly_unless_it_is_empty(pair):
    box = pair[0]
    shared = overlap(box, box)
    if box.numel:
        assert shared is not None
        assert shared.shape == box.shape
        assert set(shared.in_saved) | set(shared.in_wanted) <= {0}
    else:
        assert shared is None


def test_a_scalar_box_has_one_element():
    assert Box((), ()).numel == 1


def test_boxes_of_other_ranks_are_refused():
    with pytest.raises(ValueError, match="differ in rank"):
        overlap(Box((0,), (1,)), Box((), ()))
    with pytest.raises(ValueError, match="differ in rank"):
        Box((0, 0), (1,))


@pytest.mark.parametrize(("start", "shape"), [((-1,), (1,)), ((0,), (-1,))])
def test_negative_boxes_are_refused(start, shape):
    with pytest.raises(ValueError, match="must not be negative"):
        Box(start, shape)
