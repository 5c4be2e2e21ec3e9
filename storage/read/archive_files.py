"""Files of a checkpoint that is one archive: stretches of one file, local or in an object store.

Promise: chunks are found by the offsets in the manifest, documents by their records in the central directory,
which is read when a document is first wanted, and only if it is as long as the manifest's files call for. No
stretch reaches beyond the last entry. Other records, local headers, padding and CRC-32s are looked at by a
verification only.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, Protocol, Self

from gockpt.errors import CheckpointCorrupt, ManifestCorrupt
from gockpt.storage.format import zip_archive
from gockpt.storage.format.chunk_grid import chunk_key
from gockpt.storage.format.manifest import MANIFEST_FILE
from gockpt.storage.read.location import Names, expect_plain, expect_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from gockpt.storage.format.manifest import Manifest
    from gockpt.storage.format.zip_archive import CentralEntry
    from gockpt.storage.read.location import File, Files
    from gockpt.storage.read.scratch import Scratch

__all__ = ["ArchiveFiles", "OneFile"]

MAX_DIRECTORY_NBYTES = 16 << 20
"""Longest central directory that is read before the manifest says what must be in it."""


class OneFile(Protocol):
    """The file that an archive is; its calls may come from several threads."""

    @property
    def path(self) -> str:
        """Its path or URL, for messages."""

    @property
    def nbytes(self) -> int:
        """Its length when it was opened."""

    @property
    def is_copy(self) -> bool:
        """As for :class:`~gockpt.storage.read.location.Files`."""

    def open(self, path: str, nbytes: int, scratch: Scratch | None) -> File:
        """Open it to read so many bytes of an entry, ``path`` in messages.

        With ``scratch`` as for :meth:`~gockpt.storage.read.location.Files.open`.
        """

    def is_gone(self) -> bool:
        """Whether it was removed, or set aside to be, since it was opened."""

    def close(self) -> None:
        """Let go of it; again does nothing."""


class ArchiveFiles:
    """The entries of one archive, as the files of one checkpoint.

    Attributes:
        is_copy: As of the file.
    """

    def __init__(self, file: OneFile) -> None:
        """Take over the file and read its end.

        Raises:
            CheckpointCorrupt: If it does not end as an archive does.
        """
        self.is_copy = file.is_copy
        self._file = file
        self._mutex = threading.Lock()
        self._manifest: Manifest | None = None
        self._bytes: bytes | None = None
        self._entries: dict[str, CentralEntry] | CheckpointCorrupt | None = None
        self._tree: dict[str, set[str]] | None = None
        nbytes = min(file.nbytes, zip_archive.TAIL_NBYTES)
        end = self._read(file.nbytes - nbytes, nbytes)
        self._tail = zip_archive.parse_tail(end, file.nbytes, where=file.path)

    @property
    def nbytes(self) -> int:
        """Length of the archive when it was opened."""
        return self._file.nbytes

    def accept(self, manifest: Manifest, *, where: str) -> None:
        """Learn what is in the archive.

        Raises:
            ManifestCorrupt: If the manifest is that of a directory.
        """
        if any(entry.at is None for entry in manifest.arrays):
            msg = f"{where}: its manifest is that of a directory, without the offsets of chunks"
            raise ManifestCorrupt(msg)
        self._manifest = manifest

    def open(
        self, path: str, *, nbytes: int | None = None, scratch: Scratch | None = None, at: int | None = None
    ) -> File:
        """Open an entry."""
        start, size = self._place(path, nbytes, at)
        return _Stretch(self._file.open(path, size, scratch), path, start, size)

    def names(self, path: str) -> Names:
        """Return the names in a directory."""
        entries = self._all_entries()
        with self._mutex:
            if self._tree is None:
                self._tree = {"": set()}
                for name in entries:
                    parts = name.split("/")
                    for depth in range(len(parts)):
                        self._tree.setdefault("/".join(parts[:depth]), set()).add(parts[depth])
            return Names(sorted(self._tree.get(path, ())))

    def checked(self) -> Files:
        """Return the same files, each of which must also agree with its local header and its CRC-32."""
        return _CheckedFiles(self._file, self)

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the archive between its entries."""
        try:
            entries = self.entries()
        except CheckpointCorrupt as error:
            yield str(error)
            return
        at = 0
        for entry, start in entries:
            if entry.header_at != at:
                yield f"the entry {entry.name} begins at byte {entry.header_at} instead of {at}"
            at = start + entry.nbytes

    def entries(self) -> list[tuple[CentralEntry, int]]:
        """Return every entry and the offset of its data, in the order in which they stand in the archive.

        Raises:
            CheckpointCorrupt: If a record of the central directory is damaged, or there are too many or few.
        """
        manifest = self._manifest
        offsets = {
            array.chunk_path(chunk): offset
            for array in (() if manifest is None else manifest.arrays)
            for chunk, offset in enumerate(array.at or ())
        }
        found = sorted(self._all_entries().values(), key=lambda entry: entry.header_at)
        return [(entry, offsets.get(entry.name, _behind_header(entry))) for entry in found]

    def header(self, entry: CentralEntry, start: int) -> bytes:
        """Return an entry's local header with its padding: all that stands before its data at ``start``.

        Raises:
            CheckpointCorrupt: If it is not the one that follows from the central directory and the manifest.
        """
        path, padding = entry.name, start - _behind_header(entry)
        if padding not in range(zip_archive.MAX_PADDING_NBYTES + 1):
            msg = f"{path}: the central directory and the manifest say different lengths or offsets"
            raise CheckpointCorrupt(msg)
        header = zip_archive.local_header(path, entry.nbytes, entry.crc32, padding)
        if self._read(entry.header_at, len(header)) != header:
            msg = f"{path}: its local header is not the one that follows from the central directory"
            raise CheckpointCorrupt(msg)
        return header

    def end(self) -> bytes:
        """Return all that stands behind the last entry: the central directory and the end records.

        Raises:
            CheckpointCorrupt: As :meth:`entries`.
        """
        self._all_entries()
        tail = self._tail
        return self._directory() + zip_archive.end_records(
            tail.entries, tail.directory_at, tail.directory_nbytes
        )

    def is_gone(self) -> bool:
        """Whether the archive was removed, or set aside to be."""
        return self._file.is_gone()

    def close(self) -> None:
        """Let go of the archive."""
        self._file.close()

    def _place(self, path: str, nbytes: int | None, at: int | None) -> tuple[int, int]:
        """Return where the data of an entry begins, and its length."""
        if at is not None and nbytes is not None:
            if at + nbytes > self._tail.manifest.header_at:
                msg = f"{path} reaches beyond the archive's last entry"
                raise CheckpointCorrupt(msg)
            return at, nbytes
        if path == MANIFEST_FILE:
            start, size = self._tail.manifest_at, self._tail.manifest.nbytes
        else:
            entry = self._entry(path)
            start, size = _behind_header(entry), entry.nbytes
        expect_size(path, size, nbytes)
        return start, size

    def _entry(self, path: str) -> CentralEntry:
        expect_plain(path)
        entry = zip_archive.find_entry(self._directory(), path)
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if _behind_header(entry) + entry.nbytes > self._tail.manifest.header_at:
            msg = f"{path} reaches beyond the archive's last entry"
            raise CheckpointCorrupt(msg)
        return entry

    def _directory(self) -> bytes:
        """Return the central directory; read once."""
        with self._mutex:
            if self._bytes is None:
                tail, where, limit = self._tail, self._file.path, MAX_DIRECTORY_NBYTES
                if self._manifest is not None:
                    entries, limit = _expected(self._manifest)
                    if tail.entries != entries:
                        msg = f"{where} has {tail.entries} entries instead of {entries}"
                        raise CheckpointCorrupt(msg)
                if tail.directory_nbytes > limit:
                    msg = f"{where}: a central directory of {tail.directory_nbytes} bytes can't be right"
                    raise CheckpointCorrupt(msg)
                self._bytes = self._read(tail.directory_at, tail.directory_nbytes)
            return self._bytes

    def _all_entries(self) -> dict[str, CentralEntry]:
        """Return every entry by its name; the records are read once."""
        data = self._directory()
        with self._mutex:
            if self._entries is None:
                try:
                    found = zip_archive.parse_directory(data, self._tail, where=self._file.path)
                    self._entries = {entry.name: entry for entry in found}
                except CheckpointCorrupt as error:
                    self._entries = error
            if isinstance(self._entries, CheckpointCorrupt):
                raise self._entries
            return self._entries

    def _read(self, start: int, nbytes: int) -> bytes:
        data = bytearray(nbytes)
        with self._file.open(self._file.path, nbytes, None) as file:
            file.read_into([memoryview(data)], start)
        return bytes(data)


