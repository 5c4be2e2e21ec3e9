"""Letting go of what ``save_overlapped`` made: threads, memory, hooks, and the right to write into a path."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from gockpt import registry
from gockpt.deferred_signals import uninterrupted
from gockpt.errors import GockptError, SaveAborted
from gockpt.storage.paths import directory_to_save
from gockpt.validation import anchors, model_ids

if TYPE_CHECKING:
    from collections.abc import Callable

    from gockpt.saver import Saver
    from gockpt.validation import Model

__all__ = ["close"]

_log = logging.getLogger("gockpt")


@uninterrupted
def close(path_or_model: str | os.PathLike[str] | Model | None = None) -> None:
    """Release what :func:`save_overlapped` made for a path or a model, or all of it.

    What was captured is published first, uploads included; an open window is given up, which is logged.
    Then another process or model may save into the path. Saving again afterwards takes the path afresh. A
    :class:`Checkpointer` of the user's own is not closed: it has ``close()``. Again is fine.

    Args:
        path_or_model: A path, a model as it was passed (or what it wraps), or ``None`` for all.

    Raises:
        SaveError: If a save or an upload failed; all the same everything is released.
        UsageError: If it is neither a path nor a model.
    """
    wanted = _chooser(path_or_model)
    first: GockptError | None = None
    with registry.lock:
        for key, saver in list(registry.by_call.items()):
            if not saver.of_this_process or not wanted(saver):
                continue
            try:
                _close(saver)
            except GockptError as error:
                if first is None:
                    first = error
                else:
                    first.add_note(f"and, of {saver.path}: {error}")
            finally:
                if saver.closed:
                    registry.by_call.pop(key, None)
                    saver.forget_model()
        registry.close_orphans()
        registry.close_leaving()
    if first is not None:
        raise first
    registry.raise_failure()


def _close(saver: Saver) -> None:
    given_up = saver.handle if saver.window_open else None
    if given_up is not None:
        saver.abort("gockpt.close() was called")
    try:
        saver.close()
    except SaveAborted as error:
        if given_up is None or given_up.exception() is not error:
            raise
        _log.warning("%s", error)


def _chooser(path_or_model: Any) -> Callable[[Saver], bool]:
    if path_or_model is None:
        return lambda _: True
    if isinstance(path_or_model, (str, bytes, os.PathLike)):
        path = directory_to_save(path_or_model)
        return lambda saver: saver.path == path
    model_ids(path_or_model)  # refuses what is no model
    wanted = anchors(path_or_model)
    return lambda saver: bool(wanted & anchors(saver.model))
