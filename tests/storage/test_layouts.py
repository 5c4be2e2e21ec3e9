"""Archives and directories stand in one path, and replace each other, as checkpoints of one layout do."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil

import pytest

from gockpt.core.array_spec import ArraySpec
from gockpt.errors import StorageError, UsageError
from gockpt.storage.format import chunk_grid, step_names, zip_archive
from gockpt.storage.local.store import Store
from gockpt.storage.read import find

LAYOUTS = ("file", "directory")
BOTH = list(itertools.product(LAYOUTS, LAYOUTS))


def name_of(step, layout):
    return step_names.of_step(step, archive=layout == "file")


def markers(path):
    """Return the marker of each checkpoint that readers see, newest first."""
    found = []
    for entry in sorted(find.list_checkpoints(path, superseded=True), key=lambda one: -one.seq):
        with find.open_checkpoint(entry.path) as stored:
            assert stored.verify().ok
            found.append((stored.state()["marker"], entry.superseded))
    return found


@pytest.mark.parametrize(("first", "second"), BOTH)
def test_a_step_is_replaced_whatever_its_layout(first, second, tmp_path, sample, checker):
    for marker, layout in ((1, first), (2, second)):
        with Store(tmp_path, layout=layout) as store:
            sample.save(store, 5, marker=marker)
    names = sorted(name for name in os.listdir(tmp_path) if name.startswith("step-"))
    assert [step_names.parse(name).kind for name in names] in (["step", "old"], ["old", "step"])
    assert name_of(5, second) in names
    assert markers(tmp_path) == [(2, False), (1, True)]
    assert [one.marker for one in checker.examine(checker.read(tmp_path))] == [1, 2]
    with Store(tmp_path, layout=first) as store:
        assert store.prune(1) == []
    assert markers(tmp_path) == [(2, False)]
    assert [name for name in os.listdir(tmp_path) if name.startswith("step-")] == [name_of(5, second)]


@pytest.mark.parametrize(("first", "second"), BOTH)
def test_retention_counts_both(first, second, tmp_path, sample):
    for step, layout in enumerate((first, second, first, second)):
        with Store(tmp_path, layout=layout) as store:
            sample.save(store, step, marker=step)
    with Store(tmp_path) as store:
        assert store.prune(2) == [0, 1]
    assert [marker for marker, _ in markers(tmp_path)] == [3, 2]
    assert not [name for name in os.listdir(tmp_path) if name.startswith((".trash", ".owner"))]


@pytest.mark.parametrize(("first", "second"), [("file", "directory"), ("directory", "file")])
def test_what_is_no_checkpoint_under_the_other_name_is_not_touched(first, second, tmp_path, sample):
    foreign = tmp_path / name_of(5, first)
    foreign.write_text("mine") if first == "file" else foreign.mkdir()
    with (
        Store(tmp_path, layout=second) as store,
        pytest.raises(StorageError, match=f"{name_of(5, first)} exists"),
    ):
        sample.save(store, 5, marker=1)
    assert foreign.exists()
    assert find.list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("first", "second"), [("file", "directory"), ("directory", "file")])
def test_death_at_every_call_of_a_save_in_the_other_layout(
    first, second, after, small_sample, checker, faults, scratch
):
    template = scratch / "template"
    with Store(template, fs=faults.NoWait(), layout=first) as store:
        small_sample.save(store, 1, marker=1)
    published = False
    for number in itertools.count():
        path = scratch / f"path-{number}"
        shutil.copytree(template, path)
        fs, store = faults.KilledAt(number, after=after), None
        with contextlib.suppress(faults.Killed):
            store = Store(path, fs=fs, layout=second)
            small_sample.save(store, 1, marker=9)
        over, fs.at = not fs.dead, -1
        fs.bury(store)
        for _ in range(2):  # as the dead left it, and as the next writer does
            seen = checker.examine(checker.read(path))
            assert not any(one.problems for one in seen), number
            newest = seen[-1].marker
            assert newest in (1, 9), number
            assert newest == 9 or not published, number
            published = newest == 9
            assert 1 in [one.marker for one in seen] or published
            with Store(path, fs=faults.NoWait()) as store:
                store.prune(1)
            assert [one.marker for one in checker.examine(checker.read(path))] == [newest], number
        shutil.rmtree(path)
        if over:
            break
    assert published
    assert number > 20


def long_row():
    """Return an array of one chunk that is too long for an archive; nothing of its size is allocated."""
    spec = ArraySpec(("model", "w"), (1, zip_archive.MAX_ENTRY_NBYTES - 3), "uint8")
    return chunk_grid.chunked_layout(spec, spec.shape)


@pytest.mark.parametrize("layout", ["auto", "file"])
def test_a_chunk_too_long_for_an_archive(tmp_path, layout):
    with Store(tmp_path, layout=layout) as store:
        if layout == "file":
            with pytest.raises(UsageError, match='2 GiB or more.*layout="directory"'):
                store.begin(1, [long_row()], state={}, attributes={}, exact=True)
            return
        transaction = store.begin(1, [long_row()], state={}, attributes={}, exact=True)
        (partial,) = tmp_path.glob("step-*.partial-*")
        assert partial.is_dir()
        transaction.abort()
