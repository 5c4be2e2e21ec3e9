"""What a worker process tells its trainer while it works on a job, and at its end."""

from __future__ import annotations

import logging
import os
import threading
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gockpt.errors import WorkerError, as_background_error
from gockpt.workers import messages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gockpt.storage.local.transaction import Published
    from gockpt.workers.job_client import JobClient
    from gockpt.workers.save_job import Job
    from gockpt.workers.send_queue import Outbox

__all__ = ["Forward", "JobNotes", "Notes", "Told", "failure"]

_log = logging.getLogger("gockpt")


class Notes:
    """Small things that are told together: freed gradients and spans, of every job."""

    def __init__(self, jobs: dict[int, Job]) -> None:
        self.wake: Callable[[], None] = lambda: None
        self._jobs = jobs
        self._lock = threading.Lock()
        self._freed: dict[int, list[int]] = {}
        self._spans: dict[int, list[tuple[str, float, float]]] = {}

    def free(self, number: int, offset: int) -> None:
        """Note that the gradient at ``offset`` was consumed."""
        with self._lock:
            self._freed.setdefault(number, []).append(offset)
        self.wake()

    def span(self, number: int, span: tuple[str, float, float]) -> None:
        """Note what happened when."""
        with self._lock:
            self._spans.setdefault(number, []).append(span)
        self.wake()

    def gather(self) -> list[Any]:
        """Return what came together, as messages."""
        with self._lock:
            freed, self._freed = self._freed, {}
            spans, self._spans = self._spans, {}
        found: list[Any] = [messages.Freed(number, tuple(offsets)) for number, offsets in freed.items()]
        for number, of_job in spans.items():
            job = self._jobs.get(number)
            found.append(messages.Spans(number, 0 if job is None else job.written_bytes, tuple(of_job)))
        return found


class JobNotes:
    """Ring and trace as a job in the worker sees them: the room itself is the trainer's to manage."""

    def __init__(self, number: int, notes: Notes) -> None:
        self._number = number
        self._notes = notes

    def free(self, offset: int) -> None:
        """Give a block back."""
        self._notes.free(self._number, offset)

    def span(self, lane: str, start: float, end: float) -> None:
        """Record a span given in ``perf_counter`` seconds, which all processes of a machine share."""
        self._notes.span(self._number, (lane, start, end))


class Told:
    """Tells the trainer how a job ended."""

    def __init__(self, number: int, jobs: dict[int, Job], outbox: Outbox, prune: Callable[[], None]) -> None:
        self._number = number
        self._jobs = jobs
        self._outbox = outbox
        self._prune = prune

    def published(self, job: JobClient, result: Published) -> None:
        """The checkpoint is durable: prune here, since the trainer may be gone."""
        defect = ""
        try:
            self._prune()
        except Exception as error:  # noqa: BLE001 - told with the save, which is published all the same
            _log.exception("of the pruning after a save")
            defect = f"{type(error).__name__}: {error}"
        path, known = os.fsencode(result.path), replace(result, path="")
        defect = messages.printable(defect)
        message = messages.Publication(self._number, known, path, defect, job.deviation, job.nonfinite)
        self._tell(message)

    def mismatched(self, job: JobClient, pieces: Sequence[int]) -> None:  # noqa: ARG002
        """Nothing was published."""
        self._tell(messages.Mismatched(self._number, tuple(pieces)))

    def failed(self, job: JobClient, error: BaseException) -> None:  # noqa: ARG002
        """Nothing was published."""
        self._tell(failure(self._number, error))

    def _tell(self, message: Any) -> None:
        self._outbox.post(message)
        self._jobs.pop(self._number, None)


def failure(number: int, error: BaseException) -> messages.Failed:
    """Return the message that a job failed of ``error``."""
    notes = list(getattr(error, "__notes__", ()))
    told = as_background_error(error)
    if isinstance(told, WorkerError) and told.__cause__ is not None:
        notes.append("in the worker process:\n" + "".join(traceback.format_exception(told.__cause__)))
    text, *said = (messages.printable(text) for text in (str(told), *notes))
    return messages.Failed(number, type(told).__name__, text, tuple(said))


class Forward(logging.Handler):
    """Hands log lines to the trainer's log."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__()
        self._outbox = outbox

    def emit(self, record: logging.LogRecord) -> None:
        """Send a line."""
        self._outbox.post(messages.Log(record.levelno, messages.printable(self.format(record))))
