"""Background threads that yield to training: niced, and helped by an un-niced one when late."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Protocol

__all__ = ["WRITERS", "Pool", "Source", "lower_priority"]

_log = logging.getLogger("gockpt")


WRITERS = 7
"""Threads beside the workers that write large chunks: while some hash theirs, others keep the disk busy."""

Task = Callable[[], None]


def lower_priority(nice: int) -> None:
    """Give the calling thread this nice value; a thread of a nicer process keeps its own."""
    try:
        # On Linux the priority belongs to the thread, not to the process.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
    except OSError as error:
        _log.debug("thread keeps its priority: %s", error)


class Source(Protocol):
    """Where threads get their work."""

    def take(self) -> Task | None:
        """Return the next task, waiting for one; ``None`` when there never will be one again."""

    def take_write(self) -> Task | None:
        """Do the same for tasks that mostly wait for the disk."""


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
            self._start(source.take, f"gockpt-worker-{number}", self._nice)
        for number in range(WRITERS):
            self._start(source.take_write, f"gockpt-worker-write-{number}", self._nice)

    def boost(self, source: Source) -> None:
        """Add a thread of normal priority: a niced one can't be raised again without privilege."""
        self._start(source.take, "gockpt-worker-boost", 0)

    def join(self) -> None:
        """Wait until every thread ended."""
        for thread in self._running:
            if thread is not threading.current_thread():
                thread.join()
        self._running.clear()

    def _start(self, take: Callable[[], Task | None], name: str, nice: int) -> None:
        thread = threading.Thread(target=_work, args=(take, nice), name=name, daemon=True)
        thread.start()
        self._running.append(thread)


def _work(take: Callable[[], Task | None], nice: int) -> None:
    if nice:
        lower_priority(nice)
    while (task := take()) is not None:
        task()
