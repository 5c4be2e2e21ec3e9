"""Newest is the highest seq; what is incomplete or damaged neither counts nor hides what is intact."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from gockpt.errors import (
    CheckpointNotFound,
    CheckpointPruned,
    ChunkCorrupt,
    FormatTooNew,
    GockptError,
    ManifestCorrupt,
    NotACheckpoint,
)
from gockpt.storage.format.checksum import crc32c
from gockpt.storage.read import find
from gockpt.storage.read.find import (
    CheckpointEntry,
    damaged_checkpoints,
    latest_step,
    list_checkpoints,
    open_checkpoint,
)
from gockpt.storage.read.local_location import LocalLocation, is_gone

ARRAYS = {("a",): ((4, 3), "float32"), ("b",): ((), "int64")}


@pytest.fixture
def save(write, tmp_path):
    """Write a small checkpoint into ``tmp_path/ckpts``."""

    def save(step, seq, **options):
        options.setdefault("attempt", f"{seq:08x}")
        return write(tmp_path / "ckpts", ARRAYS, step=step, seq=seq, **options)

    return save


def opened(path, step=None):
    with open_checkpoint(path, step) as checkpoint:
        return checkpoint.step, checkpoint.seq


def test_newest_is_the_highest_seq_not_the_highest_step(save, tmp_path):
    save(1000, 1)
    save(1500, 2)
    save(1100, 3)
    path = tmp_path / "ckpts"
    assert [(entry.step, entry.seq) for entry in list_checkpoints(path)] == [(1000, 1), (1500, 2), (1100, 3)]
    assert opened(path) == (1100, 3)
    assert opened(str(path), 1500) == (1500, 2)
    assert list_checkpoints(path)[0] == CheckpointEntry(
        step=1000,
        seq=1,
        attempt="00000001",
        path=f"{path}/step-0000001000",
        created="2026-01-01T00:00:00+00:00",
        nbytes=56,
        exact=True,
        metrics={},
        run="0" * 32,
    )


def test_a_step_can_be_opened_by_its_own_path_under_any_name(save, tmp_path):
    written = save(5, 1)
    assert opened(written.path) == opened(written.path, 5) == (5, 1)
    with pytest.raises(CheckpointNotFound, match="is the checkpoint of step 5, not of 6"):
        open_checkpoint(written.path, 6)
    best = tmp_path / "best"
    shutil.copytree(written.path, best)
    (tmp_path / "link").symlink_to(best)
    assert opened(best) == opened(tmp_path / "link") == (5, 1)
    assert [entry.path for entry in list_checkpoints(best)] == [str(best)]


def test_what_has_no_manifest_is_passed_over_in_silence(save, tmp_path, caplog):
    save(1, 1)
    path = tmp_path / "ckpts"
    (path / "step-0000000002").mkdir()
    save(3, 3, directory="step-0000000003.partial-00000003")
    save(4, 4, directory=".trash-00000004")
    save(5, 5, directory="step-5")
    (path / "notes.txt").write_text("mine")
    (path / ".gockpt.lock").touch()
    assert [entry.step for entry in list_checkpoints(path, superseded=True)] == [1]
    assert opened(path) == (1, 1)
    assert not caplog.records
    with pytest.raises(CheckpointNotFound, match="no checkpoint of step 2 in .*; there are 1"):
        open_checkpoint(path, 2)
    for name in ("step-0000000003.partial-00000003", ".trash-00000004"):
        with pytest.raises(NotACheckpoint, match="never published"):
            open_checkpoint(path / name)


def test_a_damaged_manifest_is_an_error_only_when_that_step_is_wanted(save, tmp_path, caplog):
    save(1, 1)
    path = save(2, 2).path / "gockpt.json"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert opened(tmp_path / "ckpts") == (1, 1)
        assert [entry.step for entry in list_checkpoints(tmp_path / "ckpts")] == [1]
    assert all("passing over a damaged checkpoint" in record.message for record in caplog.records)
    assert len(caplog.records) == 2
    assert "step-0000000002/gockpt.json is damaged" in caplog.text
    with pytest.raises(ManifestCorrupt, match="is damaged"):
        open_checkpoint(tmp_path / "ckpts", 2)
    with pytest.raises(ManifestCorrupt, match="is damaged"):
        open_checkpoint(path.parent)
    shutil.rmtree(tmp_path / "ckpts/step-0000000001")
    with pytest.raises(ManifestCorrupt, match="is damaged"):
        open_checkpoint(tmp_path / "ckpts")


def test_a_renamed_checkpoint_is_not_taken_for_what_its_name_says(save, tmp_path):
    save(1, 1)
    save(2, 2, directory="step-0000000009")
    save(3, 3, attempt="0000000a", directory="step-0000000003.old-0000000b")
    path = tmp_path / "ckpts"
    assert opened(path) == (1, 1)
    with pytest.raises(
        ManifestCorrupt, match="step-0000000009 holds step 2, attempt 00000002: it was renamed"
    ):
        open_checkpoint(path, 9)
    with pytest.raises(CheckpointNotFound):
        open_checkpoint(path, 3)


def test_what_was_replaced_is_listed_on_request_and_opened_only_in_need(save, tmp_path):
    save(1, 1)
    save(2, 2, directory="step-0000000002.old-00000002")
    save(2, 3, directory="step-0000000002.old-00000003")
    save(2, 4)
    path = tmp_path / "ckpts"
    assert [entry.seq for entry in list_checkpoints(path)] == [1, 4]
    everything = list_checkpoints(path, superseded=True)
    assert [(entry.seq, entry.superseded) for entry in everything] == [
        (1, False),
        (2, True),
        (3, True),
        (4, False),
    ]
    assert opened(path) == opened(path, 2) == (2, 4)
    # A crash between two renames: the successor never came to stand.
    shutil.rmtree(path / "step-0000000002")
    assert [entry.seq for entry in list_checkpoints(path)] == [1, 3]
    assert opened(path) == opened(path, 2) == (2, 3)
    assert opened(path / "step-0000000002.old-00000002") == (2, 2)


def test_what_was_replaced_never_comes_before_what_stands_in_its_place(save, tmp_path):
    save(2, 9, directory="step-0000000002.old-00000009")
    save(2, 4)
    assert opened(tmp_path / "ckpts") == opened(tmp_path / "ckpts", 2) == (2, 4)
    assert [entry.seq for entry in list_checkpoints(tmp_path / "ckpts")] == [4]


def test_a_step_is_told_apart_from_its_damaged_successor(save, tmp_path):
    save(2, 2, directory="step-0000000002.old-00000002")
    (save(2, 3).path / "gockpt.json").write_bytes(b"{}\n")
    assert opened(tmp_path / "ckpts") == (2, 2)
    with pytest.raises(ManifestCorrupt, match="doesn't end with its checksum"):
        open_checkpoint(tmp_path / "ckpts", 2)


def test_paths_that_hold_nothing_say_so(tmp_path):
    with pytest.raises(CheckpointNotFound, match="there is no such directory"):
        open_checkpoint(tmp_path / "nowhere")
    assert list_checkpoints(tmp_path / "nowhere") == []
    (tmp_path / "file").touch()
    for call in (open_checkpoint, list_checkpoints):
        with pytest.raises(NotACheckpoint, match="is not a directory"):
            call(tmp_path / "file")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointNotFound, match="no complete checkpoint in"):
        open_checkpoint(empty)
    (empty / "step-0000000001.partial-00000001").mkdir()
    with pytest.raises(CheckpointNotFound, match="no complete checkpoint in"):
        open_checkpoint(empty, 1)
    foreign = tmp_path / "foreign"
    (foreign / "sub").mkdir(parents=True)
    with pytest.raises(NotACheckpoint, match="holds no checkpoints, but 'sub'"):
        open_checkpoint(foreign)
    assert list_checkpoints(foreign) == []
    (foreign / "zarr.json").write_text("{}")
    with pytest.raises(NotACheckpoint, match=r"has no gockpt\.json"):
        open_checkpoint(foreign)


def test_an_unknown_step_shows_the_last_twenty(save, tmp_path):
    for n in range(1, 24):
        save(n, n)
    with pytest.raises(CheckpointNotFound, match=r"the last 20 of 23 are 4, 5, .*, 23$"):
        open_checkpoint(tmp_path / "ckpts", 99)


def test_a_linked_step_is_not_followed(save, tmp_path):
    save(1, 1)
    elsewhere = tmp_path / "elsewhere"
    save(2, 2).path.rename(elsewhere)
    (tmp_path / "ckpts/step-0000000002").symlink_to(elsewhere)
    assert opened(tmp_path / "ckpts") == (1, 1)
    with pytest.raises(ManifestCorrupt, match="to read it, give its own path"):
        open_checkpoint(tmp_path / "ckpts", 2)
    assert opened(tmp_path / "ckpts/step-0000000002") == (2, 2)


@pytest.mark.parametrize("call", [lambda path: opened(path)[0], lambda path: list_checkpoints(path)[0].step])
def test_pruned_between_listing_and_opening_means_looking_again(save, tmp_path, monkeypatch, call):
    first = save(1, 1)
    real = LocalLocation.open
    calls = []

    def open_child(location, child):
        if not calls:  # its name was found; now its successor comes, and it goes
            save(2, 2)
            shutil.rmtree(first.path)
        calls.append(child.name)
        return real(location, child)

    monkeypatch.setattr(LocalLocation, "open", open_child)
    assert call(tmp_path / "ckpts") == 2
    assert calls == ["step-0000000001", "step-0000000002"]


def test_each_manifest_is_opened_once_and_none_that_was_replaced(save, tmp_path, monkeypatch):
    for n in (1, 3, 2):
        save(n, n)
    save(3, 9, directory="step-0000000003.old-00000009")
    read = []
    real = find.manifest_bytes
    monkeypatch.setattr(find, "manifest_bytes", lambda files, path: read.append(path) or real(files, path))
    assert opened(tmp_path / "ckpts") == (3, 3)
    assert sorted(read) == [f"{tmp_path}/ckpts/step-000000000{n}" for n in (1, 2, 3)]


def make_later(written, **changes):
    """Seal a checkpoint's manifest again, of a later version and otherwise changed."""
    path = written.path / "gockpt.json"
    document = json.loads(path.read_bytes().splitlines()[0]) | {"version": 4} | changes
    line = json.dumps(document).encode() + b"\n"
    path.write_bytes(line + b'{"crc32c": "%08x"}\n' % crc32c(line))


