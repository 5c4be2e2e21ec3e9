"""Checks of users' arguments, and identities of models without references that keep them alive."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from gockpt.errors import OptionsError, UsageError
from gockpt.options import Options
from gockpt.state.naming import bare_module

__all__ = [
    "Model",
    "anchors",
    "checked_every",
    "checked_extra",
    "checked_options",
    "checked_step",
    "model_ids",
    "modules",
    "reference",
]

Model = torch.nn.Module | Sequence[torch.nn.Module] | Mapping[str, torch.Tensor]


def reference(model: Model) -> Callable[[], Any]:
    """Return a function that returns the model while it is alive; modules are referenced weakly."""
    if isinstance(model, torch.nn.Module):
        return weakref.ref(model)
    if isinstance(model, Mapping):
        return lambda: model
    modules = [weakref.ref(m) for m in model]

    def get() -> list[torch.nn.Module] | None:
        alive = [m for ref in modules if (m := ref()) is not None]
        return alive if len(alive) == len(modules) else None

    return get


def modules(model: Model) -> list[torch.nn.Module]:
    """Return the modules of a model; a mapping has none."""
    if isinstance(model, torch.nn.Module):
        return [model]
    return [] if isinstance(model, Mapping) else list(model)


def anchors(model: Model | None) -> frozenset[int]:
    """Return the ids that identify a living model, also inside another wrapper or mapping."""
    if model is None:
        return frozenset()
    if isinstance(model, Mapping):
        return frozenset(id(tensor) for tensor in model.values())
    return frozenset(id(bare_module(module)) for module in modules(model))


def model_ids(model: Model) -> tuple[int, ...]:
    """Return the ids of a model, or raise ``UsageError``. Mappings share one id: calls may pass new ones."""
    if isinstance(model, Mapping):
        return ()
    if isinstance(model, torch.nn.Module):
        return (id(model),)
    if isinstance(model, Sequence) and model and all(isinstance(m, torch.nn.Module) for m in model):
        return tuple(id(m) for m in model)
    msg = (
        f"model is a {type(model).__name__}; pass a torch.nn.Module, a non-empty list of modules, "
        "or a mapping of names to tensors"
    )
    raise UsageError(msg)


def checked_extra(extra: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return a copy of the extras, or raise ``UsageError``."""
    if extra is None:
        return None
    if not isinstance(extra, Mapping):
        msg = f"extra is a {type(extra).__name__}; pass a mapping of names to values"
        raise UsageError(msg)
    return dict(extra)


def checked_options(options: Options | None) -> Options:
    """Return the options, or the defaults, or raise ``OptionsError``."""
    if options is None:
        return Options()
    if not isinstance(options, Options):
        msg = f"options is a {type(options).__name__}; pass gockpt.Options(...)"
        raise OptionsError(msg)
    return options


def checked_step(step: int | None) -> int | None:
    """Return the step as an ``int``, or raise ``UsageError``."""
    if step is None:
        return None
    # Integers of NumPy and torch are accepted; True and 3.0 are not.
    if hasattr(step, "__index__") and not isinstance(step, bool) and 0 <= operator.index(step) < 1 << 62:
        return operator.index(step)
    msg = f"step={step!r}: expected a whole number from 0 up, or None to count calls"
    raise UsageError(msg)


def checked_every(every: int | str | None, options: Options) -> int | Literal["auto"] | None:
    """Return the interval if the options allow it, or raise ``OptionsError``."""
    if every == "auto":
        return "auto"
    if every is not None and (type(every) is not int or every < 1):
        msg = f'every={every!r}: expected None (save at each call), a whole number from 1 up, or "auto"'
        raise OptionsError(msg)
    if options.window != "auto" and options.window > 1 and (every is None or every < options.window):
        msg = (
            f"a window of {options.window} steps needs every >= {options.window}, got every={every}; "
            "call save_overlapped in each iteration with a larger every, or use window=1"
        )
        raise OptionsError(msg)
    return every
