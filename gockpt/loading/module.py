"""A model's part of a load, in the order and with the calls of ``torch.nn.Module.load_state_dict``.

Tensors that torch's default would copy are planned as :class:`~gockpt.loading.fit_model.Fill`, to be read
straight into the live tensors. Modules' own code gets the saved state as a :class:`StoredStateDict`, one
submodule at a time. Names are natural ones, without the components that wrappers add.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gockpt.errors import StateMismatch
from gockpt.loading.fit_model import Assign, Fill, ModelFit, shaped
from gockpt.loading.stored_state_dict import Stored, StoredStateDict, saved_entries, saved_metadata
from gockpt.state.module_protocol import (
    Loading,
    accepts_strict,
    loading_of,
    loads_itself,
    post_hooks,
    pre_hooks,
    sets_extra_state,
)
from gockpt.state.naming import loading_entries, model_entries, models_of, wrapped_child
from gockpt.state.tensors import is_subclass, refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gockpt.core.array_spec import ArraySpec
    from gockpt.loading.stored_state_dict import BytesOf, Read
    from gockpt.state.saved_document import SavedState

__all__ = ["ModuleRestore", "module_restores"]

_OF_TORCH = (
    "size mismatch for ",
    "While copying the parameter named ",
    "While swapping the parameter named ",
)
"""Beginnings of torch's messages about single tensors; with ``strict=False`` those are ignored."""

EXTRA_STATE = "_extra_state"
"""The key of ``get_extra_state()``, after a module's prefix."""


def module_restores(
    model: Any, saved: SavedState, arrays: Mapping[str, ArraySpec], read: Read, bytes_of: BytesOf
) -> list[ModuleRestore]:
    """Return the load of each module of a model; none for a mapping.

    Raises:
        ManifestCorrupt: If a saved value is not in a known form.
    """
    parts = [(prefix, part) for prefix, part in models_of(model) if isinstance(part, nn.Module)]
    if not parts:
        return []
    entries = saved_entries(saved, arrays, read, bytes_of)
    metadata = saved_metadata(saved, read)
    restores = [ModuleRestore(part, prefix, entries, metadata) for prefix, part in parts]
    if not any(restore.prefix == "" for restore in restores):
        # With a list of modules, names of no module go to the first one, as unexpected ones.
        known = tuple(restore.prefix for restore in restores)
        restores[0].strays = [key for key in entries if not key.startswith(known)]
    return restores


