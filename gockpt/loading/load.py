"""Loading a checkpoint into live objects, in place.

Promise: unless :func:`load` raises, the objects then hold the saved state bit for bit. Names, shapes, dtypes
and groups are compared, and everything but the tensors' bytes is read and decoded, before anything is
changed. Bytes go straight into the live memory and are verified on the way: if a block is damaged, the error
names the tensors that had been overwritten by then.
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

from gockpt.catalog import Metadata, metadata_of, state_of
from gockpt.core.step_number import checked_step
from gockpt.errors import CheckpointCorrupt, CheckpointPruned, UsageError
from gockpt.garbage_collection import collection_paused
from gockpt.loading.fill import Filler, Kept
from gockpt.loading.fit import fit
from gockpt.loading.fit_model import ModelFit, fit_mapping, saved_names
from gockpt.loading.fit_wrapper import fit_wrappers
from gockpt.loading.messages import PREVIOUS, Changed, mismatch, not_asked_for, nothing_fits, some
from gockpt.loading.module import module_restores
from gockpt.loading.newest_valid import expect_finite, newest_good
from gockpt.loading.optimizer import OptimizerRestore, OptionsReport
from gockpt.loading.optimizer_feeding import Feeding, not_restored
from gockpt.state import rng_state as generators
from gockpt.state.collect import collect
from gockpt.state.known_classes import class_name
from gockpt.state.lineage import Origin, remember
from gockpt.state.state_document import checked_extra
from gockpt.state.value_decoder import decode
from gockpt.storage.format.manifest import run_of
from gockpt.storage.read.find import open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from gockpt.loading.fit_model import Fill
    from gockpt.loading.load_plan import Create, LoadPlan
    from gockpt.loading.module import ModuleRestore
    from gockpt.loading.newest_valid import PassedOver
    from gockpt.state.saved_document import SavedState
    from gockpt.storage.object_store.client import Where
    from gockpt.storage.read.checkpoint import StoredCheckpoint

    Model = nn.Module | Sequence[nn.Module] | Mapping[str, torch.Tensor] | None
    Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None

__all__ = ["Restored", "load"]

TRIES = 3
"""Number of tries if the newest checkpoint is pruned between its opening and the end of the load."""

_log = logging.getLogger("gockpt")


@dataclass(frozen=True, slots=True)
class Restored:
    """Result of a load.

    Attributes:
        step: The user's step that was saved.
        optimizer_steps: Optimizer updates that the saved run had seen.
        extra: The plain value of every saved extra, by name.
        missing: Live names that the checkpoint lacks; left as they were. Empty with ``strict=True``.
        unexpected: Names in the checkpoint that have no live counterpart. Empty with ``strict=True``.
        mismatched: Names that differ in shape, dtype or grouping; left as they were. Empty with
            ``strict=True``.
        options_new: Options of param groups that were set though the live group did not have them.
        options_kept: Options of live param groups that the checkpoint lacks; left as they were.
        rng_absent: Saved random generators that this machine does not have, such as ``"cuda:3"``.
        metadata: Everything else that is known about the checkpoint.
        passed_over: With ``on_damage="previous"`` or ``finite``: checkpoints that were not loaded because
            they are damaged or not finite, each with ``step``, ``path`` and ``why``.
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
    rng: bool | None = None,
    on_damage: Literal["raise", "previous"] = "raise",
    finite: bool = False,
) -> Restored:
    """Load a checkpoint into a model, its optimizers and extras, in place and bit for bit.

    Args:
        path: Where checkpoints are saved or uploaded to, or one checkpoint's own directory, archive or URL.
        model: A module, a list of modules, or a ``{name: tensor}`` mapping; their memory is overwritten.
        optimizer: One optimizer or several; ``None`` loads the model alone.
        step: The wanted step; ``None`` for the newest (published last, whatever its step).
        strict: Whether everything has to fit. With ``False``, entries that fit by name, shape and dtype are
            loaded, all others are left as they are and reported. Nothing is ever cast or reshaped.
        extra: Objects by name to restore with their ``load_state_dict``, or functions to call with
            the saved value.
        rng: Whether to set the random generators, which is done last; ``None`` does so if an optimizer is
            restored.
        on_damage: ``"raise"``, or ``"previous"``: read all of the newest checkpoint first, verify its
            checksums, and take the one before if it is damaged, and so on; ``passed_over`` and a WARNING
            name the damaged ones. Reads everything twice, and can't be combined with ``step``.
        finite: Whether to accept only a checkpoint whose parameters and optimizer state have no NaN or Inf:
            the newest one (``passed_over`` and a WARNING name the newer ones), or that of ``step``. If a
            checkpoint of an earlier version lacks the counts, they are read and counted.

    Returns:
        The step, the plain values of all extras, and the names that did not fit.

    Raises:
        StateMismatch: If something doesn't fit; nothing was changed.
        CheckpointNotFound: If there is no complete checkpoint, or none of that step.
        NotACheckpoint: If the path is a file or directory that gockpt didn't write.
        NonFiniteCheckpoint: With ``finite``, if none is, or that of ``step`` isn't; nothing was changed.
        CheckpointCorrupt: If the checkpoint is damaged; a note names the overwritten tensors.
        UsageError: If an argument has an unsupported type or value.
    """
    wanted = checked_step(step)
    if on_damage not in ("raise", "previous") or (on_damage == "previous" and step is not None):
        msg = (
            f'on_damage={on_damage!r} with step={step!r}: expected "raise", or "previous" without a step, '
            "which chooses the step itself"
        )
        raise UsageError(msg)

    def restore(stored: StoredCheckpoint) -> Restored:
        return _Load(path, stored, model, optimizer, strict=strict, extra=extra, rng=rng).run()

    grad = torch.is_grad_enabled()
    # Tensors made here must be usable in training, also if the call is made in inference mode.
    with torch.inference_mode(mode=False), torch.set_grad_enabled(grad), collection_paused():
        return _load_from(path, wanted, restore, previous=on_damage == "previous", finite=finite)


