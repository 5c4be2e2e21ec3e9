"""Strides of optimizer state come back, so that a resumed run rounds as the saved one would have."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gockpt
from gockpt import ManifestCorrupt
from gockpt.state.strides import allocate, has_strides, row_major, strides_of


def transposed(param):
    return torch.zeros(param.shape[1], param.shape[0]).t()


def padded(param):
    return torch.zeros(param.shape[0], param.shape[1] + 5)[:, : param.shape[1]]


def column_of_a_larger_one(param):
    return torch.zeros(*param.shape, 64)[..., 3]


class Normed(torch.optim.Optimizer):
    """A state whose norm, and so all that follows, depends on the order of its memory."""

    def __init__(self, params, make):
        super().__init__(list(params), {"lr": 1e-2})
        self.make = make

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["buf"] = self.make(param)
                state["buf"].mul_(0.9).add_(param.grad)
                param.sub_(group["lr"] * state["buf"] / state["buf"].norm())


class Soap(torch.optim.Optimizer):
    """Eigenbases from QR, in lists, as Shampoo and SOAP keep them."""

    def __init__(self, params):
        super().__init__(list(params), {"lr": 1e-2})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["GG"] = [torch.eye(size) for size in param.shape]
                    state["Q"] = [torch.linalg.qr(torch.eye(size))[0] for size in param.shape]
                for side, gradient in enumerate((param.grad, param.grad.t())):
                    state["GG"][side].lerp_(gradient @ gradient.t(), 0.1)
                    state["Q"][side] = torch.linalg.qr(state["GG"][side] @ state["Q"][side])[0]
                turned = state["Q"][0].t() @ param.grad @ state["Q"][1]
                state["turned"] = turned.t().contiguous().t()
                param.sub_(state["Q"][0] @ turned.sign() @ state["Q"][1].t(), alpha=group["lr"])


MAKERS = {
    "transposed": lambda params: Normed(params, transposed),
    "padded": lambda params: Normed(params, padded),
    "qr": Soap,
}


def build(make):
    torch.manual_seed(0)
    model = nn.Linear(57, 31, bias=False)
    return model, make(model.parameters())


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def geometry(value):
    if isinstance(value, torch.Tensor):
        return value.stride()
    if isinstance(value, dict):
        return [geometry(item) for item in value.values()]
    return [geometry(item) for item in value] if isinstance(value, list) else None


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_the_resumed_run_takes_the_same_steps(make, used, save, same):
    model, optimizer = build(make)
    train(model, optimizer, range(3))
    save("ckpts", model, optimizer)
    other, loaded = build(make)
    if used:
        train(other, loaded, range(9, 11))
    gockpt.load("ckpts", other, loaded)
    assert geometry(loaded.state_dict()["state"]) == geometry(optimizer.state_dict()["state"])
    train(model, optimizer, range(3, 8))
    train(other, loaded, range(3, 8))
    same(other.weight, model.weight)
    same(loaded.state_dict(), optimizer.state_dict())


def test_a_live_state_in_another_order_is_replaced_and_one_in_the_same_order_filled(save, same):
    model, optimizer = build(MAKERS["transposed"])
    train(model, optimizer, range(2))
    save("ckpts", model, optimizer)
    other, loaded = build(lambda params: Normed(params, torch.zeros_like))
    train(other, loaded, range(1))
    gockpt.load("ckpts", other, loaded)
    held = loaded.state[other.weight]["buf"]
    assert held.stride() == optimizer.state[model.weight]["buf"].stride()
    train(other, loaded, range(1))
    gockpt.load("ckpts", other, loaded)
    assert loaded.state[other.weight]["buf"] is held
    same(held, optimizer.state[model.weight]["buf"])


def test_windows_of_several_steps_keep_them_too(tmp_path, same):
    model, optimizer = build(MAKERS["transposed"])
    options = gockpt.Options(window=3, when_busy="wait")
    for step in range(1, 7):
        train(model, optimizer, [step])
        gockpt.save_overlapped(model, optimizer, tmp_path / "c", step=step, every=6, options=options)
    gockpt.wait()
    kept = copy.deepcopy(optimizer.state_dict())
    other, loaded = build(MAKERS["transposed"])
    gockpt.load(tmp_path / "c", other, loaded)
    same(loaded.state_dict(), kept)
    assert geometry(loaded.state_dict()["state"]) == geometry(kept["state"])


def test_an_expanded_state_shares_its_memory_again(save, same):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["scale"] = torch.tensor([[1.5], [-2.0]]).expand(2, 3)
    optimizer.state[model.bias]["deep"] = [torch.ones(1).expand(4)]
    save("ckpts", model, optimizer)
    for _ in range(2):  # created, then filled
        other = nn.Linear(3, 2)
        loaded = torch.optim.SGD(other.parameters(), lr=0.1)
        gockpt.load("ckpts", other, loaded)
        gockpt.load("ckpts", other, loaded)
        same(loaded.state_dict(), optimizer.state_dict())
        assert loaded.state[other.weight]["scale"].stride() == (1, 0)
        assert loaded.state[other.bias]["deep"][0].stride() == (0,)


def test_wide_gaps_are_closed_and_the_order_stays(save, same):
    model, optimizer = build(lambda params: Normed(params, column_of_a_larger_one))
    train(model, optimizer, range(1))
    save("ckpts", model, optimizer)
    other, loaded = build(lambda params: Normed(params, column_of_a_larger_one))
    gockpt.load("ckpts", other, loaded)
    same(loaded.state_dict(), optimizer.state_dict())
    assert loaded.state[other.weight]["buf"].is_contiguous()


@pytest.mark.parametrize("here", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("there", [torch.contiguous_format, torch.channels_last])
def test_a_state_that_lay_as_its_parameter_did_does_so_again(here, there, save, same):
    def convolution(order):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 5, 3).to(memory_format=order)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        model.weight.grad = torch.randn(5, 3, 3, 3).to(memory_format=order)
        optimizer.step()
        return model, optimizer

    model, optimizer = convolution(there)
    save("ckpts", model, optimizer)
    other, loaded = convolution(here)
    loaded.state.clear()
    gockpt.load("ckpts", other, loaded)
    assert other.weight.is_contiguous(memory_format=here)
    assert loaded.state[other.weight]["exp_avg"].is_contiguous(memory_format=here)
    same(loaded.state_dict(), optimizer.state_dict())


def test_strides_that_do_not_fit_are_damage(save):
    model, optimizer = build(MAKERS["qr"])
    train(model, optimizer, range(1))

    def cut(document):
        for strides in document["strides"].values():
            del strides[0]

    save("ckpts", model, optimizer, change=cut)
    with pytest.raises(ManifestCorrupt, match="1 strides"):
        gockpt.load("ckpts", model, optimizer)


def test_terabytes_between_elements_are_not_allocated(save, same):
    model, optimizer = build(MAKERS["qr"])
    train(model, optimizer, range(1))

    def spread(document):
        document["strides"] = {name: [1 << 40, 1] for name in document["strides"]}

    save("ckpts", model, optimizer, change=spread)
    gockpt.load("ckpts", model, optimizer)
    assert optimizer.state[model.weight]["turned"].is_contiguous()


@given(st.data())
def test_new_memory_has_the_strides_and_overlaps_only_where_it_did(data):
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    base = torch.zeros([shape[dim] for dim in order])
    tensor = base.permute([order.index(dim) for dim in range(len(shape))])
    if shape and data.draw(st.booleans()):
        tensor = tensor.narrow(0, 0, 1).expand(shape) if shape[0] else tensor
    made = allocate(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    assert made.shape == tensor.shape
    assert has_strides(made, strides_of(tensor) or row_major(tensor.shape))
