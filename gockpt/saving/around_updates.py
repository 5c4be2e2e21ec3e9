"""Hooks around an optimizer's update: the part of the engine that never raises."""

from __future__ import annotations

import logging
from time import perf_counter
from typing import TYPE_CHECKING

from gockpt.core.save_state import Event, State
from gockpt.deferred_signals import deferred
from gockpt.errors import as_save_error

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from typing import Any

    import torch

    from gockpt.saving.capture import Attempt
    from gockpt.saving.device_selection import DeviceStagers
    from gockpt.saving.lock import Lock
    from gockpt.saving.session import Save

__all__ = ["AroundUpdates"]

_log = logging.getLogger("gockpt")


class AroundUpdates:
    """The part of the engine that is called around every update of an optimizer."""

    _save: Save
    _changed: Lock
    _stagers: DeviceStagers
    _step: int
    _updates: int
    _at_work: Callable[[], AbstractContextManager[None]]

    def before_hooks(self) -> None:
        """Finish copying before a user's own pre-hook can change what is copied."""
        self._hold_up(None, lambda attempt: attempt.let_overwrite(None))

    def before_update(self, optimizer: torch.optim.Optimizer, *, closure: bool) -> None:
        """Make sure that nothing still needed is overwritten (an optimizer is about to step)."""
        self._hold_up(optimizer, lambda attempt: attempt.before_update(optimizer, closure=closure))

    def _hold_up(self, optimizer: object | None, in_window: Callable[[Attempt], object]) -> None:
        """Let the update wait for the last copies of a closing tick, or for what a window needs."""
        if self._save.attempt is None:
            return
        began = perf_counter()
        with deferred(), self._changed, self._at_work():
            attempt, state = self._save.attempt, self._save.state
            if state is State.CLOSING:
                self._guard(lambda: self._save.let_overwrite(optimizer))
            elif attempt is not None and self._stagers.capturing():
                attempt.graphed = True  # nothing runs now
            elif state is State.OPEN and attempt is not None:
                self._guard(lambda: in_window(attempt))
            else:
                return
            self._save.trace.span("stall", began, perf_counter(), step=self._step, what="before update")

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Collect what the update consumed (an optimizer has stepped)."""
        captured = self._stagers.capturing()
        if not captured:
            self._updates += 1
            self._guard(lambda: self._stagers.updated(optimizer))
        if self._save.attempt is None:
            return
        began = perf_counter()
        with deferred(), self._changed, self._at_work():
            attempt = self._save.attempt
            if captured and attempt is not None:
                attempt.graphed = True  # nothing runs now
                return
            if self._save.state is not State.OPEN or attempt is None:
                return
            self._guard(lambda: attempt.after_update(optimizer))
            self._save.trace.span("stall", began, perf_counter(), step=self._step + 1, what="after update")

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except BaseException as error:
            self._save.spoil(f"{type(error).__name__} while an update was watched: {error}")
            if self._save.state is State.CLOSING:
                self._save.fail(as_save_error(error), Event.FAILED)
            if not isinstance(error, Exception):
                raise
            _log.warning("watching an update failed; the save goes on without it", exc_info=True)
