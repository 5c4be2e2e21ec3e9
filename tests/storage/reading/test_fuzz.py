"""Checkpoints changed at random: whatever comes, an error of gockpt's own, soon, and with little memory.

Some mutations are of bytes; others know the structure, change one value of the manifest, and seal it again
with the checksum it should have, as somebody would who means harm. ``make soak`` tries many more.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
import tracemalloc
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gockpt.core.array_spec import DTYPES
from gockpt.core.boxes import Box
from gockpt.errors import CheckpointCorrupt, GockptError, NotACheckpoint
from gockpt.storage.format import strict_json
from gockpt.storage.format.checksum import crc32c
from gockpt.storage.read.find import damaged_checkpoints, list_checkpoints, open_checkpoint

ARRAYS = {
    ("model", "w"): ((5, 3), "float32"),
    ("model", "b"): ((3,), "bfloat16"),
    ("s",): ((), "int64"),
    ("none",): ((0, 2), "int64"),
}
GOLDEN = Path(__file__).resolve().parents[2] / "golden"
SECONDS = 20  # a machine may be slow; a hang is more
BYTES = 48 << 20  # two buffers of 8 MiB, and what a document of this size can be


@pytest.fixture(scope="module", autouse=True, params=["short", pytest.param("long", marks=pytest.mark.soak)])
def _length():
    """Run everything a second time under ``make soak``, whose Hypothesis profile tries many more."""


@pytest.fixture(scope="module", params=["raw", pytest.param("encoded", marks=pytest.mark.soak)])
def original(request, write, tmp_path_factory):
    """A path with one checkpoint, whose directory is ``.path``."""
    path = tmp_path_factory.mktemp("fuzz")
    if request.param == "encoded":
        target = path / "step-0000000012"
        shutil.copytree(GOLDEN / "v1-zstd", target)
        return SimpleNamespace(path=target)
    return write(path, ARRAYS, chunk_rows=2, state={"a": [1, {"b": "c"}]}, attributes={"step": 7})


@pytest.fixture(scope="module")
def right(original):
    return everything(original.path)


@contextmanager
def bounded():
    """Fail if what runs inside takes long, or much memory."""
    tracemalloc.start()
    start = time.monotonic()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < BYTES
    assert time.monotonic() - start < SECONDS


def everything(path):
    """Do all that one can do with a checkpoint; returns the values as bytes, by name."""
    found = {}
    with open_checkpoint(path, threads=1) as checkpoint:
        for name, array in checkpoint.arrays.items():
            spec = array.spec
            # A caller that asks for terabytes has to bring them; one that asks for an element, little.
            box = None if spec.nbytes < 1 << 20 else Box(tuple(0 for _ in spec.shape), (1,) * len(spec.shape))
            out = np.empty(spec.nbytes if box is None else spec.itemsize, np.uint8)
            checkpoint.read_into(name, box, out)
            found[name] = out.tobytes()
        found["state"] = checkpoint.state()
    return found


def try_all(path):
    """Do all that one can do, each by itself; returns the values, or ``None`` if something was refused."""
    list_checkpoints(path.parent)
    damaged_checkpoints(path.parent)
    try:
        with open_checkpoint(path, threads=1) as checkpoint:
            report = checkpoint.verify()
            assert all(str(problem) for problem in report.problems)
        values = everything(path)
    except (CheckpointCorrupt, NotACheckpoint):
        return None
    return values if report.ok else (values, report)


@contextmanager
def copied(original):
    """Give a copy that may be changed."""
    target = original.path.parent.parent / f"{original.path.parent.name}-copy" / original.path.name
    shutil.copytree(original.path, target)
    try:
        yield target
    finally:
        shutil.rmtree(target.parent)


# -- bytes -------------------------------------------------------------------------------------------

BYTE_CHANGES = st.one_of(
    st.tuples(st.just("set"), st.integers(0, 1 << 20), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("insert"), st.integers(0, 1 << 20), st.binary(min_size=1, max_size=64)),
    st.tuples(st.just("delete"), st.integers(0, 1 << 20), st.integers(1, 100)),
    st.tuples(st.just("double"), st.integers(0, 1 << 20), st.integers(1, 100)),
    st.tuples(st.just("cut"), st.integers(0, 1 << 20), st.none()),
)


def change_bytes(data, changes):
    for kind, where, what in changes:
        at = where % (len(data) + 1)
        if kind == "set":
            data = data[:at] + what + data[at + len(what) :]
        elif kind == "insert":
            data = data[:at] + what + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + what :]
        elif kind == "double":
            data = data[: at + what] + data[at:]
        else:
            data = data[:at]
    return data


def file_of(original, number, suffix=""):
    """Return one of the checkpoint's files."""
    files = sorted(
        str(file.relative_to(original.path)) for file in original.path.rglob("*") if file.is_file()
    )
    files = [file for file in files if file.endswith(suffix)]
    return files[number % len(files)]


@given(number=st.integers(0, 1000), changes=st.lists(BYTE_CHANGES, min_size=1, max_size=4))
def test_bytes_of_any_file(original, right, number, changes):
    file = file_of(original, number)
    before = (original.path / file).read_bytes()
    after = change_bytes(before, changes)
    with copied(original) as path:
        (path / file).write_bytes(after)
        with bounded():
            found = try_all(path)
    if after == before:
        assert found == right
    elif found is not None:
        # Not noticed on loading: then it is in what no load reads, and verify says so.
        values, report = found
        assert values == right
        assert {problem.path for problem in report.problems} == {file}


