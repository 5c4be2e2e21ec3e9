"""Saving from a training loop: one function to call in the loop, and one to wait with."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, Literal

from gockpt import registry
from gockpt.checkpointer import Checkpointer
from gockpt.deferred_signals import uninterrupted
from gockpt.errors import SaveAborted, UploadError, UsageError
from gockpt.saver import Saver
from gockpt.storage.paths import directory_to_save
from gockpt.validation import checked_options, model_ids

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gockpt.options import Options
    from gockpt.saver import Optimizers
    from gockpt.saving.handle import SaveHandle
    from gockpt.validation import Model

__all__ = ["finish", "save_overlapped", "wait"]

_log = logging.getLogger("gockpt")


@uninterrupted
def save_overlapped(
    model: Model,
    optimizer: Optimizers,
    path: str | os.PathLike[str] = "checkpoints",
    *,
    step: int | None = None,
    every: int | Literal["auto"] | None = None,
    extra: Mapping[str, Any] | None = None,
    options: Options | None = None,
) -> SaveHandle | None:
    """Save the training state without stopping training.

    Call it after ``optimizer.step()`` and ``scheduler.step()``. Without ``every``, the state of each call is
    saved: it is copied before the call returns, which waits until the former save is durable, but not for
    this one. With ``every=n``, call it in each iteration: the checkpoint holds the due step itself (n, 2n,
    …), its window starts some steps earlier, and no call waits for storage.

    Args:
        model: A module, a list of modules, or a mapping of names to tensors.
        optimizer: One optimizer, several, or ``None``.
        path: Directory of the checkpoints.
        step: The step just completed; ``None`` counts calls.
        every: ``None`` saves the state of each call. With a number a save is due whenever
            ``step // every`` grows; ``"auto"`` chooses the interval.
        extra: Objects with ``state_dict()``, callables or plain values to save along.
        options: See :class:`gockpt.Options`.

    Returns:
        Without ``every`` the save of this call; else the newest one, or ``None`` before the first. Always
        ``None`` on ranks other than 0 of a process group, because rank 0 saves the model.

    Raises:
        UsageError: If an argument is invalid.
        ExistingCheckpoints: If ``path`` holds checkpoints that the model was not loaded from: load them
            first, use another path, or see :class:`gockpt.Options`, ``existing``.
        PathBusy: If another living writer saves into ``path``.
        SaveError: If a save failed in the background since the last call.
    """
    wanted = checked_options(options)
    saver = _saver_for(model, optimizer, path, every, wanted, step)
    handle = saver.after_step(step, extra if extra is not None else {})
    registry.raise_failure()
    return handle


def wait() -> None:
    """Finish every save in flight in this process.

    An open window closes at the last reported step. If the last due save was skipped, the state of the last
    reported step is saved; if it has changed since, a WARNING says so. Normal exit of the interpreter does
    the same.

    Raises:
        SaveError: If a save failed; ``UploadError`` if one could not be copied to ``Options.remote``.
    """
    registry.each(registry.open_here(), Saver.wait)


def finish(path_or_model: str | os.PathLike[str] | Model | None = None) -> SaveHandle | None:
    """Save the state of the last call, unless it is saved already, and wait for disk and uploads.

    Call it at the end of a run, or to stop one: whatever ``every`` is, the state of the last
    ``save_overlapped`` call is saved under its own step, with the loop's extras and options. Extras and
    random states are those of this call of ``finish``, unless they were captured at the last tick: inside a
    window, after a due save was skipped, or with ``Options.on_signal``. Saving may go on afterwards.

    Args:
        path_or_model: The path or the model to finish; ``None`` for all that this process saves.

    Returns:
        The newest save of that path or model; with ``None`` that of the last call. ``None`` if nothing was
        ever saved.

    Raises:
        UsageError: If this process doesn't save into that path, or that model.
        SaveError: If the state changed after the last call, so that it can't be saved under that step: call
            ``save_overlapped`` at the state to save. Or if a save failed.
    """
    savers = registry.open_here()
    if path_or_model is not None:
        chosen = registry.chosen_by(path_or_model)
        known = ", ".join(sorted({saver.path for saver in savers})) or "none"
        savers = [saver for saver in savers if chosen(saver)]
        if not savers:
            msg = f"nothing is being saved for {_shown(path_or_model)}; this process saves into: {known}"
            raise UsageError(msg)
    registry.each(savers, Saver.finish)
    latest = max(savers, key=lambda saver: saver.last_told, default=None)
    return None if latest is None else latest.handle


def _shown(path_or_model: object) -> str:
    is_path = isinstance(path_or_model, (str, os.PathLike))
    return repr(path_or_model) if is_path else f"this {type(path_or_model).__name__}"


def _saver_for(
    model: Model,
    optimizer: Optimizers,
    path: str | os.PathLike[str],
    every: int | Literal["auto"] | None,
    options: Options,
    step: int | None,
) -> Saver:
    key = (model_ids(model), directory_to_save(path))
    with registry.lock:
        registry.close_orphans()
        registry.close_leaving()
        saver = registry.by_call.get(key)
        if saver is not None and saver.serves(model, optimizer, every, options):
            saver.rebind(model)
            return saver
        former = saver
        if former is not None:
            registry.expect_not_taken(former)
        if former is not None and not former.closed:
            try:
                former.close()
            except (SaveAborted, UploadError) as error:
                _log.warning("other arguments than before: %s", error)
        registry.expect_alone(key[1], model, step)
        saver = Checkpointer(model, optimizer, path, every=every, options=options)
        once = registry.retired.pop(key, None)
        if former is not None:
            saver.continue_after(former.counted)
            former.forget_model()
        elif once is not None:
            saver.continue_after(once.counted)
            saver.comes_back = True
        registry.by_call[key] = saver
        registry.retire_others(saver)
        return saver
