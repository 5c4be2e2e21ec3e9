"""Live memory is overwritten where it is: objects, aliases and views stay what they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gockpt
from gockpt import StateMismatch


class Tied(nn.Module):
    def __init__(self, *, tie=True):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        if tie:
            self.head.weight = self.embed.weight


def test_parameters_stay_the_same_objects(save):
    model = nn.Linear(3, 2)
    save("ckpts", model)
    wanted = model.weight.detach().clone()
    weight, place = model.weight, model.weight.data_ptr()
    with torch.no_grad():
        model.weight.zero_()
    gockpt.load("ckpts", model)
    assert model.weight is weight
    assert weight.data_ptr() == place
    assert torch.equal(weight, wanted)
    assert weight.requires_grad


def test_tied_weights_are_stored_once_and_come_back_tied(save):
    model, other = Tied(), Tied()
    save("ckpts", model)
    gockpt.load("ckpts", other)
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.head.weight, model.embed.weight)
    with gockpt.open("ckpts") as checkpoint:
        assert set(checkpoint) == {"model/embed.weight", "model/head.weight"}
        assert torch.equal(checkpoint["model/head.weight"][...], model.embed.weight)
        assert checkpoint["model/head.weight"].name == "model/head.weight"


def test_tied_weights_fill_separate_ones(save):
    model, other = Tied(), Tied(tie=False)
    save("ckpts", model)
    gockpt.load("ckpts", other)
    assert torch.equal(other.head.weight, model.embed.weight)
    assert torch.equal(other.embed.weight, model.embed.weight)
    assert other.head.weight is not other.embed.weight


def test_separate_weights_do_not_go_into_tied_ones(save):
    model, other = Tied(tie=False), Tied()
    save("ckpts", model)
    before = other.embed.weight.detach().clone()
    with pytest.raises(StateMismatch, match=r"model/embed.weight and model/head.weight: one live tensor"):
        gockpt.load("ckpts", other)
    restored = gockpt.load("ckpts", other, strict=False)
    assert len(restored.mismatched) == 1
    assert torch.equal(other.embed.weight, before)


@pytest.mark.parametrize("first", ["embed", "head"])
def test_the_optimizer_state_of_tied_weights_is_found_under_any_of_their_names(save, first):
    """Which of two names comes first depends on the order in which modules were registered."""

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            for name in [first, "head" if first == "embed" else "embed"]:
                self.add_module(name, nn.Embedding(5, 3) if name == "embed" else nn.Linear(3, 5, bias=False))
            self.head.weight = self.embed.weight

    model, other = Tied(), Other()
    optimizer, loaded = torch.optim.AdamW(model.parameters()), torch.optim.AdamW(other.parameters())
    model.embed.weight.grad = torch.randn(5, 3)
    optimizer.step()
    save("ckpts", model, optimizer)
    gockpt.load("ckpts", other, loaded)
    assert torch.equal(
        loaded.state[other.embed.weight]["exp_avg"], optimizer.state[model.embed.weight]["exp_avg"]
    )


def test_an_expanded_buffer_is_written_through_its_few_elements(save):
    class Model(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.register_buffer("scale", torch.tensor([[value], [value + 1]]).expand(2, 3))

    save("ckpts", Model(4.0))
    model = Model(0.0)
    gockpt.load("ckpts", model)
    assert torch.equal(model.scale, torch.tensor([[4.0] * 3, [5.0] * 3]))
    assert model.scale.stride() == (1, 0)


def test_an_expanded_buffer_can_not_take_different_values(save):
    save("ckpts", {"w": torch.randn(2), "scale": torch.tensor([1.0, 2.0])})
    live = {"w": torch.zeros(2), "scale": torch.zeros(1).expand(2)}
    with pytest.raises(StateMismatch, match=r"model/scale: its elements share memory.*\.clone\(\)"):
        gockpt.load("ckpts", live)
    assert torch.equal(live["w"], torch.zeros(2)), "found out before anything was changed"


def test_autograd_notices_that_a_tensor_was_overwritten(save):
    model = nn.Linear(2, 2)
    save("ckpts", model)
    loss = model(torch.ones(1, 2, requires_grad=True)).square().sum()
    gockpt.load("ckpts", model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tensors_made_in_inference_mode_are_loaded_too(save):
    with torch.inference_mode():
        live = {"w": torch.zeros(2, 3), "t": torch.zeros(3, 2).t()}
    save("ckpts", {"w": torch.ones(2, 3), "t": torch.ones(2, 3)})
    gockpt.load("ckpts", live)
    assert live["w"].sum() == live["t"].sum() == 6


def test_a_frozen_and_a_trained_part(save):
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    for one in (model, other):
        one.bias.requires_grad_(False)
    save("ckpts", model, torch.optim.SGD([model.weight], lr=0.1))
    gockpt.load("ckpts", other, torch.optim.SGD([other.weight], lr=0.2))
    assert torch.equal(other.bias, model.bias)
    assert not other.bias.requires_grad


class Counting(nn.Module):
    """A module with state that is no tensor."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("wide", torch.zeros(1).expand(3))
        self.calls = {"train": 0}
        self.scale = torch.zeros(2)

    def get_extra_state(self):
        return {"calls": self.calls, "scale": self.scale * 1}

    def set_extra_state(self, state):
        self.calls, self.scale = state["calls"], state["scale"]


