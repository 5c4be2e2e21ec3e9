"""The table "... while saving" in docs/guarantees.md is true: every row is tried here.

A trial is a function under the name of its row. It returns when all came out exact, and raises what a user
would see otherwise; the row must name that error.
"""

from __future__ import annotations

import errno
import functools
import logging
import math
import multiprocessing
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import gockpt
from gockpt import registry
from gockpt.core.descriptors import ArenaId
from gockpt.kernels import replay
from gockpt.saving.device_selection import CudaDevices
from gockpt.state import lineage
from gockpt.storage.local.filesystem import Filesystem
from gockpt.storage.object_store.client import Objects
from gockpt.workers.save_job import Job

TRIALS = {}


def when(row):
    """Register the trial of a row."""
    return lambda trial: TRIALS.setdefault(row, trial)


@when("The first save comes before the optimizer has state")
def _before_state(lab):
    run = lab.Run()
    run.tick()
    run.check(0)
    other = lab.Run()
    other.train()
    gockpt.load("ckpts", other.model, other.opt)
    assert not other.opt.state


@when("Optimizer state appears inside a window")
def _late_state(lab):
    run = lab.Run()
    run.model[0].requires_grad_(False)
    assert run.window(between=lambda: run.model[0].requires_grad_(True)).check().window == 1


@when("A parameter group is added inside a window")
def _group_added(lab):
    run = lab.Run()

    def add():
        run.model.append(torch.nn.Linear(24, 24))
        run.opt.add_param_group({"params": run.model[2].parameters(), "lr": 0.1})

    assert run.window(between=add).check().window == 1


@when("Parameters or optimizer state have NaN or Inf")
def _not_finite(lab):
    run = lab.Run()
    options = gockpt.Options(window=1, when_busy="wait", keep=2)
    run.saved(options=options)
    run.model[0].weight.data[0, 0] = torch.nan
    for _ in range(3):
        assert not run.saved(options=options).save.result().nonfinite.finite
    assert gockpt.steps("ckpts") == [1, 3, 4]


@when("Kernels can't be compiled (`NUMBA_DISABLE_JIT`), or not be kept on the disk")
def _nothing_compiled(lab):
    with (
        mock.patch("gockpt.kernels.fingerprint_numba.WHY_NOT", "a test says so"),
        mock.patch("gockpt.kernels.replay.WHY_NOT", "a test says so"),
    ):
        assert lab.Run().window().check().window == 1


@when("There is no optimizer")
def _no_optimizer(lab):
    assert lab.Run(optimizer=False).window().check().window == 1


@when("A parameter is changed behind the optimizer's back inside a window")
def _behind_the_back(lab):
    run = lab.Run()
    saved = run.window(between=lambda: run.model[0].weight.data.clamp_(-0.01, 0.01)).check()
    assert (saved.attempts, list(saved.late_parts)) == (1, ["0.weight"])


@when("`step` of the optimizer is patched")
def _patched(lab):
    run = lab.Run()
    step = run.opt.step
    run.opt.step = functools.partial(step)
    assert run.window().check().window == 1


