"""The equality harness: synchronous deep copies of every tick, and what was published compared with them.

A *moment* is a deep copy of everything at one tick, taken by torch's own ``state_dict()``. What gockpt
published for that step is then read in two ways, by name through ``gockpt.open`` and by ``gockpt.load`` into
fresh objects, and every bit is compared: NaN payloads, signs of zeros, dtypes, shapes, options.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import random
import shutil
import struct
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import gockpt
from gockpt import registry
from gockpt.kernels import replay
from gockpt.state import rng_state

_spec = importlib.util.spec_from_file_location(
    "fake_device", Path(__file__).parents[1] / "device" / "fake_device.py"
)
_fake_device = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fake_device)
fakes, devices = _fake_device.fakes, _fake_device.devices

MEMORY = Path("/dev/shm")
"""Where checkpoints of most tests go, if it is there: thousands of synchronised files tire a disk."""


def directory() -> str:
    """Return a new directory for checkpoints, in memory where there is room."""
    roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 1 << 30
    made = tempfile.mkdtemp(prefix="gockpt-test-", dir=MEMORY if roomy else ".")
    _directories.append(made)
    return made


_directories: list[str] = []


def bits(tensor: torch.Tensor) -> bytes:
    """Return the elements' raw bytes, row-major."""
    plain = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: Any, b: Any, where: str = "") -> None:
    """Fail, saying where, unless two nested values are equal in type and in every bit."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        assert isinstance(a, torch.Tensor), f"{where}: {type(a)} and {type(b)}"
        assert isinstance(b, torch.Tensor), f"{where}: {type(a)} and {type(b)}"
        assert (a.dtype, tuple(a.shape)) == (b.dtype, tuple(b.shape)), where
        if bits(a) != bits(b):
            wrong = (a != b).sum().item() if a.numel() else 0
            pytest.fail(f"{where}: {wrong} of {a.numel()} elements differ")
    elif isinstance(a, dict) and isinstance(b, dict):
        assert list(a) == list(b) or set(a) == set(b), f"{where}: keys {list(a)} and {list(b)}"
        for key in a:
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert type(a) is type(b), f"{where}: {type(a)} and {type(b)}"
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{index}]")
    elif isinstance(a, float) and isinstance(b, float):
        assert struct.pack("<d", a) == struct.pack("<d", b), f"{where}: {a!r} and {b!r}"
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype, where
        assert a.tobytes() == b.tobytes(), where
    else:
        assert type(a) is type(b), f"{where}: {a!r} and {b!r}"
        assert a == b, f"{where}: {a!r} and {b!r}"


def parts_of(model: Any) -> list[tuple[str, Any]]:
    """Return (name prefix, module or mapping) of what may be saved as one model."""
    if isinstance(model, (list, tuple)):
        return [(f"{index}.", part) for index, part in enumerate(model)]
    return [("", model)]


def listed(value: Any) -> list[Any]:
    """Return ``None`` as nothing, one thing as a list of it."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def plain_extra(value: Any) -> Any:
    """Return what an extra stands for."""
    if hasattr(value, "state_dict"):
        return value.state_dict()
    return value() if callable(value) else value


@dataclass
class Moment:
    """A synchronous deep copy of one tick."""

    step: int
    model: list[dict[str, Any]]
    optimizers: list[dict[str, Any]]
    arrays: dict[str, torch.Tensor]
    extra: dict[str, Any]
    random: dict[str, Any] = field(repr=False)


