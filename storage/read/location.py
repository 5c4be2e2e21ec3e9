"""Protocols of the readers: a location, below which checkpoints stand, and the files of one checkpoint.

Contract for every backend: paths are relative and of plain components; a file that is not there raises an
``OSError`` whose ``errno`` is in :data:`GONE`; anything there that can't be a file of gockpt's raises
:class:`~gockpt.errors.CheckpointCorrupt`; calls may come from several threads.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, Self

from gockpt.errors import CheckpointCorrupt, ManifestCorrupt
from gockpt.storage.format import strict_json
from gockpt.storage.format.checksum import crc32c
from gockpt.storage.format.manifest import BLOCKS_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from gockpt.errors import CheckpointNotFound, NotACheckpoint
    from gockpt.storage.format.manifest import Manifest
    from gockpt.storage.format.manifest_entries import FileEntry
    from gockpt.storage.read.scratch import Scratch

__all__ = [
    "GONE",
    "MAX_MANIFEST_BYTES",
    "Child",
    "File",
    "Files",
    "Location",
    "Names",
    "expect_no_offsets",
    "expect_plain",
    "expect_size",
    "read_document",
    "read_small",
]

GONE = frozenset({errno.ENOENT, errno.ESTALE})
"""The errors that say "no such file (any more)", the network file systems' one included."""

MAX_BLOCKS_BYTES = 1 << 30  # the block checksums of 256 TiB
MAX_MANIFEST_BYTES = strict_json.MAX_BYTES + 64


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


class Files(Protocol):
    """The files of one checkpoint."""

    @property
    def is_copy(self) -> bool:
        """Whether they are a copy: what is found out about them says nothing about the original."""

    def accept(self, manifest: Manifest, *, where: str) -> None:
        """Learn what the checkpoint consists of, before anything but its manifest is opened.

        Args:
            manifest: Its manifest.
            where: Its path, for messages.

        Raises:
            ManifestCorrupt: If a checkpoint in this form can't have such a manifest.
        """

    def open(
        self, path: str, *, nbytes: int | None = None, scratch: Scratch | None = None, at: int | None = None
    ) -> File:
        """Open a file, which must have that size if one is given.

        With ``scratch`` much of it will be read, by one thread; the file may use what that has left. With
        ``at``, an offset in an archive out of its manifest, and a size, it is what lies there: ``path`` is
        for messages.
        """

    def names(self, path: str) -> Names:
        """Return the names in a directory; ``""`` is the checkpoint's own."""

    def checked(self) -> Files:
        """Return the same files for a verification, which reads each one once, from its begin to its end.

        They are compared with all that is said of them beside the manifest. They end with these.
        """

    def faults(self) -> Iterator[str]:
        """Yield what is wrong beside the files."""

    def is_gone(self) -> bool:
        """Whether the checkpoint was removed, or set aside to be, since it was opened."""

    def close(self) -> None:
        """Let go of them; again does nothing."""


@dataclass(frozen=True, slots=True)
class Child:
    """A name below a location that is a published checkpoint's. Its manifest says whether it is complete.

    Attributes:
        name: The name; empty if the location is one checkpoint itself.
        path: Its path or URL.
        step: The user's step, or ``None`` where the name doesn't say it.
        seq: Number of the publication, or ``None`` where names don't say it.
        attempt: Hexadecimal, unique to its writing, or ``None`` where the name doesn't say it.
        replaced: Whether a newer publication of the step took its place: it counts only where that is not
            complete.
    """

    name: str
    path: str
    step: int | None = None
    seq: int | None = None
    attempt: str | None = None
    replaced: bool = False


class Location(Protocol):
    """A path or URL below which checkpoints stand, or which is one checkpoint itself."""

    @property
    def path(self) -> str:
        """The path or URL as the user named it."""

    @property
    def kind(self) -> Literal["directory", "file", "object store"]:
        """The kind of place; gockpt saves into directories only, and deletes only there."""

    @property
    def parallel(self) -> int:
        """How many files are best read at once: many where each request takes long."""

    def children(self) -> list[Child]:
        """Return the published checkpoints by their names: newest publication first as far as names say it.

        Those that were replaced come last. A location that is one checkpoint itself has itself only.

        Raises:
            NotACheckpoint: If it is a checkpoint that was never published, or is being deleted.
        """

    def open(self, child: Child) -> Files:
        """Open a child; its files need not be there.

        Raises:
            ManifestCorrupt: If something else stands there under that name.
            OSError: If it can't be opened; of :data:`GONE` if it isn't there any more.
        """

    def not_found(self) -> CheckpointNotFound | NotACheckpoint:
        """Return the error that says what stands there instead of checkpoints."""

    def close(self) -> None:
        """Let go of it; files that were opened stay open."""


def expect_no_offsets(manifest: Manifest, *, where: str) -> None:
    """Refuse the manifest of an archive where each chunk is a file.

    Raises:
        ManifestCorrupt: If it is one.
    """
    if any(entry.at is not None for entry in manifest.arrays):
        msg = f"{where}: its manifest is that of an archive, with the offsets of chunks"
        raise ManifestCorrupt(msg)


def expect_plain(path: str) -> None:
    """Refuse a path inside a checkpoint with an empty, ``.`` or ``..`` component, or a NUL.

    Raises:
        CheckpointCorrupt: If it has one.
    """
    if any(part in ("", ".", "..") or "\0" in part for part in path.split("/")):
        msg = f"{path!r} is not a plain path inside the checkpoint"
        raise CheckpointCorrupt(msg)


def expect_size(path: str, found: int, nbytes: int | None) -> None:
    """Refuse a file of another size than the one it must have, if that is known.

    Raises:
        CheckpointCorrupt: If it has another.
    """
    if nbytes is not None and found != nbytes:
        msg = f"{path} has {found} bytes instead of {nbytes}"
        raise CheckpointCorrupt(msg)


def read_small(files: Files, path: str, *, limit: int, nbytes: int | None = None) -> bytes:
    """Return the whole content of a file that must not be larger than ``limit`` bytes.

    Raises:
        CheckpointCorrupt: If it is larger, and as for :meth:`Files.open`; nothing is allocated then.
        OSError: If it isn't there, or can't be opened.
    """
    with files.open(path, nbytes=nbytes) as file:
        if file.nbytes > limit:
            msg = f"{path} has {file.nbytes} bytes; more than {limit} can't be right"
            raise CheckpointCorrupt(msg)
        data = bytearray(file.nbytes)
        file.read_into([memoryview(data)], 0)
    return bytes(data)


def read_document(files: Files, file: FileEntry) -> bytes:
    """Return a file that the manifest lists, which must have the size and checksum that it says.

    Raises:
        ManifestCorrupt: If its checksum differs.
        CheckpointCorrupt: If its size does.
        OSError: If it isn't there, or can't be opened.
    """
    limit = MAX_BLOCKS_BYTES if file.path == BLOCKS_FILE else strict_json.MAX_BYTES
    data = read_small(files, file.path, limit=limit, nbytes=file.size)
    found = crc32c(data)
    if found != file.crc32c:
        msg = f"{file.path} is damaged: its checksum is {found:08x} instead of {file.crc32c:08x}"
        raise ManifestCorrupt(msg)
    return data
