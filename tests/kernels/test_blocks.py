"""The tables of the device kernels: every byte once, none beside them, as wide as addresses allow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.kernels.launch_tables import WORDS, Piece, Span, plan_fingerprints, plan_pack, rebound


@st.composite
def layouts(draw):
    """Spans one behind the other in the buffer, with gaps, from anywhere."""
    spans, end = [], 0
    for _ in range(draw(st.integers(0, 12))):
        offset = end + draw(st.sampled_from([0, 1, 2, 3, 8, 16]))
        offset = -(-offset // 16) * 16 if draw(st.booleans()) else offset
        nbytes = draw(st.integers(0, 50) | st.sampled_from([4096, 8191, 8192, 8193, 40000]))
        address = 16 * draw(st.integers(0, 2**50)) + draw(st.sampled_from([0, 0, 1, 2, 4, 6, 8, 12]))
        spans.append(Span(address, nbytes, offset))
        end = offset + nbytes
    return draw(st.permutations(spans)), end


@given(layouts())
def test_every_byte_has_one_block(case):
    spans, capacity = case
    seen = np.zeros(capacity, np.int64)
    for table in plan_pack(spans, capacity):
        size = WORDS * table.word
        for span, number in table.blocks.tolist():
            source = spans[table.spans[span]]
            offset, nbytes = table.places[span].tolist()
            assert (table.addresses[span], offset, nbytes) == (source.address, source.offset, source.nbytes)
            assert np.gcd(source.address | source.offset, 16) == table.width
            start, end = number * size, min(nbytes, (number + 1) * size)
            assert 0 <= start < end
            seen[offset + start : offset + end] += 1
    expected = np.zeros(capacity, np.int64)
    for span in spans:
        expected[span.offset : span.offset + span.nbytes] = 1
    assert np.array_equal(seen, expected)


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        ([Span(0, 10, 91)], "does not fit"),
        ([Span(0, 2**62, 2**62)], "does not fit"),
        ([Span(-16, 1, 0)], "does not fit"),
        ([Span(0, 10, 20), Span(64, 30, 0)], "spans 1 and 0 would overlap"),
        ([Span(0, 5, 7), Span(64, 5, 7)], "overlap"),
    ],
)
def test_what_does_not_fit_is_named(spans, reason):
    with pytest.raises(ValueError, match=reason):
        plan_pack(spans, 100)


def test_empty_spans_stand_in_no_ones_way():
    spans = [Span(0, 10, 0), Span(0, 0, 5), Span(3, 0, 100)]
    (table,) = plan_pack(spans, 100)
    assert table.spans.tolist() == [0]
    assert plan_pack([], 0) == plan_fingerprints([]) == ()


def test_large_offsets_are_kept_whole():
    spans = [Span(2**40, 2**33 + 1, 2**36)]
    (table,) = plan_pack(spans, 2**37)
    assert table.places.tolist() == [[2**36, 2**33 + 1]]
    assert table.blocks[-1].tolist() == [0, 2**33 // (4 * WORDS)]


def test_what_is_fingerprinted_is_grouped_by_alignment():
    pieces = [
        Piece(16, 32, 48),
        Piece(32, 3, 2**40),
        Piece(2, 4),
        Piece(6, 4),
        Piece(40, 8, 40),
        Piece(7, 0),
        Piece(9, 16 * WORDS + 1),
    ]
    tables = plan_fingerprints(pieces)
    found = {
        table.width: dict(zip(table.spans.tolist(), table.places.tolist(), strict=True)) for table in tables
    }
    assert found == {
        16: {0: [6, 32], 1: [2**37, 3]},
        8: {4: [5, 8]},
        2: {2: [0, 4], 3: [0, 4]},
        1: {6: [0, 16 * WORDS + 1]},
    }
    assert tables[-1].blocks.tolist() == [[0, 0], [0, 1], [0, 2]]


@pytest.mark.parametrize(
    "wrong",
    [Piece(0, 8, 4), Piece(0, 8, 1), Piece(0, 8, -8), Piece(0, -1), Piece(-8, 8), Piece(0, 8, 2**63 - 8)],
)
def test_what_does_not_begin_at_a_word_is_refused(wrong):
    with pytest.raises(ValueError, match="stretch 1 does not begin at a multiple of 8 bytes"):
        plan_fingerprints([Piece(0, 4), wrong])


def test_memory_may_move_but_not_lose_alignment():
    spans = [Span(16, 5, 0), Span(34, 5, 6), Span(64, 5, 16)]
    wide, narrow = plan_pack(spans, 32)
    addresses = [160, 1000, 320]
    assert rebound(wide, addresses).addresses.tolist() == [160, 320]
    assert rebound(narrow, addresses).addresses.tolist() == [1000]
    assert wide.addresses.tolist() == [16, 64]
    with pytest.raises(ValueError, match="address 168 of span 2 is not a multiple of 16"):
        rebound(wide, [160, 1000, 168])
