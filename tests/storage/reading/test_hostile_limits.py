"""Checkpoints that ask for too much, opened by a process that couldn't give it; names made to do harm."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from gockpt.core.boxes import Box
from gockpt.errors import CheckpointNotFound, ChunkCorrupt, ManifestCorrupt, NotACheckpoint
from gockpt.storage.format.checksum import crc32c
from gockpt.storage.read.find import list_checkpoints, open_checkpoint

ARRAYS = {("model", "w"): ((8, 4), "float32"), ("s",): ((), "int64")}

# Prints what happened; may have 300 MiB of memory more than when everything was imported.
READER = """
import re, resource, sys
from gockpt.errors import GockptError
from gockpt.storage.read.find import open_checkpoint
with open("/proc/self/status") as file:
    now = int(re.search(r"VmSize:\\s*(\\d+)", file.read())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (now + (300 << 20),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
try:
    with open_checkpoint(sys.argv[1], threads=1) as checkpoint:
        checkpoint.state()
        print("problems", len(checkpoint.verify().problems))
except GockptError as error:
    print(type(error).__name__, error)
"""


def read(path):
    done = subprocess.run(
        [sys.executable, "-c", READER, path], capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def written(write, tmp_path):
    return write(tmp_path / "ckpts", ARRAYS, chunk_rows=3)


def seal(path, line):
    (path / "gockpt.json").write_bytes(line + b'{"crc32c": "%08x"}\n' % crc32c(line))


def manifest(written):
    return json.loads((written.path / "gockpt.json").read_bytes().splitlines()[0])


def seal_document(written, document):
    seal(written.path, json.dumps(document, separators=(",", ":")).encode() + b"\n")


def array(name, path, shape=(1,), **more):
    meta = {"size": 1, "crc32c": "00000000"}
    entry = {"name": name, "path": path, "shape": shape, "dtype": "int8", "chunk": shape, "meta": meta}
    return entry | more


def test_a_million_and_one_arrays(written):
    document = manifest(written)
    document["arrays"] = [0] * (10**6 + 1)
    seal_document(written, document)
    assert "ManifestCorrupt" in read(written.path)
    with pytest.raises(ManifestCorrupt, match="arrays"):
        open_checkpoint(written.path)


def test_many_arrays_that_are_not_there(written):
    document = manifest(written)
    document["arrays"] = [array([str(n)], str(n)) for n in range(40_000)]
    seal_document(written, document)
    assert read(written.path).startswith("ManifestCorrupt")


@pytest.mark.parametrize("piece", [b"[],", b"{},", b'"",', b"0,", b'"ab",', b"1.5,", b'{"":0},'])
def test_documents_of_the_smallest_values_cost_a_bounded_multiple_of_their_size(written, piece):
    """8 MiB of what takes the most memory for each byte of text."""
    seal(written.path, b'{"format":"gockpt","x":[' + piece * ((8 << 20) // len(piece)) + b"0]}\n")
    assert read(written.path).startswith("ManifestCorrupt")


def test_a_manifest_larger_than_any(written):
    with (written.path / "gockpt.json").open("wb") as file:
        file.write(b'{"format":"gockpt","x":"')
        file.truncate((64 << 20) + 65)
    assert "can't be right" in read(written.path)


def test_a_manifest_as_large_as_may_be_of_one_text(written):
    line = b'{"format":"gockpt","x":"' + b"a" * ((64 << 20) - 40) + b'"}\n'
    seal(written.path, line)
    assert read(written.path).startswith("ManifestCorrupt")


@pytest.mark.parametrize("name", ["state.json", "zarr.json", "model/w/zarr.json"])
def test_a_document_that_says_it_is_large_and_is(written, name):
    """The manifest vouches for a sparse file of 8 GiB: refused by its size, not read."""
    document = manifest(written)
    for entry in document["files"]:
        if entry["path"] == name:
            entry["size"] = 8 << 30
    if name.startswith("model/w"):
        document["arrays"][0]["meta"]["size"] = 8 << 30
    os.truncate(written.path / name, 8 << 30)
    seal_document(written, document)
    told = read(written.path)
    assert "state.json has 8589934592 bytes; more than" in told or told == "problems 1\n"


def test_terabytes_in_chunks_that_are_there_but_sparse(written):
    """Every size fits: the shape, the sidecar, the file's length. A slice of it costs a slice's memory."""
    rows = 1 << 34
    document = manifest(written)
    blocks = rows * 16 >> 20
    document["arrays"][0] |= {"shape": [rows, 4], "chunk": [rows, 4]}
    for entry in document["files"]:
        if entry["path"] == "blocks.crc32c":
            entry["size"] = 4 * (blocks + 1)
    for name in ("c.1.0", "c.2.0"):
        (written.path / "model/w" / name).unlink()
    os.truncate(written.path / "blocks.crc32c", 4 * (blocks + 1))
    for entry in document["files"]:
        if entry["path"] == "blocks.crc32c":
            entry["crc32c"] = f"{crc32c((written.path / 'blocks.crc32c').read_bytes()):08x}"
    seal_document(written, document)
    with (
        open_checkpoint(written.path) as checkpoint,
        pytest.raises(ChunkCorrupt, match="has 52 bytes instead of"),
    ):
        checkpoint.read_into("model/w", Box((rows - 1, 0), (1, 4)), np.empty(16, np.uint8))
    os.truncate(written.path / "model/w/c.0.0", rows * 16 + 4)
    out = np.ones(16, np.uint8)
    with open_checkpoint(written.path) as checkpoint:
        checkpoint.read_into("model/w", Box((rows - 1, 0), (1, 4)), out, verify=False)
        assert not out.any()


NAMES = {
    "parent": (["..", "x"], "../x"),
    "parent, escaped": (["..", "x"], "~2e~2e/x"),
    "absolute": (["/etc", "passwd"], "/etc/passwd"),
    "absolute, escaped": (["/etc", "passwd"], "~2fetc/passwd"),
    "NUL": (["a\0b"], "a\0b"),
    "NUL, escaped": (["a\0b"], "a~00b"),
    "empty": (["", ""], "/"),
    "dot": (["."], "."),
    "a name as long as a path may be": (["x" * 5000], "x" * 5000),
    "the manifest's own": (["gockpt.json"], "gockpt.json"),
    "the state's": (["state.json"], "state.json"),
    "a group's document": (["zarr.json"], "zarr.json"),
    "a chunk's": (["model", "w", "c.0.0"], "model/w/c.0.0"),
    "a temporary file's": (["gockpt.json.tmp"], "gockpt.json.tmp"),
    "a device on other systems": (["nul"], "nul"),
    "backslashes": (["..\\..\\x"], "..\\..\\x"),
    "surrogates": (["\ud800"], "\ud800"),
    "case only": (["S"], "S"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_made_to_do_harm(written, tmp_path, case):
    """Either the path is refused, or it is the escaped one, which lies inside, and the files aren't there."""
    name, path = NAMES[case]
    document = manifest(written)
    document["arrays"].append(array(name, path))
    for entry in document["files"]:
        if entry["path"] == "blocks.crc32c":
            entry["size"] += 4
    seal_document(written, document)
    before = sorted(str(found) for found in tmp_path.rglob("*"))
    try:
        checkpoint = open_checkpoint(written.path)
    except ManifestCorrupt:
        assert "escaped" not in case or len(name) > 1  # those with a group need its document, too
    else:
        with checkpoint:
            assert "escaped" in case
            problems = {problem.path: problem.what for problem in checkpoint.verify().problems}
            assert problems[f"{path}/zarr.json"] == "missing"
            assert all(not found.startswith(("/", "..")) for found in problems)
    assert sorted(str(found) for found in tmp_path.rglob("*")) == before


def test_links_in_circles(write, tmp_path):
    """Of files, of directories inside, of the checkpoint itself, and of the path."""
    path = tmp_path / "ckpts"
    one = write(path, ARRAYS, step=1, chunk_rows=3)
    (one.path / "model/w/c.0.0").unlink()
    (one.path / "model/w/c.0.0").symlink_to("c.1.0")
    (one.path / "model/w/c.1.0").unlink()
    (one.path / "model/w/c.1.0").symlink_to("c.0.0")
    (one.path / "model/loop").symlink_to("..")
    (path / "step-0000000002").symlink_to("step-0000000003")
    (path / "step-0000000003").symlink_to("step-0000000002")
    (path / "step-0000000004").symlink_to(".")
    assert [entry.step for entry in list_checkpoints(path)] == [1]
    with open_checkpoint(path) as checkpoint:
        report = checkpoint.verify()
        assert {problem.path for problem in report.problems} == {"model/w/c.0.0", "model/w/c.1.0"}
        assert report.foreign == ("model/loop",)
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises((CheckpointNotFound, NotACheckpoint, OSError)) as caught:
        open_checkpoint(tmp_path / "a")
    assert "a" in str(caught.value)
