"""Odd moments of a save: alike in host memory and on a device, with worker threads and with a process.

Windows that end early, a background that is busy, and changes and damage that nobody announced. What only one
of the two can do, such as being killed, has trials of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest
import torch

import gockpt
from gockpt import registry
from gockpt.saving import inside_call
from gockpt.workers.save_job import Job

EVERY, WINDOW = 6, 4


@pytest.fixture
def loop(harness, loops, worker):
    """A run whose first save is written."""
    return begun(harness, loops, worker)


def begun(harness, loops, worker, **options):
    def build():
        model = harness.Tensors({"a": torch.randn(4000), "b": torch.randn(70, 83)})
        return model, torch.optim.AdamW(model.parameters(), lr=0.05)

    def update(model, optimizer, step):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    made = loops(build, update, every=EVERY, window=WINDOW, worker=worker, **options)
    made.run(EVERY).handles[-1].result(60)
    return made


def parts():
    """Return the one checkpointer's engine and its save."""
    (saver,) = registry.opened
    return saver._engine, saver._engine._save


def update_to_the_due_step(loop):
    """Go on to just before the call that closes the window: an update may wait for a background."""
    loop.run(EVERY - 1)
    loop.step += 1
    loop.update(loop.model, loop.optimizer, loop.step)


@contextlib.contextmanager
def busy(worker):
    """Keep the background from finishing anything; yield what lets it go on."""
    if worker == "process":
        pid = parts()[0]._background._worker.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield lambda: os.kill(pid, signal.SIGCONT)
        finally:
            os.kill(pid, signal.SIGCONT)
        return
    go_on, commit = threading.Event(), Job._commit

    def held(job):
        assert go_on.wait(60)
        return commit(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "_commit", held)
        try:
            yield go_on.set
        finally:
            go_on.set()


@pytest.mark.parametrize("verify", ["full", "close"])
def test_saves_are_the_ticks(harness, loops, worker, verify):
    with harness.closing():
        loop = begun(harness, loops, worker, verify=verify, keep=4)
        saved = loop.run(2 * EVERY).finish()
    assert [(s.step, s.attempts) for s in saved] == [(6, 1), (12, 1), (18, 1)]
    assert [s.window for s in saved] == [WINDOW - loop.setup, WINDOW, WINDOW]


@pytest.mark.parametrize("ticks", [3, 4, 5])
@pytest.mark.parametrize("end", ["wait", "close", "result"])
def test_an_end_inside_a_window_closes_it_at_the_last_tick(loop, ticks, end):
    loop.run(ticks)
    handle = loop.handles[-1]
    assert handle.progress().phase == "open"
    (saver,) = registry.opened
    {"wait": gockpt.wait, "close": saver.close, "result": lambda: handle.result(60)}[end]()
    assert handle.result(0).step == EVERY + ticks
    loop.check(EVERY + ticks)


@pytest.mark.parametrize("change", ["update", "unseen"])
def test_an_end_where_the_last_tick_does_not_stand_publishes_nothing(loop, change):
    loop.run(4)
    if change == "update":
        loop.update(loop.model, loop.optimizer, 0)
    else:
        loop.model.a.data[7] += 1
    with pytest.raises(gockpt.SaveAborted, match="can't be closed here"):
        gockpt.wait()
    assert gockpt.steps(loop.path) == [EVERY]
    loop.handles.pop()
    assert loop.run(8).handles[-1].result(60).step == 18
    loop.check(18)


@pytest.mark.parametrize(("ticks", "captured"), [(4, False), (EVERY, True)])
def test_an_exception_gives_the_window_up_and_keeps_what_was_captured(loop, ticks, captured):
    gockpt.wait()
    with pytest.raises(ZeroDivisionError), gockpt.Checkpointer(  # noqa: PT012
        loop.model, loop.optimizer, loop.path, every=EVERY, options=loop.options
    ) as saver:  # fmt: skip
        for _ in range(ticks):
            loop.tick(save=False)
            handle = saver.after_step(loop.step)
        assert saver.window_open != captured
        raise ZeroDivisionError
    if captured:
        assert handle.result(0).step == 12
        loop.check(12)
    else:
        with pytest.raises(gockpt.SaveAborted, match="ZeroDivisionError left the with block"):
            handle.result(0)
        assert gockpt.steps(loop.path) == [EVERY]


