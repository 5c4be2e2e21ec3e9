"""What one transaction writes, byte for byte, and what it refuses."""

from __future__ import annotations

import errno
import json
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.errors import SaveAborted, StorageError, UnsupportedState, UsageError
from gockpt.layout import ArrayLayout, slot_bytes
from gockpt.schema import DTYPES, ArraySpec
from gockpt.storage import chunk_writer, files, listing
from gockpt.storage.checksum import crc32c
from gockpt.storage.filesystem import Filesystem
from gockpt.storage.manifest import chunked_layout
from gockpt.storage.store import Store


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "path") as store:
        yield store


def page_aligned(nbytes, *, off=0):
    """Return writable memory that starts ``off`` bytes behind a page."""
    data = np.frombuffer(mmap.mmap(-1, nbytes + 4096), np.uint8)[off : off + nbytes]
    data[:] = 0xAA
    return data


def expected_file(content: bytes, layout: ArrayLayout) -> bytes:
    padded = content + bytes(layout.chunk_nbytes - len(content))
    return padded + crc32c(padded).to_bytes(4, "little")


def write_one(directory, layout, slot, *, off=0, direct=True, fs=None):
    """Write one chunk with random rows; returns (its rows, the file's bytes, what was returned)."""
    buffer = page_aligned(slot.capacity, off=off)
    content = np.random.default_rng(slot.nbytes).integers(0, 256, slot.nbytes, np.uint8)
    buffer[: slot.nbytes] = content
    fd = os.open(directory, os.O_RDONLY)
    try:
        written = chunk_writer.write_chunk(
            fs or Filesystem(), fd, "chunk", layout=layout, slot=slot, buffer=buffer.data, direct=direct
        )
        os.close(written.fd)
    finally:
        os.close(fd)
    path = os.path.join(directory, "chunk")
    with open(path, "rb") as file:
        data = file.read()
    os.unlink(path)
    return content.tobytes(), data, written


@given(
    rows=st.integers(1, 3000),
    row=st.integers(1, 7),
    chunk_rows=st.integers(1, 3000),
    dtype=st.sampled_from(["uint8", "bfloat16", "float32", "complex128"]),
    off=st.sampled_from([0, 64, 512]),
)
def test_a_file_is_rows_zeros_and_checksum(rows, row, chunk_rows, dtype, off):
    chunk = (min(chunk_rows, rows), row)
    layout = chunked_layout(ArraySpec(("a",), (rows, row), dtype), chunk)
    for slot in {layout.slots[0], layout.slots[-1]}:
        content, data, written = write_one(".", layout, slot, off=off)
        assert data == expected_file(content, layout)
        assert written.nbytes == slot.nbytes + 4
        assert written.blocks.tolist() == [
            crc32c(content[i : i + (1 << 20)]) for i in range(0, len(content), 1 << 20)
        ]


# Every place that the checksum of a padded chunk can have relative to the pages of the rows.
@pytest.mark.parametrize("rows", [1, 4000, 4091, 4092, 4093, 4096, 4097, 8188, 8192])
@pytest.mark.parametrize("whole", [4092, 4093, 4095, 4096, 8187, 8188, 8190, 8192, 8193, 12288, 300000])
def test_the_checksum_may_stand_anywhere(rows, whole, tmp_path):
    rows = min(rows, whole)
    layout = chunked_layout(ArraySpec(("a",), (whole + rows,), "uint8"), (whole,))
    content, data, _ = write_one(tmp_path, layout, layout.slots[-1])
    assert data == expected_file(content, layout)


@pytest.mark.parametrize("rows", [1 << 20, (1 << 20) + 5, 3 << 18])
def test_large_chunks_are_written_directly_in_one_call(rows, tmp_path, faults):
    layout = chunked_layout(ArraySpec(("a",), (rows,), "uint8"), (rows,))
    fs = faults.Recorder()
    content, data, written = write_one(tmp_path, layout, layout.slots[0], fs=fs)
    assert data == expected_file(content, layout)
    assert fs.names.count("pwrite") == 1
    assert written.direct
    assert not written.refused


