"""Reading past the page cache what is not in it, and through it what is.

Promise: the bytes are those that an ordinary read returns. Direct I/O is used only for large reads, only
on file systems where it was tried, and only while it works: whatever the system refuses, and every read
that ends early, is done again in the ordinary way, which then also says what is wrong with the file.

Why both: from an idle disk direct reads are about twice as fast; what lies in the page cache comes from
there several times faster than from any disk.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections import deque
from typing import TYPE_CHECKING, Self

import numpy as np

from gockpt.storage.local import syscalls

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from gockpt.storage.read.safe_open import RegularFile
    from gockpt.storage.read.scratch import Scratch

__all__ = ["DIRECT_FROM", "DirectFile", "ReadCalls"]

DIRECT_FROM = 128 << 10
"""Smaller reads go through the page cache: they are one request to the disk either way."""

_PAGE = mmap.PAGESIZE
_SYS_CACHESTAT = 451  # the same number on every architecture that Python is built for
_TRIED = frozenset({syscalls.EXT4, syscalls.XFS, syscalls.BTRFS})


class _CachestatRange(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("nbytes", ctypes.c_uint64))


class _Cachestat(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("cached", "dirty", "writing", "evicted", "recent"))


class ReadCalls:
    """What direct reading asks of the system, one method per call: the seam for faults.

    Each raises ``OSError`` where the system refuses.

    Attributes:
        direct_from: Reads of fewer bytes are ordinary ones.
    """

    direct_from = DIRECT_FROM

    def filesystem(self, fd: int) -> int:
        """Return the number of the file system's type."""
        return syscalls.filesystem_type(fd)

    def alignment(self, fd: int) -> tuple[int, int]:
        """Return what addresses, and what offsets and lengths, must be multiples of; zeros for "never".

        See :func:`~gockpt.storage.local.syscalls.direct_alignment`.
        """
        return syscalls.direct_alignment(fd)

    def cached_pages(self, fd: int, offset: int, nbytes: int) -> int:
        """Return how many pages of a stretch are in the page cache; Linux 6.5 and later."""
        found = _Cachestat()
        stretch = _CachestatRange(offset, nbytes)
        number, flags = ctypes.c_long(_SYS_CACHESTAT), ctypes.c_uint(0)
        syscalls.call("syscall", number, ctypes.c_int(fd), ctypes.byref(stretch), ctypes.byref(found), flags)
        return int(found.cached)

    def is_at_hand(self, fd: int, offset: int) -> bool:
        """Whether one byte can be read without waiting for the disk."""
        # Without this advice the kernel would read ahead from there.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        try:
            return os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False
        finally:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)

    def set_direct(self, fd: int, *, on: bool) -> None:
        """Let reads of a descriptor go past the page cache, or through it again."""
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)

    def read(self, fd: int, view: memoryview, offset: int) -> int:
        """Read into a view; returns how many bytes, fewer at the end of the file."""
        return os.preadv(fd, [view], offset)


class DirectFile:
    """A regular file that one thread reads, past the page cache where that is sooner.

    Attributes:
        path: Its path inside the checkpoint, for messages.
        nbytes: Its size when it was opened.
    """

    __slots__ = ("_alignment", "_calls", "_count", "_file", "_scratch", "nbytes", "path")

    def __init__(self, file: RegularFile, scratch: Scratch, calls: ReadCalls) -> None:
        """Take over an open file; ``scratch`` is the thread's own."""
        self.path = file.path
        self.nbytes = file.nbytes
        self._file = file
        self._scratch = scratch
        self._calls = calls
        self._alignment: tuple[int, int] | None = None
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def read_into(self, views: Sequence[memoryview], offset: int) -> int:
        """Fill every view, in order, from ``offset`` on; never returns with less.

        Returns:
            The bytes read from the file; more than wanted where direct I/O had to begin or end elsewhere.

        Raises:
            CheckpointCorrupt: If the file ends too early or the device can't read it.
        """
        left = [view for view in views if view.nbytes]
        nbytes = sum(view.nbytes for view in left)
        if nbytes < self._calls.direct_from or not self._aligned() or self._is_cached(offset, nbytes):
            return self._file.read_into(left, offset)
        self._count = 0
        try:
            self._calls.set_direct(self._file.fd, on=True)
            try:
                done = self._read(left, offset)
            finally:
                self._calls.set_direct(self._file.fd, on=False)
        except OSError:
            done = False
        if not done:
            self._alignment = (0, 0)
            self._count += self._file.read_into(left, offset)
        return self._count

    def _aligned(self) -> bool:
        """Whether direct I/O is possible as far as is known; asks when it is first called."""
        if self._alignment is None:
            self._alignment = (0, 0)
            try:
                if self._calls.filesystem(self._file.fd) in _TRIED:
                    memory, offset = self._calls.alignment(self._file.fd)
                    if memory and offset and not (_PAGE % memory or _PAGE % offset):
                        self._alignment = (memory, offset)
            except OSError:
                pass
        return self._alignment != (0, 0)

    def _is_cached(self, offset: int, nbytes: int) -> bool:
        """Whether at least half of a stretch is in the page cache; true where nobody can tell."""
        fd = self._file.fd
        try:
            return self._calls.cached_pages(fd, offset, nbytes) * _PAGE * 2 >= nbytes
        except OSError:
            # An older kernel, or another user's file, of which the kernel doesn't tell.
            pass
        try:
            return self._calls.is_at_hand(fd, offset) and self._calls.is_at_hand(fd, offset + nbytes - 1)
        except OSError:
            return True

    def _read(self, views: list[memoryview], offset: int) -> bool:
        """Fill the views by direct reads; returns whether that was possible."""
        memory, step = self._alignment or (0, 0)
        stop = offset + sum(view.nbytes for view in views)
        low = -(-offset // step) * step
        high = stop // step * step
        if len(views) == 1 and low < high:
            (view,) = views
            straight = view[low - offset : high - offset]
            if np.frombuffer(straight, np.uint8).ctypes.data % memory == 0:
                return (
                    self._read_through([view[: low - offset]], offset, low, step)
                    and self._read_straight(straight, low, step)
                    and self._read_through([view[high - offset :]], high, stop, step)
                )
        return self._read_through(views, offset, stop, step)

    def _read_straight(self, view: memoryview, offset: int, step: int) -> bool:
        """Read into memory that is aligned, from an offset that is, a length that is."""
        while view.nbytes:
            got = self._calls.read(self._file.fd, view, offset)
            self._count += got
            got -= got % step
            if not got:
                return False
            offset += got
            view = view[got:]
        return True

    def _read_through(self, views: Sequence[memoryview], offset: int, stop: int, step: int) -> bool:
        """Read aligned stretches into the scratch, and copy what is wanted of them.

        Only bytes that the system says it has read are copied: behind the end of the file there are none.
        """
        if offset == stop:
            return True
        room = self._scratch.rest(stop - offset)
        left = deque(np.frombuffer(view, np.uint8) for view in views if view.nbytes)
        while offset < stop:
            start = offset // step * step
            nbytes = min(room.nbytes, -(-(stop - start) // step) * step)
            got = self._calls.read(self._file.fd, room[:nbytes].data, start)
            self._count += got
            data = room[offset - start : min(got, stop - start)]
            if not data.nbytes:
                return False
            offset += data.nbytes
            while data.nbytes:
                part = min(data.nbytes, left[0].nbytes)
                left[0][:part] = data[:part]
                data, left[0] = data[part:], left[0][part:]
                if not left[0].nbytes:
                    left.popleft()
        return True
