"""The save in flight, at most one: carries out the commands of the lifecycle table.

Every method is called with the engine's lock held; the three outcomes acquire it themselves, because worker
threads report them.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from gockpt.core.array_spec import Name
from gockpt.core.save_state import Command, Event, State, advance
from gockpt.core.timeline import Trace
from gockpt.errors import SaveAborted, WorkerError, as_save_error
from gockpt.saving.report import Warnings, defect, log_saved, saved_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gockpt.core.descriptors import Capture
    from gockpt.options import Options
    from gockpt.planning.rates import Pace
    from gockpt.saving.boundary import Boundary
    from gockpt.saving.capture import Attempt
    from gockpt.saving.handle import Saved, SaveHandle
    from gockpt.saving.lock import Lock
    from gockpt.saving.memory import Memory
    from gockpt.state.live_state import LiveState
    from gockpt.storage.local.transaction import Published
    from gockpt.workers.executor import Background
    from gockpt.workers.job_client import JobClient

    Distrust = tuple[frozenset[str], frozenset[Name], str]

__all__ = ["SaveInFlight"]

_log = logging.getLogger("gockpt")


class SaveInFlight:
    """One save after the other: its state, its training side and its background side.

    Attributes:
        state: State of the save in flight.
        attempt: Its training side; ``None`` when nothing is being captured or replayed.
        job: Its background side.
        handle: The newest save's handle, in flight or done.
        error: An error of the background that was not raised yet.
        trace: The newest save's spans.
        excluded: Parameters whose replay is no longer trusted.
        overtaken: Arrays that are copied inside the closing tick; ``None``: all of them.
        memory: The host memory of saves.
        taken: The tick whose state was taken last, unless that save failed.
    """

    def __init__(
        self,
        *,
        options: Options,
        lock: Lock,
        background: Background[Any],
        pace: Pace,
        memory: Memory,
        on_saved: Callable[[Saved], None],
    ) -> None:
        self.state = State.IDLE
        self.attempt: Attempt | None = None
        self.job: JobClient | None = None
        self.handle: SaveHandle | None = None
        self.error: BaseException | None = None
        self.trace = Trace()
        self.excluded: frozenset[str] = frozenset()
        self.overtaken: frozenset[Name] | None = frozenset()
        self.memory = memory
        self.taken: Boundary | None = None
        self._options = options
        self._lock = lock
        self._background = background
        self._pace = pace
        self._on_saved = on_saved
        self._capture: Capture | None = None
        self._voided: Attempt | None = None
        self._boosted = False
        self._settling = False
        self._spoiled = ""
        self._warnings = Warnings(options)
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
        if attempt.lost:
            overtaken, why = attempt.torn()
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

    def spoil(self, why: str) -> None:
        """Record that what was copied early in an open window can't be used; no effect outside of one."""
        with self._lock:
            if self.state in (State.OPEN, State.BROKEN):
                self._spoiled = self._spoiled or why
                self._run(Event.SPOILED)

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
        if capture is None or attempt.lost or not attempt.rest_ended:
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
            found = defect(f"step {saved.step} is saved, but what follows a save failed", error)
            self.error = self.error or found

    # -- outcomes, on worker threads ---------------------------------------------------------

    def published(self, job: JobClient, result: Published) -> None:
        """The checkpoint is durable: resolve the handle, and prune what is too old."""
        found = None
        try:
            self._background.prune()
        except Exception as error:  # noqa: BLE001 - the checkpoint is published, whatever comes after
            found = defect(f"step {result.step} is saved, but removing old checkpoints failed", error)
        with self._lock:
            self.error = self.error or found
            if job is not self.job:
                return
            attempt, _, handle = self._started()
            saved = saved_of(handle, attempt, job, result, trace=self.trace, host_memory=self.memory.nbytes)
            self._run(Event.PUBLISHED, saved)
            # Once the lock is free: callbacks of the handle are the user's code.
            self._lock.put_off(lambda: handle.durable.set_result(saved))
        log_saved(saved)
        self._warnings.nonfinite(saved)

    def mismatched(self, job: JobClient, pieces: Sequence[int]) -> None:
        """A replay did not arrive at the live state: distrust it and wait for the next tick."""
        with self._lock:
            if job is not self.job:
                return
            names = self._started()[0].parameters_of(pieces)
            why = f"the replay of {', '.join(sorted(names)[:3])} did not match the live state"
            if self._options.grad_dtype is not None:
                why += ", or no probe saw what rounding did"
            self._run(Event.MISMATCHED, (names, frozenset[Name](), why))

    def failed(self, job: JobClient, error: BaseException) -> None:
        """The background failed: the handle and the next call say so."""
        with self._lock:
            if job is self.job and self.state is not State.IDLE:
                self.fail(error, Event.FAILED)
