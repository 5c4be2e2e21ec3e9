"""``Options.host_memory`` bounds what saves really take: each allocation is metered as it happens."""

from __future__ import annotations

import gc
import mmap
import re
import threading
import weakref

import numpy as np
import pytest
import torch

import gockpt
from gockpt.staging.arena import Arena
from gockpt.state import value_encoder
from gockpt.storage.local.compression import Compression
from gockpt.storage.local.filesystem import Filesystem
from gockpt.workers import executor


class Meter:
    """Bytes that are taken at the moment, and the most there were; let go of as objects die."""

    def __init__(self):
        self.now = self.peak = 0
        self._lock = threading.RLock()  # finalizers run anywhere
        self._seen = weakref.WeakSet()

    def add(self, nbytes):
        with self._lock:
            self.now += nbytes
            self.peak = max(self.peak, self.now)

    def follow(self, thing, nbytes):
        with self._lock:
            if thing in self._seen:
                return
            self._seen.add(thing)
        self.add(nbytes)
        weakref.finalize(thing, self.add, -nbytes)


@pytest.fixture
def meter(monkeypatch):
    """Meter arenas, copies of extras, encoding, and pieces that unaligned memory is written from."""
    meter = Meter()

    class Metered(Arena):
        def __init__(self, nbytes):
            super().__init__(nbytes)
            meter.follow(self, self.nbytes)

    copied, hold, pwrite = value_encoder._Encoder.array, Compression._hold, Filesystem.pwrite

    def copy(self, tensor):
        meter.follow(tensor, tensor.nbytes)
        return copied(self, tensor)

    def held(self, nbytes):
        hold(self, nbytes)
        meter.add(nbytes)

    def write(self, fd, data, offset):
        if isinstance(data, memoryview) and isinstance(data.obj, mmap.mmap) and len(data.obj) > mmap.PAGESIZE:
            meter.follow(data.obj, len(data.obj))
        return pwrite(self, fd, data, offset)

    monkeypatch.setattr(executor, "Arena", Metered)
    monkeypatch.setattr(value_encoder._Encoder, "array", copy)
    monkeypatch.setattr(Compression, "_hold", held)
    monkeypatch.setattr(Filesystem, "pwrite", write)
    return meter


class Run:
    """A run whose extras grow with each step: the last save takes the most."""

    def __init__(self, harness, size=300, extra=50_000):
        self.harness = harness
        self.model = harness.Tensors({"a": torch.randn(size, size), "b": torch.randn(size, 2)})
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.extra = extra

    def save(self, steps=3, *, every=1, **options):
        """Save every step into a new directory, and check what was published."""
        path = self.harness.directory()
        chosen = gockpt.Options(**{"nice": 0, "cpu_threads": 2, "when_busy": "wait", **options})
        with gockpt.Checkpointer(self.model, self.optimizer, path, every=every, options=chosen) as saver:
            for step in range(1, steps + 1):
                for parameter in self.model.parameters():
                    parameter.grad = torch.randn_like(parameter)
                self.optimizer.step()
                extra = {
                    "table": torch.randn(step * self.extra),
                    "array": np.arange(step * self.extra, dtype=np.int64),
                    "numbers": list(range(step * self.extra // 8)),
                    "bytes": bytes(step * self.extra),
                }
                handle = saver.after_step(step, extra)
                if every == 1:
                    handle.result(60)
        with gockpt.open(path) as found:
            assert torch.equal(found["extra/table"][...], extra["table"])
            assert found.metadata.step == steps
        assert gockpt.verify(path).ok
        return saver.handle.result(60)


KINDS = [
    {},
    {"compression": "zstd"},
    {"compression": "blosc", "cpu_threads": 1},
    {"compression": "auto"},
    {"window": 3, "every": 3},
    {"window": 3, "every": 3, "compression": "zstd"},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_taken_never_passes_the_bound_and_what_cant_fit_is_refused(harness, meter, kind):
    torch.manual_seed(0)
    run = Run(harness)
    taken, refusal = attempt(run, meter, **kind)
    assert refusal is None
    _, refusal = attempt(run, meter, host_memory=taken - 1, **kind)
    assert "raise host_memory" in refusal
    # The bound that a refusal asks for is enough for what was refused; what follows may take more.
    limit = taken
    for _ in range(12):
        most, refusal = attempt(run, meter, host_memory=limit, **kind)
        assert most <= limit
        if refusal is None:
            break
        limit = int(re.search(r"takes (\d+) bytes", refusal)[1])
    else:
        pytest.fail(f"refused with {limit} bytes, where {taken} were taken")
    if "compression" not in kind:
        assert limit == taken


def attempt(run, meter, **options):
    """Return the most memory that saves took at a time, and why one was refused."""
    gc.collect()
    before = meter.peak = meter.now  # errors in captured log records keep arenas alive
    refusal = None
    try:
        run.save(**options)
    except gockpt.OptionsError as error:
        refusal = str(error)
    return meter.peak - before, refusal


def test_a_refusal_keeps_no_copies_and_the_next_save_may_fit(harness, meter):
    run = Run(harness)
    path = harness.directory()
    options = gockpt.Options(nice=0, host_memory=2 << 20)
    with gockpt.Checkpointer(run.model, run.optimizer, path, options=options) as saver:
        saver.after_step(1, {"table": torch.randn(50_000)}).result(60)
        kept = meter.now
        with pytest.raises(gockpt.OptionsError, match=r"save less along with it") as refused:
            saver.after_step(2, {"a": torch.randn(100_000), "b": torch.randn(200_000)})
        assert saver.handle.exception() is not None
        assert meter.now <= kept
        assert "host_memory=2097152" in str(refused.value)
        saver.after_step(3, {"table": torch.randn(60_000)}).result(60)
    assert gockpt.steps(path) == [1, 3]


def test_what_an_earlier_save_took_makes_room(harness):
    """The arena of large extras is in the way of a state that has grown."""
    state = {"w": torch.zeros(100_000)}
    path = harness.directory()
    options = gockpt.Options(nice=0, host_memory=1_300_000)
    with gockpt.Checkpointer(state, None, path, options=options) as saver:
        saver.after_step(1, {"table": torch.ones(100_000)}).result(60)
        state["v"] = torch.zeros(150_000)
        saver.after_step(2, {"table": None}).result(60)
        assert gockpt.verify(path).ok
        with pytest.raises(gockpt.OptionsError, match="copies of extras"):
            saver.after_step(3, {"table": torch.ones(100_000)})


def test_a_tensor_that_is_not_row_major_is_counted_where_it_is_reordered(harness):
    model = harness.Tensors({"a": torch.randn(400, 300).t()})
    optimizer = torch.optim.SGD(model.parameters())
    nbytes = 400 * 300 * 4
    for room, fits in ((nbytes // 2, False), (nbytes + (1 << 16), True)):
        options = gockpt.Options(nice=0, host_memory=nbytes + room)
        path = harness.directory()
        with gockpt.Checkpointer(model, optimizer, path, options=options) as saver:
            model.a.grad = torch.randn_like(model.a)
            optimizer.step()
            if fits:
                saver.after_step(1).result(60)
                assert torch.equal(gockpt.open(path)["model/a"][...], model.a)
            else:
                with pytest.raises(gockpt.OptionsError, match="host_memory="):
                    saver.after_step(1)
