"""The background in a process of its own: exact as on threads; whoever dies, only that save is lost."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

import gockpt
from gockpt import registry

SIZE = 300


@pytest.fixture(autouse=True)
def _no_process_is_left():
    """Whatever a test does, no worker outlives it."""
    yield
    for saver in list(registry.opened):
        with contextlib.suppress(gockpt.GockptError):
            saver.abort("the test ended")
        with contextlib.suppress(gockpt.GockptError):
            saver.close()
    assert children() == []


def children():
    """Return the process ids of this process's children."""
    return [int(n) for n in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def adamw(fused):
    def build():
        model = torch.nn.Sequential(
            torch.nn.Linear(60, SIZE), torch.nn.BatchNorm1d(SIZE), torch.nn.Linear(SIZE, 60)
        )
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)

    return build


def sgd():
    model = torch.nn.Linear(SIZE, SIZE)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def update(model, optimizer, _step):
    first = next(model.parameters())
    optimizer.zero_grad()
    model(torch.randn(4, first.shape[1])).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("build", "window"),
    [(adamw(fused=True), 1), (adamw(fused=True), 4), (adamw(fused=False), 4), (sgd, 4)],
    ids=["at-once", "fused", "plain", "sgd"],
)
def test_what_is_published_is_what_a_blocking_save_would_have_written(harness, build, window):
    extra = {"list": [1, 2.5, float("nan"), "ä"], "tensor": torch.arange(5), "number": -0.0}
    with harness.closing():
        loop = harness.Loop(build, update, every=5, window=window, extra=extra, worker="process", keep=3)
        saved = loop.run(15).finish()
    assert [(s.step, s.attempts) for s in saved] == [(5, 1), (10, 1), (15, 1)]
    assert {s.window for s in saved} == {window}
    assert not any(s.late_parts for s in saved[1:])
    if window > 1:
        assert {"replay", "write", "commit", "copy", "stall"} <= {s.lane for s in loop.handles[-1].timeline()}


def test_a_callback_of_the_capture_may_wait_for_the_outcome(fixture):
    run = fixture()
    run.loop.run(2)
    handle, seen = run.loop.handles[-1], threading.Event()
    handle.captured.add_done_callback(lambda _: handle.result(30) and seen.set())
    run.loop.tick()
    update(run.loop.model, run.loop.optimizer, 7)  # it waits for the last copies
    (saver,) = registry.opened
    saver.close()
    assert seen.is_set()


def test_compression_and_retention_are_the_workers(harness):
    with harness.closing():
        loop = harness.Loop(sgd, update, every=2, window=2, worker="process", keep=2, compression="zstd")
        for _ in range(4):
            loop.run(2)
            loop.handles[-1].result(60)
            loop.check(loop.step)
        gockpt.wait()
        assert gockpt.steps(loop.path) == [6, 8]
        assert loop.handles[-1].progress().phase == "durable"
        with gockpt.open(loop.path) as found:
            names = list(found)
        assert "model/weight" in names


def test_a_step_saved_again_and_a_run_that_goes_on(harness):
    with harness.closing():
        loop = harness.Loop(sgd, update, every=3, window=3, worker="process")
        loop.run(3).handles[-1].result(60)
        loop.step = 0
        saved = loop.run(3).handles[-1].result(60)
        assert saved.seq == 2
        loop.check(3)


def parts():
    """Return the one checkpointer's engine, its save and its worker process."""
    (saver,) = registry.opened
    engine = saver._engine
    return engine, engine._save, engine._background._worker


class Fixture:
    """A run that saves with a worker process every 3 steps, in windows of 3."""

    def __init__(self, harness, **options):
        more = {"window": 3, "worker": "process", "keep": 4, **options}
        self.loop = harness.Loop(adamw(fused=True), update, every=3, **more)
        self.loop.run(3).handles[-1].result(60)
        self.worker = parts()[2]

    def stop(self, timeout):
        """Stop the worker, which then has ``timeout`` seconds: a start on a busy machine may take longer."""
        self.worker._timeout = timeout
        os.kill(self.worker.pid, signal.SIGSTOP)

    def goes_on(self):
        """Fail unless the next save is exact, from whichever worker."""
        loop = self.loop
        loop.run(3 - loop.step % 3 or 3)
        result = loop.handles[-1].result(60)
        assert result.step == loop.step
        loop.check(loop.step)
        assert gockpt.verify(loop.path, 3).ok