def test_nothing_behind_the_rows_reaches_the_disk(tmp_path, faults):
    """Not even for a moment: a crash could leave it there."""

    class Written(faults.Interposer):
        data = b""

        def around(self, name, call, arguments, dir_fd):
            if name == "pwrite":
                self.data += bytes(arguments[1])
            return call()

    fs = Written()
    layout = chunked_layout(ArraySpec(("a",), (20000,), "uint8"), (15000,))
    for slot in layout.slots:
        zeros = replace(slot, nbytes=slot.nbytes)
        buffer = page_aligned(slot.capacity)
        buffer[: slot.nbytes] = 0
        fd = os.open(tmp_path, os.O_RDONLY)
        written = chunk_writer.write_chunk(
            fs, fd, f"c{slot.chunk}", layout=layout, slot=zeros, buffer=buffer.data, direct=True
        )
        os.close(written.fd)
        os.close(fd)
    assert 0xAA not in fs.data
    assert len(fs.data) >= 20000


@pytest.mark.parametrize("off", [0, 64])
@pytest.mark.parametrize("refusal", ["open", "open leaves a file", "write", "second write", "never"])
@pytest.mark.parametrize("edge", [False, True])
def test_direct_io_is_given_up_where_it_is_refused(refusal, off, edge, tmp_path, faults):
    class Refusing(faults.Interposer):
        writes = 0

        def around(self, name, call, arguments, dir_fd):
            invalid = OSError(errno.EINVAL, "Invalid argument")
            if name == "open" and arguments[1] & os.O_DIRECT:
                if refusal == "open leaves a file":
                    os.close(call())
                if refusal.startswith("open"):
                    raise invalid
                self.direct = result = call()
                return result
            if name == "pwrite" and arguments[0] == getattr(self, "direct", None):
                self.writes += 1
                if (refusal, self.writes) in (("write", 1), ("second write", 2)):
                    call()  # it may have written a part
                    raise invalid
            if name == "close" and arguments[0] == getattr(self, "direct", None):
                self.direct = None
            return call()

    layout = chunked_layout(ArraySpec(("a",), (900_000,), "uint8"), (500_000,))
    slot = layout.slots[-1] if edge else layout.slots[0]
    content, data, written = write_one(tmp_path, layout, slot, off=off, fs=Refusing())
    assert data == expected_file(content, layout)
    refused = off == 0 and refusal != "never" and (edge or refusal != "second write")
    assert written.refused == refused
    assert written.direct == (off == 0 and not refused)


def test_other_errors_at_a_direct_open_are_errors(tmp_path, faults):
    layout = chunked_layout(ArraySpec(("a",), (500_000,), "uint8"), (500_000,))
    fs = faults.FailingAt(0, errno.EACCES, only="open")
    with pytest.raises(PermissionError):
        write_one(tmp_path, layout, layout.slots[0], fs=fs)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_reservation_will_do(code, tmp_path, faults):
    layout = chunked_layout(ArraySpec(("a",), (2_000_000,), "uint8"), (2_000_000,))
    content, data, _ = write_one(
        tmp_path, layout, layout.slots[0], fs=faults.FailingAt(0, code, only="fallocate")
    )
    assert data == expected_file(content, layout)


def test_a_reservation_without_space_fails_before_anything_is_written(tmp_path, faults):
    class Full(faults.Recorder):
        def fallocate(self, fd, nbytes):
            raise OSError(errno.ENOSPC, "No space left on device")

    fs = Full()
    layout = chunked_layout(ArraySpec(("a",), (2_000_000,), "uint8"), (2_000_000,))
    with pytest.raises(OSError, match="No space"):
        write_one(tmp_path, layout, layout.slots[0], fs=fs)
    assert "pwrite" not in fs.names


