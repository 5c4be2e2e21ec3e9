"""Several models, threads, checkpointers and collected objects in one process."""

from __future__ import annotations

import gc
import threading
import weakref
from time import sleep

import pytest
import torch

import gockpt
from gockpt import registry
from gockpt.storage.local.transaction import Transaction


def build(size=64, optimizer=torch.optim.AdamW, lr=0.1):
    model = torch.nn.Linear(size, size)
    return model, optimizer(model.parameters(), lr=lr)


def update(model, optimizer):
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


def test_two_living_models_in_one_path_are_refused(harness):
    """They would replace each other's checkpoints, and nobody would notice before the restore."""
    first, second = build(4), build(3)
    path = harness.directory()
    for step in (1, 2):
        gockpt.save_overlapped(*first, path, step=step, every=2)
    with pytest.raises(gockpt.PathBusy, match="as one list"):
        gockpt.save_overlapped(*second, path, step=2, every=2)
    gockpt.save_overlapped([first[0], second[0]], [first[1], second[1]], harness.directory(), step=2)
    gockpt.wait()
    assert gockpt.open(path)["model/weight"].shape == (4, 4)


def test_a_model_loaded_from_the_path_takes_it_over(harness):
    path = harness.directory()
    first, second = build(), build()
    gockpt.save_overlapped(*first, path, step=1)
    gockpt.wait()
    gockpt.load(path, *second)
    gockpt.save_overlapped(*second, path, step=2)
    gockpt.wait()
    assert gockpt.steps(path) == [1, 2]


def test_the_thread_that_trained_has_ended(harness):
    """Another thread may then close the window: nobody else can."""
    path = harness.directory()
    kept = build()

    def train():
        for step in range(1, 9):
            update(*kept)
            gockpt.save_overlapped(*kept, path, step=step, every=10, options=gockpt.Options(window=4))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    waiting = threading.Thread(target=gockpt.wait, daemon=True)
    waiting.start()
    waiting.join(20)
    assert not waiting.is_alive()
    assert gockpt.steps(path) == [8]


def test_waiting_for_a_thread_that_ends_inside_a_window(harness):
    """Whoever waits already takes over."""
    path = harness.directory()
    kept, opened, go = build(), threading.Event(), threading.Event()
    handles = []

    def train():
        for step in range(1, 9):
            update(*kept)
            handle = gockpt.save_overlapped(
                *kept, path, step=step, every=10, options=gockpt.Options(window=4)
            )
        handles.append(handle)
        opened.set()
        go.wait(20)

    thread = threading.Thread(target=train)
    thread.start()
    assert opened.wait(20)
    waiting = threading.Thread(target=handles[0].result, daemon=True)
    waiting.start()
    sleep(0.05)
    go.set()
    waiting.join(20)
    assert not waiting.is_alive()
    assert gockpt.steps(path) == [8]


def test_closed_checkpointers_do_not_live_as_long_as_the_model(harness):
    """One for each phase of a long run, each with an optimizer of its own."""
    model = torch.nn.Linear(8, 8)
    optimizers = []
    for _ in range(3):
        optimizer = torch.optim.AdamW(model.parameters())
        optimizers.append(weakref.ref(optimizer))
        with gockpt.Checkpointer(model, optimizer, harness.directory()) as saver:
            update(model, optimizer)
            saver.after_step(1)
    del optimizer, saver
    gc.collect()
    assert [o() for o in optimizers] == [None, None, None]


def test_updates_are_counted_on(harness):
    """When arguments change, and after a load into the same model."""
    path = harness.directory()
    model, optimizer = build()

    def held(step, **more):
        for number in range(step - 4, step + 1):
            update(model, optimizer)
            gockpt.save_overlapped(model, optimizer, path, step=number, **more)
        gockpt.wait()
        return gockpt.open(path).metadata.optimizer_steps

    before = held(5, every=5)
    assert held(10, every=5) == before + 5
    assert held(15, every=15) == before + 10
    gockpt.load(path, model, optimizer, step=10)
    assert held(15, every=15) == before + 10


def test_a_model_is_collected_on_any_thread_at_any_moment(harness, monkeypatch):
    """The collector runs wherever something is allocated: also inside a worker, and inside our locks."""
    path = harness.directory()
    original = Transaction.write_chunks

    def write_chunks(transaction, *args):
        sleep(0.1)
        gc.collect()
        return original(transaction, *args)

    monkeypatch.setattr(Transaction, "write_chunks", write_chunks)

    def run(step):
        model, optimizer = build(optimizer=torch.optim.SGD)
        model.itself = [model]
        gockpt.save_overlapped(model, optimizer, path, step=step)

    done = threading.Event()

    def both():
        run(1)
        run(2)
        gockpt.wait()
        done.set()

    threading.Thread(target=both, daemon=True).start()
    assert done.wait(30)
    assert gockpt.steps(path) == [1, 2]


def test_models_that_are_gone_leave_no_checkpointer_behind(harness):
    parameters = []

    def run():
        model, optimizer = build()
        parameters.append(weakref.ref(model.weight))
        update(model, optimizer)
        gockpt.save_overlapped(model, optimizer, harness.directory(), step=1)

    before = len(registry.opened)
    for _ in range(3):
        run()
    gockpt.wait()
    gc.collect()
    gockpt.wait()
    assert len(registry.opened) == before
    assert all(not saver.model_is_gone for saver in registry.by_call.values())
    assert [p() for p in parameters] == [None, None, None]


def test_calls_are_counted_on_when_arguments_change(harness):
    path = harness.directory()
    model, optimizer = build()
    for _ in range(8):
        gockpt.save_overlapped(model, optimizer, path, every=4)
        gockpt.wait()
    for _ in range(4):
        gockpt.save_overlapped(model, optimizer, path, every=2)
        gockpt.wait()
    assert gockpt.steps(path) == [4, 8, 10, 12]


def test_calls_are_counted_on_from_a_checkpoint_loaded_meanwhile(harness):
    path = harness.directory()
    model, optimizer = build()
    gockpt.save_overlapped(model, optimizer, path, step=20)
    gockpt.wait()
    gockpt.save_overlapped(model, optimizer, path)
    gockpt.wait()
    gockpt.load(path, model, optimizer, step=20)
    gockpt.save_overlapped(model, optimizer, path)
    gockpt.wait()
    assert gockpt.steps(path) == [20, 21]


def test_wait_tells_of_every_save_that_failed(harness, monkeypatch):
    def refuse(*_args, **_kwargs):
        msg = "no space left"
        raise gockpt.StorageError(msg)

    monkeypatch.setattr(Transaction, "write_chunks", refuse)
    pairs = [build(), build()]
    for model, optimizer in pairs:
        gockpt.save_overlapped(model, optimizer, harness.directory(), step=1)
    with pytest.raises(gockpt.StorageError) as caught:
        gockpt.wait()
    assert len(caught.value.__notes__) == 1
    gockpt.wait()