@pytest.mark.parametrize("changes", [{}, {"seq": None}, {"seq": 5, "arrays": "elsewhere"}])
def test_no_older_one_is_taken_for_the_newest_of_a_newer_format(save, tmp_path, caplog, changes):
    save(1, 1)
    make_later(save(2, 2), **changes)
    before = set(os.listdir("/proc/self/fd"))
    for call in (open_checkpoint, latest_step):
        with pytest.raises(FormatTooNew, match="format version 4 is unknown .*upgrade gockpt"):
            call(tmp_path / "ckpts")
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(FormatTooNew, match="upgrade gockpt"):
        open_checkpoint(tmp_path / "ckpts", 2)
    with open_checkpoint(tmp_path / "ckpts", 1) as found:
        assert found.step == 1
    assert [entry.step for entry in list_checkpoints(tmp_path / "ckpts")] == [1]
    assert "format version 4 is unknown" in caplog.text


def test_an_older_one_of_a_newer_format_is_passed_over_and_named(save, tmp_path, caplog):
    make_later(save(1, 1))
    save(2, 2)
    assert opened(tmp_path / "ckpts") == (2, 2)
    assert "format version 4 is unknown" in caplog.text


def test_what_was_replaced_may_be_of_a_newer_format(save, tmp_path):
    save(1, 1)
    make_later(save(1, 9, directory="step-0000000001.old-00000009"))
    assert opened(tmp_path / "ckpts") == (1, 1)


