"""Writes of any length at any place of one file, carried out in whole pages.

Promise: after :meth:`PageWriter.flush` every byte that was handed in is in the file, at its place; before
``packed_at``, bytes that nobody handed in are zero. Whole pages of aligned memory go past the page cache
where the file system allows it; what shares a page with something else is gathered first. Nothing is synced
here. Safe to use from several threads, for ranges that don't overlap.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from gockpt.core.arena_layout import ALIGNMENT
from gockpt.errors import WorkerError
from gockpt.storage.local import files

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gockpt.storage.local.filesystem import Filesystem

__all__ = ["DIRECT_FROM", "PageWriter", "most_gathered"]

DIRECT_FROM = 256 << 10
"""Shorter writes go through the page cache, where many leave as one; direct I/O waits for each."""

_GATHER_BELOW = 64 << 10
_BLOCK = 1 << 20
_BLOCKS = 4
_JOIN_BELOW = 4096  # pieces that are shorter on average are joined first: that costs less than handling each


def most_gathered(nbytes: int) -> int:
    """Return the most memory that gathering ``nbytes`` takes, pages that two chunks share left aside."""
    pages = -(-nbytes // ALIGNMENT) * ALIGNMENT
    return min(_BLOCKS * _BLOCK, pages + 2 * ALIGNMENT) if nbytes else 0


class _Block:
    """A range of the file whose bytes are still being gathered."""

    __slots__ = ("filled", "memory", "start")

    def __init__(self, start: int, memory: memoryview) -> None:
        self.start = start
        self.memory = memory
        self.filled = 0


class PageWriter:
    """Writes into one file, which it opens a second time for direct I/O.

    Attributes:
        nbytes: Bytes that were handed in.
    """

    def __init__(
        self, fs: Filesystem, dir_fd: int, name: str, fd: int, *, packed_at: int, packed_end: int
    ) -> None:
        """Begin with an empty file.

        Args:
            fs: The file system.
            dir_fd: The directory that ``name`` is relative to.
            name: The file.
            fd: Its open descriptor, for writing; the caller closes it.
            packed_at: From here on, everything is handed in, up to the end of the file, and mostly by less
                than a page.
            packed_end: From ``packed_at`` to here it is gathered in blocks of 1 MiB instead of in pages, four
                at a time; what belongs to a fifth goes through the page cache.

        Raises:
            OSError: What the system says.
        """
        self.nbytes = 0
        self._fs = fs
        self._fd = fd
        self._packed_at = -(-packed_at // ALIGNMENT) * ALIGNMENT
        self._packed_end = packed_end // ALIGNMENT * ALIGNMENT
        self._mutex = threading.Lock()
        self._blocks: dict[int, _Block] = {}
        self._spare: list[memoryview] = []
        self._taken = 0  # blocks of 1 MiB, spare ones included
        self._ungathered: set[int] = set()  # starts of blocks that go through the page cache
        self._direct_fd = self._open_direct(dir_fd, name)
        self._direct = self._direct_fd >= 0

    def _open_direct(self, dir_fd: int, name: str) -> int:
        """Return a descriptor for direct I/O in whole pages; -1 if the file system has none."""
        fs = self._fs
        try:
            fd = fs.open(name, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW, dir_fd=dir_fd)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return -1
        try:
            fits = 0 < fs.direct_alignment(fd) <= ALIGNMENT
        except BaseException:
            fs.close(fd)
            raise
        if fits:
            return fd
        fs.close(fd)  # refused, or only in larger units than pages
        return -1

    def write(self, at: int, data: memoryview) -> None:
        """Write bytes at an offset.

        Args:
            at: The offset.
            data: The bytes; if they are many, whole pages among them are written from where they lie.
        """
        end = at + data.nbytes
        with self._mutex:
            self.nbytes += data.nbytes
        first, last = -(-at // ALIGNMENT) * ALIGNMENT, end // ALIGNMENT * ALIGNMENT
        in_blocks = at < self._packed_end and end > self._packed_at
        if in_blocks or last - first < _GATHER_BELOW:
            self._gather(at, data)
            return
        self._gather(at, data[: first - at])
        self._write_pages(first, data[first - at : last - at])
        self._gather(last, data[last - at :])

    def write_all(self, at: int, pieces: Sequence[bytes | memoryview]) -> None:
        """Write pieces one behind the other."""
        nbytes = [len(piece) for piece in pieces]
        if sum(nbytes) < _JOIN_BELOW * len(pieces):
            self.write(at, memoryview(b"".join(pieces)))
            return
        for piece, n in zip(pieces, nbytes, strict=True):
            self.write(at, memoryview(piece))
            at += n

    def _gather(self, at: int, data: memoryview) -> None:
        """Copy bytes into the blocks that they lie in, and write each that is full."""
        while data.nbytes:
            start, size = self._block_of(at)
            n = min(start + size - at, data.nbytes)
            block = self._opened(start, size)
            if block is None:
                files.write_all(self._fs, self._fd, data[:n], at)
            else:
                # Ranges don't overlap, so that threads may fill one block at the same time.
                target = np.frombuffer(block.memory, np.uint8)
                target[at - start : at - start + n] = np.frombuffer(data[:n], np.uint8)
                self._count(block, n, size)
            at += n
            data = data[n:]

    def _block_of(self, at: int) -> tuple[int, int]:
        """Return the start and the length of the block that an offset lies in."""
        if not self._packed_at <= at < self._packed_end:
            return at // ALIGNMENT * ALIGNMENT, ALIGNMENT
        start = self._packed_at + (at - self._packed_at) // _BLOCK * _BLOCK
        return start, min(_BLOCK, self._packed_end - start)

    def _opened(self, start: int, size: int) -> _Block | None:
        """Return the block of that start; ``None`` if its bytes go through the page cache."""
        with self._mutex:
            block = self._blocks.get(start)
            if block is not None or start in self._ungathered:
                return block
            if size == ALIGNMENT:
                memory = memoryview(bytearray(size))
            elif self._spare:
                memory = self._spare.pop()[:size]
            elif self._taken < _BLOCKS:
                self._taken += 1
                memory = memoryview(mmap.mmap(-1, size))
            else:
                self._ungathered.add(start)
                return None
            block = self._blocks[start] = _Block(start, memory)
            return block

    def _count(self, block: _Block, nbytes: int, size: int) -> None:
        """Note that so many bytes of a block are there, and write it if these are all."""
        with self._mutex:
            block.filled += nbytes
            if block.filled < size:
                return
            del self._blocks[block.start]
        self._write_pages(block.start, block.memory)
        if size == _BLOCK:
            with self._mutex:
                self._spare.append(block.memory)

    def _write_pages(self, at: int, data: memoryview) -> None:
        """Write whole pages, past the page cache if they are many and aligned."""
        if self._direct and data.nbytes >= DIRECT_FROM and _is_aligned(data):
            try:
                files.write_all(self._fs, self._direct_fd, data, at)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct = False  # some file systems accept the flag and refuse the write
            else:
                return
        files.write_all(self._fs, self._fd, data, at)

    def flush(self) -> None:
        """Write the pages that are not full, when no other thread writes any more.

        Raises:
            WorkerError: If bytes between ``packed_at`` and ``packed_end`` are missing.
        """
        with self._mutex:
            blocks, self._blocks = self._blocks, {}
        for start, block in sorted(blocks.items()):
            if block.memory.nbytes > ALIGNMENT:
                msg = f"{block.memory.nbytes - block.filled} bytes from {start} on were never handed in"
                raise WorkerError(msg)
            files.write_all(self._fs, self._fd, block.memory, start)

    def close(self) -> None:
        """Close the descriptor for direct I/O; whether all was written, the file's sync has told."""
        fd, self._direct_fd = self._direct_fd, -1
        if fd >= 0:
            with suppress(OSError):
                self._fs.close(fd)


def _is_aligned(data: memoryview) -> bool:
    """Whether a buffer begins at a page of memory."""
    return bool(np.frombuffer(data, np.uint8).ctypes.data % ALIGNMENT == 0)
