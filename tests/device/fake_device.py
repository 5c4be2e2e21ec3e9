"""A device that is not there: streams, events and copies on a virtual clock, and an eye on every access.

Each stream is a queue. An operation takes bytes over bandwidth of virtual time. It reads half of its
source when it starts and the other half when it ends, and leaves rubbish in its target in between: whoever
orders two operations wrongly gets wrong bytes. What two unfinished operations must not do to each other is
noted in ``violations`` besides, and so is the use of memory that nobody holds, or that is not registered.

The clock moves only when told to (``advance``), or when somebody waits on the host.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections import deque
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import gockpt
from gockpt import registry
from gockpt import saver as saver_module
from gockpt.kernels.fingerprint_numba import fingerprint
from gockpt.kernels.gradient16_launch import layout_of
from gockpt.kernels.gradient16_numba import narrow, quantise
from gockpt.saving.engine import Engine
from gockpt.staging.stager import Source

RUBBISH = 0xDD


class DeadlockError(Exception):
    """Somebody waits for what can never happen."""


class Refused(RuntimeError):
    """What a driver raises."""


class Event:
    def __init__(self, device):
        self.device = device
        self.complete = False

    def query(self):
        with self.device.lock:
            self.device.called("query")
            self.device.settle()
            return self.complete

    def synchronize(self):
        with self.device.lock:
            self.device.called("synchronize")
            self.device.until(lambda: self.complete)


class Stream:
    def __init__(self, device, name):
        self.device = device
        self.name = name
        self.queue = deque()
        self.running = None
        self.stalled = 0.0
        self.blocked_since = None

    def record(self):
        with self.device.lock:
            self.device.called("record")
            event = Event(self.device)
            self.queue.append(("record", event))
            self.device.settle()
            return event

    def wait(self, event):
        with self.device.lock:
            self.device.called("wait")
            if self.name not in self.device.deaf:
                self.queue.append(("wait", event))
            self.device.settle()


class Tables:
    """What a launch reads beside its sources: whoever launched must keep it."""


class Operation:
    """Bytes from some places to others, or nothing but time."""

    def __init__(
        self,
        device,
        name,
        seconds,
        *,
        pairs=(),
        reads=(),
        writes=(),
        engine=None,
        begin=None,
        end=None,
        tables=None,
    ):
        self.device = device
        self.name = name
        self.seconds = seconds
        self.engine = engine
        self.finish = None
        # Weak references: holding what is read is the caller's business.
        self.pairs = [(weakref.ref(owner), lo, n, target) for owner, lo, n, target in pairs]
        self.reads = [span(owner, lo, n) for owner, lo, n, _ in pairs] + [span(*r) for r in reads]
        self.writes = [(t.ctypes.data, t.ctypes.data + t.nbytes) for *_, t in pairs] + [
            span(*w) for w in writes
        ]
        self.on_begin = begin
        self.on_end = end
        self.tables = None if tables is None else weakref.ref(tables)
        self.halves = []

    def source(self, number):
        owner, lo, n, _ = self.pairs[number]
        array = owner()
        if array is None:
            self.device.violations.append(f"{self.name} reads memory that nobody holds")
            return np.full(n, RUBBISH, np.uint8)
        return array[lo : lo + n]

    def start(self):
        for other in self.device.running():
            if other is not self:
                self.compare(other)
        for number, (_, _, n, target) in enumerate(self.pairs):
            self.halves.append(self.source(number)[: n // 2].copy())
            target[:] = RUBBISH
        if self.on_begin is not None:
            self.on_begin()

    def stop(self):
        if self.tables is not None and self.tables() is None:
            self.device.violations.append(f"{self.name} reads tables that nobody holds")
        for number, (_, _, n, target) in enumerate(self.pairs):
            second = self.source(number)[n // 2 :].copy()
            target[: n // 2] = self.halves[number]
            target[n // 2 :] = second
        if self.on_end is not None:
            self.on_end()

    def compare(self, other):
        clash = overlap(self.writes, other.writes + other.reads) or overlap(self.reads, other.writes)
        if clash:
            self.device.violations.append(f"{self.name} starts while {other.name} is not over")


def encode(encoding, values, target):
    """Write what a device writes, by the host's own kernels."""
    if encoding == "bf16":
        narrow(values, target.view(np.uint16))
    else:
        quantise(values, layout_of(target.size, values.size), target)


