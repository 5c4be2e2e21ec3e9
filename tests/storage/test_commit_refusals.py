"""What a transaction refuses, and how it ends."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import pytest

from gockpt.errors import SaveAborted, StorageError, UnsupportedState, UsageError
from gockpt.layout import ArrayLayout, slot_bytes
from gockpt.schema import ArraySpec
from gockpt.storage import listing
from gockpt.storage.store import Store


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "path") as store:
        yield store


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
