"""Parameters that an optimizer trains and the model does not hold.

Most are meant: fp32 master copies, adapters, a temperature. Others were left behind when the model got new
parameters (``load_state_dict(assign=True)``, a replaced module). Shapes and dtypes can't tell the two apart.
A parameter is certainly left behind only if this very tensor was seen in this very model, under a name that
another tensor now has.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils.weak import WeakIdKeyDictionary

from gockpt.core.shortened import shortened
from gockpt.errors import UsageError
from gockpt.once import warn_once
from gockpt.state.naming import bare_module, models_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import nn

    from gockpt.state.live_state import ParamEntry
    from gockpt.state.naming import ModelEntry

__all__ = ["check_outside", "remember_held"]

SHOWN = 5


class _Held(NamedTuple):
    """A parameter that a model held when it was last looked at."""

    param: weakref.ref[torch.Tensor]
    model: tuple[weakref.ref[nn.Module], ...]
    fqn: str


# By optimizer, then by id of the parameter.
_held: Any = WeakIdKeyDictionary()


def remember_held(model: Any, optimizer: Any, params: Iterable[ParamEntry]) -> None:
    """Remember the parameters of an optimizer that the model holds, with their names.

    Keeps only weak references. A mapping is not remembered: it may be a new one in each call.
    """
    modules = _modules(model)
    if not modules:
        return
    try:
        known = _held.setdefault(optimizer, {})
    except TypeError:  # it can't be referred to weakly
        return
    references: tuple[weakref.ref[nn.Module], ...] | None = None
    for entry in params:
        if entry.name[0] != "model":
            continue
        former = known.get(id(entry.param))
        if former is None or former.param() is not entry.param or not _same(former.model, modules):
            references = references or tuple(weakref.ref(module) for module in modules)
            known[id(entry.param)] = _Held(weakref.ref(entry.param), references, entry.fqn)


def check_outside(
    model: Any,
    entries: Iterable[ModelEntry],
    params: Iterable[ParamEntry],
    outside: list[ParamEntry],
    optimizers: list[Any],
) -> None:
    """Refuse parameters that the model certainly no longer holds, and log the others once.

    Args:
        model: The model, as given.
        entries: Its entries.
        params: Every parameter of every optimizer.
        outside: The parameters among them that the model does not hold.
        optimizers: The optimizers, by their index.

    Raises:
        UsageError: If the model held one of them under a name at which it now has another trainable
            parameter, of the same shape and dtype, that no optimizer trains.
    """
    owned = {id(entry.param) for entry in params}
    untrained = {
        entry.fqn: entry.value
        for entry in entries
        if entry.kind == "parameter" and entry.value.requires_grad and id(entry.value) not in owned
    }
    modules = _modules(model)
    lost = []
    for entry in outside:
        held = _known(optimizers[entry.optimizer_index]).get(id(entry.param))
        if held is None or held.param() is not entry.param or not _same(held.model, modules):
            continue
        now = untrained.get(held.fqn)
        if now is not None and _same_kind(now, entry.param):
            lost.append((entry.fqn, held.fqn))
    if lost:
        msg = (
            f"the optimizer trains {len(lost)} tensors that the model no longer holds, and no optimizer "
            f"trains the tensors that replaced them: {_pairs(lost, 'formerly')}. After "
            "load_state_dict(assign=True) or a replaced module, build the optimizer from the model's "
            "parameters again. If this is intended, freeze the model's untrained parameters with "
            "requires_grad_(False)"
        )
        raise UsageError(msg)
    names = tuple(entry.fqn for entry in outside)
    warn_once(
        names,
        "the optimizer trains %d tensors that the model does not hold (%s); they are saved with the "
        "optimizer, named by their position in its param groups",
        len(names),
        ", ".join(names[:SHOWN]),
    )
    alike = _alike(untrained, outside)
    if alike:
        warn_once(
            ("alike", *names),
            "no optimizer trains some parameters of the model, while tensors of the same shape and dtype "
            "outside the model are trained: %s. Both are saved, which is right for master copies. If "
            "load_state_dict(assign=True) or a replaced module left the latter behind, build the optimizer "
            "from the model's parameters again",
            _pairs(alike, "like"),
        )


def _known(optimizer: Any) -> dict[int, _Held]:
    try:
        found: dict[int, _Held] = _held.get(optimizer, {})
    except TypeError:
        return {}
    return found


def _alike(untrained: Mapping[str, torch.Tensor], outside: list[ParamEntry]) -> list[tuple[str, str]]:
    """Pair parameters outside the model with untrained ones in it, of the same shape and dtype."""
    left = dict(untrained)
    pairs = []
    for entry in outside:
        twin = next((fqn for fqn, value in left.items() if _same_kind(value, entry.param)), None)
        if twin is not None:
            del left[twin]
            pairs.append((entry.fqn, twin))
    return pairs


def _same_kind(value: torch.Tensor, param: torch.Tensor) -> bool:
    return value is not param and value.shape == param.shape and value.dtype == param.dtype


def _modules(model: Any) -> list[nn.Module]:
    parts = [part for _, part in models_of(model)]
    if any(isinstance(part, Mapping) for part in parts):
        return []
    return [bare_module(part) for part in parts]


def _same(references: tuple[weakref.ref[nn.Module], ...], modules: list[nn.Module]) -> bool:
    return len(references) == len(modules) and all(
        reference() is module for reference, module in zip(references, modules, strict=True)
    )


def _pairs(pairs: list[tuple[str, str]], word: str) -> str:
    return shortened([f"{fqn} ({word} {other})" for fqn, other in pairs], SHOWN)
