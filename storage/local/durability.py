"""Written files that are not yet synced.

Promise: after :meth:`Unsynced.sync` returned, every added file is on the disk, whole, and a failed write of
any of them was reported. The system reports a failed write once, to open descriptors of the file: so files
stay open until they are synced. If too many would be open, and ``syncfs`` doesn't report errors, a file is
synced at once instead.
"""

from __future__ import annotations

import os
import resource
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from gockpt.storage.local import files
from gockpt.storage.local.failures import as_storage_error, storage_errors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gockpt.storage.local.filesystem import Filesystem

__all__ = ["Unsynced"]

_MOST_OPEN = 256


class Unsynced:
    """Takes over open descriptors; safe to use from several threads."""

    __slots__ = ("_fs", "_limit", "_mutex", "_open", "_shut", "_syncfs_tells", "_where", "dir_fd")

    def __init__(self, fs: Filesystem, dir_fd: int, where: str) -> None:
        """Start with no files.

        Args:
            fs: The file system.
            dir_fd: The directory that names are relative to, opened before the first of them is written:
                from then on ``syncfs`` through it tells of failed writes, to closed files too.
            where: Path of that directory, for messages.

        Raises:
            OSError: If the file system can't be identified.
        """
        self._fs = fs
        self._where = where
        self.dir_fd = dir_fd
        self._mutex = threading.Lock()
        self._open: list[tuple[str, int]] = []
        self._shut: list[str] = []
        self._syncfs_tells = fs.syncfs_reports_errors(dir_fd)
        # A share of what the process may have open: the rest belongs to data loaders and sockets.
        self._limit = min(_MOST_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

    def add(self, name: str, fd: int) -> None:
        """Take over a written file.

        Raises:
            OSError: If it had to be synced or closed now, and that failed.
        """
        with self._mutex:
            keep = len(self._open) < self._limit
            if keep:
                self._open.append((name, fd))
            elif self._syncfs_tells:
                self._shut.append(name)
        if keep:
            return
        try:
            if not self._syncfs_tells:
                self._fs.fsync(fd)
        finally:
            self._fs.close(fd)

    def sync(self, directories: Iterable[str] = ()) -> None:
        """Sync and close everything, the directories that hold it last, in the order given.

        Raises:
            StorageError: Names the first file that failed. It must not be tried again: the next sync would
                say "done" while the disk holds something else.
        """
        if self._syncfs_tells:
            try:
                self._fs.syncfs(self.dir_fd)
            except OSError as error:
                self._sync_each(directories)  # one of these knows which file it was
                raise as_storage_error(error, "write", self._where) from error
            with storage_errors("write", self._where):
                while self._open:
                    self._fs.close(self._open.pop()[1])
            self._shut.clear()
        else:
            self._sync_each(directories)

    def _sync_each(self, directories: Iterable[str]) -> None:
        where = self._where
        try:
            while self._open:
                name, fd = self._open.pop()
                where = os.path.join(self._where, name)
                try:
                    self._fs.fsync(fd)
                finally:
                    self._fs.close(fd)
            for name in self._shut:
                where = os.path.join(self._where, name)
                fd = self._fs.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self.dir_fd)
                try:
                    self._fs.fsync(fd)
                finally:
                    self._fs.close(fd)
            self._shut.clear()
            for name in directories:
                where = os.path.join(self._where, name)
                files.sync_directory(self._fs, self.dir_fd, name)
        except OSError as error:
            raise as_storage_error(error, "write", where) from error

    def close(self) -> None:
        """Close all files without syncing them."""
        with self._mutex:
            left, self._open = self._open, []
        for _, fd in left:
            with suppress(OSError):
                self._fs.close(fd)
