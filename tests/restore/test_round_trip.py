"""Any shape, dtype and memory order: the bits that were saved are the bits that come back."""

from __future__ import annotations

import tempfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gockpt
from gockpt.state.tensors import DTYPE_OF, to_host
from gockpt.tensor_memory import as_bytes

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
ORDERS = st.sampled_from(["contiguous", "transposed", "strided", "offset"])


def noise(shape, dtype, seed):
    """Return a tensor of any bits: NaN payloads, negative zeros and subnormals included."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.empty(shape, dtype=dtype)
    high = 2 if dtype == torch.bool else 256
    if tensor.numel():
        raw = as_bytes(tensor)
        raw[:] = torch.randint(high, raw.shape, generator=generator, dtype=torch.uint8).numpy()
    return tensor


def placed(tensor, order):
    """Return the same values in another memory order."""
    if order == "transposed":
        backwards = list(reversed(range(tensor.dim())))
        return tensor.permute(backwards).contiguous().permute(backwards)
    if order == "strided" and tensor.dim():
        wide = torch.zeros((*tensor.shape[:-1], tensor.shape[-1] * 2), dtype=tensor.dtype)[..., ::2]
        return wide.copy_(tensor)
    if order == "offset":
        flat = torch.zeros(tensor.numel() + 3, dtype=tensor.dtype)[3:]
        return flat.view(tensor.shape).copy_(tensor)
    return tensor


def bits(tensor):
    return as_bytes(to_host(tensor)).tobytes()


@given(
    tensors=st.lists(
        st.tuples(SHAPES, st.sampled_from(sorted(DTYPE_OF)), ORDERS, ORDERS, st.integers(0, 2**31)),
        min_size=1,
        max_size=5,
    )
)
def test_a_mapping_of_tensors_comes_back_bit_for_bit(save, tensors):
    saved, live = {}, {}
    for index, (shape, dtype, order, live_order, seed) in enumerate(tensors):
        values = noise(shape, DTYPE_OF[dtype], seed)
        saved[f"t/{index}"] = placed(values, order)
        live[f"t/{index}"] = placed(torch.zeros(shape, dtype=DTYPE_OF[dtype]), live_order)
    before = {name: (tensor.data_ptr(), tensor.stride()) for name, tensor in live.items()}
    with tempfile.TemporaryDirectory() as path:
        save(path, saved)
        gockpt.load(path, live)
        with gockpt.open(path) as checkpoint:
            assert list(checkpoint) == [f"model/{name}" for name in saved]
            for name, tensor in saved.items():
                lazy = checkpoint[f"model/{name}"]
                assert (lazy.shape, lazy.dtype) == (tensor.shape, tensor.dtype)
                assert bits(lazy[...]) == bits(tensor)
    for name, tensor in saved.items():
        assert bits(live[name]) == bits(tensor)
    assert before == {name: (tensor.data_ptr(), tensor.stride()) for name, tensor in live.items()}


def test_what_stands_between_the_elements_is_not_touched(save):
    save("ckpts", {"w": torch.ones(2, 3)})
    whole = torch.full((2, 6), 7.0)
    gockpt.load("ckpts", {"w": whole[:, ::2]})
    assert torch.equal(whole, torch.tensor([1.0, 7.0]).repeat(2, 3))


@pytest.mark.parametrize("cut", ["whole", "chunks"])
def test_large_tensors_are_cut_into_chunks_and_come_back(save, cut, monkeypatch):
    import gockpt.core.arena_layout

    if cut == "chunks":
        monkeypatch.setattr(gockpt.core.arena_layout, "WHOLE_LIMIT", 1000)
        monkeypatch.setattr(gockpt.core.arena_layout, "CHUNK_TARGET", 1000)
    values = torch.randn(37, 33)
    save("ckpts", {"w": values})
    live = {"w": torch.zeros(37, 33)}
    gockpt.load("ckpts", live)
    assert torch.equal(live["w"], values)


def test_a_list_of_modules_and_a_nested_model(save, same):
    def build():
        return [nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3), nn.ModuleDict({"act": nn.PReLU()}))]

    models, others = build(), build()
    with torch.no_grad():
        models[1][0].num_batches_tracked.fill_(9)
    save("ckpts", models)
    gockpt.load("ckpts", others)
    for one, other in zip(models, others, strict=True):
        same(dict(other.state_dict()), dict(one.state_dict()))
    assert "model/1.0.running_mean" in gockpt.open("ckpts")


def test_a_model_alone_leaves_the_optimizer_unread(save):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save("ckpts", model, optimizer, step=8, optimizer_steps=5)
    other = nn.Linear(2, 2)
    restored = gockpt.load("ckpts", other)
    assert torch.equal(other.weight, model.weight)
    assert (restored.step, restored.optimizer_steps) == (8, 5)
    assert restored.metadata.optimizers == ("torch.optim.adamw.AdamW",)


def test_a_checkpoint_of_a_model_without_optimizer_and_of_nothing_but_extras(save):
    save("a", nn.Linear(2, 2))
    assert gockpt.open("a").metadata.optimizers == ()
    save("b", None, extra={"x": 3})
    assert gockpt.load("b", None).extra == {"x": 3}
    assert len(gockpt.open("b")) == 0
