"""Handles: callbacks, timeouts, and errors that belong to another save."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from contextlib import suppress
from time import sleep

import pytest
import torch

import gockpt
from gockpt.saving import gradient_capture, session
from gockpt.storage.local.store import Store
from gockpt.storage.local.transaction import Transaction


def build(optimizer=torch.optim.SGD, size=64):
    model = torch.nn.Linear(size, size)
    return model, optimizer(model.parameters(), lr=0.1)


def update(model, optimizer):
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


@pytest.fixture
def slow_news(monkeypatch):
    """A log handler that takes long over the line that a save is durable."""

    class Slow(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith("saved step 1:"):
                sleep(0.3)

    logger, handler = logging.getLogger("gockpt"), Slow()
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def test_a_callback_may_wait_for_the_same_save(harness):
    """It runs on a worker, and holds nothing that the end of the save needs."""
    model, optimizer = build(size=400)
    saver = gockpt.Checkpointer(model, optimizer, harness.directory())
    seen = []
    handle = saver.after_step(1)
    handle.captured.add_done_callback(lambda _: seen.append(handle.result(20).step))
    ended = threading.Thread(target=saver.close, daemon=True)
    update(model, optimizer)
    ended.start()
    ended.join(30)
    assert not ended.is_alive()
    assert seen == [1]


@pytest.mark.parametrize("what", ["extra", "buffer"])
def test_an_error_of_the_next_tick_is_not_that_of_a_save_just_published(harness, slow_news, what):
    model, optimizer = build()
    path = harness.directory()
    saver = gockpt.Checkpointer(model, optimizer, path)
    handle = saver.after_step(1)
    handle.captured.result(20)
    while saver.busy:
        sleep(0.001)
    if what == "extra":
        with pytest.raises(gockpt.UsageError):
            saver.after_step(2, {"x/y": 1})
    else:
        model.register_buffer("sparse", torch.eye(3).to_sparse())
        with pytest.raises(gockpt.GockptError):
            saver.after_step(2)
    assert handle.result(20).step == 1
    assert gockpt.steps(path) == [1]


def test_waiting_for_the_capture_closes_the_window(harness):
    """Nobody else could: the thread that waits is the one that trains."""
    model, optimizer = build(torch.optim.AdamW)
    options = gockpt.Options(window=4)
    saver = gockpt.Checkpointer(model, optimizer, harness.directory(), every=8, options=options)
    for step in range(1, 7):
        update(model, optimizer)
        handle = saver.after_step(step)
    assert saver.window_open
    assert handle.captured.result(20) == 6
    saver.close()


def test_a_timeout_is_for_the_whole_of_result(harness, monkeypatch):
    go = threading.Event()
    original = Transaction.write_chunks

    def write_chunks(transaction, *args):
        go.wait(20)
        return original(transaction, *args)

    monkeypatch.setattr(Transaction, "write_chunks", write_chunks)
    model, optimizer = build()
    handle = gockpt.save_overlapped(model, optimizer, harness.directory(), step=1)
    left = []
    monkeypatch.setattr(Future, "result", lambda _, timeout: left.append(timeout))
    handle.result(timeout=0.3)
    assert left == [0.0]
    monkeypatch.undo()
    go.set()
    assert handle.result().step == 1


def test_the_gradient_ring_has_room_for_one_update_of_any_model(harness, monkeypatch):
    """One large parameter, cut into few pieces: each of its gradients finds room."""
    monkeypatch.setattr(gradient_capture, "RING_PATIENCE", 0.0)
    model = torch.nn.Linear(512, 256, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    options = gockpt.Options(window=2, when_busy="wait")
    saver = gockpt.Checkpointer(model, optimizer, harness.directory(), every=4, options=options)
    saved = []
    for step in range(1, 13):
        update(model, optimizer)
        handle = saver.after_step(step)
        if step % 4 == 0:
            saved.append(handle.result(20))
    saver.close()
    assert [(s.step, s.window, s.late_parts) for s in saved] == [(4, 2, {}), (8, 2, {}), (12, 2, {})]


def test_large_extras_are_asked_for_once_per_save(harness, monkeypatch):
    """Asking at every tick of a window would stall them all; such a window can't be closed early."""
    monkeypatch.setattr(session, "MOST_REMEMBERED", 1000)
    model, optimizer = build(torch.optim.AdamW)
    calls = []

    def extra():
        calls.append(1)
        return torch.zeros(1000)

    path = harness.directory()
    options = gockpt.Options(window=4, when_busy="wait")
    saver = gockpt.Checkpointer(model, optimizer, path, every=8, extra={"ema": extra}, options=options)
    for step in range(1, 9):
        update(model, optimizer)
        saver.after_step(step)
    saver.wait()
    assert len(calls) == 3  # tried out at the first tick, then when the window opens and when it closes
    for step in range(9, 16):
        update(model, optimizer)
        saver.after_step(step)
    with pytest.raises(gockpt.SaveAborted, match="step 15"):
        saver.wait()
    saver.close()
    assert gockpt.steps(path) == [8]


@pytest.mark.parametrize("place", ["prune", "upload"])
def test_a_defect_after_the_publication_is_told_and_takes_nothing_back(monkeypatch, caplog, place):
    """The checkpoint is durable by then: its handle says so, and the next call of the library the rest."""

    def defect(*_):
        msg = "a defect"
        raise ZeroDivisionError(msg)

    owner, name = (Store, "prune") if place == "prune" else (gockpt.Checkpointer, "_upload")
    monkeypatch.setattr(owner, name, defect)
    model, optimizer = build()
    saver = gockpt.Checkpointer(model, optimizer, "ckpts", options=gockpt.Options(window=1, keep=2))
    handle = saver.after_step(1)
    assert handle.result(30).step == 1
    assert gockpt.steps("ckpts") == [1]
    assert "ZeroDivisionError" in caplog.text
    with pytest.raises(gockpt.errors.WorkerError, match="step 1 is saved, but .* ZeroDivisionError: a d"):
        saver.after_step(2)
    monkeypatch.undo()
    with suppress(gockpt.errors.WorkerError):  # of step 2
        saver.close()
    assert saver.closed
    assert gockpt.steps("ckpts") == [1, 2]
