"""A signal that announces the end of the process: the state is durable before its former handler runs."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import gockpt
from gockpt import preemption
from gockpt.storage.local.transaction import Transaction

PROGRAM = """
import os, sys, time
import torch, gockpt
torch.set_num_threads(1)
path, grace = sys.argv[1], float(sys.argv[2])
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(30, 60), torch.nn.BatchNorm1d(60), torch.nn.Linear(60, 30))
opt = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
sched = torch.optim.lr_scheduler.StepLR(opt, 3)

class Loader:
    seen = 0
    def state_dict(self): return {"seen": self.seen}
    def load_state_dict(self, state): self.seen = state["seen"]

loader, step = Loader(), 0
extra = {"sched": sched, "loader": loader}
if gockpt.latest(path) is not None:
    step = gockpt.load(path, model, opt, extra=extra).step
    # All of it is of one step.
    assert loader.seen == step == sched.last_epoch == int(opt.state[model[0].weight]["step"])
    assert step == int(model[1].num_batches_tracked)
options = gockpt.Options(on_signal=("SIGTERM",), grace=grace, cpu_threads=1, window=1)
while True:
    loader.seen += 1
    opt.zero_grad()
    model(torch.randn(4, 30)).square().mean().backward()
    opt.step()
    sched.step()
    step += 1
    gockpt.save_overlapped(model, opt, path, step=step, every=1000000, extra=extra, options=options)
    print(step, flush=True)
    if step % 40 == 0:  # an evaluation
        model.eval()
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            with torch.no_grad():
                model(torch.randn(4, 30))
        model.train()
"""


def check_random_moments(path, seed, moments):
    """Run the program again and again, each until SIGTERM; each goes on from the last step of the former."""
    rng = random.Random(seed)
    newest = 0
    for _ in range(moments):
        command = [sys.executable, "-c", PROGRAM, path, "30"]
        with (
            open("stderr", "w+") as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as run,
        ):
            told = [run.stdout.readline() for _ in range(rng.randrange(1, 60))]
            time.sleep(rng.random() * 0.02)
            run.send_signal(signal.SIGTERM)
            out = run.stdout.read()  # what communicate() returns lacks what readline() has buffered
            run.wait(100)
            errors = Path("stderr").read_text()
        assert run.returncode == -signal.SIGTERM, errors
        steps = [int(step) for step in (*told, *out.split())]
        assert steps[0] == newest + 1
        newest = gockpt.latest(path)
        # The step that is saved is the last one that was told, or the one in which the signal came.
        assert newest - steps[-1] in {0, 1}, errors
        assert gockpt.verify(path, newest).ok


def test_random_moments(harness):
    check_random_moments(harness.directory(), 1, 3)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_two_hundred_random_moments(harness):
    check_random_moments(harness.directory(), 2, 200)


# -- in this process, with a handler of ours as the former one


def build():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(9, 9), torch.nn.BatchNorm1d(9))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def update(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(4, 9)).square().mean().backward()
    optimizer.step()


@pytest.fixture
def told():
    """What the former handler saw: the steps that were durable when it ran."""
    found = []
    former = signal.signal(signal.SIGUSR1, lambda *_: found.append(gockpt.steps("ckpts")))
    yield found
    signal.signal(signal.SIGUSR1, former)


class Run:
    def __init__(self, *, every=1000, grace=20.0, **options):
        self.model, self.optimizer = build()
        self.extra = {"n": 0}
        self.options = gockpt.Options(on_signal=("SIGUSR1",), grace=grace, window=1, **options)
        self.every, self.step = every, 0

    def tick(self):
        update(self.model, self.optimizer)
        self.step += 1
        self.extra["n"] = self.step
        return gockpt.save_overlapped(
            self.model, self.optimizer, "ckpts",
            step=self.step, every=self.every, extra=self.extra, options=self.options,
        )  # fmt: skip


def kill():
    os.kill(os.getpid(), signal.SIGUSR1)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_next_step_is_saved(told):
    run = Run()
    run.tick()
    run.tick()
    kill()
    assert told == []
    run.tick()
    assert told == [[3]]
    run.tick()
    kill()
    run.tick()
    assert told == [[3], [3, 5]]  # and again: the handler stays
    gockpt.wait()
    assert gockpt.open("ckpts").extra["n"] == 5


@pytest.mark.parametrize("every", [None, 1, 2])
def test_a_step_that_is_saved_anyway_is_not_saved_twice(told, every):
    run = Run(every=every, when_busy="wait")
    run.tick()
    kill()
    assert run.tick().step == 2
    assert told == [gockpt.steps("ckpts")]
    assert told[0][-1] == 2


def test_no_step_comes_and_the_last_one_stands(told, caplog):
    run = Run()
    for _ in range(3):
        run.tick()
    run.model.eval()
    run.extra["n"] = 99  # of the step that is to come
    torch.rand(5)
    kill()
    wait_until(lambda: told)
    assert told == [[3]]
    assert gockpt.open("ckpts").extra["n"] == 3


def test_a_look_while_the_disk_takes_its_time(told, monkeypatch):
    """The save is waited for, however often the main thread is made to look meanwhile."""
    run = Run()
    run.tick()
    looked, enough = [], threading.Event()
    look, write = preemption._look, Transaction.write_chunks

    def counted():
        looked.append(preemption._request.saving)
        look()
        if len(looked) == 3:
            enough.set()

    def write_chunks(*arguments):
        assert enough.wait(60)
        return write(*arguments)

    monkeypatch.setattr(preemption, "_look", counted)
    monkeypatch.setattr(preemption, "LOOK", 0.01)
    monkeypatch.setattr(preemption, "LEAST_PATIENCE", 0.01)
    monkeypatch.setattr(Transaction, "write_chunks", write_chunks)
    kill()
    run.tick()
    assert told == [[gockpt.latest("ckpts")]]
    assert looked[-3:] == [True] * 3


@pytest.mark.parametrize("how", ["all of it", "an update", "a buffer"])
def test_no_step_comes_and_the_last_one_does_not_stand(told, caplog, how):
    run = Run(grace=1.5)
    for _ in range(3):
        run.tick()
    if how == "all of it":
        for p in run.model.parameters():
            p.data.mul_(0.5)  # averaged weights, for the evaluation
    elif how == "a buffer":
        run.model[1].running_mean.add_(1)
    else:
        update(run.model, run.optimizer)
    kill()
    wait_until(lambda: told)
    assert told == [[]]
    assert "no step of" in caplog.text
    run.tick()
    assert gockpt.finish("ckpts").step == 4


ENDED = """
import os, signal, sys, time, torch, gockpt
signal.signal(signal.SIGINT, signal.default_int_handler)
model = torch.nn.Linear(2, 2)
options = gockpt.Options(on_signal=("SIGTERM", "SIGINT", "SIGHUP"), window=1, grace=20)
for step in (1, 2, 3):
    if step == 3:
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    gockpt.save_overlapped(model, None, "ckpts", step=step, every=100, options=options)
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_process_ends_as_it_would_have(name):
    command = [sys.executable, "-c", ENDED, name]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == -getattr(signal, name), done.stderr
    assert gockpt.steps("ckpts") == [3]


