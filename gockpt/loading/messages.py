"""Messages of a load: mismatches, changes made before an error, and state that was not restored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gockpt.catalog import steps
from gockpt.core.shortened import shortened
from gockpt.errors import GockptError, StateMismatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gockpt.loading.fit_model import ModelFit
    from gockpt.state.saved_document import SavedState
    from gockpt.storage.object_store.client import Where

__all__ = ["PREVIOUS", "Changed", "mismatch", "not_asked_for", "nothing_fits", "some"]

SHOWN = 8
"""Names listed in a message before it counts the rest."""

PREVIOUS = 'pass on_damage="previous" for the newest that verifies'


def some(names: Sequence[str]) -> str:
    """Return the first names of a list, and the number of the others."""
    return shortened(names, SHOWN)


@dataclass(slots=True)
class Changed:
    """Objects that a load has changed so far.

    Attributes:
        extras: Extras that were given their values; the last one may have raised.
        modules: Modules whose own loading code ran, or began to.
        tensors: Tensors that were overwritten, or begun to be.
        optimizers: Optimizers that were given their state, or begun to be.
    """

    extras: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)
    optimizers: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.extras or self.modules or self.tensors or self.optimizers)

    def note(self, path: Where, step: int, in_model: int) -> str:
        """Return a note for the error that ended the load."""
        if not self.modules and not self.tensors and not self.optimizers:
            return (
                "the model and the optimizers are as they were. "
                f"Extras that were given their state, or began to take it: {some(self.extras)}"
            )
        parts = []
        if self.tensors:
            count = f"{len(self.tensors)} tensors had been overwritten ({some(self.tensors)})"
            parts.append(f"{count}, of {in_model} in the model")
        if self.modules:
            parts.append(f"loading code of modules had run, or begun to: {some(self.modules)}")
        if self.optimizers:
            parts.append(f"optimizers had been given state, or begun to be: {some(self.optimizers)}")
        if self.extras:
            parts.append(f"extras had been restored: {some(self.extras)}")
        try:
            others = [str(number) for number in steps(path) if number != step]
        except GockptError:
            others = []
        older = f"load another step ({some(others)})" if others else "no other step is there to load"
        older += f", or {PREVIOUS}" if others else ""
        return (
            f"{'; '.join(parts)}: the objects are part old, part loaded. Before training goes on, {older}, "
            "or build them again"
        )


def mismatch(step: int, found: ModelFit, *, changed: bool, optimizer_alone: bool) -> StateMismatch:
    """Return the error that lists every mismatch.

    Args:
        step: The checkpoint's step.
        found: The missing, unexpected and mismatched names.
        changed: Whether objects were changed before that was known; a note then lists them.
        optimizer_alone: Whether an optimizer is loaded without its model.
    """
    parts = []
    if found.missing:
        parts.append(f"{len(found.missing)} missing in the checkpoint: {some(found.missing)}")
    if found.unexpected:
        parts.append(f"{len(found.unexpected)} only in the checkpoint: {some(found.unexpected)}")
    if found.mismatched:
        parts.append(f"{len(found.mismatched)} different: {some(found.mismatched)}")
    hint = "load into objects built as the saved ones were, or load what fits with strict=False"
    if optimizer_alone:
        hint = "pass the model as well: its names tell the optimizer's parameters apart"
    so_far = "" if changed else ", and nothing was changed"
    return _error(
        f"the checkpoint of step {step} does not fit{so_far}. {'. '.join(parts)}. What now: {hint}", found
    )


def nothing_fits(step: int, found: ModelFit, *, changed: bool) -> StateMismatch:
    """Return the error for a model without a single entry that fits, with ``strict=False``."""
    so_far = "" if changed else ", and nothing was changed"
    there = some(found.unexpected or found.mismatched) or "nothing"
    here = some(found.missing) or "the same names"
    msg = (
        f"no entry of the model fits the checkpoint of step {step}, even with strict=False{so_far}. The "
        f"checkpoint has {there}; the model expects {here}. What now: compare the names: one side may have "
        "a prefix that the other lacks"
    )
    return _error(msg, found)


def _error(msg: str, found: ModelFit) -> StateMismatch:
    return StateMismatch(
        msg,
        missing=tuple(found.missing),
        unexpected=tuple(found.unexpected),
        mismatched=tuple(found.mismatched),
    )


def not_asked_for(saved: SavedState, extras: Sequence[str], *, with_optimizer: bool) -> str | None:
    """Return the names in a checkpoint that a load was not asked to restore; ``None`` if there are none.

    Args:
        saved: The state document.
        extras: Names of the requested extras.
        with_optimizer: Whether optimizers were requested.
    """
    left = [f"extra {name!r}" for name in saved.extra if name not in extras]
    where = "; values of extras are in the result's .extra" if left else ""
    if not with_optimizer:
        left += [f"optimizer {i} ({each.kind.rpartition('.')[2]})" for i, each in enumerate(saved.optimizers)]
    return f"{some(left)}{where}" if left else None
