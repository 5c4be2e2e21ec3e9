"""The arena: page-aligned memory whose layout is the file's layout.

An anonymous shared mapping, so that another process can be given the same pages, kept out of forked
children, so that a data-loader worker neither copies it nor keeps it alive.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Final

import numpy as np
import numpy.typing as npt

from gockpt.errors import SaveError
from gockpt.layout import ALIGNMENT

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
    """

    __slots__ = ("_map", "address", "data", "nbytes")

    def __init__(self, nbytes: int) -> None:
        """Map at least ``nbytes`` bytes, zeroed. Pages are taken when first touched.

        Raises:
            SaveError: If the system has no such amount of address space or memory.
        """
        self.nbytes = whole_pages(nbytes)
        try:
            self._map = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as error:
            msg = (
                f"can't reserve {self.nbytes} bytes of host memory for the checkpoint ({error}); "
                "free memory or save a smaller state"
            )
            raise SaveError(msg) from error
        self.data: npt.NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)
        self.address = self.data.ctypes.data
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
        libc = ctypes.CDLL(None, use_errno=True)
        size = self.nbytes if length is None else length
        result: int = libc.madvise(ctypes.c_void_p(self.address + start), ctypes.c_size_t(size), advice)
        return result == 0
