"""What torch's own ``load_state_dict`` does with a module has happened after ``gockpt.load``."""

from __future__ import annotations

import copy
import importlib.util
import io
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DataParallel

import gockpt
from gockpt import StateMismatch

_spec = importlib.util.spec_from_file_location("module_kinds", Path(__file__).with_name("module_kinds.py"))
module_kinds = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(module_kinds)
KINDS = module_kinds.KINDS

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning"),
]


def held(model):
    """Return a copy of what a model's state dict holds now."""
    state = model.state_dict()
    return {
        key: str(value) if torch.nn.parameter.is_lazy(value) else copy.deepcopy(value)
        for key, value in state.items()
    }


def by_torch(saved, live, **arguments):
    """Load as a run does that saves with ``torch.save``; return what that returns, or its refusal."""
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    try:
        return live.load_state_dict(torch.load(file, weights_only=False), **arguments)
    except RuntimeError as error:
        return error


def by_gockpt(live, **arguments):
    try:
        return gockpt.load("ckpts", live, **arguments)
    except StateMismatch as error:
        return error


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_as_torch_has_it(kind, save, same):
    torch.manual_seed(1)
    saved, make, derived = KINDS[kind]()
    before = held(saved)
    save("ckpts", saved)
    same(held(saved), before)
    torch.manual_seed(2)
    expected = make()
    torch.manual_seed(2)
    live = make()
    fresh = held(live)
    torch_says, gockpt_says = by_torch(saved, expected), by_gockpt(live)
    if isinstance(torch_says, RuntimeError):
        assert isinstance(gockpt_says, StateMismatch), torch_says
        refused_alike(torch_says, gockpt_says)
        if "nothing was changed" in str(gockpt_says):
            same(held(live), fresh)
        else:
            assert (
                "load another step" in gockpt_says.__notes__[0] or "no other step" in gockpt_says.__notes__[0]
            )
        return
    assert not isinstance(gockpt_says, StateMismatch), gockpt_says
    same(held(live), held(expected))
    same(derived(live), derived(expected))
    assert [p.requires_grad for p in live.parameters()] == [p.requires_grad for p in expected.parameters()]


def refused_alike(torch_says, gockpt_says):
    """Each key that torch names as missing, unexpected or of another size is named, and no other."""
    text = str(torch_says)
    for what, names in (("Missing", gockpt_says.missing), ("Unexpected", gockpt_says.unexpected)):
        line = next((line for line in text.splitlines() if f"{what} key(s)" in line), "")
        keys = {word.rstrip(",.") for word in line.partition(":")[2].split()}
        assert {name.removeprefix("model/") for name in names} == {key.strip('"') for key in keys}
    different = [line for line in text.splitlines()[1:] if "key(s)" not in line]
    assert bool(different) == bool(gockpt_says.mismatched)


@pytest.mark.parametrize("kind", KINDS)
def test_what_fits_is_as_torch_has_it(kind, save, same):
    """With ``strict=False``; torch still refuses other shapes, gockpt leaves those out."""
    torch.manual_seed(1)
    saved, make, derived = KINDS[kind]()
    save("ckpts", saved)
    torch.manual_seed(2)
    expected = make()
    torch.manual_seed(2)
    live = make()
    try:
        torch_says = by_torch(saved, expected, strict=False)
    except TypeError:
        return  # its load_state_dict takes no strict
    gockpt_says = by_gockpt(live, strict=False)
    if isinstance(gockpt_says, StateMismatch):
        assert "no entry of the model fits" in str(gockpt_says) or isinstance(torch_says, RuntimeError)
        return
    if torch_says is not None and not isinstance(torch_says, RuntimeError):
        named = [name.removeprefix("model/") for name in gockpt_says.missing]
        assert set(named) == set(torch_says.missing_keys)
        named = [name.removeprefix("model/") for name in gockpt_says.unexpected]
        assert set(named) == set(torch_says.unexpected_keys)
    same(held(live), held(expected))
    same(derived(live), derived(expected))


WRAPPERS = {
    "compile": lambda m: torch.compile(m, backend="eager"),
    "replica": DataParallel,
    "list": lambda m: [m],
}


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize(
    "kind",
    ["post_hooks_below", "version_that_converts_below", "pre_hook_that_renames_all", "qat_model", "metric"],
)
def test_wrappers_change_nothing(kind, wrap, save, same):
    """The same as with the bare model, into the bare one and into a wrapped one."""
    saved, make, derived = KINDS[kind]()
    save("ckpts", [saved] if wrap == "list" else saved)
    save("wrapped", WRAPPERS[wrap](saved))
    expected, live, again = make(), make(), make()
    by_torch(saved, expected)
    gockpt.load("ckpts", WRAPPERS[wrap](live))
    gockpt.load("wrapped", [again] if wrap == "list" else again)
    wanted = held(expected)
    same(held(live), wanted)
    same(held(again), wanted)
    wanted = derived(expected)
    same(derived(live), wanted)
    same(derived(again), wanted)
