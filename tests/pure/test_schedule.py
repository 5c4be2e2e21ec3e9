"""Plans: parts are geometric, cover everything, and a window is the shortest that hides the copy."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gockpt.options import MAX_WINDOW
from gockpt.planning.planner import Facts, choose_every, make_plan, part_ranges

SECONDS = st.floats(1e-4, 10)
RATES = st.floats(1e6, 1e12)


@st.composite
def facts(draw, *, measured=True, fixed=True):
    replay = draw(st.integers(0, 10**12))
    other = draw(st.integers(0, 10**12)) if fixed else 0
    share = draw(st.sampled_from([1.0, 0.5, 1 / 3, 1 / 4, 1 / 7, 0.02]))
    assume(replay + other > 0)
    rates = (draw(SECONDS), draw(RATES)) if measured else (None, None)
    return Facts(replay + other, replay, int(replay * share), *rates)


@given(facts(), st.integers(1, 16) | st.just("auto"), st.integers(1, 40))
def test_a_plan_fits_its_ticks_and_its_shares_fit_one(given_facts, window, ticks):
    plan = make_plan(given_facts, window=window, ticks=ticks)
    assert 1 <= plan.window <= min(ticks, MAX_WINDOW)
    assert len(plan.shares) == plan.window - 1
    assert all(share >= 0 for share in plan.shares)
    assert sum(plan.shares) <= 1 + 1e-9
    assert plan.facts is given_facts
    assert plan.reason
    if window != "auto" and given_facts.replay_bytes:
        assert plan.window == min(window, ticks)


@given(facts(), st.integers(2, 16))
def test_parts_shrink_so_that_every_step_moves_the_same_bytes(given_facts, window):
    assume(given_facts.replay_bytes > 1000)
    plan = make_plan(given_facts, window=window, ticks=16)
    sent = 0.0
    moved = []
    for share in plan.shares:
        moved.append(share + given_facts.ratio * sent)
        sent += share
    assert all(m == pytest.approx(moved[0], rel=1e-6, abs=1e-9) for m in moved)
    assert list(plan.shares) == sorted(plan.shares, reverse=True)
    # The last step moves its gradients, what is left, and what can't be replayed: no less than
    # the others unless the fixed part alone is more than a step's bytes.
    rest = (1 - sent) + given_facts.ratio * sent
    fixed = (given_facts.state_bytes - given_facts.replay_bytes) / given_facts.replay_bytes
    assert rest + fixed >= moved[0] * (1 - 1e-6)


@given(facts(fixed=False))
def test_a_window_that_hides_the_copy_predicts_no_stall(given_facts):
    plan = make_plan(given_facts, window="auto", ticks=16)
    hides = plan.reason.startswith(("one step hides", "the fewest steps"))
    assert (plan.stall_seconds <= 1e-6 * given_facts.step_seconds) >= hides


@given(facts(), st.integers(1, 16))
def test_the_predicted_stall_is_what_does_not_fit_into_the_steps(given_facts, window):
    plan = make_plan(given_facts, window=window, ticks=16)
    alone = make_plan(given_facts, window=1, ticks=1)
    bare = given_facts.state_bytes / given_facts.bytes_per_second
    late = max(0.0, bare - given_facts.step_seconds)
    assert alone.stall_seconds == pytest.approx(late, rel=1e-9, abs=1e-12)
    # Gradients come on top, and no step can take less than its share of the copy.
    steps = plan.window * given_facts.step_seconds
    assert plan.stall_seconds >= (bare - steps) * (1 - 1e-9) - 1e-9


def test_an_unmeasured_plan_predicts_no_stall():
    plan = make_plan(Facts(300, 300, 100), window=4, ticks=4)
    assert plan.stall_seconds is None
    assert "wait for copies" not in plan.explain()
    assert "steps wait for copies: 2000.0 ms" in make_plan(Facts(3, 3, 1, 1, 1), window=1, ticks=1).explain()


@given(facts(), st.integers(2, 16))
def test_the_ring_holds_at_most_two_gradients(given_facts, window):
    plan = make_plan(given_facts, window=window, ticks=16)
    assert 0 <= plan.ring_bytes <= 2 * given_facts.grad_bytes + 1
    if plan.window == 1:
        assert plan.ring_bytes == 0


def steps_needed(ratio: float, load: float) -> int | None:
    """Send state and due gradients step by step with a budget of one step's bytes: how long it takes."""
    sent = 0.0
    for step in range(1, 400):
        room = 1.0 - ratio * sent
        if room <= 0:
            return None
        sent += room
        if sent >= load * (1 - 1e-12):
            return step
    return None


