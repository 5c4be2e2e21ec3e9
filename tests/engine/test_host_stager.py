"""Copies behind the step: dense views, arrival proofs, batches that are helped, one thread that ends."""

from __future__ import annotations

import gc
import itertools
import threading
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gockpt.core.descriptors import Stretch
from gockpt.kernels.fingerprint_numba import fingerprint
from gockpt.saving.copy_requests import sources_of
from gockpt.staging.host_stager import Copies, Rows
from gockpt.staging.task_thread import TaskBatch, TaskThread
from gockpt.tensor_memory import as_bytes, dense_range, is_dense

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]


@pytest.fixture
def transfer():
    made = TaskThread()
    yield made
    made.close()


def storage_bytes(tensor):
    """Return the raw bytes of a tensor's storage from its first element on."""
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return raw[tensor.storage_offset() * tensor.itemsize :].numpy()


# -- tensors as bytes


@given(
    st.lists(st.integers(0, 5), max_size=4),
    st.sampled_from(DTYPES),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_a_permuted_tensor_is_dense_in_storage_order(shape, dtype, offset, random):
    numel = int(np.prod(shape, dtype=int))
    itemsize = torch.empty(0, dtype=dtype).itemsize
    raw = torch.randint(0, 2, ((offset + numel) * itemsize,), dtype=torch.uint8)
    tensor = raw.view(dtype)[offset:].view(shape)
    dims = list(range(len(shape)))
    random.shuffle(dims)
    tensor = tensor.permute(dims)
    found = as_bytes(tensor)
    assert is_dense(tensor)
    assert found.dtype == np.uint8
    assert found.ndim == 1
    assert found.flags.c_contiguous
    assert found.tobytes() == storage_bytes(tensor)[: numel * itemsize].tobytes()
    if numel:
        assert found.ctypes.data == tensor.data_ptr()  # shared, not copied


def test_channels_last_is_dense():
    tensor = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert as_bytes(tensor).tobytes() == storage_bytes(tensor).tobytes()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(4, 4)[:, :2],
        torch.zeros(8)[::2],
        torch.zeros(3, 1).expand(3, 4),
        torch.zeros(6).as_strided((3, 2), (1, 1)),
        torch.zeros(3, dtype=torch.complex64).conj(),
        torch.zeros(3, dtype=torch.complex64).conj().imag,
        torch.zeros(3, 3).to_sparse(),
        torch.zeros(3, device="meta"),
    ],
    ids=["columns", "stride 2", "expanded", "overlapping", "conjugated", "negated", "sparse", "meta"],
)
def test_what_is_not_dense_memory_is_not_copied_as_bytes(tensor):
    assert dense_range(tensor) is None
    if tensor.is_cpu:
        assert not is_dense(tensor)
        live = SimpleNamespace(entries={("model", "w"): tensor})
        piece = SimpleNamespace(stretches=[Stretch(("model", "w"), 0, 0, 1, tensor.element_size())])
        with pytest.raises(ValueError, match="model/w is no longer contiguous in memory"):
            sources_of(live, [piece])


def test_a_parameter_is_read_without_its_graph():
    parameter = torch.nn.Parameter(torch.randn(5))
    assert as_bytes(parameter).tobytes() == parameter.detach().numpy().tobytes()


# -- the arrival proof


ALL = slice(None)


class Copied:
    """A table of three copies; what happens, happens to the second."""

    def __init__(self, n=1000, position=0):
        self.sources = np.random.default_rng(0).integers(0, 255, (3, 4 * n), dtype=np.uint8)
        self.targets = np.zeros_like(self.sources)
        sizes, positions = np.full(3, 4 * n), np.full(3, position)
        rows = Rows(self.addresses(self.sources), sizes, positions, self.sources)
        expected = np.array([fingerprint(row, position) for row in self.sources], np.uint64)
        self.copies = Copies(rows, self.addresses(self.targets), expected)
        self.source, self.target = self.sources[1], self.targets[1]

    @staticmethod
    def addresses(array):
        return np.array([row.ctypes.data for row in array], np.int64)

    @property
    def proven(self):
        return self.copies.proven.tolist()

    def retry(self):
        self.copies.retry()
        return self.proven[1]


def test_copies_that_nothing_disturbs_are_proven():
    copied = Copied(position=8 * 12345)
    assert copied.proven == [False] * 3
    copied.copies.run(slice(0, 2))
    assert copied.proven == [True, True, False]
    copied.copies.run(ALL)
    assert copied.proven == [True] * 3
    assert (copied.targets == copied.sources).all()


