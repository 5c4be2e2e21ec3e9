"""Registry of this process's checkpointers: open ones, those of ``save_overlapped``, those without a model.

Every function but :func:`model_gone` may close checkpointers, and so may wait for saves in flight.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gockpt.deferred_signals import deferred
from gockpt.errors import GockptError, PathBusy, SaveAborted, UploadError
from gockpt.reachable import in_use
from gockpt.state.lineage import origin_of
from gockpt.storage.paths import directory_to_save
from gockpt.validation import anchors, model_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gockpt.saver import Saver

__all__ = [
    "Key",
    "by_call",
    "chosen_by",
    "close_later",
    "close_leaving",
    "close_orphans",
    "each",
    "expect_alone",
    "expect_not_taken",
    "forget_call",
    "lock",
    "model_gone",
    "open_here",
    "opened",
    "raise_failure",
    "release",
    "retire_others",
    "retired",
    "take_over",
]

Key = tuple[tuple[int, ...], str]
"""A model's ids, and the path it is saved into."""

_WAYS_OUT = "Save one of them into another path, or both together as one list of models; or gockpt.close()"

_log = logging.getLogger("gockpt")

lock = threading.RLock()
opened: set[Saver] = set()
"""Every checkpointer that is not closed: the exit of the interpreter finishes them."""
by_call: dict[Key, Saver] = {}
"""Checkpointers that ``save_overlapped`` made, by model and path."""
_orphans: deque[Saver] = deque()
"""Checkpointers whose models were collected; closed at the next call of the library."""


def open_here() -> list[Saver]:
    """Return the checkpointers that this process made and did not close; other threads may change the set."""
    return [saver for saver in list(opened) if not saver.closed and saver.of_this_process]


def model_gone(saver: Saver) -> None:
    """Release the optimizers of a collected model; takes no lock, since a finalizer may run anywhere."""
    saver.let_go()
    _orphans.append(saver)


def close_later(saver: Saver) -> None:
    """Schedule the close of a checkpointer whose closing was interrupted, once that takes no waiting."""
    if saver not in _orphans:
        _orphans.append(saver)


def close_orphans() -> None:
    """Close the checkpointers whose models are gone, as far as that takes no waiting: called by each tick.

    Finalizers only record them, since they may run anywhere.
    """
    for _ in range(len(_orphans)):
        saver = _orphans.popleft()
        if not saver.retire():
            _orphans.append(saver)
            continue
        if not saver.model_is_gone:  # its close was interrupted: the next call continues its counts
            continue
        forget_call(saver)
        saver.forget_model()


def forget_call(saver: Saver) -> list[Key]:
    """Remove a checkpointer from those that ``save_overlapped`` uses again; return its keys."""
    keys = [key for key, known in by_call.items() if known is saver]
    for key in keys:
        del by_call[key]
    return keys


def each(savers: Iterable[Saver], do: Callable[[Saver], object]) -> None:
    """Call a function with each checkpointer, and close those that can be closed without waiting.

    Raises:
        SaveError: The first error, after all calls; the others are its notes.
    """
    first: GockptError | None = None
    for saver in savers:
        try:
            do(saver)
        except GockptError as error:
            if first is None:
                first = error
            else:
                first.add_note(f"and, of {saver.path}: {error}")
    with deferred(), lock:
        close_orphans()
        close_leaving()
    if first is not None:
        raise first
    raise_failure()


def chosen_by(path_or_model: Any) -> Callable[[Saver], bool]:
    """Return a filter of checkpointers by path, or by model (also inside a wrapper); ``None`` chooses all.

    Raises:
        UsageError: If it is neither a path nor a model.
    """
    if path_or_model is None:
        return lambda _: True
    if isinstance(path_or_model, (str, bytes, os.PathLike)):
        path = directory_to_save(path_or_model)
        return lambda saver: saver.path == path
    model_ids(path_or_model)  # raises if it isn't a model
    wanted = anchors(path_or_model)
    return lambda saver: bool(wanted & anchors(saver.model))


