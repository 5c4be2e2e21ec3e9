"""What a transaction refuses, and how it ends."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import pytest

from gockpt.core.arena_layout import ArrayLayout, slot_bytes
from gockpt.core.array_spec import ArraySpec
from gockpt.errors import SaveAborted, StorageError, UnsupportedState, UsageError
from gockpt.storage.local.store import Store
from gockpt.storage.read import find


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "path") as store:
        yield store


def test_a_missing_chunk(store, sample):
    with sample.begin(store, 1) as transaction:
        arena = sample.arena(1)
        for layout in sample.layouts:
            for slot in layout.slots:
                if (layout.spec.name, slot.chunk) != (("model", "w"), 1):
                    transaction.write_chunk(
                        layout, slot, arena[slot.offset : slot.offset + slot.capacity].data
                    )
        with pytest.raises(UsageError, match=r"'model/w' lacks the chunks \[1\]"):
            transaction.commit()
    assert find.list_checkpoints(store.path) == []


def test_an_array_that_was_never_written(store, sample):
    with (
        sample.begin(store, 1) as transaction,
        pytest.raises(UsageError, match="'model/big' lacks the chunks"),
    ):
        transaction.commit()


def test_an_array_that_is_not_to_be_published(store, sample, sampling):
    begun = sampling.Sample(sample.layouts[1:], sample.nbytes)
    with (
        begun.begin(store, 1) as transaction,
        pytest.raises(UsageError, match="'model/big' is not among the arrays"),
    ):
        sample.write(transaction, 1)


def test_a_chunk_written_twice(store, sample):
    with sample.begin(store, 1) as transaction:
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
    with (
        store.begin(1, [layout], state={}, attributes={}, exact=True) as transaction,
        pytest.raises(UsageError),
    ):
        transaction.commit()
    assert find.list_checkpoints(store.path) == []


def test_slots_that_are_not_the_grids(store, sampling):
    layout = sampling.make([(("model", "w"), (8,), "float32", 4)]).layouts[0]
    shifted = replace(layout, slots=(layout.slots[0], replace(layout.slots[1], row=5)))
    buffer = memoryview(bytearray(4096))
    with (
        store.begin(1, [shifted], state={}, attributes={}, exact=True) as transaction,
        pytest.raises(UsageError, match="regular grid"),
    ):
        transaction.write_chunk(shifted, shifted.slots[0], buffer)


def test_another_layout(store, sampling):
    one = sampling.make([(("model", "w"), (8,), "float32", 4)])
    other = sampling.make([(("model", "w"), (8,), "float32", 8)])
    with one.begin(store, 1) as transaction, pytest.raises(UsageError, match="another layout"):
        other.write(transaction, 1)


@pytest.mark.parametrize(
    "names", [[("a/b",), ("a", "b")], [("a",), ("a", "b")], [("a", "b"), ("a",)], [("x" * 100,) * 25]]
)
def test_names_that_cannot_stand_together(store, sampling, names):
    sample = sampling.make([(name, (2,), "float32", 2) for name in names])
    with pytest.raises(UsageError):
        sample.save(store, 1, marker=1)
    assert find.list_checkpoints(store.path) == []
    assert not [name for name in os.listdir(store.path) if "step" in name]


@pytest.mark.parametrize("part", ["state", "attributes"])
@pytest.mark.parametrize("value", [float("nan"), {1: 2}, object(), {"a": {None: 1}}])
def test_documents_without_an_exact_form(store, sample, part, value):
    documents = {"state": {}, "attributes": {}, part: {"value": value}}
    with store.begin(1, sample.layouts, **documents, exact=True) as transaction:
        sample.write(transaction, 1)
        with pytest.raises(UnsupportedState):
            transaction.commit()
    assert find.list_checkpoints(store.path) == []


def test_what_it_holds_can_be_said_otherwise_until_it_is_written(store, sample):
    with sample.begin(store, 1) as transaction:
        sample.write(transaction, 1)
        transaction.restate(state={"said": "later"}, attributes={"title": "other"}, exact=False)
        transaction.commit()
    (found,) = find.list_checkpoints(store.path)
    assert found.exact is False
    with find.open_checkpoint(store.path) as stored:
        assert stored.state() == {"said": "later"}
        assert stored.manifest.attributes == {"title": "other"}
        assert stored.verify().ok
    with sample.begin(store, 2) as transaction:
        sample.write(transaction, 1)
        transaction.write_documents()
        with pytest.raises(UsageError, match="once its documents are written"):
            transaction.restate(state={}, attributes={}, exact=False)


def test_after_an_error_there_is_only_the_end(store, sample):
    with sample.begin(store, 1) as transaction:
        with pytest.raises(UsageError):
            transaction.commit()
        with pytest.raises(StorageError, match="failed before: 'model/big' lacks"):
            sample.write(transaction, 1)
        with pytest.raises(StorageError, match="failed before"):
            transaction.commit()


def test_after_the_end_there_is_nothing(store, sample):
    transaction = sample.begin(store, 1)
    sample.write(transaction, 1)
    transaction.commit()
    transaction.abort()
    assert len(find.list_checkpoints(store.path)) == 1
    with pytest.raises(SaveAborted):
        transaction.commit()
    transaction = sample.begin(store, 2)
    transaction.abort()
    transaction.abort()
    with pytest.raises(SaveAborted):
        sample.write(transaction, 1)


def test_abort_removes_everything(store, sample):
    before = set(os.listdir(store.path))
    transaction = sample.begin(store, 1)
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
    transaction = sample.begin(store, 2)
    sample.write(transaction, 1)
    transaction.abort()
    assert descriptors() == before
    with sample.begin(store, 3) as transaction, pytest.raises(UsageError):
        transaction.commit()
    assert descriptors() == before


class Gate:
    """Holds one kind of call until it is opened; by default the last one for a chunk."""

    def __init__(self, faults, held="ftruncate"):
        self.reached, self.open = threading.Event(), threading.Event()
        gate = self

        class Waiting(faults.Interposer):
            def around(self, name, call, arguments, dir_fd):
                if name == held and gate.armed:
                    gate.reached.set()
                    assert gate.open.wait(60)
                return call()

        self.armed = False
        self.fs = Waiting()


def test_abort_waits_for_a_chunk_that_is_being_written(tmp_path, sample, faults):
    gate = Gate(faults)
    with Store(tmp_path / "path", fs=gate.fs) as store:
        transaction = sample.begin(store, 1)
        gate.armed = True
        writer = threading.Thread(target=lambda: sample.write(transaction, 1))
        errors = []
        writer.run = lambda run=writer.run: _catch(run, errors)
        writer.start()
        assert gate.reached.wait(60)
        with pytest.raises(UsageError, match="while chunks are being written"):
            transaction.commit()
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


@pytest.mark.parametrize("end", ["abort", "close"])
@pytest.mark.parametrize("held", ["syncfs", "rename_new", "unlink"])
def test_who_ends_it_while_it_is_committed_waits_and_finds_it_published(
    tmp_path, sample, faults, monkeypatch, end, held
):
    gate = Gate(faults, held)
    monkeypatch.setattr(type(gate.fs), "syncfs_reports_errors", lambda *_: True)
    store = Store(tmp_path / "path", fs=gate.fs)
    closed = []
    monkeypatch.setattr(type(gate.fs), "close", lambda _, fd: (closed.append(fd), os.close(fd)))
    transaction = sample.begin(store, 1)
    sample.write(transaction, 1)
    own = [transaction._fd, transaction._owner_fd]
    published = []
    gate.armed = True
    committer = threading.Thread(target=lambda: published.append(transaction.commit()))
    committer.start()
    assert gate.reached.wait(60)
    done = threading.Event()
    ender = threading.Thread(
        target=lambda: (getattr((transaction, store)[end == "close"], end)(), done.set())
    )
    ender.start()
    assert not done.wait(0.05)
    gate.open.set()
    committer.join(60)
    ender.join(60)
    assert done.is_set()
    assert [one.step for one in published] == [1]
    assert [entry.step for entry in find.list_checkpoints(store.path)] == [1]
    assert [closed.count(fd) for fd in own] == [1, 1]  # twice would close somebody else's
    store.close()
    assert sorted(os.listdir(store.path)) == [".gockpt.lock", "step-0000000001"]


def _catch(run, errors):
    try:
        run()
    except SaveAborted as error:
        errors.append(error)


def test_a_refused_commit_lets_the_writing_go_on(tmp_path, sample, faults):
    """A commit that comes too early is the caller's mistake, not the end of the save."""
    gate = Gate(faults)
    with Store(tmp_path / "path", fs=gate.fs) as store:
        transaction = sample.begin(store, 1)
        gate.armed = True
        writer = threading.Thread(target=lambda: sample.write(transaction, 1))
        writer.start()
        assert gate.reached.wait(60)
        with pytest.raises(UsageError, match="while chunks are being written"):
            transaction.commit()
        gate.open.set()
        writer.join(60)
        transaction.commit()
        assert len(find.list_checkpoints(store.path)) == 1


def test_a_slot_is_large_enough_for_what_is_put_into_it():
    for nbytes in range(1, 9000):
        assert slot_bytes(nbytes) >= nbytes + 4
