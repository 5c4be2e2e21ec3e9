"""File operations that take several system calls: write all bytes, read a small file, remove a tree."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gockpt.storage.local.filesystem import Filesystem

__all__ = [
    "DIRECTORY",
    "NEW_FILE",
    "UNKNOWN_FLAG",
    "opened_regular",
    "read_exactly",
    "read_small_file",
    "remove_tree",
    "rename_new",
    "reserve",
    "sync_directory",
    "write_all",
    "write_new_file",
]

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_FILES = frozenset({"c", "zarr.json", "state.json", "gockpt.json", "blocks.crc32c"})
_NO_RESERVATION = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM})
UNKNOWN_FLAG = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})
"""The errors of ``renameat2`` where its flags are not known."""
_PIECE = 1 << 30  # Linux writes at most 0x7ffff000 bytes at once


class NotSmallRegularFile(Exception):
    """The entry is not a file that gockpt could have written."""


def write_all(fs: Filesystem, fd: int, data: memoryview, offset: int) -> None:
    """Write every byte of ``data`` at ``offset``, in as many calls as the system needs."""
    done = 0
    while done < data.nbytes:
        try:
            written = fs.pwrite(fd, data[done : done + _PIECE], offset + done)
        except InterruptedError:
            continue
        if written <= 0:
            raise OSError(errno.EIO, "the system wrote nothing and gave no reason")
        done += written


def write_new_file(fs: Filesystem, dir_fd: int, name: str, data: memoryview | bytes) -> int:
    """Create a file with these bytes; returns its open descriptor, not yet synced."""
    fd = fs.open(name, NEW_FILE, dir_fd=dir_fd)
    try:
        write_all(fs, fd, memoryview(data), 0)
    except BaseException:
        fs.close(fd)
        raise
    return fd


def reserve(fs: Filesystem, fd: int, nbytes: int) -> None:
    """Reserve disk blocks for the first ``nbytes`` of a file, where the file system can.

    Raises:
        OSError: What the system says: that there is no space, for instance.
    """
    try:
        fs.fallocate(fd, nbytes)
    except OSError as error:
        if error.errno not in _NO_RESERVATION:
            raise


@contextmanager
def opened_regular(fs: Filesystem, dir_fd: int, name: str) -> Iterator[tuple[int, int]]:
    """Open a regular file for reading: its descriptor and its length.

    It never follows a link or blocks on a FIFO.

    Raises:
        NotSmallRegularFile: If it is no regular file.
        OSError: What the system says.
    """
    try:
        fd = fs.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=dir_fd)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        msg = f"{name} is a link or a socket"
        raise NotSmallRegularFile(msg) from error
    try:
        status = fs.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            msg = f"{name} is no regular file"
            raise NotSmallRegularFile(msg)
        yield fd, status.st_size
    finally:
        fs.close(fd)


def read_exactly(fs: Filesystem, fd: int, nbytes: int, offset: int) -> bytes:
    """Return the bytes at an offset: fewer only where the file ends."""
    data = b""
    while len(data) < nbytes and (piece := fs.pread(fd, nbytes - len(data), offset + len(data))):
        data += piece
    return data


def rename_new(fs: Filesystem, source: str, target: str, *, dir_fd: int) -> None:
    """Rename unless the new name is taken, also where the system has no call for that.

    There, a name that is taken between the look and the renaming is not seen.

    Raises:
        FileExistsError: If it is taken.
        OSError: What the system says.
    """
    try:
        fs.rename_new(source, target, dir_fd=dir_fd)
    except OSError as error:
        if error.errno not in UNKNOWN_FLAG:
            raise
        with suppress(FileNotFoundError):
            fs.stat(target, dir_fd=dir_fd)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from error
        fs.rename(source, target, dir_fd=dir_fd)


def read_small_file(fs: Filesystem, dir_fd: int, name: str, *, limit: int) -> bytes:
    """Return a regular file's bytes; never reads beyond ``limit``.

    Raises:
        NotSmallRegularFile: If it is larger, or no regular file.
        OSError: What the system says.
    """
    with opened_regular(fs, dir_fd, name) as (fd, size):
        if size > limit:
            msg = f"{name} has {size} bytes"
            raise NotSmallRegularFile(msg)
        return read_exactly(fs, fd, size + 1, 0)


def sync_directory(fs: Filesystem, dir_fd: int, name: str) -> None:
    """Make the entries of one directory, by name, survive a power loss."""
    fd = fs.open(name, DIRECTORY, dir_fd=dir_fd)
    try:
        fs.fsync(fd)
    finally:
        fs.close(fd)


def remove_tree(fs: Filesystem, dir_fd: int, name: str) -> None:
    """Remove a directory or file and all below it; what is gone already is fine, links aren't followed."""
    try:
        # A guess, which saves a refused call for each directory; where it is wrong, that is seen.
        if (name.startswith(("c.", ".owner-")) or name in _FILES) and _unlink(fs, dir_fd, name):
            return
        try:
            fd = fs.open(name, DIRECTORY, dir_fd=dir_fd)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            fs.unlink(name, dir_fd=dir_fd)
            return
        try:
            for child in fs.listdir(fd):
                remove_tree(fs, fd, child)
        finally:
            fs.close(fd)
        fs.rmdir(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return


def _unlink(fs: Filesystem, dir_fd: int, name: str) -> bool:
    """Remove what isn't a directory; returns whether that is so."""
    try:
        fs.unlink(name, dir_fd=dir_fd)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EPERM):
            raise
        return False
    return True
