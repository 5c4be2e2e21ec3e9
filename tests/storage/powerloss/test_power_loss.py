"""Pull the plug of a disk under a real file system, at many points of a save, and look what is there."""

from __future__ import annotations

import itertools
import logging
import os

import pytest

from gockpt.storage.local.filesystem import Filesystem
from gockpt.storage.local.store import Store
from gockpt.storage.read import find

log = logging.getLogger(__name__)
pytestmark = [pytest.mark.powerloss, pytest.mark.timeout(900)]

# A chunk that goes past the page cache and is reserved first, and some that do neither.
ARRAYS = (
    (("model", "large"), (400_000,), "float32", 300_000),
    (("model", "big"), (70_000,), "float32", 70_000),
    (("model", "tall"), (2100,), "float32", 2048),
    (("model", "scale"), (), "float64", 1),
    (("optimizer", "w", "exp_avg"), (5, 3), "float32", 5),
)
SCENARIOS = ["first", "next", "again", "prune"]


class Forgetful(Filesystem):
    """Leaves out some syncs; ``forgets(name)`` is asked with what the descriptor was opened as."""

    def __init__(self, forgets):
        self.forgets, self.names, self.armed = forgets, {}, False

    def open(self, name, flags, *, dir_fd=None):
        fd = super().open(name, flags, dir_fd=dir_fd)
        self.names[fd] = name
        return fd

    def fsync(self, fd):
        if not (self.armed and self.forgets(self.names[fd])):
            super().fsync(fd)

    def syncfs(self, fd):
        if not (self.armed and self.forgets("syncfs")):
            super().syncfs(fd)


def play(scenario, sample, blank, work, disks, fs):
    """Carry a scenario out on a logging disk; returns where in the log it began and was durable."""
    with disks.served(blank, work / "log", work / "disk") as disk, disks.mounted(disk, work / "fs"):
        path = work / "fs" / "path"
        with Store(path, fs=fs) as store:
            if scenario != "first":
                sample.save(store, 1, marker=1)
            if scenario == "prune":
                sample.save(store, 2, marker=2)
            start = os.path.getsize(work / "log")
            fs.armed = True
            if scenario == "prune":
                assert store.prune(1) == [1]
            else:
                sample.save(store, 1 if scenario == "again" else 5, marker=9)
            durable = os.path.getsize(work / "log")
    return start, durable


def look(scenario, sample, blank, work, disks, checker, fs, *, cuts=20, seeds=3):
    """Return how many states were looked at, and what was wrong with some of them."""
    start, durable = play(scenario, sample, blank, work, disks, fs)
    events = disks.read_log(work / "log")
    assert sum(event.data is None for event in events) > 2
    before = {"first": None, "prune": 2}.get(scenario, 1)
    wrong, count, newest_seen = [], 0, set()
    for position, kind in disks.states(blank, events, start, cuts, seeds):
        count += 1
        disks.run("cp", "--sparse=always", blank, work / "after")
        with disks.mounted(work / "after", work / "again"):
            path = work / "again" / "path"
            seen = checker.examine(checker.read(path)) if path.exists() else []
            newest = seen[-1].marker if seen else None
            newest_seen.add(newest)
            allowed = {2} if scenario == "prune" else {9} if position >= durable else {before, 9}
            if newest not in allowed or any(one.problems for one in seen):
                wrong.append((position, kind, position >= durable, seen))
                continue
            if newest is not None:
                with find.open_checkpoint(path) as checkpoint:
                    assert checkpoint.state() == {"marker": newest}
                    assert checkpoint.verify().ok
            with Store(path) as store:
                sample.save(store, 7, marker=77)
            # A writer whose record was lost could be anyone: its partial waits until it is old.
            names = os.listdir(path)
            assert not [name for name in names if name.startswith(".trash-")]
            for attempt in (name.partition(".partial-")[2] for name in names):
                record = path / f".owner-{attempt}"
                assert not attempt or not record.exists() or not record.stat().st_size
    return count, wrong, newest_seen


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_previous_checkpoint_or_the_new_one(scenario, blank, work, disks, sampling, checker):
    sample = sampling.make(ARRAYS)
    count, wrong, newest = look(scenario, sample, blank, work, disks, checker, Forgetful(lambda name: False))
    assert not wrong, wrong[:3]
    log.info("%s: %d states, all right", scenario, count)
    assert count > 30
    assert newest == {"first": {None, 9}, "prune": {2}}.get(scenario, {1, 9})


EVERYWHERE = {
    "nothing is synced": lambda name: True,
    "only the path is synced": lambda name: not name.startswith("/"),
    "the path is not synced": lambda name: name.startswith("/"),
}
IN_ARCHIVES = {"the archive is not synced": lambda name: ".partial-" in name}
IN_DIRECTORIES = {
    "no data is synced": lambda name: (
        name == "syncfs" or os.path.basename(name).startswith(("c", "zarr.json", "state.json", "blocks"))
    ),
    "the manifest is not synced": lambda name: name == "gockpt.json.tmp",
}
MUTATIONS = [
    *itertools.product(("directory",), {**EVERYWHERE, **IN_DIRECTORIES}.items()),
    *itertools.product(("file",), {**EVERYWHERE, **IN_ARCHIVES}.items()),
]


@pytest.mark.parametrize(
    ("layout", "mutation"),
    MUTATIONS,
    indirect=["layout"],
    ids=lambda one: one if type(one) is str else one[0],
)
def test_a_protocol_without_one_of_its_syncs_is_caught(
    layout, mutation, blank, work, disks, sampling, checker
):
    sample = sampling.make(ARRAYS)
    mutation, forgets = mutation
    fs = Forgetful(forgets)
    count, wrong, _ = look("next", sample, blank, work, disks, checker, fs, cuts=40, seeds=4)
    log.info("%s: %d of %d states are wrong", mutation, len(wrong), count)
    assert wrong