# ---- pruned while being read


def reads(checkpoint):
    return [
        lambda: checkpoint.read_into("a", None, np.empty(48, np.uint8)),
        lambda: checkpoint.read_into("a", None, np.empty(48, np.uint8), verify=False),
        checkpoint.state,
        checkpoint.verify,
    ]


@pytest.mark.parametrize("how", ["removed", "being removed", "path removed"])
@pytest.mark.parametrize("itself", [False, True])
def test_pruned_while_open_is_told_apart_from_damage(save, tmp_path, how, itself):
    written = save(3, 1)
    for read in range(4):
        if not written.path.exists():
            written = save(3, 1)
        with open_checkpoint(written.path if itself else tmp_path / "ckpts") as checkpoint:
            trash = tmp_path / "ckpts/.trash-00000001"
            written.path.rename(trash)
            if how == "being removed":
                for name in ("a/c.0.0", "state.json", "blocks.crc32c", "gockpt.json"):
                    (trash / name).unlink()
            else:
                shutil.rmtree(trash if how == "removed" else tmp_path / "ckpts")
            with pytest.raises(CheckpointPruned, match="the checkpoint of step 3 .* open a newer one"):
                reads(checkpoint)[read]()
        shutil.rmtree(trash, ignore_errors=True)


def test_what_is_missing_in_a_checkpoint_that_only_moved_is_damage(save, tmp_path):
    written = save(3, 1)
    with open_checkpoint(tmp_path / "ckpts") as checkpoint:
        moved = written.path.rename(tmp_path / "ckpts/step-0000000003.old-00000001")
        out = np.empty(48, np.uint8)
        checkpoint.read_into("a", None, out)
        assert out.tobytes() == written.values["a"].tobytes()
        (moved / "a/c.0.0").unlink()
        (moved / "state.json").unlink()
        with pytest.raises(ChunkCorrupt, match=r"a/c\.0\.0 is missing"):
            checkpoint.read_into("a", None, out)
        with pytest.raises(ManifestCorrupt, match=r"state\.json is missing"):
            checkpoint.state()
        assert [problem.what for problem in checkpoint.verify().problems].count("missing") == 2