@given(st.integers(0, 999), st.integers(0, 3), st.integers(1, 255))
def test_one_bit_changed_between_boundary_and_copy_is_seen(element, byte, flip):
    copied = Copied()
    copied.source[4 * element + byte] ^= flip
    copied.copies.run(ALL)
    assert copied.proven == [True, False, True]
    assert not copied.retry()
    copied.source[4 * element + byte] ^= flip  # back to what it was: the boundary can be copied after all
    assert copied.retry()
    assert (copied.targets == copied.sources).all()


def test_a_change_after_the_copy_does_not_matter():
    copied = Copied()
    copied.copies.run(ALL)
    before = copied.source.copy()
    copied.source[:] = 0
    assert copied.proven == [True] * 3
    assert copied.retry()
    assert (copied.target == before).all()


def test_a_torn_copy_is_seen_although_the_source_is_back():
    """Half of the bytes were copied while another value stood there (an EMA swap around eval)."""
    copied = Copied()
    copied.copies.run(ALL)
    copied.target[:2000] = 0
    copied.copies.arrived[1] = fingerprint(copied.target)
    assert copied.proven == [True, False, True]
    assert copied.retry()
    assert (copied.target == copied.source).all()


@given(st.lists(st.integers(0, 300), max_size=12), st.integers(1, 400))
def test_tables_are_divided_in_order_and_into_parts_of_some_size(sizes, nbytes):
    column = np.array(sizes, np.int64)
    parts = list(Rows(column, column, column, None).parts(nbytes))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(len(sizes)))
    for part, after in itertools.pairwise(parts):
        assert part.stop - part.start == 1 or sum(sizes[part]) <= nbytes
        assert sum(sizes[part.start : after.start + 1]) > nbytes


# -- batches and the thread


@given(st.integers(0, 50))
def test_every_task_runs_once(count):
    transfer = TaskThread()
    try:
        ran = []
        ended = threading.Event()
        batch = transfer.submit([lambda i=i: ran.append(i) for i in range(count)], on_done=ended.set)
        batch.finish()
        assert ended.wait(30)
        assert sorted(ran) == list(range(count))
        assert batch.done.is_set()
    finally:
        transfer.close()


def test_who_finishes_a_batch_helps(transfer):
    """With the background thread stuck in one task, the waiting thread does all the others."""
    stuck, release = threading.Event(), threading.Event()
    ran_in = []

    def blocking():
        stuck.set()
        release.wait(30)

    batch = transfer.submit([blocking] + [lambda: ran_in.append(threading.current_thread())] * 5)
    assert stuck.wait(30)
    while batch.work():
        pass
    assert ran_in == [threading.current_thread()] * 5
    assert not batch.done.is_set()
    release.set()
    batch.finish()
    assert batch.done.is_set()


def test_what_a_task_raises_is_raised_by_finish_and_the_others_still_run(transfer):
    ran = []

    def broken():
        raise ZeroDivisionError("in a task")

    batch = transfer.submit([broken, lambda: ran.append(1), lambda: ran.append(2)])
    with pytest.raises(ZeroDivisionError, match="in a task"):
        batch.finish()
    assert sorted(ran) == [1, 2]
    transfer.run([lambda: ran.append(3)])  # the thread survived
    assert 3 in ran


def test_done_is_told_once_by_whoever_ends_last(transfer):
    told = []
    ended = threading.Event()

    def on_done():
        told.append(1)
        ended.set()

    transfer.submit([int] * 20, on_done=on_done).finish()
    assert ended.wait(30)
    transfer.submit([], on_done=on_done)
    assert told == [1, 1]


def test_an_empty_batch_is_done_at_once():
    batch = TaskBatch(tasks=deque())
    assert batch.done.is_set()
    batch.finish()


def test_the_thread_starts_with_the_first_batch_and_ends_with_close():
    transfer = TaskThread()
    assert transfer._thread is None
    transfer.run([int])
    thread = transfer._thread
    assert thread.is_alive()
    assert thread.daemon
    assert not transfer.closed
    transfer.close()
    assert transfer.closed
    assert not thread.is_alive()


def test_close_without_a_batch_and_twice():
    transfer = TaskThread()
    transfer.close()
    transfer.close()
    assert transfer.closed


def test_the_thread_ends_when_its_owner_is_dropped():
    transfer = TaskThread()
    transfer.run([int])
    thread = transfer._thread
    del transfer
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_what_was_submitted_before_close_is_done_by_then():
    transfer = TaskThread()
    ran = []
    batch = transfer.submit([lambda: ran.append(1)] * 100)
    transfer.close()
    assert len(ran) == 100
    assert batch.done.is_set()