@given(st.sampled_from([0.02, 1 / 7, 1 / 4, 1 / 3, 0.5]), st.floats(0.01, 60))
@example(1 / 3, 2.9)
@example(1 / 3, 3.1)
def test_the_automatic_window_is_the_shortest_that_hides_the_copy(ratio, load):
    state = 10**12
    given_facts = Facts(state, state, int(ratio * state), 1.0, state / load)
    needed = steps_needed(given_facts.ratio, given_facts.load)
    near = [steps_needed(given_facts.ratio, given_facts.load * f) for f in (1 - 1e-9, 1 + 1e-9)]
    assume(near[0] == near[1])  # on the edge between two windows either is right
    plan = make_plan(given_facts, window="auto", ticks=64)
    if needed is not None and needed <= MAX_WINDOW:
        assert plan.window == needed
    else:
        assert plan.window == min(MAX_WINDOW, max(1, round(1 / given_facts.ratio + 0.5)))
        assert "stall" in plan.reason
    if needed is not None:
        assert given_facts.load < 1 / given_facts.ratio


def test_nothing_is_planned_on_figures_that_are_not_there():
    bare = Facts(1000, 1000, 300)
    assert bare.load is None
    assert make_plan(bare, window="auto", ticks=64).window == 1
    assert "not measured" in make_plan(bare, window="auto", ticks=64).explain()
    for half in (Facts(1000, 1000, 300, 1.0, None), Facts(1000, 1000, 300, None, 1.0)):
        assert half.load is None


def test_what_cannot_be_replayed_takes_one_step():
    stubborn = Facts(1000, 0, 0, 1.0, 10.0)
    assert stubborn.ratio == 0.0
    for window in ("auto", 4):
        plan = make_plan(stubborn, window=window, ticks=64)
        assert (plan.window, plan.shares, plan.ring_bytes) == (1, (), 0)
        assert "nothing can be replayed" in plan.reason


def test_a_replay_without_gradients_leaves_at_the_close():
    """No gradient bytes at all (every replayable tensor is empty): nothing to win by a window."""
    assert make_plan(Facts(1000, 1000, 0, 1.0, 10.0), window="auto", ticks=64).window == 1


def test_gradients_as_large_as_the_state_leave_all_in_the_first_part():
    """Plain SGD: one gradient weighs what the state does."""
    plan = make_plan(Facts(1000, 1000, 1000, 1.0, 10.0), window=4, ticks=4)
    assert plan.shares == pytest.approx((1.0, 0.0, 0.0))
    assert make_plan(Facts(1000, 1000, 1000, 1.0, 500.0), window="auto", ticks=9).window == 2


def test_a_window_is_cut_to_the_ticks_there_are_and_says_so():
    plan = make_plan(Facts(1000, 1000, 300), window=8, ticks=3)
    assert plan.window == 3
    assert "cut from 8" in plan.reason
    with pytest.raises(ValueError, match="at least one tick, got 0"):
        make_plan(Facts(1000, 1000, 300), window=8, ticks=0)


def test_explain_is_readable():
    text = make_plan(Facts(3_000_000, 3_000_000, 1_000_000, 0.1, 2e7), window=4, ticks=4).explain()
    assert "window: 4 steps: asked for" in text
    assert "r = 0.333" in text
    assert "1.5 steps" in text
    assert "parts of the replayable state: 4" in text
    assert "window: 1 step:" in make_plan(Facts(1, 1, 1), window=1, ticks=1).explain()


@given(st.lists(st.integers(0, 10**9), max_size=60), st.lists(st.floats(0, 0.5), max_size=15))
def test_parts_cover_the_pieces_in_order_and_keep_to_their_shares(sizes, shares):
    total_share = sum(shares)
    if total_share > 1:
        shares = [s / total_share for s in shares]
    ranges = part_ranges(sizes, shares)
    assert len(ranges) == len(shares) + 1
    assert [i for part in ranges for i in part] == list(range(len(sizes)))
    target = 0.0
    for share, part in zip(shares, ranges, strict=False):
        target += share * sum(sizes)
        filled = sum(sizes[: part.stop])
        # The cut is the nearest one there is between two pieces.
        assert abs(filled - target) <= max(sizes, default=0) / 2 * (1 + 1e-9) + 1e-3


@given(st.floats(0, 10), st.floats(1e-3, 10), st.floats(0, 100), st.floats(1e-3, 0.5))
def test_the_automatic_interval_is_the_shortest_within_the_overhead(stall, step, durable, overhead):
    every = choose_every(stall_seconds=stall, step_seconds=step, durable_seconds=durable, overhead=overhead)

    def fits(n: int) -> bool:
        return stall <= overhead * n * step * (1 + 1e-6) and durable <= n * step * (1 + 1e-6)

    assert every >= 1
    assert fits(every)
    assert (
        every == 1
        or stall > overhead * (every - 1) * step * (1 - 1e-6)
        or durable > (every - 1) * step * (1 - 1e-6)
    )
    assert not math.isinf(every)


def test_no_step_time_means_every_step():
    assert choose_every(stall_seconds=1.0, step_seconds=0.0, durable_seconds=1.0, overhead=0.01) == 1