class ModuleRestore:
    """The load of one module with all its submodules.

    Attributes:
        module: The module as given, with its wrappers.
        prefix: The prefix of its saved names.
        strays: Saved names outside its prefix that belong to no other module.
    """

    def __init__(
        self,
        module: nn.Module,
        prefix: str,
        entries: Mapping[str, Stored | Any],
        metadata: Mapping[str, Any] | None,
    ) -> None:
        self.module = module
        self.prefix = prefix
        self.strays: list[str] = []
        self._devices = _devices(module)
        self._state = StoredStateDict()
        for key, value in entries.items():
            if key.startswith(prefix):
                name = key.removeprefix(prefix)
                self._state[name] = self._placed(name, value)
        self._metadata = _below(metadata, prefix) if metadata is not None else _live_metadata(module)
        self._state._metadata = self._metadata  # type: ignore[attr-defined] # noqa: SLF001 - where torch has it
        self._visit = _Visit(self._metadata, run_code=False)

    def _placed(self, name: str, value: Any) -> Any:
        """Return a stored value that is read to the device of the live tensor of its name."""
        device = self._devices.get(name, self._devices[""])
        if not isinstance(value, Stored) or device.type == "cpu":
            return value
        return replace(value, read=lambda: value.read().to(device), bytes_of=None)

    def check(self) -> ModelFit:
        """Compare the part that no module's own code can change; runs no such code and changes nothing."""
        if loads_itself(self.module):
            self._visit.opaque(self.module, self._state, "")
        else:
            self._visit.visit(self.module, self._state.copy(), "")
        return self._fit()

    @property
    def runs_code(self) -> bool:
        """Whether :meth:`run` runs code of the modules' own (known after :meth:`check`)."""
        return self._visit.undecided

    @property
    def asks_after(self) -> bool:
        """Whether post-hooks may still change the missing and unexpected names."""
        return bool(self._visit.hooked)

    def run(self, *, strict: bool, ran: list[str], fill: Callable[[Fill], None]) -> ModelFit:
        """Run the modules' own loading code except post-hooks; return the tensors that are left to fill.

        Args:
            strict: The argument of an overridden ``load_state_dict``.
            ran: Gets the name and class of each module whose code runs, before it does.
            fill: Overwrites one live tensor at once, for a module that needs it before its code runs.

        Raises:
            StateMismatch: If an overridden ``load_state_dict`` of the whole model raises.
        """
        if not self.runs_code:
            return self._fit()
        self._visit = _Visit(self._metadata, run_code=True, fill=self._named(fill), ran=ran)
        if loads_itself(self.module):
            self._run_override(strict=strict)
        else:
            self._visit.visit(self.module, self._state.copy(), "")
        return self._fit()

    def _named(self, fill: Callable[[Fill], None]) -> Callable[[Fill], None]:
        above = f"model/{self.prefix}"
        return lambda each: fill(Fill(each.source, each.target, above + each.name))

    def finish(self, *, ran: list[str]) -> tuple[list[str], list[str]]:
        """Run the post-hooks; return the final missing and unexpected names."""
        for module in self._visit.hooked:
            ran.append(f"hooks after loading of {_class(module)}")
            known = torch.nn.modules.module._IncompatibleKeys(self._visit.missing, self._visit.unexpected)  # noqa: SLF001 - what torch passes
            for hook in post_hooks(module):
                if hook(module, known) is not None:
                    msg = f"a load_state_dict post-hook of {_class(module)} returned a value, not None"
                    raise AssertionError(msg)
        found = self._fit()
        return found.missing, found.unexpected

    def _run_override(self, *, strict: bool) -> None:
        state = StoredStateDict()
        keys = _own_keys(self.module)
        for name in self._state:
            state[keys.get(name, name)] = self._state.raw(name)
        state._metadata = self._metadata  # type: ignore[attr-defined] # noqa: SLF001 - where torch has it
        self._visit.ran.append(f"{_class(self.module)}.load_state_dict")
        arguments = {"strict": strict} if accepts_strict(self.module.load_state_dict) else {}
        try:
            result = self.module.load_state_dict(state, **arguments)
        except RuntimeError as error:
            if not str(error).startswith("Error(s) in loading state_dict"):
                raise
            msg = f"{_class(self.module)}.load_state_dict refused: {error}"
            raise StateMismatch(msg, mismatched=(str(error),)) from error
        self._visit.missing += getattr(result, "missing_keys", None) or []
        self._visit.unexpected += getattr(result, "unexpected_keys", None) or []
        self._visit.taken = len(state)

    def _fit(self) -> ModelFit:
        visit = self._visit
        above = f"model/{self.prefix}"
        fills, split = _by_memory([Fill(fill.source, fill.target, above + fill.name) for fill in visit.fills])
        separate = "one live tensor, saved as separate ones"
        return ModelFit(
            fills=fills,
            assigns=[Assign(each.value, each.target, above + each.name) for each in visit.assigns],
            missing=[above + name for name in dict.fromkeys(visit.missing)],
            unexpected=[
                *(above + name for name in dict.fromkeys(visit.unexpected)),
                *(f"model/{name}" for name in self.strays),
            ],
            mismatched=[
                *(above + text for text in visit.mismatched),
                *visit.errors,
                *(f"{' and '.join(fill.name for fill in same)}: {separate}" for same in split),
            ],
            unfit=visit.unfit | {id(fill.target) for same in split for fill in same},
            taken=visit.taken,
            refused=[text for text in visit.errors if not text.startswith(_OF_TORCH)],
        )


def _plan_only(_: Fill) -> None:
    """Leave a tensor as it is."""