def take(step: int, model: Any, optimizer: Any = None, extra: dict[str, Any] | None = None) -> Moment:
    """Copy everything now: the plain, blocking way to checkpoint."""
    arrays: dict[str, torch.Tensor] = {}
    owner: dict[int, str] = {}
    states = []
    for prefix, part in parts_of(model):
        state = part.state_dict() if isinstance(part, torch.nn.Module) else part
        states.append(
            {
                k: copy.deepcopy(v.detach()) if isinstance(v, torch.Tensor) else copy.deepcopy(v)
                for k, v in state.items()
            }
        )
        arrays |= {
            f"model/{prefix}{k}": v.detach().clone() for k, v in state.items() if isinstance(v, torch.Tensor)
        }
        named = part.named_parameters() if isinstance(part, torch.nn.Module) else part.items()
        for name, parameter in named:
            owner.setdefault(id(parameter), prefix + name)
    for one in listed(optimizer):
        for group in one.param_groups:
            for parameter in group["params"]:
                for key, value in one.state.get(parameter, {}).items():
                    if isinstance(value, torch.Tensor) and id(parameter) in owner:
                        arrays[f"optimizer/{owner[id(parameter)]}/{key}"] = value.detach().clone()
    return Moment(
        step=step,
        model=states,
        optimizers=[copy.deepcopy(one.state_dict()) for one in listed(optimizer)],
        arrays=arrays,
        extra={name: copy.deepcopy(plain_extra(value)) for name, value in (extra or {}).items()},
        random=copy.deepcopy(rng_state.capture()),
    )


def check_open(path: Any, moment: Moment) -> None:
    """Every tensor by name, and nothing else under these names; every file verifies."""
    report = gockpt.verify(path, moment.step)
    assert report.ok, report.problems
    with gockpt.open(path, moment.step) as found:
        assert found.metadata.step == moment.step
        assert found.metadata.exact
        names = {name for name in found if name.startswith(("model/", "optimizer/"))}
        assert names == set(moment.arrays)
        for name, expected in moment.arrays.items():
            assert tuple(found[name].shape) == tuple(expected.shape)
            same(found[name][...], expected, f"step {moment.step}: {name}")


def check_load(path: Any, moment: Moment, model: Any, optimizer: Any = None, extra: Any = None) -> Any:
    """Load into objects that hold something else; they must be the moment then, random numbers too."""
    random.seed(0)
    torch.manual_seed(0)
    np.random.seed(0)
    restored = gockpt.load(path, model, optimizer, step=moment.step, extra=extra, rng=True)
    same(copy.deepcopy(rng_state.capture()), moment.random, "random states")
    assert restored.step == moment.step
    assert not restored.missing
    assert not restored.unexpected
    now = take(moment.step, model, optimizer)
    same(now.model, moment.model, "model")
    same(now.optimizers, moment.optimizers, "optimizer")
    same(dict(restored.extra), moment.extra, "extra")
    return restored


@contextlib.contextmanager
def closing():
    """Close every checkpointer that is made inside, also after a failure."""
    try:
        yield
        gockpt.wait()
    finally:
        close_all()


def close_all():
    """Close every checkpointer there is, whatever state it is in."""
    for saver in list(registry.opened):
        with contextlib.suppress(gockpt.GockptError):
            saver.abort("the test ended")
        with contextlib.suppress(gockpt.GockptError):
            saver.close()


@contextlib.contextmanager
def counting():
    """Count what saves replay (not what calibration tries): ``updates`` is elements times updates."""
    real, lock = replay.run, threading.Lock()
    count = {"updates": 0, "kernels": set()}

    def run(kernel, flags, p, states, grads, scalars, *, tail):
        if threading.current_thread().name.startswith("gockpt-worker"):
            with lock:
                count["updates"] += len(grads) * p.size
                count["kernels"].add(kernel)
        real(kernel, flags, p, states, grads, scalars, tail=tail)

    replay.run = run
    try:
        yield count
    finally:
        replay.run = real