@pytest.fixture
def fixture(harness):
    return lambda **options: Fixture(harness, **options)


def gone(pid):
    """Wait until a process is gone, or is a zombie; fail after half a minute."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            poller = select.poll()  # not select(), which takes no number from 1024 up
            poller.register(fd, select.POLLIN)
            assert poller.poll(30_000), f"process {pid} is still there"
        finally:
            os.close(fd)


def fails(run, match):
    """The newest handle and the next call say it, once; training goes on."""
    handle = run.loop.handles[-1]
    error = handle.exception(60)
    assert type(error) is gockpt.WorkerError
    assert match in str(error)
    with contextlib.suppress(gockpt.WorkerError):
        gockpt.wait()
    gockpt.wait()


def test_a_worker_killed_while_idle_is_replaced(fixture, caplog):
    run = fixture()
    os.kill(run.worker.pid, signal.SIGKILL)
    run.worker._thread.join(30)
    assert "killed by signal 9 (SIGKILL); out of memory?" in caplog.text
    run.goes_on()
    assert parts()[2].pid != run.worker.pid


def test_a_worker_killed_inside_a_window(fixture):
    run = fixture()
    run.loop.run(1)
    os.kill(run.worker.pid, signal.SIGKILL)
    run.worker._thread.join(30)
    with contextlib.suppress(gockpt.WorkerError):
        run.loop.run(1)
    fails(run, "killed by signal 9 (SIGKILL); out of memory?")
    run.goes_on()


def test_a_worker_killed_while_the_capture_is_handed_over(fixture):
    """The closing goes on as if nothing were amiss; the true reason is on its way."""
    run = fixture()
    run.loop.run(2)
    engine, save, _ = parts()
    with engine._changed:  # whoever has to say how the save ended waits for this lock
        os.kill(run.worker.pid, signal.SIGKILL)
        run.worker._thread.join(30)
        run.loop.tick()
        save.settle()
        assert save.job.closed
    fails(run, "killed by signal 9 (SIGKILL); out of memory?")
    assert engine._tasks._thread.is_alive()
    run.goes_on()


def test_a_worker_killed_after_the_capture(fixture):
    run = fixture()
    run.loop.run(2)
    os.kill(run.worker.pid, signal.SIGSTOP)
    run.loop.tick()
    update(run.loop.model, run.loop.optimizer, 7)  # it waits for the last copies
    os.kill(run.worker.pid, signal.SIGKILL)
    fails(run, "killed by signal 9 (SIGKILL); out of memory?")
    run.goes_on()
    assert [e.name for e in Path(run.loop.path).iterdir() if "partial" in e.name] == []


@pytest.mark.parametrize("ticks", [1, 3])
def test_a_worker_that_hangs_is_killed(fixture, ticks):
    run = fixture()
    run.stop(3)
    with contextlib.suppress(gockpt.WorkerError):
        run.loop.run(ticks)
    run.worker._thread.join(30)
    fails(run, "gave no sign of life for 3 s and was killed")
    run.goes_on()


def test_a_worker_that_was_stopped_for_a_while_goes_on(fixture):
    run = fixture()
    os.kill(run.worker.pid, signal.SIGSTOP)
    run.loop.run(3)
    os.kill(run.worker.pid, signal.SIGCONT)
    assert run.loop.handles[-1].result(60).step == 6
    run.loop.check(6)
    assert parts()[2] is run.worker


def test_a_worker_without_memory(fixture):
    """It can't map what it is given: that save fails and says so; the next one, with memory, works."""
    run = fixture()
    resource.prlimit(run.worker.pid, resource.RLIMIT_AS, (1 << 20, resource.RLIM_INFINITY))
    save = parts()[1]
    save.memory.release()  # the next save makes its arenas anew
    save.drop()
    with contextlib.suppress(gockpt.SaveError):
        run.loop.run(3)
    error = run.loop.handles[-1].exception(60)
    assert isinstance(error, gockpt.SaveError), error
    with contextlib.suppress(gockpt.SaveError):
        gockpt.wait()
    if (
        run.worker.error is None
    ):  # it was told so in time; else it was the compiler's memory, which ends a process
        assert "can't reserve" in str(error)
        os.kill(run.worker.pid, signal.SIGKILL)
        run.worker._thread.join(30)
    run.goes_on()


