"""The state document: what is no array, and where the arrays are."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn, optim

from gockpt.errors import ManifestCorrupt, UnsupportedState, UsageError
from gockpt.state import rng_state
from gockpt.state.collect import collect
from gockpt.state.saved_document import parse
from gockpt.state.state_document import build_document, capture_extras


def document_of(model, optimizer=None, **given):
    return build_document(collect(model, optimizer), step=given.pop("step", 3), optimizer_steps=2, **given)


def trained():
    model = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))
    optimizer = optim.AdamW(model.parameters(), lr=0.5)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return model, optimizer


def test_the_whole_of_a_small_one():
    model = nn.Linear(1, 1, bias=False)
    optimizer = optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    model.weight.grad = torch.ones(1, 1)
    optimizer.step()
    document, arrays = document_of(model, optimizer, extra={"best": (1, 2.5)})
    assert arrays == {}
    assert document == {
        "version": 2,
        "step": 3,
        "optimizer_steps": 2,
        "exact": True,
        "inexact": {},
        "aliases": {},
        "buffers": [],
        "computed": {},
        "optimizers": [
            {
                "class": "torch.optim.sgd.SGD",
                "groups": [
                    {
                        "params": ["weight"],
                        "options": {
                            "lr": 0.5,
                            "momentum": 0.9,
                            "dampening": 0,
                            "weight_decay": 0,
                            "nesterov": False,
                            "maximize": False,
                            "foreach": None,
                            "differentiable": False,
                            "fused": None,
                        },
                    }
                ],
                "states": {
                    "weight": {"momentum_buffer": {"$tensor": ["optimizer", "weight", "momentum_buffer"]}}
                },
                "outside": {},
                "values": {},
            }
        ],
        "wrappers": [],
        "elsewhere": [],
        "strides": {},
        "extra": {"best": {"$tuple": [1, 2.5]}},
        "rng": None,
        "metadata": {"": 1},
    }


def test_it_is_read_as_it_was_written():
    model, optimizer = trained()
    document, _ = document_of(model, optimizer, extra={"x": 1}, rng=rng_state.capture())
    saved = parse(json.loads(json.dumps(document, allow_nan=False)), where="x")
    assert (saved.step, saved.optimizer_steps, saved.exact) == (3, 2, True)
    assert saved.optimizers[0].groups[0].params == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert set(saved.buffers) == {
        "model/1.running_mean",
        "model/1.running_var",
        "model/1.num_batches_tracked",
    }
    assert saved.extra == {"x": 1}


def test_arrays_come_with_tensors_outside_the_entries_and_are_copies():
    model = nn.Linear(1, 1)
    rate = torch.tensor(0.25)
    optimizer = optim.AdamW(model.parameters(), lr=rate, foreach=False)
    optimizer.state[model.weight] = {"history": [torch.ones(2), {"deep": torch.ones(3)}]}
    optimizer.state["all"] = {"norm": torch.ones(4)}
    tensor = torch.ones(5)
    document, arrays = document_of(model, optimizer, extra={"mine": [tensor]})
    assert list(arrays) == [
        ("optimizer_options", "0", "group0", "lr"),
        ("optimizer", "weight", "history", "0"),
        ("optimizer", "weight", "history", "1", "deep"),
        ("optimizer_options", "0", "values", "all", "norm"),
        ("extra", "mine", "0"),
    ]
    assert document["optimizers"][0]["groups"][0]["options"]["lr"] == {
        "$tensor": ["optimizer_options", "0", "group0", "lr"]
    }
    rate.zero_()
    tensor.zero_()
    assert arrays["optimizer_options", "0", "group0", "lr"] == 0.25
    assert arrays["extra", "mine", "0"].all()


def test_parameters_outside_the_model_and_aliases_are_told():
    outside = torch.zeros(2)
    model = {"a": torch.ones(1)}
    model["b"] = model["a"]
    document, _ = document_of(model, optim.SGD([outside], lr=0.1))
    assert document["optimizers"][0]["outside"] == {"group0.param0": ["optimizer", "group0.param0", "param"]}
    assert document["aliases"] == {"model/b": "model/a"}


def test_a_state_that_is_no_mapping():
    model = nn.Linear(1, 1)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight] = torch.ones(2)
    optimizer.state[model.bias] = 7
    document, arrays = document_of(model, optimizer)
    assert document["optimizers"][0]["states"] == {
        "weight": {"$tensor": ["optimizer", "weight", "state"]},
        "bias": 7,
    }
    assert list(arrays) == [("optimizer", "weight", "state")]


@pytest.mark.parametrize("where", ["option", "state", "extra", "extra_state"])
def test_what_has_no_exact_form_is_named(where):
    model = nn.Linear(1, 1)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    extra = {}
    if where == "option":
        optimizer.param_groups[0]["fn"] = print
        name = r"optimizer_options/0/group0\['fn'\]"
    elif where == "state":
        optimizer.state[model.bias] = {"fn": print}
        name = "optimizer/bias/fn"
    elif where == "extra":
        extra = {"fn": print}
        name = "extra/fn"
    else:
        model._register_state_dict_hook(lambda _module, state, _prefix, _local: state.update(fn=print))
        name = "model/fn"
    with pytest.raises(UnsupportedState, match=f"^{name} is a builtins.builtin_function"):
        document_of(model, optimizer, extra=extra)


def test_two_arrays_of_one_public_name_are_refused():
    a, b = torch.zeros(1), torch.zeros(1)
    optimizer = optim.SGD([a, b], lr=0.1)
    optimizer.state[a] = {"x": [torch.ones(1)]}  # optimizer / a / x / 0
    optimizer.state[b] = {"0": torch.ones(2)}  # optimizer / a/x / 0
    with pytest.raises(UnsupportedState, match="two arrays would have the name 'optimizer/a/x/0'"):
        document_of({"a": a, "a/x": b}, optimizer)


def test_extras_of_every_kind():
    model, scheduler_like = nn.Linear(1, 1), {"plain": 1}

    class Callable:
        def state_dict(self):
            return {"from": "state_dict"}

        def __call__(self):
            raise AssertionError("state_dict comes first")

    captured = capture_extras({"m": model, "f": lambda: 3, "v": scheduler_like, "c": Callable()})
    assert list(captured) == ["m", "f", "v", "c"]
    assert captured["m"].keys() == model.state_dict().keys()
    assert (captured["f"], captured["v"], captured["c"]) == (3, {"plain": 1}, {"from": "state_dict"})
    assert capture_extras(None) == {}


@pytest.mark.parametrize("extra", [[1], "x", {1: 2}, {"": 1}, {"a/b": 1}, {"#a": 1}, {"\ud800": 1}])
def test_extras_need_ordinary_names(extra):
    with pytest.raises(UsageError, match="extra"):
        capture_extras(extra)


def test_what_an_overridden_state_dict_adds_is_kept():
    class Own(optim.SGD):
        def state_dict(self):
            return {**super().state_dict(), "cursor": (1, torch.ones(2))}

    model = nn.Linear(1, 1)
    document, arrays = document_of(model, Own(model.parameters(), lr=0.1))
    name = ["optimizer_options", "0", "state_dict", "cursor", "1"]
    form = document["optimizers"][0]["state_dict"]
    assert form["cursor"] == {"$tuple": [1, {"$tensor": name}]}
    assert form["param_groups"][0]["params"] == [0, 1]
    assert list(arrays) == [tuple(name)]


@pytest.mark.parametrize(
    "change",
    [
        {"version": None},
        {"step": 1.0},
        {"optimizer_steps": "1"},
        {"exact": 1},
        {"aliases": []},
        {"aliases": {"a": 1}},
        {"buffers": [1]},
        {"computed": None},
        {"optimizers": {}},
        {"optimizers": [1]},
        {"optimizers": [{"groups": [1]}]},
        {"optimizers": [{"groups": [{"params": [1], "options": {}}]}]},
        {"extra": []},
        {"inexact": 1},
        {"metadata": None},
        {"keys": {}},
        {"keys": [1]},
    ],
    ids=str,
)
def test_another_form_is_refused(change):
    document, _ = document_of(*trained())
    with pytest.raises(ManifestCorrupt, match="^here is not a valid state document"):
        parse({**document, **change}, where="here")


LATER = {"strides", "metadata", "wrappers", "elsewhere"}
"""Keys that version 1 lacks."""


def test_every_key_of_version_1_is_needed_and_none_that_came_later():
    document, _ = document_of(*trained())
    assert document.keys() >= LATER
    assert parse({key: value for key, value in document.items() if key not in LATER}, where="x")
    for key in document.keys() - LATER:
        with pytest.raises(ManifestCorrupt, match="here"):
            parse({k: v for k, v in document.items() if k != key}, where="here")
    for key in document["optimizers"][0]:
        (optimizer,) = document["optimizers"]
        broken = {k: v for k, v in optimizer.items() if k != key}
        with pytest.raises(ManifestCorrupt, match=key):
            parse({**document, "optimizers": [broken]}, where="here")


def test_a_later_version_asks_for_an_upgrade():
    with pytest.raises(ManifestCorrupt, match="version 3 of the format, this gockpt reads 2: upgrade"):
        parse({"version": 3}, where="here")
