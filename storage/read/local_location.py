"""One checkpoint's directory as its readers see it, wherever it lies.

Contract for every :class:`Folder`: paths are relative and of plain components; what is not there raises an
``OSError`` whose ``errno`` is in :data:`~gockpt.storage.read.safe_open.GONE`; what is there and can't be a
file of gockpt's raises :class:`~gockpt.errors.CheckpointCorrupt`; calls may come from several threads.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, Self

from gockpt.errors import CheckpointCorrupt
from gockpt.storage.read.direct_io import DirectFile, ReadCalls
from gockpt.storage.read.pruned import is_gone
from gockpt.storage.read.safe_open import open_below, open_regular

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from gockpt.storage.read.scratch import Scratch

__all__ = ["File", "Folder", "LocalFolder", "Names", "read_small"]


class File(Protocol):
    """A file of known size; a context manager that closes it."""

    @property
    def path(self) -> str:
        """Its path inside the checkpoint, for messages."""

    @property
    def nbytes(self) -> int:
        """Its size when it was opened."""

    def read_into(self, views: Sequence[memoryview], offset: int) -> int:
        """Fill every view, in order, from ``offset`` on; returns the bytes read, never less than wanted.

        It may read more than wanted, by up to two pages, where only whole pages can be had.

        Raises:
            CheckpointCorrupt: If the file ends too early or can't be read there.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Names(list[str]):
    """The names in a directory.

    Attributes:
        linked: How many of them are files that have other names as well.
    """

    linked: int = 0


class Folder(Protocol):
    """Where the files of one checkpoint are read from."""

    def open(self, path: str, *, nbytes: int | None = None, scratch: Scratch | None = None) -> File:
        """Open a file, which must have that size if one is given.

        With ``scratch`` much of it will be read, by one thread; the file may use what that has left.
        """

    def names(self, path: str) -> Names:
        """Return what stands in a directory; ``""`` is the checkpoint's own."""

    def is_gone(self) -> bool:
        """Whether the checkpoint was removed, or set aside to be, since it was opened."""

    def close(self) -> None:
        """Let go of it; again does nothing."""


class LocalFolder:
    """A directory of a mounted file system, by an open descriptor that it takes over.

    Attributes:
        fd: The descriptor; -1 once it is closed.
    """

    def __init__(self, fd: int, *, calls: ReadCalls | None = None) -> None:
        """Take over a descriptor; ``calls`` is how files are read past the page cache."""
        self.fd = fd
        self._calls = calls or ReadCalls()

    def open(self, path: str, *, nbytes: int | None = None, scratch: Scratch | None = None) -> File:
        """Open a regular file below; see :func:`~gockpt.storage.read.safe_open.open_regular`."""
        file = open_regular(self.fd, path, nbytes=nbytes)
        return file if scratch is None else DirectFile(file, scratch, self._calls)

    def names(self, path: str) -> Names:
        """Return what stands in a directory below."""
        fd = open_below(self.fd, path, is_directory=True) if path else os.dup(self.fd)
        try:
            names = Names(os.listdir(fd))
            for name in names:
                with suppress(FileNotFoundError):
                    status = os.stat(name, dir_fd=fd, follow_symlinks=False)
                    names.linked += stat.S_ISREG(status.st_mode) and status.st_nlink > 1
        finally:
            os.close(fd)
        return names

    def is_gone(self) -> bool:
        """Whether its parent lists it no more, or as trash; see :mod:`gockpt.storage.read.pruned`."""
        return is_gone(self.fd)

    def close(self) -> None:
        """Close the descriptor."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def read_small(folder: Folder, path: str, *, limit: int, nbytes: int | None = None) -> bytes:
    """Return the whole content of a file that must not be larger than ``limit`` bytes.

    Raises:
        CheckpointCorrupt: If it is larger, and as for :meth:`Folder.open`; nothing is allocated then.
        OSError: If it isn't there, or can't be opened.
    """
    with folder.open(path, nbytes=nbytes) as file:
        if file.nbytes > limit:
            msg = f"{path} has {file.nbytes} bytes; more than {limit} can't be right"
            raise CheckpointCorrupt(msg)
        data = bytearray(file.nbytes)
        file.read_into([memoryview(data)], 0)
    return bytes(data)