@given(changes=st.lists(BYTE_CHANGES, min_size=1, max_size=4))
def test_bytes_of_a_manifest_that_is_sealed_again(original, changes):
    line = (original.path / "gockpt.json").read_bytes().splitlines(keepends=True)[0]
    with copied(original) as path:
        seal(path, change_bytes(line[:-1], changes) + b"\n")
        with bounded():
            try_all(path)


# -- structure ---------------------------------------------------------------------------------------

HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        [0, -1, 1, 2, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 1.0, -0.0, 1e308]
    ),
    st.sampled_from(
        [
            *("", ".", "..", "/", "a/b", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "zarr.json"),
            *("gockpt.json", "c.0.0", "model", "MODEL", "model/w", "x" * 300, "\x1b[2J", "\u202e", "~2f"),
            *("gockpt", "1", "00000000", "ffffffff", "0" * 64, "object", "float128", *DTYPES),
        ]
    ),
    st.lists(st.integers(0, 3), max_size=40),
    st.just([[]] * 40),
    st.just({}),
    st.just({"path": "../x", "size": 0, "crc32c": "00000000"}),
    st.just([2**62, 2**62, 2**62]),
    st.just([0, 2**62, 2**62]),
)


def places(document, path=()):
    """Return the path to every value in a document."""
    found = [path] if path else []
    if isinstance(document, (dict, list)):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            found += places(value, (*path, key))
    return found


def change_document(document, changes):
    for kind, where, value in changes:
        there = places(document)
        if not there:
            break
        *path, last = there[where % len(there)]
        holder = document
        for key in path:
            holder = holder[key]
        if kind == "replace":
            holder[last] = copy.deepcopy(value)
        elif kind == "delete":
            del holder[last]
        elif kind == "double" and isinstance(holder, list):
            holder.insert(last, copy.deepcopy(holder[last]))
        elif kind == "swap" and isinstance(holder, list):
            holder[last], holder[0] = holder[0], holder[last]
        elif kind == "add" and isinstance(holder, dict):
            holder[str(value)[:20]] = copy.deepcopy(value)
        elif kind == "borrow":  # a value from elsewhere in the same document
            source = document
            for key in there[(where * 7 + 3) % len(there)]:
                source = source[key]
            holder[last] = copy.deepcopy(source)
    return document


DOCUMENT_CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["replace", "replace", "replace", "delete", "double", "swap", "add", "borrow"]),
        st.integers(0, 1 << 20),
        HOSTILE,
    ),
    min_size=1,
    max_size=3,
)


def seal(path, line):
    (path / "gockpt.json").write_bytes(line + b'{"crc32c": "%08x"}\n' % crc32c(line))


def read_manifest(original):
    return json.loads((original.path / "gockpt.json").read_bytes().splitlines()[0])


@given(changes=DOCUMENT_CHANGES)
@settings(max_examples=max(100, settings().max_examples))
def test_values_of_a_manifest_that_is_sealed_again(original, right, changes):
    document = change_document(read_manifest(original), changes)
    with copied(original) as path:
        outside = set(os.listdir(path.parent.parent))
        seal(path, json.dumps(document).encode() + b"\n")
        with bounded():
            found = try_all(path)
        assert set(os.listdir(path.parent.parent)) == outside
    if found is not None:
        # What is accepted lies about no bit that it hands out under a name that was there before.
        values = found[0] if isinstance(found, tuple) else found
        shapes = {"/".join(a["name"]): (a["shape"], a["dtype"]) for a in document["arrays"]}
        for array in read_manifest(original)["arrays"]:
            name = "/".join(array["name"])
            if shapes.get(name) == (array["shape"], array["dtype"]):
                assert values[name] == right[name]


@given(changes=DOCUMENT_CHANGES, number=st.integers(0, 1000))
def test_values_of_a_zarr_document_that_is_sealed_again(original, right, changes, number):
    file = file_of(original, number, "zarr.json")
    changed = change_document(json.loads((original.path / file).read_bytes()), changes)
    data = json.dumps(changed).encode()
    with copied(original) as path:
        (path / file).write_bytes(data)
        document = read_manifest(original)
        entry = {"size": len(data), "crc32c": f"{crc32c(data):08x}"}
        for array in document["arrays"]:
            if f"{array['path']}/zarr.json" == file:
                array["meta"] = entry
        for one in document["files"]:
            if one["path"] == file:
                one.update(entry)
        seal(path, json.dumps(document).encode() + b"\n")
        with bounded():
            found = try_all(path)
    values = found[0] if isinstance(found, tuple) else found
    assert values == right  # no load asks Zarr's documents


@given(
    data=st.binary(max_size=200)
    | st.text('{}[]",:0123456789.eE+-truefalsn\\u \n', max_size=200).map(str.encode)
)
def test_any_bytes_as_json(data):
    with bounded():
        try:
            value = strict_json.loads(data, what="it")
        except GockptError:
            return
    assert json.loads(data) == value
    assert strict_json.nesting(data) <= strict_json.MANIFEST_DEPTH


def plain_nesting(data):
    depth = deepest = 0
    inside = escaped = False
    for byte in data:
        if escaped:
            escaped = False
        elif inside:
            escaped, inside = byte == ord("\\"), byte != ord('"')
        else:
            inside = byte == ord('"')
            depth += (byte in b"[{") - (byte in b"]}")
            deepest = max(deepest, depth)
    return deepest


@given(data=st.text('{}[]",\\ab', max_size=60).map(str.encode), size=st.integers(1, 70))
@settings(max_examples=max(300, settings().max_examples))
def test_nesting_counted_in_parts_equals_counting_byte_by_byte(data, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strict_json, "_SLICE", size)
        assert strict_json.nesting(data) == plain_nesting(data)