def test_the_buffer_must_be_the_slot(tmp_path):
    layout = chunked_layout(ArraySpec(("a",), (5,), "uint8"), (5,))
    with pytest.raises(ValueError, match="4096 bytes, its slot 8192"):
        chunk_writer.write_chunk(
            Filesystem(),
            -1,
            "x",
            layout=layout,
            slot=replace(layout.slots[0], capacity=8192),
            buffer=memoryview(bytearray(4096)),
            direct=False,
        )


def test_writing_is_cut_into_pieces_the_system_takes(faults):
    class Counting(faults.Interposer):
        def __init__(self):
            self.pieces = []

        def pwrite(self, fd, data, offset):
            self.pieces.append((offset, data.nbytes))
            return data.nbytes

    fs = Counting()
    files.write_all(fs, -1, memoryview(np.broadcast_to(np.uint8(0), (2 << 30) + 5)), 100)
    assert fs.pieces == [(100, 1 << 30), (100 + (1 << 30), 1 << 30), (100 + (2 << 30), 5)]


@given(st.binary(min_size=1, max_size=50), st.lists(st.integers(0, 5), max_size=80), st.integers(0, 9))
def test_short_and_interrupted_writes_are_continued(data, sizes, offset):
    class Reluctant(Filesystem):
        def __init__(self):
            self.file = bytearray(offset + len(data))
            self.sizes = list(sizes)

        def pwrite(self, fd, piece, at):
            size = self.sizes.pop() if self.sizes else len(piece)
            if size == 0:
                raise InterruptedError
            size = min(size, len(piece))
            self.file[at : at + size] = piece[:size]
            return size

    fs = Reluctant()
    files.write_all(fs, -1, memoryview(data), offset)
    assert fs.file == bytes(offset) + data


def test_a_write_of_nothing_is_an_error():
    class Stuck(Filesystem):
        def pwrite(self, fd, piece, at):
            return 0

    with pytest.raises(OSError, match="wrote nothing"):
        files.write_all(Stuck(), -1, memoryview(b"data"), 0)


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
    assert document["run"] == store.run
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
    with store.begin(1) as transaction:
        sample.write(transaction, 1)
        assert listing.list_checkpoints(store.path) == []
        assert not os.path.exists(os.path.join(store.path, "step-0000000001"))
        sample.commit(transaction, 1)
        assert [entry.step for entry in listing.list_checkpoints(store.path)] == [1]


def test_many_threads_write_one_checkpoint(store, sampling, checker):
    many = sampling.make(
        [(("model", f"group{i % 7}", f"w{i}"), (i % 50 + 3, 4), "float32", 2 + i % 5) for i in range(60)]
    )
    arena = many.arena(3)
    with store.begin(1) as transaction, ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(
                transaction.write_chunk, layout, slot, arena[slot.offset : slot.offset + slot.capacity].data
            )
            for layout in many.layouts
            for slot in layout.slots
        ]
        for job in jobs:
            job.result()
        published = many.commit(transaction, 3)
    assert checker.problems(checker.read(published.path)) == []


def test_no_arrays_at_all(store, sampling, checker):
    published = sampling.make([]).save(store, 0, marker=0)
    assert checker.problems(checker.read(published.path)) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_has_a_document(store, sampling, dtype):
    published = sampling.make([(("model", "w"), (3,), dtype, 2)]).save(store, 0, marker=0)
    with listing.open_checkpoint(published.path) as checkpoint:
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
    with listing.open_checkpoint(published.path) as checkpoint:
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


def test_an_array_has_one_file_per_chunk_and_few_calls(tmp_path, sampling, faults):
    """444 small arrays in well under a second: what costs time is calls."""
    sample = sampling.make([(("model", f"layers.{i}.w"), (8, 4), "float32", 8) for i in range(444)])
    fs = faults.Recorder()
    with Store(tmp_path / "path", fs=fs) as store:
        before = len(fs.calls)
        sample.save(store, 1, marker=1)
        calls = fs.names[before:]
    assert len(calls) < 444 * 16 + 100
    assert calls.count("pwrite") == 444 * 2 + 6
    assert calls.count("fsync") == 444 * 3 + 9
    assert calls.count("syncfs") <= 1


