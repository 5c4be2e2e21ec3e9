"""Saving without a tick: an open window is closed, or a save made, of the last tick's state."""

from __future__ import annotations

import logging
import threading
from time import monotonic
from typing import TYPE_CHECKING

from gockpt.core.save_state import Event, State
from gockpt.deferred_signals import deferred, let_through
from gockpt.errors import GockptError, SaveAborted, UsageError
from gockpt.saving.inside_call import POLL, save_inside_call, wait_until_free
from gockpt.saving.moments import in_update

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from typing import Any

    from gockpt.saving.boundary import Boundary
    from gockpt.saving.handle import SaveHandle
    from gockpt.saving.last_tick import LastTick
    from gockpt.saving.lock import Lock
    from gockpt.saving.optimizer_hooks import Hooks
    from gockpt.saving.session import Save
    from gockpt.state.live_state import LiveState

__all__ = ["WithoutTick"]

_log = logging.getLogger("gockpt")


class WithoutTick:
    """The part of the engine that saves the last tick's state after that tick has returned."""

    _save: Save
    _hooks: Hooks
    _changed: Lock
    _last: LastTick
    _updates: int
    _model: Callable[[], Any]
    _leaves: Sequence[Any]
    _thread: threading.Thread
    _collect: Callable[[], LiveState]
    _at_work: Callable[[], AbstractContextManager[None]]
    _held: object
    _inside: bool
    _expect_outside: Callable[[], None]

    @property
    def of_this_process(self) -> bool:
        """Whether this is the process the engine was made in."""
        raise NotImplementedError

    @property
    def last_tick_saved(self) -> bool:
        """Whether the last tick's state is saved, or on its way."""
        return self._last.boundary is None or self._save.taken is self._last.boundary

    @property
    def training_thread(self) -> threading.Thread:
        """The thread of the last tick."""
        return self._thread

    @property
    def last_told(self) -> float:
        """Start of the last tick, in ``perf_counter`` seconds; 0 before the first."""
        return 0.0 if self._last.boundary is None else self._last.boundary.began

    @property
    def inside(self) -> bool:
        """Whether a tick or hook is under way in this very thread."""
        return self._inside and threading.current_thread() is self._thread

    @property
    def updating(self) -> bool:
        """Whether an optimizer is in the middle of its step in this very thread."""
        return in_update(self._leaves)

    def at_rest(self) -> bool:
        """Whether the state is that of the last tick, so that none is to come for what has changed since."""
        if self.updating:
            return False
        with deferred(), self._changed, self._at_work():
            boundary = self._last.boundary
            return boundary is None or self._moved(boundary) is None

    def only_waits(self) -> bool:
        """Whether ``wait`` would take no state, or the last tick's."""
        takes_none = not self._save.state.needs_tick and self._last.left_out is None
        return takes_none or self.at_rest()

    def finishes(self) -> bool:
        """Whether ``finish`` would take no state, or the last tick's."""
        return self.last_tick_saved or self.at_rest()

    def stands(self) -> bool:
        """Whether the last tick's state is saved, or could be saved now with all that belongs to it."""
        if self.inside or self.updating:
            return False
        if self.last_tick_saved:
            return True
        with deferred(), self._changed, self._at_work():
            boundary = self._last.boundary
            if boundary is None or not self._alone:
                return False
            if self._save.looked_at is not boundary and self._last.addition is None:
                return False
            return self._moved(boundary) is None

    def settle_left_out(self) -> None:
        """Save the last tick's state if the last due save was left out; where it can't be saved, say so.

        Called when nothing is in flight.
        """
        with deferred(), self._changed, self._at_work():
            left_out, boundary = self._last.left_out, self._last.boundary
            if left_out is None or boundary is None or not self._alone or self._save.state is not State.IDLE:
                return
            try:
                self._save_last_tick()
            except SaveAborted as error:
                _log.warning("the save of step %d was left out, and %s", left_out.step, error)
                return
            except UsageError as error:
                _log.warning(
                    "the save of step %d was left out, and can't be made now: %s", left_out.step, error
                )
                return
            _log.info(
                "step %d is saved, since the save of step %d was left out", boundary.step, left_out.step
            )

    def finish(self, timeout: float | None = None) -> SaveHandle | None:
        """Save the last tick's state if it isn't saved, and return when nothing is in flight.

        After ``timeout`` seconds it no longer waits for the disk.

        Raises:
            SaveError: If it can't be saved, because it changed after the last tick; or if that save, or
                the one that was in flight, failed.
        """
        earlier: GockptError | None = None
        try:
            self._end_of_flight()
        except GockptError as error:
            earlier = error
        with deferred(), self._changed, self._at_work():
            if not self.last_tick_saved:
                wait_until_free(self._save, self._changed)
                try:
                    self._save_last_tick()
                except GockptError as error:
                    if earlier is not None:
                        error.add_note(f"and the save before failed: {earlier}")
                    raise
                if isinstance(earlier, SaveAborted):
                    earlier = None  # a window that could not be closed: its state is saved now
            handle = self._save.handle
        self._end_of_flight(timeout)
        if earlier is not None:
            raise earlier
        return handle

    def drive(self, handle: SaveHandle, done: Callable[[], bool], timeout: float | None) -> None:
        """Do what only the training thread can do so that ``done`` comes true, then wait for it."""
        if not self.of_this_process:
            msg = "this save belongs to the process that forked this one; only the parent can wait for it"
            raise UsageError(msg)
        deadline = None if timeout is None else monotonic() + timeout
        # Another thread may do it once the one that trained has ended.
        while threading.current_thread() is not self._thread and self._thread.is_alive():
            left = None if deadline is None else deadline - monotonic()
            if done() or (left is not None and left <= 0):
                return
            self._thread.join(POLL if left is None else min(POLL, left))
            let_through()
        self._expect_outside()
        while self._save.handle is handle and not done():
            with deferred(), self._changed:
                state, job = self._save.state, self._save.job
                if state is State.CLOSING:
                    self._save.settle()
                elif state.needs_tick:
                    self._close_at_last_tick()
                elif state is State.CAPTURED and job is not None and not job.closed:
                    self._save.fail(SaveAborted("interrupted while it was handed over"), Event.FAILED)
                elif not done():
                    left = None if deadline is None else deadline - monotonic()
                    if left is not None and left <= 0:
                        return
                    # A handle is resolved just after the lock was let go, and then notified of.
                    self._changed.wait(POLL if left is None else min(POLL, left))
            let_through()  # here nothing is half done, and a call around this one may keep handlers back

    def _end_of_flight(self, timeout: float | None = None) -> None:
        """Return when nothing is in flight; raise what failed."""
        raise NotImplementedError

    @property
    def _alone(self) -> bool:
        """Whether no other thread trains."""
        return threading.current_thread() is self._thread or not self._thread.is_alive()

    def _save_last_tick(self) -> None:
        """Capture the last tick's state now; the lock is held, and nothing is in flight.

        Raises:
            SaveAborted: If it changed, or may have.
        """
        boundary = self._last.boundary
        if boundary is None:
            return
        if not self._alone:
            msg = f"the state of step {boundary.step} can't be saved here: another thread trains"
            raise SaveAborted(msg)
        why = self._moved(boundary)
        if why is not None:
            msg = (
                f"the state of step {boundary.step} can't be saved any more: {why} after the last call; "
                "call save_overlapped(...) at the state to save"
            )
            raise SaveAborted(msg)
        before = self._save.handle
        try:
            save_inside_call(self._save, self._collect, boundary, addition=self._last.addition)
        except BaseException as error:
            self._save.give_up(error, before)
            raise
        self._last.left_out = self._held = None

    def _moved(self, boundary: Boundary) -> str | None:
        """Return the evidence that the state is no longer that of the last tick, or ``None``."""
        if self._updates != boundary.updates or self._hooks.reset():
            return "the optimizer stepped"
        return self._last.moved(self._model(), self._leaves)

    def _close_at_last_tick(self) -> None:
        """Close the open window where training stands, if that still is the last tick's boundary."""
        boundary, save = self._last.boundary, self._save
        if boundary is None:
            return
        try:
            live = self._collect()
            looked = save.looked_at is boundary
            if save.state is State.VOID and not looked:  # it was found out after that tick had returned
                why = self._moved(boundary)
            elif self._updates != boundary.updates or self._hooks.reset():
                why = "the optimizer stepped"
            else:
                why = None if looked and save.stands_at_tick(live) else "parameters may have changed"
            if why is not None:
                msg = (
                    f"the save of step {save.step} can't be closed here: {why} after the last call (step "
                    f"{boundary.step}); call save_overlapped(...) at the state to save, then wait()"
                )
                save.fail(SaveAborted(msg), Event.ABORTED)
            elif save.state is State.VOID:
                # Nobody trains now: copying all at once costs nothing and can't be overtaken.
                save.overtaken = None
                save.retarget(live, boundary, remembered=looked)
            else:
                save.close(live, boundary, remembered=True)
        except Exception as error:  # noqa: BLE001 - the handle carries it, and the caller raises it
            save.give_up(error, None)
        except BaseException:
            # The next tick may go on, but not with what was half closed here.
            save.spoil("closing it at the last call was interrupted")
            raise
