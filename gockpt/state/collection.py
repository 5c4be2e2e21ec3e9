"""Repeated collection of one model's live state: what follows from its layout is kept in between.

A training loop saves the same tensors again and again. :class:`Collection` compares all of them with those of
the last collection: their number, names, kinds, geometry, dtypes and devices, and what is tied to what. While
these are equal, only what holds tensors is made anew. Tensors, modules and optimizers are never kept.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from gockpt.state.collect import collect
from gockpt.state.known_classes import class_name
from gockpt.state.live_state import GroupEntry, LiveState, OptimizerEntry, ParamEntry
from gockpt.state.module_protocol import check_classes, saves_by_default
from gockpt.state.naming import models_of
from gockpt.state.optimizers import find_optimizers, has_own_protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from gockpt.core.array_spec import Name

__all__ = ["Collection"]

_ORDINARY = {torch.Tensor, nn.Parameter}
_GEOMETRY: tuple[Callable[[torch.Tensor], object], ...] = (
    *(torch.Tensor.stride, torch.Tensor.is_conj, torch.Tensor.is_neg),
    *(vars(torch._C.TensorBase)[name].__get__ for name in ("shape", "dtype", "device")),  # noqa: SLF001
)


class Collection:
    """The collections of one model and its optimizers, one after the other.

    Promise: each returns what :func:`gockpt.state.collect.collect` would, or raises what it would.
    """

    def __init__(self) -> None:
        self._layout: _Layout | None = None

    def collect(self, model: Any, optimizers: Any) -> LiveState:
        """Return the state to save. Copies no tensor and changes nothing."""
        seen = _look(model, optimizers)
        if seen is not None and self._layout is not None and self._layout.fits(seen):
            for module, kinds in seen.modules:
                check_classes(module, {*kinds})
            return self._layout.state_of(seen)
        self._layout = None
        live = collect(model, optimizers)
        if seen is not None:
            self._layout = _layout_of(live, seen)
        return live


@dataclass(slots=True)
class _Seen:
    """Tensors of a model and its optimizers as they are found at one moment, in a fixed order.

    Attributes:
        modules: Each module given, with the classes of all modules in it.
        keys: Names of the model's tensors.
        buffers: Whether each of them is a buffer.
        values: The tensors.
        versions: Versions of the modules' state.
        optimizers: The optimizers.
        sizes: Numbers of parameters in the groups of each.
        params: The parameters of all groups.
        owners: Parameters that have state.
        owned: How many of these there are up to the end of each optimizer.
        raws: Their state.
        held: Tensors of their state, one after the other.
        gaps: Positions of ``None`` among the values of their state.
    """

    modules: list[tuple[nn.Module, list[type]]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    buffers: list[bool] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    optimizers: list[Any] = field(default_factory=list)
    sizes: list[list[int]] = field(default_factory=list)
    params: list[torch.Tensor] = field(default_factory=list)
    owners: list[torch.Tensor] = field(default_factory=list)
    owned: list[int] = field(default_factory=list)
    raws: list[dict[str, Any]] = field(default_factory=list)
    held: list[torch.Tensor] = field(default_factory=list)
    gaps: list[int] = field(default_factory=list)

    @property
    def classes(self) -> list[object]:
        """Classes of all modules, and identities of the optimizers."""
        return [*(kinds for _, kinds in self.modules), *map(type, self.optimizers), *map(id, self.optimizers)]

    def see_module(self, module: nn.Module, prefix: str) -> bool:
        """Add the tensors of a module; return whether all of them are saved by torch's default."""
        kinds: list[type] = []
        self.modules.append((module, kinds))
        for name, part in module.named_modules(remove_duplicate=False):
            if not saves_by_default(part):
                return False
            kinds.append(type(part))
            self.versions.append(part._version)  # noqa: SLF001 - part of the protocol of state dicts
            above = f"{prefix}{name}." if name else prefix
            for key, value in part._parameters.items():  # noqa: SLF001
                if value is not None:
                    self.keys.append(above + key)
                    self.values.append(value)
            self.buffers += [False] * (len(self.values) - len(self.buffers))
            if part._buffers:  # noqa: SLF001
                left_out = part._non_persistent_buffers_set  # noqa: SLF001
                for key, value in part._buffers.items():  # noqa: SLF001
                    if value is not None and key not in left_out:
                        self.keys.append(above + key)
                        self.values.append(value)
                self.buffers += [True] * (len(self.values) - len(self.buffers))
        return True

    def see_optimizer(self, optimizer: Any) -> bool:
        """Add the tensors of an optimizer; return whether all of it is saved by torch's default."""
        if not isinstance(optimizer, Optimizer) or has_own_protocol(optimizer):
            return False
        groups = [group["params"] for group in optimizer.param_groups]
        self.optimizers.append(optimizer)
        self.sizes.append([*map(len, groups)])
        self.params += chain.from_iterable(groups)
        self.owners += optimizer.state
        self.raws += optimizer.state.values()
        self.owned.append(len(self.raws))
        return True

    def see_states(self) -> bool:
        """Add the tensors of the optimizers' state; return whether there is nothing else in it."""
        if not {dict}.issuperset(map(type, self.raws)):
            return False
        values: list[Any] = [*chain.from_iterable(map(dict.values, self.raws))]
        self.gaps = [at for at, value in enumerate(values) if value is None]
        self.held = [value for value in values if value is not None] if self.gaps else values
        return _ORDINARY.issuperset(map(type, chain(self.values, self.params, self.owners, self.held)))


