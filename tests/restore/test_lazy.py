"""Slices of stored tensors: the same as of live ones, reading no more than the box around them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gockpt
from gockpt import TensorNotFound, UsageError
from gockpt.loading.lazy_tensor import select


def indices(shape):
    """Draw what torch itself would accept for a tensor of this shape."""

    def one(n):
        bound = st.none() | st.integers(-n - 2, n + 2)
        slices = st.builds(slice, bound, bound, st.none() | st.integers(1, 3))
        return slices | st.integers(-n, n - 1) if n else slices

    def assembled(parts):
        kept, dots, new = parts
        items = list(kept)
        if dots < len(items):
            items[dots:] = [Ellipsis]
        if new <= len(items):
            items.insert(new, None)
        return tuple(items)

    return st.tuples(st.tuples(*map(one, shape)), st.integers(0, 4), st.integers(0, 6)).map(assembled)


@given(data=st.data(), shape=st.lists(st.integers(0, 6), max_size=4).map(tuple))
def test_select_then_index_equals_indexing(data, shape):
    index = data.draw(indices(shape))
    whole = torch.arange(int(np.prod(shape)), dtype=torch.int64).reshape(shape)
    box, rest = select(shape, index)
    part = whole[tuple(slice(at, at + n) for at, n in zip(box.start, box.shape, strict=True))]
    assert torch.equal(part[rest], whole[index])


@given(data=st.data())
def test_a_lazy_tensor_indexes_like_the_live_one(data, save):
    shape = data.draw(st.lists(st.integers(0, 5), max_size=3).map(tuple))
    live = torch.randn(shape)
    with tempfile.TemporaryDirectory() as path:
        save(path, {"w": live})
        with gockpt.open(path) as checkpoint:
            for index in data.draw(st.lists(indices(shape), min_size=1, max_size=5)):
                assert torch.equal(checkpoint["model/w"][index], live[index])


def test_only_the_wanted_blocks_are_read(save):
    save("ckpts", {"w": torch.randn(1024, 1024 * 4)})  # 16 KiB a row, 64 rows a block
    with gockpt.open("ckpts") as checkpoint:
        assert checkpoint._stored.bytes_read == 0
        checkpoint["model/w"][64:128]
        assert checkpoint._stored.bytes_read == 1 << 20
        checkpoint["model/w"][63:65]
        assert checkpoint._stored.bytes_read == 3 << 20


def test_a_strided_slice_holds_only_its_own_memory(save):
    save("ckpts", {"w": torch.arange(1000.0)})
    part = gockpt.open("ckpts")["model/w"][::100]
    assert part.untyped_storage().nbytes() == 40


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (7, IndexError, "out of range for dimension 0 with 4"),
        ((0, -6), IndexError, "out of range for dimension 1 with 5"),
        ((0, 0, 0), IndexError, "3 indices"),
        ((..., ...), IndexError, "2 '...'"),
        (slice(None, None, -1), ValueError, "backwards"),
        (True, TypeError, "not bool"),
        ([0, 1], TypeError, "not list"),
        (torch.tensor(1), TypeError, "not Tensor"),
        (1.0, TypeError, "not float"),
        ("x", TypeError, "not str"),
    ],
)
def test_what_can_not_be_an_index(index, error, message, save):
    save("ckpts", {"w": torch.zeros(4, 5)})
    with pytest.raises(error, match=message):
        gockpt.open("ckpts")["model/w"][index]


def test_numpy_integers_and_arrays(save):
    live = torch.arange(6.0).reshape(2, 3)
    save("ckpts", {"w": live})
    lazy = gockpt.open("ckpts")["model/w"]
    assert torch.equal(lazy[np.int64(1)], live[1])
    assert np.array_equal(np.asarray(lazy), live.numpy())
    assert np.asarray(lazy, dtype="int32").dtype == np.int32
    with pytest.raises(ValueError, match="makes a copy"):
        np.asarray(lazy, copy=False)


def test_a_lazy_tensor_says_what_it_is(save):
    save("ckpts", {"w": torch.zeros(4, 5, dtype=torch.bfloat16), "s": torch.zeros(())})
    checkpoint = gockpt.open("ckpts")
    lazy = checkpoint["model/w"]
    assert repr(lazy) == "LazyTensor('model/w', shape=(4, 5), dtype=torch.bfloat16)"
    assert (lazy.shape, lazy.dtype, lazy.ndim, lazy.nbytes) == (torch.Size([4, 5]), torch.bfloat16, 2, 40)
    assert (lazy.numel(), len(lazy), lazy.name) == (20, 4, "model/w")
    with pytest.raises(TypeError, match="no length"):
        len(checkpoint["model/s"])


def test_names_that_are_not_there(save):
    save("ckpts", {"layers.0.weight": torch.zeros(1), "layers.1.weight": torch.zeros(1)}, step=3)
    checkpoint = gockpt.open("ckpts")
    with pytest.raises(TensorNotFound, match="step 3; did you mean 'model/layers.0.weight'?"):
        checkpoint["layers.0.weight"]
    with pytest.raises(KeyError, match="did you mean 'model/layers.1.weight'"):
        checkpoint["model/layers.1.wieght"]
    with pytest.raises(TensorNotFound, match="it has 2 names, such as 'model/layers.0.weight'"):
        checkpoint["completely/different"]
    with pytest.raises(TensorNotFound, match="names are strings"):
        checkpoint[0]
    assert checkpoint.get("nothing") is None
    assert "nothing" not in checkpoint


def test_a_closed_checkpoint_says_so(save):
    save("ckpts", {"w": torch.zeros(1)})
    with gockpt.open("ckpts") as checkpoint:
        lazy = checkpoint["model/w"]
    with pytest.raises(UsageError, match="closed"):
        lazy[...]


def test_without_verifying_a_slice_costs_its_own_bytes(save):
    values = torch.randn(3000, 768)
    save("ckpts", {"w": values})
    chunk = Path("ckpts/step-0000000001/model/w/c.0.0")
    nbytes = 100 * 768 * 4
    with gockpt.open("ckpts", verify="none") as checkpoint:
        assert torch.equal(checkpoint["model/w"][1000:1100], values[1000:1100])
        assert nbytes <= checkpoint._stored.bytes_read <= nbytes + 2 * 4096
    with gockpt.open("ckpts") as checkpoint:
        assert torch.equal(checkpoint["model/w"][1000:1100], values[1000:1100])
        assert checkpoint._stored.bytes_read >= 1 << 20
    # What it gives up.
    data = bytearray(chunk.read_bytes())
    data[1000 * 768 * 4] ^= 1
    chunk.write_bytes(data)
    with gockpt.open("ckpts", verify="none") as checkpoint:
        assert not torch.equal(checkpoint["model/w"][1000:1100], values[1000:1100])
    with gockpt.open("ckpts") as checkpoint, pytest.raises(gockpt.ChunkCorrupt, match="model/w"):
        checkpoint["model/w"][1000:1100]


@pytest.mark.parametrize("verify", [True, "full", None])
def test_a_way_to_verify_that_is_none_is_refused(save, verify):
    save("ckpts", {"w": torch.ones(1)})
    with pytest.raises(gockpt.UsageError, match='expected "blocks" or "none"'):
        gockpt.open("ckpts", verify=verify)
