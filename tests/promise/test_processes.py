"""What happens to a process: killed, interrupted, ended, forked; and two of them in one path."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import gockpt

TRAIN = """
import ctypes, hashlib, json, os, random, select, signal, sys, threading
import torch
import gockpt

# A process that was started in the background of a script ignores Ctrl-C, and so would this one.
signal.signal(signal.SIGINT, signal.default_int_handler)

EVERY = 3

def build():
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(50, 300), torch.nn.BatchNorm1d(300), torch.nn.Linear(300, 50))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)

def step_once(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(4, 50)).square().mean().backward()
    optimizer.step()

def digest(model, optimizer):
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(tensor.numpy().tobytes())
    for key, state in sorted(optimizer.state_dict()["state"].items()):
        for name, tensor in sorted(state.items()):
            found.update(tensor.numpy().tobytes())
    return found.hexdigest()

def options(**more):
    return gockpt.Options(**{"window": 3, "cpu_threads": 1, "nice": 0, "worker": WORKER, **more})

def warm():
    # What is imported, compiled and calibrated before a fork need not be in each child.
    from gockpt.replay.rules import rule_for
    torch.set_num_threads(1)
    model, optimizer = build()
    step_once(model, optimizer)
    parameter = next(model.parameters())
    rule_for(optimizer, optimizer.param_groups[0], parameter, optimizer.state[parameter])
"""


WORKERS = ("thread", "process")


def script(body, worker):
    """Return a program: the training above, then ``body``."""
    return f"WORKER = {worker!r}\n" + TRAIN + textwrap.dedent(body)


def start(body, *arguments, worker="thread", **more):
    command = [sys.executable, "-W", "error::UserWarning", "-c", script(body, worker), *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", **more
    )


def finish(process):
    out, errors = process.communicate(timeout=120)
    return process.returncode, out, errors


# -- SIGKILL

KILLS = """
path, seed, kills = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
warm()
delays = random.Random(seed)
reference, digests = build(), {0: None}

def reference_digest(step):
    # The same run, never interrupted: only the random numbers of the steps themselves are drawn.
    while len(digests) <= step:
        step_once(*reference)
        digests[len(digests)] = digest(*reference)
    return digests[step]

def check():
    # Every complete checkpoint verifies; the newest loads and is the reference's state, bit for bit.
    for number in gockpt.steps(path):
        report = gockpt.verify(path, number)
        assert report.ok, report.problems
    if not gockpt.steps(path):
        return 0
    model, optimizer = build()
    state = torch.get_rng_state()
    restored = gockpt.load(path, model, optimizer)
    torch.set_rng_state(saved_rng)
    expected = reference_digest(restored.step)
    globals()["saved_rng"] = torch.get_rng_state()
    assert digest(model, optimizer) == expected, restored.step
    return restored.step

def train(ready):
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # never outlives its parent
    model, optimizer = build()
    step = 0
    if gockpt.steps(path):
        step = gockpt.load(path, model, optimizer).step
    while True:
        step += 1
        step_once(model, optimizer)
        try:
            handle = gockpt.save_overlapped(model, optimizer, path, step=step, every=EVERY, options=options())
        except gockpt.UsageError:
            # The worker process of a run that was killed has published just now: this run goes on from there.
            step = gockpt.load(path, model, optimizer).step
            continue
        if handle is not None and ready is not None:
            handle.add_done_callback(lambda _, ready=ready: os.write(ready, b"!"))
            ready = None

torch.manual_seed(5); build(); saved_rng = torch.get_rng_state()
reached = []
for turn in range(kills):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            train(write)
        finally:
            os._exit(3)
    os.close(write)
    # From before the first publication of this child to well after it.
    if delays.random() < 0.8:
        assert os.read(read, 1) == b"!"
    select.select([], [], [], delays.uniform(0.0, 0.12))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), status
    os.close(read)
    reached.append(check())
print(json.dumps(reached))
"""


def check_kills(path, seed, kills, worker="thread"):
    code, out, errors = finish(start(KILLS, path, seed, kills, worker=worker))
    assert code == 0, errors
    reached = json.loads(out)
    assert reached == sorted(reached), "the newest never goes back"
    assert len(set(reached)) > kills // 2, "it goes on from kill to kill"
    # The next writer sweeps up what the killed ones left.
    model = torch.nn.Linear(2, 2)
    with gockpt.Checkpointer(model, None, path, options=gockpt.Options(existing="continue")) as saver:
        saver.after_step(reached[-1] + 1)
    left = [entry.name for entry in Path(path).iterdir() if "partial" in entry.name]
    assert left == []


@pytest.mark.parametrize("worker", WORKERS)
def test_killed_at_random_moments(harness, worker):
    """Continuous saving, killed again and again; each run resumes from the newest and goes on.

    What a worker process holds when its trainer is killed is published behind the checks.
    """
    check_kills(harness.directory(), 1, 8, worker)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.timeout(1200)
def test_killed_at_very_many_random_moments(tmp_path, seed):
    check_kills(tmp_path / "checkpoints", 100 + seed, 150)


# -- Ctrl-C and exits: one program forks one child for each ending, and tells how they ended

ENDINGS = {
    "interrupt": "loop(overlapped); os.kill(os.getpid(), signal.SIGINT); threading.Event().wait(60)",
    "exception": "loop(overlapped); raise ZeroDivisionError",
    "in with": """
