"""Stager of host memory: copies tensors into the arena behind the training step."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from gockpt.core.descriptors import ArenaId
from gockpt.errors import SaveAborted
from gockpt.kernels.fingerprint_numba import copy_fingerprints, fingerprint, fingerprints
from gockpt.kernels.gradient16_launch import Form
from gockpt.kernels.gradient_encoding import encode
from gockpt.staging.stager import CopyRequest, CopyResult, Urgency
from gockpt.tensor_memory import as_bytes, dense_range

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterator, Sequence

    import numpy.typing as npt
    import torch

    from gockpt.staging.arena import Arena
    from gockpt.staging.gradient_ring import Ring
    from gockpt.staging.stager import Source
    from gockpt.staging.task_thread import TaskBatch, TaskThread

    Bytes = npt.NDArray[np.uint8]

__all__ = ["Copies", "HostStager", "Rows"]

TASK_BYTES = 1 << 20
"""Bytes of the fingerprints of one task, if there are so many: enough that starting one costs nothing."""

COPY_TASK_BYTES = 64 << 10
"""The same for copies, which whoever waits for them helps with."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Bytes in host memory, as a table.

    Attributes:
        addresses: Where each row begins: int64[R].
        nbytes: How many bytes it has: int64[R].
        positions: Where its first byte is in its array, as far as fingerprints go: int64[R], multiples of 8.
        memory: Holds the memory alive.
    """

    addresses: np.ndarray
    nbytes: np.ndarray
    positions: np.ndarray
    memory: object

    def of(self, rows: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return some rows of each column."""
        return self.addresses[rows], self.nbytes[rows], self.positions[rows]

    def parts(self, nbytes: int) -> Iterator[slice]:
        """Divide the rows into parts of ``nbytes`` or of one row, whichever is more."""
        ends = np.cumsum(self.nbytes)
        first, total = 0, len(ends)
        while first < total:
            before = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + nbytes, side="right")))
            yield slice(first, last)
            first = last


class Copies:
    """Copies into the arenas, as a table.

    Attributes:
        rows: Live bytes.
        targets: Where they go: int64[R].
        expected: Fingerprints of the live bytes at the boundary: uint64[R].
        arrived: Fingerprints of the targets after the copies: uint64[R].
        ended: Which have been copied: bool[R].
    """

    def __init__(self, rows: Rows, targets: np.ndarray, expected: np.ndarray) -> None:
        self.rows = rows
        self.targets = targets
        self.expected = expected
        self.arrived = np.zeros_like(expected)
        self.ended = np.zeros(expected.size, bool)

    def tasks(self) -> Iterator[Callable[[], None]]:
        """Return the copies as tasks of some size."""
        for part in self.rows.parts(COPY_TASK_BYTES):
            yield partial(self.run, part)

    def run(self, part: slice | np.ndarray) -> None:
        """Copy some rows, and fingerprint what arrived."""
        addresses, nbytes, positions = self.rows.of(part)
        self.arrived[part] = copy_fingerprints(addresses, self.targets[part], nbytes, positions)
        self.ended[part] = True

    @property
    def proven(self) -> np.ndarray:
        """Whether the bytes that arrived are those of the boundary: bool[R]."""
        proven: np.ndarray = self.ended & (self.arrived == self.expected)
        return proven

    def retry(self) -> None:
        """Copy again what is not proven, if the source is (again) what it was at the boundary.

        Only for a moment at which nothing else writes the sources.
        """
        left = np.flatnonzero(~self.proven)
        again = left[fingerprints(*self.rows.of(left)) == self.expected[left]]
        if again.size:
            self.run(again)


