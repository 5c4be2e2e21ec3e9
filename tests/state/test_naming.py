"""Names are the bare model's, whatever stands around it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gockpt.errors import UsageError
from gockpt.state.naming import bare_module, model_entries, models_of, parameter_names


def names(model):
    return [entry.fqn for entry in model_entries(model)]


def build():
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2)))


def compiled(module):
    return torch.compile(module, backend="eager")


@pytest.fixture(scope="module")
def _process_group(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "compile": compiled,
    "data-parallel": DataParallel,
    "compiled-replica": lambda m: compiled(DataParallel(m)),
    "replica-of-compiled": lambda m: DataParallel(compiled(m)),
    "checkpointed": checkpoint_wrapper,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_leave_no_trace(wrap):
    model = build()
    wrapped = wrap(model)
    assert names(wrapped) == list(model.state_dict())
    assert set(parameter_names(wrapped).values()) == {name for name, _ in model.named_parameters()}
    assert bare_module(wrapped) is model
    outer = nn.ModuleDict({"a": wrap(build()), "module": wrap(build())})
    assert names(outer) == [f"{key}.{name}" for key in ("a", "module") for name in model.state_dict()]


def test_replicas_inside_a_replica_leave_no_trace():
    model = build()
    assert names(DataParallel(nn.Sequential(*map(DataParallel, model)))) == list(model.state_dict())


@pytest.mark.usefixtures("_process_group")
def test_distributed_data_parallel_leaves_no_trace():
    model = build()
    wrapped = DistributedDataParallel(model)
    assert names(wrapped) == list(model.state_dict())
    assert names(compiled(wrapped)) == list(model.state_dict())
    assert bare_module(compiled(wrapped)) is model


def test_a_module_that_users_called_module_keeps_its_name():
    assert names(nn.ModuleDict({"module": nn.Linear(1, 1)})) == ["module.weight", "module.bias"]


def test_kinds():
    model = build()
    model.register_buffer("scratch", torch.zeros(1), persistent=False)
    kinds = {entry.fqn: entry.kind for entry in model_entries(model)}
    assert kinds == {
        "0.weight": "parameter",
        "0.bias": "parameter",
        "1.0.weight": "parameter",
        "1.0.bias": "parameter",
        "1.0.running_mean": "buffer",
        "1.0.running_var": "buffer",
        "1.0.num_batches_tracked": "buffer",
    }


def test_what_a_hook_makes_is_computed_and_what_it_passes_on_is_live():
    model = nn.Linear(2, 2)

    def hook(module, state, prefix, _):
        state["view"] = state["weight"].detach()[0]
        state["made"] = state["weight"] * 2
        state["text"] = "hello"
        state["sparse"] = torch.ones(2).to_sparse()
        state["empty"] = torch.ones(0)

    model._register_state_dict_hook(hook)
    kinds = {entry.fqn: entry.kind for entry in model_entries(model)}
    assert kinds == {
        "weight": "parameter",
        "bias": "parameter",
        "view": "parameter",
        "made": "computed",
        "text": "computed",
        "sparse": "computed",
        "empty": "computed",
    }


def test_names_that_become_equal_are_refused():
    model = nn.Module()
    model.add_module("_orig_mod", nn.Linear(1, 1))
    model.register_parameter("weight", nn.Parameter(torch.zeros(1)))
    with pytest.raises(UsageError, match="both get the name 'weight'"):
        model_entries(model)


def test_a_list_of_modules_and_a_mapping():
    assert names([nn.Linear(1, 1), nn.PReLU()]) == ["0.weight", "0.bias", "1.weight"]
    assert names({"a/b": torch.ones(1)}) == ["a/b"]
    assert names(None) == []
    assert models_of(()) == []


def test_names_have_to_be_text():
    with pytest.raises(UsageError, match="is not valid Unicode"):
        model_entries({"\ud800": torch.ones(1)})
    assert names({"größe": torch.ones(1)}) == ["größe"]


@pytest.mark.parametrize("model", [3, "x", [nn.Linear(1, 1), 3], nn.Linear, {"a": 1}])
def test_what_is_no_model(model):
    with pytest.raises(UsageError, match="pass"):
        models_of(model)
