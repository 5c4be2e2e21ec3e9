"""What a step takes: neither the first ones, nor evaluations, nor gockpt's own calls are part of it."""

from __future__ import annotations

import pytest
import torch

import gockpt
from gockpt.planning.rates import Pace


def steps(pace, *seconds, stall=0.0):
    """Tick after each of these; each call takes ``stall``. Returns the time at the end."""
    now = 0.0
    for number, each in enumerate((0.0, *seconds)):
        now += each
        pace.tick(now, idle=True)
        now += stall
        pace.left(now, idle=True)
        assert (pace.step_seconds is None) == (number == 0)
    return now


def test_slow_first_steps_and_evaluations_do_not_count():
    pace = Pace()
    steps(pace, 60.0, *[0.1] * 5, 30.0, *[0.1] * 4)
    assert pace.step_seconds == pytest.approx(0.1)


def test_what_the_calls_themselves_take_does_not_count():
    pace = Pace()
    steps(pace, *[0.1] * 9, stall=3.0)
    assert pace.step_seconds == pytest.approx(0.1)


def test_steps_beside_a_save_do_not_count():
    pace = Pace()
    now = steps(pace, 0.1, 0.1)
    pace.tick(now + 0.1, idle=True)
    pace.left(now + 5.0, idle=False)  # a save was begun
    for more in (9.0, 14.0):
        pace.tick(now + more, idle=False)
        pace.left(now + more, idle=False)
    pace.tick(now + 20.0, idle=True)  # it has ended in between
    assert pace.step_seconds == pytest.approx(0.1)


def test_a_pace_that_changes_is_followed():
    pace = Pace()
    steps(pace, *[0.1] * 40, *[0.4] * 20)
    assert pace.step_seconds == pytest.approx(0.4)


def test_a_run_chooses_by_its_later_saves(tmp_path, monkeypatch):
    """Figures are injected: each save is said to expose 2 s, the first one 6000 s; a step takes 10 s."""
    from gockpt.core.timeline import Trace

    exposed = iter([6000.0, *[2.0] * 99])
    monkeypatch.setattr(Trace, "seconds", lambda _, lane: next(exposed) if lane == "stall" else 0.0)
    monkeypatch.setattr(Pace, "step_seconds", property(lambda _: 10.0, lambda *_: None), raising=False)
    model = torch.nn.Linear(3, 3)
    options = gockpt.Options(window=1, when_busy="wait", overhead=0.01)
    with gockpt.Checkpointer(model, None, tmp_path, every="auto", options=options) as saver:
        for step in range(1, 90):
            saver.after_step(step)
            gockpt.wait()
    # Four saves, ten steps from each other, and from then on every 20.
    assert gockpt.steps(tmp_path) == [10, 20, 30, 40, 60, 80]
