"""Saved tensor subclasses: comparison with live ones, and construction of new ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gockpt.core.array_spec import public_name
from gockpt.errors import ManifestCorrupt, StateMismatch, UnsupportedState
from gockpt.state.saved_document import SavedSubclass
from gockpt.state.tensor_subclasses import Flattened, context_text, flatten, rebuild
from gockpt.state.tensors import NAME_OF, is_subclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gockpt.core.array_spec import ArraySpec, Name

    Read = Callable[[Name], torch.Tensor]

__all__ = ["inner_names", "inner_targets", "make_subclass"]


def inner_targets(
    saved: SavedSubclass, target: torch.Tensor, arrays: Mapping[str, ArraySpec], name: str
) -> list[tuple[str, torch.Tensor, str]] | str:
    """Return the array of each inner tensor of a live subclass, or how the two differ.

    Args:
        saved: The saved subclass.
        target: The live one.
        arrays: Every stored array by public name.
        name: Its name, for messages.

    Returns:
        Public name, live inner tensor, and its name, of each; or a text that names the difference.
    """
    if not is_subclass(target):
        return f"saved a {saved.kind}, live an ordinary tensor: convert the model as it was before loading"
    try:
        flat = flatten(target, name)
    except UnsupportedState as error:
        return str(error)
    why = _differing(saved, flat, arrays)
    if why is not None:
        return why
    live = dict(flat.leaves())
    return [
        (public_name(array), live[inner].detach(), f"{name}/{'/'.join(inner)}")
        for inner, array in saved.arrays()
    ]


def _differing(saved: SavedSubclass, flat: Flattened, arrays: Mapping[str, ArraySpec]) -> str | None:
    tensor = flat.tensor
    if saved.kind != flat.kind:
        return f"saved a {saved.kind}, live a {flat.kind}"
    dtype = str(tensor.dtype).removeprefix("torch.")
    if (saved.shape, saved.dtype) != (tuple(tensor.shape), dtype):
        return f"saved {saved.dtype} {saved.shape}, live {dtype} {tuple(tensor.shape)}"
    old, new = (context_text(context, devices=False) for context in (saved.context, flat.context))
    if old != new:
        return f"saved a {saved.kind} with {old}, live one with {new}"
    if list(saved.inner) != list(flat.inner):
        return f"saved a {saved.kind} of {', '.join(saved.inner)}, live one of {', '.join(flat.inner)}"
    for attribute, part in saved.inner.items():
        other = flat.inner[attribute]
        why = None
        if isinstance(part, SavedSubclass) and isinstance(other, Flattened):
            why = _differing(part, other, arrays)
        elif isinstance(part, tuple) and isinstance(other, torch.Tensor):
            spec = arrays[public_name(part)]
            if (spec.shape, spec.dtype) != (tuple(other.shape), NAME_OF[other.dtype]):
                why = f"saved {spec.dtype} {spec.shape}, live {NAME_OF[other.dtype]} {tuple(other.shape)}"
        else:
            why = "a tensor subclass in one of them, an ordinary tensor in the other"
        if why is not None:
            return f"{attribute}: {why}"
    return None


def make_subclass(saved: SavedSubclass, read: Read, device: torch.device, name: str) -> torch.Tensor:
    """Return a new tensor of the class that was saved.

    Args:
        saved: The saved subclass.
        read: Returns an array as a new tensor on the device.
        device: Its device; replaces every device in the context.
        name: Its name, for messages.

    Raises:
        StateMismatch: If the class does not exist here, or makes a different tensor from its inner tensors.
        ManifestCorrupt: If the form of its context is unknown.
    """
    inner = {
        attribute: make_subclass(part, read, device, f"{name}/{attribute}")
        if isinstance(part, SavedSubclass)
        else read(part)
        for attribute, part in saved.inner.items()
    }
    try:
        made = rebuild(
            saved.kind,
            saved.context,
            inner,
            shape=saved.shape,
            stride=saved.stride,
            device=device,
            where=name,
        )
    except (TypeError, ValueError) as error:
        msg = f"the saved context of {name} has an unknown form: {error}"
        raise ManifestCorrupt(msg) from error
    found = flatten(made, name)
    if str(made.dtype) != f"torch.{saved.dtype}" or not _same(saved, found):
        msg = f"{name}: this version of {saved.kind} makes a different tensor from the saved parts"
        raise StateMismatch(msg, mismatched=(name,))
    return made


def _same(saved: SavedSubclass, flat: Flattened) -> bool:
    contexts = (context_text(context, devices=False) for context in (saved.context, flat.context))
    return len(set(contexts)) == 1 and [inner for inner, _ in saved.arrays()] == [
        inner for inner, _ in flat.leaves()
    ]


def inner_names(subclasses: Mapping[str, SavedSubclass]) -> Iterator[str]:
    """Yield the public name of every inner tensor of every subclass."""
    for name, saved in subclasses.items():
        for inner, _ in saved.arrays():
            yield f"{name}/{'/'.join(inner)}"
