"""Saving leaves training alone: the run that saves and the run that does not end with the same bits."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import gockpt

KINDS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}


def train(make, *, save=None, steps=12):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(20, 60), nn.Dropout(0.3), nn.BatchNorm1d(60), nn.Linear(60, 10))
    model.append(nn.Linear(10, 10))
    optimizer = make([p for i, p in enumerate(model.parameters()) if i != 2])
    losses = []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = model[:4](torch.randn(8, 20)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if save is not None:
            save(model, optimizer, step)
    return model, optimizer, losses


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_the_same_losses_states_and_random_numbers(harness, make, window):
    plain = train(make)
    after_plain = torch.random.get_rng_state()
    path, options = harness.directory(), gockpt.Options(window=window, when_busy="wait", nice=0)

    def save(model, optimizer, step):
        gockpt.save_overlapped(model, optimizer, path, step=step, every=4, options=options)

    with harness.closing():
        saving = train(make, save=save)
    assert saving[2] == plain[2]
    harness.same(torch.random.get_rng_state(), after_plain)
    harness.same(harness.take(0, *saving[:2]).model, harness.take(0, *plain[:2]).model, "model")
    harness.same(saving[1].state_dict(), plain[1].state_dict(), "optimizer")
    assert len(saving[1].state) == len(plain[1].state)
    assert gockpt.steps(path) == [4, 8, 12]


def test_hooks_and_threads_are_gone_after_close(harness):
    before = {t.name for t in threading.enumerate()}
    model = harness.Tensors({"a": torch.randn(1000)})
    optimizer = torch.optim.AdamW(model.parameters())
    hooks = len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)
    with gockpt.Checkpointer(model, optimizer, harness.directory(), every=3) as saver:
        for step in range(1, 7):
            model.a.grad = torch.randn(1000)
            optimizer.step()
            saver.after_step(step)
    assert (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)) == hooks
    assert {t.name for t in threading.enumerate()} <= before
    assert saver.closed
    assert not saver.busy


@pytest.mark.parametrize("window", [1, 3])
def test_a_model_that_is_dropped_is_freed(harness, window):
    """No model is kept alive once its last save is written; its optimizer until the next call."""
    model = harness.Tensors({"a": torch.randn(1000)})
    optimizer = torch.optim.AdamW(model.parameters())
    path, options = harness.directory(), gockpt.Options(window=window)
    for step in range(1, 4):
        model.a.grad = torch.randn(1000)
        optimizer.step()
        handle = gockpt.save_overlapped(model, optimizer, path, step=step, every=3, options=options)
    handle.result(30)
    model_gone, parameter_gone = weakref.ref(model), weakref.ref(model.a)
    del model, optimizer
    gc.collect()
    assert model_gone() is None
    gockpt.wait()
    del handle
    gc.collect()
    assert parameter_gone() is None


def test_gradients_are_never_written(harness):
    model = harness.Tensors({"a": torch.randn(1000), "b": torch.randn(900)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    options = gockpt.Options(window=4)
    path = harness.directory()
    with harness.closing():
        for step in range(1, 10):
            gradients = [torch.randn_like(p) for p in model.parameters()]
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.grad = g.clone()
            optimizer.step()
            gockpt.save_overlapped(model, optimizer, path, step=step, every=4, options=options)
            for p, g in zip(model.parameters(), gradients, strict=True):
                harness.same(p.grad, g, f"step {step}")
