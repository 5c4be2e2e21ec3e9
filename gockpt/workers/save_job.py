"""One save's background work: replay, proof, writing, commit.

Threads of the pool call :meth:`Job.take`; the training side posts messages. Every task is small, so
the order in which threads take them does not matter. Nothing is published unless every replayed
piece was proven equal to the live state of the boundary.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from gockpt.core.descriptors import ArenaId
from gockpt.core.nonfinite import NonFinite, attributes_with
from gockpt.errors import WorkerError, as_background_error
from gockpt.replay.rounding_error import Findings
from gockpt.workers.job_client import JobClient
from gockpt.workers.nonfinite_counts import Counter
from gockpt.workers.piece_replay import PieceReplay

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gockpt.core.arena_layout import Slot
    from gockpt.core.descriptors import ArrayPlace, Capture, Gradient
    from gockpt.storage.local.store import Store
    from gockpt.storage.local.transaction import Transaction
    from gockpt.workers.job_client import JobParts

__all__ = ["Job"]

_log = logging.getLogger("gockpt")

LARGE = 1 << 20
"""Chunks from this many bytes on are also written by threads that do nothing else, several at once."""

SMALL = 64 << 10
"""Chunks below this many bytes are written several in a row: taking them one by one costs as much again."""

SMALL_BATCH = 64

BATCH = 2
"""Gradients of one piece that are replayed in one pass while the window is open."""


Report = Callable[[], None]
Task = Callable[[], Report | None]


class Job(JobClient):
    """The background half of one attempt of one save, on threads that call :meth:`take`."""

    def __init__(self, *, store: Store, **parts: Unpack[JobParts]) -> None:
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        # Writers wait apart: waking them all whenever a small chunk is done would cost more than the chunk.
        self._large = threading.Condition(lock)
        self._pieces: dict[int, PieceReplay] = {p.index: PieceReplay(p) for p in parts["pieces"]}
        super().__init__(self._changed, **parts)
        self._store = store
        self._capture: Capture | None = None
        self._transaction: Transaction | None = None
        self._chunks: list[tuple[ArrayPlace, Slot]] = []
        self._listed = False
        self._waiting: dict[tuple[str, ...], set[int]] = {}
        self._wrong: list[int] = []
        self._unproven = 0
        self._findings = Findings()
        self._running = 0
        self._documents_taken = False
        self._commit_taken = False
        self._hurry = False
        self._counter = Counter()
        self._attributes: dict[str, Any] = {}

    # -- the training side -------------------------------------------------------------------

    def _queue(self, gradients: tuple[Gradient, ...]) -> None:
        for gradient in gradients:
            self._pieces[gradient.piece].pending.append(gradient)
        self._changed.notify_all()

    def hurry(self, *, on: bool) -> None:
        """Replay what is pending without gathering more, while the ring is full."""
        with self._changed:
            self._hurry = on
            self._changed.notify_all()

    def discard(self, pieces: Iterable[int]) -> None:
        """Forget these pieces' replay and return when nothing touches their memory any more."""
        with self._changed:
            for index in pieces:
                # Looked up again after each wait: a job that failed has forgotten all of them.
                while (state := self._pieces.get(index)) is not None and state.busy:
                    self._changed.wait()
                if state is None:
                    continue
                for gradient in state.pending:
                    self._ring.free(gradient.offset)
                del self._pieces[index]

    def _accept(self, capture: Capture, taken: Callable[[], None]) -> Callable[[], None]:
        owners: dict[tuple[str, ...], set[int]] = defaultdict(set)
        for index, state in self._pieces.items():
            for stretch in state.piece.stretches:
                owners[stretch.name].add(index)
        self._waiting = owners
        self._unproven = len(self._pieces)
        self._capture = capture
        self._notify_all()
        return taken

    def abort(self) -> None:
        """Give up. Returns when no task touches the arenas any more; the partial is removed."""
        with self._changed:
            self._ended = True
            self._notify_all()
            while self._running:
                self._changed.wait()
            for state in self._pieces.values():
                for gradient in state.pending:
                    self._ring.free(gradient.offset)
            self._pieces.clear()
            self._changed.notify_all()
            self._arenas = ()
            transaction, self._transaction = self._transaction, None
        if transaction is not None:
            transaction.abort()

    @property
    def replaying(self) -> bool:
        """Whether gradients wait for replay or are being replayed, so that ring room will be freed."""
        with self._changed:
            return not self._ended and any(p.pending or p.busy for p in self._pieces.values())

    @property
    def ended(self) -> bool:
        """Whether there will be no more tasks."""
        return self._ended

    # -- the worker side ---------------------------------------------------------------------

    def take(self) -> Callable[[], None] | None:
        """Return the next task, waiting for one; ``None`` once the job ended."""
        return self._take(self._next, self._changed)

    def take_write(self) -> Callable[[], None] | None:
        """Do as :meth:`take`, but only for large chunks that are to be written: the disk is waited for."""
        return self._take(self._next_large, self._large)

    def _take(
        self, find: Callable[[], Task | None], changed: threading.Condition
    ) -> Callable[[], None] | None:
        with changed:
            while True:
                if self._ended:
                    return None
                self._list_chunks()
                task = find()
                if task is not None:
                    self._running += 1
                    return lambda: self._run(task)
                changed.wait()

    def _list_chunks(self) -> None:
        """List the chunks to write, once they are known: of many arrays it takes long, so no caller waits."""
        capture = self._capture
        if capture is None or self._listed:
            return
        self._listed = True
        chunks = ((place, slot) for place in capture.arrays for slot in place.layout.slots)
        # By size, so that the largest go first on one side and the smallest on the other; those that are
        # written several in a row, in the manifest's order: they may be neighbours in the file.
        self._chunks = sorted(chunks, key=lambda chunk: chunk[1].nbytes if chunk[1].nbytes >= SMALL else 0)

    def _notify_all(self) -> None:
        """Wake every thread, with the lock held: chunks may be written now, or nothing any more."""
        self._changed.notify_all()
        self._large.notify_all()

    def _next_large(self) -> Task | None:
        # By size: most of the time none is left, or all that are wait for their replay.
        if not self._chunks or self._chunks[-1][1].nbytes < LARGE:
            return None
        return self._next_chunk(reversed(range(len(self._chunks))), LARGE)

    def _next(self) -> Task | None:
        capture = self._capture
        closed = capture is not None
        threshold = 1 if closed or self._hurry else BATCH
        # Looked through for each task, and so not any more when all are proven.
        for state in self._pieces.values() if self._unproven or not closed else ():
            if state.busy or state.proven:
                continue
            if closed or len(state.pending) >= threshold:
                gradients, state.pending = state.pending, []
                state.busy = True
                return lambda: self._replay(state, gradients, capture)
        if not closed or self._wrong:
            return self._end_wrong() if closed and not self._running else None
        # Whether it is exact is known once all is replayed, and the documents say it.
        if not self._documents_taken and not self._undecided:
            self._documents_taken = True
            return self._write_documents
        task = self._next_chunk(range(len(self._chunks)), 0)
        if task is not None or self._chunks or self._running or self._commit_taken:
            return task
        self._commit_taken = True
        return self._commit

    @property
    def _undecided(self) -> bool:
        """Whether it is yet to be seen if what is replayed is exact."""
        return self._unproven > 0 and self._capture is not None and bool(self._capture.samples)

    def _next_chunk(self, positions: Iterable[int], least: int) -> Task | None:
        """Return the writing of the first chunk of that size whose replay, if any, is proven."""
        if self._wrong:
            return None
        for position in positions:
            if self._is_ready(position, least):
                end = position + 1
                if self._chunks[position][1].nbytes < SMALL:
                    end = min(len(self._chunks), position + SMALL_BATCH)
                row = range(position, end)
                chosen = {at for at in row if at == position or self._is_small_and_ready(at, least)}
                chunks = [self._chunks[at] for at in row if at in chosen]
                self._chunks[position:end] = [self._chunks[at] for at in row if at not in chosen]
                return lambda: self._write(chunks)
        return None

    def _is_small_and_ready(self, position: int, least: int) -> bool:
        return self._chunks[position][1].nbytes < SMALL and self._is_ready(position, least)

    def _is_ready(self, position: int, least: int) -> bool:
        place, slot = self._chunks[position]
        return slot.nbytes >= least and not self._waiting.get(place.layout.spec.name)

    def _run(self, task: Task) -> None:
        error: BaseException | None = None
        report: Report | None = None
        try:
            report = task()
        except BaseException as caught:  # noqa: BLE001 - reported through the handle
            error = caught
        with self._changed:
            self._running -= 1
            failed = error is not None and not self._ended
            if failed:
                self._ended = True
                self._notify_all()
            elif not self._running:
                self._changed.notify_all()  # who gives up waits for this, and so does the commit
        # Reported only now that this task no longer counts as running: whoever hears of it may
        # hold a lock that the training side holds while it waits for running tasks.
        if failed and error is not None:
            self._fail(error)
        elif report is not None:
            try:
                report()
            except BaseException as caught:  # noqa: BLE001 - a waiting caller must hear of it
                self._fail(caught)

    def _fail(self, error: BaseException) -> None:
        self.abort()
        self._outcome.failed(self, as_background_error(error))

    def _replay(
        self, state: PieceReplay, gradients: list[Gradient], capture: Capture | None
    ) -> Report | None:
        """Replay a piece's gradients; prove it as well if there was a capture when this was taken."""
        arena, ring = self._arenas[ArenaId.STATE], self._arenas[ArenaId.RING]
        began = perf_counter()
        try:
            if gradients:
                state.run(arena, ring, gradients)
        except BaseException:
            with self._changed:
                state.busy = False
            raise
        finally:
            for gradient in gradients:
                self._ring.free(gradient.offset)
        self._trace.span("replay", began, perf_counter())
        found = None if capture is None else state.prove(arena, ring, capture)
        with self._changed:
            state.busy = False
            if capture is not None:
                state.proven = True
                self._unproven -= 1
                for stretch, measured in found or ():
                    self._findings.add(stretch.name, measured)
                if found is None:
                    self._wrong.append(state.piece.index)
                for stretch in state.piece.stretches:
                    self._waiting[stretch.name].discard(state.piece.index)
                if self._chunks and self._chunks[-1][1].nbytes >= LARGE:
                    self._large.notify_all()
            self._changed.notify_all()
        return None

    def _end_wrong(self) -> Task | None:
        if self._commit_taken:
            return None
        self._commit_taken = True
        return self._report_wrong

    def _report_wrong(self) -> Report:
        wrong = tuple(sorted(self._wrong))
        with self._changed:
            self._ended = True
            self._arenas = ()
            transaction, self._transaction = self._transaction, None
            self._notify_all()
        if transaction is not None:
            transaction.abort()
        return lambda: self._outcome.mismatched(self, wrong)

    def _write(self, chunks: Sequence[tuple[ArrayPlace, Slot]]) -> Report | None:
        began = perf_counter()
        arenas, transaction = self._arenas, self._begun()
        slots = []
        for place, slot in chunks:
            arena = arenas[place.arena]
            if place.strides is not None:
                _to_row_major(arena.view(slot.offset, slot.nbytes), place.layout.spec.shape, place.strides)
            self._counter.look(place.layout.spec, arena.view(slot.offset, slot.nbytes))
            slots.append((place.layout, slot, arena.view(slot.offset, slot.capacity).data))
        transaction.write_chunks(slots)
        with self._changed:
            self.written_bytes += sum(slot.nbytes for _, slot in chunks)
        self._trace.span("write", began, perf_counter())
        return None

    def _write_documents(self) -> Report | None:
        began = perf_counter()
        transaction, capture = self._begun(), self._capture
        found = None if capture is None else self._findings.documents(capture)
        if found is not None:
            self.deviation, state, self._attributes = found
            # What was counted is said as if nothing were found: most often that stays true.
            attributes = attributes_with(self._attributes, NonFinite())
            transaction.restate(state=state, attributes=attributes, exact=False)
        transaction.write_documents()
        self._trace.span("write", began, perf_counter())
        return None

    def _begun(self) -> Transaction:
        capture = self._capture
        if capture is None:
            msg = "a chunk can't be written before the capture"
            raise WorkerError(msg)
        with self._changed:
            if self._transaction is None:
                self._attributes = capture.attributes
                self._transaction = self._store.begin(
                    capture.step,
                    [place.layout for place in capture.arrays],
                    state=capture.state,
                    attributes=attributes_with(capture.attributes, NonFinite()),
                    exact=capture.exact,
                )
            return self._transaction

    def _commit(self) -> Report:
        began = perf_counter()
        transaction, capture = self._begun(), self._capture
        if capture is not None:
            self.nonfinite = self._counter.found(capture.state)
        if self.nonfinite.arrays:
            transaction.annotate(attributes_with(self._attributes, self.nonfinite))
        result = transaction.commit()
        self._trace.span("commit", began, perf_counter())
        with self._changed:
            self._transaction = None
            self._ended = True
            # The next save may need a larger one; threads of this job may hold on to the job for a while.
            self._arenas = ()
            self._notify_all()
        return lambda: self._outcome.published(self, result)


def _to_row_major(data: np.ndarray, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Reorder a dense array in place from storage order to row-major order."""
    itemsize = data.nbytes // int(np.prod(shape, dtype=np.int64))
    stored = np.ndarray(
        shape, dtype=f"V{itemsize}", buffer=data.data, strides=tuple(s * itemsize for s in strides)
    )
    data[:] = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