def span(array, lo, n):
    return (array.ctypes.data + lo, array.ctypes.data + lo + n)


def overlap(some, others):
    return any(a < d and c < b for a, b in some for c, d in others)


class Prints:
    def __init__(self, device, count):
        self.device = device
        self.found = [None] * count
        self.ready = False

    def values(self):
        if not self.ready:
            self.device.violations.append("fingerprints are read before they are there")
        return list(self.found)


class FakeDevice:
    """See above.

    Attributes:
        fail: Which call of a name raises, counted from 0; ``{"pack": {2}}``.
        deaf: Streams that ignore what they are told to wait for.
        refuse: Whether host memory can't be registered from this many bytes on.
    """

    name = "the fake device"

    def __init__(self, *, memory=1 << 40, inner=1e6, outer=1e4, glance=1e9, fail=None, refuse=None):
        self.lock = threading.RLock()
        self.now = 0.0
        self.inner = inner
        self.outer = outer
        self.glance = glance
        self.fail = fail or {}
        self.refuse = refuse
        self.calls = {}
        self.memory = memory
        self.used = 0
        self.peak = 0
        self.violations = []
        self.graph = False
        self.deaf = set()
        self.streams = []
        self.training = self.side("training")
        self.busy = {}
        self.registered = []
        self.pinned_memory = []
        self.blocks = {}
        self.copied = []
        self.pieces = []
        self.ranges = []

    # -- the interface

    def main(self):
        return self.training

    def side(self, name=None):
        stream = Stream(self, name or f"side {len(self.streams)}")
        self.streams.append(stream)
        return stream

    def capturing(self):
        return self.graph

    def free_bytes(self):
        return self.memory - self.used

    def allocate(self, nbytes):
        with self.lock:
            self.called("allocate")
            if self.used + nbytes > self.memory:
                msg = f"out of memory: {nbytes} bytes"
                raise Refused(msg)
            self.used += nbytes
            self.peak = max(self.peak, self.used)
            block = np.full(nbytes, RUBBISH, np.uint8)
            self.blocks[id(block)] = block
            return block

    def release(self, memory):
        with self.lock:
            self.called("release")
            del self.blocks[id(memory)]
            self.used -= memory.nbytes
            self.untouched(memory, "released")

    def pack(self, stream, sources, places, target):
        with self.lock:
            self.called("pack")
            pairs = [
                (s.memory, s.low, s.nbytes, target[place : place + s.nbytes])
                for s, place in zip(sources, places, strict=True)
            ]
            total = sum(s.nbytes for s in sources)
            direct = id(target) not in self.blocks
            if direct:
                for *_, view in pairs:
                    self.expect_registered(view)
            tables = Tables()
            seconds = total / (self.outer if direct else self.inner)
            name = f"pack on {stream.name}"
            self.put(
                stream,
                Operation(self, name, seconds, pairs=pairs, engine="bus" if direct else None, tables=tables),
            )
            return tables

    def encode(self, stream, sources, encoding, places, target):
        with self.lock:
            self.called("encode")
            assert id(target) in self.blocks
            seen = [np.empty(s.nbytes, np.uint8) for s in sources]
            views = [target[place : place + nbytes] for place, nbytes in places]
            pairs = [(s.memory, s.low, s.nbytes, t) for s, t in zip(sources, seen, strict=True)]
            tables = Tables()

            def end():
                for values, view in zip(seen, views, strict=True):
                    encode(encoding, values.view(np.float32), view)

            def begin():
                for view in views:
                    view[:] = RUBBISH

            seconds = sum(s.nbytes for s in sources) / self.inner
            name = f"encode on {stream.name}"
            writes = [(target, place, nbytes) for place, nbytes in places]
            operation = Operation(
                self, name, seconds, pairs=pairs, writes=writes, begin=begin, end=end, tables=tables
            )
            self.put(stream, operation)
            return tables

    def copy(self, stream, memory, place, target):
        with self.lock:
            self.called("copy")
            self.copied.append(target.nbytes)
            self.expect_registered(target)
            pairs = [(memory, place, target.nbytes, target)]
            self.put(stream, Operation(self, "copy", target.nbytes / self.outer, pairs=pairs, engine="bus"))

    def prints(self, stream, sources):
        with self.lock:
            self.called("prints")
            found = Prints(self, len(sources))
            targets = [np.empty(s.nbytes, np.uint8) for s in sources]

            def end():
                for number, (source, seen) in enumerate(zip(rows, targets, strict=True)):
                    found.found[number] = fingerprint(seen, source)
                found.ready = True

            rows = [s.position for s in sources]
            pairs = [(s.memory, s.low, s.nbytes, t) for s, t in zip(sources, targets, strict=True)]
            seconds = sum(s.nbytes for s in sources) / self.glance
            self.put(stream, Operation(self, "prints", seconds, pairs=pairs, end=end))
            return found

    def register(self, memory):
        with self.lock:
            self.called("register")
            if (
                self.refuse is not None
                and sum(b - a for a, b in self.registered) + memory.nbytes > self.refuse
            ):
                msg = "no memory may be locked"
                raise Refused(msg)
            self.pieces.append(memory.nbytes)
            self.registered.append(span(memory, 0, memory.nbytes))

    def unregister(self, memory):
        with self.lock:
            self.called("unregister")
            self.registered.remove(span(memory, 0, memory.nbytes))
            self.untouched(memory, "unregistered")

    def pinned(self, nbytes):
        block = np.full(nbytes, RUBBISH, np.uint8)
        self.pinned_memory.append(block)
        return block

    @contextmanager
    def range(self, name):
        self.ranges.append(name)
        yield

    # -- what training does

    def compute(self, seconds):
        """Queue work on the training stream that touches no watched memory."""
        with self.lock:
            self.put(self.training, Operation(self, "compute", seconds))

    def write(self, array, content, seconds=0.0):
        """Queue an operation of the training stream that changes memory."""
        with self.lock:
            whole = [(array, 0, array.nbytes)]

            def end():
                array[:] = content

            self.put(self.training, Operation(self, "training", seconds, writes=whole, end=end))

    # -- the clock

    def put(self, stream, operation):
        stream.queue.append(("run", operation))
        self.settle()

    def running(self):
        return [s.running for s in self.streams if s.running is not None]

    def unfinished(self):
        waiting = [item for s in self.streams for kind, item in s.queue if kind == "run"]
        return self.running() + waiting

    def settle(self):
        """Start all that can start now."""
        moved = True
        while moved:
            moved = False
            for stream in self.streams:
                while stream.queue and stream.running is None:
                    kind, item = stream.queue[0]
                    if kind == "wait" and not item.complete:
                        if stream.blocked_since is None:
                            stream.blocked_since = self.now
                        break
                    if kind == "run" and item.engine is not None and self.busy.get(item.engine) is not None:
                        break
                    stream.queue.popleft()
                    moved = True
                    if kind == "record":
                        item.complete = True
                    elif kind == "wait":
                        if stream.blocked_since is not None:
                            stream.stalled += self.now - stream.blocked_since
                            stream.blocked_since = None
                    else:
                        item.finish = self.now + item.seconds
                        stream.running = item
                        if item.engine is not None:
                            self.busy[item.engine] = item
                        item.start()

    def step(self, limit):
        """Let the next operation end; ``False`` if none does until ``limit``."""
        self.settle()
        running = [s for s in self.streams if s.running is not None]
        if not running or min(s.running.finish for s in running) > limit:
            return False
        stream = min(running, key=lambda s: s.running.finish)
        operation, stream.running = stream.running, None
        self.now = max(self.now, operation.finish)
        if operation.engine is not None:
            self.busy[operation.engine] = None
        operation.stop()
        self.settle()
        return True

    def advance(self, seconds):
        """Let virtual time go by on the host."""
        with self.lock:
            target = self.now + seconds
            while self.step(target):
                pass
            self.now = target
            self.settle()

    def until(self, condition):
        while not condition():
            if not self.step(float("inf")):
                msg = "the host waits for what can never happen"
                raise DeadlockError(msg)

    def drain(self):
        """Let all that is queued run."""
        with self.lock:
            self.until(lambda: not self.unfinished())

    # -- eyes

    def called(self, name):
        number = self.calls[name] = self.calls.get(name, -1) + 1
        if number in self.fail.get(name, ()):
            msg = f"{name} refused"
            raise Refused(msg)

    def expect_registered(self, view):
        a, b = span(view, 0, view.nbytes)
        spans = self.registered + [span(p, 0, p.nbytes) for p in self.pinned_memory]
        if not any(c <= a and b <= d for c, d in spans):
            self.violations.append("a copy leaves what is registered in one piece")

    def untouched(self, memory, what):
        mine = [span(memory, 0, memory.nbytes)]
        for operation in self.unfinished():
            if overlap(mine, operation.reads + operation.writes):
                self.violations.append(f"memory is {what} under {operation.name}")


