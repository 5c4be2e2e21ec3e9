"""What there is to save: live, by name, once, and refused by name where it has no exact form."""

from __future__ import annotations

import copy
import gc
import logging
import weakref

import pytest
import torch
from torch import nn, optim
from torch.testing._internal.two_tensor import TwoTensor

from gockpt import once
from gockpt.errors import UnsupportedState, UsageError
from gockpt.state.collect import collect


@pytest.fixture(autouse=True)
def _said_nothing_yet(monkeypatch):
    monkeypatch.setattr(once, "_logged", set())


def stepped(model, optimizer):
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return optimizer


def test_entries_are_detached_aliases_of_the_live_memory():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = stepped(model, optim.AdamW(model.parameters()))
    live = collect(model, optimizer)
    assert list(live.entries)[:3] == [("model", "0.weight"), ("model", "0.bias"), ("model", "1.weight")]
    assert ("optimizer", "1.bias", "exp_avg_sq") in live.entries
    assert len(live.entries) == 7 + 4 * 3
    for name, tensor in live.entries.items():
        assert not tensor.requires_grad, name
    assert live.entries["model", "0.weight"].data_ptr() == model[0].weight.data_ptr()
    assert live.buffers == {
        ("model", f"1.{name}") for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert live.aliases == {}
    assert live.optimizers == [optimizer]


def test_params_know_their_place():
    model = nn.Linear(2, 3)
    optimizer = stepped(
        model, optim.SGD([{"params": [model.bias]}, {"params": [model.weight]}], lr=0.1, momentum=0.9)
    )
    first, second = collect(model, optimizer).params
    assert (first.fqn, first.owner, first.optimizer_index, first.group_index) == ("bias", "bias", 0, 0)
    assert (second.fqn, second.group_index, second.name) == ("weight", 1, ("model", "weight"))
    assert second.param is model.weight
    assert second.state == {"momentum_buffer": optimizer.state[model.weight]["momentum_buffer"]}
    assert second.state_names == {"momentum_buffer": ("optimizer", "weight", "momentum_buffer")}


def test_collecting_changes_nothing():
    model = nn.Linear(2, 3)
    optimizer = optim.AdamW(model.parameters())
    versions = [param._version for param in model.parameters()]
    live = collect(model, optimizer)
    assert not optimizer.state, "a defaultdict makes entries when it is looked at"
    assert [param._version for param in model.parameters()] == versions
    assert all(entry.raw is None for entry in live.params)


def test_what_was_replaced_is_looked_up_anew():
    model = nn.Linear(2, 3)
    optimizer = stepped(model, optim.AdamW(model.parameters()))
    before = collect(model, optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    after = collect(model, optimizer)
    name = ("optimizer", "weight", "exp_avg")
    assert after.entries[name].data_ptr() == optimizer.state[model.weight]["exp_avg"].data_ptr()
    assert after.entries[name].data_ptr() != before.entries[name].data_ptr()
    assert after.trained[0].groups[0].options is optimizer.param_groups[0]


def test_a_model_in_another_dtype_keeps_its_names():
    """``double()`` gives the same Parameter objects other memory; the state stays as it was."""
    model = nn.Linear(2, 3)
    optimizer = stepped(model, optim.AdamW(model.parameters()))
    model.double()
    live = collect(model, optimizer)
    assert [entry.fqn for entry in live.params] == ["weight", "bias"]
    assert live.entries["model", "weight"].dtype == torch.float64
    assert live.entries["optimizer", "weight", "exp_avg"].dtype == torch.float32


class TestTies:
    def test_tied_parameters_stand_once(self):
        model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
        model["head"].weight = model["embed"].weight
        live = collect(model, optim.AdamW(model.parameters()))
        assert list(live.entries) == [("model", "embed.weight")]
        assert live.aliases == {"model/head.weight": "model/embed.weight"}
        assert [entry.fqn for entry in live.params] == ["embed.weight"]

    def test_the_optimizer_may_hold_either_object(self):
        tensor = torch.randn(2)
        model = {"a": tensor, "b": tensor[:].detach()}
        live = collect(model, optim.SGD([model["b"]], lr=0.1))
        assert live.aliases == {"model/b": "model/a"}
        assert live.params[0].fqn == "a"
        assert live.buffers == set(), "the optimizer owns it"

    def test_views_of_other_geometry_are_no_ties(self):
        tensor = torch.randn(2, 2)
        model = {"a": tensor, "t": tensor.t(), "row": tensor[0], "view": tensor.view(torch.int32)}
        live = collect(model, None)
        assert len(live.entries) == 4
        assert live.aliases == {}

    def test_empty_tensors_are_no_ties(self):
        live = collect({"a": torch.zeros(0), "b": torch.zeros(0)}, None)
        assert len(live.entries) == 2
        assert live.aliases == {}

    def test_an_empty_parameter_has_its_own_entry(self):
        model = {"a": torch.zeros(0), "b": torch.zeros(0)}
        live = collect(model, optim.SGD(model.values(), lr=0.1))
        assert [entry.name for entry in live.params] == [("model", "a"), ("model", "b")]

    def test_states_that_share_memory_are_ties_too(self):
        model = nn.Linear(1, 1)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        shared = torch.ones(3)
        optimizer.state[model.weight] = {"one": shared, "two": shared, "self": model.weight.detach()}
        live = collect(model, optimizer)
        assert live.aliases == {
            "optimizer/weight/two": "optimizer/weight/one",
            "optimizer/weight/self": "model/weight",
        }


class TestSeveralOptimizers:
    def test_disjoint_ones_name_alike(self):
        model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        live = collect(model, [optim.SGD(part.parameters(), lr=0.1) for part in model])
        assert [(entry.owner, entry.optimizer_index) for entry in live.params] == [
            ("0.weight", 0),
            ("0.bias", 0),
            ("1.weight", 1),
            ("1.bias", 1),
        ]

    def test_a_parameter_in_two_has_two_owners_and_one_name(self):
        model = nn.Linear(1, 1)
        one, two, three = (stepped(model, optim.AdamW(model.parameters())) for _ in range(3))
        assert collect(model, [one, two, three]).params[-1].owner == "bias~2"
        live = collect(model, [one, two])
        assert [entry.fqn for entry in live.params] == ["weight", "bias"] * 2
        assert [entry.owner for entry in live.params] == ["weight", "bias", "weight~1", "bias~1"]
        assert ("optimizer", "weight~1", "exp_avg") in live.entries
        assert live.params[2].name == ("model", "weight")


class TestOutside:
    def test_a_parameter_outside_the_model_is_saved_and_said_once(self, caplog):
        model, temperature = nn.Linear(1, 1), nn.Parameter(torch.zeros(3))
        optimizer = optim.SGD([{"params": model.parameters()}, {"params": [temperature]}], lr=0.1)
        with caplog.at_level(logging.WARNING, logger="gockpt"):
            live = collect(model, optimizer)
            collect(model, optimizer)
        assert live.params[2].fqn == "group1.param0"
        assert live.params[2].name == ("optimizer", "group1.param0", "param")
        assert live.entries["optimizer", "group1.param0", "param"].data_ptr() == temperature.data_ptr()
        (record,) = caplog.records
        assert record.message.startswith(
            "the optimizer trains 1 tensors that the model does not hold (group1.param0)"
        )

    def test_its_given_name_is_used(self):
        live = collect(None, optim.SGD([("log_alpha", nn.Parameter(torch.zeros(1)))], lr=0.1))
        assert live.params[0].fqn == "log_alpha"

    def test_names_don_t_collide(self):
        model = {"group0.param1": torch.ones(1)}
        extra, other = torch.zeros(3), torch.zeros(4)
        live = collect(
            model, [optim.SGD([model["group0.param1"], extra], lr=0.1), optim.SGD([other], lr=0.1)]
        )
        assert [entry.fqn for entry in live.params] == [
            "group0.param1",
            "group0.param1~1",
            "optimizer1.group0.param0",
        ]

    def test_a_state_called_param_finds_another_name(self):
        outside = torch.zeros(3)
        optimizer = optim.SGD([outside], lr=0.1)
        optimizer.state[outside] = {"param": torch.ones(2)}
        live = collect(None, optimizer)
        assert live.params[0].state_names == {"param": ("optimizer", "group0.param0", "param~")}

    def test_parameters_that_the_model_has_lost_are_an_error(self):
        model = nn.Linear(2, 2)
        optimizer = optim.AdamW(model.parameters())
        collect(model, optimizer)
        model.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, assign=True)
        lost = r"2 tensors that the model no longer holds.*group0.param0 \(formerly weight\).*assign=True"
        with pytest.raises(UsageError, match=lost):
            collect(model, optimizer)
        with pytest.raises(UsageError, match=lost):
            collect(torch.nn.parallel.DataParallel(model), optimizer)
        model.requires_grad_(False)
        assert len(collect(model, optimizer).params) == 2

    def test_a_replaced_layer_is_an_error(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        optimizer = optim.AdamW(model.parameters())
        collect(model, optimizer)
        model[1] = nn.Linear(2, 2)
        with pytest.raises(UsageError, match="formerly 1.weight"):
            collect(model, optimizer)

    def test_what_may_have_been_lost_before_the_first_look_is_saved_and_said_once(self, caplog):
        model = nn.Linear(2, 2)
        optimizer = optim.AdamW(model.parameters())
        model.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, assign=True)
        assert [entry.name[0] for entry in collect(model, optimizer).params] == ["optimizer", "optimizer"]
        collect(model, optimizer)
        (_, doubt) = [record.message for record in caplog.records]
        assert "trained: group0.param0 (like weight), group0.param1 (like bias). Both are saved" in doubt

    def test_another_model_with_the_same_optimizer_has_lost_nothing(self):
        first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        optimizer = optim.AdamW(first.parameters())
        collect(first, optimizer)
        assert len(collect(second, optimizer).params) == 2

    def test_a_parameter_that_was_replaced_by_one_of_another_dtype_may_have_become_a_master(self):
        model = nn.Linear(2, 2)
        optimizer = optim.AdamW(model.parameters())
        collect(model, optimizer)
        model.weight = nn.Parameter(model.weight.detach().bfloat16())
        assert collect(model, optimizer).params[0].name == ("optimizer", "group0.param0", "param")

    def test_nothing_is_kept_alive(self):
        model = nn.Linear(2, 2)
        optimizer = optim.AdamW(model.parameters())
        collect(model, optimizer)
        held = weakref.ref(model), weakref.ref(model.weight), weakref.ref(optimizer)
        del model, optimizer
        gc.collect()
        assert [reference() for reference in held] == [None] * 3

    def test_frozen_parameters_are_no_sign_of_loss(self):
        model = nn.Linear(2, 2).requires_grad_(False)
        assert len(collect(model, optim.SGD([torch.zeros(2)], lr=0.1)).params) == 1


class TestRefused:
    @pytest.mark.parametrize(
        ("tensor", "why"),
        [
            (torch.ones(2).to_sparse(), "to_dense"),
            (torch.empty(2, device="meta"), "materialise"),
            (torch.ones(2, dtype=torch.int8).view(torch.uint4), "uint4"),
            (torch.ones(2, dtype=torch.complex64).conj(), "resolve_conj"),
            (torch.ones((1,) * 33), "33 dimensions"),
            (nn.UninitializedParameter(), "run one forward"),
        ],
    )
    def test_tensors_without_exact_form(self, tensor, why):
        with pytest.raises(UnsupportedState, match=rf"model/w can't be saved: .*{why}"):
            collect({"w": tensor}, None)

    def test_a_plain_subclass_is_fine(self):
        class Marked(nn.Parameter):
            pass

        assert len(collect({"w": Marked(torch.ones(2))}, None).entries) == 1

    def test_a_state_without_exact_form_is_named(self):
        model = nn.Linear(1, 1)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        optimizer.state[model.weight]["mask"] = torch.ones(2).to_sparse()
        with pytest.raises(UnsupportedState, match="optimizer/weight/mask can't be saved"):
            collect(model, optimizer)


def test_a_tensor_subclass_is_its_inner_tensors():
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.zeros(2, 2)))
    model.register_buffer("seen", TwoTensor(torch.ones(2), torch.zeros(2)))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.bias]["average"] = TwoTensor(torch.ones(2), torch.zeros(2))
    live = collect(model, optimizer)
    held = [("model", "weight"), ("model", "seen"), ("optimizer", "bias", "average")]
    assert list(live.subclassed) == held
    assert set(live.entries) == {*((*name, part) for name in held for part in "ab"), ("model", "bias")}
    assert live.entries["model", "weight", "a"].data_ptr() == model.weight.a.data_ptr()
    assert live.buffers == {("model", "seen", "a"), ("model", "seen", "b")}
    assert [param.name for param in live.params] == [("model", "weight"), ("model", "bias")]
    assert live.params[1].state_names == {"average": ("optimizer", "bias", "average")}
    assert live.arrays_of(("model", "weight")) == (("model", "weight", "a"), ("model", "weight", "b"))
    assert {name: type(tensor) for name, tensor in live.tensors().items()} == {
        ("model", "bias"): torch.Tensor,
        ("model", "weight"): TwoTensor,
        ("model", "seen"): TwoTensor,
        ("optimizer", "bias", "average"): TwoTensor,
    }


def test_state_of_a_tensor_in_no_group_is_not_saved_and_said(caplog):
    model = nn.Linear(1, 1)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[torch.zeros(1)] = {"x": torch.ones(1)}
    optimizer.state["global"] = 3
    live = collect(model, optimizer)
    assert live.trained[0].values == {"global": 3}
    assert [record.message for record in caplog.records] == [
        "SGD keeps state for a tensor outside its param groups; that state is not saved"
    ]


def test_an_optimizer_that_only_looks_like_one():
    class Duck:
        def __init__(self, params):
            self.param_groups = [{"params": list(params), "lr": 1.0}]
            self.state = {}

    model = nn.Linear(1, 1)
    live = collect(model, Duck(model.parameters()))
    assert [entry.fqn for entry in live.params] == ["weight", "bias"]
    assert live.trained[0].kind.endswith("Duck")
