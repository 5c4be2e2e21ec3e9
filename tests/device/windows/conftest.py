"""A loop with a deep copy of every tick, for windows off the fake device."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import threading
from time import sleep
from types import SimpleNamespace

import pytest
import torch

import gockpt
from gockpt import registry
from gockpt.kernels import replay as kernels
from gockpt.saving import device_selection
from gockpt.saving.engine import Engine
from gockpt.staging.device_stager import DeviceStager

FEW = 1 << 16
EVERY = 6

IMPLEMENTATIONS = {
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, foreach=False),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, amsgrad=True, fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, foreach=True),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "overwriting": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
}


class Model(torch.nn.Module):
    """Two large parameters, odd ones between them, a buffer, and one that no kernel replays."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(9_000))
        self.b = torch.nn.Parameter(torch.randn(71, 83))
        self.small = torch.nn.Parameter(torch.randn(5))
        self.odd = torch.nn.Parameter(torch.randn(2_000).to(torch.bfloat16))
        self.frozen = torch.nn.Parameter(torch.randn(3_000), requires_grad=False)
        self.register_buffer("seen", torch.zeros(7))


def build(kind="adamw"):
    model = Model()
    return model, [IMPLEMENTATIONS[kind]([p for p in model.parameters() if p.requires_grad])]


class Run:
    """A loop whose every tick is kept as a deep copy; road and ring are ready when it is made."""

    def __init__(self, kind="adamw", *, make=None, update=None, every=EVERY, ready=True, **options):
        torch.manual_seed(0)
        self.model, self.optimizers = (make or functools.partial(build, kind))()
        options = {"window": 4, "device_memory": FEW, "cpu_threads": 1, "nice": 0, **options}
        self.options = gockpt.Options(**{"when_busy": "wait", **options})
        self.saver = gockpt.Checkpointer(
            self.model, self.optimizers, "ckpts", every=every, options=self.options
        )
        self.every = every
        self.step = 0
        self.moments = {}
        self.handles = []
        if update is not None:
            self.update = functools.partial(update, self)
        if ready:
            for _ in range(every):
                self.tick()
                self.get_ready()
            self.handles[0].result(60)

    def get_ready(self):
        """Wait until what is made behind training has been made."""
        assert self.saver._engine._tasks.submit([lambda: None]).done.wait(60)

    def let_arrive(self):
        """Wait until nothing is on its way."""
        transfer = self.saver._engine._stagers._stager
        while not transfer.idle:
            sleep(0.001)

    def gradients(self):
        for p in self.model.parameters():
            if p.requires_grad:
                p.grad = torch.randn_like(p)

    def restore(self, moment):
        """Put every tensor back to what it was."""
        for name, now in self.tensors().items():
            now.copy_(moment[name])

    def update(self):
        self.gradients()
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.seen += 1

    def tick(self):
        self.update()
        return self.save()

    def save(self):
        self.step += 1
        self.moments[self.step] = self.copied()
        handle = self.saver.after_step(self.step)
        if handle is not None and handle not in self.handles:
            self.handles.append(handle)
        return handle

    def ticks(self, count):
        for _ in range(count):
            self.tick()
        return self

    def copied(self):
        return {name: tensor.clone() for name, tensor in self.tensors().items()}

    def tensors(self):
        found = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        names = {id(p): name for name, p in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for p, state in optimizer.state.items():
                found |= {
                    f"optimizer/{names[id(p)]}/{k}": v
                    for k, v in state.items()
                    if isinstance(v, torch.Tensor)
                }
        return found

    def finish(self):
        """Close, compare every checkpoint with the moment of its step, and return what was saved."""
        self.saver.close()
        for step in gockpt.steps("ckpts"):
            assert gockpt.verify("ckpts", step).ok
            with gockpt.open("ckpts", step) as saved:
                assert set(self.moments[step]) <= set(saved)
                for name, expected in self.moments[step].items():
                    found = saved[name][...]
                    assert found.dtype == expected.dtype
                    assert torch.equal(bits(found), bits(expected)), f"step {step}: {name}"
        return [handle.result(60) for handle in self.handles]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.fixture
def replayed(monkeypatch):
    """Count the elements that saves replay, not those of calibration."""
    real, lock = kernels.run, threading.Lock()
    count = {"updates": 0}

    def run(kernel, flags, p, states, grads, scalars, *, tail):
        if threading.current_thread().name.startswith("gockpt-worker"):
            with lock:
                count["updates"] += len(grads) * p.size
        real(kernel, flags, p, states, grads, scalars, tail=tail)

    monkeypatch.setattr(kernels, "run", run)
    return count


@pytest.fixture(autouse=True)
def waits(devices, monkeypatch):
    """Note each wait for the device that a hook makes: there must be none."""
    inside, waited = [], []

    def hook(name):
        real = getattr(Engine, name)

        def inner(self, *args, **kwargs):
            inside.append(threading.current_thread())
            try:
                return real(self, *args, **kwargs)
            finally:
                inside.pop()

        monkeypatch.setattr(Engine, name, inner)

    for name in ("before_hooks", "before_update", "after_update"):
        hook(name)

    def called(device, name):
        if name == "synchronize" and threading.current_thread() in inside:
            waited.append(name)

    devices.watchers.append(called)
    yield waited
    assert waited == []


@pytest.fixture(params=["staging", "direct"])
def variant(request, monkeypatch):
    if request.param == "direct":
        monkeypatch.setattr(device_selection, "DeviceStager", functools.partial(DeviceStager, direct=True))
    return request.param


@pytest.fixture
def runs(devices):
    """Return the loop's class, and a place of its own for each example of a property."""

    @contextlib.contextmanager
    def elsewhere():
        before = os.getcwd()
        with tempfile.TemporaryDirectory(dir=before) as path:
            os.chdir(path)
            try:
                yield
            finally:
                os.chdir(before)
                for saver in list(registry.opened):
                    with contextlib.suppress(gockpt.GockptError):
                        saver.close()
                devices.check()

    return SimpleNamespace(Run=Run, elsewhere=elsewhere)
