"""Reports of a save: its result, its progress, and warnings that are told once."""

from __future__ import annotations

import logging
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from gockpt.errors import SaveError, WorkerError, wrap
from gockpt.options import Keep
from gockpt.saving.handle import Progress, Saved
from gockpt.state.state_document import metrics_of

if TYPE_CHECKING:
    from gockpt.core.timeline import Trace
    from gockpt.options import Options
    from gockpt.saving.capture import Attempt
    from gockpt.saving.handle import SaveHandle
    from gockpt.storage.local.transaction import Published
    from gockpt.workers.job_client import JobClient

__all__ = ["Warnings", "defect", "ended_progress", "log_saved", "saved_of"]

_log = logging.getLogger("gockpt")


def saved_of(
    handle: SaveHandle, attempt: Attempt, job: JobClient, result: Published, *, trace: Trace, host_memory: int
) -> Saved:
    """Return the result of a published save."""
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
        host_memory=host_memory + result.encoding_memory,
        late_parts=attempt.late_parts() if attempt.plan.window > 1 else {},
    )


def ended_progress(handle: SaveHandle) -> Progress:
    """Return the progress of a save that is durable or has failed."""
    failed = handle.durable.exception() is not None
    total = 0 if failed else handle.durable.result().nbytes
    return Progress("failed" if failed else "durable", total, total, handle.skipped)


def log_saved(saved: Saved) -> None:
    """Log one line about a published save."""
    _log.info(
        "saved step %d: %.1f MB over %d step(s), %.1f ms exposed, %.1f ms hidden%s",
        saved.step,
        saved.nbytes / 1e6,
        saved.window,
        1e3 * saved.exposed_seconds,
        1e3 * saved.hidden_seconds,
        "" if saved.deviation is None else f"; not exact: {saved.deviation}",
    )


def defect(what: str, error: Exception) -> SaveError:
    """Log what must not have happened, and return it for the next call to raise."""
    _log.error("%s: please report this", what, exc_info=error)
    return wrap(WorkerError, what, error, "; please report this")


class Warnings:
    """Warnings of one saver that are told once."""

    def __init__(self, options: Options) -> None:
        self._keep = options.keep
        self._told_of_metric = False
        self._told_of_nonfinite = False

    def metrics(self, step: int, document: dict[str, Any]) -> dict[str, Any]:
        """Return the numbers among the extras, which retention can read without reading data.

        Warns if the one that ``Options.keep`` names is missing.
        """
        metrics = metrics_of(document)
        keep = self._keep
        if isinstance(keep, Keep) and keep.metric is not None and keep.metric not in metrics:
            if not self._told_of_metric:
                _log.warning(
                    "step %d has no finite number named %r among its extras, so it can't be among the best: "
                    "pass extra={%r: float(...)} (told once)",
                    *(step, keep.metric, keep.metric),
                )
            self._told_of_metric = True
        return {"metrics": metrics} if metrics else {}

    def nonfinite(self, saved: Saved) -> None:
        """Warn of NaN and Inf in parameters or optimizer state: once, until a checkpoint has none again."""
        if not saved.nonfinite.finite and not self._told_of_nonfinite:
            _log.warning(
                "the checkpoint of step %d is as training left it, with %s; load(..., finite=True) takes the "
                "newest without any in parameters and optimizer state (told once)",
                *(saved.step, saved.nonfinite),
            )
        self._told_of_nonfinite = not saved.nonfinite.finite