class Tensors(torch.nn.Module):
    """A model of bare parameters, for loops whose gradients are made by hand."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor))


class Loop:
    """A training loop that keeps a moment of every tick and compares what was published.

    A window always finds the last save written (``when_busy="wait"``), so that each has its full length.

    Attributes:
        setup: Ticks by which the first window is shorter, since what it needs is made behind training then.

    Args:
        build: Returns (model, optimizer) anew, with other values each time but of the same form.
        update: Called with (model, optimizer, tick): everything up to and including the update.
    """

    setup = 0

    def __init__(self, build, update, *, every=1, extra=None, stride=1, start=0, **options):
        self.build = build
        self.update = update
        self.every = every
        self.extra = extra
        self.stride = stride
        self.step = start
        self.options = gockpt.Options(**{"when_busy": "wait", "cpu_threads": 2, "nice": 0, **options})
        self.path = directory()
        self.model, self.optimizer = build()
        self.moments: dict[int, Moment] = {}
        self.handles: list[Any] = []

    def tick(self, *, save=True):
        """One iteration."""
        self.step += self.stride
        self.update(self.model, self.optimizer, self.step)
        self.boundary(save=save)

    def boundary(self, *, save=True):
        """Keep a moment and tell gockpt, without an update."""
        self.moments[self.step] = take(self.step, self.model, self.optimizer, self.extra)
        if not save:
            return None
        handle = gockpt.save_overlapped(
            self.model, self.optimizer, self.path,
            step=self.step, every=self.every, extra=self.extra, options=self.options,
        )  # fmt: skip
        if handle is not None and handle not in self.handles:
            self.handles.append(handle)
        return handle

    def run(self, ticks):
        for _ in range(ticks):
            self.tick()
        return self

    def finish(self, *, load=True):
        """Wait for everything and compare every checkpoint with the moment of its step."""
        gockpt.wait()
        saved = [handle.result(60) for handle in self.handles]
        for result in saved:
            self.check(result.step, load=load)
        shutil.rmtree(self.path)
        return saved

    def check(self, step, *, load=True):
        moment = self.moments[step]
        check_open(self.path, moment)
        if load:
            check_load(self.path, moment, *self.build())


class DeviceLoop(Loop):
    """A loop in which each tick finds ready what the one before has let be made behind training."""

    setup = 1

    def boundary(self, *, save=True):
        handle = super().boundary(save=save)
        for saver in registry.open_here():
            assert saver._engine._tasks.submit([lambda: None]).done.wait(60)
        return handle


@pytest.fixture(scope="session")
def harness():
    """Return everything above by name."""
    yield SimpleNamespace(
        Loop=Loop, Moment=Moment, Tensors=Tensors, bits=bits, check_load=check_load, check_open=check_open,
        close_all=close_all, closing=closing, counting=counting, directory=directory, same=same, take=take,
    )  # fmt: skip
    for left in _directories:
        shutil.rmtree(left, ignore_errors=True)


@pytest.fixture(params=["thread", "process"])
def worker(request):
    return request.param


@pytest.fixture(params=["host", "device"])
def loops(request, harness):
    """Return how a :class:`Loop` is made whose state is in host memory, or on the fake device."""
    if request.param == "host":
        return harness.Loop
    request.getfixturevalue("devices")
    return functools.partial(DeviceLoop, device_memory=1 << 16)


@pytest.fixture(autouse=True)
def _close_everything():
    """Leave no window open, no thread and no directory behind for the next test."""
    before = len(_directories)
    yield
    close_all()
    while len(_directories) > before:
        shutil.rmtree(_directories.pop(), ignore_errors=True)


@pytest.fixture
def run(harness):
    """A run with one checkpoint, of step 4, already written."""

    class Run:
        def __init__(self):
            self.path = harness.directory()
            self.model, self.optimizer = self.build()
            self.step = 0
            self.go(4)
            gockpt.wait()
            assert gockpt.steps(self.path) == [4]

        @staticmethod
        def build():
            model = harness.Tensors({"a": torch.randn(1500), "b": torch.randn(40, 41)})
            return model, torch.optim.AdamW(model.parameters(), lr=0.05)

        def update(self):
            for p in self.model.parameters():
                p.grad = torch.randn_like(p)
            self.optimizer.step()
            self.step += 1

        def save(self, **more):
            arguments = {"step": self.step, "every": 4, "options": gockpt.Options(window=3, nice=0), **more}
            return gockpt.save_overlapped(self.model, self.optimizer, self.path, **arguments)

        def go(self, ticks, **more):
            handle = None
            for _ in range(ticks):
                self.update()
                self.moment = harness.take(self.step, self.model, self.optimizer, more.get("extra"))
                handle = self.save(**more)
            return handle

        def check_nothing_lost(self):
            """What was there is there and sound, and the next saves work and are exact."""
            assert gockpt.verify(self.path, 4).ok
            gockpt.load(self.path, *self.build(), step=4)
            with harness.closing():
                self.step += -self.step % 4
                handle = self.go(4, options=gockpt.Options(window=3, nice=0, when_busy="wait"))
                assert handle.result(30).step == self.step
            harness.check_open(self.path, self.moment)
            harness.check_load(self.path, self.moment, *self.build())

    return Run()