def test_where_the_parent_cannot_be_listed_only_a_removed_directory_counts_as_gone(save, monkeypatch):
    written = save(3, 1)
    fd = os.open(written.path, os.O_RDONLY)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    try:
        assert not is_gone(fd)
        monkeypatch.setattr(os, "listdir", refuse)
        assert not is_gone(fd)
        shutil.rmtree(written.path)
        assert is_gone(fd)
    finally:
        os.close(fd)


def test_an_unreadable_checkpoint_is_not_silently_passed_over(save, tmp_path, monkeypatch):
    save(1, 1)
    save(2, 2)
    real = find.manifest_bytes

    def manifest_bytes(directory, path):
        if path.endswith("1"):
            raise PermissionError(13, "Permission denied", path)
        return real(directory, path)

    monkeypatch.setattr(find, "manifest_bytes", manifest_bytes)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(PermissionError):
        open_checkpoint(tmp_path / "ckpts")
    assert set(os.listdir("/proc/self/fd")) == before
    assert opened(tmp_path / "ckpts", 2) == (2, 2)


def test_state_comes_back_and_damage_is_found(save, tmp_path):
    state = {"groups": [{"lr": 0.1, "params": ["a"]}], "deep": [[[[1]]]], "text": "ü\n"}
    written = save(1, 1, state=state)
    with open_checkpoint(tmp_path / "ckpts") as checkpoint:
        assert checkpoint.state() == state
        assert checkpoint.exact is True
        assert repr(checkpoint).startswith("<StoredCheckpoint step=1 seq=1 arrays=2 at ")
        path = written.path / "state.json"
        path.write_bytes(path.read_bytes().replace(b"0.1", b"0.2"))
        with pytest.raises(ManifestCorrupt, match=r"state\.json is damaged"):
            checkpoint.state()
        path.write_bytes(path.read_bytes() + b" ")
        with pytest.raises(ManifestCorrupt, match="bytes instead of"):
            checkpoint.state()


def test_nothing_leaks(save, tmp_path):
    save(1, 1)
    (save(2, 2).path / "gockpt.json").write_bytes(b"")
    (tmp_path / "ckpts/step-0000000003").mkdir()
    before = set(os.listdir("/proc/self/fd"))
    opened(tmp_path / "ckpts")
    opened(tmp_path / "ckpts/step-0000000001")
    list_checkpoints(tmp_path / "ckpts")
    for step in (2, 3):
        with pytest.raises(GockptError):
            open_checkpoint(tmp_path / "ckpts", step)
    assert set(os.listdir("/proc/self/fd")) == before


# ---- without reading every manifest to its end


def test_opening_the_newest_reads_one_manifest_to_its_end(save, tmp_path, monkeypatch):
    for n in range(1, 6):
        save(n, n)
    read = []
    real = find.parse
    monkeypatch.setattr(find, "parse", lambda data, where: read.append(where) or real(data, where=where))
    path = tmp_path / "ckpts"
    assert opened(path) == (5, 5)
    assert latest_step(path) == list_checkpoints(path)[-1].step
    assert read[:2] == [f"{path}/step-0000000005/gockpt.json"] * 2
    assert len(read) == 2 + 5  # a list promises that all of them are valid


def test_the_newest_is_none_where_nothing_complete_is(save, tmp_path):
    assert latest_step(tmp_path / "nowhere") is None
    written = save(1, 1)
    assert latest_step(written.path) == latest_step(str(tmp_path / "ckpts")) == 1
    (written.path / "gockpt.json").write_bytes(b"{}")
    assert latest_step(tmp_path / "ckpts") is None
    with pytest.raises(ManifestCorrupt):
        latest_step(written.path)
    with pytest.raises(NotACheckpoint):
        latest_step(written.path / "gockpt.json")


@pytest.mark.parametrize("old", [False, True])
def test_an_undamaged_manifest_that_is_not_valid_is_passed_over(save, tmp_path, caplog, old):
    save(1, 1)
    if old:
        save(2, 2, directory="step-0000000002.old-00000002")
    save(2, 3, distort=lambda manifest: replace(manifest, parent=7))
    path = tmp_path / "ckpts"
    expected = (2, 2) if old else (1, 1)
    assert opened(path) == expected
    assert "parent 7 is not older than seq 3" in caplog.text
    assert latest_step(path) == list_checkpoints(path)[-1].step == expected[0]
    assert list_checkpoints(path)[-1].seq == expected[1]
    with pytest.raises(ManifestCorrupt, match="parent 7"):
        open_checkpoint(path, 2)
    assert [child.name for child in damaged_checkpoints(path)] == ["step-0000000002"]
