"""What one transaction publishes."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gockpt.core.array_spec import DTYPES
from gockpt.errors import ManifestCorrupt, StorageError, UsageError
from gockpt.storage.format import manifest
from gockpt.storage.format.checksum import crc32c
from gockpt.storage.local.store import Store
from gockpt.storage.read import find


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "path") as store:
        yield store


def expected_file(content, layout):
    padded = content + bytes(layout.chunk_nbytes - len(content))
    return padded + crc32c(padded).to_bytes(4, "little")


def test_commit_says_what_it_published(store, sample, checker):
    published = sample.save(store, 1200, marker=5)
    assert published.step == 1200
    assert published.seq == 1
    assert published.path == os.path.join(store.path, "step-0000001200")
    tree = checker.read(published.path)
    assert checker.problems(tree) == []
    stored = sum(len(data) for data in tree.values() if data is not None)
    padding = sum(layout.chunk_nbytes - slot.nbytes for layout in sample.layouts for slot in layout.slots)
    assert published.nbytes == stored - padding
    document = json.loads(tree["gockpt.json"].splitlines()[0])
    assert (document["step"], document["seq"], document["exact"]) == (1200, 1, True)
    assert document["attempt"] == published.attempt
    assert document["run"] == store.run.id
    assert document["parent"] is None
    assert document["attributes"] == json.loads(tree["zarr.json"])["attributes"] == {"title": "sample"}
    assert [tuple(array["name"]) for array in document["arrays"]] == [a.spec.name for a in sample.layouts]


def test_every_byte_is_in_its_place(store, sample):
    published = sample.save(store, 1, marker=5)
    for layout in sample.layouts:
        content = sample.content(layout, 5).tobytes()
        at = 0
        for slot in layout.slots:
            key = "c" if not layout.spec.shape else f"c.{slot.chunk}" + ".0" * (len(layout.spec.shape) - 1)
            with open(os.path.join(published.path, *layout.spec.name, key), "rb") as file:
                assert file.read() == expected_file(content[at : at + slot.nbytes], layout)
            at += slot.nbytes
        assert at == len(content)


def test_nothing_is_visible_before_the_commit(store, sample):
    with sample.begin(store, 1) as transaction:
        sample.write(transaction, 1)
        assert find.list_checkpoints(store.path) == []
        assert not os.path.exists(os.path.join(store.path, "step-0000000001"))
        transaction.commit()
        assert [entry.step for entry in find.list_checkpoints(store.path)] == [1]


def test_many_threads_write_one_checkpoint(store, sampling, checker):
    many = sampling.make(
        [(("model", f"group{i % 7}", f"w{i}"), (i % 50 + 3, 4), "float32", 2 + i % 5) for i in range(60)]
    )
    arena = many.arena(3)
    with many.begin(store, 1, 3) as transaction, ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(
                transaction.write_chunk, layout, slot, arena[slot.offset : slot.offset + slot.capacity].data
            )
            for layout in many.layouts
            for slot in layout.slots
        ]
        for job in jobs:
            job.result()
        published = transaction.commit()
    assert checker.problems(checker.read(published.path)) == []


def test_documents_side_by_side_with_chunks(store, sampling, checker):
    many = sampling.make([(("model", f"group{i % 3}", f"w{i}"), (9, 4), "float32", 4) for i in range(30)])
    with many.begin(store, 1, 3) as transaction, ThreadPoolExecutor(4) as pool:
        documents = [pool.submit(transaction.write_documents) for _ in range(3)]
        many.write(transaction, 3)
        for job in documents:
            job.result()
        published = transaction.commit()
    assert checker.problems(checker.read(published.path)) == []


def test_a_manifest_that_was_tried_is_parsed_once(store, sample, monkeypatch):
    parsed = []
    parse = manifest.parse
    monkeypatch.setattr(manifest, "parse", lambda *args, **kw: (parsed.append(1), parse(*args, **kw))[1])
    with sample.begin(store, 1) as transaction:
        sample.write(transaction, 1)
        transaction.write_documents()
        assert len(parsed) == 1
        transaction.commit()
    assert len(parsed) == 1


def test_one_that_is_another_by_now_is_tried_again(store, sample, monkeypatch, checker):
    """Something else was published meanwhile: number and parent are others."""
    parsed = []
    parse = manifest.parse
    with sample.begin(store, 1) as first, sample.begin(store, 2) as second:
        for transaction in (first, second):
            sample.write(transaction, 1)
            transaction.write_documents()
        first.commit()
        monkeypatch.setattr(manifest, "parse", lambda *args, **kw: (parsed.append(1), parse(*args, **kw))[1])
        published = second.commit()
    assert len(parsed) == 1
    assert checker.problems(checker.read(published.path)) == []
    with find.open_checkpoint(published.path) as checkpoint:
        assert (checkpoint.manifest.seq, checkpoint.manifest.parent) == (2, 1)


def test_what_readers_would_refuse_is_found_before_it_is_synced(store, sample, monkeypatch):
    def refuse(data, *, where):
        raise ManifestCorrupt(f"{where}: no")

    monkeypatch.setattr(manifest, "parse", refuse)
    with sample.begin(store, 1) as transaction:
        sample.write(transaction, 1)
        with pytest.raises(UsageError, match="this can't be published: the manifest: no"):
            transaction.write_documents()
        with pytest.raises(StorageError, match="failed before"):
            transaction.commit()


def test_no_arrays_at_all(store, sampling, checker):
    published = sampling.make([]).save(store, 0, marker=0)
    assert checker.problems(checker.read(published.path)) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_has_a_document(store, sampling, dtype):
    published = sampling.make([(("model", "w"), (3,), dtype, 2)]).save(store, 0, marker=0)
    with find.open_checkpoint(published.path) as checkpoint:
        assert checkpoint.verify().ok


COLLIDING = [
    (("model", "D"), (3,), "float32", 2),
    (("model", "d"), (4,), "float32", 2),
    (("model", "e"), (4,), "float32", 2),
    (("optimizer", "W", "m"), (3,), "float32", 3),
    (("optimizer", "w", "m"), (3,), "float32", 3),
    (("optimizer", "W", "v"), (3,), "float32", 3),
    (("Optimizer", "x"), (2,), "float32", 2),
]


@pytest.mark.parametrize("order", [1, -1])
def test_names_that_differ_in_case_only_are_moved_apart(store, sampling, checker, order):
    sample = sampling.make(COLLIDING[::order])
    published = sample.save(store, 1, marker=3)
    tree = checker.read(published.path)
    assert checker.problems(tree) == []
    directories = [path for path, data in tree.items() if data is None]
    assert len({path.lower() for path in directories}) == len(directories)
    assert {"model/~44", "model/d", "model/e", "optimizer/~57/m", "~4fptimizer/x"} <= set(directories)
    with find.open_checkpoint(published.path) as checkpoint:
        assert checkpoint.verify().ok
        for layout in sample.layouts:
            out = np.empty(layout.spec.nbytes, np.uint8)
            checkpoint.read_into(layout.spec.public_name, None, out)
            assert out.tobytes() == sample.content(layout, 3).tobytes()


def test_a_file_system_that_ignores_case_never_sees_two_alike(store, sampling, faults):
    """Not even while chunks are written, when the other names aren't known yet."""

    class IgnoringCase(faults.Interposer):
        def __init__(self):
            self.made = {}

        def around(self, name, call, arguments, dir_fd):
            if name == "mkdir" and ".partial-" not in arguments[0]:
                assert self.made.setdefault(arguments[0].lower(), arguments[0]) == arguments[0]
            if name == "rename" and arguments[0] in self.made.values():
                self.made.pop(arguments[0].lower())
                assert self.made.setdefault(arguments[1].lower(), arguments[1]) == arguments[1]
            if name == "rmdir" and arguments[0] in self.made.values():
                del self.made[arguments[0].lower()]
            return call()

    with Store(os.path.join(store.path, "inner"), fs=IgnoringCase()) as inner:
        sampling.make(COLLIDING).save(inner, 1, marker=3)


def recorder(faults, *, whole):
    class Recorder(faults.Recorder):
        def syncfs_reports_errors(self, fd):
            return whole

    return Recorder()


@pytest.mark.parametrize("whole", [True, False], ids=["syncfs", "each file"])
def test_an_array_has_one_file_per_chunk_and_few_calls(whole, tmp_path, sampling, faults):
    """444 small arrays in well under a second: what costs time is calls."""
    sample = sampling.make([(("model", f"layers.{i}.w"), (8, 4), "float32", 8) for i in range(444)])
    fs = recorder(faults, whole=whole)
    with Store(tmp_path / "path", fs=fs) as store:
        before = len(fs.calls)
        sample.save(store, 1, marker=1)
        calls = fs.names[before:]
    assert len(calls) < 444 * (8 if whole else 16) + 100
    assert calls.count("pwrite") == 444 * 2 + 6
    assert calls.count("fsync") == (4 if whole else 444 * 3 + 9)
    assert calls.count("syncfs") == whole
