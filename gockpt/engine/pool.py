"""Background threads that yield to training: niced, and helped by an un-niced one when late."""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Pool", "Source"]

_log = logging.getLogger("gockpt")


class Source(Protocol):
    """Where threads get their work."""

    def take(self) -> Callable[[], None] | None:
        """Return the next task, waiting for one; ``None`` when there never will be one again."""


class Pool:
    """Threads that run a source's tasks until it ends. They start when the first save needs them."""

    def __init__(self, threads: int, nice: int) -> None:
        self._threads = threads
        self._nice = nice
        self._running: list[threading.Thread] = []

    def serve(self, source: Source) -> None:
        """Work on ``source`` behind the caller until it ends."""
        self._running = [t for t in self._running if t.is_alive()]
        for number in range(self._threads):
            self._start(source, f"gockpt-worker-{number}", self._nice)

    def boost(self, source: Source) -> None:
        """Add a thread of normal priority: a niced one can't be raised again without privilege."""
        self._start(source, "gockpt-worker-boost", 0)

    def join(self) -> None:
        """Wait until every thread ended."""
        for thread in self._running:
            if thread is not threading.current_thread():
                thread.join()
        self._running.clear()

    def _start(self, source: Source, name: str, nice: int) -> None:
        thread = threading.Thread(target=_work, args=(source, nice), name=name, daemon=True)
        thread.start()
        self._running.append(thread)


def _work(source: Source, nice: int) -> None:
    if nice:
        try:
            # On Linux the priority belongs to the thread, not to the process.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
        except OSError as error:  # pragma: no cover - lowering one's own priority is always allowed
            _log.debug("worker thread keeps its priority: %s", error)
    while (task := source.take()) is not None:
        task()
