"""Replay kernels and copies that are wrong on purpose: caught, never published, saved right later."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
import pytest
import torch

import gockpt
from gockpt.kernels import replay
from gockpt.replay.rules import rule_for
from gockpt.staging import host_stager

EVERY, WINDOW = 6, 4


def build_with(harness, kind=torch.optim.AdamW, **options):
    def build():
        model = harness.Tensors({"a": torch.randn(2000), "b": torch.randn(40, 41)})
        return model, kind(model.parameters(), lr=0.05, **options)

    return build


def update(model, optimizer, step):
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


@pytest.fixture
def loop(harness):
    """A loop whose optimizer was calibrated with sound kernels: what breaks, breaks afterwards."""
    made = harness.Loop(build_with(harness), update, every=EVERY, window=WINDOW)
    model, optimizer = made.build()
    update(model, optimizer, 0)
    rule = rule_for(optimizer, optimizer.param_groups[0], model.a, optimizer.state[model.a])
    assert not isinstance(rule, str), rule
    return made


class Broken:
    """Replaces the kernels by ones that damage their result in chosen calls, and counts per size."""

    def __init__(self, monkeypatch, damage, *, when=lambda number, size: True):
        self.real, self.lock, self.calls = replay.run, threading.Lock(), []
        self.damage, self.when = damage, when
        monkeypatch.setattr(replay, "run", self)

    def __call__(self, kernel, flags, p, states, grads, scalars, *, tail):
        self.real(kernel, flags, p, states, grads, scalars, tail=tail)
        if not grads:
            return
        with self.lock:
            number = len(self.calls)
            self.calls.append(p.size)
        if self.when(number, p.size):
            self.damage(p, states)


def ulp_in_p(p, states):
    p.view(np.int32)[p.size // 2] += 1


def ulp_in_a_state(p, states):
    states[1].view(np.int32)[0] -= 1


def sign_of_zero(p, states):
    states[0].view(np.uint32)[3] ^= 1 << 31


def far_off(p, states):
    """Too far to be rounded away by later updates, as one ulp sometimes is."""
    p[p.size // 2] += 1.0


def swapped(p, states):
    p[[0, 1]] = p[[1, 0]]


DAMAGES = (ulp_in_p, ulp_in_a_state, sign_of_zero, swapped)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_wrong_bit_is_caught_and_the_save_retargeted(harness, loop, monkeypatch, damage):
    broken = Broken(monkeypatch, damage)
    with harness.closing():
        loop.run(EVERY)
        handle = loop.handles[-1]
        while handle.progress().phase != "void":
            assert handle.progress().phase in ("closing", "captured")
            handle.captured.result(30)
            loop.update(loop.model, loop.optimizer, 0)  # training goes on until the mismatch is known
            loop.moments[loop.step] = None  # step 6 as such is gone
        assert gockpt.steps(loop.path) == []
        loop.step = 20
        loop.boundary()
        saved = loop.finish()
    assert broken.calls
    assert [(s.step, s.attempts, s.window) for s in saved] == [(20, 2, 1)]
    assert handle.step == 20
    assert handle.attempts == 2
    assert any("did not match" in event for event in handle.events)
    assert any("retargeted from 6 to 20" in event for event in handle.events)


def test_what_was_wrong_once_is_not_replayed_again(harness, loop, monkeypatch):
    """The distrusted parameter leaves at the close from then on; the other one is replayed as before."""
    sizes = []
    broken = Broken(monkeypatch, far_off, when=lambda number, size: number == 0)
    with harness.closing():
        loop.run(2 * EVERY)
        for _ in range(2):
            loop.handles[-1].result(30)  # or the next window would begin late, on a busy machine
            loop.run(EVERY)
        sizes = broken.calls
        saved = loop.finish()
    assert saved[0].attempts == 2
    assert saved[0].step > EVERY
    later = [s for s in saved if s.step > 2 * EVERY]
    assert [s.step for s in later] == [3 * EVERY, 4 * EVERY]
    for result in later:
        assert result.attempts == 1
        assert result.window == WINDOW
        assert len(result.late_parts) == 1
        assert "did not match" in next(iter(result.late_parts.values()))
    assert sizes


def test_if_all_are_wrong_nothing_is_replayed_any_more(harness, loop, monkeypatch):
    broken = Broken(monkeypatch, ulp_in_a_state)
    with harness.closing():
        loop.run(2 * EVERY)
        loop.handles[0].result(30)
        called = len(broken.calls)
        loop.run(3 * EVERY)
        saved = loop.finish()
    assert len(broken.calls) == called
    assert [s.attempts for s in saved] == [2] + [1] * (len(saved) - 1)
    assert all(s.window == 1 for s in saved[1:])


def test_when_training_has_stopped_the_state_that_still_stands_is_copied(harness, loop, monkeypatch):
    """Nobody trains any more, so the due step itself still can be saved: at once, by the one who waits."""
    Broken(monkeypatch, ulp_in_p)
    with harness.closing():
        loop.run(EVERY)
        saved = loop.handles[-1].result(30)
        assert (saved.step, saved.attempts) == (EVERY, 2)
        loop.finish()


def test_when_the_state_does_not_stand_any_more_nothing_is_published(harness, loop, monkeypatch):
    """The replay was wrong, and the step's state was changed since: the save is lost, and says so."""
    Broken(monkeypatch, ulp_in_p)
    loop.run(EVERY)
    loop.model.a.data[3] += 1.0
    with pytest.raises(gockpt.SaveError, match="changed after the last"):
        loop.handles[-1].result(30)
    assert gockpt.steps(loop.path) == []
    with harness.closing():
        loop.run(EVERY)  # the next save works
        saved = [h.result(30) for h in loop.handles[1:]]
        assert saved[-1].step == 2 * EVERY
        loop.check(2 * EVERY)