def test_a_worker_killed_while_it_writes(fixture):
    """Whatever it had reached: that save is published as a whole, or not at all and said to be so."""
    run = fixture()
    run.loop.run(2)
    handle = run.loop.handles[-1]
    run.loop.tick()
    while not any("partial" in name for name in os.listdir(run.loop.path)) and not handle.done():
        threading.Event().wait(0.001)
    os.kill(run.worker.pid, signal.SIGKILL)
    error = handle.exception(60)
    assert error is None or type(error) is gockpt.WorkerError
    if error is None:
        run.loop.check(6)
    else:
        assert "killed by signal 9" in str(error)
        fails(run, "killed by signal 9")
    run.worker._thread.join(30)
    run.goes_on()
    assert [e.name for e in Path(run.loop.path).iterdir() if "partial" in e.name] == []


@pytest.mark.parametrize(
    ("program", "words"), [("/nowhere/python", "can't be started"), ("/bin/false", "ended with status 1")]
)
def test_a_worker_that_does_not_start(fixture, monkeypatch, program, words):
    run = fixture()
    os.kill(run.worker.pid, signal.SIGKILL)
    run.worker._thread.join(30)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", program)
        with pytest.raises(gockpt.WorkerError, match=words):  # noqa: PT012 - by whichever call comes next
            run.loop.run(3)
            gockpt.wait()
        handle = parts()[0].handle
        assert handle.step == 6
        assert words in str(handle.exception(60))
        with contextlib.suppress(gockpt.WorkerError):  # of the window after that, if one was begun
            gockpt.wait()
        for thread in threading.enumerate():  # those that told of the worker's end are ending
            if thread.name.startswith(("gockpt-worker", "gockpt-outbox")):
                thread.join(30)
        before = open_files(), threading.active_count()
        with pytest.raises(gockpt.WorkerError, match=words):
            gockpt.Checkpointer(
                torch.nn.Linear(2, 2), None, "other", options=gockpt.Options(worker="process")
            )
        assert (open_files(), threading.active_count()) == before
    run.goes_on()


def test_a_worker_that_can_not_be_told_is_ended(fixture):
    """A defect here, or no memory to say it in: nobody waits for what was never sent."""
    run = fixture()
    run.worker.post(object())
    run.worker._thread.join(30)
    assert "can't be told what to do: object is no message" in str(run.worker.error)
    run.goes_on()


def test_a_worker_that_says_what_is_no_message_is_ended(fixture, monkeypatch):
    run = fixture()
    monkeypatch.setattr(run.worker, "_hear", lambda _: {}["a defect"])
    run.worker._thread.join(30)  # the next sign of life is the last
    assert "said what can't be understood, and was killed" in str(run.worker.error)
    run.goes_on()


def test_a_worker_that_hangs_at_its_end_is_killed(fixture):
    run = fixture()
    run.stop(1)
    gockpt.wait()
    (saver,) = registry.opened
    saver.close()
    gone(run.worker.pid)


def test_a_replay_that_is_wrong_is_found_there_too(fixture):
    run = fixture()
    run.loop.run(2)
    save = parts()[1]
    piece = next(p for p in save.attempt.cut.pieces if p.sent)
    stretch = piece.stretches[0]
    save.attempt.settle()
    save.attempt._arena.view(stretch.offset, 4)[:] ^= 255
    run.loop.run(2)
    gockpt.wait()
    handle = run.loop.handles[-1]
    assert handle.attempts == 2
    assert "did not match the live state" in handle.events[-1] or "did not match" in str(handle.events)
    run.loop.check(handle.step)


def test_errors_are_of_the_same_kind(harness, fixture):
    run = fixture()
    Path(run.loop.path, "step-0000000006").write_text("mine")
    with contextlib.suppress(gockpt.StorageError):
        run.loop.run(3)
    error = run.loop.handles[-1].exception(60)
    assert type(error) is gockpt.StorageError
    assert "move it away" in str(error)
    with contextlib.suppress(gockpt.StorageError):
        gockpt.wait()
    run.goes_on()