# -- refusals -------------------------------------------------------------------------------------


def test_a_missing_chunk(store, sample):
    with store.begin(1) as transaction:
        arena = sample.arena(1)
        for layout in sample.layouts:
            for slot in layout.slots:
                if (layout.spec.name, slot.chunk) != (("model", "w"), 1):
                    transaction.write_chunk(
                        layout, slot, arena[slot.offset : slot.offset + slot.capacity].data
                    )
        with pytest.raises(UsageError, match=r"'model/w' lacks the chunks \[1\]"):
            sample.commit(transaction, 1)
    assert listing.list_checkpoints(store.path) == []


def test_an_array_that_was_never_written(store, sample):
    with store.begin(1) as transaction, pytest.raises(UsageError, match="'model/big' lacks the chunks"):
        sample.commit(transaction, 1)


def test_an_array_that_is_not_to_be_published(store, sample):
    with store.begin(1) as transaction:
        sample.write(transaction, 1)
        with pytest.raises(UsageError, match="'model/big' was written, but is not among"):
            transaction.commit(sample.layouts[1:], state={}, attributes={}, exact=True)


def test_a_chunk_written_twice(store, sample):
    with store.begin(1) as transaction:
        sample.write(transaction, 1)
        with pytest.raises(UsageError, match="chunk 0 of 'model/big' was written before"):
            sample.write(transaction, 1)


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((2,), (3,)),
        ((2,), (0,)),
        ((4, 6), (2, 3)),
        ((4, 6), (2,)),
        ((), (1,)),
        ((0,), (0,)),
        ((4, 0), (2, 0)),
    ],
)
def test_a_grid_that_readers_would_refuse(store, shape, chunk):
    layout = ArrayLayout(ArraySpec(("model", "w"), shape, "uint8"), chunk, ())
    with store.begin(1) as transaction, pytest.raises(UsageError):
        transaction.commit([layout], state={}, attributes={}, exact=True)
    assert listing.list_checkpoints(store.path) == []


def test_slots_that_are_not_the_grids(store, sampling):
    layout = sampling.make([(("model", "w"), (8,), "float32", 4)]).layouts[0]
    shifted = replace(layout, slots=(layout.slots[0], replace(layout.slots[1], row=5)))
    buffer = memoryview(bytearray(4096))
    with store.begin(1) as transaction, pytest.raises(UsageError, match="regular grid"):
        transaction.write_chunk(shifted, shifted.slots[0], buffer)


def test_another_layout(store, sampling):
    one = sampling.make([(("model", "w"), (8,), "float32", 4)])
    other = sampling.make([(("model", "w"), (8,), "float32", 8)])
    with store.begin(1) as transaction:
        one.write(transaction, 1)
        with pytest.raises(UsageError, match="another layout"):
            other.commit(transaction, 1)


@pytest.mark.parametrize(
    "names", [[("a/b",), ("a", "b")], [("a",), ("a", "b")], [("a", "b"), ("a",)], [("x" * 100,) * 25]]
)
def test_names_that_cannot_stand_together(store, sampling, names):
    sample = sampling.make([(name, (2,), "float32", 2) for name in names])
    with pytest.raises(UsageError):
        sample.save(store, 1, marker=1)
    assert listing.list_checkpoints(store.path) == []
    assert not [name for name in os.listdir(store.path) if "step" in name]


@pytest.mark.parametrize("part", ["state", "attributes"])
@pytest.mark.parametrize("value", [float("nan"), {1: 2}, object(), {"a": {None: 1}}])
def test_documents_without_an_exact_form(store, sample, part, value):
    with store.begin(1) as transaction:
        sample.write(transaction, 1)
        with pytest.raises(UnsupportedState):
            transaction.commit(
                sample.layouts, **{"state": {}, "attributes": {}, part: {"value": value}}, exact=True
            )
    assert listing.list_checkpoints(store.path) == []


