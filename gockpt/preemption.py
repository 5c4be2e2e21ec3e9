"""Handlers for signals that announce the end of a process: they save the state, then run the former handlers.

One request at a time. The next reported step saves its state. If none comes in time, as during an evaluation,
a thread sends the signal again, so that the main thread checks whether the state is still that of the last
step, and saves it. Handlers belong to this process: a forked child gets the former ones back.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

from gockpt import registry
from gockpt.deferred_signals import handler_of, kept_handlers, set_handler
from gockpt.errors import GockptError

if TYPE_CHECKING:
    from gockpt.saver import Saver

__all__ = ["after_step", "let_go", "watch"]

_log = logging.getLogger("gockpt")

PATIENT_STEPS = 4
"""A step that takes this many times its usual duration is no longer waited for."""
LEAST_PATIENCE = 0.2
LOOK = 0.25
"""Initial seconds between two checks whether the state is still the last step's; doubles up to 2 s."""


@dataclass(slots=True)
class _Request:
    """One received signal, until its former handler runs.

    Attributes:
        number: The signal.
        deadline: End of the grace, in ``monotonic`` seconds.
        waiting: The checkpointers whose state is still to be saved.
        saving: Whether one of them is being saved: checks meanwhile, while it waits for the disk, do
            nothing.
        done: Set when the former handler may run.
    """

    number: int
    deadline: float
    waiting: list[Saver]
    saving: bool = False
    done: threading.Event = field(default_factory=threading.Event)


_former: dict[int, Any] = {}
"""The former handlers, by signal."""
_request: _Request | None = None
_looks: set[int] = set()
"""Signals that the waiting thread has sent, to make the main thread check the state."""


def watch(saver: Saver) -> None:
    """Install the handlers for a checkpointer's ``on_signal``."""
    for number in _numbers(saver):
        if number in _former:
            continue
        if threading.current_thread() is not threading.main_thread():
            _log.warning(
                "on_signal=%r: handlers can be installed in the main thread only, so no signal is handled; "
                "make the first save there",
                saver.options.on_signal,
            )
            return
        _former[number] = handler_of(number)
        set_handler(number, _arrived)


def let_go(saver: Saver) -> None:
    """Restore the former handlers of signals that no open checkpointer needs."""
    if _request is not None and saver in _request.waiting:
        _request.waiting.remove(saver)
    needed = {n for other in registry.open_here() if other is not saver for n in _numbers(other)}
    for number in [n for n in _former if n not in needed]:
        if _request is not None and _request.number == number:
            continue  # its former handler is still to be run
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread can do this; an idle handler calls the former one
        former = _former.pop(number)
        if handler_of(number) is _arrived:
            set_handler(number, signal.SIG_DFL if former is None else former)


def after_step(saver: Saver) -> None:
    """Save the state of the step just reported, if a signal was received, and run the former handler."""
    request = _request
    if request is None or request.saving or saver not in request.waiting:
        return
    _save(saver, request)
    for other in list(request.waiting):
        if other.stands():
            _save(other, request)
    _pass_on_if_done()


def _numbers(saver: Saver) -> list[int]:
    return [int(signal.Signals[name]) for name in saver.options.on_signal]


def _arrived(number: int, _frame: Any) -> None:
    """Handle a signal, in the main thread."""
    global _request  # noqa: PLW0603 - one for the process
    if number in _looks:
        _looks.discard(number)
        _look()
        return
    if _request is not None:
        if number == signal.SIGINT == _request.number:
            _request.saving = False
            _request.waiting.clear()  # a second Ctrl-C means: do not wait
            _pass_on_if_done()
        return
    waiting = [saver for saver in registry.open_here() if number in _numbers(saver) and saver.last_told]
    grace = min((saver.options.grace for saver in waiting), default=0.0)
    _request = _Request(number, monotonic() + grace, waiting)
    if not waiting:
        _pass_on_if_done()
        return
    _log.warning("%s: saving the state of the next step", signal.Signals(number).name)
    usual = max(saver.step_seconds for saver in waiting)
    patience = min(grace / 2, max(LEAST_PATIENCE, PATIENT_STEPS * usual) if usual else grace / 2)
    waiter = threading.Thread(target=_wait, args=(_request, patience), name="gockpt-signal", daemon=True)
    waiter.start()


def _wait(request: _Request, patience: float) -> None:
    """Make the main thread check the state repeatedly, until the former handler has run."""
    pause = LOOK
    while not request.done.wait(min(patience, max(0.01, request.deadline - monotonic()))):
        patience, pause = pause, min(2.0, 2 * pause)
        if _arrived not in (signal.getsignal(request.number), *kept_handlers()):
            return  # the handler was replaced: the new one must not get the signal
        _looks.add(request.number)
        signal.pthread_kill(threading.main_thread().ident or 0, request.number)


def _look() -> None:
    """Save each state that is still that of its last step; drop the others when the grace ends."""
    request = _request
    if request is None or request.saving:
        return
    for saver in list(request.waiting):
        if saver.stands():
            _save(saver, request)
        elif monotonic() >= request.deadline:
            request.waiting.remove(saver)
            _log.error(
                "%s: no step of %s came within the grace of %.0f s, and its state may have changed since "
                "the last step: the newest checkpoint is an older one",
                *(signal.Signals(request.number).name, saver.path, saver.options.grace),
            )
    _pass_on_if_done()


def _save(saver: Saver, request: _Request) -> None:
    request.saving = True
    try:
        saver.finish_until(request.deadline)
        if saver.busy:
            _log.error(
                "%s: the grace ended before the state of %s was durable",
                *(signal.Signals(request.number).name, saver.path),
            )
    except GockptError as error:
        _log.error("%s: %s", signal.Signals(request.number).name, error)
    finally:
        request.saving = False
        if saver in request.waiting:
            request.waiting.remove(saver)


def _pass_on_if_done() -> None:
    """Run the former handler, or the system's default action, after everything is saved."""
    global _request  # noqa: PLW0603 - one for the process
    request = _request
    if request is None or request.waiting or request.saving:
        return
    _request = None
    request.done.set()
    former = _former.get(request.number, signal.SIG_DFL)
    if callable(former):
        former(request.number, None)
    elif former != signal.SIG_IGN:
        signal.signal(request.number, signal.SIG_DFL)
        signal.raise_signal(request.number)
        signal.signal(request.number, _arrived)  # if the default action doesn't end the process


def _after_fork() -> None:
    """Restore the former handlers in a forked child."""
    global _request  # noqa: PLW0603 - one for the process
    _request = None
    _looks.clear()
    for number, former in _former.items():
        if signal.getsignal(number) is _arrived:
            signal.signal(number, signal.SIG_DFL if former is None else former)
    _former.clear()


os.register_at_fork(after_in_child=_after_fork)