def _load_from(
    path: Where,
    step: int | None,
    restore: Callable[[StoredCheckpoint], Restored],
    *,
    previous: bool,
    finite: bool,
) -> Restored:
    """Open the wanted checkpoint and restore it; try another if it is pruned before anything was changed."""
    for attempt in range(1, TRIES + 1):
        try:
            if previous or (finite and step is None):
                stored, passed_over = newest_good(path, whole=previous, finite=finite)
            else:
                stored, passed_over = open_checkpoint(path, step), ()
            with stored:
                if finite and step is not None:
                    expect_finite(stored)
                restored = restore(stored)
            if not restored.metadata.exact:
                why = restored.metadata.deviation or "metadata.inexact names the tensors"
                _log.warning("loaded step %d, which is not exact: %s", restored.step, why)
            nonfinite = restored.metadata.nonfinite
            if nonfinite is not None and not nonfinite.finite:
                _log.warning("loaded step %d, which was saved with %s", restored.step, nonfinite)
            if passed_over:
                _log.warning("loaded step %d; passed over: %s", restored.step, some(_steps_of(passed_over)))
            return dataclasses.replace(restored, passed_over=passed_over)
        except CheckpointPruned as error:
            # Its note says that tensors were overwritten: another checkpoint might not hold all of them.
            if step is not None or attempt == TRIES or getattr(error, "__notes__", None):
                raise
        except CheckpointCorrupt as error:
            if not getattr(error, "__notes__", None) and not previous:
                error.add_note(f"nothing was changed. What now: load another step, or {PREVIOUS}")
            raise
    raise AssertionError  # pragma: no cover - the last attempt returned or raised


def _home(path: str) -> str:
    """Return the directory or URL that a checkpoint was published in: the parent of its own."""
    return path.rpartition("/")[0] if "://" in path else str(Path(os.path.realpath(path)).parent)


