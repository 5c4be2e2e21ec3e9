"""Where the background of a save is done: on threads of this process, or in a process of its own."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol, TypeVar, Unpack

from gockpt.errors import GockptError
from gockpt.staging.arena import Arena
from gockpt.workers.job_client import JobClient
from gockpt.workers.save_job import Job
from gockpt.workers.thread_pool import Pool

if TYPE_CHECKING:
    from gockpt.options import Options
    from gockpt.storage.local.store import Store
    from gockpt.workers.job_client import JobParts

__all__ = ["Background", "InThreads"]

_log = logging.getLogger("gockpt")

J = TypeVar("J", bound=JobClient)


class Background(Protocol[J]):
    """Takes the background halves of attempts, one after the other."""

    def arena(self, nbytes: int) -> Arena:
        """Return memory that it can work on."""

    def job(self, **parts: Unpack[JobParts]) -> J:
        """Return the background half of an attempt, which :meth:`serve` starts."""

    def serve(self, job: J) -> None:
        """Work on a job behind the caller until it ends."""

    def boost(self, job: J) -> None:
        """Add a thread of normal priority."""

    def prune(self) -> None:
        """Remove what is too old, unless that was done where the newest was published.

        What can't be removed is logged; only a defect is raised.
        """

    def close(self) -> None:
        """Finish what was captured, and let go of threads and of the path."""


class InThreads:
    """On threads of this process."""

    def __init__(self, store: Store, options: Options) -> None:
        self._store = store
        self._options = options
        self._pool = Pool(options.worker_threads, options.nice)

    def arena(self, nbytes: int) -> Arena:
        """Return memory of this process."""
        return Arena(nbytes)

    def job(self, **parts: Unpack[JobParts]) -> Job:
        """Return a job that writes into the store."""
        return Job(store=self._store, **parts)

    def serve(self, job: Job) -> None:
        """Start the threads that work on it."""
        self._pool.serve(job)

    def boost(self, job: Job) -> None:
        """Start one more."""
        self._pool.boost(job)

    def prune(self) -> None:
        """Remove what is too old, on the thread that published."""
        prune(self._store, self._options)

    def close(self) -> None:
        """Wait for the threads, then let go of the path."""
        try:
            self._pool.join()
        finally:
            self._store.close()


def prune(store: Store, options: Options) -> None:
    """Remove what ``options.keep`` does not name; what can't be removed is logged."""
    if options.keep is None:
        return
    try:
        store.prune(options.keep)
    except (GockptError, OSError) as error:
        _log.warning("old checkpoints could not be removed: %s", error)