@when("A gradient scaler skips a step inside a window")
def _skipped(lab):
    run = lab.Run()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    while run.step < 8:
        run.opt.zero_grad()
        loss = run.model(torch.randn(4, 24)).square().mean() * (float("inf") if run.step == 6 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(run.opt)
        scaler.update()
        run.step += 1
        run.tick(every=4, options=lab.WINDOW)
    assert run.check().window == 4
    assert float(run.opt.state[run.model[0].weight]["step"]) == 7


@when("A closure raises inside `optimizer.step(closure)`, and the loop goes on")
def _closure_raises(lab):
    run = lab.Run()

    def between():
        with pytest.raises(ZeroDivisionError):
            run.opt.step(lambda: 1 / 0)

    assert run.window(between=between).check().window == 1


def closed_and_changed(lab):
    """Tick at the due step, and change the state while the background is kept from copying it."""
    run = lab.Run().window(upto=7)
    run.train()
    (saver,) = registry.opened
    gate = threading.Event()
    batch = saver._engine._tasks.submit([gate.wait])
    run.tick(every=4, options=lab.WINDOW)
    run.model[1].weight.data.mul_(2)
    gate.set()
    batch.finish()
    return run


@when("The state changes right after the closing call, before it was copied")
def _changed_too_early(lab):
    run = closed_and_changed(lab)
    run.train()
    run.tick(every=4, options=lab.WINDOW)
    assert run.check(9).attempts == 2
    assert gockpt.steps("ckpts") == [4, 9]


@when("The same, and no further call comes")
def _changed_and_no_more(lab):
    run = closed_and_changed(lab)
    gockpt.wait()
    assert run.save.done()


@when("The state changes right after a call without `every`")
def _changed_after_the_call(lab):
    run = lab.Run()
    run.train()
    run.tick(every=None)
    for value in (*run.model.parameters(), *(v for s in run.opt.state.values() for v in s.values())):
        value.data.mul_(2)
    run.check(1)
    assert run.save.attempts == 1


@when("A call without `every` comes while the former save is being written")
def _called_again(lab):
    gate = threading.Event()
    lab.inject(Gated(gate))
    run = lab.Run()
    run.train()
    first = run.tick(every=None)
    run.train()
    assert not first.done()
    later = threading.Timer(0.05, gate.set)
    later.start()
    run.tick(every=None)
    assert first.done()
    run.check(2)
    later.join()
    assert gockpt.steps("ckpts") == [1, 2]


@when("The optimizer steps after the last call while a window is open")
def _stepped_on(lab):
    run = lab.Run().window(upto=6)
    run.train()
    gockpt.wait()
    assert run.save.done()


@when("`every` or the options change while a window is open")
def _other_every(lab):
    run = lab.Run().window(upto=6)
    given_up = run.save
    run.train()
    run.tick(every=7, options=lab.WINDOW)
    run.check(7)
    given_up.result(0)


@when("Ctrl-C or an exception leaves the `with` block inside a window")
def _interrupted(lab):
    run = lab.Run()
    saves = []

    def block():
        with gockpt.Checkpointer(run.model, run.opt, "ckpts", every=4, options=lab.WINDOW) as saver:
            for step in range(1, 7):
                run.train()
                saves.append(saver.after_step(step))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block()
    assert gockpt.steps("ckpts") == [4]
    saves[-1].result()


PROGRAM = """
import os, signal, torch, gockpt
model = torch.nn.Linear(24, 24)
opt = torch.optim.AdamW(model.parameters())
options = gockpt.Options(window=4, when_busy="wait", worker="thread")

def go(step):
    model(torch.ones(1, 24)).square().mean().backward()
    opt.step()
    return gockpt.save_overlapped(model, opt, "ckpts", step=step, every=4, options=options)

for step in range(1, 7):
    save = go(step)
    if step == 4:
        save.result()
"""


def ended(how):
    """Return how a program ended that leaves its loop inside a window, and the steps it left."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + how], capture_output=True, check=False, timeout=120
    )
    assert gockpt.verify("ckpts").ok
    return done.returncode, gockpt.steps("ckpts")


def killed_after_the_capture():
    """Kill such a program once its last save is captured; return its worker process, which is stopped."""
    pid = "saver._engine._background._worker.pid"
    how = f"""
(saver,) = gockpt.registry.opened
for step in (7, 8):
    save = go(step)
save.captured.result()
os.kill({pid}, signal.SIGSTOP)
print({pid}, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    code = PROGRAM.replace('"thread"', '"process"') + how
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert gockpt.steps("ckpts") in ([4], [4, 8])
    return int(done.stdout)


@when("An exception ends the program inside a window")
def _program_raises(lab):
    assert ended("raise ValueError") == (1, [4])


def told_of_signals(lab, between=lambda _: None, upto=3):
    """Let SIGUSR1 come before the tick of step 3; return the steps that its former handler found."""
    told = []
    former = signal.signal(signal.SIGUSR1, lambda *_: told.append(gockpt.steps("ckpts")))
    run = lab.Run()
    try:
        for step in range(1, upto + 1):
            run.train()
            if step == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
            run.tick(every=100, options=lab.ONE.replace(on_signal=("SIGUSR1",)))
        between(told)
    finally:
        for saver in list(registry.opened):
            saver.close()
            run.save = saver.handle
        signal.signal(signal.SIGUSR1, former)
    return run, told


@when('SIGTERM with `on_signal=("SIGTERM",)`')
def _preempted(lab):
    run, told = told_of_signals(lab)
    assert told == [[3]]
    run.check(3)


@when("The same, and no call comes in time")
def _preempted_in_an_evaluation(lab):
    def evaluate(told):
        os.kill(os.getpid(), signal.SIGUSR1)
        while not told:
            time.sleep(0.001)

    run, told = told_of_signals(lab, between=evaluate, upto=2)
    assert told == [[2]]
    run.check(2)


@when("A signal handler calls `finish()` in the middle of an update")
def _finish_in_an_update(lab):
    run = lab.Run()
    run.train()
    run.tick(every=100)
    former = signal.signal(signal.SIGUSR1, lambda *_: gockpt.finish())
    try:
        run.opt.register_step_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGUSR1))
        run.train()
        assert gockpt.steps("ckpts") == []
        run.tick(every=100)
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert gockpt.steps("ckpts") == [2]
    run.check(2)


@when("SIGKILL inside a window")
def _program_killed(lab):
    assert ended("os.kill(os.getpid(), signal.SIGKILL)") == (-9, [4])


@when('SIGKILL after the capture, with `worker="process"`')
def _program_killed_after_the_capture(lab):
    worker = os.pidfd_open(pid := killed_after_the_capture())
    os.kill(pid, signal.SIGCONT)
    poller = select.poll()
    poller.register(worker, select.POLLIN)
    assert poller.poll(60_000)
    os.close(worker)
    assert gockpt.steps("ckpts") == [4, 8]
    assert gockpt.verify("ckpts", 8).ok


@when("A run starts while the worker process of a killed one still publishes there")
def _started_again(lab):
    later = threading.Timer(0.3, os.kill, (killed_after_the_capture(), signal.SIGCONT))
    later.start()
    lab.Run().saved(options=CONTINUE).check()
    later.join()
    assert gockpt.steps("ckpts") == [1, 4, 8]


PROCESS = {"worker": "process"}