class _CheckedFiles(ArchiveFiles):
    """Entries that are read once each, and compared with what their records say."""

    def _entry(self, path: str) -> CentralEntry:
        expect_plain(path)
        entry = self._all_entries().get(path)
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return entry

    def __init__(self, file: OneFile, plain: ArchiveFiles) -> None:
        """Take a look at the file of ``plain``, which goes on to own it."""
        super().__init__(file)
        self._manifest = plain._manifest  # noqa: SLF001 - of the same class

    def open(
        self, path: str, *, nbytes: int | None = None, scratch: Scratch | None = None, at: int | None = None
    ) -> File:
        """Open an entry, and compare its local header and padding with its central record."""
        start, size = self._place(path, nbytes, at)
        entry = self._tail.manifest if path == MANIFEST_FILE else self._entry(path)
        if entry.nbytes != size:
            msg = f"{path}: the central directory and the manifest say different lengths or offsets"
            raise CheckpointCorrupt(msg)
        self.header(entry, start)
        return _CheckedStretch(_Stretch(self._file.open(path, size, scratch), path, start, size), entry.crc32)


class _Stretch:
    """Data of one entry, as a file.

    Attributes:
        path: Path of the entry.
        nbytes: Length of its data.
    """

    __slots__ = ("_file", "_start", "nbytes", "path")

    def __init__(self, file: File, path: str, start: int, nbytes: int) -> None:
        """Take over the open archive, in which the data begins at ``start``."""
        self.path = path
        self.nbytes = nbytes
        self._file = file
        self._start = start

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)

    def read_into(self, views: Sequence[memoryview], offset: int) -> int:
        """Fill every view, in order, from ``offset`` on; never returns with less.

        Raises:
            CheckpointCorrupt: If the entry or the archive ends too early, or the device can't read it.
        """
        if offset + sum(view.nbytes for view in views) > self.nbytes:
            msg = f"{self.path} ends at byte {self.nbytes}; there should be more"
            raise CheckpointCorrupt(msg)
        return self._file.read_into(views, self._start + offset)


