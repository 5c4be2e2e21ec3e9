"""Checks of users' arguments, and identities of models without references that keep them alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from gockpt.errors import OptionsError, UsageError
from gockpt.options import Options
from gockpt.state.naming import MODEL_FORMS, bare_module, models_of

__all__ = [
    "Model",
    "anchors",
    "checked_every",
    "checked_options",
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
    parts = models_of(model)
    if not parts:
        msg = f"model={model!r} has nothing to save; pass {MODEL_FORMS}"
        raise UsageError(msg)
    return tuple(id(part) for _, part in parts)


def checked_options(options: Options | None) -> Options:
    """Return the options, or the defaults, or raise ``OptionsError``."""
    if options is None:
        return Options()
    if not isinstance(options, Options):
        msg = f"options is a {type(options).__name__}; pass gockpt.Options(...)"
        raise OptionsError(msg)
    return options


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