def without_a_worker(lab, number):
    """Have a worker process come to its end inside a window; what is lost is told, and nothing more."""
    options = lab.WINDOW.replace(**PROCESS)
    run = lab.Run()
    for _ in range(4):
        run.train()
        run.tick(every=4, options=options)
    run.check(4)
    run.train()
    lost = run.tick(every=4, options=options)
    (saver,) = registry.opened
    worker = saver._engine._background._worker
    worker._timeout = 3  # from now on: its start may take longer on a busy machine
    os.kill(worker.pid, number)
    with pytest.raises(gockpt.WorkerError) as caught:
        lost.result(60)
    with pytest.raises(gockpt.WorkerError):
        gockpt.wait()
    assert gockpt.steps("ckpts") == [4]
    for _ in range(3):
        run.train()
        run.tick(every=4, options=options)
    run.check(8)
    raise caught.value


@when("The worker process is killed")
def _worker_killed(lab):
    without_a_worker(lab, signal.SIGKILL)


@when("The worker process hangs")
def _worker_hangs(lab):
    without_a_worker(lab, signal.SIGSTOP)


@when("The worker process can't be started")
def _no_worker(lab):
    options = lab.ONE.replace(worker="process")
    with mock.patch.object(sys, "executable", "/nowhere/python"):
        lab.Run().saved(options=options)


@when('`worker="process"` where memory can\'t be shared by descriptors')
def _nothing_to_share_with(lab):
    options = lab.ONE.replace(worker="process")
    with mock.patch.object(sys, "executable", ""):
        lab.Run().saved(options=options)


def _rounded(lab):
    return lab.WINDOW.replace(grad_dtype="bf16", verify="close")


def _inexact(run, saved):
    """Fail unless all that is not said to be inexact is equal, and all else is near."""
    with gockpt.open("ckpts") as held:
        assert held.metadata.exact is saved.exact is False
        assert held.metadata.deviation == saved.deviation
        for name, value in run.seen[saved.step][0].items():
            got = held[f"model/{name}"][...]
            if f"model/{name}" in held.metadata.inexact:
                assert torch.allclose(got, value, atol=1e-4)
            else:
                assert torch.equal(got, value)
        return set(held.metadata.inexact)


@when("Gradients travel in 16 bits, with `grad_dtype`")
def _sixteen_bits(lab):
    run = lab.Run()
    saved = run.window(options=_rounded(lab)).save.result()
    assert saved.deviation.max_abs < 1e-3
    assert {"model/0.weight", "optimizer/0.weight/exp_avg"} <= _inexact(run, saved)


@when("With `grad_dtype`, a parameter is changed behind the optimizer's back inside a window")
def _rounded_behind_the_back(lab):
    run = lab.Run(width=2)

    def nudge():
        run.model[0].weight.data.mul_(1 + 2**-20)

    saved = run.window(between=nudge, options=_rounded(lab)).save.result()
    assert (saved.attempts, list(saved.late_parts)) == (1, ["0.weight"])
    assert "model/0.weight" not in _inexact(run, saved)


@when("With `grad_dtype`, a closure or a new hook runs inside `step`")
def _rounded_inside(lab):
    for how in ("closure", "hook"):
        run = lab.Run()

        def nudge(*_, run=run):
            run.model[0].bias.data.mul_(1.0001)

        while run.step < 8:
            run.model.zero_grad()
            run.model(torch.randn(4, 24)).square().mean().backward()
            if run.step == 6 and how == "hook":
                run.opt.register_step_pre_hook(nudge)
            run.opt.step(*([nudge] if how == "closure" else []))
            run.step += 1
            run.tick(every=4, options=_rounded(lab))
        assert "0.weight" in run.check().late_parts


@when("With `grad_dtype`, replay goes wrong")
def _rounded_wrong(lab):
    run = lab.Run()
    run.window(upto=4, options=_rounded(lab)).save.result()
    real = replay.run

    def wrong(kernel, flags, p, states, grads, scalars, *, tail):
        rows = [(*row[:-1], 1.1 * row[-1]) for row in scalars]
        real(kernel, flags, p, states, grads, rows, tail=tail)

    with mock.patch.object(replay, "run", wrong):
        run.window(options=_rounded(lab))
        save = run.save
        while not any("did not match" in event for event in save.events):
            save.captured.result(30)
    run.train()
    run.tick(every=4, options=_rounded(lab))
    assert (save.result().step, save.attempts) == (9, 2)
    run.save = save
    run.check()


@when("With `grad_dtype`, a gradient is lost, damaged or overtaken on its way to replay")
def _rounded_astray(lab):
    real = Job.gradients
    for how in ("lost", "damaged", "overtaken"):
        run = lab.Run()
        run.window(upto=4, options=_rounded(lab)).save.result()
        held = []

        def astray(job, gradients, how=how, held=held):
            kept = list(gradients)
            chosen = next((n for n, g in enumerate(kept) if g.piece == 0 and g.number in (1, 2)), None)
            if chosen is not None:
                one = kept[chosen]
                if how == "damaged":
                    job._arenas[ArenaId.RING].view(one.offset, 1)[:] ^= 1
                elif how == "lost":
                    job._ring.free(kept.pop(chosen).offset)
                else:
                    held.append(kept.pop(chosen))
                    kept += reversed(held) if len(held) == 2 else ()
            real(job, kept)

        with mock.patch.object(Job, "gradients", astray):
            run.window(options=_rounded(lab))
            save = run.save
            while not any("did not match" in event for event in save.events):
                assert not save.durable.done()
                time.sleep(0.001)
        run.train()
        run.tick(every=4, options=_rounded(lab))
        assert (save.result().step, save.attempts) == (9, 2)
        run.save = save
        run.check()