class _CheckedStretch:
    """Data of one entry that is read once, in order, and whose CRC-32 must agree when all of it was read.

    Attributes:
        path: Path of the entry.
        nbytes: Length of its data.
    """

    __slots__ = ("_crc", "_done", "_expected", "_file", "nbytes", "path")

    def __init__(self, file: File, crc32: int) -> None:
        """Take over the open entry, whose CRC-32 must be ``crc32``."""
        self.path = file.path
        self.nbytes = file.nbytes
        self._file = file
        self._expected = crc32
        self._crc = 0
        self._done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)
        if kind is None and self._done == self.nbytes and self._crc != self._expected:
            msg = f"{self.path}: its CRC-32 is {self._crc:08x}, the ZIP says {self._expected:08x}"
            raise CheckpointCorrupt(msg)

    def read_into(self, views: Sequence[memoryview], offset: int) -> int:
        """Fill every view, in order, from ``offset`` on, where the last call ended."""
        got = self._file.read_into(views, offset)
        if offset == self._done:
            for view in views:
                self._crc = zip_archive.archive_crc32(view, self._crc)
                self._done += view.nbytes
        return got


def _behind_header(entry: CentralEntry) -> int:
    """Return where an entry's data begins if its local header has no padding."""
    return entry.header_at + zip_archive.LOCAL_HEADER_NBYTES + len(entry.name)


def _expected(manifest: Manifest) -> tuple[int, int]:
    """Return how many entries a checkpoint has, and the most bytes that their central records take."""
    entries, nbytes = 1 + len(manifest.files) + len(manifest.arrays), len(MANIFEST_FILE)
    nbytes += sum(len(file.path) for file in manifest.files)
    for array in manifest.arrays:
        chunks = array.chunks
        entries += chunks
        longest = len(array.path) + 1 + len(chunk_key(chunks, len(array.chunk_shape)))
        nbytes += len(array.meta.path) + chunks * longest
    return entries, nbytes + entries * zip_archive.MAX_RECORD_NBYTES
