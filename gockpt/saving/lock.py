"""The engine's lock: re-entrant, with a condition, and a queue of calls that must not run under it."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["Lock"]


class Lock:
    """A re-entrant lock; what was put off runs when its outermost holder has let go.

    Resolving a user's future runs the user's callbacks, which may call the library from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._condition = threading.Condition(self._lock)
        self._depth = 0
        self._later: deque[Callable[[], object]] = deque()

    def __enter__(self) -> Self:
        self._lock.acquire()
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        outermost = self._depth == 0
        self._lock.release()
        if not outermost:
            return
        ran = False
        while self._later:
            try:
                action = self._later.popleft()
            except IndexError:  # another thread was faster
                break
            action()
            ran = True
        if ran:
            with self._lock:
                self._condition.notify_all()

    def put_off(self, action: Callable[[], object]) -> None:
        """Run ``action`` once the lock is free; only while holding it."""
        self._later.append(action)

    def wait(self, timeout: float | None = None) -> bool:
        """Let go until notified, whatever the depth; ``False`` if ``timeout`` seconds passed."""
        depth, self._depth = self._depth, 0
        try:
            return self._condition.wait(timeout)
        finally:
            self._depth = depth

    def notify_all(self) -> None:
        """Wake everyone who waits; only while holding it."""
        self._condition.notify_all()