def _look(model: Any, optimizers: Any) -> _Seen | None:
    """Return what a model and its optimizers consist of; ``None`` if code of their own decides that."""
    seen = _Seen()
    for prefix, part in models_of(model):
        if not isinstance(part, nn.Module) or not seen.see_module(part, prefix):
            return None
    found = find_optimizers(optimizers)
    if found.wrappers or not all(map(seen.see_optimizer, found.optimizers)):
        return None
    return seen if seen.see_states() else None


@dataclass(frozen=True, slots=True)
class _Param:
    """One parameter in one optimizer, without its tensors: see :class:`ParamEntry`.

    ``raw`` is the index of its state among all of them; ``None`` if it has none.
    """

    fqn: str
    optimizer_index: int
    group_index: int
    name: Name
    state_names: dict[str, Name]
    owner: str
    raw: int | None


@dataclass(frozen=True, slots=True)
class _Layout:
    """The layout of a live state: all of it but the tensors.

    Attributes:
        plain: What must be equal, of :class:`_Seen`: keys, kinds, classes, versions, sizes.
        state_keys: Keys of each parameter's state.
        param_ids: Identity of each parameter.
        param_at: Where each parameter is among the model's tensors.
        owner_at: Where each one with state is among the parameters.
        geometry: Of each tensor of the model, then of the state: shape, strides, dtype and so on.
        solid: Positions of tensors that are not empty; ``None`` if all are.
        tied: The number of each one's address: equal for those at the same.
        names: Names of the entries.
        entry_at: Where each is among the tensors.
        params: The parameters.
    """

    plain: tuple[object, ...]
    state_keys: list[tuple[str, ...]]
    param_ids: list[int]
    param_at: list[int]
    owner_at: list[int]
    geometry: list[list[object]]
    solid: list[int] | None
    tied: list[int]
    names: list[Name]
    entry_at: list[int]
    params: list[_Param]
    aliases: dict[str, str]
    buffers: set[Name]
    metadata: dict[str, Any]
    keys: list[str]
    kept: dict[Hashable, Any]

    def fits(self, seen: _Seen) -> bool:
        """Whether a collection of what was seen would give a state of this layout."""
        if _plain(seen) != self.plain or [*map(id, seen.params)] != self.param_ids:
            return False
        if len(seen.raws) != len(self.state_keys):
            return False
        tensors = seen.values + seen.held
        if len(tensors) != len(self.geometry[0]):
            return False
        try:
            return (
                all(map(operator.eq, map(tuple, seen.raws), self.state_keys))
                and all(map(operator.is_, seen.params, map(seen.values.__getitem__, self.param_at)))
                and all(map(operator.is_, seen.owners, map(seen.params.__getitem__, self.owner_at)))
                and all(
                    all(map(operator.eq, map(of, tensors), column))
                    for of, column in zip(_GEOMETRY, self.geometry, strict=True)
                )
                and _tied(tensors, self.solid) == self.tied
            )
        except (RuntimeError, NotImplementedError):  # such as a tensor without memory of its own
            return False

    def state_of(self, seen: _Seen) -> LiveState:
        """Return the state that what was seen is; it fits."""
        tensors = seen.values + seen.held
        entries = {
            name: tensor.detach() if (tensor := tensors[at]).requires_grad else tensor
            for name, at in zip(self.names, self.entry_at, strict=True)
        }
        return LiveState(
            entries,
            self.aliases,
            self.buffers,
            seen.optimizers,
            lambda: self._described(seen),
            metadata=self.metadata,
            keys=self.keys,
            kept=self.kept,
        )

    def _described(self, seen: _Seen) -> tuple[list[ParamEntry], list[OptimizerEntry]]:
        params = [
            ParamEntry(
                p.fqn,
                param,
                p.optimizer_index,
                p.group_index,
                {} if p.raw is None else {key: seen.raws[p.raw][key] for key in p.state_names},
                p.name,
                p.state_names,
                p.owner,
                None if p.raw is None else seen.raws[p.raw],
            )
            for p, param in zip(self.params, seen.params, strict=True)
        ]
        trained = []
        left = iter(params)
        for optimizer, sizes in zip(seen.optimizers, seen.sizes, strict=True):
            groups = [
                GroupEntry(group, [next(left) for _ in range(size)])
                for group, size in zip(optimizer.param_groups, sizes, strict=True)
            ]
            trained.append(OptimizerEntry(optimizer, class_name(type(optimizer)), groups, {}))
        return params, trained


