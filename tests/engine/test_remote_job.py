"""A remote job alone: what happens to errors of whoever is told of its outcome."""

from __future__ import annotations

import threading

import pytest

from gockpt.core.nonfinite import NonFinite
from gockpt.core.timeline import Trace
from gockpt.errors import StorageError, WorkerError
from gockpt.staging.gradient_ring import Ring
from gockpt.storage.local.transaction import Published
from gockpt.workers import messages
from gockpt.workers.process_job import RemoteJob

PUBLISHED = Published(1, 1, "ab", "", 0, 0)


class Worker:
    """Stands for the worker process: takes every message, and answers none."""

    def __init__(self):
        self.forgotten = threading.Event()

    def expect(self, job):
        pass

    def give(self, arenas):
        return tuple(range(len(arenas)))

    def post(self, message):
        pass

    def forget(self, job):
        self.forgotten.set()


def raising(doubles, error):
    """Return an outcome that raises when it is told of the publication."""

    class Outcome(doubles.Outcome):
        def published(self, job, result):
            raise error

    return Outcome()


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (StorageError("no room"), StorageError, "no room"),
        (ZeroDivisionError("a defect"), WorkerError, "ZeroDivisionError: a defect"),
    ],
)
def test_what_an_outcome_raises_is_told_as_a_job_on_threads_tells_it(doubles, error, kind, text):
    outcome, worker = raising(doubles, error), Worker()
    job = RemoteJob(worker, 1, arenas=(), pieces=(), ring=Ring(0, 0), outcome=outcome, trace=Trace())
    job.begin(None)
    job.hear(messages.Publication(1, PUBLISHED, b"/path", "", None, NonFinite()))
    job.join()
    assert worker.forgotten.is_set()
    ((what, told),) = outcome.reports
    assert what == "failed"
    assert type(told) is kind
    assert text in str(told)
    assert told is error or told.__cause__ is error
