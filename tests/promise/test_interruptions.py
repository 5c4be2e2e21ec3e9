"""Interrupted anywhere, by Ctrl-C, an error or abort(): what was not proven is never published."""

from __future__ import annotations

import os
import signal
import threading
from time import sleep
from types import SimpleNamespace

import pytest
import torch

import gockpt
from gockpt.planning.rates import Pace
from gockpt.saving.capture import Attempt
from gockpt.staging import host_stager
from gockpt.storage.local.transaction import Transaction
from gockpt.workers.save_job import Job

LAYERS, WIDTH = 8, 200


@pytest.fixture
def link(monkeypatch):
    """A link to the arena that is slow from the background thread while ``slow`` is set.

    ``in_main`` runs once, inside the first copy that the main thread helps with. ``open`` lets the
    background through at all.
    """
    found = SimpleNamespace(slow=False, in_main=None, copies=0, open=threading.Event())
    found.open.set()
    original = host_stager.copy_fingerprints

    def copy(*args):
        if threading.current_thread() is threading.main_thread():
            action, found.in_main = found.in_main, None
            if action is not None:
                action()
        else:
            assert found.open.wait(30)
            if found.slow:
                sleep(0.02)
        found.copies += 1
        return original(*args)

    monkeypatch.setattr(host_stager, "copy_fingerprints", copy)
    return found


def build(optimizer=torch.optim.AdamW):
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    return model, optimizer(model.parameters(), lr=0.1)


def update(model, optimizer):
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_published(path, step, expected):
    checkpoint = gockpt.open(path, step=step)
    for name, value in expected.items():
        assert torch.equal(checkpoint[f"model/{name}"][...], value), name
    assert gockpt.verify(path, step=step).ok


def interrupt():
    raise KeyboardInterrupt


def test_interrupted_while_wait_helps_with_the_last_copies(harness, link):
    """As Ctrl-C and the exit of the interpreter do it: the state stands, so it is published, whole."""
    model, optimizer = build(torch.optim.SGD)
    path = harness.directory()
    saver = gockpt.Checkpointer(model, optimizer, path, every=1, options=gockpt.Options(window=1))

    def interrupted():
        link.open.set()
        interrupt()

    link.in_main = interrupted
    link.open.clear()
    saver.after_step(1)
    expected = values(model)
    with pytest.raises(KeyboardInterrupt):
        saver.wait()
    saver.abort("the program ended by an exception")
    saver.close()
    assert gockpt.steps(path) == [1]
    assert_published(path, 1, expected)


@pytest.mark.parametrize("how", ["abort", "extra"])
def test_copies_of_a_given_up_window_do_not_reach_the_next_save(harness, link, monkeypatch, how):
    original = Transaction.write_chunks

    def write_chunks(transaction, *args):
        seen = -1
        while link.slow and link.copies != seen:
            seen = link.copies
            sleep(0.1)
        return original(transaction, *args)

    monkeypatch.setattr(Transaction, "write_chunks", write_chunks)
    model, optimizer = build()
    path = harness.directory()
    state = {"broken": False}

    def extra():
        if state["broken"]:
            msg = "flaky extra"
            raise RuntimeError(msg)
        return 1

    saver = gockpt.Checkpointer(
        model, optimizer, path, every=4, extra={"x": extra}, options=gockpt.Options(window=3)
    )
    for step in range(1, 6):
        update(model, optimizer)
        saver.after_step(step)
    saver.wait()
    link.slow = True
    update(model, optimizer)
    if how == "abort":
        saver.after_step(6)
        assert saver.window_open
        saver.abort()
    else:
        state["broken"] = True
        with pytest.raises(RuntimeError, match="flaky extra"):
            saver.after_step(6)
        state["broken"] = False
    saver.after_step(8)
    expected = values(model)
    update(model, optimizer)
    saver.close()
    assert_published(path, 8, expected)


def test_a_second_interrupt_while_the_first_gives_the_window_up(harness, monkeypatch):
    """The handle is told, and close() neither hangs nor leaves anything behind."""
    model, optimizer = build()
    saver = gockpt.Checkpointer(
        model, optimizer, harness.directory(), every=10, options=gockpt.Options(window=4)
    )
    for step in range(1, 8):
        update(model, optimizer)
        handle = saver.after_step(step)
    original, times = Job.abort, iter([interrupt])
    monkeypatch.setattr(Job, "abort", lambda job: next(times, lambda: original(job))())
    with pytest.raises(KeyboardInterrupt):
        saver.after_step(8, {"x": interrupt})
    assert handle.done()
    assert isinstance(handle.exception(), gockpt.SaveAborted)
    closing = threading.Thread(target=saver.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive()


@pytest.mark.parametrize("action", ["wait", "close", "save"])
def test_a_signal_inside_the_library_is_handled_when_it_is_done(harness, link, action):
    """Its handler may then do what it likes: nothing is half done."""
    model, optimizer = build(torch.optim.SGD)
    path = harness.directory()
    saver = gockpt.Checkpointer(model, optimizer, path, every=1)
    told = []

    def handler(*_):
        {"wait": saver.wait, "close": saver.close, "save": lambda: saver.after_step(2)}[action]()
        told.append(gockpt.steps(path))

    former = signal.signal(signal.SIGTERM, handler)
    try:
        link.slow = True
        saver.after_step(1)
        expected = values(model)
        link.in_main = lambda: os.kill(os.getpid(), signal.SIGTERM)
        update(model, optimizer)
        saver.close()
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, former)
    assert len(told) == 1
    assert action == "save" or told == [[1]]
    assert_published(path, 1, expected)


