"""Steps, their sequence, the same step again, and pruning."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket

import pytest

from gockpt.errors import StorageError, UsageError
from gockpt.storage.format import step_names
from gockpt.storage.local import files
from gockpt.storage.local.filesystem import Filesystem
from gockpt.storage.local.store import Store
from gockpt.storage.read import find


def names_in(path):
    return sorted(name for name in os.listdir(path) if name != step_names.LOCK_FILE)


def steps_in(path):
    return [(entry.step, entry.seq) for entry in find.list_checkpoints(path, superseded=True)]


# -- steps, sequence, lineage ---------------------------------------------------------------------


@pytest.mark.parametrize("step", [-1, 2**63, 1.0, True, "1", None])
def test_steps_that_are_none(tmp_path, step):
    with Store(tmp_path) as store, pytest.raises(UsageError, match="step must be an integer"):
        store.begin(step, [], state={}, attributes={}, exact=True)


@pytest.mark.parametrize("step", [0, 1, 9_999_999_999, 10_000_000_000, 2**63 - 1])
def test_every_other_step(tmp_path, sample, step):
    with Store(tmp_path) as store:
        sample.save(store, step, marker=1)
    assert steps_in(tmp_path) == [(step, 1)]
    with Store(tmp_path) as store:
        assert sample.save(store, 5, marker=2).seq == 2


def test_each_publication_gets_the_next_number_whatever_its_step(tmp_path, sample, checker):
    with Store(tmp_path) as store:
        first, second = sample.save(store, 1000, marker=1), sample.save(store, 1500, marker=2)
    with Store(tmp_path, parent=first.seq) as store:
        third = sample.save(store, 1100, marker=3)
        fourth = sample.save(store, 1200, marker=4)
    assert [one.seq for one in (first, second, third, fourth)] == [1, 2, 3, 4]

    def says(one):
        with open(os.path.join(one.path, "gockpt.json")) as file:
            return json.loads(file.readline())

    assert [says(one)["parent"] for one in (first, second, third, fourth)] == [None, 1, 1, 3]
    assert says(first)["run"] == says(second)["run"] != says(third)["run"] == says(fourth)["run"]
    with find.open_checkpoint(tmp_path) as newest:
        assert newest.step == 1200


def test_damaged_checkpoints_do_not_stop_the_next_one(tmp_path, sample):
    with Store(tmp_path) as store:
        one = sample.save(store, 1, marker=1)
        sample.save(store, 2, marker=2)
    with open(os.path.join(one.path, "gockpt.json"), "r+b") as file:
        file.write(b"x")
    with Store(tmp_path) as store:
        assert sample.save(store, 3, marker=3).seq == 3
        assert store.prune(1) == [2]
    # What is damaged is neither counted nor touched.
    assert names_in(tmp_path) == ["step-0000000001", "step-0000000003"]


def put_instead(path, what):
    """Put something else where a manifest should be."""
    path.unlink()
    if what == "fifo":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    elif what == "link":
        path.symlink_to("state.json")
    elif what == "endless link":
        path.symlink_to("gockpt.json")
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    elif what == "sparse giant":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    else:
        path.write_bytes(what)


@pytest.mark.parametrize(
    "what",
    [
        "fifo",
        "directory",
        "link",
        "endless link",
        "device",
        "socket",
        "sparse giant",
        b"",
        b"{}\n",
        b"[" * 99999,
    ],
)
def test_what_only_looks_like_a_checkpoint_does_no_harm(scratch, sample, what):
    with Store(scratch) as store:
        for step in (1, 2):
            sample.save(store, step, marker=step)
    put_instead(scratch / "step-0000000001" / "gockpt.json", what)
    with Store(scratch) as store:
        assert store.prune(1) == []
        assert sample.save(store, 3, marker=3).seq == 3
        with pytest.raises(StorageError, match="no complete gockpt checkpoint"):
            sample.save(store, 1, marker=4)
        assert store.prune(1) == [2]
    assert names_in(scratch) == ["step-0000000001", "step-0000000003"]


# -- the same step again --------------------------------------------------------------------------


def refuse(*names, dir_fd):
    raise OSError(38, "Function not implemented")


@pytest.mark.parametrize("flags", ["all", "no exchange", "none"])
@pytest.mark.parametrize("reopened", [False, True])
def test_the_same_step_again(tmp_path, sample, checker, faults, flags, reopened):
    fs = faults.NoWait()
    if flags != "all":
        fs.exchange = refuse
    if flags == "none":
        fs.rename_new = refuse
    store = Store(tmp_path, fs=fs)
    one = sample.save(store, 7, marker=1)
    if reopened:
        store.close()
        store = Store(tmp_path, fs=fs)
    two = sample.save(store, 7, marker=2)
    assert one.path == two.path
    assert names_in(tmp_path) == ["step-0000000007", f"step-0000000007.old-{one.attempt}"]
    three = sample.save(store, 7, marker=3)
    seen = checker.examine(checker.read(tmp_path))
    assert [(one.name[15:20], one.seq, one.marker, one.problems) for one in seen] == [
        (".old-", 1, 1, ()),
        (".old-", 2, 2, ()),
        ("", 3, 3, ()),
    ]
    with find.open_checkpoint(tmp_path, 7) as checkpoint:
        assert checkpoint.manifest.attempt == three.attempt
    # What was replaced goes, uncounted and unmentioned: step 7 is still there.
    sample.save(store, 8, marker=4)
    assert store.prune(2) == []
    assert names_in(tmp_path) == ["step-0000000007", "step-0000000008"]
    assert store.prune(1) == [7]
    store.close()


def test_a_predecessor_that_vanishes_in_the_last_moment(tmp_path, sample, checker, faults):
    class Late(faults.Interposer):
        def around(self, name, call, arguments, dir_fd):
            if name == "rename_new":
                raise FileExistsError(17, "File exists")
            return call()

    with Store(tmp_path, fs=Late()) as store:
        published = sample.save(store, 1, marker=1)
    assert checker.problems(checker.read(published.path)) == []


@pytest.mark.parametrize("what", ["file", "empty", "foreign", "damaged", "dangling link", "link"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_is_no_checkpoint_is_not_replaced(tmp_path, sample, checker, what, when):
    path = tmp_path / "path"
    target = path / "step-0000000001"

    def put():
        if what == "file":
            target.write_text("mine")
        elif what == "dangling link":
            target.symlink_to("nowhere")
        elif what == "link":
            (tmp_path / "elsewhere").mkdir()
            target.symlink_to(tmp_path / "elsewhere")
        else:
            target.mkdir()
            if what == "foreign":
                (target / "model.pt").write_text("mine")
            if what == "damaged":
                (target / "gockpt.json").write_text("{}")

    with Store(path) as store:
        if when == "before":
            put()
            before = checker.read(path)
            with pytest.raises(
                StorageError, match=r"step-0000000001 exists and is no complete .* move it away"
            ):
                sample.begin(store, 1)
        else:
            transaction = sample.begin(store, 1)
            sample.write(transaction, 1)
            put()
            with pytest.raises(StorageError, match=r"step-0000000001 exists and is no complete"):
                transaction.commit()
            before = checker.read(path)
            transaction.abort()
            before = {
                name: data for name, data in before.items() if ".partial" not in name and ".owner" not in name
            }
    assert checker.read(path) == before
    assert "step-0000000001" in before


def test_a_partial_that_was_swapped_for_another_is_not_published(tmp_path, sample):
    with Store(tmp_path) as store:
        transaction = sample.begin(store, 1)
        sample.write(transaction, 1)
        (name,) = [name for name in names_in(tmp_path) if "partial" in name]
        os.rename(tmp_path / name, tmp_path / "away")
        (tmp_path / name).mkdir()
        with pytest.raises(StorageError, match="was taken away"):
            transaction.commit()
        transaction.abort()
        assert (tmp_path / name).is_dir()  # it isn't ours
        assert steps_in(tmp_path) == []


# -- pruning --------------------------------------------------------------------------------------


def test_the_newest_publications_stay(tmp_path, sample):
    with Store(tmp_path) as store:
        for step in (10, 30, 20, 5):
            sample.save(store, step, marker=step)
        assert store.prune(4) == []
        assert store.prune(2) == [10, 30]
        assert steps_in(tmp_path) == [(20, 3), (5, 4)]
        assert store.prune(1) == [20]
        assert store.prune(1) == []
        assert names_in(tmp_path) == ["step-0000000005"]


@pytest.mark.parametrize("keep", [0, -1, 1.5, None, True and "1"])
def test_the_newest_is_never_pruned(tmp_path, sample, keep):
    with Store(tmp_path) as store:
        sample.save(store, 1, marker=1)
        with pytest.raises(UsageError, match="keep must be at least 1"):
            store.prune(keep)
        assert steps_in(tmp_path) == [(1, 1)]


STRANGE = [
    "notes",
    "step-12",
    "step-0000000012.bak",
    "step-0000000012.partial",
    "step-00000000012",
    "step-0000000012.partial-XYZ",
    "step_12",
    ".trash",
    ".owner-x",
    "checkpoint-0000000012",
]


def test_what_is_not_ours_is_never_touched(tmp_path, sample, checker):
    for name in STRANGE:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with Store(tmp_path) as store:
        for step in (1, 2):
            sample.save(store, step, marker=step)
        shutil.copytree(tmp_path / "step-0000000002", tmp_path / "step-0000000009")
        shutil.copytree(tmp_path / "step-0000000001", tmp_path / "mine")
        store.prune(1)
    with Store(tmp_path) as store:
        sample.save(store, 3, marker=3)
        store.prune(1)
    # The copy under another step's name isn't what it says it is, so it stays too.
    kept = ["mine", "step-0000000003", "step-0000000009"]
    assert names_in(tmp_path) == sorted(STRANGE + kept)
    for name in STRANGE:
        assert (tmp_path / name / "file").read_text() == name


def test_pruning_removes_what_it_found_and_not_what_came_instead(tmp_path, sample):
    with Store(tmp_path) as store:
        for step in (1, 2):
            sample.save(store, step, marker=step)
        shutil.rmtree(tmp_path / "step-0000000001")
        (tmp_path / "step-0000000001").mkdir()
        (tmp_path / "step-0000000001" / "mine").write_text("mine")
        assert store.prune(1) == []
        assert (tmp_path / "step-0000000001" / "mine").read_text() == "mine"


def test_links_inside_what_is_pruned_are_not_followed(tmp_path, sample):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    with Store(tmp_path / "path") as store:
        for step in (1, 2):
            sample.save(store, step, marker=step)
        os.symlink(tmp_path / "precious", tmp_path / "path" / "step-0000000001" / "model" / "link")
        assert store.prune(1) == [1]
    assert names_in(tmp_path / "path") == ["step-0000000002"]
    assert (tmp_path / "precious" / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["zarr.json", "c.0", "notes"])
def test_trees_that_look_odd_are_removed(tmp_path, name):
    """What a name suggests is a guess only: here files are directories, and the other way round."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    tree = tmp_path / "tree"
    (tree / name / name).mkdir(parents=True)
    (tree / "sub").mkdir()
    (tree / "sub" / name).write_text("file")
    os.symlink(outside, tree / "sub" / "c")
    os.symlink(outside, tree / name / "link")
    os.mkfifo(tree / name / "fifo")
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        files.remove_tree(Filesystem(), fd, "tree")
    finally:
        os.close(fd)
    assert names_in(tmp_path) == ["outside"]
    assert (outside / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["zarr.json", "notes"])
def test_what_can_not_be_removed_is_told_as_the_system_tells_it(tmp_path, name):
    class Immutable(Filesystem):
        def unlink(self, name, *, dir_fd):
            raise PermissionError(errno.EPERM, "Operation not permitted")

    (tmp_path / name).write_text("file")
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(PermissionError):
            files.remove_tree(Immutable(), fd, name)
    finally:
        os.close(fd)


def test_a_reader_survives_pruning(tmp_path, sample):
    with Store(tmp_path) as store:
        sample.save(store, 1, marker=1)
        with open(tmp_path / "step-0000000001" / "model" / "big" / "c.0", "rb") as file:
            sample.save(store, 2, marker=2)
            store.prune(1)
            assert file.read(280000) == sample.content(sample.layouts[0], 1).tobytes()
