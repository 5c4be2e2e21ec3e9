"""The engine: turns ticks and optimizer updates into published checkpoints.

One lock guards everything the training thread and the workers share. The lifecycle table says what an
event leads to; this file carries it out. A boundary is always a tick, never a hook: parameters, states,
buffers, group options, extras and random states are all as of the call that closes the window.
"""

from __future__ import annotations

import logging
import os
import threading
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any

from gockpt import rng
from gockpt.cadence import Cadence, Moment
from gockpt.document import build_document, capture_extras
from gockpt.engine.attempt import Attempt
from gockpt.engine.closing import write_additions
from gockpt.engine.handle import Progress, Saved, SaveHandle
from gockpt.engine.hooks import Hooks
from gockpt.engine.messages import Capture
from gockpt.engine.pool import Pool
from gockpt.engine.sizing import Memory, Shape, facts_of, shape_of
from gockpt.engine.trace import Trace
from gockpt.errors import GockptError, SaveAborted, SaveError, UsageError, WorkerError
from gockpt.lifecycle import Command, Event, State, advance
from gockpt.schedule import Plan, choose_every, make_plan
from gockpt.state import collect
from gockpt.transfer import Transfer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from gockpt.engine.job import Job
    from gockpt.options import Options
    from gockpt.state import LiveState
    from gockpt.storage.store import Published, Store

__all__ = ["Engine"]

_log = logging.getLogger("gockpt")

MAX_ATTEMPTS = 4
FIRST_AUTO_EVERY = 10
EMA = 0.3


