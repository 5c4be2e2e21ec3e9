"""Carry out a read plan: open chunk files, read, check, and put the bytes where they belong.

Promise: every element of the wanted boxes is written, from bytes that agree with their checksums where
that was asked for; or an error is raised, and then the targets' content is undefined. Memory beside
the targets stays within one piece, and a few pages, per thread; of encoded arrays, one chunk.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gockpt.storage.format.checksum import BLOCK, crc32c, expect_blocks
from gockpt.storage.read.decode import read_chunk
from gockpt.storage.read.in_threads import in_threads
from gockpt.storage.read.read_join import join_neighbours
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


JOINED = 1 << 20
"""Most bytes of neighbours that are read at once: more are no longer in the core's cache when checked."""
MAX_GAP = 16 << 10
"""Largest gap that is read along between neighbours."""
MOST_JOINED = 500
"""Most neighbours at once: the system takes 1024 places for one read."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where an array's chunk files are, and what their blocks must hash to.

    Attributes:
        files: The files of its checkpoint.
        entry: The array, from the manifest.
        crcs: The checksum of every block of the array, and perhaps of others behind it; ``None`` to take the
            bytes as they are.
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


class _Job:
    """Part of a task that one thread carries out: ranges of one chunk.

    Attributes:
        task: The task.
        index: Its number.
        read: The chunk to read of.
        ranges: Ranges of its file.
        alone_at: Where its only range is in an archive, if it is all wanted and goes to one place, so that
            it may be read with its neighbours; else ``None``.
    """

    __slots__ = ("alone_at", "index", "ranges", "read", "task")

    def __init__(self, task: Task, index: int, read: ChunkRead, ranges: Sequence[ByteRange]) -> None:
        self.task = task
        self.index = index
        self.read = read
        self.ranges = ranges
        self.alone_at: ByteRange | None = None
        entry = task.source.entry
        if entry.at is not None and entry.coded is None and len(ranges) == 1 and ranges[0] == read.run:
            self.alone_at = ByteRange(entry.at[read.chunk] + ranges[0].start, ranges[0].nbytes)

    @property
    def target(self) -> npt.NDArray[np.uint8]:
        """The bytes of the task's target that the range goes to."""
        return self.task.out[self.read.target : self.read.target + self.ranges[0].nbytes]


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
    jobs = [
        _Job(task, index, read, ranges) for index, task in enumerate(tasks) for read, ranges in _jobs(task)
    ]
    groups = join_neighbours(
        [job.alone_at for job in jobs], max_gap=MAX_GAP, most_nbytes=JOINED, most_parts=MOST_JOINED
    )
    lock, total = threading.Lock(), 0

    def work(group: list[int], scratch: Scratch) -> None:
        nonlocal total
        together = [jobs[index] for index in group]
        for job in together:
            begun(job.index)
        scratch.take(0)
        with explained(together[0].task.name):
            got = _read_joined(together, scratch) if len(group) > 1 else _read_job(together[0], scratch)
        for job in together if len(group) > 1 else ():
            if not _is_right(job):
                with explained(job.task.name):
                    _read_job(job, scratch)  # says what is wrong
        with lock:
            total += got

    planned = sum(part.nbytes for job in jobs for part in job.ranges)
    is_small = planned < PARALLEL_FROM and len(groups) < PARALLEL_JOBS
    threads = 1 if is_small else min(threads, len(groups))
    in_threads(work, groups, threads=threads, name="gockpt-read", memory=Scratch)
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


def _read_job(job: _Job, scratch: Scratch) -> int:
    """Read what one chunk has for a task."""
    source, read = job.task.source, job.read
    with source.open(read.chunk, scratch) as file:
        if source.entry.coded is not None:
            return _read_encoded(file, read, job.task, source.entry.coded)
        return sum(_read(file, read, part, job.task, scratch) for part in job.ranges)


def _read_joined(jobs: Sequence[_Job], scratch: Scratch) -> int:
    """Read neighbours of one archive straight into their targets, with the gaps between them."""
    source = jobs[0].task.source
    gap = scratch.take(MAX_GAP).data
    places = [job.alone_at for job in jobs if job.alone_at is not None]
    first, views, at = places[0].start, list[memoryview](), places[0].start
    for job, place in zip(jobs, places, strict=True):
        views += [gap[: place.start - at], job.target.data]
        at = place.stop
    path = source.entry.chunk_path(jobs[0].read.chunk)
    with source.files.open(path, nbytes=at - first, scratch=scratch, at=first) as file:
        return file.read_into(views, 0)


def _is_right(job: _Job) -> bool:
    """Whether the bytes of a job of one block, which are in their place, agree with their checksum."""
    source, chunk = job.task.source, job.read.chunk
    if source.crcs is None:
        return True
    first = source.grid.first_block(chunk) if chunk else 0
    known = int(source.crcs[first + job.ranges[0].start // BLOCK])
    return job.ranges[0].nbytes <= BLOCK and crc32c(job.target.data) == known


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
