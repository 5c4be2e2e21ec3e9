"""After a power loss at any moment a reader finds the previous checkpoint or the new one, whole.

Every call of a save is followed by every kind of loss in the model of ``conftest.py``. Protocols that are
broken on purpose must fail here: a test that can't see them proves nothing.
"""

from __future__ import annotations

import itertools
import os

import pytest

from gockpt.storage.local.store import Store
from gockpt.storage.read import find

pytestmark = pytest.mark.usefixtures("layout")

SCENARIOS = ["first", "next", "again", "again without renameat2", "prune"]


class Look:
    """Examines what a loss after each call would leave, and collects what is wrong."""

    def __init__(self, checker, *, seeds):
        self.checker, self.seeds = checker, seeds
        self.allowed = {None}
        self.violations = []
        self.calls = 0
        self.outcomes = 0
        self.keep = []

    def __call__(self, model, call):
        self.calls += 1
        for kind, tree in model.outcomes(self.seeds).items():
            self.outcomes += 1
            seen = self.checker.examine(tree)
            wrong = [one for one in seen if one.problems]
            newest = seen[-1].marker if seen else None
            if wrong:
                self.violations.append((self.calls, call, kind, wrong))
            elif newest not in self.allowed:
                self.violations.append((self.calls, call, kind, f"newest is {newest}, not {self.allowed}"))
            if kind == f"some {self.calls % self.seeds}":
                self.keep.append((self.calls, call, tree))


def run(scenario, small_sample, checker, power, root, *, whole, seeds=3, forgets=lambda call, path: False):
    """Play a scenario in the model; returns what was seen."""
    os.mkdir(root)
    look = Look(checker, seeds=seeds)
    model = power.Loss(
        root, whole=whole, forgets=lambda call, path: look.allowed_to_forget and forgets(call, path)
    )
    look.allowed_to_forget = False
    if scenario == "again without renameat2":
        model.rename_new = model.exchange = refuse
    with Store(root, fs=model) as store:
        before = None
        if scenario != "first":
            small_sample.save(store, 1, marker=1)
            before = 1
        if scenario == "prune":
            small_sample.save(store, 2, marker=2)
        model.look, look.allowed_to_forget = look, True
        if scenario == "prune":
            look.allowed = {2}
            assert store.prune(1) == [1]
        else:
            look.allowed = {before, 9}
            small_sample.save(store, 1 if scenario.startswith("again") else 5, marker=9)
            look.allowed = {9}  # durable: from now on nothing else will do
        model.fsync(store._place.lock._fd)  # any call: have a last look
    return look


def refuse(*names, dir_fd):
    raise OSError(38, "Function not implemented")