def test_extra_state_of_modules_goes_through_the_module(save):
    model = nn.Sequential(Counting(), Counting())
    model[1].calls = {"train": 3, 5: (1, 2)}
    model[1].scale = torch.tensor([1.0, 2.0])
    save("ckpts", model)
    other = nn.Sequential(Counting(), Counting())
    gockpt.load("ckpts", other)
    assert other[1].calls == {"train": 3, 5: (1, 2)}
    assert torch.equal(other[1].scale, model[1].scale)
    assert other[0].calls == {"train": 0}
    assert torch.equal(gockpt.open("ckpts")["model/1._extra_state/scale"][...], model[1].scale)


class TensorExtra(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def get_extra_state(self):
        return torch.tensor([self.value])

    def set_extra_state(self, state):
        self.value = state.item()


def test_extra_state_that_is_a_tensor_has_the_natural_name(save):
    save("ckpts", TensorExtra(7))
    other = TensorExtra(0)
    gockpt.load("ckpts", other)
    assert other.value == 7
    assert gockpt.open("ckpts")["model/_extra_state"][...].tolist() == [7]


def test_missing_extra_state_is_missing(save):
    model = nn.Sequential(nn.Linear(2, 2))
    save("ckpts", model)
    model.append(TensorExtra(1))
    with pytest.raises(StateMismatch) as caught:
        gockpt.load("ckpts", model)
    assert caught.value.missing == ("model/1._extra_state",)
    assert gockpt.load("ckpts", model, strict=False).missing == ("model/1._extra_state",)
    assert model[1].value == 1


def test_a_view_handed_out_by_a_hook_is_live_memory(save):
    """Such as a state dict that names the parts of a fused projection."""

    def split(module, state, prefix, _):
        qkv = state.pop(f"{prefix}qkv")
        state[f"{prefix}q"], state[f"{prefix}kv"] = qkv[:2], qkv[2:]

    def join(module, state, prefix, *_):
        if joins:
            state[f"{prefix}qkv"] = torch.cat([state.pop(f"{prefix}q"), state.pop(f"{prefix}kv")])

    joins = True

    def build():
        module = nn.Module()
        module.qkv = nn.Parameter(torch.randn(6, 2))
        module._register_state_dict_hook(split)
        module.register_load_state_dict_pre_hook(join)
        return module, torch.optim.AdamW(module.parameters())

    model, optimizer = build()
    model.qkv.grad = torch.randn(6, 2)
    optimizer.step()
    save("ckpts", model, optimizer)
    other, loaded = build()
    gockpt.load("ckpts", other, loaded)
    assert torch.equal(other.qkv, model.qkv)
    assert torch.equal(loaded.state[other.qkv]["exp_avg"], optimizer.state[model.qkv]["exp_avg"])
    assert {"model/q", "model/kv", "optimizer/qkv/param"} <= set(gockpt.open("ckpts"))
    joins = False
    with pytest.raises(StateMismatch) as caught:
        gockpt.load("ckpts", other, loaded)  # as torch refuses it
    assert (caught.value.missing, caught.value.unexpected) == (("model/qkv",), ("model/q", "model/kv"))


def test_a_tensor_that_has_become_extra_state_is_taken_over(save):
    save("ckpts", {"_extra_state": torch.tensor([7])})
    model = TensorExtra(0)
    gockpt.load("ckpts", model)
    assert model.value == 7


def test_extra_state_that_has_become_a_tensor_is_taken_over(save):
    save("ckpts", TensorExtra(7))
    live = {"_extra_state": torch.tensor([0])}
    gockpt.load("ckpts", live)
    assert live["_extra_state"].item() == 7
