"""Opening a path while the worker process of a trainer that was killed still finishes a save there."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from gockpt.deferred_signals import let_through
from gockpt.errors import PathBusy
from gockpt.storage.local.owner import stat_fields

if TYPE_CHECKING:
    from collections.abc import Callable

    from gockpt.storage.local.store import Store

__all__ = ["BOOT", "is_orphan", "open_store"]

_log = logging.getLogger("gockpt")

BOOT = (
    "import json, os, sys; fd, trainer, sys.path[:] = json.loads(sys.argv[1]); "
    "from gockpt.workers.worker_main import run; os._exit(run(fd, trainer))"
)
"""The program of a worker process. Its argument names the trainer, so that anyone can see whose it is.

It ends at once: a kernel that is still being compiled there is neither waited for nor torn down.
"""

PATIENCE = 300.0
"""Seconds that a worker whose trainer is gone is waited for."""

_LOOK = 0.05


def open_store(make: Callable[[], Store], *, give_up: Callable[[], bool] = lambda: False) -> Store:
    """Return ``make()``; where a worker without a trainer has the path, wait for it to finish its save.

    Raises:
        PathBusy: If anybody else has the path, or that worker doesn't come to an end.
    """
    deadline = monotonic() + PATIENCE
    told = False
    while True:
        try:
            return make()
        except PathBusy as busy:
            if busy.pid is None or not is_orphan(busy.pid) or give_up() or monotonic() > deadline:
                raise
            if not told:
                _log.info("process %d still publishes a save of a run that was killed: waiting", busy.pid)
            told = True
        threading.Event().wait(_LOOK)
        let_through()


def is_orphan(pid: int) -> bool:
    """Whether a process is a worker whose trainer is gone. It may have ended since the caller heard of it."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except FileNotFoundError:
        return True  # the next try finds the path free
    except OSError:
        return False
    fields = stat_fields(pid)
    if not fields or not arguments[0]:
        return True  # it has just ended, or waits to be noticed
    if BOOT.encode() not in arguments:
        return False
    try:
        _, trainer, _ = json.loads(arguments[arguments.index(BOOT.encode()) + 1])
    except (ValueError, IndexError):
        return False
    return fields[1] != str(trainer)
