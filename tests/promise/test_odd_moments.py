"""Handles and calls at odd moments: waiting inside a window, errors inside a step, two writers, callbacks."""

from __future__ import annotations

import functools
import logging
import threading

import pytest
import torch

import gockpt
from gockpt import opening
from gockpt.storage.local.filesystem import Filesystem
from gockpt.storage.local.store import Store


def test_result_right_after_the_call_does_not_wait_for_a_step(run, harness):
    path = harness.directory()
    with harness.closing():
        for step in (1, 2, 3):
            moment = harness.take(step, run.model, run.optimizer)
            handle = gockpt.save_overlapped(run.model, run.optimizer, path, step=step)
            assert handle.result(30).step == step
            assert handle.captured.result(0) == step
            harness.check_open(path, moment)


def test_wait_inside_a_window_saves_the_last_tick(run, harness):
    handle = run.go(2)  # step 6: the window of step 8 is open
    assert handle.progress().phase == "open"
    gockpt.wait()
    assert handle.result(0).step == 6
    harness.check_open(run.path, run.moment)
    run.check_nothing_lost()


def test_wait_after_an_update_that_no_tick_followed(run):
    """Closing there would save a state under a step it is not of: an error instead."""
    handle = run.go(2)
    run.update()
    with pytest.raises(gockpt.SaveAborted, match=r"optimizer stepped.*call save_overlapped"):
        gockpt.wait()
    assert isinstance(handle.exception(1), gockpt.SaveAborted)
    assert gockpt.steps(run.path) == [4]
    run.check_nothing_lost()


def test_an_exception_in_the_with_block_gives_the_window_up(run):
    gockpt.wait()
    with pytest.raises(ZeroDivisionError), gockpt.Checkpointer(  # noqa: PT012
        run.model, run.optimizer, run.path, every=4, options=gockpt.Options(window=3)
    ) as saver:  # fmt: skip
        for _ in range(2):
            run.update()
            handle = saver.after_step(run.step)
        assert saver.window_open
        raise ZeroDivisionError
    assert isinstance(handle.exception(1), gockpt.SaveAborted)
    assert gockpt.steps(run.path) == [4]
    run.check_nothing_lost()


def test_an_exception_after_the_capture_still_publishes(run):
    gockpt.wait()
    with pytest.raises(ZeroDivisionError), gockpt.Checkpointer(  # noqa: PT012
        run.model, run.optimizer, run.path, every=4, options=gockpt.Options(window=3)
    ) as saver:  # fmt: skip
        for _ in range(4):
            run.update()
            handle = saver.after_step(run.step)
        raise ZeroDivisionError
    assert handle.result(1).step == 8
    assert gockpt.steps(run.path) == [4, 8]
    run.check_nothing_lost()


def test_a_closure_that_raises_inside_the_step(run):
    """An update that ended half-way: what left before it is not trusted, the close takes everything."""

    def closure():
        raise ZeroDivisionError("in the closure")

    run.go(2)
    with pytest.raises(ZeroDivisionError, match="in the closure"):
        run.optimizer.step(closure)
    handle = run.go(2)
    result = handle.result(30)
    assert (result.step, result.attempts) == (8, 1)
    assert any("exception" in event for event in handle.events)
    run.check_nothing_lost()


def test_a_step_that_raises_half_way(run, monkeypatch):
    """The first parameter is updated, the second is not."""
    run.go(2)
    run.model.b.grad = torch.randn_like(run.model.b)
    run.model.a.grad = torch.randn_like(run.model.a)
    bad = run.optimizer.state[run.model.b].pop("exp_avg")
    with pytest.raises(KeyError):
        run.optimizer.step()
    run.optimizer.state[run.model.b]["exp_avg"] = bad
    assert run.go(2).result(30).step == 8
    run.check_nothing_lost()


def test_a_closed_checkpointer_says_so(run):
    gockpt.wait()
    saver = gockpt.Checkpointer(run.model, run.optimizer, run.path, every=4)
    saver.close()
    saver.close()
    with pytest.raises(gockpt.UsageError, match="closed; make a new one"):
        saver.after_step(5)
    run.check_nothing_lost()


def test_a_second_checkpointer_on_one_path(run):
    """For the same model the path is handed over; of two that are in use only one is saved there."""
    gockpt.wait()
    first = gockpt.Checkpointer(run.model, run.optimizer, run.path, every=4)
    with gockpt.Checkpointer(run.model, run.optimizer, run.path, every=5):
        assert first.closed
    other, optimizer = run.build()
    run.go(2)
    with pytest.raises(gockpt.PathBusy, match=rf"{run.path}.*two models would replace"):  # its window is open
        gockpt.save_overlapped(other, optimizer, run.path, step=9)
    assert run.go(2).result(30).step == 8
    gockpt.save_overlapped(other, optimizer, run.path, step=9).result(30)
    with pytest.raises(gockpt.PathBusy, match=rf"{run.path}.*two models would replace"):
        run.go(1)
    assert gockpt.latest(run.path) == 9