@pytest.mark.parametrize("whole", [True, False], ids=["syncfs", "each file"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_previous_checkpoint_or_the_new_one(scenario, whole, small_sample, checker, power, scratch):
    look = run(scenario, small_sample, checker, power, scratch / "path", whole=whole)
    assert not look.violations, look.violations[:3]
    assert look.calls > 20
    assert look.outcomes == look.calls * 8


@pytest.mark.parametrize("whole", [True, False], ids=["syncfs", "each file"])
def test_the_same_when_few_files_may_stay_open(
    whole, layout, small_sample, checker, power, scratch, monkeypatch
):
    monkeypatch.setattr("gockpt.storage.local.durability._MOST_OPEN", 3)
    look = run("next", small_sample, checker, power, scratch / "path", whole=whole)
    assert not look.violations, look.violations[:3]
    if whole and layout == "directory":
        # Closed early, so only syncfs is sure to hear of a lost write: without both it must show.
        bad = run(
            "next",
            small_sample,
            checker,
            power,
            scratch / "bad",
            whole=True,
            forgets=lambda call, path: call == "syncfs" or is_payload(call, path),
        )
        assert bad.violations


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_next_writer_and_the_reader_agree(scenario, small_sample, checker, faults, power, scratch):
    """Lay what a loss leaves on a real disk, open it for reading and for writing, and save on."""
    look = run(scenario, small_sample, checker, power, scratch / "path", whole=False)
    for number, _, tree in look.keep[:: max(1, len(look.keep) // 12)]:
        path = scratch / f"left-{number}"
        power.lay_down(tree, path)
        before = [one.marker for one in checker.examine(tree)]
        with Store(path, fs=faults.NoWait()) as store:
            # Its sweep may find a predecessor under its successor's name: the newest stay the newest.
            expected = [one.marker for one in checker.examine(checker.read(path))]
            assert expected[len(expected) - len(before) :] == before
            entries = find.list_checkpoints(path, superseded=True)
            assert len(entries) == len(expected)
            if entries:
                with find.open_checkpoint(path) as newest:
                    assert newest.state() == {"marker": expected[-1]}
                    assert newest.verify().ok
            published = small_sample.save(store, 7, marker=77)
            assert published.seq > max([entry.seq for entry in entries], default=0)
        seen = checker.examine(checker.read(path))
        assert [one.marker for one in seen] == [*expected, 77]


def ends(*suffixes):
    return lambda call, path: call == "fsync" and path.endswith(suffixes)


def is_payload(call, path):
    return os.path.basename(path).startswith(("c", "zarr.json", "state.json", "blocks"))


EVERYWHERE = {
    "the path is not synced": ("next", lambda call, path: path == ""),
    "the path is not synced at first": ("first", lambda call, path: path == ""),
    "the path is not synced when a step is replaced": ("again", lambda call, path: path == ""),
    "the path is not synced between two renames": ("again without renameat2", lambda call, path: path == ""),
}
IN_ARCHIVES = {"the archive is not synced": ("next", lambda call, path: ".partial-" in path)}
IN_DIRECTORIES = {
    "files are not synced": ("next", is_payload),
    "one chunk is not synced": ("next", ends("model/tall/c.1")),
    "one array's document is not synced": ("next", ends("model/none/zarr.json")),
    "the block checksums are not synced": ("next", ends("blocks.crc32c")),
    "the state document is not synced": ("next", ends("state.json")),
    "the manifest is not synced": ("next", ends("gockpt.json.tmp")),
    "an array's directory is not synced": ("next", ends("/model/tall")),
    "a group's directory is not synced": ("next", ends("/model")),
    "the partial's directory is not synced": (
        "next",
        lambda call, path: ".partial-" in path and "/" not in path,
    ),
    "the path is not synced before a delete": ("prune", lambda call, path: path == ""),
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
    layout, mutation, small_sample, checker, power, scratch
):
    _, (scenario, forgets) = mutation
    look = run(scenario, small_sample, checker, power, scratch / "path", whole=False, forgets=forgets)
    assert look.violations


@pytest.mark.parametrize("layout", ["directory"], indirect=True)
def test_a_length_set_after_the_sync_is_caught(small_sample, checker, power, scratch):
    class LateLength(power.Loss):
        late = ()

        def did_ftruncate(self, result, fd, nbytes):
            self.late = (*self.late, (self.fds[fd], nbytes))

        def did_fsync(self, result, fd):
            super().did_fsync(result, fd)
            for node, nbytes in self.late:
                if node is self.fds[fd]:
                    node.pending.append(("size", nbytes))

    os.mkdir(scratch / "path")
    look = Look(checker, seeds=3)
    look.allowed = {None, 9}
    with Store(scratch / "path", fs=LateLength(scratch / "path", look=look, whole=False)) as store:
        small_sample.save(store, 1, marker=9)
    assert look.violations


@pytest.mark.parametrize("layout", ["directory"], indirect=True)
def test_syncfs_alone_does_not_cover_the_manifest(small_sample, checker, power, scratch):
    look = run(
        "next", small_sample, checker, power, scratch / "path", whole=True, forgets=ends("gockpt.json.tmp")
    )
    assert look.violations
