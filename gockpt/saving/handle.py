"""Handle of one save: its two futures, progress, plan and timeline."""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gockpt.core.exactness import Deviation
    from gockpt.core.nonfinite import NonFinite
    from gockpt.core.timeline import Span, Trace
    from gockpt.planning.planner import Plan

__all__ = ["Progress", "SaveHandle", "Saved"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Saved:
    """A published checkpoint and what it cost.

    Attributes:
        step: The step it holds.
        path: Its directory.
        seq: Its place in the order of publications; the highest is the newest.
        nbytes: Bytes written: tensors, checksums and documents.
        window: Ticks the published attempt was spread over.
        attempts: 1, or more when the save was retargeted.
        exact: Whether it is bit-exact.
        deviation: Measured deviation; ``None`` if it is exact. Only with ``Options.grad_dtype``.
        nonfinite: The NaN and Inf in it; ``nonfinite.finite`` says whether parameters and optimizer state
            have none.
        exposed_seconds: Seconds that training waited for this save, all ticks and updates together.
        hidden_seconds: Background seconds (copying, replay, writing), summed over threads.
        durable_seconds: From the start of the window until the checkpoint was durable.
        host_memory: Bytes of host memory held for it: arena, gradient ring, and the most that compression
            has taken so far.
        late_parts: Parameters that were copied at the closing tick although a replay was planned, with the
            reason.
    """

    step: int
    path: Path
    seq: int
    nbytes: int
    window: int
    attempts: int
    exact: bool
    deviation: Deviation | None
    nonfinite: NonFinite
    exposed_seconds: float
    hidden_seconds: float
    durable_seconds: float
    host_memory: int
    late_parts: dict[str, str]


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a save.

    Attributes:
        phase: ``"open"``, ``"closing"``, ``"captured"`` (being replayed and written), ``"void"`` (waiting
            for the next step after a failed proof), ``"durable"`` or ``"failed"``.
        done: Bytes done in this phase: copied, then written.
        total: Bytes there are in this phase.
        skipped: Due steps that were left out so far because this save was under way.
    """

    phase: str
    done: int
    total: int
    skipped: tuple[int, ...] = ()


class _Driven(Future[_T]):
    """A future that does the training thread's share of the work when the training thread waits for it."""

    def __init__(self, drive: Callable[[Callable[[], bool], float | None], None]) -> None:
        super().__init__()
        self._drive = drive

    def result(self, timeout: float | None = None) -> _T:
        return super().result(self._driven(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        return super().exception(self._driven(timeout))

    def _driven(self, timeout: float | None) -> float | None:
        """Do that share; return what is left of ``timeout``."""
        if self.done():
            return timeout
        deadline = None if timeout is None else monotonic() + timeout
        self._drive(self.done, timeout)
        return None if deadline is None else max(0.0, deadline - monotonic())


class SaveHandle:
    """One save, from its first tick until it is durable.

    Attributes:
        captured: Future of the step; done when the whole state is in host memory: training may do
            anything from here on.
        durable: Future of :class:`Saved`; done when the checkpoint survives a power loss.
        plan: The plan the save started with; ``plan.explain()`` says why.
        events: What happened beside the plan, in words, such as ``"retargeted from 100 to 101: …"``.
    """

    def __init__(
        self,
        step: int,
        plan: Plan,
        trace: Trace,
        *,
        drive: Callable[[SaveHandle, Callable[[], bool], float | None], None],
        progress: Callable[[SaveHandle], Progress],
    ) -> None:
        self.captured: Future[int] = _Driven(lambda done, timeout: drive(self, done, timeout))
        self.durable: Future[Saved] = _Driven(lambda done, timeout: drive(self, done, timeout))
        self.plan = plan
        self.events: list[str] = []
        self.failing = False
        self._step = step
        self._trace = trace
        self._attempts = 1
        self._progress = progress
        self._skipped: list[int] = []

    @property
    def skipped(self) -> tuple[int, ...]:
        """Due steps that were left out because this save was under way."""
        return tuple(self._skipped)

    @property
    def step(self) -> int:
        """The step this save publishes; a retargeted save moves to a later one."""
        return self._step

    @property
    def attempts(self) -> int:
        """Number of attempts; above 1 the save was retargeted."""
        return self._attempts

    def done(self) -> bool:
        """Whether it is durable or failed."""
        return self.durable.done()

    def result(self, timeout: float | None = None) -> Saved:
        """Wait until the checkpoint is durable.

        Called from the training thread inside an open window, this closes the window at the last
        tick, as :func:`gockpt.wait` does.

        Args:
            timeout: Seconds to wait at most.

        Raises:
            SaveError: If the save failed; nothing of it was published.
            TimeoutError: If ``timeout`` passed; the save goes on.
        """
        return self.durable.result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what :meth:`result` would raise, or ``None``."""
        return self.durable.exception(timeout)

    def add_done_callback(self, callback: Callable[[SaveHandle], Any]) -> None:
        """Call ``callback(handle)`` when the save is durable or failed, on whichever thread ends it."""
        self.durable.add_done_callback(lambda _: callback(self))

    def progress(self) -> Progress:
        """Return the save's progress, without waiting."""
        return self._progress(self)

    def timeline(self) -> tuple[Span, ...]:
        """Return the spans of the save, by start time."""
        return self._trace.spans()

    def retarget(self, step: int, why: str) -> None:
        """Move the save to a later step (the engine does)."""
        what = f"retargeted from {self._step} to" if step != self._step else "captured again at"
        self.events.append(f"{what} {step}: {why}")
        self._step = step
        self._attempts += 1

    def leave_out(self, step: int) -> int:
        """Count a due step that is left out (the engine does); return how many there are."""
        self._skipped.append(step)
        return len(self._skipped)

    def take(self, step: int) -> None:
        """Resolve ``captured`` (the engine does)."""
        with suppress(InvalidStateError):  # done already, or rejected on another thread
            self.captured.set_result(step)

    def reject(self, error: BaseException) -> None:
        """Fail both futures (the engine does)."""
        for future in (self.captured, self.durable):
            with suppress(InvalidStateError):  # done already
                future.set_exception(error)

    def move(self, step: int) -> None:
        """Set the step the window really closed at (the engine does)."""
        self._step = step

    def __repr__(self) -> str:
        state = "durable" if self.durable.done() else self.progress().phase
        if self.durable.done() and self.durable.exception() is not None:
            state = "failed"
        return f"<SaveHandle step={self._step} {state}>"
