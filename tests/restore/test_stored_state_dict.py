"""A saved state dict is a state dict to whoever has it, and holds in memory only what somebody else holds."""

from __future__ import annotations

import copy
import gc
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import gockpt
from gockpt.catalog import state_of
from gockpt.loading.fill import Filler
from gockpt.loading.stored_state_dict import Stored, StoredStateDict, saved_entries
from gockpt.storage.read.find import open_checkpoint

VALUES = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(3, dtype=torch.int64),
    "c": torch.zeros(0, 4),
    "d": torch.tensor([True, False]),
    "e": torch.ones(3, dtype=torch.bfloat16),
    "f": torch.tensor([1 + 2j]),
}


class Opened:
    """A saved state dict, and how many tensors were read for it."""

    def __init__(self, stored):
        self.filler = Filler(stored)
        self.reads = 0
        arrays = {name: array.spec for name, array in stored.arrays.items()}
        self.state = StoredStateDict()
        entries = saved_entries(state_of(stored), arrays, self.filler.read, self.bytes_of)
        for key, value in entries.items():
            self.state[key] = value

    def bytes_of(self, name):
        self.reads += 1
        return self.filler.bytes_of(name)


@pytest.fixture
def opened(save):
    save("ckpts", VALUES)
    with open_checkpoint("ckpts") as stored:
        yield Opened(stored)


LOOKS = {
    "getitem": lambda s: {key: s[key] for key in s},
    "get": lambda s: {key: s.get(key) for key in s},
    "items": lambda s: dict(s.items()),
    "values": lambda s: dict(zip(s, s.values(), strict=True)),
    "dict": dict,
    "OrderedDict": OrderedDict,
    "stars": lambda s: {**s},
    "update": lambda s: {} | dict(s),
    "copy": lambda s: dict(s.copy()),
    "copy.copy": lambda s: dict(copy.copy(s)),
    "pop": lambda s: {key: s.pop(key) for key in list(s)},
    "popitem": lambda s: dict([s.popitem(last=False) for _ in range(len(s))]),
    "setdefault": lambda s: {key: s.setdefault(key, None) for key in s},
    "deepcopy": lambda s: dict(copy.deepcopy(dict(s))),
}


@pytest.mark.parametrize("look", LOOKS)
def test_every_look_shows_the_tensors(look, opened, same):
    assert opened.reads == 0
    shown = LOOKS[look](opened.state)
    same(dict(shown), VALUES)
    assert all(type(value) is torch.Tensor for value in shown.values())


def test_what_is_absent_is_as_in_a_dict(opened):
    state = opened.state
    assert state.get("x") is None
    assert state.get("x", 3) == 3
    assert state.pop("x", 4) == 4
    assert "x" not in state
    for look in (state.__getitem__, state.pop):
        with pytest.raises(KeyError, match="x"):
            look("x")
    state["x"] = "text"
    assert state["x"] == state.pop("x") == "text"
    assert opened.reads == 0


def test_names_and_parts_are_had_without_reading(opened):
    part = opened.state.where(lambda key: key in "ab")
    assert (list(part), len(opened.state), opened.reads) == (["a", "b"], 6, 0)


def test_a_tensor_that_was_put_in_again_is_held_as_stored(opened, same):
    state = opened.state
    state["new"] = state.pop("a")
    assert isinstance(state.raw("new"), Stored)
    kept = state["new"]
    state["newer"] = kept
    assert state["newer"] is kept
    del kept
    assert isinstance(state.raw("newer"), Stored)
    same(state["newer"], VALUES["a"])


CHANGES = {
    "in place": lambda t: t.mul_(2),
    "data": lambda t: t.data.mul_(2),
    "numpy": lambda t: np.multiply(t.numpy(), 2, out=t.numpy()),
    "a view": lambda t: t.view(-1)[0:6].mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_tensor_that_was_changed_stays_changed(change, when, opened, same):
    state = opened.state
    tensor = state.pop("a")
    if when == "before":
        CHANGES[change](tensor)
    state["new"] = tensor
    if when == "after":
        CHANGES[change](tensor)
    del tensor
    gc.collect()
    same(state["new"], VALUES["a"] * 2)
    same(state["new"], VALUES["a"] * 2)


def test_a_change_by_a_view_that_outlives_the_tensor_is_seen(opened, same):
    state = opened.state
    state["new"] = tensor = state.pop("a")
    view, seen = tensor[1], tensor[0].numpy()
    del tensor
    view.zero_()
    same(state["new"][1], torch.zeros(3))
    del view
    seen[:] = 7
    del seen
    same(state["new"], torch.tensor([[7.0] * 3, [0.0] * 3]))


class Own(nn.Linear):
    def _load_from_state_dict(self, state, prefix, *rest):
        super()._load_from_state_dict(state, prefix, *rest)


def rename(module, state, prefix, *_):
    for key in list(state):
        state[key.replace("old", "new")] = state.pop(key)


def rename_by_items(module, state, prefix, *_):
    renamed = {key: key.replace("old", "new") for key, value in state.items() if value.dim()}
    for old, new in renamed.items():
        state[new] = state.pop(old)


BOUNDED = {
    "own code in each": (
        lambda: nn.ModuleDict({"old": nn.Sequential(*[Own(256, 256) for _ in range(24)])}),
        None,
    ),
    "renamed by the root": (
        lambda: nn.ModuleDict({"new": nn.Sequential(*[nn.Linear(256, 256) for _ in range(24)])}),
        rename,
    ),
    "looked at and renamed": (
        lambda: nn.ModuleDict({"new": nn.Sequential(*[Own(256, 256) for _ in range(24)])}),
        rename_by_items,
    ),
}


@pytest.mark.parametrize("kind", BOUNDED)
def test_memory_is_bounded_by_single_tensors(kind, save, same):
    """NumPy tells tracemalloc of its memory, and what such code is shown is read into that."""
    saved = nn.ModuleDict({"old": nn.Sequential(*[nn.Linear(256, 256) for _ in range(24)])})
    save("ckpts", saved)
    build, hook = BOUNDED[kind]
    live = build()
    if hook is not None:
        live.register_load_state_dict_pre_hook(hook)
    one = 256 * 256 * 4
    tracemalloc.start()
    try:
        gockpt.load("ckpts", live)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert one <= peak < 8 * one  # of 24; documents and names are in it
    for mine, theirs in zip(live.parameters(), saved.parameters(), strict=True):
        same(mine.detach(), theirs.detach())
