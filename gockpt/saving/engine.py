"""The engine: what a tick and an optimizer's update mean for the save in flight.

One lock guards everything the training thread and the workers share. A boundary is always a tick,
never a hook: parameters, states, buffers, group options, extras and random states are all as of the call
that closes the window. Hooks only collect.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

from gockpt.core.save_policy import Cadence, Moment
from gockpt.core.save_state import Event, State
from gockpt.deferred_signals import deferred
from gockpt.errors import SaveAborted, UsageError
from gockpt.kernels.gradient_encoding import warm
from gockpt.planning.planner import make_plan
from gockpt.planning.rates import Pace
from gockpt.planning.save_interval import FIRST, Interval
from gockpt.saving.around_updates import AroundUpdates
from gockpt.saving.boundary import Boundary
from gockpt.saving.closing import refusing
from gockpt.saving.device_selection import DeviceStagers
from gockpt.saving.facts import facts_of
from gockpt.saving.inside_call import save_inside_call, wait_until_free
from gockpt.saving.last_tick import LastTick
from gockpt.saving.lock import Lock
from gockpt.saving.optimizer_hooks import Hooks
from gockpt.saving.session import Save
from gockpt.saving.without_tick import WithoutTick
from gockpt.staging.task_thread import TaskThread
from gockpt.state.collection import Collection
from gockpt.state.optimizers import find_optimizers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gockpt.options import Options
    from gockpt.saving.device_selection import Devices
    from gockpt.saving.handle import Saved, SaveHandle
    from gockpt.state.live_state import LiveState
    from gockpt.workers.executor import Background

    Extra = Mapping[str, Any] | None

__all__ = ["Engine"]

_log = logging.getLogger("gockpt")


class Engine(AroundUpdates, WithoutTick):
    """Saves one model and its optimizers into one path.

    The engine keeps the optimizers alive, and the model only while a save is under way.
    """

    def __init__(
        self,
        model: Callable[[], Any],
        optimizers: Any,
        background: Background[Any],
        *,
        every: int | str | None,
        options: Options,
        last_step: int = 0,
        updates: int = 0,
        on_published: Callable[[Saved], None] = lambda _: None,
        devices: Devices | None = None,
    ) -> None:
        """Attach to a model, given as a function that returns it, or ``None`` once it is gone.

        ``on_published`` is called for each checkpoint once it is durable, on a worker; it must not wait.
        ``devices`` are those that state may leave behind training; CUDA's by default.
        """
        self.options = options
        self.closed = False
        self._model = model
        self._optimizers = list(optimizers) if isinstance(optimizers, (list, tuple)) else optimizers
        self._on_published = on_published
        self._interval = Interval(options.overhead) if isinstance(every, str) else None
        self._each_call = every is None
        self._tried_out = self._each_call
        self._cadence = Cadence(FIRST if isinstance(every, str) else every or 1)
        self._pid = os.getpid()
        self._changed = Lock()
        self._tasks = TaskThread()
        self._background = background
        self._pace = Pace()
        self._stagers = DeviceStagers(options, devices)
        self._save = Save(
            options=options,
            lock=self._changed,
            tasks=self._tasks,
            background=background,
            pace=self._pace,
            drive=self.drive,
            on_saved=self._published,
            stagers=self._stagers,
        )
        self._leaves = find_optimizers(optimizers).optimizers
        self._hooks = Hooks(self._leaves, self)
        self._thread = threading.current_thread()
        self._inside = False
        self._seen = True
        self._step = last_step
        self._last = LastTick()
        self._updates = updates
        self._held: object = None
        self._collection = Collection()

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
        return self._save.state.needs_tick

    @property
    def of_this_process(self) -> bool:
        """Whether this is the process the engine was made in."""
        return os.getpid() == self._pid

    def tick(self, step: int | None, extra: Extra) -> SaveHandle | None:
        """Take one boundary: start, go on with, or close a save as the step asks for."""
        began = perf_counter()
        if not self.of_this_process:
            msg = (
                "this process was forked from the one that saves this model into this path, and only the "
                "parent may call gockpt for that: save into another path here"
            )
            raise UsageError(msg)
        self._expect_outside()
        if self._stagers.capturing():
            msg = (
                "a CUDA graph is being captured, and a save made now would become part of it: "
                "call gockpt when the capture has ended, and after each replay of the graph"
            )
            raise UsageError(msg)
        with deferred(), self._changed, self._at_work():
            self._stagers.wait_for_updates()
            self._thread = threading.current_thread()
            before = self._save.handle
            self._pace.tick(began, idle=not self.busy)
            step = self._step + 1 if step is None else step
            self._step = step
            if self._hooks.reset():
                self._save.spoil("an optimizer step ended in an exception")
            self._cadence, moment = self._cadence.tick(step)
            last, self._seen = self._last.boundary, True
            if last is not None:
                self._seen = self._updates > last.updates
            boundary = Boundary(step, self._updates, extra, began)
            self._last.note(boundary, self._model(), self._leaves)
            try:
                self._advance(boundary, moment)
                self._keep_last(boundary)
            except BaseException as error:
                self._save.give_up(error, before)
                raise
            finally:
                # A save under way may need the model again, even if the user's last reference goes.
                needed = self.busy or self._last.left_out is not None
                self._held = self._model() if needed else None
                ended = perf_counter()
                if self.busy:
                    self._save.trace.span("stall", began, ended, step=step, what="tick")
                self._pace.left(ended, idle=not self.busy)
            self._save.raise_pending()
            return self._save.handle

    @property
    def trained_elsewhere(self) -> bool:
        """Whether another thread makes the ticks, and lives."""
        return self._thread is not threading.current_thread() and self._thread.is_alive()

    @property
    def step_seconds(self) -> float:
        """Seconds from tick to tick, measured; 0 before two ticks."""
        return self._pace.step_seconds or 0.0

    @property
    def counted(self) -> tuple[int, int]:
        """The step of the last tick, and the updates seen so far."""
        return self._step, self._updates

    def count_from(self, step: int, updates: int) -> None:
        """Count ticks without a step, and updates, on from these, which held at the last tick."""
        self._step = step
        last = self._last.boundary
        self._updates = updates + (0 if last is None else self._updates - last.updates)

    def let_go(self) -> None:
        """Forget the optimizers: the model is gone, so nothing is under way. Takes no lock."""
        self._optimizers, self._leaves = None, []
        self._hooks.let_go()
        self._last.forget_state()

    def rebind(self, model: Callable[[], Any]) -> None:
        """Save from another object that holds the same state."""
        self._model = model

    def wait(self) -> None:
        """Close an open window at the last tick and return when nothing is in flight.

        Raises:
            SaveError: If the save in flight failed, or can't be closed here: parameters changed since
                the last tick.
        """
        self._end_of_flight()
        self.settle_left_out()
        self._end_of_flight()

    def _end_of_flight(self, timeout: float | None = None) -> None:
        handle = self.handle
        if handle is not None and not handle.done():
            try:
                error = handle.exception(timeout)
            except TimeoutError:
                return
            if error is not None:
                self._save.error = None
                raise error
        with deferred(), self._changed:
            self._save.raise_pending()

    def abort_window(self, why: str) -> None:
        """Abort an open window; a state that was captured already is still written."""
        self._expect_outside()
        with deferred(), self._changed:
            self._last.left_out = None
            if self._save.state is State.CLOSING:
                self._save.settle()
            if self.window_open:
                message = f"the save of step {self._save.step} was given up: {why}"
                self._save.fail(SaveAborted(message), Event.ABORTED)

    def close(self) -> None:
        """Finish what is in flight and let go of threads, hooks, memory and the path.

        Interrupted while what was captured is still being written, it is not closed: close it again.
        """
        if self.closed:
            return
        if not self.of_this_process:
            msg = "a forked process can't close its parent's checkpointer"
            raise UsageError(msg)
        self._expect_outside()
        with deferred():
            try:
                self.wait()
            except BaseException as error:
                with self._changed:
                    # Nothing may be left that only a tick could end.
                    if self._save.state not in (State.IDLE, State.CAPTURED):
                        self._save.fail(SaveAborted("the checkpointer was closed"), Event.ABORTED)
                    if self._save.state is State.CAPTURED and not isinstance(error, Exception):
                        raise  # Ctrl-C: what was captured is still being written, so it can't be closed yet
                self._let_go_of_all()
                raise
            self._let_go_of_all()

    def _let_go_of_all(self) -> None:
        self.closed = True
        with self._changed:
            if self._save.state is State.IDLE:
                self._save.drop()
        self._held = None
        self._hooks.remove()
        self._tasks.close()
        try:
            self._background.close()
        finally:
            self._save.memory.release()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Mark that the training thread is inside a tick or hook, where signal handlers may run too."""
        outer, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = outer

    def _expect_outside(self) -> None:
        if self._inside and threading.current_thread() is self._thread:
            msg = (
                "this call came from inside the library, as from an extra or a signal handler: "
                "set a flag there, and call it after the step"
            )
            raise UsageError(msg)

    # -- one tick ----------------------------------------------------------------------------

    def _advance(self, boundary: Boundary, moment: Moment) -> None:
        save = self._save
        if self._each_call:
            save.hurry()
            wait_until_free(save, self._changed)
            self._hooks.assert_order()
            save_inside_call(save, self._collect, boundary)
            return
        if not self._tried_out and not moment.due:
            # What can't be saved is refused at the first call, not when the first save is due.
            save.try_out(self._collect(), boundary)
        self._tried_out = True
        if save.state is State.CLOSING:
            save.settle_if_ended()
        if save.state in (State.CLOSING, State.CAPTURED):
            self._while_busy(boundary.step, moment)
        if save.state is State.VOID:
            save.retarget(self._collect(), boundary)
        elif save.state in (State.CLOSING, State.CAPTURED):
            return
        elif moment.due:
            self._hooks.assert_order()
            save.close(self._collect(), boundary, seen=self._seen)
        elif save.state in (State.OPEN, State.BROKEN):
            save.go_on(self._collect(), boundary)
        else:
            self._maybe_open(boundary, moment)

    def _while_busy(self, step: int, moment: Moment) -> None:
        """The last save is still being written: help it when it is late, wait for it if asked to."""
        cadence = self._cadence
        needed = moment.ticks_left < self._window_ticks()
        late = needed or 2 * moment.ticks_left * cadence.stride <= cadence.every
        if late and cadence.every > 1 and self._save.state is State.CAPTURED:
            # With every=1 the next save is always due; being "late" then is no reason to disturb training.
            self._save.hurry()
        if not needed:
            return
        if self.options.when_busy == "wait":
            wait_until_free(self._save, self._changed)
        elif moment.due:
            self._leave_out(step)

    def _leave_out(self, step: int) -> None:
        """Count and tell a due save that is left out because the last one is still being written."""
        handle = self._save.handle
        count = 0 if handle is None else handle.leave_out(step)
        self._last.left_out = self._last.boundary
        # With every=1 it may be thousands: the 1st, 10th, 100th … are told.
        if self._cadence.every > 1 or count == 10 ** (len(str(count)) - 1):
            _log.warning(
                "step %d is due, but step %s is still being written: it is left out (%d so far); with "
                'when_busy="wait" the call waits instead',
                *(step, self._save.step, count),
            )

    def _keep_last(self, boundary: Boundary) -> None:
        """After a tick: remember what only it knows, where its state may have to be saved later."""
        if self._save.taken is boundary:
            self._last.left_out = None
        elif self._last.left_out is not None or self.options.on_signal:
            self._last.remember(boundary, self._collect(), self._save.memory)

    def _maybe_open(self, boundary: Boundary, moment: Moment) -> None:
        save = self._save
        if save.shape is None:
            live = self._collect()
            save.prepare(live)
            if self.options.window not in ("auto", 1):
                # Kernels are compiled and calibrated now, at the first call, not in the middle of the run.
                facts_of(live, save.shape_of(live), save.excluded, None, None)
                warm(self.options.grad_dtype)
            elif self.options.window == "auto":
                # Whether there will be a window is not known yet, so nobody waits for it.
                self._tasks.submit([lambda: warm(self.options.grad_dtype)])
        ticks = moment.ticks_left + 1
        if ticks > self._window_ticks():
            return
        live = self._collect()
        plan = save.plan(live, ticks)
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
        rates = (self._pace.step_seconds, self._pace.copy_rate)
        facts = self._save.shape.rough(*rates, self.options.grad_dtype)
        return make_plan(facts, window="auto", ticks=64).window

    def _collect(self) -> LiveState:
        model = self._model()
        if model is None:
            msg = "the model of this checkpointer no longer exists"
            raise UsageError(msg)
        with refusing():
            return self._collection.collect(model, self._optimizers)

    # -- outcomes ----------------------------------------------------------------------------

    def _published(self, saved: Saved) -> None:
        if self._last.left_out is None:
            self._held = None
        self._on_published(saved)
        self._choose_every(saved)

    def _choose_every(self, saved: Saved) -> None:
        if self._interval is None or not self._pace.step_seconds:
            return
        every = self._interval.saved(
            saved.window > 1,
            stall_seconds=saved.exposed_seconds,
            step_seconds=self._pace.step_seconds,
            durable_seconds=saved.durable_seconds,
        )
        if every != self._cadence.every:
            _log.info("every='auto' now saves every %d steps", every)
        self._cadence = Cadence(every, self._cadence.last_step, self._cadence.stride)
