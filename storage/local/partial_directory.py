"""Files of a checkpoint that is being written into a directory: one file per chunk and per document."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from gockpt.storage.format.manifest import MANIFEST_FILE
from gockpt.storage.local import chunk_writer, files
from gockpt.storage.local.durability import Unsynced
from gockpt.storage.local.failures import storage_errors
from gockpt.storage.local.partial_files import StoredChunk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gockpt.core.arena_layout import ArrayLayout, Slot
    from gockpt.storage.local.filesystem import Filesystem
    from gockpt.storage.local.partial_files import Chunk

__all__ = ["PartialDirectory"]

_MANIFEST_IN_THE_MAKING = f"{MANIFEST_FILE}.tmp"


class PartialDirectory:
    """An open directory that only this object writes into; see :class:`PartialFiles`."""

    def __init__(self, fs: Filesystem, dir_fd: int, where: str) -> None:
        """Start in an empty directory.

        Args:
            fs: The file system.
            dir_fd: The directory; the caller closes it.
            where: Its path, for messages.

        Raises:
            OSError: If the file system can't be identified.
        """
        self._fs = fs
        self._fd = dir_fd
        self._where = where
        self._unsynced = Unsynced(fs, dir_fd, where)
        self._making = threading.Lock()
        self._directories: dict[str, None] = {}  # parents before children
        self._direct = True
        self._known = False  # whether a chunk was written directly

    def write_chunks(self, chunks: Sequence[Chunk]) -> list[StoredChunk]:
        """Write a file for each chunk."""
        return [self._write_chunk(*chunk) for chunk in chunks]

    def _write_chunk(self, path: str, layout: ArrayLayout, slot: Slot, buffer: memoryview) -> StoredChunk:
        with storage_errors("write", self._where, path):
            written = chunk_writer.write_chunk(
                *(self._fs, self._fd, path),
                layout=layout,
                slot=slot,
                buffer=buffer,
                direct=self._direct,
                known=self._known,
            )
            return self._take(path, written)

    def write_encoded(self, path: str, data: bytes) -> StoredChunk:
        """Write an encoded chunk's file."""
        with storage_errors("write", self._where, path):
            written = chunk_writer.write_encoded(
                self._fs, self._fd, path, data=data, direct=self._direct, known=self._known
            )
            return self._take(path, written)

    def _take(self, path: str, written: chunk_writer.WrittenChunk) -> StoredChunk:
        """Keep a chunk's file for :meth:`sync`, and what it tells of direct I/O for the next ones."""
        self._unsynced.add(path, written.fd)
        self._direct = self._direct and not written.refused
        self._known = self._known or written.direct
        return StoredChunk(written.blocks.tobytes(), written.nbytes)

    def write_document(self, path: str, data: bytes) -> None:
        """Write a document's file, its directories first."""
        with self._making:
            self._make_directory(path.rpartition("/")[0])
        with storage_errors("write", self._where, path):
            self._unsynced.add(path, files.write_new_file(self._fs, self._fd, path, data))

    def replace_document(self, path: str, data: bytes) -> None:
        """Write a document's file anew."""
        with storage_errors("replace", self._where, path):
            self._fs.unlink(path, dir_fd=self._fd)
        self.write_document(path, data)

    def sync(self) -> None:
        """Make every file and every directory durable, children before parents."""
        self._unsynced.sync(reversed(self._directories))
        self._sync_itself()

    def complete(self, manifest: bytes) -> None:
        """Write the manifest under another name, make it durable, and rename it."""
        fs = self._fs
        with storage_errors("write", self._where, MANIFEST_FILE):
            fd = files.write_new_file(fs, self._fd, _MANIFEST_IN_THE_MAKING, manifest)
            try:
                fs.fsync(fd)
            finally:
                fs.close(fd)
            fs.rename(_MANIFEST_IN_THE_MAKING, MANIFEST_FILE, dir_fd=self._fd)
        self._sync_itself()

    def close(self) -> None:
        """Close all files without syncing them."""
        self._unsynced.close()

    def _sync_itself(self) -> None:
        with storage_errors("write", self._where):
            self._fs.fsync(self._fd)

    def _make_directory(self, path: str) -> None:
        """Make a directory, its parents first, unless it was made before."""
        if path and path not in self._directories:
            self._make_directory(path.rpartition("/")[0])
            with storage_errors("make", self._where, path):
                self._fs.mkdir(path, dir_fd=self._fd)
            self._directories[path] = None
