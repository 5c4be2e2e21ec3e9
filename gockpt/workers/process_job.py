"""The background half of an attempt that a worker process works on, as the training side holds it."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Unpack

from gockpt.errors import as_background_error
from gockpt.workers import messages
from gockpt.workers.job_client import JobClient
from gockpt.workers.process_handle import error_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gockpt.core.descriptors import Capture, Gradient, ReplayPiece
    from gockpt.workers.job_client import JobParts
    from gockpt.workers.process_handle import WorkerProcess

__all__ = ["RemoteJob"]


class RemoteJob(JobClient):
    """Does for a worker process what :class:`gockpt.workers.save_job.Job` does for threads.

    The training side calls it under the engine's lock; what the worker tells arrives on the connection's
    thread, which never takes that lock. Reports wait for it on threads of their own: two, since whoever is
    told that the capture is taken may wait for the outcome.
    """

    def __init__(self, worker: WorkerProcess, number: int, **parts: Unpack[JobParts]) -> None:
        self._pieces: dict[int, ReplayPiece] = {p.index: p for p in parts["pieces"]}
        # Its arenas are kept until it has ended: an arena that nobody has here is nobody's anywhere.
        super().__init__(threading.Lock(), **parts)
        self.number = number
        self._worker = worker
        self._under_way: set[int] = set()
        self._touched: set[int] = set()
        self._taken: Callable[[], None] | None = None
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
        self._worker.post(
            messages.Begin(self.number, given, pieces, None if needed is None else os.fsencode(needed))
        )

    def boost(self) -> None:
        """Add a thread of normal priority."""
        self._worker.post(messages.Boost(self.number))

    def _queue(self, gradients: tuple[Gradient, ...]) -> None:
        self._under_way.update(g.offset for g in gradients)
        self._touched.update(g.piece for g in gradients)
        self._worker.post(messages.Gradients(self.number, gradients))

    def hurry(self, *, on: bool) -> None:
        """Replay what is pending without gathering more, while the ring is full."""
        self._worker.post(messages.Hurry(self.number, on))

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
            self._worker.ask(lambda reply: messages.Discard(self.number, chosen, reply))
        else:
            self._worker.post(messages.Discard(self.number, chosen, 0))

    def _accept(self, capture: Capture, taken: Callable[[], None]) -> Callable[[], None]:
        self._taken, arenas = taken, self._arenas
        return lambda: self._worker.close_job(self.number, capture, arenas)

    def abort(self) -> None:
        """Give up. Returns when no task touches the arenas any more; the partial is removed."""
        with self._lock:
            ended, self._ended = self._ended, True
        if not ended:
            self._worker.ask(lambda reply: messages.Abort(self.number, reply))
            self._no_more()
        self._let_go()

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

    def hear(self, message: Any) -> None:
        """Take what the worker tells of this job."""
        match message:
            case messages.Freed():
                self._freed(message.offsets)
            case messages.Spans():
                self.written_bytes = max(self.written_bytes, message.written)
                for lane, start, end in message.spans:
                    self._trace.span(lane, start, end)
            case messages.Taken():
                self._report_taken()
            case messages.Publication():
                self.deviation, self.nonfinite = message.deviation, message.nonfinite
                self.written_bytes = self.total_bytes
                self._report_taken()
                published = replace(message.published, path=os.fsdecode(message.path))
                self._end(lambda: self._outcome.published(self, published))
            case messages.Mismatched():
                self._end(lambda: self._outcome.mismatched(self, message.pieces))
            case messages.Failed():
                error = error_of(message.kind, message.text)
                for note in message.notes:
                    error.add_note(note)
                self.failed(error)

    def _freed(self, offsets: Iterable[int]) -> None:
        """Replay has consumed the gradients that stand there."""
        for offset in offsets:
            with self._lock:
                known = offset in self._under_way
                self._under_way.discard(offset)
            if known:
                self._ring.free(offset)

    def _report_taken(self) -> None:
        """The capture does not depend on this process any more."""
        taken, self._taken = self._taken, None
        if taken is not None:
            self._reports.put(taken)

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
