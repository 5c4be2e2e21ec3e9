"""Repeated collection: the same answer as collecting anew, whatever has changed in between."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn, optim

import gockpt
from gockpt.errors import UnsupportedState
from gockpt.state.collect import collect
from gockpt.state.collection import Collection
from gockpt.state.state_document import build_document


class Case:
    """A model with tied and frozen parameters, buffers, an empty one; two groups; two updates done."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4))
        self.model[3].weight = self.model[2].weight
        self.model[0].bias.requires_grad_(False)
        self.model.register_buffer("empty", torch.zeros(0, 3))
        self.model.register_buffer("left_out", torch.zeros(2), persistent=False)
        params = [*self.model.parameters()]
        self.optimizer = optim.AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}])
        self.update()

    def update(self):
        for param in self.model.parameters():
            param.grad = torch.randn_like(param) if param.requires_grad else None
        self.optimizer.step()


def replaced_parameter(case):
    new = nn.Parameter(torch.randn(4, 4))
    old, case.model[0].weight = case.model[0].weight, new
    case.optimizer.param_groups[0]["params"][0] = new
    case.optimizer.state[new] = case.optimizer.state.pop(old)


def replaced_data(case):
    case.model[0].weight.data = torch.randn(4, 4)


def replaced_data_of_another_order(case):
    case.model[0].weight.data = torch.randn(4, 4).t()


def resized_buffer(case):
    case.model[1].running_mean = torch.randn(7)


def resized_in_place(case):
    case.model[1].running_mean.resize_(9).fill_(1)  # no view of it must have made its storage fixed


def replaced_buffer(case):
    case.model[1].running_mean = torch.randn(4)


def added_buffer(case):
    case.model.register_buffer("new", torch.randn(3))


def buffer_left_out(case):
    case.model[1]._non_persistent_buffers_set.add("running_var")


def removed_buffer(case):
    del case.model.empty


def buffer_no_longer_empty(case):
    case.model.empty = torch.randn(2, 3)


def renamed_module(case):
    case.model._modules["three"] = case.model._modules.pop("3")


def added_param_group(case):
    case.model.register_parameter("new", nn.Parameter(torch.randn(5)))
    case.optimizer.add_param_group({"params": [case.model.new]})


def moved_between_groups(case):
    groups = case.optimizer.param_groups
    groups[1]["params"].insert(0, groups[0]["params"].pop())


def state_popped(case):
    case.optimizer.state.pop(case.model[0].weight)


def one_state_popped(case):
    case.optimizer.state[case.model[0].weight].pop("exp_avg")


def one_state_added(case):
    case.optimizer.state[case.model[0].weight]["more"] = torch.randn(3)


def state_becomes_a_number(case):
    case.optimizer.state[case.model[0].weight]["step"] = 5


def state_becomes_none(case):
    case.optimizer.state[case.model[0].weight]["exp_avg"] = None


def state_replaced(case):
    case.optimizer.state[case.model[0].weight]["exp_avg"] = torch.randn(4, 4)


def state_of_another_key(case):
    case.optimizer.state[case.model[0].weight]["a/b"] = torch.randn(2)


def state_under_a_name(case):
    case.optimizer.state["global"] = {"k": 5}


def states_reordered(case):
    state = case.optimizer.state
    first = next(iter(state))
    state[first] = state.pop(first)


def states_exchanged(case):
    state, (a, b) = case.optimizer.state, (case.model[0].weight, case.model[2].weight)
    state[a]["exp_avg"], state[b]["exp_avg"] = state[b]["exp_avg"], state[a]["exp_avg"]


def all_state_loaded(case):
    case.optimizer.load_state_dict(case.optimizer.state_dict())


def dtype_changed(case):
    case.model[1].running_mean = case.model[1].running_mean.double()


def dtype_changed_in_place(case):
    case.model[0].weight.data = case.model[0].weight.data.half()


def unfrozen(case):
    case.model[0].bias.requires_grad_(True)
    case.update()


def hook_added(case):
    def leave_out(_module, state, prefix, _local):
        del state[f"{prefix}bias"]

    case.model[0].register_state_dict_post_hook(leave_out)


def hook_of_the_optimizer(case):
    case.optimizer.register_state_dict_post_hook(lambda _o, state: state | {"more": 1})


def own_state_dict_of_one_module(case):
    case.model[0].state_dict = lambda *a, **k: nn.Module.state_dict(case.model[0], *a, **k)


def extra_state_added(case):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"n": 3}

        def set_extra_state(self, state):
            pass

    case.model[0].__class__ = Extra


def version_changed(case):
    case.model[0]._version = 7


def untied(case):
    case.model[3].weight = nn.Parameter(case.model[3].weight.detach().clone())
    case.optimizer.add_param_group({"params": [case.model[3].weight]})


