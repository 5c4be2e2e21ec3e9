"""The checkpointers of this process: which are open, which ``save_overlapped`` made, which lost their model.

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
"""Every checkpointer that was not closed: the exit of the interpreter finishes them."""
by_call: dict[Key, Saver] = {}
"""Those that ``save_overlapped`` made, by model and path."""
_orphans: deque[Saver] = deque()
"""Those whose models were collected; closed at the next call of the library."""


def open_here() -> list[Saver]:
    """Return the checkpointers that this process made and did not close; other threads may change the set."""
    return [saver for saver in list(opened) if not saver.closed and saver.of_this_process]


def model_gone(saver: Saver) -> None:
    """Let go of the optimizers at once; takes no lock, since a finalizer may run anywhere."""
    saver.let_go()
    _orphans.append(saver)


def close_later(saver: Saver) -> None:
    """Close a checkpointer whose closing was interrupted, as soon as nothing has to be waited for."""
    if saver not in _orphans:
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
        if not saver.model_is_gone:  # its close was interrupted: the next call still counts on from it
            continue
        forget_call(saver)
        saver.forget_model()


def forget_call(saver: Saver) -> list[Key]:
    """Let no later ``save_overlapped`` go on with a checkpointer; return the keys that it was found by."""
    keys = [key for key, known in by_call.items() if known is saver]
    for key in keys:
        del by_call[key]
    return keys


def each(savers: Iterable[Saver], do: Callable[[Saver], object]) -> None:
    """Do something with each checkpointer, and close what can be closed without waiting.

    Raises:
        SaveError: The first error, after all were done; the others are notes of it.
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
    """Return whether a checkpointer is that of a path, or of a model (or what it wraps); all are of ``None``.

    Raises:
        UsageError: If it is neither a path nor a model.
    """
    if path_or_model is None:
        return lambda _: True
    if isinstance(path_or_model, (str, bytes, os.PathLike)):
        path = directory_to_save(path_or_model)
        return lambda saver: saver.path == path
    model_ids(path_or_model)  # refuses what is no model
    wanted = anchors(path_or_model)
    return lambda saver: bool(wanted & anchors(saver.model))


def take_over(path: str, by: Saver, *, resumed: bool) -> None:
    """Let the checkpointer of this process that has a path hand it to the next one.

    That is meant for the same model, for one that was loaded from this very path, and when the other's model
    is gone. Where that lives, it may be a traceback or the output of a notebook's cell that keeps it alive:
    it hands over as well, and is refused when it is to be saved again. What was captured is published, an
    open window is given up.

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
                raise error  # the next call hears of it
            continue
        gc.collect()  # a save under way has kept the model alive, and so does a reference cycle
        if not saver.model_is_gone:
            saver.taken = True
            _log.warning(
                "%s was saved into by another model of this process, which still lives: its checkpointer was "
                "closed, and it is refused from now on",
                path,
            )


def expect_alone(path: str, model: Any, step: int | None) -> None:
    """Refuse to save a model into a path that another model of the program is being saved into.

    That is so where the other one is in use and has a window open, or was saved at this very step. One that
    is only kept alive by what is left of an interrupted or ended program does not count.

    Raises:
        PathBusy: If it is so.
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
    """Close a checkpointer: publish what was captured, give an open window up.

    Returns:
        What failed, which is logged.
    """
    if saver.window_open:
        saver.abort(why)
    try:
        saver.close()
    except GockptError as error:
        _log.warning("of the checkpointer of %s, closed since %s: %s", saver.path, why, error)
        return error
    return None


def expect_not_taken(saver: Saver) -> None:
    """Refuse to go on with a checkpointer whose path another living model's has taken over.

    Raises:
        PathBusy: If that is so.
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
    """What is left of a checkpointer that ``save_overlapped`` made, used once, and closed.

    Attributes:
        counted: Its last step, and the updates that it had seen.
    """

    counted: tuple[int, int]


retired: dict[Key, Retired] = {}
"""By model and path, for as long as the model lives."""
_leaving: list[Saver] = []
"""Those that are closed as soon as nothing has to be waited for."""
_failures: deque[GockptError] = deque()


def retire_others(by: Saver) -> None:
    """Close what the same model has saved once into other paths: a new path for each save leaks nothing.

    What is still being written is closed at a later call. A path that is come back to stays open.
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
    """Close those that were used once, as far as that takes no waiting."""
    for saver in list(_leaving):
        if not saver.serves_single_saves:  # it was come back to meanwhile
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
    """Raise what a checkpointer failed of that was closed in passing; once.

    Raises:
        SaveError: If one did.
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
