"""The arena: page-aligned memory whose layout is the file's layout.

An anonymous shared mapping, so that another process can be given the same pages, kept out of forked
children, so that a data-loader worker neither copies it nor keeps it alive.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import weakref
from contextlib import suppress
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from gockpt.core.arena_layout import ALIGNMENT
from gockpt.errors import SaveError
from gockpt.storage.local.syscalls import libc

__all__ = ["Arena", "whole_pages"]

_MADV_POPULATE_WRITE: Final = 23
_MADV_HUGEPAGE: Final = 14
_MADV_DONTFORK: Final = 10
_PREFAULT_STEP: Final = 64 << 20


def whole_pages(nbytes: int) -> int:
    """Return how many bytes an arena of at least ``nbytes`` takes."""
    return max(ALIGNMENT, -(-nbytes // ALIGNMENT) * ALIGNMENT)


class Arena:
    """One page-aligned region of host memory.

    Attributes:
        nbytes: Its size in bytes, a multiple of the page size.
        data: All of it as a 1-D uint8 array; views of it share the memory.
        address: Address of the first byte.
        fd: For a shared one: the descriptor that another process can map it by; else -1.
    """

    __slots__ = ("__weakref__", "address", "data", "fd", "nbytes")

    data: npt.NDArray[np.uint8]

    def __init__(self, nbytes: int, *, shared: bool = False) -> None:
        """Map at least ``nbytes`` bytes, zeroed. Pages are taken when first touched.

        Args:
            nbytes: How many.
            shared: Whether another process is to be given the same pages, by ``fd``.

        Raises:
            SaveError: If the system has no such amount of address space or memory.
        """
        self.nbytes = whole_pages(nbytes)
        self.fd = -1
        try:
            if shared:
                self.fd = os.memfd_create("gockpt-arena", os.MFD_CLOEXEC)
                os.ftruncate(self.fd, self.nbytes)
            self.data = _map(self.fd, self.nbytes)
        except (OSError, ValueError, OverflowError) as error:
            if self.fd >= 0:
                os.close(self.fd)
            raise _refused(self.nbytes, error) from error
        self._settle()

    @classmethod
    def attach(cls, fd: int, nbytes: int) -> Self:
        """Map the shared arena of another process; ``fd`` is closed, whatever happens.

        Raises:
            SaveError: If there is no room for it, or it is smaller than ``nbytes``.
        """
        arena = cls.__new__(cls)
        arena.nbytes, arena.fd = nbytes, -1
        try:
            if os.fstat(fd).st_size < nbytes:
                msg = "it is smaller than it was said to be"
                raise ValueError(msg)
            arena.data = _map(fd, nbytes, owned=False)
        except (OSError, ValueError, OverflowError) as error:
            raise _refused(nbytes, error) from error
        finally:
            os.close(fd)
        arena._settle()  # noqa: SLF001 - its own
        return arena

    def _settle(self) -> None:
        self.address: int = self.data.ctypes.data
        self._advise(_MADV_DONTFORK)
        self._advise(_MADV_HUGEPAGE)

    def prefault(self) -> None:
        """Take all pages now, so that no later copy waits for the system to zero them.

        Meant for a background thread: the system call runs without the GIL. An older kernel that
        does not know the request leaves the pages to be taken at first touch.
        """
        for start in range(0, self.nbytes, _PREFAULT_STEP):
            length = min(_PREFAULT_STEP, self.nbytes - start)
            if not self._advise(_MADV_POPULATE_WRITE, start, length):
                return

    def view(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return ``nbytes`` bytes from ``offset`` as a 1-D uint8 view."""
        return self.data[offset : offset + nbytes]

    def _advise(self, advice: int, start: int = 0, length: int | None = None) -> bool:
        size = self.nbytes if length is None else length
        result: int = libc().madvise(ctypes.c_void_p(self.address + start), ctypes.c_size_t(size), advice)
        return result == 0


def _refused(nbytes: int, error: Exception) -> SaveError:
    return SaveError(
        f"can't reserve {nbytes} bytes of host memory for the checkpoint ({error}); "
        "free memory or save a smaller state"
    )


_descriptors: set[int] = set()
"""Of the shared arenas that this process owns."""


def _map(fd: int, nbytes: int, *, owned: bool = True) -> npt.NDArray[np.uint8]:
    """Map a descriptor, or anonymous memory if it is -1; the mapping ends with the last view of it.

    Not by ``mmap.mmap``, whose objects a forked child has as well: the one of an arena would unmap, when it
    is collected there, what the child has at those addresses by then; and one of a descriptor keeps another
    descriptor, which the child could not let go of.
    """
    function = libc().mmap
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long]
    flags = mmap.MAP_SHARED | (mmap.MAP_ANONYMOUS if fd < 0 else 0)
    address = function(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    if owned and fd >= 0:
        _watch_forks()
        _descriptors.add(fd)
    # Not at exit: another process may still be writing from these pages.
    weakref.finalize(memory, _unmap, address, nbytes, fd if owned else -1, os.getpid()).atexit = False
    view: npt.NDArray[np.uint8] = np.ctypeslib.as_array(memory)
    return view


def _unmap(address: int, nbytes: int, fd: int, pid: int) -> None:
    if os.getpid() != pid:  # a forked child has neither the mapping nor the descriptor
        return
    libc().munmap(ctypes.c_void_p(address), ctypes.c_size_t(nbytes))
    if fd >= 0:
        _descriptors.discard(fd)
        with suppress(OSError):
            # The memory goes now, whoever else has mapped it: nobody has any business there any more.
            os.ftruncate(fd, 0)
        os.close(fd)


@functools.cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_let_go)


def _let_go() -> None:
    """In a forked child: keep nothing of the parent's arenas alive."""
    while _descriptors:
        with suppress(OSError):
            os.close(_descriptors.pop())
