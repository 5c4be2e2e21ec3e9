"""Open and read files below a directory that somebody else may have prepared.

Promise: nothing outside the directory is ever opened, no link is followed, no open hangs on a FIFO
or a device, and a file's size is known, and compared with what was expected, before memory is
allocated for it. The directory itself is the user's own path and may be reached through links.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import stat
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from gockpt.errors import CheckpointCorrupt
from gockpt.storage.local.syscalls import libc
from gockpt.storage.read.location import expect_plain, expect_size

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

__all__ = ["RegularFile", "SharedFile", "open_below", "open_directory", "open_regular"]

_REFUSED = {
    errno.ELOOP: "a symbolic link is in its path, and links are not followed",
    errno.EXDEV: "its path leads out of the checkpoint",
    errno.ENOTDIR: "a directory in its path is something else",
    errno.ENXIO: "not a regular file",
    errno.ENAMETOOLONG: "its path is too long to exist",
}
_SYS_OPENAT2 = 437  # the same number on every Linux architecture that Python is built for
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_NO_OPENAT2 = frozenset({errno.ENOSYS, errno.EPERM, errno.EAGAIN})
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class _OpenHow(ctypes.Structure):
    """``struct open_how`` of ``openat2(2)``."""

    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


@functools.cache
def _syscall() -> Callable[..., int] | None:
    """Return libc's ``syscall``, or ``None`` where ``openat2`` can't exist."""
    if sys.platform != "linux":
        return None
    function = libc().syscall
    function.restype = ctypes.c_long
    return function


def open_at_once(directory: int, path: str, flags: int) -> int | None:
    """Open ``path`` below ``directory`` by one ``openat2``; ``None`` where the kernel has none."""
    syscall = _syscall()
    if syscall is None:
        return None
    how = _OpenHow(flags, 0, _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH)
    while True:
        fd = syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_int(directory),
            ctypes.c_char_p(os.fsencode(path)),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if fd >= 0:
            return int(fd)
        code = ctypes.get_errno()
        if code in _NO_OPENAT2:
            # Old kernels say ENOSYS and some container sandboxes EPERM; the walk below then finds
            # the same file, or the true EPERM.
            return None
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code), path)


def open_step_by_step(directory: int, path: str, flags: int) -> int:
    """Open ``path`` below ``directory``, one component at a time, following none that is a link."""
    *parents, last = path.split("/")
    at = directory
    try:
        for parent in parents:
            below = os.open(parent, _DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
            if at != directory:
                os.close(at)
            at = below
        return os.open(last, flags | os.O_NOFOLLOW, dir_fd=at)
    finally:
        if at != directory:
            os.close(at)


def open_directory(path: str | os.PathLike[str]) -> int:
    """Open a directory that the user named, through links if there are any; returns a descriptor."""
    return os.open(path, _DIRECTORY)


def open_below(directory: int, path: str, *, is_directory: bool = False) -> int:
    """Open what lies at ``path``, a relative path of plain components, below a directory.

    Raises:
        CheckpointCorrupt: If the path has a link, an empty, ``.`` or ``..`` component, or leads out.
        OSError: What the system says, with the path: not there, no permission, too many open files.
    """
    expect_plain(path)
    flags = _DIRECTORY if is_directory else _FILE
    try:
        fd = open_at_once(directory, path, flags)
        return open_step_by_step(directory, path, flags) if fd is None else fd
    except OSError as error:
        if error.errno in _REFUSED:
            msg = f"{path}: {_REFUSED[error.errno]}"
            raise CheckpointCorrupt(msg) from error
        raise


@dataclass(frozen=True, slots=True)
class RegularFile:
    """An open regular file of known size; a context manager that closes it.

    Attributes:
        fd: The descriptor.
        path: Its path inside the checkpoint, for messages.
        nbytes: Its size when it was opened.
    """

    fd: int
    path: str
    nbytes: int

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.fd)

    def read_into(self, views: Sequence[memoryview], offset: int) -> int:
        """Fill every view, in order, from ``offset`` on; never returns with less.

        Returns:
            The bytes read.

        Raises:
            CheckpointCorrupt: If the file ends too early or the device can't read it.
        """
        left = [view for view in views if view.nbytes]
        total = 0
        while left:
            try:
                got = os.preadv(self.fd, left, offset + total)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                msg = f"{self.path}: the device can't read byte {offset + total} and what follows"
                raise CheckpointCorrupt(msg) from error
            if got == 0:
                msg = f"{self.path} ends at byte {offset + total}; there should be more"
                raise CheckpointCorrupt(msg)
            total += got
            while left and got >= left[0].nbytes:
                got -= left.pop(0).nbytes
            if got:
                left[0] = left[0][got:]
        return total


class SharedFile(RegularFile):
    """A regular file whose descriptor belongs to somebody else."""

    __slots__ = ()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave it open."""


def open_regular(directory: int, path: str, *, nbytes: int | None = None) -> RegularFile:
    """Open the regular file at ``path`` below a directory; never blocks, whatever stands there.

    Args:
        directory: Descriptor of the directory.
        path: Relative path of plain components.
        nbytes: The size it must have, if known.

    Raises:
        CheckpointCorrupt: If it is a link, no regular file, or of another size.
        OSError: As for :func:`open_below`.
    """
    fd = open_below(directory, path)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            msg = f"{path}: not a regular file"
            raise CheckpointCorrupt(msg)
        expect_size(path, status.st_size, nbytes)
    except BaseException:
        os.close(fd)
        raise
    return RegularFile(fd, path, status.st_size)