def test_handlers_are_put_back(told):
    ours = signal.getsignal(signal.SIGUSR1)
    run = Run()
    run.tick()
    assert signal.getsignal(signal.SIGUSR1) is preemption._arrived
    model = torch.nn.Linear(1, 1)
    with gockpt.Checkpointer(model, None, "other", options=run.options) as other:
        other.after_step(1)
    assert signal.getsignal(signal.SIGUSR1) is preemption._arrived
    for saver in list(gockpt.registry.opened):
        saver.close()
    assert signal.getsignal(signal.SIGUSR1) is ours


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_the_former_handler(told):
    run = Run()
    run.tick()
    child = os.fork()
    if not child:
        kill()
        os._exit(len(told))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert told == []
    assert gockpt.steps("ckpts") == []


def test_elsewhere_than_in_the_main_thread_it_says_so(caplog):
    run = Run()
    thread = threading.Thread(target=run.tick)
    thread.start()
    thread.join()
    assert "main thread only" in caplog.text


# -- handlers that call the library themselves


CALLS = {
    "save": lambda run: gockpt.save_overlapped(
        run.model, run.optimizer, "ckpts", step=50, every=run.every, extra=run.extra, options=run.options
    ),
    "wait": lambda _: gockpt.wait(),
    "finish": lambda _: gockpt.finish(),
}


def of_an_update(run, monkeypatch):
    """Have the signal come inside the optimizer's step."""
    sgd = sys.modules[torch.optim.SGD.__module__]
    original = sgd._single_tensor_sgd

    def half(*arguments, **options):
        kill()
        original(*arguments, **options)

    run.optimizer.param_groups[0]["foreach"] = False
    monkeypatch.setattr(sgd, "_single_tensor_sgd", half)
    update(run.model, run.optimizer)


def of_backward(run, _):
    handle = run.model[0].weight.register_hook(lambda _: kill())
    update(run.model, run.optimizer)
    handle.remove()


def of_a_step_told(run, _):
    run.tick()
    once = iter([kill])
    run.extra["kill"] = lambda: next(once, int)() or 1  # asked for in the call of step 5, which is due


def between(run, _):
    update(run.model, run.optimizer)
    kill()


MOMENTS = {
    "update": of_an_update,
    "backward": of_backward,
    "tick": of_a_step_told,
    "behind the update": between,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_handler_calls_at_any_moment(monkeypatch, moment, call):
    """Nothing torn is saved, nothing raises or hangs, and what was asked for is done by the next step."""
    run = Run(every=5)
    run.options = gockpt.Options(window=1, when_busy="wait")
    for _ in range(3):
        run.tick()
    errors, called = [], []

    def handler(*_):
        called.append(1)
        try:
            CALLS[call](run)
        except gockpt.GockptError as error:
            errors.append(error)

    former = signal.signal(signal.SIGUSR1, handler)
    try:
        MOMENTS[moment](run, monkeypatch)
        monkeypatch.undo()
        run.step += moment != "tick"
        seen = {}
        update(run.model, run.optimizer)
        run.step += 1
        seen = {name: value.clone() for name, value in run.model.state_dict().items()}
        gockpt.save_overlapped(
            run.model,
            run.optimizer,
            "ckpts",
            step=run.step,
            every=run.every,
            extra=run.extra,
            options=run.options,
        )
    finally:
        signal.signal(signal.SIGUSR1, former)
    run.extra.pop("kill", None)
    assert errors == []
    assert called
    gockpt.finish()
    with gockpt.open("ckpts") as found:
        for name, value in seen.items():
            assert torch.equal(found[f"model/{name}"][...], value), name