class _Result(CopyResult):
    """Copies of one call in host memory; ``fingerprints`` are those of sources, by tensor and bytes."""

    def __init__(self, requests: Sequence[CopyRequest], on_done: Callable[[], None] | None) -> None:
        super().__init__(requests, on_done)
        self.asked: Sequence[CopyRequest] = self.requests
        self.copies: Copies | None = None
        self.behind = False
        self.batch: TaskBatch | None = None
        self.fingerprints: dict[tuple[int, int, int], int] = {}

    @property
    def sample(self) -> tuple[int, float]:
        """Bytes and seconds for the measured copy rate: those of copies behind training."""
        return super().sample if self.behind else (0, 0.0)

    def end(self) -> None:
        """Let nobody wait for it any more, and no memory be held by it."""
        super().end()
        self.asked, self.copies = (), None

    def judge(self) -> None:
        """Note which copies are not proven."""
        if self.copies is not None:
            copied = [request for request in self.asked if request.arrived is None]
            self.lost = [copied[row] for row in np.flatnonzero(~self.copies.proven).tolist()]


class HostStager:
    """Stager of tensors in host memory, see :class:`gockpt.staging.stager.Stager`.

    Fingerprints are taken, and gradients encoded, inside the call. State is copied by a background thread; a
    copy that was overtaken by a change is made again when the change is undone by the time somebody waits.

    Attributes:
        broken: ``False``: host memory does not refuse.
        variant: ``None``: there is nothing to say of it.
        behind: The urgency of state that is copied behind training.
        waits_for_room: ``True``: gradients are in place when they are sent, so replay can free their room.
    """

    broken = False
    variant = None
    behind = Urgency.STATE
    waits_for_room = True

    def __init__(self, thread: TaskThread, arenas: Sequence[Arena]) -> None:
        """Copy into ``arenas``, by index."""
        self._thread = thread
        self._arenas = arenas
        self._lock = threading.Lock()
        self._open: list[_Result] = []

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is in host memory."""
        return tensor.device.type == "cpu"

    def value(self, tensor: torch.Tensor) -> float | None:
        """Return a number in host memory."""
        return float(tensor) if self.holds(tensor) and tensor.numel() == 1 else None

    def fingerprint(
        self, sources: Sequence[Source], *, on_done: Callable[[], None] | None = None
    ) -> CopyResult:
        """Take the sources' fingerprints as of now, on the background thread and the calling one together."""
        result = _Result((), on_done)
        result.expected = self.fingerprint_now(sources)
        result.fingerprints = dict(zip(map(_key, sources), result.expected, strict=True))
        result.end()
        return result

    def fingerprint_now(self, sources: Sequence[Source]) -> list[int]:
        """Return the sources' fingerprints now."""
        found: list[int] = self._fingerprints_now(_rows_of(sources)).tolist()
        return found

    def _fingerprints_now(self, rows: Rows) -> np.ndarray:
        found = np.zeros(rows.nbytes.size, np.uint64)

        def task(part: slice) -> None:
            found[part] = fingerprints(*rows.of(part))

        self._thread.run([partial(task, part) for part in rows.parts(TASK_BYTES)])
        return found

    def copy(
        self,
        requests: Sequence[CopyRequest],
        urgency: Urgency,
        *,
        on_done: Callable[[], None] | None = None,
        seen: CopyResult | None = None,
    ) -> CopyResult:
        """Copy the sources as they are now, behind the call or inside it: see :class:`Urgency`."""
        result = _Result(requests, on_done)
        copied = [request for request in requests if request.arrived is None]
        sources = [request.source for request in copied]
        rows = _rows_of(sources)
        known = seen.fingerprints if isinstance(seen, _Result) else {}
        missing = np.array([_key(source) not in known for source in sources], bool) if known else None
        if missing is None:
            expected = self._fingerprints_now(rows)
        else:
            expected = np.array([known.get(_key(source), 0) for source in sources], np.uint64)
            expected[missing] = self._fingerprints_now(Rows(*rows.of(np.flatnonzero(missing)), rows.memory))
        left = iter(expected.tolist())
        result.expected = [next(left) if r.arrived is None else r.arrived for r in requests]
        result.copies = Copies(rows, self._targets(copied), expected)
        tasks = [*result.copies.tasks()]
        if urgency in (Urgency.BUFFER, Urgency.GRADIENT):
            self._thread.run(tasks)
            result.judge()
            result.end()
            return result
        result.behind = True
        with self._lock:
            self._open.append(result)
        result.batch = self._thread.submit(tasks, on_done=lambda: self._ended(result))
        return result

    def _targets(self, requests: Sequence[CopyRequest]) -> np.ndarray:
        """Return where the copies go: int64[R]."""
        for request in requests:
            if not 0 <= request.offset <= self._arenas[request.arena].nbytes - request.source.nbytes:
                msg = f"{request} does not fit into its arena"
                raise ValueError(msg)
        places = (self._arenas[request.arena].address + request.offset for request in requests)
        return np.fromiter(places, np.int64, len(requests))

    def place_gradient(self, source: Source, grad_dtype: str | None, ring: Ring) -> CopyRequest | None:
        """Put a gradient into the ring now, encoded where that makes it smaller; ``None`` without room."""
        view = self._arenas[ArenaId.RING].view
        data = as_bytes(source.memory)[source.low : source.low + source.nbytes]
        found = encode(grad_dtype, data.view(np.float32), ring.allocate, view, ring.free)
        if found is None:
            return None
        arrived = 0
        if grad_dtype is not None:
            arrived = fingerprint(view(found.offset, found.nbytes), source.position)
        form = Form(found.encoding, found.nbytes)
        return CopyRequest(source, ArenaId.RING, found.offset, None, form, arrived)

    def collect(self) -> None:
        """Finish all copies, helping."""
        for result in tuple(self._open):
            self.finish(result)

    def guard(self, owners: Collection[Hashable] | None) -> None:  # noqa: ARG002 - finished is finished
        """Finish all copies, helping: then anything may be overwritten."""
        self.collect()

    def flush(self) -> None:
        """Finish all copies, helping."""
        self.collect()

    def finish(self, result: CopyResult) -> None:
        """Finish the copies of one call, helping; make those again that were overtaken by an undone change.

        May be interrupted anywhere and called again: a copy counts only once it is proven.

        Raises:
            SaveAborted: If it was cancelled.
        """
        if isinstance(result, _Result) and result.batch is not None and not result.done.is_set():
            copies = result.copies
            result.batch.finish()
            if copies is not None:
                copies.retry()
            self._end(result)
        if result.error is not None:
            raise result.error

    def give_up(self, error: BaseException) -> None:
        """Raise the error: host memory does not refuse, so it is a defect."""
        raise error

    def cancel(self) -> None:
        """Drop what was not begun and wait for what was: afterwards nothing writes into the arenas."""
        for result in tuple(self._open):
            result.on_done = None
            if result.batch is not None:
                result.batch.cancel()
            self._end(result, SaveAborted("it was given up while it was copied"))

    def _ended(self, result: _Result) -> None:
        """Tell of a result whose copies have all arrived; what is not proven waits for :meth:`finish`."""
        if result.copies is not None and result.copies.proven.all():
            self._end(result)

    def _end(self, result: _Result, error: BaseException | None = None) -> None:
        with self._lock:
            if result not in self._open:
                return
            self._open.remove(result)
            result.error = error
            result.judge()
            result.end()
        result.tell()


def _key(source: Source) -> tuple[int, int, int]:
    return id(source.memory), source.low, source.nbytes


def _rows_of(sources: Sequence[Source]) -> Rows:
    """Return the table of sources in host memory.

    Raises:
        ValueError: If one is no longer contiguous in memory, or its memory no longer there.
    """
    memory = {id(source.memory): source.memory for source in sources}
    ranges: dict[int, tuple[int, int]] = {}
    for key, tensor in memory.items():
        found = dense_range(tensor)
        if found is None:
            msg = f"a tensor of shape {tuple(tensor.shape)} is no longer contiguous in memory"
            raise ValueError(msg)
        ranges[key] = found
    table = np.array(
        [(ranges[id(s.memory)][0] + s.low, s.nbytes, s.position) for s in sources], np.int64
    ).reshape(-1, 3)
    addresses, nbytes, positions = np.ascontiguousarray(table.T)
    return Rows(addresses, nbytes, positions, [*memory.values()])
