"""Which checkpoint a model's state came from, remembered beside the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from gockpt.naming import bare_module, models_of

__all__ = ["Origin", "origin_of", "remember"]

_origins: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, slots=True)
class Origin:
    """Which checkpoint a model's state came from.

    Attributes:
        step: Its step.
        optimizer_steps: Optimizer updates its run had seen.
        seq: Its place in the order of publications.
        path: The directory it was published in, links resolved; or the URL it was uploaded to.
    """

    step: int
    optimizer_steps: int
    seq: int
    path: str


def origin_of(model: Any) -> Origin | None:
    """Return what was last loaded into this very model; ``None`` if nothing was."""
    for anchor in _anchors(model):
        found = _origins.get(anchor)  # type: ignore[no-untyped-call]
        if found is not None:
            return cast("Origin", found)
    return None


def remember(model: Any, origin: Origin) -> None:
    """Note that ``model`` holds the state of a checkpoint from now on."""
    for anchor in _anchors(model):
        _origins[anchor] = origin


def _anchors(model: Any) -> list[Any]:
    """Return the objects by which a model is known again, also inside another wrapper."""
    anchors: list[Any] = []
    for _, part in models_of(model):
        anchors += [bare_module(part)] if isinstance(part, nn.Module) else part.values()
    return anchors
