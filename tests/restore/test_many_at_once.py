"""A load reads many tensors at once; memory that several of them share ends up as if it did not."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gockpt
from gockpt import ChunkCorrupt
from gockpt.loading.fill import Filler, _bytes_in_place
from gockpt.loading.fit_model import Fill
from gockpt.loading.load_plan import Create
from gockpt.storage.read.checkpoint import StoredCheckpoint
from gockpt.storage.read.find import open_checkpoint
from gockpt.tensor_memory import as_bytes


@pytest.fixture
def calls(monkeypatch):
    """The number of arrays of each call that reads."""
    counts = []
    real = StoredCheckpoint.read_many

    def read_many(self, wanted, **options):
        counts.append(len(wanted))
        return real(self, wanted, **options)

    monkeypatch.setattr(StoredCheckpoint, "read_many", read_many)
    return counts


def build(seed, layers=40):
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(layers)))
    return model, torch.optim.AdamW(model.parameters())


def stepped(seed, layers=40):
    model, optimizer = build(seed, layers)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("fresh", [True, False])
def test_one_call_reads_model_and_optimizer(save, same, calls, fresh):
    model, optimizer = stepped(1)
    save("ckpts", model, optimizer)
    other, loaded = build(2) if fresh else stepped(2)
    gockpt.load("ckpts", other, loaded, rng=False)
    assert max(calls) == sum(calls) == 80 * 4  # a parameter, its two moments and its step
    same(dict(other.state_dict()), dict(model.state_dict()))
    same(loaded.state_dict(), optimizer.state_dict())


def test_a_load_leaves_nothing_that_only_the_garbage_collector_frees(save):
    model, optimizer = stepped(1)
    save("ckpts", model, optimizer)
    gockpt.load("ckpts", model, optimizer)
    gc.collect()
    gc.disable()
    try:
        # Other tests of the process may hold some.
        before = [each for each in gc.get_objects() if type(each) in (StoredCheckpoint, Fill)]
        gockpt.load("ckpts", model, optimizer)
        after = [each for each in gc.get_objects() if type(each) in (StoredCheckpoint, Fill)]
    finally:
        gc.enable()
    assert len(after) == len(before)


def test_what_is_not_contiguous_is_loaded_beside(save, calls):
    values = {"a": torch.randn(6, 4), "b": torch.randn(3), "c": torch.randn(2, 2, 4, 4)}
    save("ckpts", values)
    targets = {
        "a": torch.zeros(4, 6).T,
        "b": torch.zeros(3),
        "c": torch.zeros(2, 2, 4, 4).to(memory_format=torch.channels_last),
    }
    gockpt.load("ckpts", targets, rng=False)
    assert calls == [1, 1, 1]
    assert all(torch.equal(targets[name], values[name]) for name in values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
def test_bytes_in_place_are_the_tensor_s_memory(dtype):
    tensor = torch.zeros(3, 1, 4, dtype=dtype)
    for whole in (tensor, tensor[1:], nn.Parameter(tensor) if dtype.is_floating_point else tensor):
        data = _bytes_in_place(whole)
        data[:] = 1
        assert np.array_equal(data, as_bytes(whole))
        assert data.ctypes.data == whole.data_ptr()
    empty, freed = torch.empty(0, 4, dtype=dtype), torch.zeros(5, dtype=dtype)
    freed.untyped_storage().resize_(0)
    for other in (empty, freed, tensor.transpose(0, 2), tensor.expand(2, 3, 1, 4), tensor.to("meta")):
        assert _bytes_in_place(other) is None


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2)])
def test_shared_memory_gets_the_last_values(save, order):
    values = {"x": torch.arange(8.0), "y": torch.arange(8.0) + 100, "z": torch.arange(8.0) + 200}
    save("ckpts", values)
    names = [list(values)[at] for at in order]
    expected, memory = torch.zeros(16), torch.zeros(16)
    # x and z touch only y, which overlaps both.
    places = {"x": slice(0, 8), "y": slice(4, 12), "z": slice(8, 16)}
    for name in names:
        expected[places[name]] = values[name]
    with open_checkpoint("ckpts") as stored:
        fills = [Fill(f"model/{name}", memory[places[name]], name) for name in names]
        filler = Filler(stored)
        filler.fill_many(fills)
        for fill in fills:
            filler.fill(fill)
        assert torch.equal(memory, expected)
        assert sorted(filler.overwritten) == ["x", "y", "z"]


def test_a_strided_view_between_waits_for_its_turn(save):
    values = {"x": torch.arange(4.0), "y": torch.arange(8.0) + 100}
    save("ckpts", values)
    memory = torch.zeros(8)
    with open_checkpoint("ckpts") as stored:
        fills = [Fill("model/x", memory[::2], "x"), Fill("model/y", memory, "y")]
        filler = Filler(stored)
        filler.fill_many(fills)
        for fill in fills:
            filler.fill(fill)
    assert torch.equal(memory, values["y"])


def test_a_new_tensor_still_shares_memory_with_what_it_was_saved_with(save):
    save("ckpts", {"x": torch.arange(4.0)})
    memory = torch.zeros(4)
    with open_checkpoint("ckpts") as stored:
        fill = Fill("model/x", memory, "x")
        creates = [Create("model/x", memory, torch.device("cpu"), name) for name in ("one", "two")]
        for parts in ([fill, *creates], creates):
            filler = Filler(stored)
            filler.fill_many(parts)
            if fill in parts:
                filler.fill(fill)
            one, two = (filler.create(create) for create in creates)
            assert torch.equal(one, torch.arange(4.0))
            assert one.data_ptr() == two.data_ptr()
            assert (one.data_ptr() == memory.data_ptr()) is (fill in parts)


def test_autograd_notices(save):
    model, _ = build(1)
    save("ckpts", model)
    before = [param._version for param in model.parameters()]
    gockpt.load("ckpts", model)
    assert [param._version for param in model.parameters()] == [version + 1 for version in before]


@pytest.mark.parametrize("gone", [False, True])
def test_with_many_tensors_too_an_error_names_its_own_and_all_that_were_begun(save, gone):
    model, optimizer = stepped(1)
    save("ckpts", model, optimizer)
    path = Path("ckpts/step-0000000001/optimizer/20.weight/exp_avg/c.0.0")
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    if gone:
        os.unlink(path)
    other, loaded = stepped(2)
    live = {f"model/{name}": tensor for name, tensor in other.named_parameters()}
    before = {name: tensor.detach().clone() for name, tensor in live.items()}
    with pytest.raises(ChunkCorrupt, match=r"optimizer/20\.weight/exp_avg: ") as caught:
        gockpt.load("ckpts", other, loaded)
    (note,) = caught.value.__notes__
    count = int(note.split()[0])
    assert 80 < count <= 80 * 4  # how many others had been begun by then is chance
    changed = [name for name in live if not np.array_equal(before[name], live[name].detach())]
    assert len(changed) == 80


def test_the_report_holds_every_tensor_that_changed(save):
    values = {f"t{n}": torch.randn(50) for n in range(100)}
    save("ckpts", values)
    os.truncate("ckpts/step-0000000001/model/t60/c.0", 3)
    targets = {name: torch.zeros(50) for name in values}
    with open_checkpoint("ckpts") as stored:
        filler = Filler(stored)
        with pytest.raises(ChunkCorrupt, match="model/t60"):
            filler.fill_many([Fill(f"model/{name}", target, name) for name, target in targets.items()])
    assert {name for name, target in targets.items() if target.any()} <= set(filler.overwritten)
    assert len(filler.overwritten) == len(set(filler.overwritten)) < 100
    assert "t60" in filler.overwritten
