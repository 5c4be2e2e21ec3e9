"""Conversion of the operating system's errors into errors that name the way out."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from gockpt.errors import StorageError

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["as_storage_error", "storage_errors"]

_WAY_OUT = {
    errno.ENOSPC: "free space there, keep fewer checkpoints, or save to another disk",
    errno.EDQUOT: "the quota of this user, group or directory is used up, of bytes or of files (`quota -s` "
    "shows it), whatever the disk has free: keep fewer checkpoints, get more quota, or save to another disk",
    errno.EROFS: "the file system is read-only: save to another path, or mount it writable",
    errno.EACCES: "save to a path that this user may write to",
    errno.EPERM: "save to a path that this user may write to",
    errno.ENOTDIR: "a part of the path is a file: save to another path",
    errno.EEXIST: "something else stands there: move it away, or save to another path",
    errno.ENOENT: "the path was removed or renamed meanwhile: leave it in place while a run saves there",
    errno.ESTALE: "the path was removed or remounted meanwhile: open it again",
    errno.ENAMETOOLONG: "the path is too long for the file system: save to a shorter one",
    errno.ELOOP: "the path has too many links: save to another one",
    errno.EMFILE: "the process has too many open files: raise the limit (ulimit -n)",
    errno.ENFILE: "the system has too many open files: raise its limit",
    errno.EFBIG: "the file system or a limit allows no such large file: save to another disk",
    errno.EIO: "the device failed: check it (dmesg) and save to another disk",
    errno.ENOLCK: "the file system has no locks: mount it with them, or save to another path",
}
_DEFAULT_WAY_OUT = "older checkpoints are intact; fix the cause or save to another path"


def as_storage_error(error: OSError, doing: str, path: str) -> StorageError:
    """Return the error that names the path, the system's words and the way out."""
    code = error.errno or 0
    words = error.strerror or os.strerror(code)
    name = errno.errorcode.get(code, str(code))
    way_out = _WAY_OUT.get(code, _DEFAULT_WAY_OUT)
    if code == errno.ENOSPC:
        way_out = _when_full(path, way_out)
    return StorageError(f"can't {doing} {path}: {words} [{name}]; {way_out}")


def _when_full(path: str, way_out: str) -> str:
    """Return the way out for ``ENOSPC``, which differs if inodes are used up rather than bytes."""
    found = None
    while found is None:
        try:
            found = os.statvfs(path or ".")
        except FileNotFoundError:  # not made yet, or removed since
            if path == (path := os.path.dirname(path)):
                return way_out
        except OSError:
            return way_out
    free = found.f_bavail * found.f_frsize
    # Some file systems (btrfs) make inodes as they need them, and count none.
    if found.f_files and not found.f_favail and free:
        return (
            f"no inodes are left there: it holds the {found.f_files:,} files and directories that it can, "
            f"though {free:,} bytes are free. Delete files, keep fewer checkpoints, or save to another disk"
        )
    return f"{way_out} ({free:,} bytes are free there; a quota of the directory may allow fewer)"


class storage_errors:  # noqa: N801 - used like a function, once per file: a generator would cost more
    """Turn any ``OSError`` of the block into a :class:`StorageError`, which it is the cause of."""

    __slots__ = ("_doing", "_path")

    def __init__(self, doing: str, *path: str) -> None:
        """Say what is being done to which path; its parts are joined when that must be told."""
        self._doing = doing
        self._path = path

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raise what the caller can do something about."""
        if isinstance(error, OSError):
            raise as_storage_error(error, self._doing, os.path.join(*self._path)) from error
