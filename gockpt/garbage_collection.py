"""Pause of Python's cyclic garbage collector, for work that makes hundreds of thousands of objects at once.

Each full collection looks at every object of the process: while a manifest of thousands of arrays is parsed,
that takes as long as the parsing. Nothing that is made meanwhile is cyclic.
"""

from __future__ import annotations

import gc
import os
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["collection_paused"]


class _Pause:
    """A context manager that may be entered several times, by several threads."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._inside = 0
        self._was_enabled = False

    def __enter__(self) -> None:
        with self._mutex:
            if not self._inside:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._mutex:
            self._inside -= 1
            if not self._inside and self._was_enabled:
                gc.enable()

    def forget(self) -> None:
        """Begin anew in a forked child, whose other threads are gone."""
        if self._inside and self._was_enabled:
            gc.enable()
        self.__init__()  # type: ignore[misc]


_pause = _Pause()
os.register_at_fork(after_in_child=_pause.forget)


def collection_paused() -> _Pause:
    """Return a context manager that keeps the garbage collector from running on its own.

    It collects again, if it did before, once nobody is inside any more.
    """
    return _pause
