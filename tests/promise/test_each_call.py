"""Without ``every``: each call's own state is saved, whatever happens to the state right after the call."""

from __future__ import annotations

import copy
import inspect
import random
import threading

import pytest
import torch

import gockpt
import gockpt.storage.local.transaction
from gockpt.staging import host_stager
from gockpt.workers.save_job import Job


def build(rng):
    """A model with buffers, large and small arrays, ones with holes; and one of several optimizers."""
    torch.manual_seed(rng.randrange(1 << 30))
    width = rng.choice([3, 40, 150])
    model = torch.nn.Sequential(
        torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, width, bias=False)
    )
    model.register_buffer("holes", torch.randn(width, 6)[:, ::2])
    kinds = [
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, foreach=False),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adafactor(p, lr=0.1),
    ]
    return model, rng.choice(kinds)(model.parameters())


def update(model, optimizer):
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


def _data(model, _optimizer, _rng):
    for p in model.parameters():
        p.data.mul_(1.5)


def _one_element(model, _optimizer, rng):
    p = rng.choice(list(model.parameters()))
    p.data.view(-1)[rng.randrange(p.numel())] += 1


def _buffers(model, _optimizer, _rng):
    for b in model.buffers():
        b.add_(1)


def _numpy(model, _optimizer, _rng):
    model[0].weight.detach().numpy()[:] = 7


def _replaced(model, _optimizer, _rng):
    model[0].weight.data = torch.zeros_like(model[0].weight)


def _load(model, _optimizer, _rng):
    model.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()})


def _step(model, optimizer, _rng):
    update(model, optimizer)


def _state(_model, optimizer, _rng):
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.data.add_(1)


def _other_thread(model, _optimizer, _rng):
    other = torch.optim.SGD(model.parameters(), lr=1.0)
    thread = threading.Thread(target=update, args=(model, other))
    thread.start()
    thread.join()


AFTER = [_data, _one_element, _buffers, _numpy, _replaced, _load, _step, _state, _other_thread]


def check_loops(harness, seed, loops):
    """Run random loops: each published step must be that call's deep copy, and each call's step is there."""
    rng = random.Random(seed)
    for _ in range(loops):
        model, optimizer = build(rng)
        path = harness.directory()
        options = gockpt.Options(cpu_threads=1, worker="thread", verify=rng.choice(["full", "close"]))
        with gockpt.Checkpointer(model, optimizer, path, options=options) as saver:
            told, kept, step = [], {}, 0
            for _ in range(rng.randrange(1, 5)):
                step += rng.choice([1, 1, 1, 7])
                if rng.random() < 0.8:
                    update(model, optimizer)
                extra = {"count": step, "table": torch.full((9,), float(step))}
                kept[step] = harness.take(step, model, optimizer, extra)
                handle = saver.after_step(step, extra)
                assert handle.captured.done()
                assert handle.step == step
                told.append(handle)
                extra["table"].zero_()
                for change in rng.sample(AFTER, rng.randrange(1, 3)):
                    change(model, optimizer, rng)
        assert [h.result(0).step for h in told] == list(kept) == gockpt.steps(path)
        assert [h.step for h in told] == list(kept)
        for step, moment in kept.items():
            with gockpt.open(path, step) as found:
                for name, expected in moment.arrays.items():
                    harness.same(found[name][...], expected, f"{step}: {name}")
                assert found.extra["count"] == step
                assert found.extra["table"].tolist() == [step] * 9


def test_no_change_after_a_call_reaches_its_save(harness):
    check_loops(harness, 1, 8)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(10))
def test_no_change_after_a_call_reaches_its_save_in_very_many_loops(harness, seed):
    check_loops(harness, 100 + seed, 300)


def test_it_is_the_default():
    for call in (gockpt.save_overlapped, gockpt.Checkpointer):
        assert inspect.signature(call).parameters["every"].default is None


def test_what_another_thread_changes_during_the_call_is_captured_again(harness, monkeypatch):
    """For the same step; such a save is not moved to the next call."""
    model = torch.nn.Linear(80, 80)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    update(model, optimizer)
    original, times = host_stager.copy_fingerprints, iter([1])

    def change_once(source, target, *more):
        if next(times, None):
            model.weight.data.mul_(2)
        return original(source, target, *more)

    monkeypatch.setattr(host_stager, "copy_fingerprints", change_once)
    path = harness.directory()
    handle = gockpt.save_overlapped(model, optimizer, path, step=5)
    expected = copy.deepcopy(model.state_dict())
    _data(model, optimizer, None)
    assert handle.attempts == 2
    assert handle.result(30).step == 5
    assert gockpt.steps(path) == [5]
    for name, value in expected.items():
        assert torch.equal(gockpt.open(path)[f"model/{name}"][...], value)


def test_a_call_waits_for_the_former_save_and_not_for_its_own(harness, monkeypatch):
    """Each call's state is saved, also where the disk is slower than the loop."""
    gate, entered = threading.Event(), threading.Event()
    original = Job.close

    def close(job, *arguments):
        original(job, *arguments)
        entered.set()

    write = gockpt.storage.local.transaction.Transaction.write_chunks

    def write_chunks(transaction, *arguments):
        gate.wait(30)
        return write(transaction, *arguments)

    monkeypatch.setattr(Job, "close", close)
    monkeypatch.setattr(gockpt.storage.local.transaction.Transaction, "write_chunks", write_chunks)
    model, optimizer = build(random.Random(3))
    path = harness.directory()
    first = gockpt.save_overlapped(model, optimizer, path, step=1)
    assert entered.is_set()
    assert not first.done()
    opener = threading.Timer(0.05, gate.set)
    opener.start()
    second = gockpt.save_overlapped(model, optimizer, path, step=2)
    assert first.done()
    assert second is not first
    third = gockpt.save_overlapped(model, optimizer, path, step=2)  # the same step again: again its own save
    assert third is not second
    gockpt.wait()
    assert [h.result(0).step for h in (first, second, third)] == [1, 2, 2]
    assert gockpt.steps(path) == [1, 2]
    opener.join()