def _plain(seen: _Seen) -> tuple[object, ...]:
    return (seen.keys, seen.buffers, seen.classes, seen.versions, seen.sizes, seen.owned, seen.gaps)


def _tied(tensors: list[torch.Tensor], solid: list[int] | None) -> list[int] | None:
    """Return the number of its address for each tensor that is not empty; ``None`` if one has no memory."""
    chosen: Iterable[torch.Tensor] = tensors if solid is None else map(tensors.__getitem__, solid)
    first: dict[int, int] = {}
    numbers = [first.setdefault(address, len(first)) for address in map(torch.Tensor.data_ptr, chosen)]
    return None if 0 in first else numbers


def _layout_of(live: LiveState, seen: _Seen) -> _Layout | None:
    """Return the layout of a state that was collected of what was seen; ``None`` if it is not ordinary."""
    tensors = seen.values + seen.held
    values = {id(value): at for at, value in reversed([*enumerate(seen.values)])}
    held = {id(value): at for at, value in enumerate(seen.held, len(seen.values))}
    owner_at = _places_of_owners(seen)
    ordinary = (
        not live.computed
        and not live.subclassed
        and len(live.keys) == len(seen.keys)
        and len(live.params) == len(seen.params)
        and values.keys() >= {id(param) for param in seen.params}
        # Not so if some have keys that can't be part of a name.
        and sum(len(entry.state_names) for entry in live.params) == len(seen.held)
    )
    if not ordinary or owner_at is None:
        return None
    place_of: dict[Name, int] = {}
    for at, fqn in enumerate(live.keys):
        place_of.setdefault(("model", fqn), at)
    for entry in live.params:
        for key, name in entry.state_names.items():
            place_of.setdefault(name, held[id(entry.state[key])])
    entry_at = [place_of.get(name, -1) for name in live.entries]
    if -1 in entry_at or any(
        tensors[at].data_ptr() != entry.data_ptr()
        for at, entry in zip(entry_at, live.entries.values(), strict=True)
    ):
        return None
    solid = None if all(t.numel() for t in tensors) else [at for at, t in enumerate(tensors) if t.numel()]
    tied = _tied(tensors, solid)
    if tied is None:
        return None
    raw_of = {at: raw for raw, at in enumerate(owner_at)}
    alike: dict[Any, Any] = {}  # equal ones are kept once
    return _Layout(
        plain=_plain(seen),
        state_keys=[alike.setdefault(keys, keys) for keys in map(tuple, seen.raws)],
        param_ids=[*map(id, seen.params)],
        param_at=[values[id(param)] for param in seen.params],
        owner_at=owner_at,
        geometry=[[alike.setdefault((of, found), found) for found in map(of, tensors)] for of in _GEOMETRY],
        solid=solid,
        tied=tied,
        names=[*live.entries],
        entry_at=entry_at,
        params=[
            _Param(p.fqn, p.optimizer_index, p.group_index, p.name, p.state_names, p.owner, raw_of.get(at))
            for at, p in enumerate(live.params)
        ],
        aliases=live.aliases,
        buffers=live.buffers,
        metadata=live.metadata,
        keys=live.keys,
        kept=live.kept,
    )


def _places_of_owners(seen: _Seen) -> list[int] | None:
    """Return where each parameter with state is among the parameters; ``None`` if one is in no group."""
    found: list[int] = []
    first_param = first_owner = 0
    for sizes, last_owner in zip(seen.sizes, seen.owned, strict=True):
        last_param = first_param + sum(sizes)
        numbers = {id(seen.params[at]): at for at in range(first_param, last_param)}
        found += [numbers.get(id(owner), -1) for owner in seen.owners[first_owner:last_owner]]
        first_param, first_owner = last_param, last_owner
    return None if -1 in found else found