def test_a_path_that_is_in_use_is_refused_at_once(harness):
    path = harness.directory()
    model = harness.Tensors({"a": torch.randn(300)})
    options = gockpt.Options(worker="process")
    with gockpt.Checkpointer(model, None, path, options=options) as saver:
        saver.after_step(1).result(60)
        with pytest.raises(gockpt.PathBusy, match=path):
            gockpt.prune(path, 1)
    file = Path(path) / "file"
    file.write_text("")
    with pytest.raises(gockpt.StorageError):
        gockpt.Checkpointer(model, None, file, options=options)


def open_files():
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(link.readlink()).split("[")[0].split(":")[0])
    return sorted(found)


def test_nothing_is_left_behind(harness):
    def once():
        with harness.closing():
            loop = harness.Loop(sgd, update, every=2, window=2, worker="process")
            loop.run(4)
            os.kill(parts()[2].pid, signal.SIGKILL)
            parts()[2]._thread.join(30)
            with contextlib.suppress(gockpt.WorkerError):
                gockpt.wait()
            loop.run(2)
            loop.handles[-1].result(60)

    once()
    before = open_files(), {t.name for t in threading.enumerate()}
    once()
    assert (open_files(), {t.name for t in threading.enumerate()}) == before
    assert children() == []


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_holds_nothing_of_it(fixture):
    """As data-loader workers do: it is forked inside a window, and ends as any process does."""
    run = fixture()
    run.loop.run(1)
    sockets = [n for n in open_files() if n == "socket"]
    child = os.fork()
    if not child:
        held = open_files()
        bad = any("gockpt-arena" in n for n in held) or held.count("socket") >= len(sockets)
        os._exit(bad)
    assert os.waitpid(child, 0)[1] == 0
    run.loop.run(2)
    assert run.loop.handles[-1].result(60).step == 6
    run.loop.check(6)
    assert parts()[2] is run.worker


# -- the trainer's own end

