"""Session of the save in flight, at most one: executes the commands of the lifecycle table.

Every method is called with the engine's lock held; the three outcomes acquire it themselves, because worker
threads report them.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from gockpt.core.array_spec import Name, public_name
from gockpt.core.descriptors import Capture
from gockpt.core.save_state import Command, Event, State, advance
from gockpt.core.timeline import Trace
from gockpt.errors import OptionsError, SaveAborted, SaveError, WorkerError, as_save_error, wrap
from gockpt.options import Keep
from gockpt.planning.planner import make_plan
from gockpt.saving.closing import added_at, write_additions
from gockpt.saving.facts import Shape, shape_of
from gockpt.saving.handle import Progress, Saved, SaveHandle
from gockpt.saving.last_tick import MOST_REMEMBERED
from gockpt.saving.memory import Memory
from gockpt.saving.window_plan import plan_for
from gockpt.state.state_document import metrics_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gockpt.core.descriptors import ArrayPlace
    from gockpt.options import Options
    from gockpt.planning.planner import Plan
    from gockpt.planning.rates import Pace
    from gockpt.saving.boundary import Boundary
    from gockpt.saving.capture import Attempt
    from gockpt.saving.device_selection import DeviceStagers
    from gockpt.saving.last_tick import Addition
    from gockpt.saving.lock import Lock
    from gockpt.staging.host_stager import Transfer
    from gockpt.state.live_state import LiveState
    from gockpt.storage.local.transaction import Published
    from gockpt.workers.executor import Background
    from gockpt.workers.job_client import JobClient

    Distrust = tuple[frozenset[str], frozenset[Name], str]

__all__ = ["Save"]

_log = logging.getLogger("gockpt")

MAX_ATTEMPTS = 4


class Save:
    """Starts, closes, retargets and ends saves, one after the other.

    Attributes:
        state: State of the save in flight.
        attempt: Its training side; ``None`` when nothing is being captured or replayed.
        job: Its background side.
        handle: The newest save's handle, in flight or done.
        error: An error of the background that was not raised yet.
        trace: The newest save's spans.
        excluded: Parameters whose replay is no longer trusted.
        looked_at: The last tick at which the whole state was fingerprinted.
        taken: The tick whose state was taken last, unless that save failed.
        overtaken: Arrays that are copied inside the closing tick; ``None``: all of them.
    """

    def __init__(
        self,
        *,
        options: Options,
        lock: Lock,
        transfer: Transfer,
        background: Background[Any],
        pace: Pace,
        drive: Callable[[SaveHandle, Callable[[], bool], float | None], None],
        on_saved: Callable[[Saved], None],
        stagers: DeviceStagers,
    ) -> None:
        self.state = State.IDLE
        self.attempt: Attempt | None = None
        self.job: JobClient | None = None
        self.handle: SaveHandle | None = None
        self.error: BaseException | None = None
        self.trace = Trace()
        self.excluded: frozenset[str] = frozenset()
        self.overtaken: frozenset[Name] | None = frozenset()
        self.shape: Shape | None = None
        self.memory = Memory(options, background, stagers)
        self.looked_at: Boundary | None = None
        self.taken: Boundary | None = None
        self._options = options
        self._lock = lock
        self._transfer = transfer
        self._background = background
        self._pace = pace
        self._drive = drive
        self._on_saved = on_saved
        self._capture: Capture | None = None
        self._voided: Attempt | None = None
        self._document: dict[str, Any] = {}
        self._additions: tuple[ArrayPlace, ...] = ()
        self._boosted = False
        self._settling = False
        self._told_of_metric = False
        self._told_of_nonfinite = False
        self._commands: dict[Command, Callable[[Any], None]] = {
            Command.SEND_PART: self._send_part,
            Command.SEND_REST: self._send_rest,
            Command.HAND_OVER: self._hand_over,
            Command.QUARANTINE: self._quarantine,
            Command.DISCARD: self._discard,
            Command.FAIL: self._fail_handle,
            Command.RESOLVE: self._resolve,
        }

    # -- from outside ------------------------------------------------------------------------

    @property
    def step(self) -> int | None:
        """The step of the newest save."""
        return None if self.handle is None else self.handle.step

    def prepare(self, live: LiveState) -> None:
        """Reserve the memory a save of ``live`` takes, behind the caller."""
        self.memory.prepare(live, self.shape_of(live), self._transfer)

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
        self._begin(live, plan, due, moment)
        self._run(Event.OPENED, live)
        self._remember(live, moment)

    def go_on(self, live: LiveState, moment: Boundary) -> None:
        """Send the next part of an open window."""
        attempt = self.attempt
        if attempt is None or self._broken(live):
            return
        self._run(Event.TICKED, live)
        self.looked_at = None
        if sum(a.layout.spec.nbytes for a in self._additions) <= MOST_REMEMBERED:
            self._remember(live, moment)

    def stands_at_tick(self, live: LiveState) -> bool:
        """Whether the state still is what it was at the last tick, as far as this save looked at it."""
        attempt = self.attempt or self._voided
        return attempt is not None and not self._broken(live) and attempt.stands_at_tick(live)

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
        if self.state is State.OPEN and self.attempt is not None:
            why = self._broken(live)
            if why is not None:
                # What left early is dropped; all of it leaves at this closing tick. Nothing is lost.
                handle = self.handle
                self._note(f"all of step {step} leaves at the closing tick: {why}")
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

    def settle(self) -> None:
        """Prove the copies of the closing tick: the state is captured, or its attempt is void."""
        attempt = self.attempt
        if attempt is None or self.state is not State.CLOSING or self._settling:
            return
        # Helping with the last copy reports its end on this very thread.
        self._settling = True
        try:
            attempt.settle()
        finally:
            self._settling = False
        self._pace.copied(*attempt.sample)
        lost = attempt.lost
        if lost:
            # Which arrays lose such a race is chance, so all of their kind are copied at once from now on.
            raced = [name for name in lost if name not in attempt.doubts]
            kinds = {name[0] for name in raced}
            overtaken = frozenset(a.spec.name for a in attempt.layout.arrays if a.spec.name[0] in kinds)
            first = (raced or lost)[0]
            what = "changed before it was copied" if raced else f"can't be replayed: {attempt.doubts[first]}"
            why = attempt.refused or f"{public_name(first)} {what}"
            self._run(Event.TORN, (frozenset[str](), overtaken, why))
        else:
            self._run(Event.ARRIVED)

    def let_overwrite(self, optimizer: object | None) -> None:
        """Let an update, or with ``None`` anything, overwrite what the closing tick took the boundary of.

        What is copied from a device may be in flight still: then the save stays in this state.
        """
        attempt = self.attempt
        if attempt is not None and self.state is State.CLOSING:
            attempt.let_overwrite(optimizer)
            self._settle_if_ended()

    def settle_if_ended(self) -> None:
        """Settle unless something is in flight that the training thread can't finish."""
        if self.attempt is not None and self.state is State.CLOSING:
            self.attempt.collect()
            self._settle_if_ended()

    def _settle_if_ended(self) -> None:
        if self.attempt is not None and self.state is State.CLOSING and self.attempt.rest_ended:
            self.settle()

    def hurry(self) -> None:
        """Help the worker with a thread of normal priority: it is late."""
        if not self._boosted and self.job is not None:
            self._boosted = True
            self._background.boost(self.job)

    def fail(self, error: BaseException, event: Event) -> None:
        """End the save in flight with an error; its handle is told whatever happens on the way."""
        try:
            self._run(event, error)
        finally:
            self._fail_handle(error)

    def give_up(self, error: BaseException, before: SaveHandle | None) -> None:
        """After an error inside a tick: no half-made attempt stays, and the handle says why.

        The caller sees this very error now; it is not raised a second time. A save that was there
        ``before`` the tick and is out of the training thread's hands goes on.
        """
        pending = self.error
        if self.state is State.IDLE:
            self._discard(None)
            if self.handle is not before:
                self._fail_handle(as_save_error(error))
        elif self.state is not State.CAPTURED or (self.job is not None and not self.job.closed):
            self.fail(as_save_error(error), Event.FAILED)
        self.error = pending

    def raise_pending(self) -> None:
        """Raise an error of the background since the last call."""
        error, self.error = self.error, None
        if error is not None:
            raise error

    def progress(self, handle: SaveHandle) -> Progress:
        """Return the progress of ``handle``."""
        with self._lock:
            skipped = handle.skipped
            if handle.durable.done():
                failed = handle.durable.exception() is not None
                total = 0 if failed else handle.durable.result().nbytes
                return Progress("failed" if failed else "durable", total, total, skipped)
            if self.state is State.CAPTURED and self.job is not None:
                return Progress("captured", self.job.written_bytes, self.job.total_bytes, skipped)
            done = 0 if self.attempt is None else self.attempt.copied_bytes
            total = 0 if self.shape is None else self.shape.nbytes
            return Progress(self.state.value, done, total, skipped)

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
            transfer=self._transfer,
            outcome=self,
            trace=self.trace,
            afresh=afresh,
        )
        handle.plan = dataclasses.replace(handle.plan, device_copies=self.attempt.variant)
        self._background.serve(self.job)

    def plan(self, live: LiveState, ticks: int) -> Plan:
        """Return the plan for a save whose closing tick is ``ticks - 1`` ticks away."""
        return plan_for(
            live,
            self.shape_of(live),
            ticks=ticks,
            options=self._options,
            pace=self._pace,
            excluded=self.excluded,
            memory=self.memory,
            transfer=self._transfer,
        )

    def _plan_now(self, live: LiveState) -> Plan:
        if self._options.window not in ("auto", 1):
            return self.plan(live, 1)
        rates = (self._pace.step_seconds, self._pace.copy_rate)
        facts = self.shape_of(live).rough(*rates, self._options.grad_dtype)
        facts = dataclasses.replace(facts, obstacle=self.memory.obstacle(live))
        return make_plan(facts, window=self._options.window, ticks=1)

    def _broken(self, live: LiveState) -> str | None:
        """Return why the parts copied earlier can no longer be used, or ``None``."""
        attempt = self.attempt or self._voided
        if attempt is None:
            return None
        if attempt.broken is None and self.shape_of(live).key is not attempt.shape_key:
            attempt.broken = "parameters, buffers or states were added, removed or reshaped"
        return attempt.broken

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
        attributes = {"gockpt": {**known, **self._metrics(moment.step)}}
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

    def _metrics(self, step: int) -> dict[str, Any]:
        """Return the numbers among the extras, which retention can read without reading data."""
        metrics = metrics_of(self._document)
        keep = self._options.keep
        if isinstance(keep, Keep) and keep.metric is not None and keep.metric not in metrics:
            if not self._told_of_metric:
                _log.warning(
                    "step %d has no finite number named %r among its extras, so it can't be among the best: "
                    "pass extra={%r: float(...)} (told once)",
                    *(step, keep.metric, keep.metric),
                )
            self._told_of_metric = True
        return {"metrics": metrics} if metrics else {}

    def _copies_ended(self, attempt: Attempt) -> None:
        """Hand over as soon as all has arrived, on whichever thread finished it."""
        with self._lock:
            if self.attempt is attempt:
                self._settle_if_ended()

    def _note(self, event: str) -> None:
        _log.info("%s", event)
        if self.handle is not None:
            self.handle.events.append(event)

    def _started(self) -> tuple[Attempt, JobClient, SaveHandle]:
        if self.attempt is None or self.job is None or self.handle is None:
            msg = "no save is under way"
            raise WorkerError(msg)
        return self.attempt, self.job, self.handle

    # -- commands ----------------------------------------------------------------------------

    def _run(self, event: Event, payload: Any = None) -> None:
        transition = advance(self.state, event)
        self.state = transition.state
        for command in transition.commands:
            self._commands[command](payload)
        self._lock.notify_all()

    def _send_part(self, live: LiveState) -> None:
        self._started()[0].send_part(live)

    def _send_rest(self, _: object) -> None:
        attempt = self._started()[0]
        attempt.start_rest(lambda: self._copies_ended(attempt))

    def _hand_over(self, _: object) -> None:
        attempt, job, handle = self._started()
        capture = self._capture
        if capture is None or not attempt.proven:
            msg = "commit requested before the capture was verified"
            raise WorkerError(msg)
        # They may be known only now that all has arrived.
        capture = dataclasses.replace(capture, proofs=attempt.proofs(), samples=attempt.samples())
        job.close(capture, self.memory.arenas, lambda: self._taken(handle, capture.step))

    def _taken(self, handle: SaveHandle, step: int) -> None:
        """Resolve ``captured``: training can no longer affect the save."""
        with self._lock:
            if not handle.captured.done() and not handle.failing:
                self._lock.put_off(lambda: handle.take(step))

    def _quarantine(self, distrust: Distrust) -> None:
        excluded, overtaken, why = distrust
        self.excluded |= excluded
        if self.overtaken is not None:
            self.overtaken |= overtaken
        self._note(why)

    def _discard(self, _: object) -> None:
        self._voided = self.attempt
        self.drop()
        self._capture = None

    def _clear(self) -> None:
        """Drop what an interrupt inside :meth:`drop` left of an attempt that ended."""
        if self.state in (State.IDLE, State.VOID):
            self.drop()

    def drop(self) -> None:
        """End both sides of the attempt: afterwards nothing of it touches the arenas."""
        if self.attempt is not None:
            self.attempt.cancel()
        if self.job is not None:
            self.job.abort()
        self.attempt = self.job = None

    def _fail_handle(self, error: BaseException) -> None:
        handle, self._voided, self.taken = self.handle, None, None
        if handle is None or handle.durable.done():
            return
        if not isinstance(error, SaveAborted):
            self.error = error
        if handle.failing:
            return
        handle.failing = True
        _log.error("save of step %s failed: %s", handle.step, error)
        self._lock.put_off(lambda: handle.reject(error))

    def _resolve(self, saved: Saved) -> None:
        self.attempt = self.job = self._capture = self._voided = None
        try:
            self._on_saved(saved)
        except Exception as error:  # noqa: BLE001 - the checkpoint is published, whatever comes after
            defect = _defect(f"step {saved.step} is saved, but what follows a save failed", error)
            self.error = self.error or defect

    # -- outcomes, on worker threads ---------------------------------------------------------

    def published(self, job: JobClient, result: Published) -> None:
        """The checkpoint is durable: resolve the handle, and prune what is too old."""
        defect = None
        try:
            self._background.prune()
        except Exception as error:  # noqa: BLE001 - the checkpoint is published, whatever comes after
            defect = _defect(f"step {result.step} is saved, but removing old checkpoints failed", error)
        with self._lock:
            self.error = self.error or defect
            if job is not self.job:
                return
            attempt, _, handle = self._started()
            saved = self._saved(handle, attempt, job, result)
            self._run(Event.PUBLISHED, saved)
            # Once the lock is free: callbacks of the handle are the user's code.
            self._lock.put_off(lambda: handle.durable.set_result(saved))
        _log.info(
            "saved step %d: %.1f MB over %d step(s), %.1f ms exposed, %.1f ms hidden%s",
            saved.step,
            saved.nbytes / 1e6,
            saved.window,
            1e3 * saved.exposed_seconds,
            1e3 * saved.hidden_seconds,
            "" if saved.deviation is None else f"; not exact: {saved.deviation}",
        )
        self._tell_of_nonfinite(saved)

    def _tell_of_nonfinite(self, saved: Saved) -> None:
        """Warn of NaN and Inf in parameters or optimizer state: once, until a checkpoint has none again."""
        if not saved.nonfinite.finite and not self._told_of_nonfinite:
            _log.warning(
                "the checkpoint of step %d is as training left it, with %s; load(..., finite=True) takes the "
                "newest without any in parameters and optimizer state (told once)",
                *(saved.step, saved.nonfinite),
            )
        self._told_of_nonfinite = not saved.nonfinite.finite

    def mismatched(self, job: JobClient, pieces: Sequence[int]) -> None:
        """A replay did not arrive at the live state: distrust it and wait for the next tick."""
        with self._lock:
            if job is not self.job:
                return
            cut = self._started()[0].cut
            units = (cut.pieces[i].unit for i in pieces)
            names = frozenset(unit.fqn for unit in units if unit is not None)
            why = f"the replay of {', '.join(sorted(names)[:3])} did not match the live state"
            if self._options.grad_dtype is not None:
                why += ", or no probe saw what rounding did"
            self._run(Event.MISMATCHED, (names, frozenset[Name](), why))

    def failed(self, job: JobClient, error: BaseException) -> None:
        """The background failed: the handle and the next call say so."""
        with self._lock:
            if job is self.job and self.state is not State.IDLE:
                self.fail(error, Event.FAILED)

    def _saved(self, handle: SaveHandle, attempt: Attempt, job: JobClient, result: Published) -> Saved:
        trace = self.trace
        return Saved(
            step=result.step,
            path=Path(result.path),
            seq=result.seq,
            nbytes=result.nbytes,
            window=attempt.ticks,
            attempts=handle.attempts,
            exact=job.deviation is None,
            deviation=job.deviation,
            nonfinite=job.nonfinite,
            exposed_seconds=trace.seconds("stall"),
            hidden_seconds=trace.seconds("copy") + trace.seconds("replay") + trace.seconds("write"),
            durable_seconds=perf_counter() - trace.began,
            host_memory=self.memory.nbytes + result.encoding_memory,
            late_parts=attempt.late_parts() if attempt.plan.window > 1 else {},
        )


def _defect(what: str, error: Exception) -> SaveError:
    """Log what must not have happened, and return it for the next call to raise."""
    _log.error("%s: please report this", what, exc_info=error)
    return wrap(WorkerError, what, error, "; please report this")