def test_a_kernel_that_raises_fails_the_save_but_not_the_training(harness, loop, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("in the kernel")

    with monkeypatch.context() as patch, harness.closing():
        patch.setattr(replay, "run", broken)
        with pytest.raises(gockpt.WorkerError, match="ZeroDivisionError: in the kernel") as caught:
            loop.run(2 * EVERY)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        with pytest.raises(gockpt.WorkerError, match="in the kernel"):
            loop.handles[0].result(30)
    # The due tick may have found the failure already, and then saved its state anew.
    for step in gockpt.steps(loop.path):
        loop.check(step)
    with harness.closing():
        start = len(loop.handles)
        loop.run(2 * EVERY)
        saved = [h.result(30) for h in loop.handles[start:]]
    assert saved
    for result in saved:
        loop.check(result.step)


class Torn:
    """A copy that brings wrong bytes the first ``times`` times, as if something wrote meanwhile."""

    def __init__(self, monkeypatch, times):
        self.real, self.left, self.lock = host_stager.copy_fingerprints, times, threading.Lock()
        monkeypatch.setattr(host_stager, "copy_fingerprints", self)

    def __call__(self, sources, targets, nbytes, positions):
        found = self.real(sources, targets, nbytes, positions)
        for row in range(found.size):
            with self.lock:
                self.left -= 1
                tear = self.left >= 0
            if tear:
                half = (ctypes.c_ubyte * (int(nbytes[row]) // 2)).from_address(int(targets[row]))
                np.ctypeslib.as_array(half)[:] ^= 255
                found[row] = host_stager.fingerprints(targets, nbytes, positions)[row]
        return found


@pytest.mark.parametrize("times", [1, 3, 1000])
def test_torn_copies_inside_a_window_are_copied_again(harness, loop, monkeypatch, times):
    """What stands still at the next look is copied then; what never arrives leaves at the close."""
    with harness.closing():
        with monkeypatch.context() as patch:
            torn = Torn(patch, times)
            loop.run(EVERY - 1)
            assert torn.left < times
        saved = loop.run(EVERY).finish()
    assert [(s.step, s.attempts) for s in saved] == [(6, 1), (11, 1)]
    assert bool(saved[0].late_parts) == (times == 1000)


@pytest.mark.parametrize("times", [1, 2, 10_000])
def test_torn_copies_behind_the_closing_tick(harness, monkeypatch, times):
    """Large enough to be copied behind the step; a copy that never arrives is made inside the tick."""

    def build():
        model = harness.Tensors({"a": torch.randn(300_000)})
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    with harness.closing():
        loop = harness.Loop(build, update)
        with monkeypatch.context() as patch:
            torn = Torn(patch, times)
            loop.tick()
            assert gockpt.steps(loop.path) == []
            loop.tick()
            loop.tick(save=False)
            assert torn.left < times
            saved = loop.handles[0].result(30)
        assert saved.step == (1 if times < 1000 else 2)
        assert saved.attempts == (1 if times < 1000 else 2)
        loop.finish()
