"""A lock file or directory that is removed, moved or replaced: the writer notices before it publishes."""

from __future__ import annotations

import os
import shutil

import pytest

from gockpt.errors import StorageError
from gockpt.storage.format import step_names
from gockpt.storage.local.store import Store
from gockpt.storage.read import find


def remove_lock(path):
    (path / step_names.LOCK_FILE).unlink()


def replace_lock(path):
    remove_lock(path)
    (path / step_names.LOCK_FILE).touch()


def lock_is_directory(path):
    remove_lock(path)
    (path / step_names.LOCK_FILE).mkdir()


def lock_is_link(path):
    os.rename(path / step_names.LOCK_FILE, path / "elsewhere")
    (path / step_names.LOCK_FILE).symlink_to("elsewhere")


def remove_all(path):
    shutil.rmtree(path)


def remove_and_make_again(path):
    shutil.rmtree(path)
    path.mkdir()


def move_away(path):
    os.rename(path, path.with_name("moved"))


def move_and_copy_back(path):
    move_away(path)
    shutil.copytree(path.with_name("moved"), path)


def move_the_parent(path):
    os.rename(path.parent, path.parent.with_name("parent-moved"))


def file_instead(path):
    shutil.rmtree(path)
    path.touch()


CASES = [
    (remove_lock, "removed or moved away"),
    (replace_lock, "replaced"),
    (lock_is_directory, "replaced"),
    (lock_is_link, "replaced"),
    (remove_all, "removed or moved away"),
    (remove_and_make_again, "replaced"),
    (move_away, "removed or moved away"),
    (move_and_copy_back, "replaced"),
    (move_the_parent, "removed or moved away"),
    (file_instead, "replaced"),
]


@pytest.fixture
def path(tmp_path):
    made = tmp_path / "parent" / "ckpts"
    made.mkdir(parents=True)
    return made


@pytest.mark.parametrize(("happen", "message"), CASES, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("when", ["before it begins", "before it publishes"])
def test_it_is_noticed_and_nothing_is_published(path, small_sample, happen, message, when):
    with Store(path) as store:
        small_sample.save(store, 1, marker=1)
        if when == "before it begins":
            happen(path)
            with pytest.raises(StorageError, match=rf"{message}.*gockpt\.close\(\)"):
                small_sample.begin(store, 2)
        else:
            transaction = small_sample.begin(store, 2)
            small_sample.write(transaction, 2)
            happen(path)
            # Files that are gone may be what is noticed first.
            with pytest.raises(StorageError):
                transaction.commit()
            transaction.abort()
    for place in path.parent.parent.rglob("step-*"):
        assert not place.name.startswith("step-0000000002") or ".partial-" in place.name
    lock = path / step_names.LOCK_FILE
    if path.is_dir() and (lock.is_file() or not lock.exists()) and not lock.is_symlink():
        assert [entry.step for entry in find.list_checkpoints(path)] in ([], [1])
        with Store(path) as store:  # the way out
            small_sample.save(store, 3, marker=3)
        assert find.latest_step(path) == 3


def test_moved_and_moved_back_it_goes_on(path, small_sample):
    with Store(path) as store:
        transaction = small_sample.begin(store, 1)
        move_away(path)
        small_sample.write(transaction, 1)
        os.rename(path.with_name("moved"), path)
        transaction.commit()
    assert find.latest_step(path) == 1


def test_a_link_as_the_users_own_path_is_followed(path, small_sample):
    link = path.with_name("link")
    link.symlink_to("ckpts")
    with Store(link) as store:
        small_sample.save(store, 1, marker=1)
        link.unlink()
        path.with_name("other").mkdir()
        link.symlink_to("other")
        with pytest.raises(StorageError, match="replaced"):
            small_sample.begin(store, 2)
    assert os.listdir(path.with_name("other")) == []
