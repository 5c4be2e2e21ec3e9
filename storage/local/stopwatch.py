"""Stopwatch for work that several threads do at the same time."""

from __future__ import annotations

import threading
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Stopwatch"]


class Stopwatch:
    """A context manager that runs while at least one thread is inside.

    Attributes:
        seconds: Time that it has run, until it last stopped.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._mutex = threading.Lock()
        self._inside = 0
        self._began = 0.0

    def __enter__(self) -> None:
        with self._mutex:
            if not self._inside:
                self._began = perf_counter()
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._mutex:
            self._inside -= 1
            if not self._inside:
                self.seconds += perf_counter() - self._began
