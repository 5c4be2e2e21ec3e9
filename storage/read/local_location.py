"""Checkpoints in a mounted file system, read by descriptors; no link below the user's path is followed."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from gockpt.errors import CheckpointCorrupt, CheckpointNotFound, ManifestCorrupt, NotACheckpoint
from gockpt.storage.format import step_names, zip_archive
from gockpt.storage.format.manifest import GROUP_FILE, MANIFEST_FILE
from gockpt.storage.read.archive_files import ArchiveFiles
from gockpt.storage.read.direct_io import DirectFile, ReadCalls
from gockpt.storage.read.location import GONE, Child, Names, expect_no_offsets
from gockpt.storage.read.safe_open import RegularFile, SharedFile, open_below, open_directory, open_regular

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gockpt.storage.format.manifest import Manifest
    from gockpt.storage.read.location import File
    from gockpt.storage.read.scratch import Scratch

__all__ = ["ArchiveLocation", "LocalArchive", "LocalFiles", "LocalLocation", "is_gone", "local_location"]


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

    def accept(self, manifest: Manifest, *, where: str) -> None:
        """Refuse the manifest of an archive."""
        expect_no_offsets(manifest, where=where)

    def open(
        self,
        path: str,
        *,
        nbytes: int | None = None,
        scratch: Scratch | None = None,
        at: int | None = None,  # noqa: ARG002 - of archives only
    ) -> File:
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

    def checked(self) -> LocalFiles:
        """Return these: nothing is said of them beside the manifest."""
        return self

    def faults(self) -> Iterator[str]:
        """Yield nothing: there is nothing beside the files."""
        return iter(())

    def is_gone(self) -> bool:
        """Whether its parent lists it under no name any more, or under the name of trash."""
        return is_gone(self.fd)

    def close(self) -> None:
        """Close the descriptor."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class LocalArchive:
    """An archive, by an open descriptor; large reads have one of their own, since they may be direct.

    Attributes:
        path: Its path, for messages.
        nbytes: Its length when it was opened.
        is_copy: Never: this is where checkpoints are saved.
    """

    is_copy = False

    def __init__(self, fd: int, parent: int, path: str, *, calls: ReadCalls | None = None) -> None:
        """Take over the descriptors of a regular file and of its directory.

        Args:
            fd: The file.
            parent: The directory in which it was found.
            path: Its path, for messages.
            calls: How it is read past the page cache.
        """
        self.path = path
        self.nbytes = os.fstat(fd).st_size
        self._fd = fd
        self._parent = parent
        self._calls = calls or ReadCalls()

    def open(self, path: str, nbytes: int, scratch: Scratch | None) -> File:
        """Return the file; opened once more if it may be read past the page cache."""
        if scratch is not None and nbytes >= self._calls.direct_from:
            with suppress(OSError):  # no /proc, or no permission any more
                again = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
                return DirectFile(RegularFile(again, path, self.nbytes), scratch, self._calls)
        return SharedFile(self._fd, path, self.nbytes)

    def is_gone(self) -> bool:
        """Whether its directory lists it under no name any more, or under the name of trash."""
        return not _is_listed(self._fd, self._parent)

    def close(self) -> None:
        """Close the descriptors."""
        for fd in (self._fd, self._parent):
            if fd >= 0:
                os.close(fd)
        self._fd = self._parent = -1


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
            _expect_published(self.path)
            return [Child("", self.path)]
        found = []
        for name in os.listdir(self._fd):
            known = step_names.parse(name)
            if known is not None and known.kind in ("step", "old"):
                path = os.path.join(self.path, name)
                is_old = known.kind == "old"
                found.append(Child(name, path, known.step, attempt=known.attempt, replaced=is_old))
        return sorted(found, key=lambda child: (not child.replaced, child.step, child.name), reverse=True)

    def open(self, child: Child) -> LocalFiles | ArchiveFiles:
        """Open a child's directory or archive, which must be no link; its own may have been renamed."""
        if not child.name:
            return LocalFiles(os.dup(self._fd))
        try:
            fd = open_below(self._fd, child.name)
        except CheckpointCorrupt as error:
            msg = f"{child.path}: {error}; to read it, give its own path"
            raise ManifestCorrupt(msg) from error
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            return LocalFiles(fd)
        return _open_archive(fd, os.dup(self._fd), child.path)

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