@pytest.fixture(scope="session")
def fakes():
    """Return the fake device's class, and what it raises."""
    return SimpleNamespace(Device=FakeDevice, Refused=Refused, DeadlockError=DeadlockError)


def bytes_of(tensor):
    """Return a tensor's memory in storage order, as the device sees it."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return flat.view(torch.uint8).numpy()


def as_bytes(sources):
    """Return sources in memory as the fake device sees it."""
    found = []
    for s in sources:
        memory = bytes_of(s.memory) if isinstance(s.memory, torch.Tensor) else s.memory
        found.append(Source(memory, s.low, s.nbytes, s.position))
    return found


@pytest.fixture
def devices(fakes, monkeypatch):
    """Return what stands for the devices there are, and let every checkpointer use it."""

    class TorchDevice(fakes.Device):
        """Takes CPU tensors for its own. Training on it is never behind: each wait is over at once."""

        def settle(self):
            super().settle()
            if not self.settling:
                self.settling = True
                while self.training.queue or self.training.running:
                    if not self.step(float("inf")):
                        raise fakes.DeadlockError
                self.settling = False

        settling = False

        def holds(self, tensor):
            return found.holds(tensor)

        def called(self, name):
            for watcher in self.watchers:
                watcher(self, name)
            if name == "synchronize" and threading.current_thread().name == "gockpt-device":
                self.patience()
            super().called(name)

        def patience(self):
            depth = 0
            while self.lock._is_owned():
                self.lock.release()
                depth += 1
            assert self.gate.wait(60)
            for _ in range(depth):
                self.lock.acquire()

        def pack(self, stream, sources, places, target):
            seen = as_bytes(sources)
            return seen, super().pack(stream, seen, places, target)

        def encode(self, stream, sources, encoding, places, target):
            seen = as_bytes(sources)
            return seen, super().encode(stream, seen, encoding, places, target)

        def prints(self, stream, sources):
            return super().prints(stream, as_bytes(sources))

    class Devices:
        def __init__(self):
            self.made = []
            self.gate = threading.Event()
            self.gate.set()
            self.settings = {}
            self.watchers = []
            self.updates = []
            self.waited = []

        def holds(self, tensor):
            return tensor.device == torch.device("cpu")

        def find(self, tensors):
            return torch.device("cpu") if any(t.numel() for t in tensors) else None

        def capturing(self):
            return any(device.graph for device in self.made)

        def updated(self, optimizer):
            self.updates.append(optimizer)

        def wait_for_updates(self):
            self.waited.append(len(self.updates))

        def open(self, device):
            made = TorchDevice(**self.settings)
            made.gate = self.gate
            made.watchers = self.watchers
            self.made.append(made)
            return made

        def opened(self):
            (device,) = self.made
            return device

        def check(self):
            """Nothing was used wrongly, and all is given back."""
            for device in self.made:
                assert device.violations == []
                assert device.registered == []
                assert device.used == 0
            self.made.clear()

    found = Devices()
    monkeypatch.setattr(saver_module, "Engine", functools.partial(Engine, devices=found))
    yield found
    found.gate.set()
    for saver in list(registry.opened):
        with contextlib.suppress(gockpt.GockptError):
            saver.close()
    found.check()