with gockpt.Checkpointer(model, optimizer, path, every=EVERY, options=options()) as saver:
    loop(saver.after_step)
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(60)
""",
    "end": "loop(overlapped)",
    "exit": "loop(overlapped); sys.exit(7)",
    "end of with": """
with gockpt.Checkpointer(model, optimizer, path, every=EVERY, options=options()) as saver:
    loop(saver.after_step)
""",
    "after a step": "loop(overlapped); step_once(model, optimizer)",
    "forgotten": """
saver = gockpt.Checkpointer(model, optimizer, path, every=EVERY, options=options())
loop(saver.after_step)
del saver
""",
}

LOOP = """
root, endings = sys.argv[1], json.loads(sys.argv[2])
warm()
children = {}
for how, body in endings.items():
    path, output = os.path.join(root, how), os.path.join(root, how + ".out")
    children[how] = os.fork()
    if not children[how]:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        signal.alarm(60)
        fd = os.open(output, os.O_CREAT | os.O_WRONLY)
        os.dup2(fd, 1); os.dup2(fd, 2)
        break
else:
    told = {how: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for how, child in children.items()}
    said = {how: open(os.path.join(root, how + ".out")).read() for how in told}
    print(json.dumps({how: [told[how], said[how]] for how in told}))
    sys.exit()

model, optimizer = build()

def loop(save):
    for step in range(1, 6):
        step_once(model, optimizer)
        handle = save(step)
        if step == 3:
            handle.result(30)
    # The window of step 6 is open, two of its three ticks are done.
    assert handle.progress().phase == "open", handle
    print("digest", digest(model, optimizer), flush=True)

def overlapped(step):
    return gockpt.save_overlapped(model, optimizer, path, step=step, every=EVERY, options=options())

