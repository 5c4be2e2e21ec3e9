"""Checkpoints in a directory of a mounted file system, read by file descriptors; no link is followed."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from gockpt.errors import CheckpointCorrupt, CheckpointNotFound, ManifestCorrupt, NotACheckpoint
from gockpt.storage.format import step_names
from gockpt.storage.format.manifest import GROUP_FILE, MANIFEST_FILE
from gockpt.storage.read.direct_io import DirectFile, ReadCalls
from gockpt.storage.read.location import GONE, Child, Names
from gockpt.storage.read.safe_open import open_below, open_directory, open_regular

if TYPE_CHECKING:
    from gockpt.storage.read.location import File
    from gockpt.storage.read.scratch import Scratch

__all__ = ["LocalFiles", "LocalLocation", "is_gone"]


class LocalFiles:
    """The files below a directory, by an open descriptor that it takes over.

    Attributes:
        fd: The descriptor; -1 once it is closed.
        is_copy: Never: this is where checkpoints are saved.
    """

    is_copy = False

    def __init__(self, fd: int, *, calls: ReadCalls | None = None) -> None:
        """Take over a descriptor; ``calls`` is how files are read past the page cache."""
        self.fd = fd
        self._calls = calls or ReadCalls()

    def open(self, path: str, *, nbytes: int | None = None, scratch: Scratch | None = None) -> File:
        """Open a regular file below; see :func:`~gockpt.storage.read.safe_open.open_regular`."""
        file = open_regular(self.fd, path, nbytes=nbytes)
        return file if scratch is None else DirectFile(file, scratch, self._calls)

    def names(self, path: str) -> Names:
        """Return the names in a directory below."""
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
        """Whether its parent lists it under no name any more, or under the name of trash."""
        return is_gone(self.fd)

    def close(self) -> None:
        """Close the descriptor."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class LocalLocation:
    """A directory into which checkpoints are saved, or one checkpoint's own.

    Attributes:
        path: The directory, as the user named it.
        kind: A directory.
        parallel: One file at a time: manifests come from the page cache.
    """

    kind: Literal["directory"] = "directory"
    parallel = 1

    def __init__(self, path: str) -> None:
        """Open the directory.

        Raises:
            CheckpointNotFound: If there is none.
            NotACheckpoint: If it is something else.
        """
        self.path = path
        try:
            self._fd = open_directory(path)
        except FileNotFoundError as error:
            msg = f"no checkpoint in {path!r}: there is no such directory"
            raise CheckpointNotFound(msg) from error
        except NotADirectoryError as error:
            msg = f"{path!r} is not a directory; give the path that checkpoints are saved into"
            raise NotACheckpoint(msg) from error

    def children(self) -> list[Child]:
        """Return the published checkpoints by their names, highest step first; itself if it is one."""
        with suppress(FileNotFoundError):
            os.stat(MANIFEST_FILE, dir_fd=self._fd, follow_symlinks=False)
            known = step_names.parse(os.path.basename(os.path.realpath(self.path)))
            if known is not None and known.kind in ("partial", "trash"):
                msg = f"{self.path!r} is a checkpoint that was never published, or is being deleted"
                raise NotACheckpoint(msg)
            return [Child("", self.path)]
        found = []
        for name in os.listdir(self._fd):
            known = step_names.parse(name)
            if known is not None and known.kind in ("step", "old"):
                path = os.path.join(self.path, name)
                is_old = known.kind == "old"
                found.append(Child(name, path, known.step, attempt=known.attempt, replaced=is_old))
        return sorted(found, key=lambda child: (not child.replaced, child.step, child.name), reverse=True)

    def open(self, child: Child) -> LocalFiles:
        """Open a child's directory, which must be no link; its own may have been renamed."""
        if not child.name:
            return LocalFiles(os.dup(self._fd))
        try:
            return LocalFiles(open_below(self._fd, child.name, is_directory=True))
        except CheckpointCorrupt as error:
            msg = f"{child.path}: {error}; to read it, give its own path"
            raise ManifestCorrupt(msg) from error

    def not_found(self) -> CheckpointNotFound | NotACheckpoint:
        """Return the error that says what stands there instead."""
        names = sorted(os.listdir(self._fd))
        if GROUP_FILE in names:
            why = f"has no {MANIFEST_FILE}: it was never completed, or gockpt didn't write it"
            return NotACheckpoint(f"{self.path!r} {why}")
        if names and not any(name == step_names.LOCK_FILE or step_names.parse(name) for name in names):
            return NotACheckpoint(f"{self.path!r} holds no checkpoints, but {names[0]!r} and the like")
        return CheckpointNotFound(f"no complete checkpoint in {self.path!r}")

    def close(self) -> None:
        """Close the descriptor."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def is_gone(directory: int) -> bool:
    """Return whether an open directory was removed, or set aside to be removed.

    That is so when its parent lists it under no name any more, or under the name of trash.
    """
    status = os.fstat(directory)
    if status.st_nlink == 0:
        return True
    try:
        parent = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:
        return error.errno in GONE
    try:
        return not any(_is(status, parent, name) for name in os.listdir(parent))
    except PermissionError:
        return False  # it can't be told; then what is missing counts as damage
    finally:
        os.close(parent)


def _is(status: os.stat_result, parent: int, name: str) -> bool:
    """Return whether a name in the parent, other than one of trash, stands for that directory."""
    known = step_names.parse(name)
    if known is not None and known.kind == "trash":
        return False
    try:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(status, found)