class _Load:
    """State of one load."""

    def __init__(
        self,
        path: Where,
        stored: StoredCheckpoint,
        model: Any,
        optimizer: Any,
        *,
        strict: bool,
        extra: Mapping[str, Any] | None,
        rng: bool | None,
    ) -> None:
        self.path = path
        self.stored = stored
        self.model = model
        self.optimizer = optimizer
        self.strict = strict
        self.wanted_extras = _expect_targets(extra)
        self.rng = rng
        self.filler = Filler(stored)
        self.options = OptionsReport()
        self.changed = Changed(tensors=self.filler.overwritten)
        self.modules: list[ModuleRestore] = []

    def run(self) -> Restored:
        saved = state_of(self.stored)
        live = collect(self.model, self.optimizer, loading=True)
        arrays = {name: array.spec for name, array in self.stored.arrays.items()}
        self.modules = module_restores(self.model, saved, arrays, self.filler.read, self.filler.bytes_of)

        # First every check that runs no code of the objects' own: nothing is changed.
        parts = [module.check() for module in self.modules]
        if isinstance(self.model, Mapping):
            parts.append(fit_mapping(live, saved, arrays))
        elif self.model is not None and not self.modules:
            parts.append(ModelFit(unexpected=saved_names(saved, arrays)))
        plan = fit(live, saved, arrays, model=parts, with_optimizer=self.optimizer is not None)
        if self.optimizer is not None:
            fit_wrappers(live, saved, plan)
        plan.missing += [f"extra/{name}" for name in self.wanted_extras if name not in saved.extra]
        self.refuse(plan)
        extras, states = self.values(saved, plan)
        self.filler.stage(plan.whole().fills)
        feeding = Feeding(plan, live, self.filler)
        optimizers = {
            part.index: OptimizerRestore(part, self.filler) for part in plan.optimizers if part.form is None
        }
        straight = [one for index, one in optimizers.items() if index not in feeding.owners]
        try:
            # Then that code, which may still refuse. Only then memory is filled in place.
            self.run_extras(extras)
            self.run_modules(plan)
            self.fill_and_feed(plan, [part for each in straight for part in each.arrays()], feeding)
            for index, restore in optimizers.items():
                optimizer = live.optimizers[index]
                if id(optimizer) not in feeding.loaded:
                    self.changed.optimizers.append(f"{index} ({class_name(type(optimizer))})")
                    restore.apply(optimizer, self.options)
            absent = generators.restore(states) if states is not None else ()
        except BaseException as error:
            if self.changed:
                fills = plan.whole().fills
                error.add_note(self.changed.note(self.path, self.stored.step, len(fills)))
            raise
        for text in not_restored(plan):
            _log.warning("loaded step %d; not restored: %s", self.stored.step, text)
        home = _home(self.stored.path)
        run = run_of(self.stored.manifest)
        origin = Origin(self.stored.step, saved.optimizer_steps, self.stored.seq, home, run)
        remember(self.model, origin)
        left = not_asked_for(saved, list(self.wanted_extras), with_optimizer=self.optimizer is not None)
        if left is not None:
            _log.warning("loaded step %d; not restored, because not requested: %s", self.stored.step, left)
        return self.report(saved, plan, extras, absent)

    def refuse(self, plan: LoadPlan, *, finished: bool = False) -> None:
        """Raise if a plan has entries that do not fit.

        Args:
            plan: The plan so far.
            finished: Whether the modules' post-hooks have run; until then they may still change the
                missing and unexpected names.
        """
        found = plan.whole()
        changed = bool(self.changed)
        judged = finished or not any(module.asks_after for module in self.modules)
        named = (found.missing or found.unexpected) if judged else (plan.missing or plan.unexpected)
        if found.refused or (self.strict and (found.mismatched or named)):
            alone = self.model is None and self.optimizer is not None
            raise mismatch(self.stored.step, found, changed=changed, optimizer_alone=alone)
        amiss = found.missing or found.unexpected or found.mismatched
        if plan.model and amiss and not any(part.taken for part in plan.model):
            raise nothing_fits(self.stored.step, found, changed=changed)

    def values(self, saved: SavedState, plan: LoadPlan) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Return the decoded extras, and random states if they are to be set."""
        extras = {name: decode(document, self.filler.read) for name, document in saved.extra.items()}
        wanted = bool(plan.optimizers) if self.rng is None else self.rng
        states = decode(saved.rng, self.filler.read) if wanted and saved.rng is not None else None
        if states is not None:
            generators.check(states)
        return extras, states

    def run_extras(self, extras: dict[str, Any]) -> None:
        """Give each requested extra its value."""
        for name, target in self.wanted_extras.items():
            if name in extras:
                self.changed.extras.append(name)
                # A copy, so that .extra stays as saved even if the object changes its value.
                _hand_over(target, copy.deepcopy(extras[name]))

    def run_modules(self, plan: LoadPlan) -> None:
        """Run the modules' own loading code, and replace the plan's fills by those that it left."""
        if not any(module.runs_code for module in self.modules):
            return
        plan.model = [
            module.run(strict=self.strict, ran=self.changed.modules, fill=self.filler.fill)
            for module in self.modules
        ]
        self.refuse(plan)
        self.filler.stage(plan.whole().fills)

    def fill_model(self, plan: LoadPlan, others: list[Fill | Create]) -> None:
        """Overwrite the live tensors, then run the modules' post-hooks.

        Args:
            plan: The load's plan.
            others: States of optimizers: read by the same call, or after hooks that may still refuse.
        """
        found = plan.whole()
        asks_after = any(module.asks_after for module in self.modules)
        self.filler.fill_many(found.fills if asks_after else [*found.fills, *others])
        for fill in found.fills:
            self.filler.fill(fill)
        for assign in found.assigns:
            self.filler.assign(assign)
        if asks_after:
            for part, module in zip(plan.model, self.modules, strict=True):
                part.missing, part.unexpected = module.finish(ran=self.changed.modules)
            self.refuse(plan, finished=True)
            self.filler.fill_many(others)

    def fill_and_feed(self, plan: LoadPlan, others: list[Fill | Create], feeding: Feeding) -> None:
        """Overwrite the live tensors, and run optimizers' own loading code.

        That code sees the loaded model, as after ``model.load_state_dict``. If it raises, the model's
        tensors get their former values back.

        Args:
            plan: The load's plan.
            others: States of optimizers without such code.
            feeding: Forms for the optimizers with such code.
        """
        if not feeding:
            self.fill_model(plan, others)
            return
        found = plan.whole()
        kept = Kept([*(fill.target for fill in found.fills), *(assign.target for assign in found.assigns)])
        before = len(self.changed.tensors)
        try:
            self.fill_model(plan, [])
            feeding.run(self.changed.optimizers)
        except BaseException:
            kept.put_back()
            del self.changed.tensors[before:]
            raise
        self.filler.fill_many(others)

    def report(
        self, saved: SavedState, plan: LoadPlan, extras: dict[str, Any], absent: tuple[str, ...]
    ) -> Restored:
        found = plan.whole()
        return Restored(
            step=self.stored.step,
            optimizer_steps=saved.optimizer_steps,
            extra=extras,
            missing=tuple(found.missing),
            unexpected=tuple(found.unexpected),
            mismatched=tuple(found.mismatched),
            options_new=tuple(self.options.new),
            options_kept=tuple(self.options.kept),
            rng_absent=absent,
            metadata=metadata_of(self.stored, saved),
        )


def _expect_targets(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    targets = checked_extra(extra) or {}
    for name, target in targets.items():
        if not hasattr(target, "load_state_dict") and not callable(target):
            msg = (
                f"extra[{name!r}] is a {type(target).__name__}, which can't be restored in place; pass an "
                f"object with load_state_dict() or a function, or use the result's .extra[{name!r}]"
            )
            raise UsageError(msg)
    return targets


def _hand_over(target: Any, value: Any) -> None:
    if hasattr(target, "load_state_dict"):
        target.load_state_dict(value)
    else:
        target(value)


def _steps_of(passed_over: tuple[PassedOver, ...]) -> list[str]:
    return [f"step {one.step}" for one in passed_over]
