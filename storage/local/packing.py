"""Conversion of one complete checkpoint between its two forms, directory and archive.

Promise: the target appears under its name as a whole and durable, or not at all, and never over something
else. Only bytes that agree with the manifest are copied. ``unpack`` of what ``pack`` made of a directory
is that directory, byte for byte; ``pack`` of what ``unpack`` made of an archive has the same entries.
"""

from __future__ import annotations

import os
import secrets
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from gockpt.core.arena_layout import ALIGNMENT, CHECKSUM_BYTES
from gockpt.errors import UsageError
from gockpt.storage.format import zip_archive
from gockpt.storage.format.manifest import GROUP_FILE, MANIFEST_FILE, encode
from gockpt.storage.local import files
from gockpt.storage.local.failures import storage_errors
from gockpt.storage.local.filesystem import Filesystem
from gockpt.storage.local.partial_directory import PartialDirectory
from gockpt.storage.read.copying import chunk_files, document_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from typing_extensions import Buffer

    from gockpt.storage.format.manifest import Manifest
    from gockpt.storage.format.manifest_entries import ArrayEntry
    from gockpt.storage.read.checkpoint import StoredCheckpoint
    from gockpt.storage.read.copying import StoredFile

__all__ = ["pack", "unpack"]


def pack(
    stored: StoredCheckpoint,
    target: str,
    *,
    fs: Filesystem | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:
    """Write an archive of a checkpoint.

    Args:
        stored: The checkpoint, in either form; it must not be closed meanwhile.
        target: Path of the archive to be; its directory must exist.
        fs: The file system.
        on_progress: Called with the bytes copied and the bytes of all chunks.

    Raises:
        UsageError: If something stands at the target, or a chunk is too large for an archive.
        CheckpointCorrupt: If the checkpoint is damaged.
        CheckpointPruned: If it was removed meanwhile.
        StorageError: If the disk refuses.
    """
    for entry in stored.manifest.arrays:
        if entry.chunks and max(map(entry.file_nbytes, range(entry.chunks))) > zip_archive.MAX_ENTRY_NBYTES:
            msg = (
                f"{entry.spec.public_name!r} has a chunk of 2 GiB or more, which tensorstore would take for "
                "zeros in an archive: leave this checkpoint in its directory"
            )
            raise UsageError(msg)
    fs = fs or Filesystem()
    with _new(fs, target) as (parent, name):
        with storage_errors("write", target):
            fd = fs.open(name, files.NEW_FILE, dir_fd=parent)
        try:
            archive = _Archive(fs, fd, target)
            offsets = {}
            done, total = 0, sum(entry.nbytes for entry in stored.manifest.arrays)
            chunks, documents = _in_order(stored)
            for file in chunks:
                offsets[file.path] = archive.add(file.path, file.pieces(), file.nbytes, aligned=True)
                done += file.nbytes
                on_progress(done, total)
            for file in documents:
                archive.add(file.path, file.pieces(), file.nbytes, aligned=False)
            archive.finish(encode(_in_archive(stored.manifest, offsets)))
            with storage_errors("sync", target):
                fs.fsync(fd)
        finally:
            fs.close(fd)


def unpack(
    stored: StoredCheckpoint,
    target: str,
    *,
    fs: Filesystem | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:
    """Write a checkpoint as a directory.

    Args:
        stored: The checkpoint, in either form; it must not be closed meanwhile.
        target: Path of the directory to be; its parent must exist.
        fs: The file system.
        on_progress: Called with the bytes copied and the bytes of all chunks.

    Raises:
        UsageError: If something stands at the target.
        CheckpointCorrupt: If the checkpoint is damaged.
        CheckpointPruned: If it was removed meanwhile.
        StorageError: If the disk refuses.
    """
    fs = fs or Filesystem()
    with _new(fs, target) as (parent, name):
        with storage_errors("make", target):
            fs.mkdir(name, dir_fd=parent)
            fd = fs.open(name, files.DIRECTORY, dir_fd=parent)
        try:
            with storage_errors("write", target):
                partial = PartialDirectory(fs, fd, target)
            with closing(partial) as directory:
                for file in document_files(stored, "copied"):
                    directory.write_document(file.path, file.whole())
                done, total = 0, sum(entry.nbytes for entry in stored.manifest.arrays)
                for file in chunk_files(stored, "copied"):
                    directory.write_document(file.path, file.whole())
                    done += file.nbytes
                    on_progress(done, total)
                directory.sync()
                directory.complete(encode(stored.manifest.in_directory()))
        finally:
            fs.close(fd)


class _Archive:
    """An archive that is being written from its begin to its end, one entry after the other."""

    def __init__(self, fs: Filesystem, fd: int, where: str) -> None:
        """Start with an empty file, by its descriptor; ``where`` is for messages."""
        self._fs = fs
        self._fd = fd
        self._where = where
        self._at = 0
        self._records: list[bytes] = []

    def add(self, name: str, data: Iterable[Buffer], nbytes: int, *, aligned: bool) -> int:
        """Write an entry; return the offset of its data."""
        header_at = self._at
        padding, data_at = zip_archive.place(header_at, len(name), nbytes, aligned=aligned)
        at, crc32 = data_at, 0
        for piece in data:
            view = memoryview(piece)
            crc32 = zip_archive.archive_crc32(view, crc32)
            self._write(view, at)
            at += view.nbytes
        self._write(zip_archive.local_header(name, nbytes, crc32, padding), header_at)
        self._records.append(zip_archive.central_record(name, nbytes, crc32, header_at))
        self._at = at
        return data_at

    def finish(self, manifest: bytes) -> None:
        """Write the manifest, the central directory and the end records."""
        self.add(MANIFEST_FILE, [manifest], len(manifest), aligned=False)
        directory = b"".join(self._records)
        end = zip_archive.end_records(len(self._records), self._at, len(directory))
        self._write(directory + end, self._at)

    def _write(self, data: bytes | memoryview, at: int) -> None:
        with storage_errors("write", self._where):
            files.write_all(self._fs, self._fd, memoryview(data), at)


def _in_order(stored: StoredCheckpoint) -> tuple[list[StoredFile], list[StoredFile]]:
    """Return the chunks and the documents in the order in which a save writes them into an archive.

    That is: raw chunks at whole pages, other raw ones, encoded ones; documents of groups but the root, of
    arrays, and the rest.
    """

    def rank(entry: ArrayEntry) -> int:
        if entry.coded is not None:
            return 2
        return int(zip_archive.alignment(entry.chunk_nbytes + CHECKSUM_BYTES) < ALIGNMENT)

    ranks = [rank(entry) for entry in stored.manifest.arrays for _ in range(entry.chunks)]
    ranked = sorted(zip(ranks, chunk_files(stored, "copied"), strict=True), key=lambda pair: pair[0])
    own = {entry.meta.path for entry in stored.manifest.arrays}
    documents = sorted(
        document_files(stored, "copied"),
        key=lambda file: 1 if file.path in own else 0 if file.path.endswith(f"/{GROUP_FILE}") else 2,
    )
    return [file for _, file in ranked], documents


def _in_archive(manifest: Manifest, offsets: dict[str, int]) -> Manifest:
    arrays = (
        replace(entry, at=tuple(offsets[entry.chunk_path(chunk)] for chunk in range(entry.chunks)))
        for entry in manifest.arrays
    )
    return replace(manifest, arrays=tuple(arrays))


@contextmanager
def _new(fs: Filesystem, target: str) -> Iterator[tuple[int, str]]:
    """Give a directory and a temporary name in it, which becomes the target's if no error is raised."""
    path = os.path.abspath(target)
    directory, last = os.path.split(path)
    if os.path.lexists(path):
        msg = f"{target!r} exists; nothing is ever replaced"
        raise UsageError(msg)
    with storage_errors("open", directory):
        parent = fs.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    name = f".{last[:100]}.tmp-{secrets.token_hex(8)}"
    try:
        try:
            yield parent, name
            with storage_errors("rename a copy to", target):
                files.rename_new(fs, name, last, dir_fd=parent)
                fs.fsync(parent)
        except BaseException:
            with suppress(OSError):
                files.remove_tree(fs, parent, name)
            raise
    finally:
        fs.close(parent)