class Engine:
    """Saves one model and its optimizers into one store.

    The engine does not keep the model alive; between saves it holds no tensor at all.
    """

    def __init__(
        self,
        model: Callable[[], Any],
        optimizers: tuple[torch.optim.Optimizer, ...],
        store: Store,
        *,
        every: int | str,
        options: Options,
        last_step: int = 0,
    ) -> None:
        """Attach to a model (given as a function that returns it, or ``None`` once it is gone)."""
        self.options = options
        self.store = store
        self._model = model
        self._optimizers = optimizers
        self._auto_every = every == "auto"
        self._cadence = Cadence(FIRST_AUTO_EVERY if isinstance(every, str) else every)
        self._pid = os.getpid()
        self._changed = threading.Condition(threading.RLock())
        self._state = State.IDLE
        self._attempt: Attempt | None = None
        self._job: Job | None = None
        self._handle: SaveHandle | None = None
        self._trace = Trace()
        self._capture: Capture | None = None
        self._memory = Memory(options)
        self._shape: Shape | None = None
        self._barred: frozenset[str] = frozenset()
        self._racing: frozenset[tuple[str, ...]] | None = frozenset()
        self._pending_error: BaseException | None = None
        self._transfer = Transfer()
        self._pool = Pool(options.worker_threads, options.nice)
        self._hooks = Hooks(optimizers, self)
        self._thread = threading.get_ident()
        self._auto_step = last_step
        self._tick: tuple[int, Mapping[str, Any] | None] | None = None
        self._marks: dict[tuple[str, ...], tuple[int, int]] = {}
        self._updates = 0
        self._updates_at_tick = 0
        self._last_time: float | None = None
        self._step_seconds: float | None = None
        self._copy_rate: float | None = None
        self._boosted = False
        self._commands: dict[Command, Callable[[Any], None]] = {
            Command.SEND_PART: self._do_send_part,
            Command.SEND_REST: self._do_send_rest,
            Command.HAND_OVER: self._do_hand_over,
            Command.QUARANTINE: self._do_quarantine,
            Command.DISCARD: self._do_discard,
            Command.FAIL: self._do_fail,
            Command.RESOLVE: self._do_resolve,
        }
        self.closed = False

    # -- the public side ---------------------------------------------------------------------

    @property
    def handle(self) -> SaveHandle | None:
        """The newest save, in flight or done."""
        return self._handle

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._state is not State.IDLE

    @property
    def window_open(self) -> bool:
        """Whether the save in flight still needs ticks."""
        return self._state in (State.OPEN, State.VOID)

    @property
    def of_this_process(self) -> bool:
        """Whether this is the process the engine was made in."""
        return os.getpid() == self._pid

    def tick(self, step: int | None, extra: Mapping[str, Any] | None) -> SaveHandle | None:
        """Take one boundary: start, go on with, or close a save as the step asks for."""
        began = perf_counter()
        if os.getpid() != self._pid:
            msg = "this process was forked from the one that saves; only the parent may call gockpt"
            raise UsageError(msg)
        with self._changed:
            self._thread = threading.get_ident()
            self._measure(began)
            if step is None:
                step = self._auto_step + 1
            self._auto_step = step
            if self._hooks.reset() and self._attempt is not None:
                self._attempt.broken = "an optimizer step ended in an exception"
            self._cadence, moment = self._cadence.tick(step)
            self._tick = (step, extra)
            self._updates_at_tick = self._updates
            try:
                self._advance_save(step, moment, extra)
            except BaseException as error:
                self._give_up(error)
                raise
            finally:
                if self.busy:
                    self._trace.span("stall", began, perf_counter(), step=step, what="tick")
            self._raise_pending()
            return self._handle

    def wait(self) -> None:
        """Close an open window at the last tick and return when nothing is in flight.

        Raises:
            SaveError: If the save in flight failed, or can't be closed here: parameters changed since
                the last tick.
        """
        handle = self._handle
        if handle is not None and not handle.done():
            self.drive(handle, None)
        with self._changed:
            self._raise_pending()

    def abort_window(self, why: str) -> None:
        """Give an open window up; what was captured already goes on to disk."""
        with self._changed:
            if self._state is State.CLOSING:
                self._settle()
            if self._state in (State.OPEN, State.VOID, State.CLOSING):
                self._fail(SaveAborted(f"the save of step {self._step_of()} was given up: {why}"), Event.ABORTED)

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
            self._memory.release()
            self.store.close()

    def drive(self, handle: SaveHandle, timeout: float | None) -> None:
        """Do what only the training thread can do so that ``handle`` gets done, then wait for it."""
        if threading.get_ident() != self._thread or os.getpid() != self._pid:
            return
        deadline = None if timeout is None else monotonic() + timeout
        with self._changed:
            while self._handle is handle and not handle.done():
                if self._state is State.CLOSING:
                    self._settle()
                elif self._state in (State.OPEN, State.VOID):
                    self._close_at_last_tick()
                else:
                    left = None if deadline is None else deadline - monotonic()
                    if left is not None and left <= 0:
                        return
                    self._changed.wait(left)

    # -- updates, from the hooks: never raise ------------------------------------------------

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Make sure that nothing still needed is overwritten (an optimizer is about to step)."""
        if self._attempt is None:
            return
        began = perf_counter()
        with self._changed:
            if self._state is State.CLOSING:
                self._guard(self._settle)
            elif self._state is State.OPEN and self._attempt is not None and self._attempt.broken is None:
                attempt = self._attempt
                self._guard(lambda: attempt.before_update(optimizer))
            else:
                return
            self._trace.span("stall", began, perf_counter(), step=self._auto_step, what="before update")

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Collect what the update consumed (an optimizer has stepped)."""
        self._updates += 1
        if self._attempt is None or self._state is not State.OPEN:
            return
        began = perf_counter()
        with self._changed:
            attempt = self._attempt
            if self._state is State.OPEN and attempt is not None and attempt.broken is None:
                self._guard(lambda: attempt.after_update(optimizer))
                self._trace.span("stall", began, perf_counter(), step=self._auto_step + 1, what="after update")

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - a hook must not break the user's step
            if self._attempt is not None:
                self._attempt.broken = f"{type(error).__name__} while an update was watched: {error}"
            if self._state is State.CLOSING:
                self._fail(_as_save_error(error), Event.FAILED)
            if not isinstance(error, Exception):
                raise

    # -- one tick ----------------------------------------------------------------------------

    def _advance_save(self, step: int, moment: Moment, extra: Mapping[str, Any] | None) -> None:
        if self._state is State.CLOSING:
            self._settle()
        if self._state is State.VOID:
            self._retarget(step, extra)
        elif self._state is State.OPEN:
            if moment.due:
                self._close_save(step, extra)
            else:
                self._send_part()
        elif self._state is State.CAPTURED:
            self._while_busy(step, moment, extra)
        elif moment.due:
            self._close_save(step, extra)
        else:
            self._maybe_open(step, moment)

    def _while_busy(self, step: int, moment: Moment, extra: Mapping[str, Any] | None) -> None:
        late = moment.ticks_left < self._window_ticks()
        if late and not self._boosted and self._job is not None:
            self._boosted = True
            self._pool.boost(self._job)
        if not moment.due:
            return
        if self.options.when_busy == "skip":
            _log.info("step %d is due, but step %s is still being written: skipped", step, self._step_of())
            return
        handle = self._handle
        while self._state is State.CAPTURED:
            self._changed.wait()
        if self._state is State.VOID:
            self._retarget(step, extra)
        elif handle is self._handle:
            self._close_save(step, extra)

    def _maybe_open(self, step: int, moment: Moment) -> None:
        if self._shape is None:
            live = self._collect()
            self._shape = shape_of(live)
            self._memory.prepare(self._shape, self._transfer)
        ticks = moment.ticks_left + 1
        if ticks > self._window_ticks():
            return
        live = self._collect()
        plan = self._plan(live, ticks)
        if plan.window <= 1 or plan.window < ticks:
            return
        due = step + moment.ticks_left * self._cadence.stride
        self._begin(live, plan, due)
        self._run(Event.OPENED)

    def _window_ticks(self) -> int:
        """Return the window that a save starting now would ask for; an upper bound for "auto"."""
        if self.options.window != "auto":
            return self.options.window
        if self._shape is None:
            return 1
        return make_plan(self._shape.rough(self._step_seconds, self._copy_rate), window="auto", ticks=64).window

    def _plan(self, live: LiveState, ticks: int) -> Plan:
        facts = facts_of(live, self._shape_of(live), self._barred, self._step_seconds, self._copy_rate)
        return make_plan(facts, window=self.options.window, ticks=ticks)

    def _shape_of(self, live: LiveState) -> Shape:
        shape = shape_of(live)
        if self._shape is None or shape.key != self._shape.key:
            self._shape = shape
        return self._shape

    def _collect(self) -> LiveState:
        model = self._model()
        if model is None:
            msg = "the model that this checkpointer saves does not exist any more"
            raise UsageError(msg)
        return collect(model, self._optimizers)

    # -- the parts of a save -----------------------------------------------------------------

    def _begin(self, live: LiveState, plan: Plan, due: int, *, handle: SaveHandle | None = None) -> None:
        """Set up an attempt; the caller reports the event that starts it."""
        self._hooks.assert_order()
        if handle is None:
            self._trace = Trace()
            handle = SaveHandle(due, plan, self._trace, drive=self.drive, progress=self._progress_of)
        self._handle = handle
        self._boosted = False
        self._attempt, self._job = self._memory.attempt(
            live,
            self._shape_of(live),
            plan,
            barred=self._barred,
            racing=self._racing,
            transfer=self._transfer,
            begin=self.store.begin,
            outcome=self,
            trace=self._trace,
        )
        self._pool.serve(self._job)

    def _send_part(self) -> None:
        attempt = self._attempt
        if attempt is not None and attempt.broken is None:
            self._run(Event.TICKED)

    def _close_save(self, step: int, extra: Mapping[str, Any] | None) -> None:
        """Take the closing boundary now, from an open window or from nothing."""
        live = self._collect()
        if self._state is State.OPEN and self._attempt is not None:
            why = self._attempt.broken
            if why is None and shape_of(live).key != self._attempt.shape_key:
                why = "parameters, buffers or states were added, removed or reshaped"
            if why is not None:
                self._restart(live, step, why)
        if self._attempt is None:
            self._begin(live, self._plan_now(live), step)
        self._take_boundary(live, step, extra)

    def _plan_now(self, live: LiveState) -> Plan:
        facts = self._shape_of(live).rough(self._step_seconds, self._copy_rate)
        return make_plan(facts, window=1 if self.options.window == "auto" else self.options.window, ticks=1)

    def _restart(self, live: LiveState, step: int, why: str) -> None:
        """Drop what left early: all of it leaves at this closing tick instead. Nothing is lost."""
        handle = self._handle
        if handle is not None:
            handle.events.append(f"all of step {step} leaves at the closing tick: {why}")
        _log.info("step %d leaves as a whole at the closing tick: %s", step, why)
        if self._job is not None:
            self._job.abort()
        self._attempt = None
        self._begin(live, self._plan_now(live), step, handle=handle)

    def _retarget(self, step: int, extra: Mapping[str, Any] | None) -> None:
        handle = self._handle
        if handle is None:
            return
        if handle.attempts >= MAX_ATTEMPTS:
            self._fail(SaveError(f"step {handle.step} could not be captured in {MAX_ATTEMPTS} attempts"), Event.FAILED)
            return
        if handle.attempts >= MAX_ATTEMPTS - 2:
            self._racing = None
        why = handle.events[-1] if handle.events else "the first attempt did not match"
        handle.retarget(step, why)
        _log.warning("save retargeted to step %d: %s", step, why)
        live = self._collect()
        self._begin(live, self._plan_now(live), step, handle=handle)
        self._take_boundary(live, step, extra)

    def _take_boundary(self, live: LiveState, step: int, extra: Mapping[str, Any] | None) -> None:
        attempt, handle = self._attempt, self._handle
        if attempt is None or handle is None:
            msg = "a boundary needs an attempt"
            raise WorkerError(msg)
        random_states = rng.capture()
        handle.move(step)
        proofs = attempt.close(live)
        document, added = build_document(
            live,
            step=step,
            optimizer_steps=self._updates,
            extra=capture_extras(extra),
            rng=random_states,
        )
        additions = write_additions(added, self._memory)
        attributes = {"gockpt": {"step": step, "optimizer_steps": self._updates, "exact": True}}
        self._capture = Capture(step, attempt.places(live) + additions, proofs, document, attributes, exact=True)
        self._run(Event.DUE)

    def _close_at_last_tick(self) -> None:
        """Close where the training thread stands, if that still is the last tick's boundary."""
        if self._tick is None:
            return
        step, extra = self._tick
        try:
            if self._updates != self._updates_at_tick or self._hooks.reset():
                msg = (
                    f"the window can't be closed here: the optimizer stepped after the last tick (step {step}); "
                    "call save_overlapped(...) after the step, then wait()"
                )
                raise SaveAborted(msg)  # noqa: TRY301 - one place fails the handle
            attempt = self._attempt
            if self._state is State.OPEN and attempt is not None:
                late = len(attempt.late_parts())
                attempt.check()
                if len(attempt.late_parts()) != late or self._marks_of(self._collect()) != self._marks:
                    msg = (
                        f"the window can't be closed here: parameters changed after the last tick (step {step}); "
                        "call save_overlapped(...) at the state to save, then wait()"
                    )
                    raise SaveAborted(msg)  # noqa: TRY301
            if self._state is State.VOID:
                self._racing = None
                self._retarget(step, extra)
            else:
                self._close_save(step, extra)
        except Exception as error:  # noqa: BLE001 - the handle carries it, and the caller raises it
            self._fail(error if isinstance(error, GockptError) else _as_save_error(error), Event.ABORTED)

    @staticmethod
    def _marks_of(live: LiveState) -> dict[tuple[str, ...], tuple[int, int]]:
        marks = {}
        for name, tensor in live.entries.items():
            version = -1 if tensor.is_inference() else tensor._version  # noqa: SLF001 - torch's documented counter
            marks[name] = (tensor.data_ptr(), version)
        return marks

    def _settle(self) -> None:
        """Prove the copies of the closing tick: the state is captured, or its attempt is void."""
        attempt = self._attempt
        if attempt is None or self._state is not State.CLOSING:
            return
        lost = attempt.settle()
        if attempt.copy_seconds:
            rate = attempt.copied_bytes / attempt.copy_seconds
            self._copy_rate = rate if self._copy_rate is None else (1 - EMA) * self._copy_rate + EMA * rate
        if lost:
            why = f"{'/'.join(lost[0])} changed before it was copied"
            self._run(Event.TORN, (frozenset[str](), frozenset(lost), why))
        else:
            self._run(Event.ARRIVED)

    def _copies_ended(self, attempt: Attempt) -> None:
        """Hand over as soon as all has arrived, on whichever thread finished it."""
        with self._changed:
            if self._attempt is attempt and self._state is State.CLOSING and attempt.all_proven:
                self._settle()

    # -- commands ----------------------------------------------------------------------------

    def _run(self, event: Event, payload: Any = None) -> None:  # noqa: ANN401 - what the event is about
        transition = advance(self._state, event)
        self._state = transition.state
        for command in transition.commands:
            self._commands[command](payload)
        self._changed.notify_all()

    def _do_send_part(self, _: object) -> None:
        attempt = self._started()[0]
        attempt.send_part()
        self._marks = self._marks_of(attempt.live)

    def _do_send_rest(self, _: object) -> None:
        attempt = self._started()[0]
        attempt.start_rest(lambda: self._copies_ended(attempt))

    def _do_hand_over(self, _: object) -> None:
        _, job, handle = self._started()
        if self._capture is None:
            msg = "nothing was captured"
            raise WorkerError(msg)
        job.close(self._capture, self._memory.arenas)
        if not handle.captured.done():
            handle.captured.set_result(self._capture.step)

    def _do_quarantine(self, distrust: tuple[frozenset[str], frozenset[tuple[str, ...]], str]) -> None:
        barred, racing, why = distrust
        self._barred |= barred
        if self._racing is not None:
            self._racing |= racing
        self._started()[2].events.append(why)

    def _do_discard(self, _: object) -> None:
        if self._job is not None:
            self._job.abort()
        self._attempt = self._job = self._capture = None

    def _do_fail(self, error: BaseException) -> None:
        handle = self._handle
        if handle is None or handle.done():
            return
        if not isinstance(error, SaveAborted):
            self._pending_error = error
        _log.error("save of step %s failed: %s", handle.step, error)
        if not handle.captured.done():
            handle.captured.set_exception(error)
        handle.durable.set_exception(error)

    def _do_resolve(self, saved: Saved) -> None:
        self._attempt = self._job = self._capture = None
        self._choose_every(saved)

    def _started(self) -> tuple[Attempt, Job, SaveHandle]:
        if self._attempt is None or self._job is None or self._handle is None:
            msg = "no save is under way"
            raise WorkerError(msg)
        return self._attempt, self._job, self._handle

    def _give_up(self, error: BaseException) -> None:
        """After an error inside a tick: no half-made attempt stays, and the handle says why."""
        if self._state is State.IDLE:
            self._do_discard(None)
            self._do_fail(_as_save_error(error))
        elif self._state is not State.CAPTURED:
            self._fail(_as_save_error(error), Event.FAILED)
        # The caller sees this very error now; it is not raised a second time.
        self._pending_error = None

    def _fail(self, error: BaseException, event: Event) -> None:
        self._run(event, error)

    def _raise_pending(self) -> None:
        error, self._pending_error = self._pending_error, None
        if error is not None:
            raise error

    # -- outcomes, on worker threads ---------------------------------------------------------

    def published(self, job: Job, result: Published) -> None:
        """The checkpoint is durable: resolve the handle, then prune what is too old."""
        if self.options.keep is not None:
            try:
                self.store.prune(self.options.keep)
            except (GockptError, OSError) as error:
                _log.warning("old checkpoints could not be removed: %s", error)
        with self._changed:
            if job is not self._job or self._handle is None or self._attempt is None:
                return
            handle, attempt = self._handle, self._attempt
            saved = self._saved(handle, attempt, result)
            self._run(Event.PUBLISHED, saved)
        _log.info(
            "saved step %d: %.1f MB over %d step(s), %.1f ms exposed, %.1f ms hidden",
            saved.step,
            saved.nbytes / 1e6,
            saved.window,
            1e3 * saved.exposed_seconds,
            1e3 * saved.hidden_seconds,
        )
        # Outside the lock: callbacks of the handle are the user's code.
        handle.durable.set_result(saved)
        with self._changed:
            self._changed.notify_all()

    def mismatched(self, job: Job, pieces: Sequence[int]) -> None:
        """A replay did not arrive at the live state: distrust it and wait for the next tick."""
        with self._changed:
            if job is not self._job or self._attempt is None or self._handle is None:
                return
            units = (self._attempt.cut.pieces[i].unit for i in pieces)
            names = frozenset(unit.fqn for unit in units if unit is not None)
            why = f"the replay of {', '.join(sorted(names)[:3])} did not match the live state"
            self._run(Event.MISMATCHED, (names, frozenset[tuple[str, ...]](), why))

    def failed(self, job: Job, error: BaseException) -> None:
        """The background failed: the handle and the next call say so."""
        with self._changed:
            if job is self._job and self._state is not State.IDLE:
                self._fail(error, Event.FAILED)

    # -- figures -----------------------------------------------------------------------------

    def _saved(self, handle: SaveHandle, attempt: Attempt, result: Published) -> Saved:
        trace = self._trace
        return Saved(
            step=result.step,
            path=result.path,
            seq=result.seq,
            nbytes=result.nbytes,
            window=attempt.plan.window,
            attempts=handle.attempts,
            exact=True,
            exposed_seconds=trace.seconds("stall"),
            hidden_seconds=trace.seconds("copy") + trace.seconds("replay") + trace.seconds("write"),
            durable_seconds=perf_counter() - trace.began,
            host_memory=self._memory.nbytes,
            late_parts=attempt.late_parts() if attempt.plan.window > 1 else {},
        )

    def _choose_every(self, saved: Saved) -> None:
        if not self._auto_every or not self._step_seconds:
            return
        every = choose_every(
            stall_seconds=saved.exposed_seconds,
            step_seconds=self._step_seconds,
            durable_seconds=saved.durable_seconds,
            overhead=self.options.overhead,
        )
        if every != self._cadence.every:
            _log.info("every='auto' now saves every %d steps", every)
        self._cadence = Cadence(every, self._cadence.last_step, self._cadence.stride)

    def _measure(self, now: float) -> None:
        if self._last_time is not None and self._state is State.IDLE:
            seconds = now - self._last_time
            old = self._step_seconds
            self._step_seconds = seconds if old is None else (1 - EMA) * old + EMA * seconds
        self._last_time = now

    def _step_of(self) -> int | None:
        return None if self._handle is None else self._handle.step

    def _progress_of(self, handle: SaveHandle) -> Progress:
        with self._changed:
            if handle.done():
                failed = handle.durable.exception() is not None
                total = 0 if failed else handle.durable.result().nbytes
                return Progress("failed" if failed else "durable", total, total)
            job, attempt = self._job, self._attempt
            if self._state is State.CAPTURED and job is not None:
                return Progress("captured", job.written_bytes, job.total_bytes)
            total = 0 if self._shape is None else self._shape.nbytes
            return Progress(self._state.value, 0 if attempt is None else attempt.copied_bytes, total)


def _as_save_error(error: BaseException) -> BaseException:
    if isinstance(error, GockptError):
        return error
    kind = SaveAborted if not isinstance(error, Exception) else WorkerError
    wrapped = kind(f"the save was given up after {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
