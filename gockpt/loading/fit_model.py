"""Comparison of a model's saved tensors with its live ones, and the array that fills each of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gockpt.core.array_spec import public_name
from gockpt.loading.fit_subclass import inner_names, inner_targets
from gockpt.state.known_classes import class_name
from gockpt.state.saved_document import SavedSubclass
from gockpt.state.tensors import NAME_OF, is_subclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from gockpt.core.array_spec import ArraySpec
    from gockpt.state.live_state import LiveState
    from gockpt.state.saved_document import SavedState

__all__ = [
    "Assign",
    "Fill",
    "ModelFit",
    "differing",
    "fills_for",
    "fit_mapping",
    "saved_names",
    "shaped",
]


@dataclass(frozen=True, slots=True)
class Fill:
    """Overwrite live memory with an array.

    Attributes:
        source: Public name of the stored array.
        target: A live tensor of its shape and dtype.
        name: Its live name, for messages.
    """

    source: str
    target: torch.Tensor
    name: str


@dataclass(frozen=True, slots=True)
class Assign:
    """Copy a tensor that a module's hook made into live memory.

    Attributes:
        value: The tensor.
        target: A live tensor of its shape.
        name: Its live name, for messages.
    """

    value: torch.Tensor
    target: torch.Tensor
    name: str


@dataclass(slots=True)
class ModelFit:
    """Result of comparing a model, or one of several, with a checkpoint.

    Attributes:
        fills: Live tensors and the arrays that fill them.
        assigns: The same for values that modules' own hooks made.
        missing: Live names that the checkpoint lacks.
        unexpected: Names in the checkpoint that have no live counterpart.
        mismatched: Names that both have, with differences.
        unfit: Live tensors that get no saved value, by ``id`` or public name.
        taken: Number of saved entries that are loaded, or may be.
        refused: Errors raised by modules' own code; a load stops at them.
    """

    fills: list[Fill] = field(default_factory=list)
    assigns: list[Assign] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    unfit: set[int | str] = field(default_factory=set)
    taken: int = 0
    refused: list[str] = field(default_factory=list)


def differing(spec: ArraySpec, target: torch.Tensor) -> str | None:
    """Return how a saved array differs from a live tensor; ``None`` if it can be read into it."""
    same_shape = spec.shape == tuple(target.shape) or (spec.shape == (1,) and target.dim() == 0)
    if same_shape and spec.dtype == NAME_OF.get(target.dtype):
        return None
    live = NAME_OF.get(target.dtype, str(target.dtype))
    return f"saved {spec.dtype} {spec.shape}, live {live} {tuple(target.shape)}"


def fills_for(
    source: str,
    saved: ArraySpec | SavedSubclass,
    target: torch.Tensor,
    name: str,
    arrays: Mapping[str, ArraySpec],
) -> list[Fill] | str:
    """Return the fills of a live tensor, or how it differs from the saved one.

    Args:
        source: Public name of the saved tensor.
        saved: An array, or a tensor subclass.
        target: The live tensor.
        name: Its name, for messages.
        arrays: Every stored array by public name.
    """
    if isinstance(saved, SavedSubclass):
        targets = inner_targets(saved, target, arrays, name)
        return targets if isinstance(targets, str) else [Fill(*each) for each in targets]
    if is_subclass(target):
        kind = class_name(type(target))
        return f"saved an ordinary array, live a {kind}: load before the model is converted, or convert anew"
    return differing(saved, target) or [Fill(source, shaped(target, saved.shape), name)]


def shaped(target: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a live tensor, as a view of shape ``(1,)`` if its only element was saved so."""
    return target.detach().view(1) if target.dim() == 0 and shape == (1,) else target


def saved_names(saved: SavedState, arrays: Mapping[str, ArraySpec]) -> list[str]:
    """Return the public name of every entry of the saved model."""
    inside = set(inner_names(saved.subclasses))
    names = [name for name, spec in arrays.items() if spec.name[0] == "model" and len(spec.name) == 2]
    names += [name for name in saved.aliases if name.startswith("model/") and name not in inside]
    names += [f"model/{fqn}" for fqn in saved.computed]
    names += [name for name in saved.subclasses if name.startswith("model/")]
    return list(dict.fromkeys(names))


def fit_mapping(live: LiveState, saved: SavedState, arrays: Mapping[str, ArraySpec]) -> ModelFit:
    """Return the fit of a model given as a ``{name: tensor}`` mapping, each name by itself."""
    found = ModelFit()
    names = saved_names(saved, arrays)
    there = set(names)
    ties: dict[str, list[str]] = {}
    for alias, tied_to in live.aliases.items():
        if alias.startswith("model/"):
            ties.setdefault(tied_to, []).append(alias)
    taken: set[str] = set()
    found_there: dict[str, ArraySpec | SavedSubclass] = {**arrays, **saved.subclasses}
    for name, tensor in live.tensors().items():
        if name[0] != "model":
            continue
        public = public_name(name)
        every = [public, *ties.get(public, ())]
        taken.update(every)
        sources = {one: saved.aliases.get(one, one) for one in every if one in there}
        sources = {one: source for one, source in sources.items() if source in found_there}
        found.missing += [one for one in every if one not in sources]
        several = set(sources.values())
        if len(several) > 1:
            found.mismatched.append(f"{' and '.join(every)}: one live tensor, saved as separate ones")
        elif several:
            source = several.pop()
            fills = fills_for(source, found_there[source], tensor, public, arrays)
            if not isinstance(fills, str):
                found.fills += fills
                found.taken += 1
                continue
            found.mismatched.append(f"{public}: {fills}")
        found.unfit.add(public)
    found.unexpected = [name for name in names if name not in taken]
    return found
