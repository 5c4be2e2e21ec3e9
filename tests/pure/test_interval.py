"""What ``every="auto"`` chooses depends neither on what happens once, nor on one save that was held up."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from gockpt.planning.save_interval import FIRST, LEAST, Interval

OVERHEAD = 0.01


def run(first, stall, *, step=0.1, durable=0.3, saves=8, noise=lambda: 1.0, kinds=None):
    """Return what a run chooses: the first save of each kind takes ``first`` seconds, others ``stall``."""
    interval = Interval(OVERHEAD)
    seen = set()
    for number in range(saves):
        kind = False if kinds is None else kinds[number]
        cost = (stall if kind in seen else first) * noise()
        seen.add(kind)
        every = interval.saved(kind, stall_seconds=cost, durable_seconds=durable, step_seconds=step)
        assert every == interval.every
    return every


@given(
    st.floats(0.001, 5), st.floats(0, 100), st.floats(0, 100), st.floats(0.005, 5),
    st.integers(0, 1000), st.integers(0, 1000), st.integers(4, 30),
)  # fmt: skip
def test_two_runs_of_a_loop_choose_alike_and_within_the_overhead(stall, once, again, step, a, b, saves):
    """What happens once may take any time, and each save a fifth more or less than usual."""
    choices = []
    for extra, seed in ((once, a), (again, b)):
        noise = random.Random(seed)
        factor = lambda noise=noise: noise.uniform(0.8, 1.2)  # noqa: E731
        choices.append(run(stall + extra, stall, step=step, saves=saves, noise=factor))
    assert max(choices) <= 2 * min(choices)
    assert all(0.8 * stall <= OVERHEAD * every * step * (1 + 1e-6) for every in choices)
    exact = run(stall + once, stall, step=step, saves=saves)
    assert stall <= OVERHEAD * exact * step * (1 + 1e-6)
    assert exact == 1 or stall > OVERHEAD * (exact - 1) * step * (1 - 1e-6) or (exact - 1) * step < 0.3


def test_nothing_is_chosen_by_the_first_saves():
    for saves in range(1, LEAST + 1):
        assert run(50.0, 5.0, saves=saves) == FIRST
    assert run(50.0, 5.0, saves=LEAST + 1) == 5000
    assert run(50.0, 0.0001, durable=0.05, saves=LEAST + 1) == 1


def test_meanwhile_each_save_has_time_to_reach_the_disk():
    assert run(0.0, 0.0, durable=7.0, saves=2) == 70


def test_one_that_was_held_up_changes_nothing():
    held = iter([1, 1, 1000, 1, 1, 1000, 1, 1])
    assert run(0.02, 0.02, noise=lambda: next(held)) == run(0.02, 0.02)


def test_the_first_one_that_is_spread_over_a_window_is_left_out_as_well():
    kinds = [False] * 5 + [True] * 3
    assert run(9.0, 0.02, kinds=kinds) == run(9.0, 0.02)
    # Once enough of them were measured, they are what counts.
    interval = Interval(OVERHEAD)
    for kind, cost in [(False, 9.0)] + [(False, 0.01)] * 4 + [(True, 9.0)] + [(True, 0.05)] * 3:
        interval.saved(kind, stall_seconds=cost, durable_seconds=0.1, step_seconds=0.1)
    assert interval.every == 50


def test_costs_that_change_for_good_are_followed():
    interval = Interval(OVERHEAD)
    for cost in [0.02] * 9 + [0.2] * 7:
        interval.saved(False, stall_seconds=cost, durable_seconds=0.1, step_seconds=0.1)
    assert interval.every == 200