def test_after_an_error_there_is_only_the_end(store, sample):
    with store.begin(1) as transaction:
        with pytest.raises(UsageError):
            sample.commit(transaction, 1)
        with pytest.raises(StorageError, match="failed before: 'model/big' lacks"):
            sample.write(transaction, 1)
        with pytest.raises(StorageError, match="failed before"):
            sample.commit(transaction, 1)


def test_after_the_end_there_is_nothing(store, sample):
    transaction = store.begin(1)
    sample.write(transaction, 1)
    sample.commit(transaction, 1)
    transaction.abort()
    assert len(listing.list_checkpoints(store.path)) == 1
    with pytest.raises(SaveAborted):
        sample.commit(transaction, 1)
    transaction = store.begin(2)
    transaction.abort()
    transaction.abort()
    with pytest.raises(SaveAborted):
        sample.write(transaction, 1)


def test_abort_removes_everything(store, sample):
    before = set(os.listdir(store.path))
    transaction = store.begin(1)
    sample.write(transaction, 1)
    assert len(os.listdir(store.path)) == len(before) + 2
    transaction.abort()
    assert set(os.listdir(store.path)) == before


def test_no_descriptor_is_left_open(store, sample):
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    sample.save(store, 1, marker=1)
    assert descriptors() == before
    transaction = store.begin(2)
    sample.write(transaction, 1)
    transaction.abort()
    assert descriptors() == before
    with store.begin(3) as transaction, pytest.raises(UsageError):
        sample.commit(transaction, 1)
    assert descriptors() == before


class Gate:
    """Holds a file system's pwrite of chunks until it is opened."""

    def __init__(self, faults):
        self.reached, self.open = threading.Event(), threading.Event()
        gate = self

        class Waiting(faults.Interposer):
            def around(self, name, call, arguments, dir_fd):
                if name == "ftruncate" and gate.armed:
                    gate.reached.set()
                    assert gate.open.wait(60)
                return call()

        self.armed = False
        self.fs = Waiting()


def test_abort_waits_for_a_chunk_that_is_being_written(tmp_path, sample, faults):
    gate = Gate(faults)
    with Store(tmp_path / "path", fs=gate.fs) as store:
        transaction = store.begin(1)
        gate.armed = True
        writer = threading.Thread(target=lambda: sample.write(transaction, 1))
        errors = []
        writer.run = lambda run=writer.run: _catch(run, errors)
        writer.start()
        assert gate.reached.wait(60)
        with pytest.raises(UsageError, match="while chunks are being written"):
            sample.commit(transaction, 1)
        done = threading.Event()
        aborter = threading.Thread(target=lambda: (transaction.abort(), done.set()))
        aborter.start()
        assert not done.is_set()
        assert any(".partial-" in name for name in os.listdir(store.path))
        gate.open.set()
        aborter.join(60)
        writer.join(60)
        assert done.is_set()
        assert [type(error) for error in errors] == [SaveAborted]
        assert os.listdir(store.path) == [".gockpt.lock"]


def _catch(run, errors):
    try:
        run()
    except SaveAborted as error:
        errors.append(error)


def test_a_refused_commit_lets_the_writing_go_on(tmp_path, sample, faults):
    """A commit that comes too early is the caller's mistake, not the end of the save."""
    gate = Gate(faults)
    with Store(tmp_path / "path", fs=gate.fs) as store:
        transaction = store.begin(1)
        gate.armed = True
        writer = threading.Thread(target=lambda: sample.write(transaction, 1))
        writer.start()
        assert gate.reached.wait(60)
        with pytest.raises(UsageError, match="while chunks are being written"):
            sample.commit(transaction, 1)
        gate.open.set()
        writer.join(60)
        sample.commit(transaction, 1)
        assert len(listing.list_checkpoints(store.path)) == 1


def test_a_slot_is_large_enough_for_what_is_put_into_it():
    for nbytes in range(1, 9000):
        assert slot_bytes(nbytes) >= nbytes + 4