@pytest.mark.parametrize("updates", [1, 2])
def test_an_abort_inside_a_window_frees_all_that_was_sent(loop, updates):
    """Gradients are with the worker when their save is given up; the next one replays as if nothing were."""
    loop.run(3)
    for _ in range(updates):
        loop.update(loop.model, loop.optimizer, 0)
    (saver,) = registry.opened
    ring = parts()[1].attempt._ring
    saver.abort("enough")
    assert ring.in_use == 0
    with pytest.raises(gockpt.SaveAborted, match="enough"):
        loop.handles.pop().result(60)
    saved = loop.run(2 * EVERY - 3).handles[-1].result(60)
    assert (saved.step, saved.window, saved.attempts, saved.late_parts) == (18, WINDOW, 1, {})
    loop.check(18)


def test_what_is_due_while_one_is_written_is_left_out(harness, loops, worker, caplog):
    loop = begun(harness, loops, worker, when_busy="skip", keep=None)
    update_to_the_due_step(loop)
    with busy(worker), caplog.at_level("INFO", "gockpt"):
        loop.boundary()
        loop.run(EVERY)
        handle = loop.handles[-1]
        assert handle.step == 12
        assert not handle.done()
        assert "step 18 is due, but step 12 is still being written: it is left out (1 so far)" in caplog.text
        assert handle.progress().skipped == (18,)
    assert handle.result(60).step == 12
    loop.run(EVERY).handles[-1].result(60)
    assert gockpt.steps(loop.path) == [6, 12, 24]
    for step in (12, 24):
        loop.check(step)


def test_what_is_due_while_one_is_written_is_waited_for(harness, loops, worker, monkeypatch):
    loop = begun(harness, loops, worker, when_busy="wait", keep=None)
    update_to_the_due_step(loop)
    waited = []
    real = inside_call.let_through
    with busy(worker) as go_on:

        def let_through():
            waited.append(loop.step)
            go_on()
            real()

        monkeypatch.setattr(inside_call, "let_through", let_through)
        loop.boundary()
        loop.run(EVERY)
    assert waited
    gockpt.wait()
    assert gockpt.steps(loop.path) == [6, 12, 18]
    for step in (12, 18):
        loop.check(step)


def test_a_change_that_nobody_announced(loop):
    loop.run(4)
    loop.model.a.data.clamp_(-0.1, 0.1)
    loop.run(2)
    saved = loop.handles[-1].result(60)
    assert (saved.step, saved.attempts) == (12, 1)
    assert saved.late_parts == {"a": "changed outside optimizer.step()"}
    loop.check(12)


def test_a_state_that_grows_inside_a_window(harness, loop):
    loop.run(4)
    loop.model.register_parameter("more", torch.nn.Parameter(torch.randn(500)))
    loop.optimizer.add_param_group({"params": [loop.model.more]})
    loop.run(2)
    saved = loop.handles[-1].result(60)
    assert (saved.step, saved.window, saved.attempts) == (12, 1, 1)
    harness.check_open(loop.path, loop.moments[12])
    loop.run(EVERY).handles[-1].result(60)
    harness.check_open(loop.path, loop.moments[18])


@pytest.mark.parametrize("end", ["tick", "wait"])
def test_a_replay_that_comes_to_something_else(loop, end):
    """Nothing of it is published: what training holds now is, at the next tick or where it has stopped."""
    loop.run(EVERY - 1)
    save = parts()[1]
    piece = next(p for p in save.attempt.cut.pieces if p.sent)
    save.attempt.settle()
    save.attempt._arena.view(piece.stretches[0].offset, 4)[:] ^= 255
    loop.tick()
    handle = loop.handles[-1]
    if end == "tick":
        loop.update(loop.model, loop.optimizer, 0)  # it waits for the last copies
        while handle.progress().phase != "void":
            assert not handle.done()
            threading.Event().wait(0.01)
        assert gockpt.steps(loop.path) == [EVERY]
        loop.tick()
    gockpt.wait()
    step = EVERY * 2 + (end == "tick")
    saved = handle.result(60)
    assert (saved.step, saved.attempts) == (step, 2)
    assert "did not match the live state" in str(handle.events)
    loop.check(step)
