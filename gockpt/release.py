"""Release of the checkpointers of ``save_overlapped``: their threads, memory, hooks and paths."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from gockpt import registry
from gockpt.deferred_signals import uninterrupted
from gockpt.errors import SaveAborted

if TYPE_CHECKING:
    import os

    from gockpt.saver import Saver
    from gockpt.validation import Model

__all__ = ["close"]

_log = logging.getLogger("gockpt")


@uninterrupted
def close(path_or_model: str | os.PathLike[str] | Model | None = None) -> None:
    """Release the checkpointers that :func:`save_overlapped` made for a path or a model, or all of them.

    Captured saves are published first, uploads included; an open window is aborted, which is logged. Then
    another process or model may save into the path. Saving again afterwards opens the path again. A
    :class:`Checkpointer` that the user made is not closed: call its ``close()``. Repeated calls are fine.

    Args:
        path_or_model: A path, a model as it was passed (or the model inside it), or ``None`` for all.

    Raises:
        SaveError: If a save or an upload failed; everything is released nevertheless.
        UsageError: If it is neither a path nor a model.
    """
    chosen = registry.chosen_by(path_or_model)
    with registry.lock:
        savers = [saver for saver in registry.by_call.values() if saver.of_this_process and chosen(saver)]
        registry.each(savers, _close)


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
    finally:
        if saver.closed:
            registry.forget_call(saver)
            saver.forget_model()