@when("The program ends inside a window without `wait()`")
def _program_ends(lab):
    assert ended("") == (0, [4, 6])


class Refusing(Filesystem):
    """Some calls fail with an error number while it is armed."""

    def __init__(self, *calls, code, armed=True):
        self.code, self.armed = code, armed
        for call in calls:
            setattr(self, call, functools.partial(self.refuse, getattr(self, call)))

    def refuse(self, real, *arguments, **keywords):
        if self.armed:
            raise OSError(self.code, os.strerror(self.code))
        return real(*arguments, **keywords)


class Gated(Filesystem):
    """Workers write nothing before a gate is opened."""

    def __init__(self, gate):
        self.gate = gate

    def pwrite(self, *arguments):
        if threading.current_thread().name.startswith("gockpt-worker"):
            assert self.gate.wait(60)
        return super().pwrite(*arguments)


@when("The path is a file")
def _path_is_a_file(lab):
    Path("ckpts").write_text("mine")
    lab.Run().tick()


@when("The path may not be written")
def _path_not_writable(lab):
    lab.inject(Refusing("mkdir", "lock", code=errno.EACCES))
    lab.Run().tick()


def lost_and_told(run):
    """Save; the handle has to raise, and the next call as well."""
    run.train()
    with pytest.raises(gockpt.StorageError):
        run.tick().result()
    run.train()
    run.tick()


@when("The disk is full")
def _disk_full(lab):
    fs = Refusing("pwrite", code=errno.ENOSPC, armed=False)
    lab.inject(fs)
    run = lab.Run().saved()
    fs.armed = True
    with pytest.raises(gockpt.StorageError, match="No space left") as caught:
        lost_and_told(run)
    with pytest.raises(gockpt.StorageError):  # that of step 3, whose call told of step 2
        gockpt.wait()
    fs.armed = False
    assert not list(Path("ckpts").glob("*partial*"))
    run.saved().check(4)
    assert gockpt.steps("ckpts") == [1, 4]
    raise caught.value


@when("No inodes are left on the disk")
def _no_inodes(lab):
    free = os.statvfs_result((4096, 4096, 10**6, 10**5, 10**5, 1000, 0, 0, 0, 255))
    fs = Refusing("open", code=errno.ENOSPC, armed=False)
    lab.inject(fs)
    run = lab.Run().saved()
    fs.armed = True
    with mock.patch.object(os, "statvfs", return_value=free):
        lost_and_told(run)
        with pytest.raises(gockpt.StorageError, match="no inodes are left there") as caught:
            gockpt.wait()
    fs.armed = False
    run.saved().check(4)
    raise caught.value


@when("The quota is used up")
def _quota(lab):
    fs = Refusing("pwrite", code=errno.EDQUOT, armed=False)
    lab.inject(fs)
    run = lab.Run().saved()
    fs.armed = True
    lost_and_told(run)
    with pytest.raises(gockpt.StorageError, match="quota of this user") as caught:
        gockpt.wait()
    fs.armed = False
    run.saved().check(4)
    raise caught.value


@when("The path is removed while a run saves there")
def _path_removed(lab):
    run = lab.Run().saved()
    shutil.rmtree("ckpts")
    lost_and_told(run)


@when("The path to save into is a URL")
def _url(lab):
    try:
        gockpt.save_overlapped(lab.Run().model, None, "s3://bucket/run", step=1)
    finally:
        assert os.listdir() == []


@when("The path is empty, bytes, or of an unknown home (`~name`)")
def _no_path(lab):
    for path in ("", b"ckpts", "~no-such-user/ckpts"):
        with pytest.raises(gockpt.UsageError, match="path=") as caught:
            gockpt.save_overlapped(lab.Run().model, None, path, step=1)
    assert os.listdir() == []
    raise caught.value


@when("The path is moved away, or another directory takes its place, while a run saves there")
def _path_moved(lab):
    run = lab.Run().saved()
    Path("ckpts").rename("moved")
    Path("ckpts").mkdir()
    try:
        lost_and_told(run)
    finally:
        assert (gockpt.steps("ckpts"), gockpt.steps("moved")) == ([], [1])


@when("`.gockpt.lock` is removed or replaced while a run saves there")
def _lock_removed(lab):
    run = lab.Run().saved()
    Path("ckpts/.gockpt.lock").unlink()
    try:
        lost_and_told(run)
    finally:
        assert gockpt.steps("ckpts") == [1]


@when("Something else stands where the step would go")
def _place_taken(lab):
    Path("ckpts/step-0000000001").mkdir(parents=True)
    lost_and_told(lab.Run())


@when("Another process saves into the path")
def _other_process(lab):
    code = "from gockpt.storage.local.store import Store; s = Store('ckpts'); print(flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(gockpt.PathBusy, match=f"process {other.pid} on") as caught:
            lab.Run().tick()
        other.communicate("\n", timeout=60)
    raise caught.value