def tied(case):
    case.model[1].running_mean = case.model[1].running_var


def tied_by_memory(case):
    case.model[1].running_mean.data = case.model[1].running_var.data


def tied_to_state(case):
    state = case.optimizer.state[case.model[0].weight]
    state["exp_avg"] = state["exp_avg_sq"]


def another_optimizer(case):
    case.optimizer = optim.SGD(case.model.parameters(), lr=0.1, momentum=0.9)
    case.update()


def negated(case):
    case.model[1].running_mean.data = torch.zeros(4, dtype=torch.complex64).conj().imag


def nothing(_case):
    pass


def updated(case):
    case.update()


CHANGES = [
    *(replaced_parameter, replaced_data, replaced_data_of_another_order, resized_buffer, resized_in_place),
    *(replaced_buffer, added_buffer, buffer_left_out, removed_buffer, buffer_no_longer_empty, renamed_module),
    *(added_param_group, moved_between_groups, state_popped, one_state_popped, one_state_added),
    *(state_becomes_a_number, state_becomes_none, state_replaced, state_of_another_key, state_under_a_name),
    *(states_reordered, states_exchanged, all_state_loaded, dtype_changed, dtype_changed_in_place, unfrozen),
    *(hook_added, hook_of_the_optimizer, own_state_dict_of_one_module, extra_state_added, version_changed),
    *(untied, tied, tied_by_memory, tied_to_state, another_optimizer, nothing, updated),
]


def described(live):
    """Everything about a live state, tensors by their memory."""

    def memory(tensor):
        return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad)

    document, arrays = build_document(live, step=1, optimizer_steps=1)
    return {
        "entries": [(name, memory(tensor)) for name, tensor in live.entries.items()],
        "params": [
            (p.fqn, id(p.param), p.optimizer_index, p.group_index, p.name, p.state_names, p.owner, id(p.raw))
            for p in live.params
        ],
        "states": [{key: id(value) for key, value in p.state.items()} for p in live.params],
        "groups": [
            [(id(group.options), [p.fqn for p in group.params]) for group in entry.groups]
            for entry in live.trained
        ],
        "trained": [(id(e.optimizer), e.kind, e.values, e.own) for e in live.trained],
        "rest": (live.aliases, live.buffers, [*map(id, live.optimizers)], live.metadata, live.keys),
        "document": document,
        "arrays": [(name, tensor.tolist()) for name, tensor in arrays.items()],
    }


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen_at_the_next_collection(change):
    case, collection = Case(), Collection()
    first = collection.collect(case.model, case.optimizer)
    kept = collection.collect(case.model, case.optimizer)
    assert kept.kept is first.kept  # so that it is this one that the change has to be seen by
    assert described(kept) == described(first) == described(collect(case.model, case.optimizer))
    change(case)
    for _ in range(2):
        live = collection.collect(case.model, case.optimizer)
        assert described(live) == described(collect(case.model, case.optimizer))


@pytest.mark.parametrize("change", [nothing, updated, replaced_data, replaced_buffer, state_replaced])
def test_the_layout_is_kept_while_it_is_the_same(change):
    case, collection = Case(), Collection()
    first = collection.collect(case.model, case.optimizer)
    change(case)
    assert collection.collect(case.model, case.optimizer).kept is first.kept


def test_what_can_no_longer_be_saved_is_refused():
    case, collection = Case(), Collection()
    collection.collect(case.model, case.optimizer)
    negated(case)
    with pytest.raises(UnsupportedState, match="negated"):
        collection.collect(case.model, case.optimizer)


def test_no_tensor_or_module_is_kept():
    case, collection = Case(), Collection()
    for _ in range(2):
        collection.collect(case.model, case.optimizer)
    held = [weakref.ref(case.model), *map(weakref.ref, case.model.parameters())]
    held += [weakref.ref(value) for state in case.optimizer.state.values() for value in state.values()]
    del case
    gc.collect()
    assert not [reference for reference in held if reference() is not None]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_next_save_holds_the_change(change, tmp_path):
    case = Case()
    for step in (1, 2):
        gockpt.save_overlapped(case.model, case.optimizer, tmp_path, step=step)
    change(case)
    if change is another_optimizer:
        gockpt.close(tmp_path)
    gockpt.save_overlapped(case.model, case.optimizer, tmp_path, step=3).result()
    live = collect(case.model, case.optimizer)
    with gockpt.open(tmp_path, step=3) as checkpoint:
        names = {"/".join(name) for name in live.entries}
        assert names <= set(checkpoint)
        for name, tensor in live.entries.items():
            saved = checkpoint["/".join(name)][...]
            assert saved.dtype == tensor.dtype
            assert torch.equal(saved, tensor), name
    gockpt.close(tmp_path)
