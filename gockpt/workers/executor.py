"""Where the background of a save is done: on threads of this process, or in a process of its own."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol, TypeVar

from gockpt.errors import GockptError
from gockpt.staging.arena import Arena
from gockpt.workers.save_job import Job
from gockpt.workers.thread_pool import Pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gockpt.core.descriptors import Capture, Gradient, ReplayPiece
    from gockpt.core.exactness import Deviation
    from gockpt.core.nonfinite import NonFinite
    from gockpt.core.timeline import Trace
    from gockpt.options import Options
    from gockpt.staging.gradient_ring import Ring
    from gockpt.storage.local.store import Store
    from gockpt.workers.save_job import Outcome

__all__ = ["Background", "InThreads", "Work"]

_log = logging.getLogger("gockpt")

W = TypeVar("W", bound="Work")


class Work(Protocol):
    """The background half of one attempt, as the training side sees it: :class:`gockpt.workers.save_job.Job`.

    Attributes:
        total_bytes: Bytes to be written, once it is closed.
        written_bytes: Bytes written so far.
        deviation: Once it is published: how far that is from exact; ``None`` if it is.
        nonfinite: Once it is published: the NaN and Inf in it.
    """

    total_bytes: int
    written_bytes: int
    deviation: Deviation | None
    nonfinite: NonFinite

    def gradients(self, gradients: Iterable[Gradient]) -> None:
        """Queue one update's gradients for replay, in the order of updates."""

    def hurry(self, *, on: bool) -> None:
        """Replay what is pending without gathering more, while the ring is full."""

    def discard(self, pieces: Iterable[int]) -> None:
        """Forget these pieces' replay and return when nothing touches their memory any more."""

    def close(self, capture: Capture, arenas: tuple[Arena, ...], taken: Callable[[], None]) -> None:
        """All has arrived: finish, write, commit. ``taken`` is called once that no longer depends on us.

        One that has failed meanwhile takes no notice: its outcome is on the way.
        """

    def abort(self) -> None:
        """Give up. Returns when no task touches the arenas any more; the partial is removed."""

    @property
    def closed(self) -> bool:
        """Whether the capture was handed over."""

    @property
    def replaying(self) -> bool:
        """Whether ring room will be freed."""


class Background(Protocol[W]):
    """Takes the background halves of attempts, one after the other."""

    def arena(self, nbytes: int) -> Arena:
        """Return memory that it can work on."""

    def job(
        self,
        *,
        arenas: tuple[Arena, ...],
        pieces: Iterable[ReplayPiece],
        ring: Ring,
        outcome: Outcome,
        trace: Trace,
    ) -> W:
        """Return the background half of an attempt, which :meth:`serve` starts."""

    def serve(self, job: W) -> None:
        """Work on a job behind the caller until it ends."""

    def boost(self, job: W) -> None:
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

    def job(
        self,
        *,
        arenas: tuple[Arena, ...],
        pieces: Iterable[ReplayPiece],
        ring: Ring,
        outcome: Outcome,
        trace: Trace,
    ) -> Job:
        """Return a job that writes into the store."""
        return Job(arenas=arenas, pieces=pieces, ring=ring, store=self._store, outcome=outcome, trace=trace)

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
