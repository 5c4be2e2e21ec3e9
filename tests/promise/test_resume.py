"""Resuming equals never having stopped, bit for bit: extras, schedulers, loaders, random numbers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

import gockpt

STEPS, EVERY = 16, 4


class Loader:
    """A shuffling loader that can stop in the middle of an epoch and go on elsewhere."""

    def __init__(self, size=12):
        self.size, self.epoch, self.position = size, 0, 0
        self.generator = torch.Generator().manual_seed(11)
        self.order = torch.randperm(size, generator=self.generator)

    def next(self):
        if self.position + 4 > self.size:
            self.epoch, self.position = self.epoch + 1, 0
            self.order = torch.randperm(self.size, generator=self.generator)
        self.position += 4
        return self.order[self.position - 4 : self.position]

    def state_dict(self):
        return {
            "epoch": self.epoch,
            "position": self.position,
            "order": self.order,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state):
        self.epoch, self.position, self.order = state["epoch"], state["position"], state["order"]
        self.generator.set_state(state["generator"])


SCHEDULERS = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=STEPS + 1),
    "warmup": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        ],
        [5],
    ),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.02),
}


class Run:
    """A run with all that runs hold: a model with dropout, loader, scheduler, scaler, random numbers."""

    def __init__(self, optimizer, scheduler, seed):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.Dropout(0.2), nn.Linear(40, 2))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        self.loader = Loader()
        self.seen = 0
        self.best = float("inf")

    def extra(self):
        return {
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "loader": self.loader,
            "seen": lambda: self.seen,
            "best": self.best,
            "notes": {"tokens": [1, 2.5, None, "text", True], "tensor": torch.arange(3)},
        }

    def take_back(self, restored):
        self.seen = restored.extra["seen"]
        self.best = restored.extra["best"]

    def step(self):
        data = torch.arange(72.0).reshape(12, 6)[self.loader.next()]
        data = data * np.random.uniform(0.9, 1.1) + random.gauss(0, 1)
        self.optimizer.zero_grad()
        loss = self.model(data / 72 + torch.randn(6)).square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(loss.item())
        else:
            self.scheduler.step()
        self.seen += 4
        self.best = min(self.best, loss.item())
        return loss.item()

    def train(self, first, path, options):
        losses = []
        for step in range(first, STEPS + 1):
            losses.append((self.step(), self.optimizer.param_groups[0]["lr"], self.best, self.seen))
            gockpt.save_overlapped(
                self.model, self.optimizer, path,
                step=step, every=EVERY, extra=self.extra(), options=options,
            )  # fmt: skip
        return losses


PAIRS = [(optimizer, scheduler) for optimizer in OPTIMIZERS for scheduler in SCHEDULERS]


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "window"),
    [(*pair, (1, 3, 4)[index % 3]) for index, pair in enumerate(PAIRS)],  # with each window in turn
)
def test_a_resumed_run_goes_on_with_the_same_losses(harness, optimizer, scheduler, window):
    path = harness.directory()
    options = gockpt.Options(window=window, when_busy="wait", nice=0)
    with harness.closing():
        losses = Run(optimizer, scheduler, seed=1).train(1, path, options)
    assert gockpt.steps(path) == [4, 8, 12, 16]
    for start in (8, 12, 4):
        resumed = Run(optimizer, scheduler, seed=start)
        extra = {k: v for k, v in resumed.extra().items() if hasattr(v, "load_state_dict")}
        restored = gockpt.load(path, resumed.model, resumed.optimizer, step=start, extra=extra)
        resumed.take_back(restored)
        assert restored.step == start
        assert restored.extra["notes"]["tokens"] == [1, 2.5, None, "text", True]
        with harness.closing():
            assert resumed.train(start + 1, path, options) == losses[start:]
    # The newest is the one published last, by the run that went back furthest.
    assert gockpt.latest(path) == 16


def test_resuming_counts_on_from_the_loaded_step(harness):
    """Without step=, calls are counted, from the loaded step on."""

    def build():
        model = harness.Tensors({"a": torch.randn(400)})
        return model, torch.optim.AdamW(model.parameters())

    def go(model, optimizer, path, calls):
        with harness.closing():
            for _ in range(calls):
                model.a.grad = torch.randn(400)
                optimizer.step()
                gockpt.save_overlapped(model, optimizer, path, every=5)

    path = harness.directory()
    go(*build(), path, 6)
    model, optimizer = build()
    assert gockpt.load(path, model, optimizer).step == 5
    go(model, optimizer, path, 5)
    assert gockpt.steps(path) == [5, 10]


def test_extras_and_random_numbers_are_those_of_the_closing_tick(harness):
    """Not of the window's start, not of the moment at which the background writes them."""
    path = harness.directory()
    model = harness.Tensors({"a": torch.randn(2000)})
    optimizer = torch.optim.AdamW(model.parameters())
    counter = {"now": 0}
    options = gockpt.Options(window=4)
    moments = {}
    with harness.closing():
        for step in range(1, 9):
            counter["now"] = step
            model.a.grad = torch.randn(2000)
            optimizer.step()
            random.random()
            np.random.rand()
            extra = {"live": counter, "called": lambda: counter["now"] * 10}
            moments[step] = harness.take(step, model, optimizer, extra)
            handle = gockpt.save_overlapped(
                model, optimizer, path, step=step, every=4, extra=extra, options=options
            )
            counter["now"] = -1
            torch.rand(3)
            if step % 4 == 0:
                handle.result(30)
    for step in (4, 8):
        fresh = harness.Tensors({"a": torch.zeros(2000)})
        restored = harness.check_load(path, moments[step], fresh, torch.optim.AdamW(fresh.parameters()))
        assert restored.extra == {"live": {"now": step}, "called": step * 10}


@pytest.mark.parametrize("window", [1, 4])
def test_wait_inside_a_window_publishes_the_last_tick_as_it_was(harness, window):
    """Random numbers drawn and extras moved on after the last tick do not slip in."""
    path = harness.directory()
    model = harness.Tensors({"a": torch.randn(2000), "b": torch.randn(300)})
    optimizer = torch.optim.AdamW(model.parameters())
    loader = Loader()
    options = gockpt.Options(window=window, when_busy="wait")
    for step in range(1, 7):
        loader.next()
        model.a.grad = torch.randn(2000)
        optimizer.step()
        moment = harness.take(step, model, optimizer, {"loader": loader})
        handle = gockpt.save_overlapped(
            model, optimizer, path,
            step=step, every=8 if window > 1 else 1, extra={"loader": loader}, options=options,
        )  # fmt: skip
    torch.rand(5)
    random.random()
    loader.next()
    gockpt.wait()
    assert handle.result(30).step == 6
    fresh = harness.Tensors({"a": torch.zeros(2000), "b": torch.zeros(300)})
    harness.check_load(path, moment, fresh, torch.optim.AdamW(fresh.parameters()))


def test_a_generator_of_the_users_own(harness):
    path = harness.directory()
    model = harness.Tensors({"a": torch.randn(100)})
    generator = np.random.default_rng(5)
    with harness.closing():
        generator.random(3)
        gockpt.save_overlapped(
            model, None, path, step=1, extra={"rng": lambda: generator.bit_generator.state}
        )
        expected = generator.random(4).tolist()
    other = np.random.default_rng(9)
    restored = gockpt.load(path, model)
    other.bit_generator.state = restored.extra["rng"]
    assert other.random(4).tolist() == expected
