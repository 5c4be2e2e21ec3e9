"""Carry out a read plan: open chunk files, read, check, and put the bytes where they belong.

Promise: every element of the wanted boxes is written, from bytes that agree with their checksums where
that was asked for; or an error is raised, and then the targets' content is undefined. Memory beside
the targets stays within one piece, and a few pages, per thread; of encoded arrays, one chunk.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gockpt.core.boxes import Box
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
        box: The wanted region; ``None`` for the whole array.
        out: The target: 1-D ``uint8``, C-contiguous, exactly the region's bytes; no other task's.
    """

    name: str
    source: Source
    box: Box | None
    out: npt.NDArray[np.uint8]

    @property
    def region(self) -> Box:
        """The wanted region, of whole arrays as well."""
        shape = self.source.entry.spec.shape
        return Box((0,) * len(shape), shape) if self.box is None else self.box

    def place(self) -> int | None:
        """Return the offset in the archive of a small array of one raw chunk that is wanted as a whole."""
        entry = self.source.entry
        if self.box is None and entry.at is not None and len(entry.at) == 1 and entry.coded is None:
            return entry.at[0] if self.out.nbytes <= JOINED else None
        return None


class _Job:
    """Part of a task that one thread carries out: ranges of one chunk.

    Attributes:
        task: The task.
        index: Its number.
        read: The chunk to read of; ``None`` for all of a small array, which needs no plan.
        ranges: Ranges of its file.
        at: Where its only range is in an archive, if it is all wanted and goes to one place, so that it may
            be read with its neighbours; else ``None``.
        target: Bytes of the task's target that this range goes to.
    """

    __slots__ = ("at", "index", "ranges", "read", "target", "task")

    def __init__(self, task: Task, index: int, read: ChunkRead | None, ranges: Sequence[ByteRange]) -> None:
        self.task = task
        self.index = index
        self.read = read
        self.ranges = ranges
        self.at: int | None = None
        self.target = task.out.data
        entry = task.source.entry
        if read is None:
            self.at = task.place()
        elif entry.at is not None and entry.coded is None and len(ranges) == 1 and ranges[0] == read.run:
            self.at = entry.at[read.chunk] + ranges[0].start
            self.target = self.target[read.target : read.target + ranges[0].nbytes]

    @property
    def nbytes(self) -> int:
        """Bytes that it reads."""
        return self.target.nbytes if self.at is not None else sum(part.nbytes for part in self.ranges)


def execute(
    tasks: Sequence[Task],
    *,
    plan: Callable[[Task], Sequence[ChunkRead]],
    threads: int,
    explained: Callable[[str], AbstractContextManager[None]],
    begun: Callable[[int], None],
) -> int:
    """Fill every task's target as planned; all tasks together are one list of jobs for all threads.

    Args:
        tasks: What to read.
        plan: Returns what to read for a task, by :func:`~gockpt.storage.read.read_plan.plan_reads`.
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
    jobs: list[_Job] = []
    for index, task in enumerate(tasks):
        if task.place() is not None:
            jobs.append(_Job(task, index, None, ()))
        else:
            jobs += (_Job(task, index, read, ranges) for read, ranges in _parts(task, plan(task)))
    groups = join_neighbours(
        [None if job.at is None else (job.at, job.target.nbytes) for job in jobs],
        max_gap=MAX_GAP,
        most_nbytes=JOINED,
        most_parts=MOST_JOINED,
    )
    lock, total = threading.Lock(), 0

    def alone(job: _Job, scratch: Scratch) -> int:
        whole = plan(job.task)[0] if job.read is None else job.read
        return _read_job(job.task, whole, job.ranges or whole.ranges, scratch)

    def work(group: list[int], scratch: Scratch) -> None:
        nonlocal total
        together = [jobs[index] for index in group]
        for job in together:
            begun(job.index)
        scratch.take(0)
        with explained(together[0].task.name):
            got = _read_joined(together, scratch) if len(group) > 1 else alone(together[0], scratch)
        for job in together if len(group) > 1 else ():
            if not _is_right(job):
                with explained(job.task.name):
                    alone(job, scratch)  # says what is wrong
        with lock:
            total += got

    is_small = len(groups) < PARALLEL_JOBS and sum(job.nbytes for job in jobs) < PARALLEL_FROM
    threads = 1 if is_small else min(threads, len(groups))
    in_threads(work, groups, threads=threads, name="gockpt-read", memory=Scratch)
    return total


def _parts(task: Task, plan: Sequence[ChunkRead]) -> Iterator[tuple[ChunkRead, Sequence[ByteRange]]]:
    """Yield ranges of one chunk each, together at most a piece; of encoded arrays, all of a chunk."""
    for read in plan:
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


def _read_job(task: Task, read: ChunkRead, ranges: Sequence[ByteRange], scratch: Scratch) -> int:
    """Read what one chunk has for a task."""
    source = task.source
    with source.open(read.chunk, scratch) as file:
        if source.entry.coded is not None:
            return _read_encoded(file, read, task, source.entry.coded)
        return sum(_read(file, read, part, task, scratch) for part in ranges)


def _read_joined(jobs: Sequence[_Job], scratch: Scratch) -> int:
    """Read neighbours of one archive straight into their targets, with the gaps between them."""
    source, read = jobs[0].task.source, jobs[0].read
    gap = scratch.take(MAX_GAP).data
    first = at = jobs[0].at or 0
    views: list[memoryview] = []
    for job in jobs:
        start = job.at or 0
        if start > at:
            views.append(gap[: start - at])
        views.append(job.target)
        at = start + job.target.nbytes
    path = source.entry.chunk_path(0 if read is None else read.chunk)
    with source.files.open(path, nbytes=at - first, scratch=scratch, at=first) as file:
        return file.read_into(views, 0)


def _is_right(job: _Job) -> bool:
    """Whether the bytes of a job of one block, which are in their place, agree with their checksum."""
    source, block = job.task.source, 0
    if source.crcs is None:
        return True
    if job.read is not None:
        chunk = job.read.chunk
        block = (source.grid.first_block(chunk) if chunk else 0) + job.ranges[0].start // BLOCK
    return job.target.nbytes <= BLOCK and crc32c(job.target) == int(source.crcs[block])


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
        scatter(source.grid, task.region, read, part.start, views[0], out)
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
        scatter(source.grid, task.region, read, 0, chunk[: source.grid.real_nbytes(read.chunk)], out)
    return file.nbytes
