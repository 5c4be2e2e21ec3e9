"""Signals that arrive while the library works are handled when it is done.

Python runs handlers between any two instructions of the main thread. One that raises (Ctrl-C does) could
leave a save half changed anywhere; one that calls the library would find it in the middle of something.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["deferred", "kept_handlers", "let_through"]

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class _Keeper:
    """Stands in for the handlers of the process. The second of one kind is let through: patience ends."""

    def __init__(self) -> None:
        self.depth = 0
        self.pending: list[int] = []
        self.handlers: dict[int, Callable[[int, Any], Any]] = {}

    def __call__(self, number: int, frame: Any) -> None:
        if self.depth and number not in self.pending:
            self.pending.append(number)
        else:
            self.handlers[number](number, frame)

    def install(self) -> None:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler) and handler is not self:
                self.handlers[number] = handler
                signal.signal(number, self)

    def remove(self) -> None:
        for number, handler in self.handlers.items():
            if signal.getsignal(number) is self:
                signal.signal(number, handler)

    def deliver(self) -> None:
        """Run what was kept back, each in its own right: one that raises does not swallow the next."""
        if not self.pending:
            return
        number = self.pending.pop(0)
        try:
            signal.raise_signal(number)
        finally:
            self.deliver()


_keeper = _Keeper()


def kept_handlers() -> list[Callable[[int, Any], Any]]:
    """Return the handlers of the process that are stood in for."""
    return list(_keeper.handlers.values())


def _concerned() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def deferred() -> Iterator[None]:
    """Keep handlers back until the end of the outermost such block, then run them. Main thread only."""
    if not _concerned():
        yield
        return
    _keeper.depth += 1
    try:
        if _keeper.depth == 1:
            _keeper.install()
        yield
    finally:
        _keeper.depth -= 1
        if _keeper.depth == 0:
            _keeper.remove()
            _keeper.deliver()


def let_through() -> None:
    """Run what was kept back so far: for a long wait inside a block, where nothing is half done."""
    if not _concerned() or not _keeper.pending:
        return
    depth, _keeper.depth = _keeper.depth, 0
    try:
        _keeper.deliver()
    finally:
        _keeper.depth = depth
