"""Archives: converted there and back, read by others, and verified to the last byte."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from zarr.storage import ZipStore

from gockpt.errors import CheckpointCorrupt, GockptError, StorageError, UsageError
from gockpt.storage.format import manifest, zip_archive
from gockpt.storage.local import packing
from gockpt.storage.local.filesystem import CALLS, Filesystem
from gockpt.storage.read.find import open_checkpoint

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
GOOD = sorted(path.name for path in GOLDEN.iterdir() if path.name.startswith("v1-"))
ARCHIVES = sorted(path.name for path in GOLDEN.iterdir() if path.name.startswith("v3-"))
ARRAYS = {
    ("model", "w"): ((5, 3), "float32"),
    ("model", "b"): ((3,), "bfloat16"),
    ("model", "large"): ((300, 100), "float32"),
    ("optimizer", "w", "step"): ((), "float32"),
    ("none",): ((0, 2), "int64"),
}


@pytest.fixture
def written(write, tmp_path):
    """A directory with chunks of both alignments, some with padding."""
    return write(tmp_path, ARRAYS, chunk_rows=200, state={"lr": 0.1}, attributes={"step": 7})


def pack(source, target, **options):
    with open_checkpoint(source) as stored:
        packing.pack(stored, str(target), **options)
    return target


def unpack(source, target, **options):
    with open_checkpoint(source) as stored:
        packing.unpack(stored, str(target), **options)
    return target


def load(path):
    """Return the bytes of every array, and the state document."""
    with open_checkpoint(path) as stored:
        values = {name: np.empty(array.spec.nbytes, np.uint8) for name, array in stored.arrays.items()}
        for name, out in values.items():
            stored.read_into(name, None, out)
        return {name: out.tobytes() for name, out in values.items()}, stored.state()


# ---- there and back


@pytest.mark.parametrize("name", GOOD)
def test_a_directory_is_the_same_after_it_was_an_archive(name, tmp_path, zips):
    archive = pack(GOLDEN / name, tmp_path / "a.zip")
    assert unpack(archive, tmp_path / "d") == tmp_path / "d"
    contents = zips.contents(GOLDEN / name)
    assert zips.contents(tmp_path / "d") == contents
    assert sorted(os.listdir(tmp_path)) == ["a.zip", "d"]
    assert load(archive) == load(GOLDEN / name)
    with zipfile.ZipFile(archive) as file:
        assert file.testzip() is None
        names = file.namelist()
        assert sorted(names) == sorted(contents)
        assert names[-1] == "gockpt.json"
        for entry in names[:-1]:
            assert file.read(entry) == contents[entry]
        in_archive = manifest.parse(file.read("gockpt.json"), where="x")
        assert in_archive.in_directory() == manifest.parse(contents["gockpt.json"], where="x")
        assert (b'"version":3' in file.read("gockpt.json")) == any(map(zips.is_chunk, names))
    again = pack(tmp_path / "d", tmp_path / "b.zip")
    assert again.read_bytes() == archive.read_bytes()
    assert pack(archive, tmp_path / "c.zip").read_bytes() == archive.read_bytes()
    assert zips.contents(unpack(tmp_path / "d", tmp_path / "e")) == contents
    with open_checkpoint(archive) as stored:
        report = stored.verify()
    assert (report.problems, report.foreign, report.files) == ((), (), len(contents))


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_is_the_same_after_it_was_a_directory(name, tmp_path):
    directory = unpack(GOLDEN / name, tmp_path / "d")
    assert load(directory) == load(GOLDEN / name)
    with open_checkpoint(directory) as stored:
        assert stored.verify().ok
    archive = pack(directory, tmp_path / "a.zip")
    # The same order as in a save by one thread, which these are, so that the same bytes come out.
    assert archive.read_bytes() == (GOLDEN / name).read_bytes()


def test_an_archive_is_what_a_writer_of_its_own_makes(written, tmp_path, zips):
    archive = pack(written.path, tmp_path / "a.zip")
    made = tmp_path / "b.zip"
    made.write_bytes(zips.of(zips.contents(written.path)))
    assert load(made) == load(archive) == load(written.path)
    with open_checkpoint(made) as stored:
        assert stored.verify().ok


def test_an_archive_of_no_arrays_is_read(write, tmp_path):
    written = write(tmp_path, {})
    archive = pack(written.path, tmp_path / "a.zip")
    with open_checkpoint(archive) as stored:
        assert stored.verify().ok
    assert load(archive) == ({}, {})


@pytest.mark.parametrize("convert", [pack, unpack])
def test_nothing_is_replaced(convert, written, tmp_path):
    archive = pack(written.path, tmp_path / "a.zip")
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "directory", "link", "a.zip"):
        with pytest.raises(UsageError, match=f"{name}' exists"):
            convert(archive, tmp_path / name)
    assert (tmp_path / "file").read_bytes() == b"mine"
    with pytest.raises(StorageError, match="No such file or directory"):
        convert(archive, tmp_path / "nowhere" / "x")


@pytest.mark.parametrize("convert", [pack, unpack])
def test_what_comes_to_the_target_meanwhile_is_not_replaced(convert, written, tmp_path):
    for unknown in (False, True):

        class Late(Filesystem):
            def rename_new(self, source, target, *, dir_fd, unknown=unknown):
                (tmp_path / "x").write_bytes(b"mine")
                if unknown:
                    raise OSError(22, "Invalid argument")
                super().rename_new(source, target, dir_fd=dir_fd)

        with pytest.raises(StorageError, match="something else stands there"):
            convert(written.path, tmp_path / "x", fs=Late())
        assert (tmp_path / "x").read_bytes() == b"mine"
        (tmp_path / "x").unlink()
    assert os.listdir(tmp_path) == [written.path.name]


@pytest.mark.parametrize("convert", [pack, unpack])
def test_where_the_system_has_no_rename_that_replaces_nothing_it_is_renamed(convert, written, tmp_path):
    class Old(Filesystem):
        def rename_new(self, source, target, *, dir_fd):
            raise OSError(22, "Invalid argument")

    assert load(convert(written.path, tmp_path / "x", fs=Old())) == load(written.path)


def test_a_chunk_too_large_for_an_entry_is_refused_before_anything_is_written(written, tmp_path, monkeypatch):
    monkeypatch.setattr(zip_archive, "MAX_ENTRY_NBYTES", 50_000)
    with pytest.raises(UsageError, match="'model/large' has a chunk of 2 GiB or more"):
        pack(written.path, tmp_path / "a.zip")
    assert os.listdir(tmp_path) == [written.path.name]


@pytest.mark.parametrize("convert", [pack, unpack])
@pytest.mark.parametrize("call", CALLS)
def test_a_failing_disk_leaves_no_target(convert, call, written, tmp_path):
    class Failing(Filesystem):
        pass

    calls = []

    def fail(self, *arguments, **named):
        calls.append(arguments)
        if len(calls) == nth:
            raise OSError(28, "No space left on device")
        return getattr(Filesystem, call)(self, *arguments, **named)

    if call not in ("close", "unlink", "rmdir"):
        setattr(Failing, call, fail)
    nth = 1
    while True:
        calls.clear()
        try:
            convert(written.path, tmp_path / "x", fs=Failing())
        except StorageError:
            assert not (tmp_path / "x").exists() or call == "fsync"  # durable or not, it is whole
        else:
            break
        if (tmp_path / "x").exists():
            break
        nth += 1
    with open_checkpoint(tmp_path / "x") as stored:
        assert stored.verify().ok


@pytest.mark.parametrize("convert", [pack, unpack])
def test_nothing_damaged_is_copied(convert, written, tmp_path):
    for source in (written.path, pack(written.path, tmp_path / "a.zip")):
        chunk = written.path / "model/w/c.0.0"
        data = source.read_bytes() if source.is_file() else chunk.read_bytes()
        at = data.index(chunk.read_bytes()[:8]) + 3
        damaged = source if source.is_file() else chunk
        damaged.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(CheckpointCorrupt, match="it was not copied"):
            convert(source, tmp_path / "x")
        assert not (tmp_path / "x").exists()
        damaged.write_bytes(data)
    assert sorted(os.listdir(tmp_path)) == ["a.zip", written.path.name]


def test_progress_counts_the_bytes_of_chunks(written, tmp_path):
    seen = []
    archive = pack(written.path, tmp_path / "a.zip", on_progress=lambda *both: seen.append(both))
    total = sum(entry.nbytes for entry in written.manifest.arrays)
    assert seen[-1] == (total, total)
    unpack(archive, tmp_path / "d", on_progress=lambda *both: seen.append(both))
    assert seen[-1] == (total, total)


# ---- other readers


def test_other_programs_read_it(write, tmp_path):
    arrays = {
        ("model", name): (shape, dtype)
        for name, (shape, dtype) in {
            "w": ((5, 3), "float32"),
            "large": ((300, 100), "float32"),
            "n": ((), "int64"),
            "h": ((7,), "float16"),
        }.items()
    }
    written = write(tmp_path, arrays, chunk_rows=200)
    archive = pack(written.path, tmp_path / "a.zip")
    if shutil.which("unzip"):
        found = subprocess.run(["unzip", "-t", archive], capture_output=True, text=True, check=False)
        assert (found.returncode, found.stderr) == (0, "")
    with ZipStore(archive, mode="r") as store:
        group = zarr.open_group(store, mode="r")
        for name, value in written.values.items():
            found = np.asarray(group[name][...])
            assert found.tobytes() == value.tobytes(), name
    for name, value in written.values.items():
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "zip", "base": f"file://{archive}", "path": f"{name}/"},
        }
        found = tensorstore.open(spec, read=True).result().read().result()
        assert found.tobytes() == value.tobytes(), name


def far_out(contents, base, zips):
    """Return the bytes of an archive from ``base`` on, where its first entry begins."""
    out, records, offsets = bytearray(), [], {}
    for name in sorted(contents, key=lambda name: not zips.is_chunk(name)):
        if name != "gockpt.json":
            zips.add(out, records, name, contents[name], offsets)
    held = manifest.parse(contents["gockpt.json"], where="x")
    arrays = (
        replace(one, at=tuple(base + offsets[one.chunk_path(n)] for n in range(one.chunks)))
        for one in held.arrays
    )
    last = manifest.encode(replace(held, arrays=tuple(arrays)))
    zips.add(out, records, "gockpt.json", last, offsets)
    tail = zip_archive.Tail(len(records), 0, 0, zip_archive.find_entry(records[-1], "gockpt.json"), 0)
    found = zip_archive.parse_directory(b"".join(records), tail, where="x")
    moved = [zip_archive.central_record(e.name, e.nbytes, e.crc32, base + e.header_at) for e in found]
    directory = b"".join(moved)
    return bytes(out) + directory + zip_archive.end_records(len(moved), base + len(out), len(directory))


@pytest.mark.parametrize("base", [1 << 31, (1 << 32) - 4096, 5 << 30])
def test_offsets_beyond_2_and_4_gib_are_read_by_all(write, tmp_path, zips, base):
    written = write(tmp_path, {("w",): ((5, 3), "float32"), ("v",): ((90, 100), "float64")}, chunk_rows=85)
    archive = tmp_path / "a.zip"
    with archive.open("wb") as file:
        file.seek(base)
        file.write(far_out(zips.contents(written.path), base, zips))
    assert load(archive) == load(written.path)
    with open_checkpoint(archive) as stored:
        (problem,) = stored.verify().problems
        assert problem.what.endswith(f"begins at byte {base} instead of 0")
    with ZipStore(archive, mode="r") as store:
        group = zarr.open_group(store, mode="r")
        assert np.asarray(group["v"][...]).tobytes() == written.values["v"].tobytes()
    inside = {"driver": "zip", "base": f"file://{archive}", "path": "v/"}
    found = tensorstore.open({"driver": "zarr3", "kvstore": inside}, read=True).result().read().result()
    assert found.tobytes() == written.values["v"].tobytes()


def test_xarray_opens_it(write, tmp_path):
    import xarray

    written = write(tmp_path, {("w",): ((5, 3), "float32"), ("v",): ((4,), "int64")})
    archive = pack(written.path, tmp_path / "a.zip")
    with ZipStore(archive, mode="r") as store, xarray.open_zarr(store, consolidated=True) as data:
        assert data["w"].values.tobytes() == written.values["w"].tobytes()


# ---- verified to the last byte


def regions(archive, zips):
    """Return the kind of each byte of an archive, as (first byte, kind), in order."""
    data = archive.read_bytes()
    with zipfile.ZipFile(archive) as file:
        infos = sorted(file.infolist(), key=lambda info: info.header_offset)
        start = file.start_dir
    found = []
    for info in infos:
        at = info.header_offset
        extra = int.from_bytes(data[at + 28 : at + 30], "little")
        name_at = at + 30
        extra_at = name_at + len(info.filename)
        kind = "chunk" if zips.is_chunk(info.filename) else info.filename.rpartition("/")[2]
        found += [(at, "header"), (name_at, "name")]
        found += [(extra_at, "padding")] if extra else []
        found.append((extra_at + extra, kind))
    return [*found, (start, "directory"), (len(data) - 98, "end"), (len(data), "")]


def test_a_bit_flipped_in_any_byte_is_found(written, tmp_path, zips):
    archive = pack(written.path, tmp_path / "a.zip")
    rng = random.Random(5)
    data = archive.read_bytes()
    bounds = regions(archive, zips)
    kinds = set()
    with archive.open("r+b", buffering=0) as raw:
        for (first, kind), (stop, _) in itertools.pairwise(bounds):
            kinds.add(kind)
            step = max(1, (stop - first) // 30)
            for at in range(first + rng.randrange(step), stop, step):
                os.pwrite(raw.fileno(), bytes([data[at] ^ 1 << rng.randrange(8)]), at)
                try:
                    with open_checkpoint(archive, threads=1) as stored:
                        assert not stored.verify().ok, (kind, at)
                except CheckpointCorrupt:
                    pass
                os.pwrite(raw.fileno(), data[at : at + 1], at)
    assert kinds == {
        *("header", "name", "padding", "chunk", "zarr.json", "state.json", "blocks.crc32c", "gockpt.json"),
        *("directory", "end"),
    }
    with open_checkpoint(archive) as stored:
        assert stored.verify().ok


def test_wrong_values_are_never_loaded(written, tmp_path):
    archive = pack(written.path, tmp_path / "a.zip")
    right = load(archive)
    data = archive.read_bytes()
    rng = random.Random(6)
    loaded = refused = 0
    for _ in range(300):
        at = rng.randrange(len(data))
        archive.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        try:
            assert load(archive) == right
            loaded += 1
        except CheckpointCorrupt:
            refused += 1
    for nbytes in [*range(200), *range(0, len(data), 997)]:
        archive.write_bytes(data[:nbytes])
        with pytest.raises(GockptError):
            load(archive)
    assert loaded
    assert refused


def test_torn_pages_are_refused(written, tmp_path):
    archive = pack(written.path, tmp_path / "a.zip")
    data = archive.read_bytes()
    for at in range(0, len(data), 4096):
        archive.write_bytes(data[:at] + bytes(len(data[at : at + 4096])) + data[at + 4096 :])
        if archive.read_bytes() == data:
            continue
        try:
            with open_checkpoint(archive) as stored:
                assert not stored.verify().ok, at
        except CheckpointCorrupt:
            pass


def test_a_problem_is_named_by_its_entry(written, tmp_path):
    archive = pack(written.path, tmp_path / "a.zip")
    data = archive.read_bytes()
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            at = info.header_offset + 14  # the CRC-32 in its local header
            archive.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with open_checkpoint(archive) as stored:
                (problem,) = stored.verify().problems
            assert (problem.path, "local header" in problem.what) == (info.filename, True)


def test_documents_are_not_looked_for_by_a_load_of_arrays(written, tmp_path, monkeypatch):
    archive = pack(written.path, tmp_path / "a.zip")
    read = []
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: read.append(at) or real(fd, views, at))
    with open_checkpoint(archive) as stored:
        assert len(read) == 2  # the end, and the manifest
        stored.read_into("model/w", None, np.empty(60, np.uint8), verify=False)
        assert len(read) == 3
