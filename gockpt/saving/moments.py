"""State of the calling thread when a signal handler, or another hook, calls the library."""

from __future__ import annotations

import functools
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from torch.optim import optimizer as torch_optimizer

from gockpt.deferred_signals import kept_handlers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import CodeType, FrameType

_NAMES = (
    *("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM"),
    *("SIGQUIT", "SIGCONT", "SIGTSTP", "SIGXCPU"),
)
_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""Signals that programs handle; checking every signal would take long."""

__all__ = ["in_signal_handler", "in_update"]


def in_update(optimizers: Sequence[Any]) -> bool:
    """Whether one of the optimizers is in the middle of ``step()`` in the calling thread."""
    for frame in _stack():
        code = frame.f_code
        if code.co_name == "step" and code.co_argcount:
            found = frame.f_locals.get(code.co_varnames[0])
        elif code.co_name == "wrapper" and code.co_filename == torch_optimizer.__file__:
            # Around the step() of every optimizer of torch, hooks included.
            found = next(iter(frame.f_locals.get("args", ())), None)
        else:
            continue
        if any(found is optimizer for optimizer in optimizers):
            return True
    return False


def in_signal_handler() -> bool:
    """Whether the calling thread is inside a signal handler that is installed now."""
    if threading.current_thread() is not threading.main_thread():
        return False
    installed = (signal.getsignal(number) for number in _SIGNALS)
    codes = {code for handler in (*installed, *kept_handlers()) if (code := _code_of(handler)) is not None}
    return any(frame.f_code in codes for frame in _stack())


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001
    while frame is not None:
        yield frame
        frame = frame.f_back


def _code_of(handler: Any) -> CodeType | None:
    while isinstance(handler, functools.partial):
        handler = handler.func
    if not callable(handler):
        return None
    handler = getattr(handler, "__func__", handler)
    return getattr(handler, "__code__", None) or getattr(type(handler).__call__, "__code__", None)