def test_a_path_is_free_again_when_its_model_is_gone(run):
    other, optimizer = run.build()
    path = run.path
    run.model = run.optimizer = None
    gockpt.save_overlapped(other, optimizer, path, step=9).result(30)
    gockpt.wait()
    assert gockpt.steps(path) == [4, 9]


def slow_disk(monkeypatch):
    """Let no file reach the disk before the event that is returned is set."""
    release = threading.Event()

    class Slow(Filesystem):
        def fsync(self, fd):
            assert release.wait(30)
            super().fsync(fd)

    monkeypatch.setattr(opening, "Store", functools.partial(Store, fs=Slow()))
    return release


def test_what_is_due_while_a_save_is_written_is_skipped_and_logged(run, harness, caplog, monkeypatch):
    gockpt.wait()
    release = slow_disk(monkeypatch)
    path = harness.directory()
    options = gockpt.Options(window=1, when_busy="skip")
    handles = []
    with caplog.at_level(logging.WARNING, "gockpt"):
        for step in (1, 2, 3):
            run.update()
            handles.append(
                gockpt.save_overlapped(run.model, run.optimizer, path, step=step, every=1, options=options)
            )
    assert handles[1] is handles[2]
    assert "step 2 is due, but step 1" in caplog.text
    assert handles[0].skipped == (2, 3)
    release.set()
    gockpt.wait()
    assert len(gockpt.steps(path)) >= 1
    assert handles[0].result(30).step == 1


@pytest.mark.parametrize("defect", [AssertionError, MemoryError])
def test_a_defect_while_a_failed_save_is_removed_is_told_to_who_waits(run, harness, monkeypatch, defect):
    class Defective(Filesystem):
        def fsync(self, fd):
            raise defect

    gockpt.wait()
    with monkeypatch.context() as patch:
        patch.setattr(opening, "Store", functools.partial(Store, fs=Defective()))
        save = gockpt.save_overlapped(run.model, run.optimizer, harness.directory(), step=1)
        with pytest.raises(gockpt.SaveError, match=defect.__name__):
            save.result(60)
        with pytest.raises(gockpt.SaveError, match=defect.__name__):
            gockpt.wait()


@pytest.mark.parametrize("every", [2, 7, 10])
def test_a_save_that_is_late_gets_a_thread_of_normal_priority(run, harness, monkeypatch, every):
    """Half-way to the next one: on busy cores the others would hardly run before that is due."""
    gockpt.wait()

    def helped():
        return any(thread.name == "gockpt-worker-boost" for thread in threading.enumerate())

    release = slow_disk(monkeypatch)
    path = harness.directory()
    options = gockpt.Options(window=1)
    seen = []
    for step in range(every, 2 * every):
        run.update()
        gockpt.save_overlapped(run.model, run.optimizer, path, step=step, every=every, options=options)
        seen.append(helped())
    release.set()
    gockpt.wait()
    assert seen == [2 * number >= every for number in range(every)]
    assert gockpt.steps(path) == [every]


def test_only_the_newest_are_kept(run, harness):
    path = harness.directory()
    options = gockpt.Options(keep=2, when_busy="wait")
    with harness.closing():
        for step in range(1, 6):
            run.update()
            gockpt.save_overlapped(run.model, run.optimizer, path, step=step, options=options).result(30)
    assert gockpt.steps(path) == [4, 5]


def test_another_thread_may_wait_for_a_save_whose_window_is_open(run):
    handle = run.go(2)
    results = []
    waiting = threading.Thread(target=lambda: results.append(handle.result(30)))
    waiting.start()
    run.go(2)
    waiting.join(30)
    assert [r.step for r in results] == [8]
    run.check_nothing_lost()


def test_a_timeout_leaves_the_save_alone(run, harness, monkeypatch):
    gockpt.wait()
    release = slow_disk(monkeypatch)
    path = harness.directory()
    handle = gockpt.save_overlapped(run.model, run.optimizer, path, step=5)
    with pytest.raises(TimeoutError):
        handle.result(0.01)
    assert not handle.done()
    assert "captured" in repr(handle)
    release.set()
    assert handle.result(30).step == 5
    assert "durable" in repr(handle)


def test_callbacks_of_a_handle(run, harness):
    told = []
    path = harness.directory()
    handle = gockpt.save_overlapped(run.model, run.optimizer, path, step=5)
    handle.add_done_callback(told.append)
    handle.result(30)
    gockpt.wait()
    assert told == [handle]
    assert handle.progress().phase == "durable"
    assert handle.timeline()
    assert "window: 1" in handle.plan.explain()
