"""The checkpointers of this process: which are open, which ``save_overlapped`` made, which lost their model.

Every function but :func:`model_gone` may close checkpointers, and so may wait for saves in flight.
"""

from __future__ import annotations

import atexit
import gc
import logging
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING

from gockpt.errors import GockptError, PathBusy, UploadError

if TYPE_CHECKING:
    from gockpt.checkpointer import Checkpointer

__all__ = ["by_call", "close_orphans", "lock", "model_gone", "opened", "take_over"]

_log = logging.getLogger("gockpt")

lock = threading.RLock()
opened: set[Checkpointer] = set()
"""Every checkpointer that was not closed: the exit of the interpreter finishes them."""
by_call: dict[tuple[tuple[int, ...], str], Checkpointer] = {}
"""Those that ``save_overlapped`` made, by model and path."""
_orphans: deque[Checkpointer] = deque()
"""Those whose models were collected; closed at the next call of the library."""


def model_gone(saver: Checkpointer) -> None:
    """Let go of the optimizers at once; takes no lock, since a finalizer may run anywhere."""
    saver.let_go()
    _orphans.append(saver)


def close_orphans() -> None:
    """Close the checkpointers whose models are gone, as far as that takes no waiting: a tick calls this.

    Finalizers only note them: they run anywhere.
    """
    for _ in range(len(_orphans)):
        saver = _orphans.popleft()
        if not saver.retire():
            _orphans.append(saver)
            continue
        for key in [key for key, known in by_call.items() if known is saver]:
            del by_call[key]
        saver.forget_model()


def take_over(path: str, ids: tuple[int, ...], *, resumed: bool) -> None:
    """Let an idle checkpointer of this process hand its path to the next one, where that is meant.

    That is: for the same model, for one that was loaded from this very path, and when the other's model
    is gone. Two living models would replace each other's checkpoints.
    """
    for saver in list(opened):
        if saver.path != path or saver.closed or not saver.of_this_process:
            continue
        meant = resumed or saver.model_ids == ids
        if not meant and not saver.model_is_gone and not saver.window_open:
            # A save under way keeps its model alive, and so does a reference cycle.
            try:
                saver.wait()
            except GockptError as error:
                _log.error("of another model's save into %s: %s", path, error)
            gc.collect()
        if saver.window_open or not (meant or saver.model_is_gone):
            msg = (
                f"{path} is being saved into by another checkpointer of this process; close() it, or use "
                "another path. To save several models together, pass them as one list"
            )
            raise PathBusy(msg)
        try:
            saver.close()
        except UploadError as error:
            _log.warning("of the checkpointer before: %s", error)


@atexit.register
def _at_exit() -> None:
    """Finish what is in flight; after an uncaught exception an open window is given up instead."""
    failed = getattr(sys, "last_value", None) is not None
    for saver in list(opened):
        if saver.closed or not saver.of_this_process:
            continue
        try:
            if failed:
                saver.abort("the program ended by an exception")
            saver.close()
        except Exception as error:  # noqa: BLE001 - the others must be finished as well
            _log.error("at exit: %s", error)
