"""Optimizers inside their wrappers, and detection of saving or loading code of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gockpt.errors import UnsupportedState, UsageError
from gockpt.state.known_classes import class_name
from gockpt.state.optimizer_forms import adds_something

__all__ = [
    "Found",
    "check_wrapper",
    "find_optimizers",
    "has_own_protocol",
    "own_method",
    "wrapper_protocol",
]

INNER = (
    *("optimizer", "_optimizer", "base_optimizer", "_base_optimizer", "inner_optimizer", "inner"),
    *("optim", "_optim", "opt", "_opt", "fp32_optimizer"),
)
"""Attributes under which wrappers hold the optimizer, or the wrapper, that they wrap."""

HOOKS = (
    *("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks"),
    *("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"),
)
"""Attributes that hold an optimizer's registered hooks of saving and loading."""

_STATE = (int, float, complex, torch.Tensor, Mapping, list, set, deque, bytearray)
"""Attributes of these types may be state that a wrapper would have to save."""

_SAVED_APART = (bool, type, torch.nn.Module, LRScheduler, torch.amp.GradScaler)
"""Attributes of these types are not a wrapper's to save."""


@dataclass(slots=True)
class Found:
    """Optimizers and wrappers that the ``optimizer`` argument of a save or a load stands for.

    Attributes:
        optimizers: The optimizers that hold state, the innermost of each wrapper first.
        wrappers: Objects around them that hold no state under ``state``, the outermost of each first, with
            the optimizers inside each.
    """

    optimizers: list[Any] = field(default_factory=list)
    wrappers: list[tuple[Any, list[Any]]] = field(default_factory=list)

    def same_as(self, other: Found) -> bool:
        """Whether both are the very same objects."""
        mine, others = ([*one.optimizers, *(wrapper for wrapper, _ in one.wrappers)] for one in (self, other))
        return len(mine) == len(others) and all(map(_is, mine, others))


def find_optimizers(optimizer: Any) -> Found:
    """Return the optimizers that hold state themselves, and the wrappers around them.

    A wrapper with a ``state`` of its own (Lookahead, SAM) counts as an optimizer, and comes after the one it
    wraps.

    Raises:
        UsageError: If an object neither has ``param_groups`` and ``state`` nor wraps one that has.
    """
    found = Found()
    if optimizer is None:
        return found
    given = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    for one in given:
        if not _unwrap(one, found, seen=set()):
            msg = (
                f"optimizer is a {type(one).__module__}.{type(one).__qualname__} without param_groups and "
                "state; pass the torch.optim.Optimizer inside it, or pass it in extra={...} if it has "
                "state_dict() and load_state_dict()"
            )
            raise UsageError(msg)
    return found


def own_method(value: Any, name: str) -> Any:
    """Return a method of an object's own class, not one forwarded from the optimizer that it wraps.

    ``None`` if it has none, or only that of :class:`torch.optim.Optimizer`.
    """
    method = getattr(value, name, None)
    if not callable(method) or getattr(method, "__self__", value) is not value:
        return None
    if getattr(method, "__func__", None) is getattr(Optimizer, name):
        return None
    return method


def has_own_protocol(optimizer: Any) -> bool:
    """Whether an optimizer is saved or loaded otherwise than by torch's default.

    True for an overridden ``state_dict``, ``load_state_dict`` or ``__setstate__``, and for hooks. An object
    that isn't a torch optimizer needs both methods.
    """
    if not isinstance(optimizer, Optimizer):
        return all(own_method(optimizer, name) for name in ("state_dict", "load_state_dict"))
    if any(getattr(optimizer, hooks, None) for hooks in HOOKS):
        return True
    restores = type(optimizer).__setstate__
    return (
        any(own_method(optimizer, name) for name in ("state_dict", "load_state_dict"))
        or not getattr(restores, "__module__", "").startswith("torch.optim.")
        or "__setstate__" in vars(optimizer)
    )


def wrapper_protocol(wrapper: Any, inside: list[Any]) -> tuple[bool, bool]:
    """Return whether a wrapper's ``state_dict()`` is saved, and whether the wrapper can load it itself."""
    hooked = isinstance(wrapper, Optimizer) and any(
        getattr(wrapper, hooks, None)
        and not any(getattr(wrapper, hooks) is getattr(one, hooks, None) for one in inside)
        for hooks in HOOKS
    )
    loads = own_method(wrapper, "load_state_dict") is not None
    saves = own_method(wrapper, "state_dict") is not None
    # A wrapper that only loads in its own way loads the state dict it forwards from the optimizer inside.
    return saves or hooked or (loads and hasattr(wrapper, "state_dict")), loads or hooked


