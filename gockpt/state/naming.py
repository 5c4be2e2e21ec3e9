"""Natural names of the entries of a model's state.

Names are those of ``module.state_dict()``, without the components that wrappers add (``torch.compile``,
DDP, activation checkpointing), so that a checkpoint fits the bare and the wrapped model alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gockpt.errors import UsageError
from gockpt.once import warn_once
from gockpt.state.module_protocol import (
    NORMS_VERSION,
    Loading,
    check_classes,
    loading_of,
    loads_itself,
    names_itself,
    own_state_dict,
    sets_extra_state,
)
from gockpt.state.tensors import refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "MODEL_FORMS",
    "REPLICAS",
    "TRANSPARENT",
    "ModelEntry",
    "bare_module",
    "loading_entries",
    "model_entries",
    "model_state",
    "models_of",
    "natural_names",
    "parameter_names",
    "wrapped_child",
]

TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Attributes under which wrappers hold the module that they wrap; left out of natural names."""

MODEL_FORMS = "a torch.nn.Module, a list of modules, or a {name: tensor} mapping"
"""Forms of a model, for messages."""

REPLICAS = (DataParallel, DistributedDataParallel)
"""Wrappers that hold the model under ``module``, a name that models use as well."""


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One entry of a model's state.

    Attributes:
        fqn: Natural name, unique in a checkpoint.
        kind: ``"parameter"`` and ``"buffer"`` are live memory of the module. ``"computed"`` was made
            for the state dict (``get_extra_state``, a hook, an overridden ``_save_to_state_dict``), and
            only the module's own ``load_state_dict`` can load it.
        value: The live tensor, or the computed value.
        model: Index of the model it belongs to.
        key: Its key in that model's own ``state_dict()``.
    """

    fqn: str
    kind: Literal["parameter", "buffer", "computed"]
    value: Any
    model: int
    key: str


def models_of(model: Any) -> list[tuple[str, Any]]:
    """Return the modules and mappings that ``model`` stands for, each with its name prefix.

    Raises:
        UsageError: If it is neither a module, a list of modules, a ``{name: tensor}`` mapping nor ``None``.
    """
    if model is None:
        return []
    if isinstance(model, nn.Module):
        return [("", model)]
    if isinstance(model, Mapping):
        for name, tensor in model.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                msg = (
                    f"a model given as a mapping holds tensors by name; {name!r} is a "
                    f"{type(tensor).__name__}: pass it in extra={{...}} instead"
                )
                raise UsageError(msg)
        return [("", model)]
    if isinstance(model, (list, tuple)) and all(isinstance(part, nn.Module) for part in model):
        return [(f"{index}.", part) for index, part in enumerate(model)]
    msg = f"model is a {type(model).__module__}.{type(model).__qualname__}; pass {MODEL_FORMS}"
    raise UsageError(msg)


def bare_module(module: nn.Module) -> nn.Module:
    """Return the module inside all the wrappers around it."""
    while True:
        inner = wrapped_child(module)
        if inner is None:
            return module
        module = module._modules[inner]  # type: ignore[assignment] # noqa: SLF001


def model_entries(model: Any) -> list[ModelEntry]:
    """Return every entry of a model's ``state_dict()``, in its order.

    Raises:
        UsageError: As :func:`models_of`, and if two entries get the same natural name.
    """
    return model_state(model)[0]


def model_state(model: Any) -> tuple[list[ModelEntry], dict[str, Any]]:
    """Return every entry of a model's state, and the metadata of each of its modules by natural name.

    The metadata is that of ``state_dict()._metadata``, such as ``{"version": 2}``; empty for a mapping.

    Raises:
        UsageError: As :func:`model_entries`.
        UnsupportedState: If a module's state can't be read, or couldn't be loaded again.
    """
    entries: list[ModelEntry] = []
    metadata: dict[str, Any] = {}
    for index, (prefix, part) in enumerate(models_of(model)):
        if isinstance(part, nn.Module):
            found, of_modules = _of_module(part, prefix, index)
            entries += found
            metadata.update(of_modules)
        else:
            entries += _of_mapping(part, index)
    _check_distinct(entries)
    return entries, metadata


def loading_entries(model: Any, *, with_optimizer: bool) -> list[ModelEntry]:
    """Return the parameters and buffers that a load may fill, by natural name.

    Runs code of the modules only if ``with_optimizer`` is set and they may save their entries under other
    names than the registered ones, which optimizer state then has.

    Raises:
        UsageError: As :func:`model_entries`.
    """
    entries: list[ModelEntry] = []
    for index, (prefix, part) in enumerate(models_of(model)):
        if not isinstance(part, nn.Module):
            entries += _of_mapping(part, index)
        elif with_optimizer and names_itself(part):
            try:
                entries += _of_module(part, prefix, index)[0]
            except Exception:  # noqa: BLE001 - a model that can't be saved yet may still be loaded into
                entries += _registered(part, prefix, index)
        else:
            entries += _registered(part, prefix, index)
    _check_distinct(entries)
    return entries


def wrapped_child(module: nn.Module) -> str | None:
    """Return the attribute under which a wrapper holds its module; ``None`` if it isn't a wrapper."""
    if isinstance(module, REPLICAS):
        return "module"
    return next((name for name in TRANSPARENT if name in module._modules), None)  # noqa: SLF001


def _registered(module: nn.Module, prefix: str, model: int) -> list[ModelEntry]:
    """Return the tensors of a module's default ``state_dict()``."""
    strip = natural_names(module)
    entries: list[ModelEntry] = []
    for name, part in module.named_modules(remove_duplicate=False):
        above = f"{name}." if name else ""
        for key, value in part._parameters.items():  # noqa: SLF001
            if value is not None:
                entries.append(
                    ModelEntry(prefix + strip(above + key), "parameter", value, model, above + key)
                )
        for key, value in part._buffers.items():  # noqa: SLF001
            if value is not None and key not in part._non_persistent_buffers_set:  # noqa: SLF001
                entries.append(ModelEntry(prefix + strip(above + key), "buffer", value, model, above + key))
    return entries


