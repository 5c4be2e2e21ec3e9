"""A checkpoint made to do harm gets a clear error, at once, before any memory is set aside for it."""

from __future__ import annotations

import json
import os
import socket
import tracemalloc
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from gockpt.core.array_spec import ArraySpec
from gockpt.core.boxes import Box
from gockpt.errors import CheckpointCorrupt, ChunkCorrupt, GockptError, ManifestCorrupt
from gockpt.storage.format.checksum import crc32c
from gockpt.storage.format.manifest_entries import ArrayEntry, FileEntry
from gockpt.storage.read.find import list_checkpoints, open_checkpoint

ARRAYS = {("model", "w"): ((8, 4), "float32"), ("s",): ((), "int64")}


@contextmanager
def hardly_any_memory():
    """Fail if what runs inside allocates more than 16 MiB at a time, arrays included."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


@pytest.fixture
def written(write, tmp_path):
    return write(tmp_path / "ckpts", ARRAYS, chunk_rows=3)


def seal(path, line):
    """Write a manifest from any line of text, with the checksum it should have."""
    (path / "gockpt.json").write_bytes(line + b'{"crc32c": "%08x"}\n' % crc32c(line))


def rewrite(written, change):
    """Change the manifest's object and seal it again."""
    line = (written.path / "gockpt.json").read_bytes().splitlines()[0]
    document = json.loads(line)
    change(document)
    seal(written.path, json.dumps(document).encode() + b"\n")


def refused(written, match):
    """Opening by path and by step both refuse, and listing passes it over."""
    with hardly_any_memory():
        for path, step in ((written.path, None), (written.path.parent, 7), (written.path.parent, None)):
            with pytest.raises(ManifestCorrupt, match=match):
                open_checkpoint(path, step)
        assert list_checkpoints(written.path.parent) == []


def array(change):
    return lambda document: document["arrays"][0].update(change)


