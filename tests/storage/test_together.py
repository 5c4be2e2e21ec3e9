"""Several at once on one path: threads of one writer, writers, and readers, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gockpt.errors import PathBusy
from gockpt.storage.format import step_names
from gockpt.storage.local.store import Store
from gockpt.storage.read import find

WORKER = Path(__file__).with_name("one_of_many.py")


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, WORKER, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(process, code=0):
    """Return what a process printed, one JSON value for each line."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, err
    return [json.loads(line) for line in out.splitlines()]


def next_line(process):
    return json.loads(process.stdout.readline())


# -- threads of one store ----------------------------------------------------------------------------


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "without renameat2"])
@pytest.mark.parametrize("steps", [1, 3])
def test_threads_that_publish_and_prune_take_turns(exchanges, steps, small_sample, checker, faults, scratch):
    """Whatever they do to the same steps, nothing is lost or half done, and the last one is the newest."""
    fs = faults.NoWait()
    if not exchanges:
        fs.rename_new = fs.exchange = refuse
    errors, published = [], []

    def work(thread):
        try:
            for number in range(12):
                done = small_sample.save(store, number % steps, marker=100 * thread + number)
                published.append((done.seq, 100 * thread + number))
                if thread == 0:
                    store.prune(1)
        except BaseException as error:
            errors.append(error)
            raise

    with Store(scratch, fs=fs) as store:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert sorted(seq for seq, _ in published) == list(range(1, 49))
        left = {name for name in os.listdir(scratch) if name != step_names.LOCK_FILE}
        assert all(step_names.parse(name).kind in ("step", "old") for name in left), left
        seen = checker.examine(checker.read(scratch))
        assert not any(one.problems for one in seen)
        assert (seen[-1].seq, seen[-1].marker) == max(published)
        # Under a step's name stands its newest, and what it replaced has its own name.
        entries = find.list_checkpoints(scratch, superseded=True)
        assert len(entries) == len(seen)
        assert find.damaged_checkpoints(scratch) == {}
        for entry in entries:
            assert (Path(entry.path).name == step_names.of_step(entry.step)) != entry.superseded
        # The writer knows all of them: it can prune all but one.
        store.prune(1)
        assert [one.seq for one in checker.examine(checker.read(scratch))] == [48]


def refuse(*names, dir_fd):
    raise OSError(22, "Invalid argument")


# -- two writers -------------------------------------------------------------------------------------


def test_a_second_writer_is_told_who_the_first_is(small_sample, checker, tmp_path):
    first = start("hold", tmp_path)
    assert next_line(first) == "in the middle of a save"
    with pytest.raises(PathBusy, match=f"by process {first.pid} on "):
        Store(tmp_path)
    second = start("save", tmp_path, 5, 50)
    (answer,) = told(second)
    assert answer["error"] == "PathBusy"
    assert str(first.pid) in answer["message"]
    assert told_after(first, "go on") == ["done"]
    # The first was not disturbed, and its place is free now.
    assert told(start("save", tmp_path, 5, 50)) == [{"seq": 2}]
    assert [one.marker for one in checker.examine(checker.read(tmp_path))] == [1, 50]


def told_after(process, line):
    out, err = process.communicate(f"{line}\n", timeout=200)
    assert process.returncode == 0, err
    return [json.loads(one) for one in out.splitlines()]


def test_a_writer_killed_in_the_middle_of_a_save_frees_its_place(small_sample, checker, tmp_path):
    with Store(tmp_path) as store:
        small_sample.save(store, 1, marker=1)
    first = start("hold", tmp_path)
    assert next_line(first) == "in the middle of a save"
    first.kill()
    told(first, code=-signal.SIGKILL)
    assert any(".partial-" in name for name in os.listdir(tmp_path))
    with Store(tmp_path) as store:
        assert sorted(os.listdir(tmp_path)) == [".gockpt.lock", "step-0000000001"]
        small_sample.save(store, 2, marker=2)
    assert [one.marker for one in checker.examine(checker.read(tmp_path))] == [1, 2]


def test_many_writers_at_the_same_moment(checker, tmp_path):
    """Each gets the place and publishes, or is refused; no number is given out twice."""
    path = tmp_path / "path"  # they also race to make it
    crowd = [start("contend", path, number, 6) for number in range(4)]
    for process in crowd:
        assert next_line(process) == "ready"
    for process in crowd:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [answer for process in crowd for answer in told(process)]
    seqs = sorted(answer["seq"] for answer in answers if "seq" in answer)
    assert len(answers) == 24
    assert {answer.get("error") for answer in answers} <= {None, "PathBusy"}
    assert seqs == list(range(1, len(seqs) + 1))
    assert seqs
    seen = checker.examine(checker.read(path))
    assert not any(one.problems for one in seen)
    assert [one.seq for one in seen] == seqs


# -- readers beside a writer -------------------------------------------------------------------------


def test_readers_in_other_processes_while_one_saves_replaces_and_prunes(tmp_path):
    """Two readers open the newest again and again: one whole checkpoint each time, never an older one."""
    path = tmp_path / "path"
    writer = start("publish", path, 40)
    assert next_line(writer) == "published 0"
    readers = [start("read", path, 40) for _ in range(2)]
    for reader in readers:
        assert next_line(reader) == "reading"
    assert told_after(writer, "go") == ["done"]
    for reader in readers:
        values = told(reader)
        assert values == sorted(values)
        assert values[-1] == 39
        assert len(values) > 3


def test_readers_in_threads_of_the_process_that_saves(small_sample, checker, faults, scratch):
    """Reading closes files, and no lock is lost by it: the writer's file is never opened by a reader."""
    done = threading.Event()

    def read():
        count = 0
        while not done.is_set():
            with find.open_checkpoint(scratch) as checkpoint:
                assert checkpoint.verify().ok
                count += 1
        return count

    with Store(scratch, fs=faults.NoWait()) as store, ThreadPoolExecutor(2) as pool:
        small_sample.save(store, 0, marker=0)
        readers = [pool.submit(read) for _ in range(2)]
        for step in range(1, 20):
            small_sample.save(store, step, marker=step)
        done.set()
        assert all(reader.result() for reader in readers)
        (answer,) = told(start("save", scratch, 99, 99))
        assert answer["error"] == "PathBusy"