def forget_what_was_saved():
    """Play that another process begins."""
    gockpt.wait()
    for saver in list(registry.opened):
        saver.close()
    lineage._of_process.clear()


CONTINUE = gockpt.Options(existing="continue", window=1)


@when("The path holds checkpoints that the model was not loaded from")
def _not_loaded(lab):
    lab.Run().saved().saved()
    forget_what_was_saved()
    before = sorted(Path("ckpts").rglob("*"))
    with pytest.raises(gockpt.ExistingCheckpoints, match="the newest: step 2, ") as caught:
        lab.Run().saved()
    assert sorted(Path("ckpts").rglob("*")) == before
    raise caught.value


@when(
    "The same, and it is the same run: loaded from the path, from a copy or an object store, or this process "
    "saved there"
)
def _same_run(lab):
    lab.Run().saved()
    gockpt.upload("ckpts", f"file://{Path.cwd()}/bucket")
    for place in ("ckpts", f"file://{Path.cwd()}/bucket"):
        forget_what_was_saved()
        run = lab.Run()
        run.train()
        run.step = gockpt.load(place, run.model, run.opt).step
        run.saved().check(2)
    for saver in list(registry.opened):
        saver.close()
    lab.Run().saved().check(1)


@when('The same, with `existing="continue"`')
def _beside(lab):
    lab.Run().saved().saved()
    forget_what_was_saved()
    run = lab.Run()
    run.step = 6
    with mock.patch.object(logging.getLogger("gockpt"), "warning") as told:
        for _ in range(3):
            run.saved(options=CONTINUE.replace(keep=2))
    run.check(9)
    assert gockpt.steps("ckpts") == [1, 2, 8, 9]
    assert [call.args[2] for call in told.call_args_list if "of other runs" in call.args[0]] == [2]


@when('With `existing="continue"`, a step is saved that another run has saved there')
def _same_step_of_another(lab):
    lab.Run().saved()
    forget_what_was_saved()
    before = gockpt.checkpoints("ckpts")
    run = lab.Run()
    run.train()
    try:
        with pytest.raises(gockpt.StorageError):
            run.tick(options=CONTINUE).result()
        run.train()
        run.tick(options=CONTINUE)
    finally:
        assert gockpt.checkpoints("ckpts")[:1] == before


@when("`remote` holds another run's checkpoints")
def _remote_of_another(lab):
    url = f"file://{Path.cwd()}/bucket"
    lab.Run().saved()
    gockpt.upload("ckpts", url)
    forget_what_was_saved()
    shutil.rmtree("ckpts")
    try:
        lab.Run().saved(options=gockpt.Options(window=1, remote=url))
    finally:
        assert gockpt.steps(url) == [1]
        assert not Path("ckpts").exists()


@when("Another model of this process is saved into the path, as in a notebook's cell that is run again")
def _other_model(lab):
    lab.others = [lab.Run().saved().saved()]
    lab.again = lab.Run().saved()
    lab.again.check(1)
    with pytest.raises(gockpt.PathBusy):
        lab.others[0].saved()


@when("Two models are saved into one path in turn")
def _in_turn(lab):
    lab.others = [lab.Run(), lab.Run()]
    for _ in range(3):
        for run in lab.others:
            run.saved()


@when("`gockpt.close` is called inside a window")
def _closed_inside(lab):
    run = lab.Run().window(upto=6)
    gockpt.close("ckpts")
    code = "from gockpt.storage.local.store import Store; Store('ckpts').close()"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert gockpt.steps("ckpts") == [4]
    run.save.result()


def of_a_group(rank):
    """Play that this process is one of two in a process group."""
    group = mock.Mock(**{"get_world_size.return_value": 2, "get_rank.return_value": rank})
    return mock.patch("gockpt.ranks.distributed", group)


@when("A model in `DistributedDataParallel` is saved by all ranks of a process group")
def _replicated(lab):
    run = lab.Run().saved()
    bare = run.model
    # Without a group of processes; tests/promise/test_process_groups.py has two.
    run.model = torch.nn.parallel.DistributedDataParallel.__new__(torch.nn.parallel.DistributedDataParallel)
    torch.nn.Module.__init__(run.model)
    run.model.module, run.model.process_group, run.model.parameters_to_ignore = bare, None, set()
    with of_a_group(1):
        run.step = 2
        assert gockpt.save_overlapped(run.model, run.opt, "elsewhere", step=2) is None
        gockpt.wait()
        assert gockpt.finish("elsewhere") is None
    assert not Path("elsewhere").exists()
    gockpt.close()
    with of_a_group(0):
        run.step = 3
        assert gockpt.save_overlapped(run.model, run.opt, "ckpts", step=3, options=lab.ONE).result().step == 3
    run.model = bare
    assert torch.equal(gockpt.open("ckpts")["model/0.weight"][...], bare[0].weight)


@when("Another model, or a sharded optimizer, is saved in a process group of several ranks")
def _not_replicated(lab):
    for rank in (1, 0):
        with of_a_group(rank), pytest.raises(gockpt.UsageError, match="Sequential is not wrapped") as caught:
            lab.Run().saved()
        assert not Path("ckpts").exists()
    raise caught.value