def test_a_second_signal_is_handled_at_once(harness, link):
    """Who presses Ctrl-C twice does not want to wait."""
    model, optimizer = build(torch.optim.SGD)
    saver = gockpt.Checkpointer(model, optimizer, harness.directory(), every=1)
    times = []

    def handler(*_):
        times.append(saver.handle.captured.done())

    former = signal.signal(signal.SIGTERM, handler)
    try:
        link.slow = True
        saver.after_step(1)

        def twice():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

        link.in_main = twice
        update(model, optimizer)
        saver.close()
    finally:
        signal.signal(signal.SIGTERM, former)
    assert times == [False, True]


def test_ctrl_c_while_a_window_is_closed_early_and_the_loop_goes_on(harness, monkeypatch):
    """As in a notebook. What was half closed is not gone on with."""
    model, optimizer = build()
    path = harness.directory()
    saver = gockpt.Checkpointer(model, optimizer, path, every=8, options=gockpt.Options(window=4))
    for step in range(1, 14):
        update(model, optimizer)
        handle = saver.after_step(step)
        if step == 8:
            handle.result(30)
    original, times = Attempt._overtaken_before, iter([interrupt])
    monkeypatch.setattr(
        Attempt, "_overtaken_before", lambda self, unit: next(times, lambda: original(self, unit))()
    )
    with pytest.raises(KeyboardInterrupt):
        handle.result(30)
    for step in (14, 15, 16):
        update(model, optimizer)
        saver.after_step(step)
    expected = values(model)
    saver.close()
    assert_published(path, 16, expected)


def test_ctrl_c_right_after_a_copy_was_lost(harness, monkeypatch):
    """The loss is not forgotten: there is nothing to publish any more."""
    model, optimizer = build()
    path = harness.directory()
    saver = gockpt.Checkpointer(model, optimizer, path, every=1, options=gockpt.Options(window=1))
    held = threading.Event()
    original = host_stager.copy_fingerprints
    monkeypatch.setattr(host_stager, "copy_fingerprints", lambda *args: (held.wait(20), original(*args))[1])
    update(model, optimizer)
    saver.after_step(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    times = iter([interrupt])
    copied = Pace.copied
    monkeypatch.setattr(Pace, "copied", lambda *args: next(times, lambda: copied(*args))())
    held.set()
    with pytest.raises(KeyboardInterrupt):
        saver.wait()
    with pytest.raises(gockpt.SaveAborted):
        saver.wait()
    saver.close()
    assert gockpt.steps(path) == []


def test_saving_goes_on_after_two_interrupts(harness, monkeypatch):
    """The second one inside what gives the save up."""
    model, optimizer = build()
    path = harness.directory()
    saver = gockpt.Checkpointer(model, optimizer, path, every=1)
    original = Job.abort

    def abort(job):
        monkeypatch.setattr(Job, "abort", original)
        original(job)
        raise KeyboardInterrupt

    monkeypatch.setattr(Job, "abort", abort)
    with pytest.raises(KeyboardInterrupt):
        saver.after_step(1, {"x": interrupt})
    for step in (2, 3):
        update(model, optimizer)
        saver.after_step(step, {}).result(30)
    saver.close()
    assert gockpt.steps(path) == [2, 3]


def test_wait_in_a_signal_handler_between_steps(harness):
    """As a cluster's notice of preemption does it."""
    former = signal.signal(signal.SIGTERM, lambda *_: gockpt.wait())
    try:
        model, optimizer = build()
        path = harness.directory()
        saver = gockpt.Checkpointer(model, optimizer, path, every=10, options=gockpt.Options(window=4))
        for step in range(1, 9):
            update(model, optimizer)
            saver.after_step(step)
        expected = values(model)
        os.kill(os.getpid(), signal.SIGTERM)
        assert gockpt.steps(path) == [8]
        saver.close()
    finally:
        signal.signal(signal.SIGTERM, former)
    assert_published(path, 8, expected)
