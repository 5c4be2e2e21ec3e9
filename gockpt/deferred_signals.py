"""Deferral of signal handlers while the library works.

Python runs handlers between any two instructions of the main thread. One that raises (Ctrl-C does) could
leave a save half changed anywhere; one that calls the library would find it in an inconsistent state.
"""

from __future__ import annotations

import signal
import threading
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["deferred", "handler_of", "kept_handlers", "let_through", "set_handler", "uninterrupted"]

P = ParamSpec("P")
R = TypeVar("R")

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class _Keeper:
    """Replacement of the process's handlers. A second signal of one kind is handled at once."""

    def __init__(self) -> None:
        self.depth = 0
        self.pending: list[int] = []
        self.handlers: dict[int, Callable[[int, Any], Any]] = {}

    def __call__(self, number: int, frame: Any) -> None:
        if self.depth and number not in self.pending:
            self.pending.append(number)
        else:
            self.handlers[number](number, frame)

    def enter(self) -> None:
        if not self.depth:
            try:
                self.install()
            except BaseException:  # raised by the handler of a signal that came just now
                self.remove()
                raise
        self.depth += 1

    def leave(self) -> None:
        if self.depth > 1:
            self.depth -= 1
            return
        # This comes first: from here on handlers run at once, also those not yet restored.
        self.depth = 0
        try:
            self.remove()
        finally:
            self.deliver()

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
        """Run every deferred handler, also after one that raises."""
        if not self.pending:
            return
        number = self.pending.pop(0)
        try:
            signal.raise_signal(number)
        finally:
            self.deliver()


_keeper = _Keeper()


def kept_handlers() -> list[Callable[[int, Any], Any]]:
    """Return the handlers of the process that are replaced now."""
    return list(_keeper.handlers.values())


def handler_of(number: int) -> Any:
    """Return the handler of a signal, as :func:`signal.getsignal`, but never its replacement."""
    handler: Any = signal.getsignal(number)
    return _keeper.handlers[number] if handler is _keeper else handler


def set_handler(number: int, handler: Any) -> None:
    """Set the handler of a signal, as :func:`signal.signal`, also while it is replaced."""
    present: Any = signal.getsignal(number)
    if present is _keeper and callable(handler):
        _keeper.handlers[number] = handler
    else:
        signal.signal(number, handler)


def _concerned() -> bool:
    return threading.current_thread() is threading.main_thread()


class deferred:  # noqa: N801 - used like a function; a generator would have more places to be interrupted at
    """Defer handlers until the end of the outermost such block, then run them. Main thread only.

    A signal that comes while such a block is entered or left is handled at once: no work is half done then.
    """

    __slots__ = ("_concerned",)

    def __enter__(self) -> None:
        """Defer handlers from now on."""
        self._concerned = _concerned()
        if self._concerned:
            _keeper.enter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Run the deferred handlers, if this is the outermost block."""
        if self._concerned:
            _keeper.leave()


def uninterrupted(function: Callable[P, R]) -> Callable[P, R]:
    """Defer handlers while a function runs, except in its calls of :func:`let_through`."""

    @wraps(function)
    def call(*args: P.args, **more: P.kwargs) -> R:
        with deferred():
            return function(*args, **more)

    return call


def let_through() -> None:
    """Run the handlers deferred so far: for a long wait inside a block, with no work half done."""
    if not _concerned() or not _keeper.pending:
        return
    depth, _keeper.depth = _keeper.depth, 0
    try:
        _keeper.deliver()
    finally:
        if depth:
            _keeper.install()  # a handler that called the library has restored the process's handlers
        _keeper.depth = depth
