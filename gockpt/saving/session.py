"""Session of saves: what ticks ask of the save in flight.

Every method is called with the engine's lock held.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from gockpt.core.descriptors import Capture
from gockpt.core.save_state import Event, State
from gockpt.core.timeline import Trace
from gockpt.errors import OptionsError, SaveError
from gockpt.saving.closing import added_at, write_additions
from gockpt.saving.facts import Shape, shape_of
from gockpt.saving.handle import Progress, Saved, SaveHandle
from gockpt.saving.last_tick import MOST_REMEMBERED
from gockpt.saving.memory import Memory
from gockpt.saving.report import ended_progress
from gockpt.saving.save_in_flight import SaveInFlight
from gockpt.saving.window_plan import WindowPlanning

if TYPE_CHECKING:
    from collections.abc import Callable

    from gockpt.core.array_spec import Name
    from gockpt.core.descriptors import ArrayPlace
    from gockpt.options import Options
    from gockpt.planning.planner import Plan
    from gockpt.planning.rates import Pace
    from gockpt.saving.boundary import Boundary
    from gockpt.saving.device_selection import DeviceStagers
    from gockpt.saving.last_tick import Addition
    from gockpt.saving.lock import Lock
    from gockpt.staging.task_thread import TaskThread
    from gockpt.state.live_state import LiveState
    from gockpt.workers.executor import Background

    Distrust = tuple[frozenset[str], frozenset[Name], str]

__all__ = ["Save"]

_log = logging.getLogger("gockpt")

MAX_ATTEMPTS = 4


class Save(SaveInFlight):
    """Starts, closes, retargets and ends saves, one after the other.

    Attributes:
        shape: The geometry of the state that was looked at last.
        looked_at: The last tick at which the whole state was fingerprinted.
    """

    def __init__(
        self,
        *,
        options: Options,
        lock: Lock,
        tasks: TaskThread,
        background: Background[Any],
        pace: Pace,
        drive: Callable[[SaveHandle, Callable[[], bool], float | None], None],
        on_saved: Callable[[Saved], None],
        stagers: DeviceStagers,
    ) -> None:
        memory = Memory(options, background, stagers)
        super().__init__(
            options=options, lock=lock, background=background, pace=pace, memory=memory, on_saved=on_saved
        )
        self.shape: Shape | None = None
        self.looked_at: Boundary | None = None
        self._tasks = tasks
        self._drive = drive
        self._document: dict[str, Any] = {}
        self._additions: tuple[ArrayPlace, ...] = ()
        self._planning = WindowPlanning(options, pace, memory, tasks)

    # -- from outside ------------------------------------------------------------------------

    @property
    def step(self) -> int | None:
        """The step of the newest save."""
        return None if self.handle is None else self.handle.step

    def prepare(self, live: LiveState) -> None:
        """Reserve the memory a save of ``live`` takes, behind the caller."""
        self.memory.prepare(live, self.shape_of(live), self._tasks)

    def shape_of(self, live: LiveState) -> Shape:
        """Return the geometry of ``live`` and remember it."""
        self.shape = shape_of(live, self.shape)
        return self.shape

    def try_out(self, live: LiveState, moment: Boundary) -> None:
        """Raise the error that a save of this state, with these extras, would raise; keeps nothing."""
        added_at(live, moment, self.memory.admission())

    def open(self, live: LiveState, plan: Plan, due: int, moment: Boundary) -> None:
        """Start a window that will close at step ``due``; the first part is copied now."""
        self._clear()
        self._spoiled = ""
        self._begin(live, plan, due, moment)
        self._run(Event.OPENED, live)
        self._remember(live, moment)

    def go_on(self, live: LiveState, moment: Boundary) -> None:
        """Send the next part of an open window."""
        self._compare_shape(live)
        self._run(Event.TICKED, live)
        if self.state is State.BROKEN:
            return
        self.looked_at = None
        if sum(a.layout.spec.nbytes for a in self._additions) <= MOST_REMEMBERED:
            self._remember(live, moment)

    def stands_at_tick(self, live: LiveState) -> bool:
        """Whether the state still is what it was at the last tick, as far as this save looked at it."""
        attempt = self.attempt or self._voided
        if attempt is None or self.state is State.BROKEN:
            return False
        return self.shape_of(live).key is attempt.shape_key and attempt.stands_at_tick(live)

    def close(
        self,
        live: LiveState,
        moment: Boundary,
        *,
        remembered: bool = False,
        addition: Addition | None = None,
        seen: bool = True,
    ) -> None:
        """Take the closing boundary now, from an open window or from nothing.

        Where no update was ``seen`` since the last tick, none may be seen after this one: then no copy can
        be finished in time, and all is copied at once.
        With ``remembered``, extras, random states and options are those of the window's last tick: the
        state was shown to be the same as then. So they are with an ``addition``, outside of a window.
        """
        handle, step = None, moment.step
        self._clear()
        self._compare_shape(live)
        if self.state is State.BROKEN:
            # What left early is dropped; all of it leaves at this closing tick. Nothing is lost.
            handle = self.handle
            self._note(f"all of step {step} leaves at the closing tick: {self._spoiled}")
            self.drop()
        if self.attempt is None:
            self._begin(live, self._plan_now(live), step, moment, handle=handle, at_once=not seen)
        if addition is not None:
            self._document, self._additions = addition[0], write_additions(addition[1], self.memory)
        self._take_boundary(live, moment, remembered=remembered or addition is not None)

    def retarget(self, live: LiveState, moment: Boundary, *, remembered: bool = False) -> None:
        """Try a void save again: all of it leaves at this tick, and this tick's step is published."""
        handle, step = self.handle, moment.step
        if handle is None:
            return
        self._clear()
        if handle.attempts >= MAX_ATTEMPTS:
            failure = SaveError(f"step {handle.step} could not be captured in {MAX_ATTEMPTS} attempts")
            self.fail(failure, Event.FAILED)
            return
        if handle.attempts >= MAX_ATTEMPTS - 2:
            self.overtaken = None
        why = handle.events[-1] if handle.events else "the first attempt did not match"
        handle.retarget(step, why)
        _log.warning("save retargeted to step %d: %s", step, why)
        self._begin(live, self._plan_now(live), step, moment, handle=handle)
        self._take_boundary(live, moment, remembered=remembered)

    def progress(self, handle: SaveHandle) -> Progress:
        """Return the progress of ``handle``."""
        with self._lock:
            skipped = handle.skipped
            if handle.durable.done():
                return ended_progress(handle)
            if self.state is State.CAPTURED and self.job is not None:
                return Progress("captured", self.job.written_bytes, self.job.total_bytes, skipped)
            done = 0 if self.attempt is None else self.attempt.copied_bytes
            total = 0 if self.shape is None else self.shape.nbytes
            return Progress(self.state.phase, done, total, skipped)

    # -- the parts of a save -----------------------------------------------------------------

    def _begin(
        self,
        live: LiveState,
        plan: Plan,
        due: int,
        moment: Boundary,
        *,
        handle: SaveHandle | None = None,
        at_once: bool = False,
    ) -> None:
        afresh = handle is None
        self._voided = None  # it would keep a smaller arena alive
        if handle is None:
            self.trace = Trace(moment.began)
            handle = SaveHandle(due, plan, self.trace, drive=self._drive, progress=self.progress)
        self.handle = handle
        self._boosted = False
        self.attempt, self.job = self.memory.attempt(
            live,
            self.shape_of(live),
            plan,
            excluded=self.excluded,
            overtaken=None if at_once else self.overtaken,
            tasks=self._tasks,
            outcome=self,
            trace=self.trace,
            afresh=afresh,
        )
        handle.plan = dataclasses.replace(handle.plan, device_copies=self.attempt.variant)
        self._background.serve(self.job)

    def plan(self, live: LiveState, ticks: int) -> Plan:
        """Return the plan for a save whose closing tick is ``ticks - 1`` ticks away."""
        return self._planning.plan(live, self.shape_of(live), ticks, self.excluded)

    def _plan_now(self, live: LiveState) -> Plan:
        return self._planning.plan_now(live, self.shape_of(live), self.excluded)

    def _compare_shape(self, live: LiveState) -> None:
        """Spoil the window if the state's geometry is no longer the one that it was opened with."""
        if self.attempt is not None and self.shape_of(live).key is not self.attempt.shape_key:
            self.spoil("parameters, buffers or states were added, removed or reshaped")

    def _remember(self, live: LiveState, moment: Boundary) -> None:
        """Keep what only this tick knows, in case the window has to be closed here after all."""
        try:
            self._document, self._additions = self._add(live, moment)
        except OptionsError as error:
            # The handle may keep the error for long; its frames would keep what was copied so far.
            raise error.with_traceback(None)  # noqa: B904 - it is the error itself
        self.looked_at = moment

    def _add(self, live: LiveState, moment: Boundary) -> tuple[dict[str, Any], tuple[ArrayPlace, ...]]:
        """Copy everything but the live state's entries; return the state document and the arrays' places."""
        document, added = added_at(live, moment, self.memory.admission())
        return document, write_additions(added, self.memory)

    def _take_boundary(self, live: LiveState, moment: Boundary, *, remembered: bool) -> None:
        attempt, _, handle = self._started()
        handle.move(moment.step)
        if not remembered:
            self._remember(live, moment)
        attempt.close(live)
        known = {"step": moment.step, "optimizer_steps": moment.updates, "exact": True}
        attributes = {"gockpt": {**known, **self._warnings.metrics(moment.step, self._document)}}
        arrays = attempt.places(live) + self._additions
        self._capture = Capture(
            moment.step,
            arrays,
            {},
            self._document,
            attributes,
            exact=True,
            grad_dtype=self._options.grad_dtype,
        )
        self.taken = moment
        self._run(Event.DUE)