@dataclass(slots=True)
class _Visit:
    """One walk through a module, in torch's order.

    Attributes:
        metadata: The saved metadata of each module, by name.
        run_code: Whether to run the modules' own code; otherwise the names it loads stay undecided.
        fill: Overwrites one live tensor at once.
        ran: Names and classes of modules whose code ran.
        fills: Tensors to be read into live ones.
        assigns: Tensors made by hooks, to be copied into live ones.
        missing: torch's list, passed to modules' own code.
        unexpected: torch's list, passed to modules' own code.
        errors: torch's list, passed to modules' own code.
        mismatched: Tensors that differ in shape or dtype.
        unfit: By ``id``, live tensors that get no saved value.
        taken: Number of saved names that are loaded, or may be.
        undecided: Whether modules have code of their own.
        hooked: Modules with post-hooks, in the order in which these run.
    """

    metadata: Mapping[str, Any]
    run_code: bool
    fill: Callable[[Fill], None] = _plan_only
    ran: list[str] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)
    assigns: list[Assign] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    unfit: set[int | str] = field(default_factory=set)
    taken: int = 0
    undecided: bool = False
    hooked: list[nn.Module] = field(default_factory=list)

    def visit(self, module: nn.Module, state: StoredStateDict, prefix: str) -> None:
        metadata = dict(self.metadata.get(prefix[:-1], {}))
        loading = loading_of(module, metadata)
        if loading is not Loading.DEFAULT:
            self.undecided = True
            if not self.run_code:
                self.opaque(module, state, prefix)
                return
            self.ran.append(f"{prefix[:-1] or 'the model'} ({_class(module)})")
        arguments = (state, prefix, metadata, True, self.missing, self.unexpected, self.errors)
        inner = wrapped_child(module)
        if loading is Loading.OWN:
            self.taken += len(state)
            module._load_from_state_dict(*arguments)  # noqa: SLF001 - the protocol of torch
        else:
            for hook in pre_hooks(module) if loading is Loading.HOOKS else ():
                hook(*arguments)
            self.take(module, state, prefix, wraps=inner is not None)
            if sets_extra_state(module):
                self.extra_state(module, state, prefix)
        for name, child in module._modules.items():  # noqa: SLF001 - what torch goes through
            if child is None:
                continue
            if name == inner:
                self.visit(child, _within_wrapper(module, name, state, prefix), prefix)
            else:
                below = f"{prefix}{name}."
                self.visit(child, state.where(lambda key, below=below: key.startswith(below)), below)  # type: ignore[misc]
        if post_hooks(module):
            self.undecided = True
            self.hooked.append(module)

    def opaque(self, module: nn.Module, state: StoredStateDict, prefix: str) -> None:
        """Leave the names of a module and its submodules undecided; note tensors that certainly don't fit."""
        self.undecided = True
        self.taken += len(state)
        self.hooked += [part for part in module.modules() if post_hooks(part)]
        for entry in loading_entries(module, with_optimizer=False):
            key = prefix + entry.fqn
            takes_any = torch.nn.parameter.is_lazy(entry.value)
            raw = state.raw(key) if key in state and not takes_any else None
            if isinstance(raw, Stored) and isinstance(raw.fills(entry.value, key), str):
                self.unfit.add(id(entry.value))

    def take(self, module: nn.Module, state: StoredStateDict, prefix: str, *, wraps: bool) -> None:
        """Plan torch's default for one module's own tensors, and find unexpected names."""
        own = _own_tensors(module)
        for name, target in own.items():
            key = prefix + name
            if key in state:
                self.put(key, state.raw(key), target)
            else:
                self.missing.append(key)
                self.unfit.add(id(target))
        if wraps:
            return  # the wrapped module's keys look like its own; that module finds unexpected ones
        taken = prefix + EXTRA_STATE if sets_extra_state(module) else None
        for key in state:
            if key.startswith(prefix) and key != taken:
                first, below, _ = key[len(prefix) :].partition(".")
                if first not in (module._modules if below else own):  # noqa: SLF001
                    self.unexpected.append(key)

    def extra_state(self, module: nn.Module, state: StoredStateDict, prefix: str) -> None:
        """Give a module its extra state after filling its own tensors, as torch does."""
        key = prefix + EXTRA_STATE
        self.undecided = True
        if key not in state:
            self.missing.append(key)
            return
        self.taken += 1
        if not self.run_code:
            return
        self.ran.append(f"{prefix[:-1] or 'the model'} ({_class(module)})")
        own = _own_tensors(module)
        known = {id(value) for value in own.values()}
        inner = tuple(f"{prefix}{name}/" for name, value in own.items() if is_subclass(value))
        for fill in [f for f in self.fills if id(f.target) in known or f.name.startswith(inner)]:
            self.fill(fill)
            self.fills.remove(fill)
        module.set_extra_state(state[key])

    def put(self, key: str, value: Any, target: torch.Tensor) -> None:
        """Plan to overwrite one live tensor, or note how it differs."""
        if isinstance(value, Stored):
            why = None if is_subclass(target) else refusal(target)
            fills = why or value.fills(target, key)
            if isinstance(fills, str):
                why = fills
            else:
                self.fills += fills
        elif not isinstance(value, torch.Tensor):
            why = f"saved a {type(value).__name__}, live a tensor of shape {tuple(target.shape)}"
        elif value.shape != target.shape and not (target.dim() == 0 and value.shape == (1,)):
            why = f"saved {tuple(value.shape)}, live {tuple(target.shape)}"
        else:
            why = None
            self.assigns.append(Assign(value, shaped(target, tuple(value.shape)), key))
        if why is None:
            self.taken += 1
        else:
            self.mismatched.append(f"{key}: {why}")
            self.unfit.add(id(target))


