"""Memory of one reading thread, for bytes that can't go straight to where they belong."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["PIECE", "Scratch"]

PIECE = 8 << 20
"""Bytes of one read."""

_PAGE = mmap.PAGESIZE
_LARGE = 1 << 20
_HUGE_PAGE = 2 << 20
_NOTHING = np.empty(0, np.uint8)
_NBYTES = PIECE + 8 * _PAGE  # a piece whose ends are widened to pages, and pages for those ends


class Scratch:
    """One thread's bounce memory: a piece and a few pages, got when it is first needed.

    Its user takes what it needs from the front; the file it reads from may use the rest meanwhile.
    """

    __slots__ = ("_first", "_huge", "_map", "_taken")

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self._first = 0
        self._huge = False
        self._taken = 0

    def take(self, nbytes: int, start: int = 0) -> npt.NDArray[np.uint8]:
        """Return memory of undefined content; what was taken before is void.

        Args:
            nbytes: At most a piece.
            start: Where in its file these bytes begin. The memory begins as far behind a page
                boundary, so that direct I/O can read into it.
        """
        first = start % _PAGE
        self._taken = first + nbytes if nbytes else 0
        return self._memory(nbytes)[first : self._taken] if nbytes else _NOTHING

    def rest(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """Return what is not taken, in whole pages: three of them at least.

        Args:
            nbytes: How many bytes will go through it.
        """
        return self._memory(nbytes)[-(-self._taken // _PAGE) * _PAGE :]

    def _memory(self, nbytes: int) -> npt.NDArray[np.uint8]:
        if self._map is None:
            # Private, since shared mappings get no huge pages by default, and from a huge page's start on.
            self._map = mmap.mmap(-1, _NBYTES + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._first = -np.frombuffer(self._map, np.uint8).ctypes.data % _HUGE_PAGE
        if nbytes >= _LARGE and not self._huge:
            self._huge = True
            with suppress(OSError):
                # The disk fills a few large stretches up to twice as fast as thousands of pages.
                self._map.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(self._map, np.uint8, _NBYTES, self._first)
