"""A writer that dies at any call leaves the previous checkpoint or the new one; the next one tidies up."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from gockpt.storage.format import step_names
from gockpt.storage.local.store import Store


def refuse(*names, dir_fd):
    raise OSError(22, "Invalid argument")


def prepare(path, scenario, sample, faults):
    """Make what stands there before; returns the marker of the newest."""
    if scenario == "first":
        return None
    with Store(path, fs=faults.NoWait()) as store:
        sample.save(store, 1, marker=1)
        if scenario == "prune":
            sample.save(store, 2, marker=2)
            return 2
    return 1


def act(store, scenario, sample):
    if scenario == "prune":
        store.prune(1)
    else:
        sample.save(store, 1 if scenario.startswith("again") else 5, marker=9)


def as_in(scenario, fs):
    if scenario == "again without renameat2":
        fs.rename_new = fs.exchange = refuse
    return fs


def landmarks(path, scenario, sample, faults):
    """Return how many calls there are, and the number of the one that publishes."""
    fs = as_in(scenario, faults.Recorder())
    with Store(path, fs=fs) as store:
        act(store, scenario, sample)
        total = len(fs.calls)
    publishing = [
        number
        for number, (name, argument) in enumerate(fs.calls)
        if (name in ("rename_new", "exchange") and ".partial-" in str(argument))
        or (name == "rename" and ".partial-" in str(argument) and "without" in scenario)
    ]
    return total, publishing[-1] if publishing else total


pytestmark = pytest.mark.usefixtures("layout")

SCENARIOS = ["first", "next", "again", "again without renameat2", "prune"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_death_at_every_call(scenario, after, small_sample, checker, faults, scratch):
    template = scratch / "template"
    before = prepare(template, scenario, small_sample, faults)
    shutil.copytree(template, scratch / "count") if before else None
    total, publishing = landmarks(scratch / "count", scenario, small_sample, faults)
    assert total > 30
    empty_records = 0
    for number in range(total):
        path = scratch / f"path-{number}"
        shutil.copytree(template, path) if before else None
        fs = as_in(scenario, faults.KilledAt(number, after=after))
        store = None
        with contextlib.suppress(faults.Killed):
            store = Store(path, fs=fs)
            act(store, scenario, small_sample)
        assert fs.dead
        fs.bury(store)

        done = number > publishing or (number == publishing and after)
        expected = before if not done or scenario == "prune" else 9
        with Store(path, fs=faults.NoWait()) as store:
            seen = checker.examine(checker.read(path))
            assert all(not one.problems for one in seen), (number, seen)
            assert (seen[-1].marker if seen else None) == expected, (number, fs.dead)
            # All that a dead writer left is gone; only complete checkpoints stay.
            kinds = {step_names.parse(name).kind for name in os.listdir(path) if name[0] == "s"}
            assert kinds <= {"step", "old"}
            hidden = set(os.listdir(path)) - {".gockpt.lock"}
            hidden = {name for name in hidden if name[0] == "."}
            # A record that says nothing yet could be anyone's: it stays until it is old.
            empty_records += len(hidden)
            assert all(name.startswith(".owner-") and not os.path.getsize(path / name) for name in hidden)
            small_sample.save(store, 6, marker=66)
        shutil.rmtree(path)
    assert empty_records <= 2


PROGRAM = """
    import os, signal, sys
    from gockpt.core.arena_layout import lay_out
    from gockpt.core.array_spec import ArraySpec
    from gockpt.storage.local.filesystem import CALLS, Filesystem
    from gockpt.storage.local.store import Store

    class Dying(Filesystem):
        count, at, published = 0, -1, None

    def dying(name):
        real = getattr(Filesystem, name)
        def method(self, *arguments, **keywords):
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "rename_new":
                self.published = self.count
            self.count += 1
            if name in ("fsync", "syncfs"):
                return None  # the page cache outlives the process
            return real(self, *arguments, **keywords)
        return method

    for name in CALLS:
        setattr(Dying, name, dying(name))

    specs = [ArraySpec(("model", "w"), (100, 5), "float32"), ArraySpec(("model", "b"), (5,), "float32")]
    layout = lay_out(specs)

    def save(path, step, fs):
        data = memoryview(bytearray([step]) * layout.nbytes)
        with (
            Store(path, fs=fs) as store,
            store.begin(
                step, layout.arrays, state={"marker": step}, attributes={}, exact=True
            ) as transaction,
        ):
            for array in layout.arrays:
                for slot in array.slots:
                    transaction.write_chunk(array, slot, data[slot.offset : slot.offset + slot.capacity])
            transaction.commit()
        return fs
"""


def program(tail):
    return textwrap.dedent(PROGRAM) + textwrap.dedent(tail)


def test_sigkill_at_every_call(checker, small_sample, faults, scratch):
    """Forked children kill themselves for real, one at each call; locks and descriptors go with them."""
    script = program(
        """
        path = sys.argv[1] + "/count"
        save(path, 1, Dying())
        whole = save(path, 2, Dying())
        print(whole.published)
        for number in range(whole.count):
            path = f"{sys.argv[1]}/{number:03d}"
            save(path, 1, Dying())
            child = os.fork()
            if child == 0:
                fs = Dying()
                fs.at = number
                save(path, 2, fs)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert os.WTERMSIG(status) == signal.SIGKILL, (number, status)
        """
    )
    told = subprocess.run(
        [sys.executable, "-c", script, str(scratch)], check=True, capture_output=True, text=True
    ).stdout
    names = sorted(os.listdir(scratch))
    names.remove("count")
    assert len(names) > 30
    for name in names:
        path = scratch / name
        with Store(path, fs=faults.NoWait()) as store:
            seen = checker.examine(checker.read(path))
            assert not any(one.problems for one in seen)
            # It died before that call: only after the one that publishes is the new one the newest.
            assert [one.marker for one in seen] == ([1, 2] if int(name) > int(told) else [1]), name
            assert not [entry for entry in os.listdir(path) if ".partial" in entry or ".trash" in entry]
            small_sample.save(store, 3, marker=3)