def take_over(path: str, by: Saver, *, resumed: bool) -> None:
    """Make this process's checkpointer of a path hand the path over to the next one.

    Meant for the same model, for one that was loaded from this very path, and for the case that the other
    model is gone. If the other model is alive, perhaps only because of a traceback or the output of a
    notebook's cell, it hands over as well, and saving it again is refused. A captured state is published, an
    open window is aborted.

    Raises:
        PathBusy: If another thread saves the other model.
    """
    for saver in list(opened):
        if saver.path != path or saver.closed or not saver.of_this_process:
            continue
        meant = saver.model_ids == by.model_ids
        if not meant and not resumed and not saver.model_is_gone and saver.trained_elsewhere:
            msg = (
                f"{path} is being saved into by another thread, from another model. {_WAYS_OUT} "
                "that one if it is done with"
            )
            raise PathBusy(msg)
        error = release(saver, "another checkpointer takes its path")
        if meant:
            if error is not None and not isinstance(error, (SaveAborted, UploadError)):
                raise error  # the next call raises it
            continue
        gc.collect()  # a save in flight kept the model alive, and a reference cycle may still do so
        if not saver.model_is_gone:
            saver.taken = True
            _log.warning(
                "%s was saved into by another model of this process, which still lives: its checkpointer was "
                "closed, and it is refused from now on",
                path,
            )


def expect_alone(path: str, model: Any, step: int | None) -> None:
    """Refuse to save a model into a path that another model of the program is being saved into.

    The other one counts if it is in use and has a window open, or was saved at this very step. A model does
    not count if only remains of an interrupted or ended program keep it alive.

    Raises:
        PathBusy: If there is another one.
    """
    ids, origin = model_ids(model), origin_of(model)
    if origin is not None and origin.path == path:
        return
    for saver in list(opened):
        if saver.path != path or saver.closed or not saver.of_this_process or saver.model_ids == ids:
            continue
        same_step = saver.counted[0] == (1 if step is None else step)
        if (saver.window_open or same_step) and in_use(saver.modules):
            msg = (
                f"{path} is being saved into by another model of this process, which is in use: two models "
                f"would replace each other's checkpoints. {_WAYS_OUT} the path, if the other one is done with"
            )
            raise PathBusy(msg)


def release(saver: Saver, why: str) -> GockptError | None:
    """Close a checkpointer: publish a captured state, abort an open window.

    Returns:
        The error, if any, which is logged.
    """
    if saver.window_open:
        saver.abort(why)
    try:
        saver.close()
    except GockptError as error:
        _log.warning("the checkpointer of %s, closed because %s: %s", saver.path, why, error)
        return error
    return None


def expect_not_taken(saver: Saver) -> None:
    """Refuse to use a checkpointer whose path was taken over for another living model.

    Raises:
        PathBusy: If it was.
    """
    others = [
        other
        for other in opened
        if other is not saver and other.path == saver.path and other.model_ids != saver.model_ids
    ]
    if saver.taken and any(not other.closed and not other.model_is_gone for other in others):
        msg = (
            f"{saver.path} is being saved into by another model of this process: two models would replace "
            f"each other's checkpoints. {_WAYS_OUT} the path, if the other one is done with"
        )
        raise PathBusy(msg)


@dataclass(frozen=True, slots=True)
class Retired:
    """Record of a checkpointer that ``save_overlapped`` made, used once, and closed.

    Attributes:
        counted: Its last step, and the updates that it had seen.
    """

    counted: tuple[int, int]


retired: dict[Key, Retired] = {}
"""Retired checkpointers by model and path, as long as the model lives."""
_leaving: list[Saver] = []
"""Checkpointers that are closed as soon as that takes no waiting."""
_failures: deque[GockptError] = deque()


def retire_others(by: Saver) -> None:
    """Close the same model's checkpointers of paths that it was saved into once: new paths then leak nothing.

    One that is still writing is closed at a later call. A path that is used again stays open.
    """
    for saver in list(by_call.values()):
        if (
            saver is not by
            and saver not in _leaving
            and saver.of_this_process
            and saver.saves_model_of(by)
            and saver.serves_single_saves
        ):
            _leaving.append(saver)
    close_leaving()


def close_leaving() -> None:
    """Close the checkpointers that were used once, as far as that takes no waiting."""
    for saver in list(_leaving):
        if not saver.serves_single_saves:  # it was used again meanwhile
            _leaving.remove(saver)
            continue
        error = saver.retire_with_error()
        if not saver.closed:
            continue
        if error is not None:
            _failures.append(error)
        _leaving.remove(saver)
        for key in forget_call(saver):
            retired[key] = Retired(saver.counted)
            saver.when_model_goes(retired.pop, key, None)
        saver.forget_model()


def raise_failure() -> None:
    """Raise the error of a checkpointer that was closed by another call, once.

    Raises:
        SaveError: If there is one.
    """
    if _failures:
        raise _failures.popleft()


def _after_fork() -> None:
    """In a forked child: another thread of the parent may have held the lock."""
    global lock  # noqa: PLW0603 - every use reads it from the module
    lock = threading.RLock()
    for of_the_parent in (_orphans, _leaving, _failures):
        of_the_parent.clear()


os.register_at_fork(after_in_child=_after_fork)