@when("A CUDA graph is being captured when `save_overlapped` is called")
def _captured(lab):
    capturing = mock.patch.object(CudaDevices, "capturing", return_value=True)
    run = lab.Run()
    run.train()
    with capturing:
        run.tick()


@when("A forked child goes on with its parent's saves")
def _forked(lab):
    run = lab.Run().saved()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            run.tick()
        except gockpt.GockptError as error:
            os.write(write, type(error).__name__.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        raise getattr(gockpt, pipe.read())


def in_a_child(target):
    """Run a function in a forked child of ``multiprocessing``; it must end well."""
    child = multiprocessing.get_context("fork").Process(target=target)
    child.start()
    child.join(60)
    assert child.exitcode == 0


@when("A forked child saves a model that its parent never saved")
def _forked_of_its_own(lab):
    run = lab.Run()
    torch.set_num_threads(1)  # OpenMP's threads don't survive a fork
    in_a_child(lambda: run.saved().check(1))
    assert gockpt.steps("ckpts") == [1]


@when("A child process of `multiprocessing` ends inside a window")
def _child_ends(lab):
    run = lab.Run()
    torch.set_num_threads(1)
    in_a_child(lambda: run.window(upto=6))
    assert gockpt.steps("ckpts") == [4, 6]


@when("Ctrl-C or another signal arrives while gockpt works")
def _signal_inside(lab):
    steps = []
    former = signal.signal(signal.SIGTERM, lambda *_: steps.append(gockpt.wait() or gockpt.steps("ckpts")))
    try:
        run = lab.Run()
        run.train()
        run.tick(extra={"in the call": lambda: os.kill(os.getpid(), signal.SIGTERM)})
    finally:
        signal.signal(signal.SIGTERM, former)
    run.check()
    assert steps == [[1]]


@when("Ctrl-C arrives while a call opens a path, waits, closes, or changes options")
def _interrupted(lab):
    gate = threading.Event()

    class Slow(Filesystem):
        def fsync(self, fd):
            assert threading.current_thread() is threading.main_thread() or gate.wait(60)
            super().fsync(fd)

    lab.inject(Slow())
    run = lab.Run()
    run.train()
    run.tick()
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for call in (gockpt.wait, gockpt.close, lambda: run.tick(options=gockpt.Options(window=1, nice=3))):
            interrupt = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
            interrupt.start()
            with pytest.raises(KeyboardInterrupt):
                call()
            interrupt.join()
    finally:
        signal.signal(signal.SIGINT, former)
        gate.set()
    run.step = 0
    lab.inject(Filesystem())
    run.saved().check()
    gockpt.close()
    assert not registry.opened


@when("An extra calls `wait()` or `save_overlapped`")
def _call_inside(lab):
    run = lab.Run()
    run.train()
    run.tick(extra={"odd": gockpt.wait})


@when("The same step is saved twice")
def _twice(lab):
    run = lab.Run().saved()
    run.step = 0
    run.saved().check(1)
    assert gockpt.steps("ckpts") == [1]
    assert [name for name in os.listdir("ckpts") if ".old-" in name]


@when("A save is due while one is being written")
def _busy(lab):
    gate = threading.Event()
    lab.inject(Gated(gate))
    run = lab.Run()
    for _ in range(3):
        run.train()
        save = run.tick(options=gockpt.Options())
    assert (save.step, save.skipped) == (1, (2, 3))
    gate.set()
    save.result()
    assert gockpt.steps("ckpts") == [1]
    run.check(3)


def left_out(lab, change=None):
    """Let the due saves of steps 2 and 3 be left out; then end with ``wait()``."""
    gate = threading.Event()
    lab.inject(Gated(gate))
    run = lab.Run()
    for _ in range(3):
        run.train()
        save = run.tick(options=gockpt.Options())
    assert save.skipped == (2, 3)
    if change is not None:
        change(run)
    gate.set()
    gockpt.wait()
    return run


@when("The last due save was left out")
def _last_left_out(lab):
    left_out(lab).check(3)
    assert gockpt.steps("ckpts") == [1, 3]


@when("The same, and the state changed after the last call")
def _last_left_out_and_changed(lab):
    left_out(lab, change=lambda run: run.train())
    assert gockpt.steps("ckpts") == [1]


@when("A loop ends between two due saves, with `gockpt.finish()`")
def _finished(lab):
    run = lab.Run().window(upto=6)
    assert gockpt.finish("ckpts").step == 6
    run.check(6)


@when("The loop ends between two due saves, and the state changed before `gockpt.finish()`")
def _finished_and_changed(lab):
    run = lab.Run()
    run.train()
    run.tick(every=100)
    run.model[0].weight.data.mul_(2)
    gockpt.finish("ckpts")


@when("`gockpt.prune` is called for the path that a run saves into")
def _prune_beside(lab):
    run = lab.Run().saved().saved().saved()
    try:
        gockpt.prune("ckpts", 2)
    finally:
        assert gockpt.steps("ckpts") == [1, 2, 3]
        run.check()


@when("A run that resumed from an older step prunes")
def _abandoned(lab):
    run = lab.Run()
    for _ in range(4):
        run.saved()
    gockpt.wait()
    gockpt.load("ckpts", run.model, run.opt, step=2)
    run.step = 2
    run.train()
    run.tick(options=gockpt.Options(keep=3, window=1)).result()
    assert gockpt.steps("ckpts") == [1, 2, 3]
    run.check(3)


@when("The metric of `Keep` is missing or NaN")
def _no_metric(lab):
    run, keep = lab.Run(), gockpt.Keep(best=1, metric="loss")
    options = gockpt.Options(window=1, keep=keep)
    for loss in (math.nan, 2.0, None, 3.0, 3.0):
        run.train()
        run.tick(options=options, extra={"loss": loss}).result()
    assert gockpt.steps("ckpts") == [2, 4, 5]
    run.check()


@when("No checkpoint has the metric of `Keep`")
def _nobody_has_the_metric(lab):
    run, keep = lab.Run(), gockpt.Keep(newest=2, best=1, metric="los")
    for _ in range(4):
        run.train()
        run.tick(options=gockpt.Options(window=1, keep=keep), extra={"loss": 1.0}).result()
    run.check()
    try:
        gockpt.prune("ckpts", keep)
    finally:
        assert gockpt.steps("ckpts") == [1, 2, 3, 4]


@when("Saves are compressed, with other options from one run to the next")
def _compressed(lab):
    run, size = lab.Run(width=64), {}
    for codec in ("zstd", "blosc", "auto", None):
        run.train()
        run.model[0].weight.data[:32] = 0  # so that it shrinks
        run.tick(options=gockpt.Options(window=1, compression=codec))
        run.check()
        with zipfile.ZipFile(f"ckpts/step-{run.step:010d}.zip") as archive:
            size[codec] = archive.getinfo("model/0.weight/c.0.0").file_size
    assert max(size["zstd"], size["blosc"]) < size["auto"] == size[None] == 64 * 24 * 4 + 4


@when("An extra has no exact form")
def _odd_extra(lab):
    with pytest.raises(gockpt.UnsupportedState, match=r"extra/odd is a builtins\.object") as caught:
        lab.Run().tick(every=100, extra={"odd": object()})
    raise caught.value


@when("An extra loses its exact form later")
def _extra_turns_odd(lab):
    run, extra = lab.Run(), {"mine": 1}
    run.saved(extra=extra)
    extra["mine"] = object()
    run.train()
    try:
        run.tick(extra=extra)
    finally:
        extra["mine"] = 2
        run.saved(extra=extra).check(3)
        assert gockpt.steps("ckpts") == [1, 3]


@when("An extra's `state_dict()` raises")
def _raising_extra(lab):
    run = lab.Run()
    with pytest.raises(ZeroDivisionError):
        run.tick(extra={"mine": lambda: 1 / 0})
    assert gockpt.steps("ckpts") == []
    run.saved().check()


@when("A parameter is on the meta device, or lazy")
def _no_values(lab):
    with pytest.raises(gockpt.UnsupportedState, match="model/weight"):
        gockpt.save_overlapped(torch.nn.LazyLinear(3), None, "ckpts")
    gockpt.save_overlapped(torch.nn.Linear(3, 3, device="meta"), None, "ckpts")


@when("A parameter, buffer or optimizer state is a tensor subclass with `__tensor_flatten__` (torchao)")
def _subclass(lab):
    model, optimizer = double()
    for step in range(1, 9):
        model(torch.randn(2, 4)).square().mean().backward()
        optimizer.step()
        save = gockpt.save_overlapped(model, optimizer, "ckpts", step=step, every=4, options=lab.WINDOW)
    saved = save.result()
    assert (saved.step, saved.window, "weight" in saved.late_parts) == (8, 4, True)
    other, its = double()
    gockpt.load("ckpts", other, its)
    for name in ("a", "b"):
        assert torch.equal(getattr(other.weight, name), getattr(model.weight, name))
        states = its.state[other.weight], optimizer.state[model.weight]
        assert torch.equal(*(getattr(state["exp_avg"], name) for state in states))


def double():
    """Return a module whose weight is a tensor subclass, and with it the optimizer's states are."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    model.weight = torch.nn.Parameter(TwoTensor(model.weight.detach(), model.weight.detach() * 2))
    return model, torch.optim.AdamW(model.parameters())


@when("A tensor is nested, sparse, quantised by torch, masked, or of a class that can't be taken apart")
def _unusual(lab):
    with pytest.raises(gockpt.UnsupportedState, match=r"model/odd .*\.to_dense"):
        gockpt.save_overlapped({"odd": torch.eye(2).to_sparse()}, None, "ckpts")
    odd = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)
    with pytest.raises(gockpt.UnsupportedState, match=r"model/odd .*nested"):
        gockpt.save_overlapped({"odd": odd}, None, "others")
    gockpt.save_overlapped(torch.nn.Linear(1, 1), None, "more", extra={"odd": double()[0].weight})


@when("`load_state_dict(assign=True)` left the optimizer with lost parameters")
def _lost(lab):
    run = lab.Run().saved()
    run.model.load_state_dict({k: v.clone() for k, v in run.model.state_dict().items()}, assign=True)
    run.tick()


class Counting:
    """A wrapper that counts steps and can't say so."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.count = 0

    def step(self):
        self.count += 1
        self.optimizer.step()


@when("A wrapper around the optimizer has no way to save its state, or to load it")
def _mute_wrapper(lab):
    run = lab.Run()
    gockpt.save_overlapped(run.model, Counting(run.opt), "ckpts", step=1)


@when("The optimizer trains master copies or other tensors that the model does not hold")
def _masters(lab):
    run = lab.Run()
    masters = [param.detach().clone().requires_grad_() for param in run.model.parameters()]
    run.opt = torch.optim.AdamW(masters)
    for master in masters:
        master.grad = torch.ones_like(master)
    run.opt.step()
    run.saved()
    kept = [master.detach().clone() for master in masters]
    with torch.no_grad():
        for master in masters:
            master.zero_()
    gockpt.load("ckpts", run.model, run.opt)
    assert all(map(torch.equal, masters, kept))


@when("A module's state dict has keys that nothing takes back")
def _nothing_takes(lab):
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    model.register_state_dict_post_hook(lambda m, state, prefix, _: state.update({prefix + "words": "hi"}))
    with mock.patch.object(logging.getLogger("gockpt"), "warning") as warning:
        gockpt.save_overlapped(model, None, "ckpts").result()
    assert any("words" in call.args for call in warning.call_args_list)


@when("A method of a module's class could never be called by a load")
def _never_called(lab):
    class Odd(torch.nn.Linear):
        def _load_from_state_dict(self, state, prefix):
            """Take two arguments, of seven."""

    with pytest.raises(gockpt.UnsupportedState, match=r"Odd\._load_from_state_dict\(\)") as caught:
        gockpt.save_overlapped(torch.nn.Sequential(Odd(1, 1)), None, "ckpts")
    assert not gockpt.steps("ckpts")
    raise caught.value


@when("The model no longer exists")
def _model_gone(lab):
    run = lab.Run()
    saver = gockpt.Checkpointer(run.model, run.opt, "ckpts")
    del run
    saver.after_step(1)


@when("`window=4` without `every`")
def _window_without_every(lab):
    lab.Run().tick(options=lab.WINDOW)


@when("An option has an impossible value")
def _impossible(lab):
    gockpt.Options(keep=1)


@when("The state is larger than `host_memory` allows")
def _too_large(lab):
    lab.Run(width=2000).tick(options=gockpt.Options(host_memory=1 << 16))


@when("The extras are larger than `host_memory` allows")
def _extras_too_large(lab):
    lab.Run().tick(extra={"table": torch.zeros(1 << 20)}, options=gockpt.Options(host_memory=1 << 21))


@when("The object store can't be reached, or refuses, when a run begins")
def _no_store(lab):
    refuse = mock.patch.object(Objects, "children", side_effect=gockpt.RemoteError("503"))
    with refuse:
        lab.Run().saved(options=lab.ONE.replace(remote=there()))


@when("An upload fails")
def _failed_upload(lab):
    run, options = lab.Run(), lab.ONE.replace(remote=there())
    with mock.patch.object(Objects, "create", side_effect=gockpt.RemoteError("503")):
        run.saved(options=options).saved(options=options)
        with pytest.raises(gockpt.UploadError) as caught:
            gockpt.wait()
        assert gockpt.steps("ckpts") == [1, 2]
    run.saved(options=options).check()
    assert gockpt.latest(there()) == 3
    raise caught.value


@when("An upload is cut short")
def _cut_upload(lab):
    run = lab.Run().saved()
    with (
        mock.patch.object(Objects, "create", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        gockpt.upload("ckpts", there())
    assert gockpt.steps(there()) == []
    gockpt.upload("ckpts", there())
    assert gockpt.verify(there()).ok
    run.check()


@when("A checkpoint is due to be deleted while it is being uploaded")
def _pruned_upload(lab):
    run, options = lab.Run(), lab.ONE.replace(remote=there(), keep=2)
    reached, go_on = threading.Event(), threading.Event()
    create = Objects.create

    def gated(objects, path, data):
        reached.set()
        assert go_on.wait(60)
        create(objects, path, data)

    with mock.patch.object(Objects, "create", gated):
        run.saved(options=options)
        assert reached.wait(60)
        for _ in range(3):
            run.saved(options=options)
        assert gockpt.steps("ckpts") == [1, 3, 4]
        go_on.set()
        gockpt.wait()
    assert gockpt.verify(there(), 1).ok
    run.saved(options=options).check()
    assert gockpt.steps("ckpts") == [4, 5]


@when("A damaged checkpoint is uploaded")
def _damaged_upload(lab):
    lab.Run().saved()
    archive = Path("ckpts/step-0000000001.zip")
    with zipfile.ZipFile(archive) as entries:
        at = entries.getinfo("model/0.weight/c.0.0").header_offset + 300
    data = archive.read_bytes()
    archive.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(gockpt.ChunkCorrupt) as caught:
        gockpt.upload("ckpts", there())
    assert gockpt.steps(there()) == []
    raise caught.value


def there():
    """Return the URL of a directory that stands for an object store."""
    return f"file://{Path.cwd()}/there"


@pytest.mark.parametrize("row", TRIALS)
def test_a_row_is_true(row, table, lab):
    table.judge(table.rows_below("... while saving")[row], TRIALS[row], lab)


def test_every_row_is_tried(table):
    assert table.rows_below("... while saving").keys() == TRIALS.keys()
