"""A due save that is left out is told, counted, and never the last; ``finish`` saves the last state."""

from __future__ import annotations

import contextlib
import copy
import logging
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

import gockpt
from gockpt import registry
from gockpt.saving import last_tick
from gockpt.storage.local.transaction import Transaction


def update(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()


class Loader:
    def __init__(self):
        self.seen = 0

    def state_dict(self):
        return {"seen": self.seen}


class Run:
    """A loop whose disk stands still as long as ``gate`` is closed."""

    def __init__(self, harness, every=4, **options):
        self.harness = harness
        self.model, self.optimizer = self.build()
        self.every, self.step, self.path = every, 0, harness.directory()
        self.loader = Loader()
        self.options = gockpt.Options(**{"window": 1, "nice": 0, **options})
        self.moments = {}

    @staticmethod
    def build():
        model = torch.nn.Sequential(torch.nn.Linear(8, 30), torch.nn.BatchNorm1d(30), torch.nn.Linear(30, 8))
        return model, torch.optim.AdamW(model.parameters(), lr=0.05)

    def tick(self):
        self.step += 1
        self.loader.seen += 1
        update(self.model, self.optimizer)
        extra = {"loader": self.loader}
        self.moments[self.step] = self.harness.take(self.step, self.model, self.optimizer, extra)
        self.save = gockpt.save_overlapped(
            self.model, self.optimizer, self.path,
            step=self.step, every=self.every, extra=extra, options=self.options,
        )  # fmt: skip
        return self.save

    def go(self, upto):
        while self.step < upto:
            self.tick()
        return self

    def check(self, *steps):
        assert gockpt.steps(self.path) == list(steps)
        for step in steps:
            self.harness.check_open(self.path, self.moments[step])
            self.harness.check_load(self.path, self.moments[step], *self.build())


@pytest.fixture
def gate(monkeypatch):
    """Closed, nothing is written; ``entered`` is set when a write waits."""
    found = threading.Event()
    found.entered = threading.Event()
    original = Transaction.write_chunks

    def write_chunks(transaction, *arguments):
        found.entered.set()
        assert found.wait(60)
        return original(transaction, *arguments)

    monkeypatch.setattr(Transaction, "write_chunks", write_chunks)
    yield found
    found.set()


ENDS = {
    "wait": gockpt.wait,
    "finish": gockpt.finish,
    "close": lambda: [s.close() for s in list(registry.opened)],
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize(("every", "last"), [(4, 8), (4, 10), (1, 6)])
def test_the_last_is_saved_at_the_end(harness, gate, caplog, end, every, last):
    """Under the step of the last call, with the extras and random states that it had."""
    run = Run(harness, every)
    run.go(last)
    left_out = list(range(2 * every, last + 1, every))
    assert run.save.skipped == run.save.progress().skipped == tuple(left_out)
    for step in left_out if every > 1 else left_out[:1]:
        assert f"step {step} is due" in caplog.text
    told = [record for record in caplog.records if "is due" in record.getMessage()]
    assert {record.levelno for record in told} == {logging.WARNING}
    run.loader.seen = 99
    torch.rand(3)
    gate.set()
    end()
    run.loader.seen = last
    run.check(every, last)


def test_a_with_block_ends_the_same_way(harness, gate):
    run = Run(harness)
    with gockpt.Checkpointer(run.model, run.optimizer, run.path, every=2, options=run.options) as saver:
        for step in range(1, 6):
            update(run.model, run.optimizer)
            run.moments[step] = harness.take(step, run.model, run.optimizer)
            saver.after_step(step)
        gate.set()
    run.check(2, 5)


def test_the_exit_of_a_program(harness):
    path = harness.directory()
    program = """
        import sys, threading, torch, gockpt
        from gockpt.storage.local.transaction import Transaction
        gate, original = threading.Event(), Transaction.write_chunks
        Transaction.write_chunks = lambda *a: gate.wait(60) and original(*a)

        def train():
            model = torch.nn.Linear(3, 3)  # nobody else refers to it
            opt = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(1, 8):
                model(torch.ones(1, 3)).sum().backward()
                opt.step()
                gockpt.save_overlapped(model, opt, sys.argv[1], step=step, every=3, extra={"n": step})

        train()
        gate.set()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), path], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "step 6 is due" in done.stderr
    assert gockpt.steps(path) == [3, 7]
    assert gockpt.open(path).extra["n"] == 7


def _fix(model, _optimizer):
    model[0].weight.data[0, 0] += 1


CHANGES = {
    "another update": update,
    "one element": _fix,
    "a buffer": lambda model, _: model[1].running_mean.data.mul_(2),
    "all of it": lambda model, _: [p.data.mul_(1.1) for p in model.parameters()],
    "its own load": lambda model, _: model.load_state_dict(
        {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    ),
    "another tensor": lambda model, _: setattr(model[0].weight, "data", torch.ones(30, 8)),
    "another module": lambda model, _: model.__setitem__(0, torch.nn.Linear(8, 30)),
    "optimizer state": lambda _, optimizer: [s["exp_avg"].data.zero_() for s in optimizer.state.values()],
    "an update nobody saw": lambda model, _: [p.data.add_(p.grad, alpha=-1.0) for p in model.parameters()],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("end", ENDS, ids=ENDS)
def test_what_no_longer_stands_is_told_and_not_saved(harness, gate, caplog, change, end):
    run = Run(harness).go(9)
    change(run.model, run.optimizer)
    gate.set()
    refused = (
        pytest.raises(gockpt.SaveError, match="step 9 can't be saved any more") if end == "finish" else None
    )
    caplog.clear()
    with refused or contextlib.nullcontext():
        ENDS[end]()
    if refused is None:
        assert "step 9 can't be saved any more" in caplog.text
        assert caplog.records[0].levelno == logging.WARNING
    run.check(4)


def test_of_a_large_state_a_sample_is_looked_at(harness, monkeypatch):
    monkeypatch.setattr(last_tick, "MOST_BYTES", 1000)
    monkeypatch.setattr(last_tick, "MOST_TENSORS", 3)
    run = Run(harness, 100).go(3)
    assert gockpt.finish(run.path).step == 3
    run.check(3)
    run.go(5)
    for p in run.model.parameters():
        p.data.mul_(1.1)  # which moves no version counter
    with pytest.raises(gockpt.SaveAborted):
        gockpt.finish(run.path)
    run.go(6)
    with torch.no_grad():
        run.model[2].bias[3] += 1
    with pytest.raises(gockpt.SaveAborted):
        gockpt.finish(run.path)


@pytest.mark.parametrize("window", [1, 3, "auto"])
@pytest.mark.parametrize("last", [1, 5, 7, 8])
def test_finish_saves_what_is_not_saved(harness, window, last):
    run = Run(harness, window=window, when_busy="wait").go(last)
    assert gockpt.finish(run.path).result(0).step == last
    assert gockpt.finish(run.model).step == last  # and not a second time
    assert len(list(registry.opened)) == 1
    run.check(*sorted({*range(4, last + 1, 4), last}))
    run.go(12)
    assert gockpt.finish().step == 12
    run.check(*sorted({*range(4, 13, 4), last}))


def test_finish_of_what_is_not_there(harness):
    assert gockpt.finish() is None
    run = Run(harness).go(1)
    with pytest.raises(gockpt.UsageError, match=f"saves into: {run.path}"):
        gockpt.finish("elsewhere")
    with pytest.raises(gockpt.UsageError, match="this Linear"):
        gockpt.finish(torch.nn.Linear(1, 1))
    with pytest.raises(gockpt.UsageError):
        gockpt.finish(7)


def test_finish_of_several_tells_all_that_failed(harness):
    runs = [Run(harness, 100).go(n) for n in (2, 3)]
    for run in runs:
        _fix(run.model, None)
    with pytest.raises(gockpt.SaveAborted, match="step") as caught:
        gockpt.finish()
    assert len(caught.value.__notes__) == 1


def test_finish_tries_a_failed_save_again(harness, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    run = Run(harness, None)
    with monkeypatch.context() as patch:
        patch.setattr(Transaction, "write_chunks", full)
        save = run.tick()
        with pytest.raises(gockpt.SaveError):
            save.result(30)
        with pytest.raises(gockpt.SaveError):
            gockpt.finish()
        expected = copy.deepcopy(run.model.state_dict())
    assert gockpt.finish().result(0).step == 1
    harness.same(run.model.state_dict(), expected)
    run.check(1)


def test_the_extras_of_finish_without_a_memory_of_the_last_call(harness):
    """Asking for them at each call would cost the loop; so they are as of finish()."""
    run = Run(harness, 100).go(3)
    run.loader.seen = 7
    gockpt.finish(run.path)
    assert gockpt.open(run.path).extra["loader"] == {"seen": 7}


def test_large_extras_are_not_remembered(harness, gate, monkeypatch):
    monkeypatch.setattr(last_tick, "MOST_REMEMBERED", 100)
    run = Run(harness, 4)
    run.loader.state_dict = lambda: {"table": torch.full((100,), float(run.loader.seen))}
    run.go(9)
    run.loader.seen = 50
    gate.set()
    gockpt.wait()
    assert gockpt.steps(run.path) == [4, 9]
    assert gockpt.open(run.path).extra["loader"]["table"][0] == 50