BAD_MANIFESTS = {
    "shape of 2**63": (array({"shape": [1 << 63, 4]}), "shape"),
    "bytes beyond 2**63": (array({"shape": [1 << 40, 1 << 40], "chunk": [1, 1 << 40]}), "2\\*\\*63"),
    "zeros hide the size": (
        array({"shape": [0, 1 << 62, 1 << 62], "chunk": [1, 1 << 62, 1 << 62]}),
        "2\\*\\*63",
    ),
    "negative extent": (array({"shape": [-8, 4]}), "shape"),
    "true is no integer": (array({"shape": [True, 4]}), "shape"),
    "8.0 is no integer": (array({"shape": [8.0, 4]}), "shape"),
    "33 dimensions": (array({"shape": [1] * 33, "chunk": [1] * 33}), "32"),
    "columns cut": (array({"chunk": [3, 2]}), "can't have chunks"),
    "chunk of no rows": (array({"chunk": [0, 4]}), "can't have chunks"),
    "more padding than rows": (array({"chunk": [1 << 50, 4]}), "can't have chunks"),
    "chunk of other rank": (array({"chunk": [3]}), "can't have chunks"),
    "billions of chunks": (array({"shape": [1 << 50, 4], "chunk": [1, 4]}), "chunks|blocks"),
    "a petabyte in one chunk": (array({"shape": [1 << 46, 4], "chunk": [1 << 46, 4]}), "blocks"),
    "unknown dtype": (array({"dtype": "object"}), "dtype"),
    "path leads out": (array({"path": "../../etc"}), "instead of"),
    "path absolute": (array({"path": "/etc"}), "instead of"),
    "path of another array": (array({"path": "s"}), "instead of"),
    "path with an empty part": (array({"path": "model//w"}), "instead of"),
    "name twice": (lambda d: d["arrays"].append(d["arrays"][0]), "both called"),
    "array in an array": (array({"name": ["s", "w"], "path": "s/w"}), "holds other arrays"),
    "no name": (array({"name": [], "path": ""}), "name"),
    "surrogate": (array({"name": ["\ud800"]}), "surrogate"),
    "file that leads out": (lambda d: d["files"][0].update(path="../../../etc/passwd"), "files"),
    "file twice": (lambda d: d["files"].append(d["files"][0]), "twice"),
    "file of 2**63": (lambda d: d["files"][0].update(size=1 << 63), "size"),
    "sidecar of other size": (lambda d: d["files"][-1].update(size=1 << 40), "blocks"),
    "seq a string": (lambda d: d.update(seq="1"), "seq"),
    "attempt with a slash": (lambda d: d.update(attempt="../../x"), "attempt"),
    "unknown key": (lambda d: d.update(more=1), "more"),
    "newer version": (lambda d: d.update(version=4), "upgrade"),
    "another format": (lambda d: d.update(format="zarr"), "not a gockpt manifest"),
    "an array of arrays": (lambda d: d.update(arrays={}), "array"),
    "lots of groups by depth": (array({"name": ["x"] * 40, "path": "/".join("x" * 40)}), "32"),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_a_lying_manifest_is_refused(written, case):
    change, match = BAD_MANIFESTS[case]
    rewrite(written, change)
    refused(written, match)


BAD_LINES = {
    "deep": (b"[" * 20_000 + b"]" * 20_000 + b"\n", "nests 20000 deep"),
    "deep objects": (b'{"a":' * 20_000 + b"1" + b"}" * 20_000 + b"\n", "nests 20000 deep"),
    "keys twice": (b'{"format":"gockpt","format":"gockpt"}\n', "given twice"),
    "NaN": (b'{"format":"gockpt","step":NaN}\n', "NaN"),
    "infinite": (b'{"format":"gockpt","step":1e400}\n', "out of range"),
    "endless number": (b'{"format":"gockpt","step":' + b"9" * 10_000 + b"}\n", "not valid"),
    "not UTF-8": (b'{"format":"\xff"}\n', "not valid"),
    "a list": (b"[]\n", "not a gockpt manifest"),
    "null": (b"null\n", "not a gockpt manifest"),
    "no newline": (b'{"format":"gockpt"}', "exactly one line before its checksum"),
    "empty line": (b"\n", "not valid"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_manifest_that_is_no_plain_json_is_refused(written, case):
    line, match = BAD_LINES[case]
    seal(written.path, line)
    refused(written, match)


def replace_by_link(path, target):
    path.unlink()
    path.symlink_to(target)


def replace_by_fifo(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_directory(path):
    path.unlink()
    path.mkdir()


def replace_by_socket(path):
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


def replace_by_8_tib(path):
    os.truncate(path, 8 << 40)


REPLACEMENTS = {
    "link to itself": lambda path: replace_by_link(path, path.name),
    "link out": lambda path: replace_by_link(path, "/etc/passwd"),
    "link to an endless device": lambda path: replace_by_link(path, "/dev/zero"),
    "link to a good copy": lambda path: (path.rename(path.with_name("copy")), path.symlink_to("copy")),
    "FIFO": replace_by_fifo,
    "directory": replace_by_directory,
    "socket": replace_by_socket,
    "8 TiB of nothing": replace_by_8_tib,
}


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_a_manifest_that_is_no_plain_file_is_refused(written, kind):
    REPLACEMENTS[kind](written.path / "gockpt.json")
    refused(written, "link|regular file|can't be right")


@pytest.mark.parametrize("kind", REPLACEMENTS)
@pytest.mark.parametrize("verify", [True, False])
def test_a_chunk_that_is_no_plain_file_is_refused(written, kind, verify):
    out = np.full(8 * 16, 0xEE, np.uint8)
    with open_checkpoint(written.path) as checkpoint:
        REPLACEMENTS[kind](written.path / "model/w/c.1.0")
        with hardly_any_memory(), pytest.raises(ChunkCorrupt, match=r"^model/w: model/w/c\.1\.0"):
            checkpoint.read_into("model/w", Box((4, 0), (1, 4)), out[:16], verify=verify)
        assert set(out) == {0xEE}
        found = {problem.path for problem in checkpoint.verify().problems}
        assert found - {"model/w/copy"} == {"model/w/c.1.0"}


@pytest.mark.parametrize("kind", REPLACEMENTS)
@pytest.mark.parametrize("name", ["state.json", "blocks.crc32c"])
def test_a_document_that_is_no_plain_file_is_refused(written, kind, name):
    out = np.empty(128, np.uint8)
    with open_checkpoint(written.path) as checkpoint:
        REPLACEMENTS[kind](written.path / name)
        read = (
            checkpoint.state if name == "state.json" else partial(checkpoint.read_into, "model/w", None, out)
        )
        with hardly_any_memory(), pytest.raises(ManifestCorrupt, match=name.replace(".", r"\.")):
            read()


def test_a_linked_directory_on_the_way_is_refused(written, tmp_path):
    (written.path / "model").rename(tmp_path / "model")
    (written.path / "model").symlink_to(tmp_path / "model")
    with open_checkpoint(written.path) as checkpoint, pytest.raises(ChunkCorrupt, match="link"):
        checkpoint.read_into("model/w", None, np.empty(128, np.uint8))


def terabytes(manifest):
    """Say that ``s`` has 4 TiB in one chunk, and that the sidecar fits."""
    rows = 1 << 39
    big = ArrayEntry(ArraySpec(("s",), (rows,), "int64"), "s", (rows,), manifest.arrays[1].meta)
    blocks = replace(manifest.files[-1], size=4 * (manifest.arrays[0].block_count + big.block_count))
    return replace(manifest, arrays=(manifest.arrays[0], big), files=(*manifest.files[:-1], blocks))


def test_terabytes_that_are_said_but_not_there_cost_nothing(write, tmp_path):
    with hardly_any_memory():
        written = write(tmp_path, ARRAYS, distort=terabytes)
        with open_checkpoint(written.path) as checkpoint:
            assert checkpoint.arrays["s"].spec.nbytes == 4 << 40
            row = np.empty(8, np.uint8)
            with pytest.raises(ChunkCorrupt, match=r"s/c\.0 is missing"):
                checkpoint.read_into("s", Box((1 << 38,), (1,)), row, verify=False)
            with pytest.raises(ManifestCorrupt, match=r"blocks\.crc32c has \d+ bytes instead of"):
                checkpoint.read_into("s", Box((1 << 38,), (1,)), row)


def test_terabytes_of_nothing_are_read_only_where_they_are_wanted(write, tmp_path):
    written = write(tmp_path, ARRAYS, distort=terabytes)
    with (written.path / "s/c.0").open("wb") as file:
        file.truncate((4 << 40) + 4)
    os.truncate(
        written.path / "blocks.crc32c", written.path.joinpath("blocks.crc32c").stat().st_size + (4 << 22)
    )
    with hardly_any_memory(), open_checkpoint(written.path) as checkpoint:
        row = np.empty(8, np.uint8)
        assert checkpoint.read_into("s", Box(((1 << 39) - 1,), (1,)), row, verify=False) == 8
        assert not row.any()


def test_a_sidecar_beyond_reason_is_refused_though_it_is_there(write, tmp_path):
    def distort(manifest):
        rows = 1 << 55
        big = ArrayEntry(ArraySpec(("s",), (rows,), "int64"), "s", (rows,), manifest.arrays[1].meta)
        entry = FileEntry("blocks.crc32c", 4 * (manifest.arrays[0].block_count + big.block_count), 0)
        return replace(manifest, arrays=(manifest.arrays[0], big), files=(*manifest.files[:-1], entry))

    written = write(tmp_path, ARRAYS, distort=distort)
    os.truncate(written.path / "blocks.crc32c", 4 * (1 + (1 << 38)))
    with open_checkpoint(written.path) as checkpoint:
        with hardly_any_memory(), pytest.raises(ManifestCorrupt, match="can't be right"):
            checkpoint.read_into("model/w", None, np.empty(128, np.uint8))
        assert "can't be right" in {p.path: p.what for p in checkpoint.verify().problems}["blocks.crc32c"]


BAD_STATES = [
    b"[" * 100_000,
    b'{"a": NaN}',
    b'{"a": 1, "a": 2}',
    b'{"a": 1e999}',
    b"\xff",
    b"[]",
    b"",
    b'{"a": ' * 300,
]


@pytest.mark.parametrize("data", BAD_STATES)
def test_a_state_document_that_lies_is_refused(written, reseal, data):
    (written.path / "state.json").write_bytes(data)
    reseal(written)
    with (
        open_checkpoint(written.path) as checkpoint,
        hardly_any_memory(),
        pytest.raises(ManifestCorrupt, match="state"),
    ):
        checkpoint.state()


def test_nothing_outside_is_ever_opened(written, monkeypatch):
    """Every open is one below the checkpoint's own directory, by a plain path."""
    opened = []
    real = os.open

    def spy(path, flags, mode=0o777, *, dir_fd=None):
        opened.append((path, dir_fd))
        return real(path, flags, mode, dir_fd=dir_fd)

    with open_checkpoint(written.path) as checkpoint:
        monkeypatch.setattr("gockpt.storage.read.safe_open.open_at_once", lambda *_: None)
        monkeypatch.setattr(os, "open", spy)
        checkpoint.read_into("model/w", None, np.empty(128, np.uint8))
        assert checkpoint.verify().ok
    assert opened
    assert all(dir_fd is not None and "/" not in path and path not in (".", "..") for path, dir_fd in opened)


def test_all_of_these_are_gockpts_own_errors():
    assert issubclass(ManifestCorrupt, CheckpointCorrupt)
    assert issubclass(ChunkCorrupt, CheckpointCorrupt)
    assert issubclass(CheckpointCorrupt, GockptError)
