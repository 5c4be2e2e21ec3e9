"""The gradient ring against a model that keeps a list of taken bytes."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gockpt.staging.gradient_ring import Ring

SIZE = 64 * 40
BASE = 4096


def rounded(nbytes: int) -> int:
    return max(64, -(-nbytes // 64) * 64)


class RingMachine(RuleBasedStateMachine):
    """Allocate and free in any order; compare with the plain truth about which bytes are taken."""

    def __init__(self):
        super().__init__()
        self.ring = Ring(BASE, SIZE)
        self.taken = {}
        self.peak = 0

    def gaps(self):
        ends = [BASE, *(o + n for o, n in sorted(self.taken.items()))]
        starts = [*sorted(self.taken), BASE + SIZE]
        return [(e, s - e) for e, s in zip(ends, starts, strict=True) if s > e]

    @rule(nbytes=st.integers(0, SIZE + 100))
    def allocate(self, nbytes):
        size = rounded(nbytes)
        fits = [gap for gap in self.gaps() if gap[1] >= size]
        offset = self.ring.allocate(nbytes)
        assert offset == (fits[0][0] if fits else None)
        if offset is not None:
            self.taken[offset] = size
            self.peak = max(self.peak, sum(self.taken.values()))

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def free(self, data):
        offset = data.draw(st.sampled_from(sorted(self.taken)))
        self.ring.free(offset)
        del self.taken[offset]

    @rule(offset=st.integers(BASE - 64, BASE + SIZE))
    def free_what_is_not_taken(self, offset):
        if offset not in self.taken:
            with pytest.raises(KeyError):
                self.ring.free(offset)

    @invariant()
    def books_are_right(self):
        assert self.ring.in_use == sum(self.taken.values())
        assert self.ring.peak == self.peak
        for offset in self.taken:
            assert offset % 64 == 0


TestRingMachine = RingMachine.TestCase


@given(st.lists(st.integers(1, 500), min_size=1, max_size=12), st.randoms())
def test_when_all_is_freed_the_whole_ring_is_one_block_again(sizes, random):
    ring = Ring(0, SIZE)
    offsets = [offset for n in sizes if (offset := ring.allocate(n)) is not None]
    random.shuffle(offsets)
    for offset in offsets:
        ring.free(offset)
    assert ring.allocate(SIZE) == 0
    assert ring.allocate(1) is None


def test_an_empty_ring_has_no_room():
    ring = Ring(0, 0)
    assert ring.allocate(0) is None
    assert ring.in_use == ring.peak == 0


def test_waiting_for_room_ends_when_a_block_is_freed_and_not_before():
    ring = Ring(0, 64)
    offset = ring.allocate(64)
    assert not ring.wait_for_room(0.0)
    woken = []
    waiting = threading.Event()

    def wait():
        with ring._changed:
            waiting.set()
            woken.append(ring._changed.wait(30))

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(30)
    ring.free(offset)
    thread.join(30)
    assert woken == [True]
