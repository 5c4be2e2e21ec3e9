"""The background half of one save attempt as the training side sees it, wherever it is worked on.

Threads (:class:`gockpt.workers.save_job.Job`) and a worker process
(:class:`gockpt.workers.process_job.RemoteJob`) differ in how work gets to where it is done. The checks of
what is handed over, and what is answered once a job has ended, are the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, Unpack

from gockpt.core.nonfinite import NonFinite
from gockpt.errors import WorkerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from gockpt.core.descriptors import Capture, Gradient, ReplayPiece
    from gockpt.core.exactness import Deviation
    from gockpt.staging.arena import Arena
    from gockpt.storage.local.transaction import Published

__all__ = ["JobClient", "JobParts", "Lanes", "Outcome", "Room"]


class Outcome(Protocol):
    """Listener for the end of a job; called on a worker thread, at most one of the three, once."""

    def published(self, job: JobClient, result: Published) -> None:
        """The checkpoint is durable."""

    def mismatched(self, job: JobClient, pieces: Sequence[int]) -> None:
        """Replayed pieces differ from the live state; nothing was published."""

    def failed(self, job: JobClient, error: BaseException) -> None:
        """The background failed; nothing was published."""


class Room(Protocol):
    """The memory that gradients stand in: :class:`gockpt.staging.gradient_ring.Ring`."""

    def free(self, offset: int) -> None:
        """Give a block back."""


class Lanes(Protocol):
    """A recorder of spans: :class:`gockpt.core.timeline.Trace`."""

    def span(self, lane: str, start: float, end: float) -> None:
        """Record a span given in ``perf_counter`` seconds."""


class JobParts(TypedDict):
    """Keyword arguments that every job is made of.

    Attributes:
        arenas: The state's arena and the ring's.
        pieces: What may be replayed.
        ring: Where gradients stand.
        outcome: Told of the job's end.
        trace: Told of every span.
    """

    arenas: tuple[Arena, ...]
    pieces: Iterable[ReplayPiece]
    ring: Room
    outcome: Outcome
    trace: Lanes


class JobClient(ABC):
    """One attempt's background half; methods may be called from any thread.

    Attributes:
        total_bytes: Bytes to be written, once it is closed.
        written_bytes: Bytes written so far.
        deviation: Once it is published: how far that is from exact; ``None`` if it is.
        nonfinite: Once it is published: the NaN and Inf in it.
        closed: Whether the capture was handed over.
    """

    _pieces: Mapping[int, object]
    """What may still be replayed, by index."""

    def __init__(self, lock: AbstractContextManager[Any], **parts: Unpack[JobParts]) -> None:
        """Take what the job is made of; ``lock`` guards it, and ``_pieces``, which each kind of job makes."""
        self.total_bytes = 0
        self.written_bytes = 0
        self.deviation: Deviation | None = None
        self.nonfinite = NonFinite()
        self.closed = False
        self._lock = lock
        self._arenas = parts["arenas"]
        self._ring = parts["ring"]
        self._outcome = parts["outcome"]
        self._trace = parts["trace"]
        self._ended = False

    def gradients(self, gradients: Iterable[Gradient]) -> None:
        """Queue one update's gradients for replay, in the order of updates.

        Those that come after the job has ended are given back to the ring: the caller has yet to hear of it.

        Raises:
            WorkerError: If one is for a piece that is not replayed; all are given back.
        """
        chosen = tuple(gradients)
        with self._lock:
            ended, unknown = self._ended, [g.piece for g in chosen if g.piece not in self._pieces]
            if not ended and not unknown:
                self._queue(chosen)
                return
        for gradient in chosen:
            self._ring.free(gradient.offset)
        if not ended:
            msg = f"a gradient came for piece {unknown[0]}, which is not replayed"
            raise WorkerError(msg)

    def close(
        self, capture: Capture, arenas: tuple[Arena, ...], taken: Callable[[], None] = lambda: None
    ) -> None:
        """All has arrived: finish the replay, prove it, write, commit.

        A job that has failed meanwhile takes no notice: its outcome is on the way.

        Args:
            capture: The checkpoint.
            arenas: State arena, ring arena, and the arena of what the closing tick added.
            taken: Called once the outcome no longer depends on the caller's process, unless the job fails.

        Raises:
            WorkerError: If the capture proves other pieces than are replayed.
        """
        with self._lock:
            if not self._ended and capture.proofs.keys() != self._pieces.keys():
                differ = sorted(capture.proofs.keys() ^ self._pieces.keys())
                msg = f"the capture must prove the pieces that are replayed, and no others: {differ} differ"
                raise WorkerError(msg)
            self.closed = True
            if self._ended:
                return
            self._arenas = arenas
            self.total_bytes = sum(slot.nbytes for place in capture.arrays for slot in place.layout.slots)
            report = self._accept(capture, taken)
        report()

    @abstractmethod
    def hurry(self, *, on: bool) -> None:
        """Replay what is pending without gathering more, while the ring is full."""

    @abstractmethod
    def discard(self, pieces: Iterable[int]) -> None:
        """Forget these pieces' replay and return when nothing touches their memory any more."""

    @abstractmethod
    def abort(self) -> None:
        """Give up. Returns when no task touches the arenas any more; the partial is removed."""

    @property
    @abstractmethod
    def replaying(self) -> bool:
        """Whether gradients wait for replay or are being replayed, so that ring room will be freed."""

    @abstractmethod
    def _queue(self, gradients: tuple[Gradient, ...]) -> None:
        """Replay gradients, all of known pieces; called under the lock, so that updates keep their order."""

    @abstractmethod
    def _accept(self, capture: Capture, taken: Callable[[], None]) -> Callable[[], None]:
        """Take a capture, under the lock; return what is to be called without it."""
