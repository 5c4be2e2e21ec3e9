"""Carry out a read plan: open chunk files, read, check, and put the bytes where they belong.

Promise: every element of the wanted boxes is written, from bytes that agree with their checksums where
that was asked for; or an error is raised, and then the targets' content is undefined. Memory beside
the targets stays within one piece, and a few pages, per thread; of encoded arrays, one chunk.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gockpt.storage.format.checksum import BLOCK, expect_blocks
from gockpt.storage.read.decode import read_chunk
from gockpt.storage.read.in_threads import in_threads
from gockpt.storage.read.read_plan import ByteRange, ChunkRead, Grid, scatter
from gockpt.storage.read.scratch import PIECE, Scratch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    import numpy as np
    import numpy.typing as npt

    from gockpt.core.boxes import Box
    from gockpt.storage.format.codecs import Coded
    from gockpt.storage.format.manifest_entries import ArrayEntry
    from gockpt.storage.read.location import File, Files

__all__ = ["PARALLEL_FROM", "PARALLEL_JOBS", "PIECE", "Source", "Task", "execute"]

PARALLEL_FROM = 16 << 20
PARALLEL_JOBS = 32
"""Plans of fewer bytes and jobs are carried out in the caller's thread: starting others takes longer."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where an array's chunk files are, and what their blocks must hash to.

    Attributes:
        files: The files of its checkpoint.
        entry: The array, from the manifest.
        crcs: The checksum of every block of the array, or ``None`` to take the bytes as they are.
    """

    files: Files
    entry: ArrayEntry
    crcs: npt.NDArray[np.uint32] | None

    @property
    def grid(self) -> Grid:
        """The array's chunks."""
        return Grid(self.entry.spec, self.entry.chunk_shape, BLOCK)

    def open(self, chunk: int, scratch: Scratch | None = None) -> File:
        """Open a chunk's file, which must have exactly the size that follows from the manifest.

        With the calling thread's ``scratch`` it is read past the page cache where that is sooner.
        """
        nbytes = self.entry.file_nbytes(chunk)
        at = None if self.entry.at is None else self.entry.at[chunk]
        return self.files.open(self.entry.chunk_path(chunk), nbytes=nbytes, scratch=scratch, at=at)


@dataclass(frozen=True, slots=True)
class Task:
    """One region of one array to read.

    Attributes:
        name: What the array is called.
        source: Its files.
        box: The wanted region.
        plan: What to read, from :func:`~gockpt.storage.read.read_plan.plan_reads`.
        out: The target: 1-D ``uint8``, C-contiguous, exactly the box's bytes; no other task's.
    """

    name: str
    source: Source
    box: Box
    plan: tuple[ChunkRead, ...]
    out: npt.NDArray[np.uint8]


def execute(
    tasks: Sequence[Task],
    *,
    threads: int,
    explained: Callable[[str], AbstractContextManager[None]],
    begun: Callable[[int], None],
) -> int:
    """Fill every task's target as planned; all tasks together are one list of jobs for all threads.

    Args:
        tasks: What to read.
        threads: How many threads may work on a large plan.
        explained: Returns what is entered around each job, given the array's name: it may turn errors
            into others.
        begun: Called before each job, in its thread, with the index of its task.

    Returns:
        The bytes read from files.

    Raises:
        CheckpointCorrupt: If a file is not what it must be, or a block differs from its checksum.
        OSError: If a file isn't there or can't be opened.
    """
    jobs = [(index, read, ranges) for index, task in enumerate(tasks) for read, ranges in _jobs(task)]
    lock, total = threading.Lock(), 0

    def work(job: tuple[int, ChunkRead, Sequence[ByteRange]], scratch: Scratch) -> None:
        nonlocal total
        index, read, ranges = job
        task = tasks[index]
        with explained(task.name):
            begun(index)
            scratch.take(0)
            with task.source.open(read.chunk, scratch) as file:
                coded = task.source.entry.coded
                if coded is not None:
                    got = _read_encoded(file, read, task, coded)
                else:
                    got = sum(_read(file, read, part, task, scratch) for part in ranges)
        with lock:
            total += got

    planned = sum(part.nbytes for _, _, ranges in jobs for part in ranges)
    is_small = planned < PARALLEL_FROM and len(jobs) < PARALLEL_JOBS
    threads = 1 if is_small else min(threads, len(jobs))
    in_threads(work, jobs, threads=threads, name="gockpt-read", memory=Scratch)
    return total


def _jobs(task: Task) -> Iterator[tuple[ChunkRead, Sequence[ByteRange]]]:
    """Yield ranges of one chunk each, together at most a piece; of encoded arrays, all of a chunk."""
    for read in task.plan:
        if task.source.entry.coded is not None:
            yield read, read.ranges
            continue
        batch: list[ByteRange] = []
        nbytes = 0
        for part in read.ranges:
            if batch and nbytes + part.nbytes > PIECE:
                yield read, batch
                batch, nbytes = [], 0
            batch.append(part)
            nbytes += part.nbytes
        yield read, batch


def _read(file: File, read: ChunkRead, part: ByteRange, task: Task, scratch: Scratch) -> int:
    """Read one range: straight into the target where it can stand there, else through the scratch."""
    source, out = task.source, task.out
    if read.run is None:
        views = [scratch.take(part.nbytes, part.start)]
    else:
        # Only the ends of a range, widened to whole blocks, lie outside the wanted run.
        low, high = max(part.start, read.run.start), min(part.stop, read.run.stop)
        lead, trail = low - part.start, part.stop - high
        ends = scratch.take(lead + trail)
        at = read.target + low - read.run.start
        views = [ends[:lead], out[at : at + high - low], ends[lead:]]
    got = file.read_into([view.data for view in views], part.start)
    if source.crcs is not None:
        known = source.crcs[source.grid.first_block(read.chunk) + part.start // BLOCK :]
        expect_blocks(views, known, where=file.path, start=part.start)
    if read.run is None:
        scatter(source.grid, task.box, read, part.start, views[0], out)
    return got


def _read_encoded(file: File, read: ChunkRead, task: Task, coded: Coded) -> int:
    """Read and decode a whole chunk: straight into the target if all of it is wanted there."""
    source, run, out = task.source, read.run, task.out
    entry = source.entry
    if run is not None and run.nbytes == entry.chunk_nbytes:
        place = out[read.target : read.target + run.nbytes]
        read_chunk(file, entry, coded, read.chunk, source.crcs, place)
        return file.nbytes
    chunk = read_chunk(file, entry, coded, read.chunk, source.crcs)
    if run is not None:
        out[read.target : read.target + run.nbytes] = chunk[run.start : run.stop]
    else:
        scatter(source.grid, task.box, read, 0, chunk[: source.grid.real_nbytes(read.chunk)], out)
    return file.nbytes
