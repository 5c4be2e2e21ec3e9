"""The cadence against a brute-force model that lists every multiple between two ticks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gockpt.core.save_policy import Cadence

EVERY = st.integers(1, 30)


def due_by_brute_force(last: int | None, step: int, every: int) -> bool:
    """Whether a multiple of ``every`` was reached since the last tick."""
    if every == 1:
        return True
    if last is None or step < last:
        last = step - 1
    return any(n % every == 0 for n in range(max(last, 0) + 1, step + 1))


@given(EVERY, st.lists(st.integers(0, 100), min_size=1, max_size=30))
@example(10, [0, 1, 10, 10, 9, 10])
def test_due_is_when_a_multiple_was_reached(every, steps):
    cadence, last = Cadence(every), None
    for step in steps:
        cadence, moment = cadence.tick(step)
        assert moment.due == due_by_brute_force(last, step, every)
        assert (moment.ticks_left == 0) == moment.due
        assert cadence.last_step == step
        last = step


@given(EVERY, st.integers(0, 200), st.integers(1, 12), st.integers(2, 40))
def test_ticks_left_is_right_once_the_stride_is_known(every, start, stride, ticks):
    """With a steady stride, the due tick comes exactly when it was foretold: windows end on it."""
    cadence = Cadence(every)
    moments = []
    for step in itertools.islice(itertools.count(start, stride), ticks + every + 2):
        cadence, moment = cadence.tick(step)
        moments.append(moment)
    for position, moment in enumerate(moments[1 : ticks + 1], start=1):
        ahead = moments[position : position + moment.ticks_left + 1]
        if len(ahead) <= moment.ticks_left:
            continue
        assert ahead[-1].due
        assert not any(m.due for m in ahead[:-1])


@given(EVERY, st.integers(1, 300), st.integers(0, 300))
def test_a_resumed_run_does_not_save_the_step_it_came_from(every, resumed, steps):
    """The first tick after a resume is the next step; what was due before is not due again."""
    cadence = Cadence(every)
    for step in range(resumed + 1, resumed + steps + 1):
        cadence, moment = cadence.tick(step)
        assert moment.due == (step % every == 0)


@given(EVERY)
def test_a_run_counted_from_zero_saves_the_multiples_and_not_zero(every):
    cadence = Cadence(every)
    due = []
    for step in range(3 * every + 1):
        cadence, moment = cadence.tick(step)
        due += [step] if moment.due else []
    assert due == ([0, 1, 2, 3] if every == 1 else [every, 2 * every, 3 * every])


@pytest.mark.parametrize("steps", [[0], [5, 5], [7, 3, 3], [0, 0, 0]])
def test_with_every_1_each_call_is_due_whatever_its_step(steps):
    """Now-and-then calls save this very state: step 0, and a step told twice, too."""
    cadence = Cadence(1)
    for step in steps:
        cadence, moment = cadence.tick(step)
        assert moment.due


def test_going_back_keeps_the_stride():
    cadence = Cadence(100)
    for step in (10, 20, 30):
        cadence, _ = cadence.tick(step)
    cadence, moment = cadence.tick(5)
    assert (moment.due, moment.ticks_left) == (False, 10)