def _own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return a module's own parameters and persistent buffers by their names in it."""
    left_out = module._non_persistent_buffers_set  # noqa: SLF001 - what torch looks at
    every = [*module._parameters.items(), *module._buffers.items()]  # noqa: SLF001
    return {name: value for name, value in every if value is not None and name not in left_out}


def _within_wrapper(module: nn.Module, inner: str, state: StoredStateDict, prefix: str) -> StoredStateDict:
    """Return the part of a state dict that belongs to the module inside a wrapper, which shares its names."""
    own = {*module._parameters, *module._buffers}  # noqa: SLF001
    others = {name for name in module._modules if name != inner}  # noqa: SLF001
    if not own and not others:
        return state

    def wanted(key: str) -> bool:
        first, below, _ = key[len(prefix) :].partition(".")
        return first not in (others if below else own)

    return state.where(wanted)


def _by_memory(fills: list[Fill]) -> tuple[list[Fill], list[list[Fill]]]:
    """Return the fills with each tied tensor once, and the tied ones that were saved as separate ones."""
    together: dict[Any, list[Fill]] = {}
    for index, fill in enumerate(fills):
        together.setdefault(_place(fill.target) if fill.target.numel() else index, []).append(fill)
    sources = [(same, len({fill.source for fill in same})) for same in together.values()]
    return [same[0] for same, number in sources if number == 1], [s for s, number in sources if number > 1]


def _place(target: torch.Tensor) -> tuple[Any, ...]:
    return (target.data_ptr(), tuple(target.shape), target.stride(), target.dtype, target.device)


def _class(module: nn.Module) -> str:
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def _own_keys(module: nn.Module) -> dict[str, str]:
    """Return a model's own key of each natural name, if its state dict can be read."""
    try:
        return {entry.fqn: entry.key for entry in model_entries(module)}
    except Exception:  # noqa: BLE001 - a module that can't be saved yet may still be loaded into
        return {}


def _devices(module: nn.Module) -> dict[str, torch.device]:
    """Return the device of each live tensor, by natural name; ``""`` stands for all others."""
    entries = loading_entries(module, with_optimizer=False)
    found = {entry.fqn: entry.value.device for entry in entries if not entry.value.is_meta}
    return {"": next(iter(found.values()), torch.device("cpu")), **found}


def _below(metadata: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the metadata of a module and its submodules, by names relative to it."""
    if not prefix:
        return dict(metadata)
    found = {"": metadata[prefix[:-1]]} if prefix[:-1] in metadata else {}
    found.update({k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)})
    return found


def _live_metadata(module: nn.Module) -> dict[str, Any]:
    """Return the current metadata of the modules' classes, for checkpoints that hold none."""
    found: dict[str, Any] = {}

    def walk(part: nn.Module, prefix: str) -> None:
        found[prefix[:-1]] = {"version": part._version}  # noqa: SLF001 - what torch saves
        inner = wrapped_child(part)
        for name, child in part._modules.items():  # noqa: SLF001
            if child is not None:
                walk(child, prefix if name == inner else f"{prefix}{name}.")

    walk(module, "")
    return found