exec(body)
"""


@pytest.fixture(scope="module", params=WORKERS)
def endings(harness, request):
    """Return how each ending went: its directory, exit code and output."""
    root = harness.directory()
    code, out, errors = finish(start(LOOP, root, json.dumps(ENDINGS), worker=request.param))
    assert code == 0, errors
    return {how: (Path(root, how), *told) for how, told in json.loads(out).items()}


def check_steps(path, expected):
    assert gockpt.steps(path) == expected
    for step in expected:
        assert gockpt.verify(path, step).ok
    assert [e.name for e in Path(path).iterdir() if "partial" in e.name] == []


@pytest.mark.parametrize(
    ("how", "status"), [("interrupt", -signal.SIGINT), ("in with", -signal.SIGINT), ("exception", 1)]
)
def test_an_interrupted_run_gives_the_open_window_up(endings, how, status):
    path, code, output = endings[how]
    assert code == status, output
    assert ("KeyboardInterrupt" in output) == (how != "exception")
    assert "digest" in output
    check_steps(path, [3])


@pytest.mark.parametrize(("how", "status"), [("end", 0), ("exit", 7), ("end of with", 0), ("forgotten", 0)])
def test_the_normal_end_closes_the_open_window_at_the_last_tick(endings, how, status):
    path, code, output = endings[how]
    assert code == status, output
    check_steps(path, [3, 5])
    model = torch.nn.Sequential(torch.nn.Linear(50, 300), torch.nn.BatchNorm1d(300), torch.nn.Linear(300, 50))
    optimizer = torch.optim.AdamW(model.parameters())
    assert gockpt.load(path, model, optimizer).step == 5
    namespace = {}
    exec(TRAIN, namespace)
    assert f"digest {namespace['digest'](model, optimizer)}" in output


def test_the_end_after_an_update_that_no_tick_followed(endings):
    """Nothing is published under a step it is not of; the log says what to do."""
    path, code, output = endings["after a step"]
    assert code == 0, output
    assert "optimizer stepped after" in output
    check_steps(path, [3])


# -- two processes

HOLD = """
path = sys.argv[1]
model, optimizer = build()
step_once(model, optimizer)
gockpt.save_overlapped(model, optimizer, path, step=1, options=options(window=1)).result(30)
print("holding", flush=True)
sys.stdin.read()
"""


def test_two_processes_into_one_path(harness):
    path = harness.directory()
    model = harness.Tensors({"a": torch.randn(300)})
    holder = start(HOLD, path, stdin=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == "holding\n"
        with pytest.raises(gockpt.PathBusy, match=path):
            gockpt.save_overlapped(model, None, path, step=2)
        assert gockpt.steps(path) == [1]  # reading is always possible
        assert gockpt.verify(path).ok
        with harness.closing():
            gockpt.save_overlapped(model, None, harness.directory(), step=2)
    finally:
        holder.communicate(timeout=60)
    with pytest.raises(gockpt.UsageError, match="the newest: step 1, "):
        gockpt.save_overlapped(model, None, path, step=2)
    assert gockpt.steps(path) == [1]
    with harness.closing():
        options = gockpt.Options(existing="continue")
        gockpt.save_overlapped(model, None, path, step=2, options=options).result(30)
    assert gockpt.steps(path) == [1, 2]


# -- forks


def forked(child):
    """Run ``child`` in a fork; return what it wrote. It must end within a minute."""
    read, write = os.pipe()
    process = os.fork()
    if not process:
        os.close(read)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        # As data loader workers do: OpenMP's threads do not survive a fork, and who calls them hangs.
        torch.set_num_threads(1)
        try:
            os.write(write, repr(child()).encode())
        except BaseException as error:  # noqa: BLE001 - told to the parent
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    assert os.waitpid(process, 0)[1] == 0
    return told


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("worker", WORKERS)
def test_a_fork_inside_a_window_leaves_the_parents_save_alone(harness, worker):
    """As data loader workers do: the child trains nothing and may not save; the parent goes on."""

    def build():
        model = harness.Tensors({"a": torch.randn(1500)})
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def update(model, optimizer, step):
        model.a.grad = torch.randn(1500)
        optimizer.step()

    with harness.closing():
        loop = harness.Loop(build, update, every=6, window=4, worker=worker)
        loop.run(4)
        assert "only the parent may call" in forked(loop.boundary)
        assert forked(lambda: torch.ones(3).sum().item()) == "3.0"
        # An optimizer that steps in the child is the child's own affair.
        assert forked(lambda: update(loop.model, loop.optimizer, 0)) == "None"
        loop.run(3)
        saved = loop.finish()
    assert [(s.step, s.window, s.attempts, s.late_parts) for s in saved] == [(6, 4, 1, {})]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("worker", WORKERS)
def test_data_loader_workers_forked_inside_a_window(harness, worker):
    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            return torch.full((30,), float(index))

    def build():
        model = torch.nn.Linear(30, 40)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    batches = iter(())

    def update(model, optimizer, step):
        nonlocal batches
        batch = next(batches, None)
        if batch is None:
            loader = torch.utils.data.DataLoader(
                Numbers(), batch_size=4, num_workers=1, multiprocessing_context="fork"
            )
            batches = iter(loader)
            batch = next(batches)
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    with harness.closing():
        loop = harness.Loop(build, update, every=5, window=4, worker=worker)
        saved = loop.run(11).finish()
    assert [(s.step, s.attempts) for s in saved] == [(5, 1), (10, 1)]


# -- memory

MEMORY = """
path, window, every = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(2)
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        shapes = [(2048, 2048)] * 3 + [(512, 1024)] * 4 + [(1000,)] * 10
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(s) * 0.01) for s in shapes])
model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
state = 3 * sum(4 * p.numel() for p in model.parameters())
generator = torch.Generator().manual_seed(1)
def update():
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.empty_like(p)
        p.grad.normal_(generator=generator)
    optimizer.step()
def figure(name):
    for line in open("/proc/self/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024
# Everything that a first save loads and compiles, at a size that does not count.
small = torch.nn.Linear(100, 100)
small_optimizer = torch.optim.AdamW(small.parameters(), fused=True)
for step in range(1, 2 * every + 1):
    small(torch.randn(2, 100)).sum().backward()
    small_optimizer.step()
    gockpt.save_overlapped(small, small_optimizer, path + "/small", step=step, every=every,
                           options=options(window=window))
gockpt.wait()
update(); update()
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
before = figure("VmRSS")
saved = []
for step in range(1, 3 * every + 1):
    update()
    handle = gockpt.save_overlapped(model, optimizer, path + "/big", step=step, every=every,
                                    options=options(window=window, when_busy="wait"))
    if handle is not None and step % every == 0:
        saved.append(handle)
gockpt.wait()
results = [h.result(60) for h in saved]
print(json.dumps({
    "state": state, "growth": figure("VmHWM") - before,
    "held": max(r.host_memory for r in results), "ring": max(h.plan.ring_bytes for h in saved),
    "windows": [r.window for r in results], "late": [len(r.late_parts) for r in results],
    "attempts": [r.attempts for r in results],
}))
"""


@pytest.mark.parametrize(("window", "every"), [(1, 3), (4, 4)])
def test_host_memory_of_a_save_is_the_state_and_the_ring(harness, window, every):
    """Both what gockpt says it holds and what the process really grew by, at its peak."""
    code, out, errors = finish(start(MEMORY, harness.directory(), window, every))
    assert code == 0, errors
    found = json.loads(out)
    assert found["state"] > 170_000_000
    assert found["windows"] == [window] * 3
    assert found["attempts"] == [1] * 3
    assert found["late"] == [0] * 3
    limit = 1.15 * found["state"] + found["ring"]
    assert found["held"] <= limit
    assert found["growth"] <= limit
    assert (found["ring"] > 0) == (window > 1)