TRAINER = """
import ctypes, os, signal, sys, threading
import torch
import gockpt

path = sys.argv[1]
torch.manual_seed(1)
torch.set_num_threads(1)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as command line tools have it
model = torch.nn.Sequential(torch.nn.Linear(60, 3000), torch.nn.Linear(3000, 600))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
options = gockpt.Options(window=3, cpu_threads=1, nice=0, worker="process")
saver = gockpt.Checkpointer(model, optimizer, path, every=3, options=options)
worker = saver._engine._background._worker

def train(steps):
    for step in steps:
        optimizer.zero_grad()
        model(torch.randn(4, 60)).square().mean().backward()
        optimizer.step()
        handle = saver.after_step(step)
    return handle

train(range(1, 4)).result(60)

def last_words(*more):
    held = {f"model/{name}": value for name, value in model.state_dict().items()}
    for name, p in model.named_parameters():
        held |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state[p].items()}
    torch.save(held, path + "-held")
    print(worker.pid, *more, flush=True)

def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""


def trainer(body, path, **more):
    """Run the training above, then ``body``; return what it said last, once it is gone."""
    command = [sys.executable, "-c", TRAINER + textwrap.dedent(body), str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/", **more)
    try:
        said = process.stdout.readline().split()
        process.wait(60)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert said, "it ended without a word"
    return [int(word) for word in said]


def holds(path, step):
    """The newest checkpoint is what the trainer held at its end, bit for bit, and nothing else is left."""
    held = torch.load(path + "-held")
    os.unlink(path + "-held")
    assert gockpt.steps(path)[-1] == step
    assert gockpt.verify(path, step).ok
    with gockpt.open(path, step) as found:
        assert {name for name in found if name.startswith(("model/", "optimizer/"))} == set(held)
        assert all(torch.equal(found[name][...], value) for name, value in held.items())
    assert [e.name for e in Path(path).iterdir() if "partial" in e.name or "owner" in e.name] == []


def test_a_trainer_killed_after_the_capture(harness):
    """The worker is stopped as soon as it has the capture, so that all it does comes after the death.

    Children of the trainer live on, a data loader's and one of which Python knew nothing: neither keeps
    the worker. A run that is started again waits for what is still published.
    """
    path = harness.directory()
    worker, *children = trainer(
        """
        child = os.fork()
        if not child:
            os.close(1)
            signal.alarm(60)
            threading.Event().wait()
        libc = ctypes.PyDLL(None)
        other = libc.fork()
        if not other:
            libc.close(1)
            libc.alarm(60)
            libc.pause()
        train(range(4, 7)).captured.result(60)
        os.kill(worker.pid, signal.SIGSTOP)
        last_words(child, other)
        die()
        """,
        path,
    )
    timer = threading.Timer(0.5, os.kill, (worker, signal.SIGCONT))
    timer.start()
    try:
        model = harness.Tensors({"a": torch.randn(300)})
        with gockpt.Checkpointer(model, None, path, options=gockpt.Options(existing="continue")) as saver:
            gone(worker)
            holds(path, 6)
            saver.after_step(7).result(60)
    finally:
        timer.join()
        for child in children:
            os.kill(child, signal.SIGKILL)  # still there
    assert gockpt.steps(path) == [3, 6, 7]


def test_a_trainer_killed_when_the_capture_was_only_sent(harness):
    """What stands in the socket when the trainer dies is still taken."""
    path = harness.directory()
    (worker,) = trainer(
        """
        train(range(4, 6))
        os.kill(worker.pid, signal.SIGSTOP)
        train(range(6, 7))
        saver._engine._save.attempt.let_overwrite(None)
        with saver._engine._changed:
            saver._engine._save.settle()
        assert saver.handle.progress().phase == "captured"
        while worker._outbox._queue:
            threading.Event().wait(0.01)
        last_words()
        die()
        """,
        path,
    )
    assert gockpt.steps(path) == [3]
    os.kill(worker, signal.SIGCONT)
    gone(worker)
    holds(path, 6)


def test_a_trainer_killed_before_it_has_read_what_it_was_told(harness):
    """The stream then ends in an error, not in an end."""
    path = harness.directory()
    (worker,) = trainer(
        """
        import fcntl, select, struct, termios
        stuck, unread = threading.Event(), select.poll()
        worker._hear = lambda _: (stuck.set(), threading.Event().wait())
        stuck.wait()
        unread.register(worker._sock, select.POLLIN)
        unread.poll()
        train(range(4, 7))
        saver._engine._save.attempt.let_overwrite(None)
        with saver._engine._changed:
            saver._engine._save.settle()
        while worker._outbox._queue:
            threading.Event().wait(0.01)
        while struct.unpack("i", fcntl.ioctl(worker._sock, termios.TIOCOUTQ, bytes(4)))[0]:
            pass
        os.kill(worker.pid, signal.SIGSTOP)
        last_words()
        die()
        """,
        path,
    )
    os.kill(worker, signal.SIGCONT)
    gone(worker)
    holds(path, 6)


def test_a_trainer_killed_before_the_capture(harness):
    path = harness.directory()
    (worker,) = trainer("train(range(4, 6)); last_words(); die()", path)
    gone(worker)
    assert gockpt.steps(path) == [3]
    assert gockpt.verify(path, 3).ok
    assert [e.name for e in Path(path).iterdir() if "partial" in e.name or "owner" in e.name] == []
    os.unlink(path + "-held")


def test_signals_to_the_whole_group_are_for_the_trainer(harness):
    """As a terminal sends at Ctrl-C, or a scheduler before it ends a job: the last save is still made.

    What it ends with: a normal end of the interpreter leaves no process.
    """
    path = harness.directory()
    worker, same = trainer(
        """
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        came = []
        for number in numbers:
            signal.signal(number, lambda number, _: came.append(number))
        train(range(4, 5))
        for number in numbers:
            os.killpg(0, number)
        train(range(5, 7))
        assert set(came) == set(numbers)
        last_words(int(saver._engine._background._worker is worker))
        """,
        path,
        start_new_session=True,
    )
    assert same == 1
    assert not Path(f"/proc/{worker}").exists()
    holds(path, 6)
