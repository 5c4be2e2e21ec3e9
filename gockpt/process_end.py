"""Hooks that finish the saves in flight at every normal end of a process.

At the interpreter's exit, ``atexit`` runs one. Children of ``multiprocessing`` (and so of pools, executors
and ``torch.multiprocessing``) end by ``os._exit`` and run only the finalizers of ``multiprocessing.util``, so
they get one. Saves of a worker that its pool terminates are finished as well.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import util
from typing import TYPE_CHECKING, Any

from gockpt import registry
from gockpt.saver import failure_now

if TYPE_CHECKING:
    from gockpt.saver import Saver

__all__ = ["finish_at_end"]

_log = logging.getLogger("gockpt")

BEFORE_OTHERS = 1000
"""Priority among the finalizers of ``multiprocessing``: before those of queues and managers."""

_prepared: set[int] = set()
"""Id of the process in which the hooks are installed."""


def finish_at_end(saver: Saver) -> None:
    """Install the hooks that finish a checkpointer's saves at the end of this process."""
    if multiprocessing.parent_process() is None:
        return
    if _waited_for(threading.current_thread()):
        # Threads are joined after all finalizers, and nothing runs after that.
        threading.Thread(target=_after_training, args=(saver,), name="gockpt-end").start()
    pid = os.getpid()
    if pid in _prepared:
        return
    _prepared.add(pid)
    # Not at import: a forked child loses its parent's registrations.
    util.Finalize(None, _at_end_of_child, exitpriority=BEFORE_OTHERS)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminated)


@atexit.register
def _at_exit() -> None:
    """Finish the saves in flight; after an uncaught exception, abort open windows instead."""
    # In an interactive session an exception ends a cell, not the program.
    session = hasattr(sys, "ps1") or bool(sys.flags.interactive)
    failure = 0 if session else failure_now()
    _finish_all(lambda saver: bool(failure) and failure != saver.failure_before)


def _at_end_of_child() -> None:
    """Do the same in a child, where the exception that ends it is in flight while finalizers run."""
    error = sys.exc_info()[1]
    failed = error is not None and not isinstance(error, SystemExit)
    _finish_all(lambda _: failed)


def _after_training(saver: Saver) -> None:
    """Finish the saves in flight after a child's training thread has ended."""
    while (thread := saver.training_thread).is_alive():
        thread.join()
    try:
        saver.wait()
    except Exception as error:  # noqa: BLE001 - no caller is left to raise it to
        _log.error("at the end of %s: %s", thread.name, error)


def _waited_for(thread: threading.Thread) -> bool:
    """Whether the end of a child joins this thread, after its finalizers."""
    return thread is not threading.main_thread() and not thread.daemon


def _terminated(number: int, _frame: Any) -> None:
    """Finish the saves in flight, then end the process by the signal."""
    _finish_all(lambda _: False)
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def _finish_all(failed: Any) -> None:
    child = multiprocessing.parent_process() is not None
    for saver in registry.open_here():
        thread = saver.training_thread
        if child and thread.is_alive() and _waited_for(thread):
            continue  # that is not the end of the process yet
        try:
            if failed(saver):
                saver.abort("the program ended by an exception")
            elif thread.is_alive() and thread.daemon and thread is not threading.current_thread():
                # Nothing joins a daemon thread; it is about to be stopped at any point.
                saver.abort("the program ended while a daemon thread trained")
            saver.close()
        except Exception as error:  # noqa: BLE001 - the others must be finished as well
            _log.error("at exit: %s", error)
