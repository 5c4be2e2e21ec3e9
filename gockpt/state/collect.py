"""Tensors of a model and its optimizers that a save stores, by name.

:func:`collect` runs at each save's start and close, because any of them may have been replaced in between
(``load_state_dict``, late optimizer state, unfrozen layers). Nothing is copied: entries are the live tensors,
or detached aliases of those that require gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gockpt.core.array_spec import public_name
from gockpt.errors import UnsupportedState
from gockpt.once import warn_once
from gockpt.state.known_classes import class_name
from gockpt.state.live_state import (
    Computed,
    GroupEntry,
    LiveState,
    OptimizerEntry,
    ParamEntry,
    Subclassed,
    WrapperEntry,
)
from gockpt.state.naming import loading_entries, model_state, parameter_names
from gockpt.state.optimizer_forms import states_in_form
from gockpt.state.optimizers import check_wrapper, find_optimizers, has_own_protocol, wrapper_protocol
from gockpt.state.parameters_outside import check_outside, remember_held
from gockpt.state.tensor_subclasses import Flattened, Inner, check_rebuild, context_text, flatten
from gockpt.state.tensors import is_subclass, refusal
from gockpt.state.value_encoder import is_ordinary_key

if TYPE_CHECKING:
    from gockpt.core.array_spec import Name

__all__ = ["collect"]


def collect(model: Any, optimizers: Any, *, loading: bool = False) -> LiveState:
    """Return the state to save. Copies no tensor and changes nothing.

    Args:
        model: A module, a list of modules, a ``{name: tensor}`` mapping, or ``None``.
        optimizers: An optimizer, several of them, or ``None``; optimizers inside wrappers are found.
        loading: Whether the state is collected for a load: tensors of a module that can't be saved yet
            (uninitialised ones) are then left to the module, and code that only saving needs doesn't run.

    Raises:
        UsageError: If an argument is of another kind, or an optimizer trains tensors that the model no
            longer holds (``load_state_dict(assign=True)``).
        UnsupportedState: If a tensor has no exact form as an array; names it and the way out.
    """
    collector = _Collector()
    if loading:
        entries = loading_entries(model, with_optimizer=optimizers is not None)
    else:
        entries, collector.metadata = model_state(model)
    collector.keys = [entry.fqn for entry in entries]
    # Subclasses last: their inner tensors may be tied to ordinary ones, but not these to them.
    for entry in sorted(entries, key=lambda entry: is_subclass(entry.value)):
        if loading and entry.kind != "computed" and not isinstance(model, Mapping) and refusal(entry.value):
            collector.model_names.setdefault(id(entry.value), ("model", entry.fqn))
            continue
        if entry.kind == "computed":
            collector.computed[entry.fqn] = Computed(entry.value, entry.model, entry.key)
            continue
        name = collector.add(("model", entry.fqn), entry.value)
        collector.model_names.setdefault(id(entry.value), name)
        if entry.kind == "buffer":
            collector.buffers.update(collector.arrays_of(name))
    found = find_optimizers(optimizers)
    collector.optimizers = found.optimizers
    for index, live in enumerate(collector.optimizers):
        collector.add_optimizer(model, index, live, loading=loading)
    for wrapper, inside in found.wrappers:
        if not loading:
            check_wrapper(wrapper, inside)
        indices = tuple(at for at, live in enumerate(found.optimizers) if any(live is one for one in inside))
        own = all(wrapper_protocol(wrapper, inside))
        collector.wrappers.append(WrapperEntry(wrapper, class_name(type(wrapper)), indices, own))
    if collector.outside:
        check_outside(model, entries, collector.params, collector.outside, collector.optimizers)
    return collector.result()


@dataclass(slots=True)
class _Collector:
    entries: dict[Name, torch.Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: set[Name] = field(default_factory=set)
    params: list[ParamEntry] = field(default_factory=list)
    optimizers: list[Any] = field(default_factory=list)
    trained: list[OptimizerEntry] = field(default_factory=list)
    computed: dict[str, Computed] = field(default_factory=dict)
    # The entry of each model tensor, by id; and, once needed, names of parameters that are no entries.
    model_names: dict[int, Name] = field(default_factory=dict)
    registered: dict[int, str] | None = None
    outside: list[ParamEntry] = field(default_factory=list)
    owners: set[str] = field(default_factory=set)
    metadata: dict[str, Any] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    wrappers: list[WrapperEntry] = field(default_factory=list)
    # Entries by the address of their first element.
    by_address: dict[int, list[Name]] = field(default_factory=dict)
    subclassed: dict[Name, Subclassed] = field(default_factory=dict)
    # Entries that are inner tensors of subclasses.
    inside: set[Name] = field(default_factory=set)
    # Names of subclasses by the tensor's id, and by their inner tensors.
    subclass_names: dict[int | tuple[object, ...], Name] = field(default_factory=dict)

    def add(self, name: Name, tensor: torch.Tensor, *, inner: bool = False) -> Name:
        """Enter a live tensor; return the name of the entry that holds it, which differs if it is tied.

        An inner tensor of a subclass may be tied to any entry; only inner tensors may be tied to one.
        """
        if is_subclass(tensor):
            return self.add_subclass(name, flatten(tensor, public_name(name)))
        if why := refusal(tensor):
            msg = f"{public_name(name)} can't be saved: {why}"
            raise UnsupportedState(msg)
        known = self.held(tensor, inner=inner)
        if known is not None:
            self.aliases[public_name(name)] = public_name(known)
            return known
        self.entries[name] = tensor.detach() if tensor.requires_grad else tensor
        if tensor.numel():
            self.by_address.setdefault(tensor.data_ptr(), []).append(name)
        return name

    def add_subclass(self, name: Name, flat: Flattened) -> Name:
        """Enter the inner tensors of a subclass; return its name, which differs if it is tied."""
        known = self.find_subclass(flat)
        if known is not None:
            self.aliases[public_name(name)] = public_name(known)
            return known
        arrays = {inner: self.add((*name, *inner), leaf, inner=True) for inner, leaf in flat.leaves()}
        self.inside.update(array for array in arrays.values() if array[: len(name)] == name)
        self.subclassed[name] = Subclassed(flat, arrays)
        self.subclass_names[id(flat.tensor)] = name
        self.subclass_names[_parts_key(flat, arrays)] = name
        return name

    def find_subclass(self, flat: Flattened) -> Name | None:
        """Return the name of an entered subclass that is the same object, or has the same inner tensors."""
        known = self.subclass_names.get(id(flat.tensor))
        if known is not None:
            return known
        arrays = {inner: self.held(leaf, inner=True) for inner, leaf in flat.leaves()}
        return None if None in arrays.values() else self.subclass_names.get(_parts_key(flat, arrays))

    def arrays_of(self, name: Name) -> tuple[Name, ...]:
        known = self.subclassed.get(name)
        return (name,) if known is None else tuple(known.arrays.values())

    def find(self, tensor: torch.Tensor) -> Name | None:
        """Return the entry or subclass with exactly this memory; ``None`` if the tensor can't be saved."""
        if not is_subclass(tensor):
            return self.held(tensor) if refusal(tensor) is None else None
        try:
            return self.find_subclass(flatten(tensor, "it"))
        except UnsupportedState:  # raised again, with its name, when it is added
            return None

    def held(self, tensor: torch.Tensor, *, inner: bool = False) -> Name | None:
        """Return the entry that holds exactly this memory in this geometry, for an ordinary tensor."""
        if not tensor.numel():
            return None
        for name in self.by_address.get(tensor.data_ptr(), ()):
            if name in self.inside and not inner:
                continue
            other = self.entries[name]
            if (
                other.shape == tensor.shape
                and other.stride() == tensor.stride()
                and other.dtype == tensor.dtype
                and other.device == tensor.device
            ):
                return name
        return None

    def add_optimizer(self, model: Any, index: int, optimizer: Any, *, loading: bool) -> None:
        kind = type(optimizer)
        own = has_own_protocol(optimizer)
        states: frozenset[Any] | None = None
        if own:
            states = frozenset() if loading else states_in_form(optimizer)
        groups: list[GroupEntry] = []
        used: set[str] = set()
        ids: set[int] = set()
        for g, group in enumerate(optimizer.param_groups):
            params = []
            for i, param in enumerate(group["params"]):
                ids.add(id(param))
                given = group.get("param_names")
                fallback = given[i] if given else f"{f'optimizer{index}.' if index else ''}group{g}.param{i}"
                params.append(self.parameter(model, optimizer, param, fallback, used, index, g, states))
            groups.append(GroupEntry(group, params))
            self.params += params
        remember_held(model, optimizer, [param for group in groups for param in group.params])
        values = {}
        for key, value in optimizer.state.items():
            if not isinstance(key, torch.Tensor):
                values[key] = value
            elif id(key) not in ids and not own:
                warn_once(
                    ("stale", kind.__qualname__),
                    "%s keeps state for a tensor outside its param groups; that state is not saved",
                    kind.__qualname__,
                )
        self.trained.append(OptimizerEntry(optimizer, class_name(type(optimizer)), groups, values, own))

    def parameter(
        self,
        model: Any,
        optimizer: Any,
        param: torch.Tensor,
        fallback: str,
        used: set[str],
        index: int,
        group: int,
        states: frozenset[Any] | None,
    ) -> ParamEntry:
        known = self.model_names.get(id(param))
        if known is None:
            known = self.find(param)
        fqn = known[1] if known and known[0] == "model" else self.registered_name(model, param)
        outside = fqn is None
        if fqn is None:
            fqn = _unused(fallback, {*used, *(name[1] for name in self.model_names.values())})
        fqn = _unused(fqn, used)
        used.add(fqn)
        owner = _unused(fqn, self.owners)
        self.owners.add(owner)
        name = known or self.add(("optimizer", owner, "param"), param)
        self.buffers.difference_update(self.arrays_of(name))
        raw = optimizer.state.get(param)
        state: dict[str, torch.Tensor] = {}
        state_names: dict[str, Name] = {}
        if isinstance(raw, Mapping):
            for key, value in raw.items():
                if (
                    isinstance(value, torch.Tensor)
                    and is_ordinary_key(key)
                    and (states is None or key in states)
                ):
                    state[key] = value
                    state_names[key] = self.add_state(("optimizer", owner, key), value)
        entry = ParamEntry(fqn, param, index, group, state, name, state_names, owner, raw)
        if outside:
            self.outside.append(entry)
        return entry

    def registered_name(self, model: Any, param: torch.Tensor) -> str | None:
        """Return the name of a parameter that the model registers, but leaves out of its state dict."""
        if self.registered is None:
            self.registered = parameter_names(model)
        return self.registered.get(id(param))

    def add_state(self, name: Name, value: torch.Tensor) -> Name:
        """Enter a tensor of an optimizer's state; a load may have to rebuild it."""
        while name in self.entries or name in self.subclassed:
            name = (*name[:-1], f"{name[-1]}~")
        if not is_subclass(value):
            return self.add(name, value)
        flat = flatten(value, public_name(name))
        check_rebuild(flat, public_name(name))
        return self.add_subclass(name, flat)

    def result(self) -> LiveState:
        described = (self.params, self.trained)
        return LiveState(
            self.entries,
            self.aliases,
            self.buffers,
            self.optimizers,
            lambda: described,
            self.computed,
            self.metadata,
            self.keys,
            self.subclassed,
            self.inside,
            self.wrappers,
        )


def _unused(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    number = 1
    while f"{name}~{number}" in taken:
        number += 1
    return f"{name}~{number}"


def _parts_key(flat: Flattened, arrays: Mapping[Inner, Name | None]) -> tuple[object, ...]:
    return (flat.kind, tuple(flat.tensor.shape), context_text(flat.context), *sorted(arrays.items()))