def check_wrapper(wrapper: Any, inside: list[Any]) -> None:
    """Refuse a wrapper whose own state could not be saved, or not be loaded.

    Raises:
        UnsupportedState: If it is one; names its class and the missing method.
    """
    saves, loads = wrapper_protocol(wrapper, inside)
    name = class_name(type(wrapper))
    way_out = f"give {type(wrapper).__qualname__} both, or pass the optimizer inside it"
    if saves and not loads and adds_something(wrapper.state_dict(), [one.state_dict() for one in inside]):
        msg = f"{name} has its own state_dict(), but no load_state_dict(): {way_out}"
        raise UnsupportedState(msg)
    # torch doesn't save an optimizer's attributes either.
    if not saves and not isinstance(wrapper, Optimizer):
        held = _attributes_of_its_own(wrapper, inside)
        if held:
            msg = (
                f"{name} wraps an optimizer and has attributes that may be state ({', '.join(held[:5])}), "
                "but no state_dict() of its own: give it state_dict() and load_state_dict(), or pass the "
                "optimizer inside it if the attributes need not be restored"
            )
            raise UnsupportedState(msg)


def _attributes_of_its_own(wrapper: Any, inside: list[Any]) -> list[str]:
    """Return the names of a wrapper's attributes that may be state: numbers, tensors, containers."""
    found = []
    for name, value in getattr(wrapper, "__dict__", {}).items():
        parts = _parts(value)
        if isinstance(value, _SAVED_APART) or any(_wraps(part) for part in parts):
            continue
        if not (isinstance(value, _STATE) or hasattr(value, "state_dict") or hasattr(value, "__array__")):
            continue
        if any(value is getattr(optimizer, name, None) for optimizer in inside):
            continue
        found.append(name)
    return found


def _unwrap(optimizer: Any, found: Found, *, seen: set[int]) -> list[Any]:
    """Add an object's optimizers and wrappers to ``found``; return the optimizers inside it."""
    if id(optimizer) in seen:
        return []
    seen.add(id(optimizer))
    place = len(found.wrappers)
    inside = [leaf for part in _inner(optimizer) for leaf in _unwrap(part, found, seen=seen)]
    if not inside and not _is_optimizer(optimizer):
        return []
    # ``state`` must be the object's own: a wrapper may forward that of the optimizer it wraps.
    passes_through = inside and (
        not isinstance(optimizer, Optimizer)
        or not _is_optimizer(optimizer)
        or any(optimizer.state is leaf.state for leaf in inside)
    )
    if passes_through:
        if not any(optimizer is known for known, _ in found.wrappers):
            found.wrappers.insert(place, (optimizer, inside))
        return inside
    if not any(optimizer is known for known in found.optimizers):
        found.optimizers.append(optimizer)
    return [*inside, optimizer]


def _inner(optimizer: Any) -> list[Any]:
    """Return the optimizers and wrappers that an object holds directly, each once."""
    candidates = [getattr(optimizer, name, None) for name in INNER]
    candidates = [part for part in candidates if _wraps(part) or _is_optimizer(part)]
    values = [getattr(optimizer, "optimizers", None), *getattr(optimizer, "__dict__", {}).values()]
    candidates += [part for value in values for part in _parts(value) if _is_optimizer(part)]
    return [part for at, part in enumerate(candidates) if not any(part is one for one in candidates[:at])]


def _parts(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    return list(value.values()) if type(value) is dict else [value]


def _wraps(value: Any, depth: int = 8) -> bool:
    """Whether an object is an optimizer, or steps one that it holds."""
    if isinstance(value, (type, torch.Tensor, torch.nn.Module, LRScheduler)):
        return False
    if _is_optimizer(value):
        return True
    if not depth or not hasattr(value, "step"):
        return False
    held = (getattr(value, name, None) for name in INNER)
    return any(part is not None and _wraps(part, depth - 1) for part in held)


def _is_optimizer(value: Any) -> bool:
    if isinstance(value, (type, torch.Tensor)):
        return False
    return isinstance(getattr(value, "param_groups", None), list) and isinstance(
        getattr(value, "state", None), Mapping
    )


def _is(one: Any, other: Any) -> bool:
    return one is other
