"""System calls of the write side, one method per call.

The seam for faults: a test replaces single methods to fail, to stop, or to write down what was done.
Each method is one effect, raises ``OSError`` and holds no policy. Names are relative to ``dir_fd``, an
open directory, so that a path renamed meanwhile can't lead elsewhere. Nothing else in the write side
touches the disk.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os

from gockpt.storage.local import syscalls

__all__ = ["CALLS", "Filesystem"]

CALLS = (
    "open",
    "close",
    "pread",
    "pwrite",
    "fallocate",
    "ftruncate",
    "fsync",
    "syncfs",
    "mkdir",
    "rename",
    "rename_new",
    "exchange",
    "unlink",
    "rmdir",
    "listdir",
    "stat",
    "fstat",
    "touch",
    "lock",
    "direct_alignment",
    "syncfs_reports_errors",
)
"""The names of all calls, for tests that enumerate them."""

_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_SYNCFS_REPORTS_ERRORS_SINCE = (5, 8)


class Filesystem:
    """The real one: each method is the system call of its name."""

    def open(self, name: str, flags: int, *, dir_fd: int | None = None) -> int:
        """Open a file or directory; ``O_CLOEXEC`` is always added."""
        return os.open(name, flags | os.O_CLOEXEC, 0o666, dir_fd=dir_fd)

    def close(self, fd: int) -> None:
        """Close a descriptor; it is gone even when an error is reported."""
        os.close(fd)

    def pread(self, fd: int, nbytes: int, offset: int) -> bytes:
        """Read up to ``nbytes``; empty at the end of the file."""
        return os.pread(fd, nbytes, offset)

    def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> int:
        """Write some of ``data``; returns how much."""
        return os.pwrite(fd, data, offset)

    def fallocate(self, fd: int, nbytes: int) -> None:
        """Reserve disk blocks for the first ``nbytes``; never emulated by writing zeros."""
        syscalls.call("fallocate", fd, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes))

    def ftruncate(self, fd: int, nbytes: int) -> None:
        """Set the length."""
        os.ftruncate(fd, nbytes)

    def fsync(self, fd: int) -> None:
        """Make a file's bytes and length, or a directory's entries, survive a power loss."""
        os.fsync(fd)

    def syncfs(self, fd: int) -> None:
        """Do so for everything on the file system that ``fd`` is on."""
        syscalls.call("syncfs", fd)

    def mkdir(self, name: str, *, dir_fd: int | None = None) -> None:
        """Make a directory."""
        os.mkdir(name, 0o777, dir_fd=dir_fd)

    def rename(self, source: str, target: str, *, dir_fd: int) -> None:
        """Rename; an existing file or empty directory is replaced."""
        os.rename(source, target, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    def rename_new(self, source: str, target: str, *, dir_fd: int) -> None:
        """Rename unless the target exists (``EEXIST``); ``EINVAL`` or ``ENOSYS`` where that is unknown."""
        syscalls.call(
            "renameat2", dir_fd, os.fsencode(source), dir_fd, os.fsencode(target), _RENAME_NOREPLACE
        )

    def exchange(self, one: str, other: str, *, dir_fd: int) -> None:
        """Let two names swap what they stand for, at once."""
        syscalls.call("renameat2", dir_fd, os.fsencode(one), dir_fd, os.fsencode(other), _RENAME_EXCHANGE)

    def unlink(self, name: str, *, dir_fd: int) -> None:
        """Remove a file's name."""
        os.unlink(name, dir_fd=dir_fd)

    def rmdir(self, name: str, *, dir_fd: int) -> None:
        """Remove an empty directory."""
        os.rmdir(name, dir_fd=dir_fd)

    def listdir(self, fd: int) -> list[str]:
        """Return the names in an open directory."""
        return os.listdir(fd)

    def stat(self, name: str, *, dir_fd: int | None = None) -> os.stat_result:
        """Return what stands at a name; a link is not followed."""
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)

    def fstat(self, fd: int) -> os.stat_result:
        """Return what a descriptor stands for."""
        return os.fstat(fd)

    def touch(self, fd: int) -> None:
        """Set a file's times to the server's present time."""
        os.utime(fd)

    def lock(self, fd: int) -> bool:
        """Take the file's POSIX lock, or return ``False`` if another process has it."""
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def direct_alignment(self, fd: int) -> int:
        """Return what addresses, offsets and lengths of direct I/O must be multiples of for an open file.

        0 where the file system says that it has none; see
        :func:`~gockpt.storage.local.syscalls.direct_alignment`.
        """
        memory, offset = syscalls.direct_alignment(fd)
        return max(memory, offset) if memory and offset else 0

    def syncfs_reports_errors(self, fd: int) -> bool:
        """Whether :meth:`syncfs` here is complete and says so when a write failed.

        True for ext4, xfs and btrfs since Linux 5.8; network and layered file systems don't pass it on.
        """
        version = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
        known = syscalls.filesystem_type(fd) in (syscalls.EXT4, syscalls.XFS, syscalls.BTRFS)
        return known and version >= _SYNCFS_REPORTS_ERRORS_SINCE
