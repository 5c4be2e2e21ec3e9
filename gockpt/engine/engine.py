"""The engine: what a tick and an optimizer's update mean for the save in flight.

One lock guards everything the training thread and the workers share. A boundary is always a tick,
never a hook: parameters, states, buffers, group options, extras and random states are all as of the call
that closes the window. Hooks only collect.
"""

from __future__ import annotations

import logging
import os
import threading
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any

from gockpt.cadence import Cadence, Moment
from gockpt.engine.hooks import Hooks
from gockpt.engine.pace import Pace
from gockpt.engine.pool import Pool
from gockpt.engine.save import Boundary, Save, as_save_error
from gockpt.engine.sizing import facts_of
from gockpt.errors import SaveAborted, UsageError
from gockpt.lifecycle import Event, State
from gockpt.schedule import choose_every, make_plan
from gockpt.state import collect
from gockpt.transfer import Transfer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from gockpt.engine.handle import Saved, SaveHandle
    from gockpt.options import Options
    from gockpt.state import LiveState
    from gockpt.storage.store import Store

    Extra = Mapping[str, Any] | None

__all__ = ["Engine"]

_log = logging.getLogger("gockpt")

FIRST_AUTO_EVERY = 10


class Engine:
    """Saves one model and its optimizers into one store.

    The engine does not keep the model alive; between saves it holds no tensor at all.
    """

    def __init__(
        self,
        model: Callable[[], Any],
        optimizers: Sequence[Any],
        store: Store,
        *,
        every: int | str,
        options: Options,
        last_step: int = 0,
    ) -> None:
        """Attach to a model, given as a function that returns it, or ``None`` once it is gone."""
        self.options = options
        self.store = store
        self.closed = False
        self._model = model
        self._optimizers = optimizers
        self._auto_every = every == "auto"
        self._cadence = Cadence(FIRST_AUTO_EVERY if isinstance(every, str) else every)
        self._pid = os.getpid()
        self._changed = threading.Condition(threading.RLock())
        self._transfer = Transfer()
        self._pool = Pool(options.worker_threads, options.nice)
        self._pace = Pace()
        self._save = Save(
            store=store,
            options=options,
            lock=self._changed,
            transfer=self._transfer,
            pool=self._pool,
            pace=self._pace,
            drive=self.drive,
            on_saved=self._choose_every,
        )
        self._hooks = Hooks(optimizers, self)
        self._thread = threading.get_ident()
        self._step = last_step
        self._tick: Boundary | None = None
        self._updates = 0

    # -- the public side ---------------------------------------------------------------------

    @property
    def handle(self) -> SaveHandle | None:
        """The newest save, in flight or done."""
        return self._save.handle

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._save.state is not State.IDLE

    @property
    def window_open(self) -> bool:
        """Whether the save in flight still needs ticks."""
        return self._save.state in (State.OPEN, State.VOID)

    @property
    def of_this_process(self) -> bool:
        """Whether this is the process the engine was made in."""
        return os.getpid() == self._pid

    def tick(self, step: int | None, extra: Extra) -> SaveHandle | None:
        """Take one boundary: start, go on with, or close a save as the step asks for."""
        began = perf_counter()
        if not self.of_this_process:
            msg = "this process was forked from the one that saves; only the parent may call gockpt"
            raise UsageError(msg)
        with self._changed:
            self._thread = threading.get_ident()
            self._pace.tick(began, idle=not self.busy)
            step = self._step + 1 if step is None else step
            self._step = step
            if self._hooks.reset() and self._save.attempt is not None:
                self._save.attempt.broken = "an optimizer step ended in an exception"
            self._cadence, moment = self._cadence.tick(step)
            boundary = self._tick = Boundary(step, self._updates, extra)
            try:
                self._advance(boundary, moment)
            except BaseException as error:
                self._save.give_up(error)
                raise
            finally:
                if self.busy:
                    self._save.trace.span("stall", began, perf_counter(), step=step, what="tick")
            self._save.raise_pending()
            return self._save.handle

    def rebind(self, model: Callable[[], Any]) -> None:
        """Save from another object that holds the same state."""
        self._model = model

    def wait(self) -> None:
        """Close an open window at the last tick and return when nothing is in flight.

        Raises:
            SaveError: If the save in flight failed, or can't be closed here: parameters changed since
                the last tick.
        """
        handle = self.handle
        if handle is not None and not handle.done():
            error = handle.exception()
            if error is not None:
                self._save.error = None
                raise error
        with self._changed:
            self._save.raise_pending()

    def abort_window(self, why: str) -> None:
        """Give an open window up; what was captured already goes on to disk."""
        with self._changed:
            if self._save.state is State.CLOSING:
                self._save.settle()
            if self.window_open:
                message = f"the save of step {self._save.step} was given up: {why}"
                self._save.fail(SaveAborted(message), Event.ABORTED)

    def close(self) -> None:
        """Finish what is in flight and let go of threads, hooks, memory and the path."""
        if self.closed:
            return
        try:
            self.wait()
        finally:
            self.closed = True
            self._hooks.remove()
            self._transfer.close()
            self._pool.join()
            self._save.memory.release()
            self.store.close()

    def drive(self, handle: SaveHandle, timeout: float | None) -> None:
        """Do what only the training thread can do so that ``handle`` gets done, then wait for it."""
        if threading.get_ident() != self._thread or not self.of_this_process:
            return
        deadline = None if timeout is None else monotonic() + timeout
        with self._changed:
            while self._save.handle is handle and not handle.done():
                state = self._save.state
                if state is State.CLOSING:
                    self._save.settle()
                elif state in (State.OPEN, State.VOID):
                    self._close_at_last_tick()
                else:
                    left = None if deadline is None else deadline - monotonic()
                    if left is not None and left <= 0:
                        return
                    self._changed.wait(left)

    # -- updates, from the hooks: never raise ------------------------------------------------

    def before_update(self, optimizer: torch.optim.Optimizer, *, closure: bool) -> None:
        """Make sure that nothing still needed is overwritten (an optimizer is about to step)."""
        if self._save.attempt is None:
            return
        began = perf_counter()
        with self._changed:
            attempt, state = self._save.attempt, self._save.state
            if state is State.CLOSING:
                self._guard(self._save.settle)
            elif state is State.OPEN and attempt is not None and attempt.broken is None:
                self._guard(lambda: attempt.before_update(optimizer, closure=closure))
            else:
                return
            self._save.trace.span("stall", began, perf_counter(), step=self._step, what="before update")

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Collect what the update consumed (an optimizer has stepped)."""
        self._updates += 1
        if self._save.attempt is None:
            return
        began = perf_counter()
        with self._changed:
            attempt = self._save.attempt
            if self._save.state is not State.OPEN or attempt is None or attempt.broken is not None:
                return
            self._guard(lambda: attempt.after_update(optimizer))
            self._save.trace.span("stall", began, perf_counter(), step=self._step + 1, what="after update")

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except BaseException as error:
            if self._save.attempt is not None:
                self._save.attempt.broken = f"{type(error).__name__} while an update was watched: {error}"
            if self._save.state is State.CLOSING:
                self._save.fail(as_save_error(error), Event.FAILED)
            if not isinstance(error, Exception):
                raise
            _log.warning("watching an update failed; the save goes on without it", exc_info=True)

    # -- one tick ----------------------------------------------------------------------------

    def _advance(self, boundary: Boundary, moment: Moment) -> None:
        save = self._save
        if save.state is State.CLOSING:
            save.settle()
        if save.state is State.CAPTURED:
            self._while_busy(boundary.step, moment)
        if save.state is State.VOID:
            save.retarget(self._collect(), boundary)
        elif save.state is State.CAPTURED:
            return
        elif moment.due:
            self._hooks.assert_order()
            save.close(self._collect(), boundary)
        elif save.state is State.OPEN:
            save.go_on(self._collect(), boundary)
        else:
            self._maybe_open(boundary, moment)

    def _while_busy(self, step: int, moment: Moment) -> None:
        """The last save is still being written: help it when it is late, wait for it if asked to."""
        if moment.ticks_left >= self._window_ticks():
            return
        if self._cadence.every > 1:
            # With every=1 the next save is always due; being "late" then is no reason to disturb training.
            self._save.hurry()
        if self.options.when_busy == "wait":
            while self._save.state is State.CAPTURED:
                self._changed.wait()
        elif moment.due:
            _log.info("step %d is due, but step %s is still being written: skipped", step, self._save.step)

    def _maybe_open(self, boundary: Boundary, moment: Moment) -> None:
        save = self._save
        if save.shape is None:
            save.prepare(self._collect())
        ticks = moment.ticks_left + 1
        if ticks > self._window_ticks():
            return
        live = self._collect()
        pace = self._pace
        facts = facts_of(live, save.shape_of(live), save.barred, pace.step_seconds, pace.copy_rate)
        plan = make_plan(facts, window=self.options.window, ticks=ticks)
        if plan.window > 1 and plan.window == ticks:
            self._hooks.assert_order()
            due = boundary.step + moment.ticks_left * self._cadence.stride
            save.open(live, plan, due, boundary)

    def _window_ticks(self) -> int:
        """Return the window that a save starting now would ask for; an upper bound for "auto"."""
        if self.options.window != "auto":
            return self.options.window
        if self._save.shape is None:
            return 1
        facts = self._save.shape.rough(self._pace.step_seconds, self._pace.copy_rate)
        return make_plan(facts, window="auto", ticks=64).window

    def _collect(self) -> LiveState:
        model = self._model()
        if model is None:
            msg = "the model that this checkpointer saves does not exist any more"
            raise UsageError(msg)
        return collect(model, self._optimizers)

    # -- closing without a tick --------------------------------------------------------------

    def _close_at_last_tick(self) -> None:
        """Close where the training thread stands, if that still is the last tick's boundary."""
        boundary, save = self._tick, self._save
        if boundary is None:
            return
        try:
            live = self._collect()
            stepped = self._updates != boundary.updates or self._hooks.reset()
            if stepped or not self._looked_at(boundary) or not save.stands_at_tick(live):
                why = "the optimizer stepped" if stepped else "parameters may have changed"
                msg = (
                    f"the save of step {save.step} can't be closed here: {why} after the last call (step "
                    f"{boundary.step}); call save_overlapped(...) at the state to save, then wait()"
                )
                save.fail(SaveAborted(msg), Event.ABORTED)
            elif save.state is State.VOID:
                # Nobody trains now: copying all at once costs nothing and can't be overtaken.
                save.racing = None
                save.retarget(live, boundary, remembered=True)
            else:
                save.close(live, boundary, remembered=True)
        except Exception as error:  # noqa: BLE001 - the handle carries it, and the caller raises it
            save.give_up(error)

    def _looked_at(self, boundary: Boundary) -> bool:
        """Whether the save in flight looked at the whole state at the last tick."""
        return self._save.looked_at is boundary

    def _choose_every(self, saved: Saved) -> None:
        if not self._auto_every or not self._pace.step_seconds:
            return
        every = choose_every(
            stall_seconds=saved.exposed_seconds,
            step_seconds=self._pace.step_seconds,
            durable_seconds=saved.durable_seconds,
            overhead=self.options.overhead,
        )
        if every != self._cadence.every:
            _log.info("every='auto' now saves every %d steps", every)
        self._cadence = Cadence(every, self._cadence.last_step, self._cadence.stride)