def _check_distinct(entries: list[ModelEntry]) -> None:
    seen: dict[str, ModelEntry] = {}
    for entry in entries:
        if entry.fqn in seen:
            msg = (
                f"{seen[entry.fqn].key!r} and {entry.key!r} both get the name {entry.fqn!r}; "
                "rename one of these submodules"
            )
            raise UsageError(msg)
        if not entry.fqn.isascii():
            _check_unicode(entry.fqn)
        seen[entry.fqn] = entry


def parameter_names(model: Any) -> dict[int, str]:
    """Return the natural name of each registered parameter by ``id``, the first name for tied ones."""
    names: dict[int, str] = {}
    for prefix, part in models_of(model):
        if isinstance(part, nn.Module):
            strip = natural_names(part)
            for name, parameter in part.named_parameters():
                names.setdefault(id(parameter), prefix + strip(name))
    return names


def _of_mapping(tensors: Mapping[str, torch.Tensor], model: int) -> list[ModelEntry]:
    # Unless an optimizer owns them, they may change at any time: treat them as buffers.
    return [ModelEntry(name, "buffer", tensor, model, name) for name, tensor in tensors.items()]


def _of_module(
    module: nn.Module, prefix: str, model: int
) -> tuple[list[ModelEntry], dict[str, dict[str, Any]]]:
    # module.parameters() and buffers() return the same, at several times the cost.
    parameters: set[int] = set()
    buffers: set[int] = set()
    kinds: set[type] = set()
    for part in module.modules():
        kinds.add(type(part))
        parameters.update(map(id, part._parameters.values()))  # noqa: SLF001
        buffers.update(map(id, part._buffers.values()))  # noqa: SLF001
    check_classes(module, kinds)
    strip = natural_names(module)
    entries = []
    storages: tuple[set[int], set[int]] | None = None
    state = own_state_dict(module)
    for key, value in state.items():
        kind: Literal["parameter", "buffer", "computed"] = "computed"
        if id(value) in parameters:
            kind = "parameter"
        elif id(value) in buffers:
            kind = "buffer"
        elif isinstance(value, torch.Tensor):
            # A hook may hand out a view of a parameter: that is live memory as well.
            storages = storages or (_storages(module.parameters()), _storages(module.buffers()))
            place = _storage(value)
            kind = "parameter" if place in storages[0] else "buffer" if place in storages[1] else "computed"
        entries.append(ModelEntry(prefix + strip(key), kind, value, model, key))
    known = parameters | buffers
    made = [strip(entry.key) for entry in entries if id(entry.value) not in known]
    if made and (left := _unclaimed(module, made)):
        warn_once(
            ("unclaimed", type(module).__qualname__, *left),
            "the state dict of %s has keys that no module of it loads (%s): they are saved, but a load "
            "refuses them, as torch's does, unless strict=False leaves them out",
            type(module).__qualname__,
            ", ".join(left[:5]),
        )
    metadata: dict[str, dict[str, Any]] = {}
    for key, value in (getattr(state, "_metadata", None) or {}).items():
        # The wrapped module comes after its wrapper and has the same name.
        below = strip(f"{key}.x" if key else "x")
        metadata[(prefix + below.removesuffix("x")).removesuffix(".")] = value
    return entries, metadata


def _unclaimed(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the natural names of a model's own state that its ``load_state_dict`` would call unexpected.

    Names that modules with loading code of their own may load are left out.
    """
    found: list[str] = []
    for natural in [] if loads_itself(module) else names:
        part, name = module, natural
        while loading_of(part, {"version": NORMS_VERSION}) is Loading.DEFAULT:
            first, _, below = name.partition(".")
            inner = wrapped_child(part)
            if inner is not None:
                part = part._modules[inner]  # type: ignore[assignment] # noqa: SLF001
            elif below and part._modules.get(first) is not None:  # noqa: SLF001
                part, name = part._modules[first], below  # type: ignore[assignment] # noqa: SLF001
            else:
                own = name in part._parameters or name in part._buffers  # noqa: SLF001
                if not own and not (name == "_extra_state" and sets_extra_state(part)):
                    found.append(natural)
                break
    return found


def _storage(tensor: torch.Tensor) -> int | None:
    if refusal(tensor) is not None or not tensor.numel():
        return None
    return tensor.untyped_storage().data_ptr()


def _storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {place for tensor in tensors if (place := _storage(tensor)) is not None}


def natural_names(module: nn.Module) -> Callable[[str], str]:
    """Return the function that maps a module's own names to natural ones, without components of wrappers."""
    replicas = False
    wrapped = False
    for part in module.modules():
        replicas = replicas or isinstance(part, REPLICAS)
        wrapped = wrapped or any(name in part._modules for name in TRANSPARENT)  # noqa: SLF001
    prefixes: list[str] = []
    if replicas:
        prefixes = [
            f"{name}.module." if name else "module."
            for name, part in module.named_modules(remove_duplicate=False)
            if isinstance(part, REPLICAS)
        ]
        prefixes.sort(key=len, reverse=True)

    def strip(key: str) -> str:
        for prefix in prefixes:
            if key.startswith(prefix):
                key = prefix.removesuffix("module.") + key.removeprefix(prefix)
        if wrapped:
            key = ".".join(part for part in key.split(".") if part not in TRANSPARENT)
        return key

    return strip


def _check_unicode(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        msg = f"the name {name!r} is not valid Unicode; rename that tensor"
        raise UsageError(msg) from error
