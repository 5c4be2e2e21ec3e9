"""Ctrl-C at any line of any call leaves nothing locked and nothing half done: the same call works again.

As a terminal does it: a signal, whose handler the interpreter runs at the n-th line that is executed inside
the package. A sample of the lines is tried, all of them by ``make soak``.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import gockpt
from gockpt import registry
from gockpt.storage.local import writer_lock

PACKAGE = os.path.dirname(gockpt.__file__)
SOURCES = tuple(
    f"{os.path.realpath(os.path.join(PACKAGE, part))}{os.sep}" for part in ("", "storage", "kernels")
)
SAMPLE = 2
"""Lines that are tried of each call."""


def is_ours(name, known={}):  # noqa: B006 - a cache
    if name not in known:
        known[name] = os.path.realpath(name).startswith(SOURCES)
    return known[name]


def interrupted(call, at):
    """Call with a Ctrl-C at the line of that number; return how many lines were executed until its end."""
    lines = 0

    def trace(frame, event, _argument):
        nonlocal lines
        if not is_ours(frame.f_code.co_filename):
            return None
        if event == "line":
            lines += 1
            if lines == at:
                signal.raise_signal(signal.SIGINT)
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(former)
    return lines


def patiently(call):
    """Call again, in peace; what the interrupted one gave up may be told once."""
    with suppress(gockpt.SaveAborted):
        return call()
    return call()


ONE = gockpt.Options(window=1, when_busy="wait", cpu_threads=1)
WINDOW = gockpt.Options(window=3, when_busy="wait", cpu_threads=1)


class Trial:
    """One call on a model of its own; ``prepare`` comes before it and is not interrupted."""

    steps = 0
    every = 3
    options = WINDOW

    def __init__(self, path):
        self.path = path
        torch.manual_seed(0)
        self.model = torch.nn.Linear(40, 40)
        self.opt = torch.optim.AdamW(self.model.parameters())
        for _ in range(self.steps):
            self.tick()

    def train(self):
        self.model(torch.ones(1, 40)).sum().backward()
        self.opt.step()
        self.step = getattr(self, "step", 0) + 1

    def save(self):
        return gockpt.save_overlapped(
            self.model, self.opt, self.path, step=self.step, every=self.every, options=self.options
        )

    def tick(self):
        self.train()
        return self.save()

    def call(self):
        raise NotImplementedError


class FirstSave(Trial):
    every, options = 1, ONE

    def __init__(self, path):
        super().__init__(path)
        self.train()

    def call(self):
        self.save().result()


class OpeningTick(Trial):
    steps = 3

    def __init__(self, path):
        super().__init__(path)
        gockpt.wait()
        self.train()

    call = Trial.save


class DueTick(OpeningTick):
    steps = 5


class OtherOptions(Trial):
    steps = 4

    def __init__(self, path):
        super().__init__(path)
        self.train()
        self.options = ONE

    call = Trial.save


class Wait(Trial):
    steps = 6

    def call(self):
        gockpt.wait()


class WaitInsideAWindow(Wait):
    steps = 5


class Close(Trial):
    steps = 6

    def call(self):
        gockpt.close(self.path)


class CloseInsideAWindow(Close):
    steps = 5


class Block(Trial):
    def call(self):
        with gockpt.Checkpointer(self.model, self.opt, self.path, every=2, options=ONE) as saver:
            for _ in range(3):
                self.train()
                saver.after_step(self.step)


class AnotherModel(Trial):
    """A cell of a notebook that is run again."""

    steps = 4

    def __init__(self, path):
        super().__init__(path)
        self.model = torch.nn.Linear(40, 40)
        self.opt = torch.optim.AdamW(self.model.parameters())
        self.train()

    call = Trial.save


class Load(Trial):
    every, options, steps = 1, ONE, 2

    def __init__(self, path):
        super().__init__(path)
        gockpt.wait()

    def call(self):
        assert gockpt.load(self.path, self.model, self.opt).step == 2


class Look(Load):
    def call(self):
        with gockpt.open(self.path) as held:
            assert held["model/weight"][...].shape == (40, 40)
        assert gockpt.latest(self.path) == 2
        assert gockpt.verify(self.path).ok


class Prune(Load):
    steps = 4

    def __init__(self, path):
        super().__init__(path)
        gockpt.close(path)

    def call(self):
        gockpt.prune(self.path, 2)


class Upload(Load):
    def call(self):
        gockpt.upload(self.path, Path(f"{self.path}-bucket").absolute().as_uri())


class Remote(FirstSave):
    def __init__(self, path):
        self.options = ONE.replace(remote=Path(f"{path}-bucket").absolute().as_uri())
        super().__init__(path)

    def call(self):
        self.save()
        gockpt.wait()


class WorkerProcess(FirstSave):
    options = ONE.replace(worker="process")


TRIALS = [
    *(FirstSave, OpeningTick, DueTick, OtherOptions, Wait, WaitInsideAWindow, Close, CloseInsideAWindow),
    *(Block, AnotherModel, Load, Look, Prune, Upload, Remote),
]


def expect_nothing_left(path):
    gockpt.close()
    for saver in list(registry.opened):
        saver.close()
    for thread in threading.enumerate():
        if thread.name.startswith("gockpt"):
            thread.join(30)
            assert not thread.is_alive(), thread.name
    gc.collect()
    assert writer_lock._HELD == {}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    for step in gockpt.steps(path):
        assert gockpt.verify(path, step).ok
    if os.path.isdir(path):
        assert [name for name in os.listdir(path) if "partial" in name] == []


def tried(kind, number, at):
    path = f"ckpts-{number}"
    trial = kind(path)
    lines = interrupted(trial.call, at)
    patiently(trial.call)
    if hasattr(trial, "save"):
        trial.train()
        trial.options = ONE
        trial.every = 1
        patiently(lambda: trial.save().result(60))
        assert gockpt.latest(path) == trial.step
    expect_nothing_left(path)
    return lines


@pytest.fixture(autouse=True)
def _as_a_terminal_has_it():
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.parametrize("kind", TRIALS)
def test_interrupted_at_some_lines(kind):
    lines = tried(kind, 0, 0)
    assert lines > 20
    chosen = random.Random(kind.__name__)
    for number in range(1, SAMPLE + 1):
        tried(kind, number, chosen.randint(1, lines))


def test_a_worker_process_is_interrupted_at_some_lines():
    lines = tried(WorkerProcess, 0, 0)
    for number, share in enumerate((0.2, 0.6), 1):
        tried(WorkerProcess, number, int(lines * share))


@pytest.mark.soak
@pytest.mark.parametrize("kind", [*TRIALS, WorkerProcess])
@pytest.mark.timeout(7200)
def test_interrupted_at_every_line(kind):
    lines = tried(kind, 0, 0)
    for at in range(1, lines + 1):
        tried(kind, at, at)


IMPORTS = """
import json, os, signal, sys
import torch, numba
signal.signal(signal.SIGINT, signal.default_int_handler)

def imported():
    import gockpt
    return [getattr(gockpt, name) for name in gockpt.__all__]

def interrupted(at):
    lines = 0
    def trace(frame, event, _):
        nonlocal lines
        if "gockpt" not in frame.f_code.co_filename and os.sep + "storage" not in frame.f_code.co_filename:
            return None
        if event == "line":
            lines += 1
            if lines == at:
                signal.raise_signal(signal.SIGINT)
        return trace
    sys.settrace(trace)
    try:
        imported()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return lines

first = interrupted(0)
for share in json.loads(sys.argv[1]):
    for name in [name for name in sys.modules if name == "gockpt" or name.startswith("gockpt.")]:
        del sys.modules[name]
    interrupted(share if isinstance(share, int) else int(first * share))
    imported()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
import gockpt
gockpt.save_overlapped(torch.nn.Linear(2, 2), None, "ckpts", step=1).result(60)
print(first)
"""


def test_an_interrupted_import_can_be_repeated():
    shares = [1, 5, 20, 60, 0.1, 0.5, 0.9]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, json.dumps(shares)], capture_output=True, check=False, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 500
    assert gockpt.steps("ckpts") == [1]
