"""A plain blocking writer: what every other way of saving has to equal."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from gockpt.core.arena_layout import lay_out
from gockpt.staging.arena import Arena
from gockpt.state import rng_state
from gockpt.state.collect import collect
from gockpt.state.state_document import build_document, capture_extras
from gockpt.state.tensors import spec_of, to_host
from gockpt.storage.local.filesystem import Filesystem
from gockpt.storage.local.store import Store
from gockpt.tensor_memory import as_bytes


class Quick(Filesystem):
    """The file system without waiting for the disk: here, nobody loses power."""

    def fsync(self, fd):
        """Leave it in the page cache."""

    def syncfs(self, fd):
        """Leave it in the page cache."""


def blocking_save(path, model, optimizer=None, *, step=1, optimizer_steps=0, extra=None, change=None):
    """Save everything now. ``change`` may alter the state document before it is written."""
    live = collect(model, optimizer)
    document, added = build_document(
        live,
        step=step,
        optimizer_steps=optimizer_steps,
        extra=capture_extras(extra),
        rng=rng_state.capture(),
    )
    if change is not None:
        change(document)
    tensors = {**live.entries, **added}
    layout = lay_out(spec_of(name, tensor) for name, tensor in tensors.items())
    arena = Arena(layout.nbytes)
    with Store(path, fs=Quick()) as store:
        transaction = store.begin(step, layout.arrays, state=document, attributes={}, exact=True)
        for array in layout.arrays:
            data = as_bytes(to_host(tensors[array.spec.name]))
            done = 0
            for slot in array.slots:
                place = arena.view(slot.offset, slot.capacity)
                place[: slot.nbytes] = data[done : done + slot.nbytes]
                done += slot.nbytes
                transaction.write_chunk(array, slot, place.data)
        return transaction.commit()


@pytest.fixture(scope="session")
def save():
    return blocking_save


@pytest.fixture(autouse=True)
def _generators():
    """Give each test the same random numbers, and leave the generators as they were."""
    before = rng_state.capture()
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    yield
    rng_state.restore(before)


@pytest.fixture(scope="session")
def same():
    """Compare nested values bit for bit, types included."""

    def compare(a, b, where="value"):
        assert type(a) is type(b), f"{where}: {type(a)} and {type(b)}"
        if isinstance(a, torch.Tensor):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), where
            assert torch.equal(
                to_host(a).reshape(-1).view(torch.uint8), to_host(b).reshape(-1).view(torch.uint8)
            ), where
        elif isinstance(a, dict):
            assert list(a) == list(b), where
            for key in a:
                compare(a[key], b[key], f"{where}[{key!r}]")
        elif isinstance(a, (list, tuple)):
            assert len(a) == len(b), where
            for index, (one, other) in enumerate(zip(a, b, strict=True)):
                compare(one, other, f"{where}[{index}]")
        else:
            assert a == b or repr(a) == repr(b) == "nan", f"{where}: {a!r} and {b!r}"

    return compare
