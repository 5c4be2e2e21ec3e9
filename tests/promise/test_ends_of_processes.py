"""Every way in which a process can end normally publishes what was captured, and closes an open window."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import gockpt

PROGRAM = """
import concurrent.futures, json, multiprocessing, os, sys, threading
import torch
import torch.multiprocessing as tmp
import gockpt

torch.set_num_threads(1)
root = sys.argv[1] if len(sys.argv) > 1 else None

def train(path, upto=6, every=4):
    # The window of step 8 is open at step 6, when the function returns and the model is gone.
    torch.set_num_threads(1)
    model = torch.nn.Linear(6, 6)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    options = gockpt.Options(window=3, cpu_threads=1, when_busy="wait")
    for step in range(1, upto + 1):
        model(torch.ones(1, 6)).sum().backward()
        opt.step()
        gockpt.save_overlapped(model, opt, path, step=step, every=every, options=options)

def train_and_exit(path):
    train(path)
    sys.exit(3)

def train_and_raise(path):
    train(path)
    raise ZeroDivisionError

def train_in_a_thread(path):
    threading.Thread(target=train, args=(path,)).start()

def train_in_a_thread_and_exit(path):
    threading.Thread(target=train_and_exit, args=(path,)).start()

def of_rank(rank, path):
    train(path)

def process(context, target, path):
    child = multiprocessing.get_context(context).Process(target=target, args=(path,))
    child.start()
    child.join(100)
    return child.exitcode

def pool(context, path):
    with multiprocessing.get_context(context).Pool(1) as workers:  # which are terminated at its end
        workers.apply(train, (path,))

def closed_pool(context, path):
    workers = multiprocessing.get_context(context).Pool(1)
    workers.apply(train, (path,))
    workers.close()
    workers.join()

def executor(context, path):
    context = multiprocessing.get_context(context)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as workers:
        workers.submit(train, path).result()

def forked_by_hand(target, path):
    child = os.fork()
    if not child:
        target(path)
        sys.exit(5)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

WAYS = {
    "fork": lambda path: process("fork", train, path),
    "spawn": lambda path: process("spawn", train, path),
    "forkserver": lambda path: process("forkserver", train, path),
    "exit": lambda path: process("fork", train_and_exit, path),
    "exception": lambda path: process("fork", train_and_raise, path),
    "thread": lambda path: process("fork", train_in_a_thread, path),
    "exit in a thread": lambda path: process("fork", train_in_a_thread_and_exit, path),
    "pool": lambda path: pool("fork", path),
    "closed pool": lambda path: closed_pool("fork", path),
    "executor": lambda path: executor("fork", path),
    "torch": lambda path: tmp.start_processes(of_rank, (path,), nprocs=1, start_method="fork"),
    "by hand": lambda path: forked_by_hand(train, path),
}

if __name__ == "__main__":
    train(os.path.join(root, "here"))  # what is compiled need not be in each child
    print(json.dumps({how: way(os.path.join(root, how)) for how, way in WAYS.items() if how in sys.argv[2:]}))
"""

OPEN_WINDOW = [4, 6]


def run(program, *arguments, check=0):
    done = subprocess.run(
        [sys.executable, program, *arguments], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == check, done.stderr
    return done


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    found = tmp_path_factory.mktemp("program") / "program.py"
    found.write_text(PROGRAM)
    return found


WAYS = {
    "fork": (0, OPEN_WINDOW),
    "exit": (3, OPEN_WINDOW),
    "exception": (1, [4]),
    "thread": (0, OPEN_WINDOW),
    "exit in a thread": (0, OPEN_WINDOW),
    "pool": (None, OPEN_WINDOW),
    "closed pool": (None, OPEN_WINDOW),
    "executor": (None, OPEN_WINDOW),
    "torch": (None, OPEN_WINDOW),
    "by hand": (5, OPEN_WINDOW),
    "spawn": (0, OPEN_WINDOW),
    "forkserver": (0, OPEN_WINDOW),
}


@pytest.fixture(scope="module")
def ended(harness, program):
    root = harness.directory()
    return Path(root), json.loads(run(program, root, *WAYS).stdout)


@pytest.mark.parametrize("how", WAYS)
def test_a_child_process(ended, how):
    root, codes = ended
    code, steps = WAYS[how]
    assert codes[how] == code
    assert gockpt.steps(root / how) == steps
    assert all(gockpt.verify(root / how, step).ok for step in steps)
    assert [name for name in os.listdir(root / how) if "partial" in name] == []


ENDS = {
    "the end": ("train(path)", 0, OPEN_WINDOW),
    "exit": ("train(path); sys.exit(4)", 4, OPEN_WINDOW),
    "a thread": ("threading.Thread(target=train, args=(path,)).start()", 0, OPEN_WINDOW),
    "exit in a thread": ("threading.Thread(target=train_and_exit, args=(path,)).start()", 0, OPEN_WINDOW),
    "a daemon thread that still trains": (
        """
        told = threading.Event()
        def forever():
            train(path)
            told.set()
            threading.Event().wait()
        threading.Thread(target=forever, daemon=True).start()
        told.wait()
        """,
        0,
        [4],
    ),
    "a notebook": (
        """
        sys.ps1 = "In : "
        def cell(code):
            try:
                exec(code, globals())
            except BaseException as error:
                sys.last_value = error
        cell("train(path, upto=2)")
        cell("1 / 0")
        cell("train(path)")
        cell("train(path + '/other'); raise ValueError")
        """,
        0,
        OPEN_WINDOW,
    ),
    "an error of long ago": (
        """
        try:
            1 / 0
        except ZeroDivisionError as error:
            sys.last_value = error  # as whoever prints tracebacks does
        train(path)
        """,
        0,
        OPEN_WINDOW,
    ),
    "an exception": ("train_and_raise(path)", 1, [4]),
}


@pytest.mark.parametrize("how", ENDS)
def test_the_interpreter(harness, tmp_path, how):
    body, code, steps = ENDS[how]
    path = harness.directory()
    whole = f"from program import *\npath = {path!r}\n{textwrap.dedent(body)}\n"
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "main.py").write_text(whole)
    run(tmp_path / "main.py", check=code)
    assert gockpt.steps(path) == steps


def test_a_forked_child_saves_what_its_parent_never_saved(harness, tmp_path):
    """And can't go on with its parent's saves, nor write into its parent's path."""
    path = harness.directory()
    body = """
        model = torch.nn.Linear(3, 3)
        gockpt.save_overlapped(model, None, path + "/parent", step=1).result(60)
        def child():
            other = torch.nn.Linear(3, 3)
            for step in (1, 2):
                gockpt.save_overlapped(other, None, path + "/child", step=step)
            gockpt.save_overlapped(model, None, path + "/model", step=1)
            for refused, where, error in (
                (model, "/parent", gockpt.UsageError), (other, "/parent", gockpt.PathBusy)
            ):
                try:
                    gockpt.save_overlapped(refused, None, path + where, step=5)
                except error as told:
                    print(type(told).__name__, flush=True)
        gockpt.registry.lock.acquire()  # as another thread of the parent may
        forked_by_hand(lambda _: child(), None)
        gockpt.registry.lock.release()
        gockpt.save_overlapped(model, None, path + "/parent", step=2)
    """
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "main.py").write_text(f"from program import *\npath = {path!r}\n{textwrap.dedent(body)}")
    assert run(tmp_path / "main.py").stdout == "UsageError\nPathBusy\n"
    for name, steps in {"parent": [1, 2], "child": [1, 2], "model": [1]}.items():
        assert gockpt.steps(Path(path, name)) == steps
