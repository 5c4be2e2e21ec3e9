"""Retention on the disk: what the rules name stays, what was checked is deleted, readers survive."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from gockpt.errors import StorageError
from gockpt.options import Keep
from gockpt.storage.format import step_names
from gockpt.storage.format.checksum import crc32c
from gockpt.storage.local import verified
from gockpt.storage.local.store import Store
from gockpt.storage.read.find import list_checkpoints, open_checkpoint


@pytest.fixture
def save(small_sample):
    """Write one checkpoint with a loss, and return what was published."""

    def save(store, step, loss=None):
        own = {"step": step, "optimizer_steps": step, "exact": True}
        own |= {} if loss is None else {"metrics": {"loss": loss}}
        with store.begin(
            step, small_sample.layouts, state={"marker": step}, attributes={"gockpt": own}, exact=True
        ) as transaction:
            small_sample.write(transaction, step)
            return transaction.commit()

    return save


def steps_in(path):
    return [entry.step for entry in list_checkpoints(path, superseded=True)]


@pytest.mark.parametrize("restart", [False, True])
def test_milestones_the_best_and_the_newest_stay(scratch, save, faults, restart):
    keep = Keep(newest=2, every=30, best=1, metric="loss")
    fs = faults.NoWait()
    with Store(scratch, fs=fs) as store:
        for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, 4.0), (50, None), (60, 9.0)):
            save(store, step, loss)
        gone = [] if restart else store.prune(keep)
    if restart:  # what counts is on the disk
        with Store(scratch, fs=fs) as store:
            gone = store.prune(keep)
    assert gone == [10, 40]
    assert steps_in(scratch) == [20, 30, 50, 60]


def test_an_abandoned_branch_goes_first(scratch, save, faults):
    with Store(scratch, fs=faults.NoWait()) as store:
        for step in (1000, 1500):
            save(store, step)
        assert store.prune(Keep(newest=2)) == []
        save(store, 1100)
        assert store.prune(Keep(newest=2)) == [1500]
    assert steps_in(scratch) == [1000, 1100]


def test_the_last_one_that_was_verified_here_stays(scratch, save, faults):
    with Store(scratch, fs=faults.NoWait()) as store:
        for step in (1, 2):
            save(store, step)
        with open_checkpoint(scratch, 1) as stored:
            assert not verified.is_known(stored.manifest.attempt)
            assert stored.verify().ok
            assert verified.is_known(stored.manifest.attempt)
        for step in (3, 4):
            save(store, step)
        assert store.prune(2) == [2]
        with open_checkpoint(scratch, 4) as stored:
            assert stored.verify().ok
        assert store.prune(2) == [1]


def test_a_verification_that_failed_is_no_reason_to_stay(scratch, save, faults):
    with Store(scratch, fs=faults.NoWait()) as store:
        one = save(store, 1)
        with open_checkpoint(scratch, 1) as stored:
            assert stored.verify().ok
            os.truncate(f"{one.path}/blocks.crc32c", 0)
            assert not stored.verify().ok
        assert not verified.is_known(one.attempt)
        for step in (2, 3):
            save(store, step)
        assert store.prune(2) == [1]


@pytest.mark.parametrize("harm", ["flip", "gone"])
def test_what_is_no_checkpoint_any_more_does_not_count_as_the_newest(scratch, save, faults, caplog, harm):
    with Store(scratch, fs=faults.NoWait()) as store:
        paths = [save(store, step).path for step in (1, 2, 3, 4)]
        manifest = os.path.join(paths[3], "gockpt.json")
        if harm == "gone":
            os.unlink(manifest)
        else:
            with open(manifest, "r+b") as file:
                file.write(b"?")
        with caplog.at_level(logging.WARNING):
            assert store.prune(2) == [1]
        assert "no longer a complete checkpoint" in caplog.text
        assert os.path.isdir(paths[3])  # damaged: not ours to delete
        assert store.prune(2) == []
    assert sorted(name for name in os.listdir(scratch) if name.startswith("step")) == [
        step_names.of_step(step) for step in (2, 3, 4)
    ]


def test_when_all_that_would_stay_is_damaged_nothing_goes(scratch, save, faults):
    with Store(scratch, fs=faults.NoWait()) as store:
        paths = [save(store, step).path for step in (1, 2, 3)]
        for path in paths[1:]:
            os.unlink(os.path.join(path, "gockpt.json"))
        assert store.prune(1) == []
    assert all(os.path.isdir(path) for path in paths)


def test_a_reader_of_what_is_pruned_goes_on_or_is_told(scratch, save, faults):
    with Store(scratch, fs=faults.NoWait()) as store:
        save(store, 10)
        with open_checkpoint(scratch) as stored:
            for step in (20, 30):
                save(store, step)
            assert store.prune(Keep(newest=2)) == [10]
            assert stored.files.is_gone()


def test_every_one_that_is_to_stay_is_looked_at(scratch, save, faults):
    """A milestone that is younger than the newest that count must not hide that one of these is lost."""
    with Store(scratch, fs=faults.NoWait()) as store:
        for step in (900, 1100, 2000, 1200):
            save(store, step)
        os.rename(scratch / step_names.of_step(1100), scratch / "elsewhere")
        assert store.prune(Keep(newest=2, every=1000)) == []
    assert steps_in(scratch) == [900, 2000, 1200]


def test_of_two_with_one_number_none_is_deleted(scratch, save, faults):
    """One was copied in from another path."""
    other = scratch / "other"
    with Store(scratch / "path", fs=faults.NoWait()) as store, Store(other, fs=faults.NoWait()) as second:
        save(store, 10)
        save(second, 20)
    name = step_names.of_step(20)
    os.rename(other / name, scratch / "path" / name)
    with Store(scratch / "path", fs=faults.NoWait()) as store:
        save(store, 10)
        assert store.prune(Keep(newest=5, every=10)) == []
        assert {10, 20} == set(steps_in(scratch / "path"))


def test_numbers_go_on_above_the_parent_s_though_it_was_moved_away(scratch, save, faults):
    with Store(scratch, fs=faults.NoWait(), parent=7) as store:
        assert save(store, 1).seq == 8


def test_a_number_above_all_numbers_is_not_counted_from(scratch, save, faults):
    with Store(scratch, fs=faults.NoWait()) as store:
        store.continue_after(2**63 - 1)
        assert save(store, 1).seq == 1


def test_what_no_checkpoint_has_judges_none(scratch, save, faults, caplog):
    """A misspelt metric: nothing that counts goes, and that is told once; what was replaced goes as ever."""
    keep = Keep(newest=1, best=1, metric="loss")
    with Store(scratch, fs=faults.NoWait()) as store, caplog.at_level(logging.WARNING):
        for step in (10, 20, 20, 30):
            save(store, step)
            assert store.prune(keep) == []
        assert steps_in(scratch) == [10, 20, 30]
        assert [record.getMessage().count("named 'loss'") for record in caplog.records] == [1]
        save(store, 40, 2.0)
        save(store, 50)
        assert store.prune(keep) == [10, 20, 30]
    assert steps_in(scratch) == [40, 50]


@pytest.mark.parametrize("code", [errno.EIO, errno.EBUSY, errno.EACCES])
def test_what_could_not_be_deleted_to_its_end_is_tried_again(scratch, save, faults, code):
    class Stuck(faults.NoWait):
        broken = True

        def unlink(self, name, *, dir_fd=None):
            if self.broken and name.startswith("c."):
                raise OSError(code, os.strerror(code))
            super().unlink(name, dir_fd=dir_fd)

    def trash():
        return [name for name in os.listdir(scratch) if name.startswith(".trash-")]

    fs = Stuck()
    with Store(scratch, fs=fs) as store:
        for step in (1, 2, 3):
            save(store, step)
        with pytest.raises(StorageError):
            store.prune(2)
        assert len(trash()) == 1
        assert store.prune(2) == []  # still stuck: that is nobody's failure
        assert len(trash()) == 1
        fs.broken = False
        assert store.prune(2) == []
        assert trash() == []
    assert steps_in(scratch) == [2, 3]


def test_what_only_looks_undamaged_neither_counts_nor_goes(scratch, save, faults):
    """Its checksum is right and it says who it is, but no reader takes it: another program wrote it."""
    with Store(scratch, fs=faults.NoWait()) as store:
        paths = [save(store, step).path for step in (1, 2, 3, 4, 5)]
    for path in (paths[0], paths[4]):
        manifest = Path(path, "gockpt.json")
        line = manifest.read_bytes().splitlines(keepends=True)[0].replace(b'"arrays":[', b'"arrays":[7,')
        manifest.write_bytes(line + b'{"crc32c": "%08x"}\n' % crc32c(line))
    assert steps_in(scratch) == [2, 3, 4]
    with Store(scratch, fs=faults.NoWait()) as store:
        assert store.prune(2) == [2]
        assert save(store, 6).seq == 6
    assert sorted(name for name in os.listdir(scratch) if name.startswith("step")) == [
        step_names.of_step(step) for step in (1, 3, 4, 5, 6)
    ]
