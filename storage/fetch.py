"""Carry out a read plan: open chunk files, read, check, and put the bytes where they belong.

Promise: every element of the wanted box is written, from bytes that agree with their checksums where
that was asked for; or an error is raised, and then the target's content is undefined. Memory beside
the target stays within one piece per thread.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gockpt.errors import ChunkCorrupt
from gockpt.storage.checksum import BLOCK, crc32c
from gockpt.storage.ranges import ByteRange, ChunkRead, Grid, scatter

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import numpy.typing as npt

    from gockpt.boxes import Box
    from gockpt.storage.folder import File, Folder
    from gockpt.storage.manifest import ArrayEntry

__all__ = ["PARALLEL_FROM", "PIECE", "Source", "execute", "first_bad_block"]

PIECE = 8 << 20
"""Bytes of one read, and of one thread's bounce buffer."""

PARALLEL_FROM = 16 << 20
"""Smaller plans are carried out in the caller's thread: starting others would take longer."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where an array's chunk files are, and what their blocks must hash to.

    Attributes:
        folder: The checkpoint's directory.
        entry: The array, from the manifest.
        crcs: The checksum of every block of the array, or ``None`` to take the bytes as they are.
    """

    folder: Folder
    entry: ArrayEntry
    crcs: npt.NDArray[np.uint32] | None

    @property
    def grid(self) -> Grid:
        """The array's chunks."""
        return Grid(self.entry.spec, self.entry.chunk_shape, BLOCK)

    def open(self, chunk: int) -> File:
        """Open a chunk's file, which must have exactly the size that follows from the grid."""
        nbytes = self.entry.chunk_file_nbytes
        return self.folder.open(self.entry.chunk_path(chunk), nbytes=nbytes)


class _Bounce:
    """One thread's buffer for bytes that don't go straight to the target; grows to its largest use."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return ``nbytes`` bytes of undefined content; what was taken before is void."""
        if nbytes > self._buffer.nbytes:
            self._buffer = np.empty(nbytes, np.uint8)
        return self._buffer[:nbytes]


def execute(
    plan: Sequence[ChunkRead], source: Source, box: Box, out: npt.NDArray[np.uint8], *, threads: int
) -> int:
    """Fill ``out`` with the bytes of ``box`` as planned.

    Args:
        plan: What to read, from :func:`~gockpt.storage.ranges.plan_reads`.
        source: The array's files.
        box: The wanted region.
        out: The target: 1-D ``uint8``, C-contiguous, exactly the box's bytes.
        threads: How many threads may work on a large plan.

    Returns:
        The bytes read from files.

    Raises:
        CheckpointCorrupt: If a file is not what it must be, or a block differs from its checksum.
        OSError: If a file isn't there or can't be opened.
    """
    jobs = deque(_jobs(plan))

    def work() -> int:
        bounce, total = _Bounce(), 0
        while True:
            try:
                read, ranges = jobs.popleft()
            except IndexError:
                return total
            try:
                with source.open(read.chunk) as file:
                    for part in ranges:
                        total += _read(file, read, part, source, box, out, bounce)
            except BaseException:
                jobs.clear()  # the others end with the job they have
                raise

    planned = sum(part.nbytes for read in plan for part in read.ranges)
    if threads <= 1 or planned < PARALLEL_FROM:
        return work()
    with ThreadPoolExecutor(min(threads, len(jobs)), thread_name_prefix="gockpt-read") as pool:
        workers = [pool.submit(work) for _ in range(min(threads, len(jobs)))]
        try:
            return sum(worker.result() for worker in workers)
        finally:
            jobs.clear()  # Ctrl-C arrives here


def _jobs(plan: Iterable[ChunkRead]) -> Iterator[tuple[ChunkRead, list[ByteRange]]]:
    """Yield ranges of one chunk each, together at most a piece."""
    for read in plan:
        batch: list[ByteRange] = []
        nbytes = 0
        for part in read.ranges:
            if batch and nbytes + part.nbytes > PIECE:
                yield read, batch
                batch, nbytes = [], 0
            batch.append(part)
            nbytes += part.nbytes
        yield read, batch


def _read(
    file: File,
    read: ChunkRead,
    part: ByteRange,
    source: Source,
    box: Box,
    out: npt.NDArray[np.uint8],
    bounce: _Bounce,
) -> int:
    """Read one range: straight into the target where it can stand there, else through the bounce."""
    if read.run is None:
        views = [bounce.take(part.nbytes)]
    else:
        # Only the ends of a range, widened to whole blocks, lie outside the wanted run.
        low, high = max(part.start, read.run.start), min(part.stop, read.run.stop)
        lead, trail = low - part.start, part.stop - high
        ends = bounce.take(lead + trail)
        at = read.target + low - read.run.start
        views = [ends[:lead], out[at : at + high - low], ends[lead:]]
    got = file.read_into([view.data for view in views], part.start)
    if source.crcs is not None:
        first = part.start // BLOCK
        known = source.crcs[source.grid.first_block(read.chunk) + first :]
        bad = first_bad_block(views, known)
        if bad is not None:
            start = (first + bad) * BLOCK
            msg = f"{file.path}: the bytes from {start} on differ from the checksum of their block"
            raise ChunkCorrupt(msg)
    if read.run is None:
        scatter(source.grid, box, read, part.start, views[0], out)
    return got


def first_bad_block(views: Iterable[npt.NDArray[np.uint8]], crcs: npt.NDArray[np.uint32]) -> int | None:
    """Return the index of the first block that differs from its checksum, or ``None``.

    ``views`` one behind the other hold whole blocks; only the very last one may be shorter.
    """
    value = filled = index = 0
    for view in views:
        at = 0
        while at < view.nbytes:
            n = min(BLOCK - filled, view.nbytes - at)
            value = crc32c(view[at : at + n].data, value)
            at += n
            filled += n
            if filled == BLOCK:
                if value != crcs[index]:
                    return index
                value, filled, index = 0, 0, index + 1
    return index if filled and value != crcs[index] else None
