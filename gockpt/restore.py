"""Loading a checkpoint into live objects, in place.

Promise: after :func:`load` the objects hold bit for bit what was saved, or it raised. Names, shapes,
dtypes and groups are compared, and everything but the tensors' bytes is read and decoded, before
anything is changed. Bytes go straight into the live memory and are verified as they come: should one
block be damaged, the error says what had been overwritten by then.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from gockpt import rng as generators
from gockpt.errors import CheckpointCorrupt, CheckpointPruned, GockptError, StateMismatch, UsageError
from gockpt.fallback import newest_whole
from gockpt.filling import Filler
from gockpt.fitting import fit
from gockpt.lineage import Origin, remember
from gockpt.naming import models_of
from gockpt.optimizer_restore import OptimizerRestore, OptionsReport
from gockpt.overview import Metadata, checked_step, metadata_of, state_of, steps
from gockpt.state import collect
from gockpt.storage.listing import open_checkpoint
from gockpt.tensors import may_alias_itself
from gockpt.unplain import decode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gockpt.fallback import PassedOver
    from gockpt.fitting import Plan
    from gockpt.saved_state import SavedState
    from gockpt.state import LiveState
    from gockpt.storage.objects import Where
    from gockpt.storage.reader import StoredCheckpoint

    Model = nn.Module | Sequence[nn.Module] | Mapping[str, torch.Tensor] | None
    Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None

__all__ = ["Restored", "load"]

TRIES = 3
"""How often the newest checkpoint may be pruned between its opening and the end of the load."""

SHOWN = 8
"""Names listed in a message before it counts the rest."""

PREVIOUS = 'pass on_damage="previous" for the newest that verifies'

_log = logging.getLogger("gockpt")


@dataclass(frozen=True, slots=True)
class Restored:
    """What a load brought back.

    Attributes:
        step: The user's step that was saved.
        optimizer_steps: Optimizer updates that the saved run had seen.
        extra: The plain value of every saved extra, by name.
        missing: Live names that the checkpoint lacks; left as they were. Empty with ``strict=True``.
        unexpected: Names in the checkpoint that nothing live takes. Empty with ``strict=True``.
        mismatched: What differs in shape, dtype or grouping; left as it was. Empty with ``strict=True``.
        options_new: Options of param groups that were set though the live group did not have them.
        options_kept: Options of live param groups that the checkpoint lacks; left as they were.
        rng_absent: Saved random generators that this machine does not have, such as ``"cuda:3"``.
        metadata: Everything else that is known about the checkpoint.
        passed_over: With ``on_damage="previous"``: damaged checkpoints that were not loaded, each with
            ``step``, ``path`` and ``why``.
    """

    step: int
    optimizer_steps: int
    extra: dict[str, Any]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    options_new: tuple[str, ...]
    options_kept: tuple[str, ...]
    rng_absent: tuple[str, ...]
    metadata: Metadata
    passed_over: tuple[PassedOver, ...] = ()


def load(
    path: Where,
    model: Model,
    optimizer: Optimizers = None,
    *,
    step: int | None = None,
    strict: bool = True,
    extra: Mapping[str, Any] | None = None,
    rng: bool = True,
    on_damage: Literal["raise", "previous"] = "raise",
) -> Restored:
    """Load a checkpoint into a model, its optimizers and extras, in place and bit for bit.

    Args:
        path: Where checkpoints are saved or uploaded to, or one checkpoint's own directory or URL.
        model: A module, a list of modules, or a ``{name: tensor}`` mapping; their memory is overwritten.
        optimizer: One optimizer or several; ``None`` loads the model alone.
        step: The wanted step; ``None`` for the newest (published last, whatever its step).
        strict: Whether everything has to fit. With ``False``, what fits by name, shape and dtype is
            loaded, all else is left as it is and reported. Nothing is ever cast or reshaped.
        extra: Objects by name to restore with their ``load_state_dict``, or functions to call with
            the saved value.
        rng: Whether to set the random generators; done last.
        on_damage: ``"raise"``, or ``"previous"``: read all of the newest first, compare it with what was
            written, and take the one before if it is damaged, and so on; ``passed_over`` and a WARNING say
            so. Takes a second reading, and no ``step``.

    Returns:
        The step, the plain values of all extras, and what did not fit.

    Raises:
        StateMismatch: If something doesn't fit; nothing was changed.
        CheckpointNotFound: If there is no complete checkpoint, or none of that step.
        NotACheckpoint: If the path is a file, or a directory that gockpt didn't write.
        CheckpointCorrupt: If the checkpoint is damaged; a note says what had been overwritten.
        UsageError: If an argument is of no usable kind.
    """
    wanted = checked_step(step)
    if on_damage not in ("raise", "previous") or (on_damage == "previous" and step is not None):
        msg = (
            f'on_damage={on_damage!r} with step={step!r}: expected "raise", or "previous" without a step, '
            "which chooses the step itself"
        )
        raise UsageError(msg)
    for attempt in range(1, TRIES + 1):
        try:
            if on_damage == "previous":
                stored, passed_over = newest_whole(path)
            else:
                stored, passed_over = open_checkpoint(path, wanted), ()
            with stored:
                load_into = _Load(path, stored, model, optimizer, strict=strict, extra=extra, rng=rng)
                restored = load_into.run()
            if not restored.metadata.exact:
                why = restored.metadata.deviation or "metadata.inexact names the tensors"
                _log.warning("loaded step %d, which is not exact: %s", restored.step, why)
            if passed_over:
                _log.warning("loaded step %d; passed over: %s", restored.step, _some(_steps_of(passed_over)))
            return dataclasses.replace(restored, passed_over=passed_over)
        except CheckpointPruned as error:
            # Its note says that something was overwritten: another checkpoint might not cover all of that.
            if wanted is not None or attempt == TRIES or getattr(error, "__notes__", None):
                raise
        except CheckpointCorrupt as error:
            if not getattr(error, "__notes__", None) and on_damage == "raise":
                error.add_note(f"nothing was changed. What now: load another step, or {PREVIOUS}")
            raise
    raise AssertionError  # pragma: no cover - the last attempt returned or raised


def _home(path: str) -> str:
    """Return where a checkpoint was published: the directory or URL above its own."""
    return path.rpartition("/")[0] if "://" in path else str(Path(os.path.realpath(path)).parent)


class _Load:
    """One load under way."""

    def __init__(
        self,
        path: Where,
        stored: StoredCheckpoint,
        model: Any,
        optimizer: Any,
        *,
        strict: bool,
        extra: Mapping[str, Any] | None,
        rng: bool,
    ) -> None:
        self.path = path
        self.stored = stored
        self.model = model
        self.optimizer = optimizer
        self.strict = strict
        self.wanted_extras = _checked_extras(extra)
        self.rng = rng
        self.filler = Filler(stored)
        self.options = OptionsReport()

    def run(self) -> Restored:
        saved = state_of(self.stored)
        live = collect(self.model, self.optimizer)
        arrays = {name: array.spec for name, array in self.stored.arrays.items()}
        plan = fit(
            live, saved, arrays, with_model=self.model is not None, with_optimizer=self.optimizer is not None
        )
        plan.missing += [f"extra/{name}" for name in self.wanted_extras if name not in saved.extra]
        if self.strict and (plan.missing or plan.unexpected or plan.mismatched):
            raise self.mismatch(plan)

        # All that can fail for its content is read before anything is changed.
        read = self.filler.read
        extras = {name: decode(document, read) for name, document in saved.extra.items()}
        states = decode(saved.rng, read) if self.rng and saved.rng is not None else None
        if states is not None:
            generators.check(states)
        computed = {fqn: decode(document, read) for fqn, document in plan.computed.items()}
        self.filler.stage(plan.fills)
        optimizers = [OptimizerRestore(part, self.filler) for part in plan.optimizers]

        at_once = [part for each in optimizers if not each.replaces_states for part in each.arrays()]
        try:
            self.filler.fill_many([*plan.fills, *at_once])
            for fill in plan.fills:
                self.filler.fill(fill)
            for part, restore in zip(plan.optimizers, optimizers, strict=True):
                restore.apply(live.optimizers[part.index], self.options)
            self.apply_computed(live, computed)
            for name, target in self.wanted_extras.items():
                if name in extras:
                    # A copy, so that .extra stays as saved whatever the object does with its own.
                    _hand_over(target, copy.deepcopy(extras[name]))
            absent = generators.restore(states) if states is not None else ()
        except BaseException as error:
            if self.filler.overwritten:
                error.add_note(self.half_loaded(plan))
            raise
        home = _home(self.stored.path)
        origin = Origin(self.stored.step, saved.optimizer_steps, self.stored.seq, home)
        remember(self.model, origin)
        return self.report(saved, plan, extras, absent)

    def report(
        self, saved: SavedState, plan: Plan, extras: dict[str, Any], absent: tuple[str, ...]
    ) -> Restored:
        return Restored(
            step=self.stored.step,
            optimizer_steps=saved.optimizer_steps,
            extra=extras,
            missing=tuple(plan.missing),
            unexpected=tuple(plan.unexpected),
            mismatched=tuple(plan.mismatched),
            options_new=tuple(self.options.new),
            options_kept=tuple(self.options.kept),
            rng_absent=absent,
            metadata=metadata_of(self.stored, saved),
        )

    # -- what can go wrong

    def mismatch(self, plan: Plan) -> StateMismatch:
        parts = []
        if plan.missing:
            parts.append(f"{len(plan.missing)} missing in the checkpoint: {_some(plan.missing)}")
        if plan.unexpected:
            parts.append(f"{len(plan.unexpected)} only in the checkpoint: {_some(plan.unexpected)}")
        if plan.mismatched:
            parts.append(f"{len(plan.mismatched)} different: {_some(plan.mismatched)}")
        hint = "load into objects built as the saved ones were, or load what fits with strict=False"
        if self.model is None and self.optimizer is not None:
            hint = "pass the model as well: its names tell the optimizer's parameters apart"
        msg = (
            f"the checkpoint of step {self.stored.step} does not fit, and nothing was changed. "
            f"{'. '.join(parts)}. What now: {hint}"
        )
        return StateMismatch(
            msg,
            missing=tuple(plan.missing),
            unexpected=tuple(plan.unexpected),
            mismatched=tuple(plan.mismatched),
        )

    def half_loaded(self, plan: Plan) -> str:
        done = self.filler.overwritten
        try:
            others = [str(number) for number in steps(self.path) if number != self.stored.step]
        except GockptError:
            others = []
        older = f"load another step ({_some(others)})" if others else "no other step is there to load"
        older += f", or {PREVIOUS}" if others else ""
        return (
            f"{len(done)} tensors had been overwritten ({_some(done)}), of {len(plan.fills)} in the model: "
            f"the objects are part old, part loaded. Before training on, {older}, or build them anew"
        )

    def apply_computed(self, live: LiveState, computed: dict[str, Any]) -> None:
        """Give a module's own ``load_state_dict`` what only that can take back."""
        for index, (_, part) in enumerate(models_of(self.model)):
            own = {
                fqn: made for fqn, made in live.computed.items() if made.model == index and fqn in computed
            }
            if not own:
                continue
            # The whole state dict, as hooks may expect; what was loaded already is copied onto itself.
            complete = part.state_dict()
            for key in [key for key, value in complete.items() if _overlaps(value)]:
                del complete[key]
            for made in live.computed.values():
                if made.model == index:
                    complete.pop(made.key, None)
            complete.update({made.key: computed[fqn] for fqn, made in own.items()})
            part.load_state_dict(complete, strict=False)


def _checked_extras(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    if extra is None:
        return {}
    if not isinstance(extra, Mapping):
        msg = f"extra is a {type(extra).__name__}; pass a mapping of names, as in extra={{'sched': sched}}"
        raise UsageError(msg)
    for name, target in extra.items():
        if not hasattr(target, "load_state_dict") and not callable(target):
            msg = (
                f"extra[{name!r}] is a {type(target).__name__}, which can't be restored in place; pass an "
                f"object with load_state_dict() or a function, or use the result's .extra[{name!r}]"
            )
            raise UsageError(msg)
    return dict(extra)


def _hand_over(target: Any, value: Any) -> None:
    if hasattr(target, "load_state_dict"):
        target.load_state_dict(value)
    else:
        target(value)


def _overlaps(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and may_alias_itself(value)


def _steps_of(passed_over: tuple[PassedOver, ...]) -> list[str]:
    return [f"step {one.step}" for one in passed_over]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
