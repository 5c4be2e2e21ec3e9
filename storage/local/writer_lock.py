"""One writer per path: a POSIX lock on one file, opened once per process.

POSIX locks end with the process, however it ends, and forked children don't inherit them, unlike
``flock``'s. In return a process loses them as soon as it closes *any* descriptor of the file: so the file
is opened only here, and only once; a second writer in the same process is refused before it opens it.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from gockpt.errors import PathBusy, StorageError
from gockpt.storage.format.step_names import LOCK_FILE
from gockpt.storage.local import files, owner
from gockpt.storage.local.failures import storage_errors

if TYPE_CHECKING:
    from gockpt.storage.local.filesystem import Filesystem

__all__ = ["WriterLock", "expect_free"]

_WAY_OUT = (
    "Put it back if it was moved by mistake; or gockpt.close() the path (or the Checkpointer) and save "
    "again, which takes the path afresh"
)

# Directories this process holds, by (pid, device, inode). The pid, because a forked child gets a copy of
# the table but none of the locks. One atomic `setdefault` claims a place: no mutex that a fork in another
# thread could leave locked in the child.
_HELD: dict[tuple[int, int, int], WriterLock] = {}


class WriterLock:
    """The right to write into one directory, from construction to :meth:`release`."""

    __slots__ = ("_fd", "_fs", "_key", "_path")

    def __init__(self, fs: Filesystem, dir_fd: int, path: str) -> None:
        """Take the lock at once or not at all.

        Raises:
            PathBusy: If another process, or another writer in this one, has it.
            StorageError: If the lock file can't be opened or locked.
        """
        self._fs = fs
        self._path = path
        self._fd: int | None = None
        with storage_errors("look at", path):
            status = fs.fstat(dir_fd)
        self._key = (os.getpid(), status.st_dev, status.st_ino)
        if _HELD.setdefault(self._key, self) is not self:
            raise PathBusy(_busy_here(path))
        try:
            with storage_errors("lock", path):
                self._fd = fs.open(LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, dir_fd=dir_fd)
                mine = fs.lock(self._fd)
                who = None if mine else owner.parse(fs.pread(self._fd, owner.MAX_OWNER_BYTES, 0))
            if not mine:
                raise _busy(path, who)
            with storage_errors("write the lock file of", path):
                fs.ftruncate(self._fd, 0)
                files.write_all(fs, self._fd, memoryview(owner.encode(owner.myself())), 0)
        except BaseException:
            self.release()
            raise

    def expect_held(self, dir_fd: int) -> None:
        """Make sure that it is (again) ours: a stranger's close of the lock file in this process drops it.

        And that others would find it: that the path still leads to the directory, and the directory to the
        locked file. Where either was removed or replaced, another process could save there as well.

        Raises:
            StorageError: If it isn't; says what happened, and the way out.
            OSError: If that can't be told.
        """
        if self._fd is None or self._key[0] != os.getpid() or not self._fs.lock(self._fd):
            msg = f"another process took over {self._path} meanwhile; this save is given up. {_WAY_OUT}"
            raise StorageError(msg)
        here = self._fs.fstat(dir_fd)
        for what, name, at, expected in (
            ("the directory", self._path, None, here),
            (f"{LOCK_FILE} in it", LOCK_FILE, dir_fd, self._fs.fstat(self._fd)),
        ):
            try:
                found = self._fs.stat(name, dir_fd=at)
            except (FileNotFoundError, NotADirectoryError):
                happened = "removed or moved away"
            else:
                if at is None and stat.S_ISLNK(found.st_mode):  # the user's own path may be one
                    found = _followed(self._fs, name)
                if (found.st_dev, found.st_ino) == (expected.st_dev, expected.st_ino):
                    continue
                happened = "replaced"
            msg = (
                f"{self._path}: {what} was {happened} while this run saves there, so another process could "
                f"save there as well; this save is given up. {_WAY_OUT}"
            )
            raise StorageError(msg)

    def server_time(self) -> float:
        """Return the file server's present time, which clocks of other hosts can't disturb."""
        if self._fd is None:
            msg = "the lock was released"
            raise ValueError(msg)
        self._fs.touch(self._fd)
        return self._fs.fstat(self._fd).st_mtime

    def release(self) -> None:
        """Give the lock up; again is fine. In a forked child it does nothing to the parent's."""
        fd, self._fd = self._fd, None
        if _HELD.get(self._key) is self:
            del _HELD[self._key]
        if fd is not None:
            with suppress(OSError):  # nothing was written that matters
                self._fs.close(fd)


def expect_free(fs: Filesystem, path: str) -> None:
    """Make sure that nobody saves into a path; takes nothing and makes nothing.

    Raises:
        PathBusy: If somebody does.
    """
    opened: list[int] = []
    try:
        with suppress(OSError):  # no such directory, no lock file: nobody
            opened.append(fs.open(path, os.O_RDONLY | os.O_DIRECTORY))
            status = fs.fstat(opened[0])
            # Closing the lock file would drop a lock that this process has.
            if (os.getpid(), status.st_dev, status.st_ino) in _HELD:
                raise PathBusy(_busy_here(path))
            opened.append(fs.open(LOCK_FILE, os.O_RDWR | os.O_NOFOLLOW, dir_fd=opened[0]))
            if not fs.lock(opened[1]):
                who = owner.parse(fs.pread(opened[1], owner.MAX_OWNER_BYTES, 0))
                raise _busy(path, who)
    finally:
        for fd in opened:
            with suppress(OSError):
                fs.close(fd)


def _busy_here(path: str) -> str:
    return f"this process already saves into {path}; close that writer, or use another path"


def _busy(path: str, who: owner.Owner | None) -> PathBusy:
    msg = f"{path} is being saved into by {_name(who)}; use another path, or wait for it"
    return PathBusy(msg, pid=_pid(who))


def _followed(fs: Filesystem, path: str) -> os.stat_result:
    """Return what stands at the end of a link."""
    fd = fs.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return fs.fstat(fd)
    finally:
        fs.close(fd)


def _name(holder: owner.Owner | None) -> str:
    return f"process {holder.pid} on {holder.host}" if holder else "another process"


def _pid(holder: owner.Owner | None) -> int | None:
    """Return its number, if it means the same in this process."""
    here = owner.myself()
    if holder is None or not holder.pid_namespace:
        return None
    same = (holder.host, holder.boot, holder.pid_namespace) == (here.host, here.boot, here.pid_namespace)
    return holder.pid if same else None
