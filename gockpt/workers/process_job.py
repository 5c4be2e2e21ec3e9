"""The background half of an attempt that a worker process works on, as the training side holds it."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

from gockpt.core.nonfinite import NonFinite
from gockpt.errors import WorkerError, as_background_error
from gockpt.workers import notices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gockpt.core.descriptors import Capture, Gradient, ReplayPiece
    from gockpt.core.exactness import Deviation
    from gockpt.core.timeline import Trace
    from gockpt.staging.arena import Arena
    from gockpt.staging.gradient_ring import Ring
    from gockpt.storage.local.transaction import Published
    from gockpt.workers.process_handle import WorkerProcess
    from gockpt.workers.save_job import Outcome

__all__ = ["RemoteJob"]


class RemoteJob:
    """Does for a worker process what :class:`gockpt.workers.save_job.Job` does for threads.

    The training side calls it under the engine's lock; what the worker tells arrives on the connection's
    thread, which never takes that lock. Reports wait for it on threads of their own: two, since whoever is
    told that the capture is taken may wait for the outcome.
    """

    def __init__(
        self,
        worker: WorkerProcess,
        number: int,
        *,
        arenas: tuple[Arena, ...],
        pieces: Iterable[ReplayPiece],
        ring: Ring,
        outcome: Outcome,
        trace: Trace,
    ) -> None:
        self.number = number
        self.total_bytes = 0
        self.written_bytes = 0
        self.deviation: Deviation | None = None
        self.nonfinite = NonFinite()
        self._worker = worker
        self._arenas = arenas  # kept until it has ended: an arena that nobody has here is nobody's anywhere
        self._pieces = {p.index: p for p in pieces}
        self._ring = ring
        self._outcome = outcome
        self._trace = trace
        self._lock = threading.Lock()
        self._under_way: set[int] = set()
        self._touched: set[int] = set()
        self._taken: Callable[[], None] | None = None
        self._closed = False
        self._ended = False
        self._reports: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._report, name=f"gockpt-worker-outcome-{n}", daemon=True)
            for n in range(2)
        ]
        self._reporting = len(self._threads)

    # -- the training side -------------------------------------------------------------------

    def begin(self, root: str | None) -> None:
        """Let the worker start; ``root`` is the library that MKL's square root is in."""
        for thread in self._threads:
            thread.start()
        self._worker.expect(self)
        pieces = tuple(self._pieces.values())
        needed = root if any(any(p.flags[1:2]) for p in pieces) else None
        given = self._worker.give(self._arenas)
        self._worker.post(notices.Begin(self.number, given, pieces, needed))

    def boost(self) -> None:
        """Add a thread of normal priority."""
        self._worker.post(notices.Boost(self.number))

    def gradients(self, gradients: Iterable[Gradient]) -> None:
        """Queue one update's gradients for replay, in the order of updates."""
        chosen = tuple(gradients)
        with self._lock:
            unknown = [g for g in chosen if g.piece not in self._pieces]
            if not self._ended and not unknown:
                self._under_way.update(g.offset for g in chosen)
                self._touched.update(g.piece for g in chosen)
                # Posted under the lock: updates must not overtake each other.
                self._worker.post(notices.Gradients(self.number, chosen))
                return
            ended = self._ended
        for gradient in chosen:
            self._ring.free(gradient.offset)
        if not ended:
            msg = f"a gradient came for piece {unknown[0].piece}, which is not replayed"
            raise WorkerError(msg)

    def hurry(self, *, on: bool) -> None:
        """Replay what is pending without gathering more, while the ring is full."""
        self._worker.post(notices.Hurry(self.number, on))

    def discard(self, pieces: Iterable[int]) -> None:
        """Forget these pieces' replay and return when nothing touches their memory any more."""
        with self._lock:
            chosen = tuple(index for index in pieces if index in self._pieces)
            for index in chosen:
                del self._pieces[index]
            if not chosen or self._ended:
                return
            touched = not self._touched.isdisjoint(chosen)
        if touched:
            self._worker.ask(lambda reply: notices.Discard(self.number, chosen, reply))
        else:
            self._worker.post(notices.Discard(self.number, chosen, 0))

    def close(self, capture: Capture, arenas: tuple[Arena, ...], taken: Callable[[], None]) -> None:
        """All has arrived: finish the replay, prove it, write, commit.

        ``taken`` is called once the worker has all that it takes to do so alone.
        """
        with self._lock:
            if self._ended:  # it has failed meanwhile, and its outcome is on the way
                self._closed = True
                return
            if capture.proofs.keys() != self._pieces.keys():
                msg = "what is to be proven is not what is replayed"
                raise WorkerError(msg)
            self._closed = True
            self._taken = taken
            self._arenas = arenas
        self.total_bytes = sum(slot.nbytes for place in capture.arrays for slot in place.layout.slots)
        self._worker.close_job(self.number, capture, arenas)

    def abort(self) -> None:
        """Give up. Returns when no task touches the arenas any more; the partial is removed."""
        with self._lock:
            ended, self._ended = self._ended, True
        if not ended:
            self._worker.ask(lambda reply: notices.Abort(self.number, reply))
            self._no_more()
        self._let_go()

    @property
    def closed(self) -> bool:
        """Whether the capture was handed over."""
        return self._closed

    @property
    def replaying(self) -> bool:
        """Whether gradients wait for replay or are being replayed, so that ring room will be freed."""
        return not self._ended and bool(self._under_way)

    def join(self) -> None:
        """Wait until all was reported."""
        if threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join()

    # -- what the worker tells ---------------------------------------------------------------

    def freed(self, offsets: Iterable[int]) -> None:
        """Replay has consumed the gradients that stand there."""
        for offset in offsets:
            with self._lock:
                known = offset in self._under_way
                self._under_way.discard(offset)
            if known:
                self._ring.free(offset)

    def saw(self, written: int, spans: Iterable[tuple[str, float, float]]) -> None:
        """Something was done."""
        self.written_bytes = max(self.written_bytes, written)
        for lane, start, end in spans:
            self._trace.span(lane, start, end)

    def taken(self) -> None:
        """The capture does not depend on this process any more."""
        taken, self._taken = self._taken, None
        if taken is not None:
            self._reports.put(taken)

    def published(self, result: Published, deviation: Deviation | None, nonfinite: NonFinite) -> None:
        """The checkpoint is durable."""
        self.deviation, self.nonfinite = deviation, nonfinite
        self.written_bytes = self.total_bytes
        self.taken()
        self._end(lambda: self._outcome.published(self, result))

    def mismatched(self, pieces: tuple[int, ...]) -> None:
        """Nothing was published."""
        self._end(lambda: self._outcome.mismatched(self, pieces))

    def failed(self, error: BaseException) -> None:
        """The worker says so, or it has ended."""
        self._end(lambda: self._outcome.failed(self, error))

    def _end(self, report: Callable[[], None]) -> None:
        with self._lock:
            ended, self._ended = self._ended, True
        if not ended:
            self._let_go()
            self._reports.put(report)
            self._no_more()

    def _no_more(self) -> None:
        for _ in self._threads:
            self._reports.put(None)

    def _let_go(self) -> None:
        with self._lock:
            left, self._under_way = self._under_way, set()
            self._arenas = ()
        for offset in left:
            self._ring.free(offset)

    def _report(self) -> None:
        while (report := self._reports.get()) is not None:
            try:
                report()
            except BaseException as caught:  # noqa: BLE001 - a waiting caller must hear of it
                self._outcome.failed(self, as_background_error(caught))
        with self._lock:
            self._reporting -= 1
            last = not self._reporting
        if last:
            self._worker.forget(self)
