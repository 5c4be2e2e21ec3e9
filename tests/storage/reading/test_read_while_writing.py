"""Readers beside a writer that publishes, replaces and prunes: what they get is one whole checkpoint."""

from __future__ import annotations

import mmap
import threading

import numpy as np
import pytest

from gockpt.core.array_spec import ArraySpec
from gockpt.errors import CheckpointNotFound, CheckpointPruned
from gockpt.storage.format.chunk_grid import chunked_layout
from gockpt.storage.local.store import Store
from gockpt.storage.read.find import list_checkpoints, open_checkpoint

LAYOUTS = [chunked_layout(ArraySpec((name,), (6, 4), "int64"), (4, 4)) for name in ("a", "b")]
NBYTES = 6 * 4 * 8


def publish(store, step, value):
    """Save a step whose every element is ``value``."""
    with store.begin(step, LAYOUTS, state={"value": value}, attributes={}, exact=True) as transaction:
        for layout in LAYOUTS:
            for slot in layout.slots:
                arena = mmap.mmap(-1, slot.capacity)
                arena[: slot.nbytes] = np.full(slot.nbytes // 8, value, "<i8").tobytes()
                transaction.write_chunk(layout, slot, memoryview(arena))
        return transaction.commit()


def read(checkpoint):
    """Return the value that all elements and the state document have in common."""
    values = {checkpoint.state()["value"]}
    for name in ("a", "b"):
        out = np.empty(NBYTES, np.uint8)
        checkpoint.read_into(name, None, out)
        values |= set(out.view("<i8").tolist())
    (value,) = values
    return value


def test_pruned_by_the_store_while_open(tmp_path):
    with Store(tmp_path / "ckpts") as store:
        publish(store, 1, 10)
        with open_checkpoint(tmp_path / "ckpts") as checkpoint:
            publish(store, 2, 20)
            assert read(checkpoint) == 10
            assert store.prune(1) == [1]
            with pytest.raises(CheckpointPruned, match="of step 1 "):
                read(checkpoint)
        with open_checkpoint(tmp_path / "ckpts") as checkpoint:
            assert (checkpoint.step, read(checkpoint)) == (2, 20)


def test_a_step_saved_again_while_open(tmp_path):
    with Store(tmp_path / "ckpts") as store:
        publish(store, 1, 10)
        with open_checkpoint(tmp_path / "ckpts", 1) as checkpoint:
            publish(store, 1, 11)
            assert read(checkpoint) == 10
            assert checkpoint.verify().ok
        with open_checkpoint(tmp_path / "ckpts", 1) as checkpoint:
            assert read(checkpoint) == 11
        assert [entry.seq for entry in list_checkpoints(tmp_path / "ckpts")] == [2]
        both = list_checkpoints(tmp_path / "ckpts", superseded=True)
        assert [(entry.seq, entry.superseded) for entry in both] == [(1, True), (2, False)]
        with open_checkpoint(both[0].path) as checkpoint:
            assert read(checkpoint) == 10


def test_many_publications_and_a_busy_reader(tmp_path):
    path, done = tmp_path / "ckpts", threading.Event()

    def write():
        try:
            with Store(path) as store:
                for value in range(25):
                    publish(store, value % 5, value)
                    store.prune(1)
        finally:
            done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while not done.is_set():
        try:
            with open_checkpoint(path) as checkpoint:
                assert checkpoint.step == checkpoint.state()["value"] % 5
                seen.append(read(checkpoint))
        except CheckpointPruned:
            continue
        except CheckpointNotFound:
            assert not seen, "after the first one there is always a newest"
    writer.join()
    assert seen == sorted(seen)
    with open_checkpoint(path) as checkpoint:
        assert read(checkpoint) == 24
