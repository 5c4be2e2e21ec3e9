"""Cutting requests into batches, and sharing device memory: plain arithmetic, checked by doing it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gockpt.staging.copy_batches import cut_batches
from gockpt.staging.device_budget import COPY_BYTES, SLOTS, Room, make_room
from gockpt.staging.stager import CopyRequest, Source


def shipments_of(stretches, random, align=1):
    """Make requests from (itemsize, elements, gap before it, arena), and the arenas they ought to fill."""
    ends, found = {0: 0, 1: 0}, []
    for itemsize, count, gap, arena in stretches:
        offset = -(-(ends[arena] + gap) // align) * align
        content = random.integers(0, 256, 32 + count * itemsize, np.uint8)
        low = int(random.integers(0, 33))
        ends[arena] = offset + count * itemsize
        found.append(CopyRequest(Source(content, low, count * itemsize, 56), arena, offset, "x"))
    wanted = {arena: np.full(end + 50, 9, np.uint8) for arena, end in ends.items()}
    for s in found:
        wanted[s.arena][s.offset : s.offset + s.source.nbytes] = bytes_of(s.source)
    return found, wanted


def bytes_of(source):
    return source.memory[source.low : source.low + source.nbytes]


stretches = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 4, 8, 16]), st.integers(0, 200), st.integers(0, 3), st.sampled_from([0, 0, 1])
    ),
    max_size=12,
)


@given(
    stretches,
    st.integers(1, 12),
    st.integers(1, 900),
    st.integers(1, 8),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
@example([(4, 200, 0, 0), (4, 200, 0, 0)], 1, 64, 1, False, 0)
def test_loads_carry_every_byte_to_its_place_and_touch_no_other(rows, slot, copy, piece, direct, seed):
    requests, wanted = shipments_of(rows, np.random.default_rng(seed), 8 if direct else 1)
    arenas = {arena: np.full(end.size, 9, np.uint8) for arena, end in wanted.items()}
    slot_bytes, piece_bytes = 64 * slot, 64 * piece
    batches = cut_batches(
        requests, slot_bytes=slot_bytes, copy_bytes=copy, piece_bytes=piece_bytes, direct=direct
    )
    for batch in batches:
        assert batch.slices
        assert batch.used <= slot_bytes
        assert batch.nbytes <= slot_bytes
        memory = np.full(slot_bytes, 77, np.uint8)
        for piece_of in batch.slices:
            part = piece_of.request.source.part(piece_of.low, piece_of.nbytes)
            assert part.position == 56 + piece_of.low
            assert part.position % 8 == 0
            if direct:
                arena, start = batch.piece
                target = arenas[arena][start : start + piece_bytes]
                target[piece_of.place : piece_of.place + part.nbytes] = bytes_of(part)
                assert piece_of.place + part.nbytes <= piece_bytes
            else:
                memory[piece_of.place : piece_of.place + part.nbytes] = bytes_of(part)
        assert bool(batch.copies) is not direct
        for c in batch.copies:
            assert 0 < c.nbytes <= copy
            assert c.offset // piece_bytes == (c.offset + c.nbytes - 1) // piece_bytes
            arenas[c.arena][c.offset : c.offset + c.nbytes] = memory[c.place : c.place + c.nbytes]
    for arena, content in wanted.items():
        assert np.array_equal(arenas[arena], content)


def test_neighbours_travel_in_one_copy():
    memory = np.zeros(100, np.uint8)
    requests = [CopyRequest(Source(memory, 0, 100, 0), 0, at, "x") for at in (0, 100, 200, 301)]
    (batch,) = cut_batches(requests, slot_bytes=1024, copy_bytes=1000, piece_bytes=4096)
    assert [(c.place, c.offset, c.nbytes) for c in batch.copies] == [(0, 0, 300), (320, 301, 100)]
    (batch,) = cut_batches(requests[:3], slot_bytes=1024, copy_bytes=250, piece_bytes=4096)
    assert [(c.place, c.offset, c.nbytes) for c in batch.copies] == [(0, 0, 250), (250, 250, 50)]


@pytest.mark.parametrize(
    "sizes", [(0, 1, 64), (100, 1, 64), (64, 0, 64), (64, 1, 100)], ids=["none", "odd", "copies", "pieces"]
)
def test_sizes_that_do_not_work_are_refused(sizes):
    slot, copy, piece = sizes
    with pytest.raises(ValueError, match="don't work"):
        cut_batches([], slot_bytes=slot, copy_bytes=copy, piece_bytes=piece)


def test_what_is_stored_directly_is_not_cut_inside_a_word():
    odd = CopyRequest(Source(np.zeros(80, np.uint8), 0, 80, 0), 0, 4, "x")
    with pytest.raises(ValueError, match="80 bytes at 4 would be cut inside a word of 8 bytes"):
        cut_batches([odd], slot_bytes=128, copy_bytes=64, piece_bytes=64, direct=True)
    (batch,) = cut_batches([odd], slot_bytes=128, copy_bytes=64, piece_bytes=64)
    assert [(c.place, c.offset, c.nbytes) for c in batch.copies] == [(0, 4, 60), (60, 64, 20)]


@given(st.integers(1 << 16, 1 << 40), st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_the_room_stays_within_its_bound(limit, free, state):
    room = make_room(limit, free=free, state_bytes=state)
    assert room.slot_bytes % 64 == 0
    assert 64 <= room.slot_bytes <= COPY_BYTES
    assert room.slots == SLOTS
    assert room.nbytes <= limit
    assert room.scratch_bytes <= min(state + 512, free)


def test_what_a_room_is_made_of():
    gb = 1 << 30
    assert make_room(8 * gb, free=80 * gb, state_bytes=100 * gb) == Room(32 << 20, 4, 8 * gb - (128 << 20))
    assert make_room(8 * gb, free=80 * gb, state_bytes=gb) == Room(32 << 20, 4, gb)
    assert make_room(8 * gb, free=gb, state_bytes=100 * gb) == Room(32 << 20, 4, gb - (128 << 20))
    assert make_room(1 << 16, free=80 * gb, state_bytes=100 * gb) == Room(1 << 14, 4, 0)


def test_an_update_waits_for_what_the_ring_and_the_step_do_not_hide():
    room = Room(100, 4, 0)
    assert room.stall(1300, bytes_per_second=100, hidden_seconds=4) == 6  # 10 s for all but three slots
    assert room.stall(1300, bytes_per_second=100, hidden_seconds=11) == 0
