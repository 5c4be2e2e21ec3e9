"""The ring: bounded room for gradients between the training loop and replay.

A first-fit allocator over one region of the arena. Replay frees what it consumed, in any order, so
the room needed is that of the gradients under way, not of all gradients of a window.
"""

from __future__ import annotations

import bisect
import threading

__all__ = ["Ring", "block_bytes"]

_ALIGNMENT = 64


def block_bytes(nbytes: int) -> int:
    """Return the bytes that a block of ``nbytes`` takes."""
    return max(_ALIGNMENT, -(-nbytes // _ALIGNMENT) * _ALIGNMENT)


class Ring:
    """Allocate and free blocks of a byte region. Thread-safe.

    Attributes:
        nbytes: Size of the region.
        peak: Most bytes that were ever in use at once.
    """

    def __init__(self, base: int, nbytes: int) -> None:
        """Manage ``nbytes`` bytes from arena offset ``base``."""
        self.nbytes = nbytes
        self.peak = 0
        self._free: list[tuple[int, int]] = [(base, nbytes)] if nbytes else []
        self._used: dict[int, int] = {}
        self._in_use = 0
        self._changed = threading.Condition()

    @property
    def in_use(self) -> int:
        """Bytes now allocated, rounding included."""
        return self._in_use

    def allocate(self, nbytes: int) -> int | None:
        """Return the offset of a free block of ``nbytes`` bytes, or ``None`` if there is none now."""
        size = block_bytes(nbytes)
        with self._changed:
            for index, (start, length) in enumerate(self._free):
                if length >= size:
                    if length == size:
                        del self._free[index]
                    else:
                        self._free[index] = (start + size, length - size)
                    self._used[start] = size
                    self._in_use += size
                    self.peak = max(self.peak, self._in_use)
                    return start
        return None

    def free(self, offset: int) -> None:
        """Give a block back.

        Raises:
            KeyError: If no block starts at ``offset``.
        """
        with self._changed:
            size = self._used.pop(offset)
            self._in_use -= size
            index = bisect.bisect_left(self._free, (offset, 0))
            start, length = offset, size
            if index < len(self._free) and self._free[index][0] == start + length:
                length += self._free.pop(index)[1]
            if index and sum(self._free[index - 1]) == start:
                start, before = self._free.pop(index - 1)
                length += before
                index -= 1
            self._free.insert(index, (start, length))
            self._changed.notify_all()

    def wait_for_room(self, timeout: float) -> bool:
        """Wait until some block is freed; ``False`` if none was within ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait(timeout)
