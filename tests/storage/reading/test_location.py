"""The contract of locations and of the files in them: one suite, and one subclass for each backend."""

from __future__ import annotations

import os
import shutil
import threading
import zipfile
from contextlib import closing
from functools import partial

import numpy as np
import obstore
import pytest
from obstore.store import MemoryStore

from gockpt.errors import (
    CheckpointCorrupt,
    CheckpointNotFound,
    CheckpointPruned,
    ChunkCorrupt,
    ManifestCorrupt,
    NotACheckpoint,
)
from gockpt.storage.format import step_names
from gockpt.storage.object_store.client import Objects
from gockpt.storage.read.find import (
    damaged_checkpoints,
    latest_step,
    list_checkpoints,
    location_at,
    newest_manifest,
    open_checkpoint,
    open_listed,
)
from gockpt.storage.read.location import GONE, Child, read_small

ARRAYS = {("a",): ((4, 3), "float32"), ("deep", "b"): ((), "int64")}
CHUNK = "a/c.0.0"


class LocationTests:
    """What every backend promises. A subclass says how checkpoints get there and how they are changed.

    Attributes:
        where: What a user passes to name the place.
    """

    # ---- for a subclass to provide

    where: object

    def store(self, directory, step, seq, attempt):
        """Bring a checkpoint's directory to the place, and return its name there."""
        raise NotImplementedError

    def get(self, path):
        """Return a file's bytes."""
        raise NotImplementedError

    def put(self, path, data):
        """Write a file, over one that is there."""
        raise NotImplementedError

    def remove(self, path):
        """Remove a file."""
        raise NotImplementedError

    def below(self, name):
        """Return what a user passes to name one checkpoint itself."""
        raise NotImplementedError

    # ---- what they share

    @pytest.fixture
    def publish(self, write, tmp_path):
        def publish(step, seq, **options):
            attempt = f"{seq:08x}"
            written = write(tmp_path / f"made-{seq}", ARRAYS, step=step, seq=seq, attempt=attempt, **options)
            return self.store(written.path, step, seq, attempt)

        return publish

    @pytest.fixture
    def files(self, publish):
        """The open files of one checkpoint, with one of six bytes more."""
        name = publish(3, 1)
        self.put(f"{name}/six", b"012345")
        with closing(location_at(self.where)) as location:
            (child,) = location.children()
            files = location.open(child)
        with closing(files):  # they stay open without their location
            yield files

    def flip(self, path):
        """Change one bit of a file that is there."""
        data = bytearray(self.get(path))
        data[10] ^= 4
        self.put(path, bytes(data))

    # ---- locations

    def test_children_are_what_names_say(self, publish):
        names = [publish(step, seq) for step, seq in ((1, 1), (3, 2), (2, 3))]
        self.put("notes.txt", b"mine")
        self.put("step-5/gockpt.json", b"{}")
        self.put("other/gockpt.json", b"{}")
        with closing(location_at(self.where)) as location:
            children = location.children()
            assert {child.name: child.step for child in children} == dict(zip(names, (1, 3, 2), strict=True))
            assert not any(child.replaced for child in children)
            numbers = [child.seq for child in children]
            assert numbers in ([3, 2, 1], [None] * 3)
            for child in children:
                assert child.path == f"{location.path}/{child.name}"
                with closing(location.open(child)) as files:
                    assert read_small(files, "gockpt.json", limit=10_000).startswith(b"{")

    def test_a_child_that_is_gone_says_so(self, publish):
        name = publish(1, 1)
        with closing(location_at(self.where)) as location:
            (child,) = location.children()
            self.remove(name)
            with pytest.raises(OSError, match="[Nn]o such") as caught, closing(location.open(child)) as files:
                files.open("gockpt.json")
            assert caught.value.errno in GONE

    def test_a_checkpoint_is_a_location_itself(self, publish):
        where = self.below(publish(7, 1))
        with closing(location_at(where)) as location:
            (itself,) = location.children()
            path = location.path
            assert itself == Child("", path)
            with closing(location.open(itself)) as files:
                assert "state.json" in files.names("")
        with closing(location_at(where)) as location:
            assert newest_manifest(location).step == 7
        assert [entry.path for entry in list_checkpoints(where)] == [path]
        assert latest_step(where) == 7
        assert damaged_checkpoints(where) == {}
        for entry in (None, 7):
            with open_checkpoint(where, entry) as found:
                assert (found.step, found.path) == (7, path)
        with open_listed(where, list_checkpoints(where)[0]) as found:
            assert found.step == 7
        with pytest.raises(CheckpointNotFound, match="is the checkpoint of step 7, not of 8"):
            open_checkpoint(where, 8)

    def test_a_damaged_checkpoint_itself_is_an_error(self, publish, caplog):
        name = publish(7, 1)
        self.flip(f"{name}/gockpt.json")
        for call in (open_checkpoint, list_checkpoints, latest_step, damaged_checkpoints):
            with pytest.raises(ManifestCorrupt, match="is damaged"):
                call(self.below(name))
        assert not caplog.records

    # ---- the files of one checkpoint

    def test_a_file_is_read_from_anywhere_into_anything(self, files):
        for start in range(7):
            for stop in range(start, 7):
                one, two = bytearray(b"??"), bytearray(max(0, stop - start - 2))
                views = [memoryview(one)[: stop - start], memoryview(b"")[:0], memoryview(two)]
                with files.open("six") as file:
                    assert (file.nbytes, file.path) == (6, "six")
                    assert file.read_into(views, start) == stop - start
                assert (one[: stop - start] + two).decode() == "012345"[start:stop]

    def test_a_file_of_another_size_is_refused_before_its_bytes_are_used(self, files):
        for nbytes in (5, 7):
            with (
                pytest.raises(CheckpointCorrupt, match=f"^six has 6 bytes instead of {nbytes}$"),
                files.open("six", nbytes=nbytes) as file,
            ):
                file.read_into([memoryview(bytearray(3))], 0)

    def test_a_read_beyond_the_end_says_where_it_ends(self, files):
        with files.open("six") as file, pytest.raises(CheckpointCorrupt, match="^six ends at byte 6; "):
            file.read_into([memoryview(bytearray(4))], 4)

    def test_a_small_file_has_a_limit(self, files):
        assert read_small(files, "six", limit=6, nbytes=6) == b"012345"
        with pytest.raises(CheckpointCorrupt, match="six has 6 bytes; more than 5 can't be right"):
            read_small(files, "six", limit=5)

    @pytest.mark.parametrize("path", ["nothing", "a/nothing", "nothing/a"])
    @pytest.mark.parametrize("nbytes", [None, 3])
    def test_what_is_not_there_says_so(self, files, path, nbytes):
        with pytest.raises(OSError, match="[Nn]o such") as caught, files.open(path, nbytes=nbytes) as file:
            file.read_into([memoryview(bytearray(3))], 0)
        assert caught.value.errno in GONE

    @pytest.mark.parametrize("path", ["", "/six", "a//c", "../six", "a/../six", "./six", "si\0x"])
    def test_paths_that_are_not_plain_are_refused(self, files, path):
        with pytest.raises(CheckpointCorrupt, match="is not a plain path inside the checkpoint"):
            files.open(path)

    def test_names_are_those_in_a_directory(self, files):
        top = {"a", "deep", "zarr.json", "state.json", "blocks.crc32c", "gockpt.json", "six"}
        assert set(files.names("")) == top
        assert set(files.names("a")) == {"c.0.0", "zarr.json"}
        assert set(files.names("deep")) == {"b", "zarr.json"}
        assert files.names("a").linked == 0

    def test_threads_read_at_once(self, files):
        wrong = []

        def read(at):
            for _ in range(20):
                data = bytearray(3)
                with files.open("six") as file:
                    file.read_into([memoryview(data)], at)
                wrong.extend([data] if data.decode() != "012345"[at : at + 3] else [])

        threads = [threading.Thread(target=partial(read, at)) for at in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_closing_again_does_nothing(self, files):
        files.close()
        files.close()
        with closing(location_at(self.where)) as location:
            location.close()

    # ---- what find makes of it

    def test_the_newest_is_the_highest_seq(self, publish):
        for step, seq in ((1000, 1), (1500, 2), (1100, 3)):
            publish(step, seq)
        entries = list_checkpoints(self.where)
        assert [(entry.step, entry.seq) for entry in entries] == [(1000, 1), (1500, 2), (1100, 3)]
        assert latest_step(self.where) == 1100
        with open_checkpoint(self.where) as found, open_checkpoint(self.where, 1500) as wanted:
            assert (found.step, found.seq, wanted.seq) == (1100, 3, 2)
            assert found.path == entries[-1].path
        with closing(location_at(self.where)) as location:
            assert newest_manifest(location).seq == 3
        for entry in entries:
            with open_listed(self.where, entry) as found:
                assert (found.path, found.seq) == (entry.path, entry.seq)
        with pytest.raises(
            CheckpointNotFound, match=r"no checkpoint of step 4 in .*; there are 1000, 1100, 1500"
        ):
            open_checkpoint(self.where, 4)

    def test_what_comes_while_another_goes_is_not_missed(self, publish, monkeypatch):
        publish(1, 1)
        going = publish(2, 2)
        with closing(location_at(self.where)) as location:
            backend = type(location)
        real, calls = backend.open, []

        def open_child(location, child):
            calls.append(child.name)
            if calls == [going]:  # its name was found; now it goes, and a newer one comes
                self.remove(going)
                publish(3, 3)
            return real(location, child)

        monkeypatch.setattr(backend, "open", open_child)
        before = set(os.listdir("/proc/self/fd"))
        with open_checkpoint(self.where) as found:
            assert found.step == 3
        assert calls[0] == going
        assert set(os.listdir("/proc/self/fd")) == before

    def test_what_was_written_is_what_is_read(self, publish, write, tmp_path):
        publish(1, 1)
        values = write(tmp_path / "again", ARRAYS).values
        with open_checkpoint(self.where) as found:
            for name, value in values.items():
                out = np.empty(value.nbytes, np.uint8)
                found.read_into(name, None, out)
                assert out.tobytes() == value.tobytes()
            assert found.verify().ok
            self.flip(f"{found.path.rpartition('/')[2]}/{CHUNK}")
            assert [problem.path for problem in found.verify().problems] == [CHUNK]

    def test_what_is_damaged_hides_nothing_that_is_whole(self, publish, caplog):
        publish(1, 1)
        name = publish(2, 2)
        self.flip(f"{name}/gockpt.json")
        assert latest_step(self.where) == 1
        assert [entry.step for entry in list_checkpoints(self.where)] == [1]
        assert "passing over a damaged checkpoint" in caplog.text
        (damage,) = damaged_checkpoints(self.where).items()
        assert (damage[0].name, damage[0].step) == (name, 2)
        with pytest.raises(ManifestCorrupt, match="is damaged"):
            open_checkpoint(self.where, 2)

    def test_where_all_are_damaged_the_newest_is_told(self, publish):
        for step in (1, 2, 3):
            self.flip(f"{publish(step, step)}/gockpt.json")
        assert latest_step(self.where) is None
        assert list_checkpoints(self.where) == []
        with pytest.raises(ManifestCorrupt, match="step-0000000003.* is damaged"):
            open_checkpoint(self.where)

    def test_one_under_anothers_name_is_not_believed(self, publish):
        one, other = publish(1, 1), publish(2, 2)
        self.put(f"{other}/gockpt.json", self.get(f"{one}/gockpt.json"))
        assert latest_step(self.where) == 1
        with pytest.raises(ManifestCorrupt, match="holds step 1, .*attempt 00000001: it was renamed"):
            open_checkpoint(self.where, 2)

    def test_a_place_without_checkpoints_says_what_is_there(self):
        self.put("file", b"")
        self.remove("file")
        assert list_checkpoints(self.where) == []
        assert latest_step(self.where) is None
        with pytest.raises(CheckpointNotFound, match="no complete checkpoint in "):
            open_checkpoint(self.where)
        self.put("readme.txt", b"mine")
        with pytest.raises(NotACheckpoint, match=r"'readme\.txt' and the like"):
            open_checkpoint(self.where)
        assert list_checkpoints(self.where) == []


class FileByFileTests(LocationTests):
    """What those backends promise beside that, where each file of a checkpoint may be there or not."""

    def test_a_removed_checkpoint_is_told_apart_from_a_damaged_one(self, publish):
        first, second = publish(1, 1), publish(2, 2)
        with open_checkpoint(self.where, 1) as gone, open_checkpoint(self.where, 2) as damaged:
            assert not gone.files.is_gone()
            self.remove(first)
            self.remove(f"{second}/{CHUNK}")
            assert gone.files.is_gone()
            assert not damaged.files.is_gone()
            for stored, error in ((gone, CheckpointPruned), (damaged, ChunkCorrupt)):
                with pytest.raises(error):
                    stored.read_into("a", None, np.empty(48, np.uint8))

    def test_a_failing_list_leaves_nothing_open(self, publish, monkeypatch):
        publish(1, 1)
        self.remove(f"{publish(2, 2)}/gockpt.json")
        with closing(location_at(self.where)) as location:
            backend = type(location)
        real, calls = backend.children, []

        def children(location):
            calls.append(location)
            if len(calls) == 2:  # the first is open, and the second looked for again
                raise PermissionError(13, "Permission denied")
            return real(location)

        monkeypatch.setattr(backend, "children", children)
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(PermissionError):
            open_checkpoint(self.where)
        assert set(os.listdir("/proc/self/fd")) == before

    def test_what_has_no_manifest_is_passed_over_in_silence(self, publish, caplog):
        publish(1, 1)
        name = publish(2, 2)
        entry = list_checkpoints(self.where)[-1]
        self.remove(f"{name}/gockpt.json")
        assert latest_step(self.where) == 1
        assert [entry.step for entry in list_checkpoints(self.where)] == [1]
        assert damaged_checkpoints(self.where) == {}
        assert not caplog.records
        for call in (lambda: open_checkpoint(self.where, 2), lambda: open_listed(self.where, entry)):
            with pytest.raises(CheckpointNotFound):
                call()


class TestLocalLocation(FileByFileTests):
    @pytest.fixture(autouse=True)
    def place(self, tmp_path):
        self.where = tmp_path / "ckpts"
        self.where.mkdir()

    def store(self, directory, step, seq, attempt):
        return shutil.move(directory, self.where / step_names.of_step(step)).name

    def get(self, path):
        return (self.where / path).read_bytes()

    def put(self, path, data):
        (self.where / path).parent.mkdir(exist_ok=True)
        (self.where / path).write_bytes(data)

    def remove(self, path):
        if (self.where / path).is_dir():
            shutil.rmtree(self.where / path)
        else:
            (self.where / path).unlink()

    def below(self, name):
        return self.where / name

    def test_only_directories_are_written_into(self):
        with closing(location_at(self.where)) as location:
            assert location.kind == "directory"


class ArchiveTests(LocationTests):
    """Paths inside a checkpoint are entries; they are changed in the archive, and put back into it."""

    def named(self, path):
        """Return what a user passes to name a place on the disk."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def place(self, tmp_path, archived, zips):
        self.directory = tmp_path / "ckpts"
        self.directory.mkdir()
        self.where = self.named(self.directory)
        self.archived = archived
        self.zips = zips

    def store(self, directory, step, seq, attempt):
        return shutil.move(
            self.archived(directory), self.directory / step_names.of_step(step, archive=True)
        ).name

    def split(self, path):
        name, _, inside = path.partition("/")
        return self.directory / name, inside

    def get(self, path):
        archive, inside = self.split(path)
        with zipfile.ZipFile(archive) as file:
            return file.read(inside)

    def put(self, path, data):
        archive, inside = self.split(path)
        if not archive.name.endswith(".zip"):
            (self.directory / path).parent.mkdir(exist_ok=True)
            (self.directory / path).write_bytes(data)
        else:
            self.rewrite(archive, inside, data)

    def remove(self, path):
        archive, inside = self.split(path)
        if inside:
            self.rewrite(archive, inside, None)
        else:
            archive.unlink()

    def rewrite(self, archive, inside, data):
        """Write an archive anew into the same file, one entry changed, or away if ``data`` is none."""
        with zipfile.ZipFile(archive) as file:
            contents = {name: file.read(name) for name in file.namelist()}
        last = contents.pop("gockpt.json")
        contents[inside] = data or b""
        if data is None:
            del contents[inside]
        out, records = bytearray(), []
        for name, content in contents.items():
            self.zips.add(out, records, name, content, {})
        if inside != "gockpt.json":
            self.zips.add(out, records, "gockpt.json", last, {})
        archive.write_bytes(self.zips.seal(out, records))

    def below(self, name):
        return self.named(self.directory / name)


class TestLocalArchives(ArchiveTests):
    def named(self, path):
        return path

    def test_a_removed_archive_is_still_read_to_its_end(self, publish):
        name = publish(1, 1)
        with open_checkpoint(self.where, 1) as stored:
            assert not stored.files.is_gone()
            self.remove(name)
            assert stored.files.is_gone()
            assert stored.verify().ok

    def test_one_set_aside_to_be_removed_is_gone(self, publish):
        name = publish(1, 1)
        with open_checkpoint(self.where, 1) as stored:
            (self.directory / name).rename(self.directory / "step-0000000001.old-00000001")
            assert not stored.files.is_gone()
            (self.directory / "step-0000000001.old-00000001").rename(self.directory / ".trash-00000001")
            assert stored.files.is_gone()

    def test_one_that_was_replaced_counts_where_its_successor_does_not(self, publish):
        first = publish(1, 1)
        (self.directory / first).rename(self.directory / "step-0000000001.old-00000001")
        second = publish(1, 2)
        assert [entry.seq for entry in list_checkpoints(self.where)] == [2]
        assert [entry.seq for entry in list_checkpoints(self.where, superseded=True)] == [1, 2]
        self.remove(second)
        with open_checkpoint(self.where) as stored:
            assert (stored.seq, stored.verify().ok) == (1, True)

    def test_an_archive_without_a_manifest_is_damaged(self, publish, caplog):
        publish(1, 1)
        name = publish(2, 2)
        self.remove(f"{name}/gockpt.json")
        assert latest_step(self.where) == 1
        assert [child.name for child in damaged_checkpoints(self.where)] == [name]
        assert "passing over a damaged checkpoint" in caplog.text
        with pytest.raises(ManifestCorrupt, match="no archive|not the last entry"):
            open_checkpoint(self.where, 2)

    def test_what_is_neither_directory_nor_archive_is_refused(self, tmp_path):
        for name, data in (("a.txt", b"text"), ("empty", b"")):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(NotACheckpoint, match="is not a directory, and no archive"):
                open_checkpoint(tmp_path / name)
        (tmp_path / "a.zip").write_bytes(b"text")
        with pytest.raises(ManifestCorrupt, match="no archive"):
            open_checkpoint(tmp_path / "a.zip")

    def test_one_that_was_never_published_is_no_checkpoint(self, publish):
        name = publish(1, 1)
        for other in ("step-0000000001.partial-00000001", ".trash-00000001"):
            (self.directory / name).rename(self.directory / other)
            assert list_checkpoints(self.where) == []
            with pytest.raises(NotACheckpoint, match="never published, or is being deleted"):
                open_checkpoint(self.directory / other)
            (self.directory / other).rename(self.directory / name)

    def test_a_manifest_in_the_other_form_is_refused(self, publish, write, tmp_path, zips):
        name = publish(1, 1)
        written = write(tmp_path / "plain", ARRAYS, step=2, seq=2)
        in_directory = (written.path / "gockpt.json").read_bytes()
        in_archive = self.get(f"{name}/gockpt.json")
        (written.path / "gockpt.json").write_bytes(in_archive)
        with pytest.raises(ManifestCorrupt, match="is that of an archive"):
            open_checkpoint(written.path)
        self.put(f"{name}/gockpt.json", in_directory)
        with pytest.raises(ManifestCorrupt, match="is that of a directory"):
            open_checkpoint(self.directory / name)

    def test_links_to_archives_are_not_followed_but_where_the_user_says_so(self, publish, tmp_path):
        name = publish(1, 1)
        (self.directory / name).rename(tmp_path / "elsewhere.zip")
        (self.directory / name).symlink_to(tmp_path / "elsewhere.zip")
        with pytest.raises(ManifestCorrupt, match="a symbolic link"):
            open_checkpoint(self.where, 1)
        with open_checkpoint(self.directory / name) as stored:
            assert stored.verify().ok

    def test_nothing_stays_open_behind_what_is_refused(self, publish):
        name = publish(1, 1)
        os.truncate(self.directory / name, 5000)
        before = set(os.listdir("/proc/self/fd"))
        for where in (self.where, self.directory / name):
            with pytest.raises(ManifestCorrupt):
                open_checkpoint(where)
        assert set(os.listdir("/proc/self/fd")) == before


class TestObjectArchives(ArchiveTests):
    def named(self, path):
        return f"file://{path}"

    def test_of_archives_and_uploads_the_newest_is_the_highest_seq(self, publish, write, tmp_path):
        publish(5, 2)
        for step, seq in ((1, 1), (2, 4), (3, 3)):
            attempt = f"{seq:08x}"
            written = write(tmp_path / f"up-{seq}", ARRAYS, step=step, seq=seq, attempt=attempt)
            written.path.rename(self.directory / step_names.of_uploaded(step, seq, attempt))
        assert latest_step(self.where) == 2
        publish(9, 5)
        assert latest_step(self.where) == 9
        assert [entry.seq for entry in list_checkpoints(self.where)] == [1, 2, 3, 4, 5]

    def test_what_is_no_archive_is_refused(self):
        (self.directory / "a.zip").write_bytes(b"text")
        with pytest.raises(ManifestCorrupt, match="no archive"):
            open_checkpoint(self.below("a.zip"))
        with pytest.raises(CheckpointNotFound, match="there is no such object"):
            open_checkpoint(self.below("b.zip"))

    def test_few_requests_open_and_read_it(self, publish, monkeypatch):
        where, read = self.below(publish(1, 1)), []
        real = Objects.read
        monkeypatch.setattr(Objects, "read", lambda *call: read.append(call[1:]) or real(*call))
        with open_checkpoint(where) as stored:
            assert len(read) == 2  # the end, and the manifest
            for name, array in stored.arrays.items():
                stored.read_into(name, None, np.empty(array.spec.nbytes, np.uint8))
            assert len(read) == 6  # the directory, the checksums, and two arrays


class TestObjectLocation(FileByFileTests):
    @pytest.fixture(autouse=True)
    def place(self):
        self.objects = MemoryStore()
        self.where = Objects(self.objects, "memory://test")

    def store(self, directory, step, seq, attempt):
        name = step_names.of_uploaded(step, seq, attempt)
        for path in directory.rglob("*"):
            if path.is_file():
                self.put(f"{name}/{path.relative_to(directory)}", path.read_bytes())
        return name

    def get(self, path):
        return bytes(obstore.get(self.objects, path).bytes())

    def put(self, path, data):
        obstore.put(self.objects, path, data)

    def remove(self, path):
        below = [meta["path"] for batch in obstore.list(self.objects, path) for meta in batch]
        obstore.delete(self.objects, below or [path])

    def below(self, name):
        store = MemoryStore()  # as a URL with a longer path leads to it
        for path in self.where.tree(name):
            obstore.put(store, path, self.get(f"{name}/{path}"))
        return Objects(store, f"memory://test/{name}")

    def test_it_is_no_directory(self):
        with closing(location_at(self.where)) as location:
            assert location.kind == "object store"
