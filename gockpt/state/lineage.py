"""Lineage of live models: the checkpoint a model was loaded from, and the run it is saved as."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from gockpt.state.naming import bare_module, models_of

if TYPE_CHECKING:
    from gockpt.core.runs import Run

__all__ = ["Origin", "note_run", "origin_of", "remember", "run_of", "runs_of_process"]

_origins: WeakIdKeyDictionary = WeakIdKeyDictionary()
_saved: WeakIdKeyDictionary = WeakIdKeyDictionary()
_of_process: dict[int, dict[str, Run]] = {}


@dataclass(frozen=True, slots=True)
class Origin:
    """Checkpoint that a model's state was loaded from.

    Attributes:
        step: The checkpoint's step.
        optimizer_steps: Optimizer updates that its run had seen.
        seq: Its place in the order of publications.
        path: The directory it was published in, links resolved; or the URL it was uploaded to.
        run: The training run that wrote it.
    """

    step: int
    optimizer_steps: int
    seq: int
    path: str
    run: Run


def origin_of(model: Any) -> Origin | None:
    """Return the origin of the checkpoint last loaded into this very model; ``None`` if none was."""
    return cast("Origin | None", _noted(_origins, model))


def remember(model: Any, origin: Origin) -> None:
    """Note that ``model`` holds the state of a checkpoint from now on."""
    for anchor in _anchors(model):
        _origins[anchor] = origin
        _saved.pop(anchor, None)  # type: ignore[no-untyped-call]


def run_of(model: Any) -> Run | None:
    """Return the run as which this very model was saved since it was loaded; ``None`` if it wasn't."""
    return cast("Run | None", _noted(_saved, model))


def note_run(model: Any, run: Run) -> None:
    """Note that ``model`` is saved as part of a run, in this process."""
    for anchor in _anchors(model):
        _saved[anchor] = run
    _of_process.setdefault(os.getpid(), {})[run.id] = run


def runs_of_process() -> dict[str, Run]:
    """Return the runs that this process has saved, by id; a forked child has none of its parent's."""
    return dict(_of_process.get(os.getpid(), {}))


def _noted(table: WeakIdKeyDictionary, model: Any) -> object:
    """Return a table's value for a model, or ``None``."""
    entries = (table.get(anchor) for anchor in _anchors(model))  # type: ignore[no-untyped-call]
    return next((entry for entry in entries if entry is not None), None)


def _anchors(model: Any) -> list[Any]:
    """Return the objects that identify a model, also inside another wrapper."""
    anchors: list[Any] = []
    for _, part in models_of(model):
        anchors += [bare_module(part)] if isinstance(part, nn.Module) else part.values()
    return anchors
