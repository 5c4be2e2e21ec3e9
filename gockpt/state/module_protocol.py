"""Detection of modules with saving or loading code of their own.

torch saves a module through ``state_dict``, ``_save_to_state_dict`` and their hooks, and loads it through
``load_state_dict``, ``_load_from_state_dict`` and theirs. If all of these are torch's defaults, a load may
write straight into the tensors; otherwise the module's own code has to run.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from gockpt.errors import UnsupportedState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "NORMS_VERSION",
    "Loading",
    "accepts_strict",
    "check_classes",
    "loading_of",
    "loads_itself",
    "names_itself",
    "own_state_dict",
    "post_hooks",
    "pre_hooks",
    "saves_by_default",
    "sets_extra_state",
]

_LOAD_DEFAULT = nn.Module._load_from_state_dict  # noqa: SLF001 - the protocol of torch, which has no public name
_LOAD_OF_NORMS = (_NormBase._load_from_state_dict, _InstanceNorm._load_from_state_dict)  # noqa: SLF001
NORMS_VERSION = 2
"""Since this version, the norms' own loading changes nothing about what was saved."""

_SAVE_DEFAULTS = (nn.Module._save_to_state_dict, LazyModuleMixin._save_to_state_dict)  # noqa: SLF001

_LOAD_ARGUMENTS: tuple[Any, ...] = ("state", "prefix", {}, True, [], [], [])


class Loading(Enum):
    """Way in which one module, without its submodules, loads its part of a state dict.

    Attributes:
        DEFAULT: torch's default: each tensor by its name.
        HOOKS: The same, after pre-hooks that may have changed the state dict.
        OWN: A ``_load_from_state_dict`` of its own.
    """

    DEFAULT = "default"
    HOOKS = "hooks"
    OWN = "own"


def loading_of(module: nn.Module, metadata: Mapping[str, Any]) -> Loading:
    """Return how a module loads its part of a state dict.

    Args:
        module: The module; its submodules are ignored.
        metadata: Its saved ``local_metadata``: some classes convert older versions only.
    """
    method = getattr(module._load_from_state_dict, "__func__", None)  # noqa: SLF001
    if method is not _LOAD_DEFAULT:
        version = metadata.get("version")
        if method not in _LOAD_OF_NORMS or type(version) is not int or version < NORMS_VERSION:
            return Loading.OWN
    return Loading.HOOKS if pre_hooks(module) else Loading.DEFAULT


def sets_extra_state(module: nn.Module) -> bool:
    """Whether a module can load the result of its ``get_extra_state``."""
    return getattr(type(module), "set_extra_state", None) is not nn.Module.set_extra_state


def pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Return a module's pre-hooks of loading, without those by which torch's wrappers rename keys."""
    hooks = module._load_state_dict_pre_hooks.values()  # noqa: SLF001
    return [hook for hook in hooks if not _renames_for_wrapper(hook)]


def post_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Return a module's post-hooks of loading."""
    return list(module._load_state_dict_post_hooks.values())  # noqa: SLF001


def _renames_for_wrapper(hook: Any) -> bool:
    function = getattr(hook, "hook", hook)
    return (
        getattr(function, "__module__", None) == "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"
    )


def loads_itself(module: nn.Module) -> bool:
    """Whether ``load_state_dict`` of the whole model is overridden."""
    return getattr(module.load_state_dict, "__func__", None) is not nn.Module.load_state_dict


def accepts_strict(method: Callable[..., Any]) -> bool:
    """Whether an overridden ``load_state_dict`` takes the keyword ``strict``."""
    return _accepts(method, {}, strict=False)


def names_itself(module: nn.Module) -> bool:
    """Whether the state dict of a model may have other entries than its parameters and buffers."""
    return any(
        getattr(part.state_dict, "__func__", None) is not nn.Module.state_dict
        or getattr(part._save_to_state_dict, "__func__", None) not in _SAVE_DEFAULTS  # noqa: SLF001
        or part._state_dict_hooks  # noqa: SLF001
        or part._state_dict_pre_hooks  # noqa: SLF001
        for part in module.modules()
    )


def saves_by_default(module: nn.Module) -> bool:
    """Whether the state dict of a module, without its submodules, is its parameters and buffers, by name."""
    return (
        getattr(module.state_dict, "__func__", None) is nn.Module.state_dict
        and getattr(module._save_to_state_dict, "__func__", None) is nn.Module._save_to_state_dict  # noqa: SLF001
        and type(module).get_extra_state is nn.Module.get_extra_state
        and not module._state_dict_hooks  # noqa: SLF001
        and not module._state_dict_pre_hooks  # noqa: SLF001
    )


def own_state_dict(module: nn.Module) -> Mapping[str, Any]:
    """Return ``module.state_dict()``, with live tensors if its signature accepts ``keep_vars``.

    Raises:
        UnsupportedState: If it needs arguments, or doesn't return a dict of names; names class and method.
    """
    method = module.state_dict
    if getattr(method, "__func__", None) is nn.Module.state_dict or _accepts(method, keep_vars=True):
        state = method(keep_vars=True)
    elif _accepts(method):
        # Live memory is then recognised by its storage.
        state = method()
    else:
        _refuse(type(module), "state_dict", "takes arguments that nobody passes; let it work without any")
    if not isinstance(state, Mapping):
        _refuse(
            type(module), "state_dict", f"returned a {type(state).__name__}; let it return a dict of names"
        )
    for key in state:
        if not isinstance(key, str):
            _refuse(type(module), "state_dict", f"has the key {key!r}; let all keys be text")
    return state


_fitting: WeakSet[type] = WeakSet()


def check_classes(module: nn.Module, kinds: Iterable[type]) -> None:
    """Refuse a model whose state could be saved, but not loaded the way torch does it.

    Args:
        module: The whole model.
        kinds: The class of every module in it.

    Raises:
        UnsupportedState: If there is one; names the class, the method and the missing part.
    """
    for kind in kinds:
        if kind in _fitting:
            continue
        asked = _accepts(kind.state_dict, None, destination={}, prefix="", keep_vars=True)  # type: ignore[attr-defined]
        if not asked and kind is not type(module):
            what = "can't be called inside a model: let it accept destination, prefix and keep_vars"
            _refuse(kind, "state_dict", what)
        if not _accepts(kind._load_from_state_dict, None, *_LOAD_ARGUMENTS):  # type: ignore[attr-defined] # noqa: SLF001
            what = "can't be called by a load: let it take the arguments of torch.nn.Module's"
            _refuse(kind, "_load_from_state_dict", what)
        if kind is not type(module):
            _fitting.add(kind)
    if loads_itself(module) and not _accepts(module.load_state_dict, {}):
        what = "can't be called with a state dict alone: let its other arguments have defaults"
        _refuse(type(module), "load_state_dict", what)


def _accepts(method: Callable[..., Any], *arguments: Any, **named: Any) -> bool:
    signature = _signature(getattr(method, "__func__", method))
    if signature is None:
        return True
    if hasattr(method, "__func__"):
        arguments = (None, *arguments)
    try:
        signature.bind(*arguments, **named)
    except TypeError:
        return False
    return True


@lru_cache(maxsize=256)
def _signature(function: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _refuse(kind: type, method: str, why: str) -> Any:
    msg = f"{kind.__module__}.{kind.__qualname__}.{method}() {why}"
    raise UnsupportedState(msg)