class ArchiveLocation:
    """A path that is one archive itself.

    Attributes:
        path: The path, as the user named it.
        kind: A file.
        parallel: One manifest only.
    """

    kind: Literal["file"] = "file"
    parallel = 1

    def __init__(self, path: str) -> None:
        """Open the file.

        Raises:
            NotACheckpoint: If it is no regular file, or no ZIP.
        """
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        if not _is_zip(self._fd, path):
            self.close()
            msg = (
                f"{path!r} is not a directory, and no archive; give the path that checkpoints are saved into"
            )
            raise NotACheckpoint(msg)

    def children(self) -> list[Child]:
        """Return the archive itself."""
        _expect_published(self.path)
        return [Child("", self.path)]

    def open(self, child: Child) -> ArchiveFiles:
        """Open the archive; it may have been renamed."""
        parent = open_directory(os.path.dirname(os.path.realpath(self.path)))
        return _open_archive(os.dup(self._fd), parent, child.path)

    def not_found(self) -> CheckpointNotFound:
        """Return an error: the archive was renamed or removed."""
        return CheckpointNotFound(f"no complete checkpoint in {self.path!r}")

    def close(self) -> None:
        """Close the descriptor."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def local_location(path: str) -> LocalLocation | ArchiveLocation:
    """Open a path of a mounted file system.

    Raises:
        CheckpointNotFound: If nothing is there.
        NotACheckpoint: If it is neither a directory nor an archive.
    """
    return ArchiveLocation(path) if os.path.isfile(path) else LocalLocation(path)


def _expect_published(path: str) -> None:
    """Refuse a checkpoint whose name says that it was never published, or is being deleted.

    Raises:
        NotACheckpoint: If it does.
    """
    known = step_names.parse(os.path.basename(os.path.realpath(path)))
    if known is not None and known.kind in ("partial", "trash"):
        msg = f"{path!r} is a checkpoint that was never published, or is being deleted"
        raise NotACheckpoint(msg)


def _open_archive(fd: int, parent: int, path: str) -> ArchiveFiles:
    """Take over the descriptors of an archive and of its directory.

    Raises:
        ManifestCorrupt: If it is no archive.
    """
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            msg = f"{path} is neither a directory nor a regular file"
            raise ManifestCorrupt(msg)
        return ArchiveFiles(LocalArchive(fd, parent, path))
    except BaseException as error:
        os.close(fd)
        os.close(parent)
        if isinstance(error, CheckpointCorrupt):
            raise ManifestCorrupt(str(error)) from error
        raise


def _is_zip(fd: int, path: str) -> bool:
    """Whether an open file is a ZIP, by its last bytes or its name."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        return False
    end = os.pread(fd, zip_archive.END_NBYTES, max(0, status.st_size - zip_archive.END_NBYTES))
    return zip_archive.is_end(end) or path.endswith(".zip")


def is_gone(directory: int) -> bool:
    """Return whether an open directory was removed, or set aside to be removed.

    That is so when its parent lists it under no name any more, or under the name of trash.
    """
    if os.fstat(directory).st_nlink == 0:
        return True
    try:
        parent = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:
        return error.errno in GONE
    try:
        return not _is_listed(directory, parent)
    finally:
        os.close(parent)


def _is_listed(fd: int, parent: int) -> bool:
    """Return whether a directory lists an open file or directory, but for trash; true if it can't be told."""
    status = os.fstat(fd)
    try:
        return any(_is(status, parent, name) for name in os.listdir(parent))
    except PermissionError:
        return True  # then what is missing counts as damage


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
