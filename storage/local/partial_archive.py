"""Files of a checkpoint that is being written into an archive: one ZIP file of stored entries."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from gockpt.core.arena_layout import CHECKSUM_BYTES, SMALL_LIMIT
from gockpt.errors import WorkerError
from gockpt.storage.format import checksum, zip_archive
from gockpt.storage.format.manifest import MANIFEST_FILE
from gockpt.storage.local import files
from gockpt.storage.local.failures import storage_errors
from gockpt.storage.local.page_writer import PageWriter
from gockpt.storage.local.partial_files import StoredChunk

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gockpt.core.arena_layout import ArrayLayout
    from gockpt.storage.format.archive_plan import ArchivePlan, Entry
    from gockpt.storage.local.filesystem import Filesystem
    from gockpt.storage.local.partial_files import Chunk

__all__ = ["PartialArchive", "small_bytes"]

_HEADER = 30 + 2000 + 64  # of a local header: at most its fixed part, a path, and padding
_RESERVE_FROM = 1 << 20
_ZEROS = bytes(checksum.BLOCK)


class PartialArchive:
    """An open file that only this object writes into; see :class:`PartialFiles`."""

    def __init__(
        self, fs: Filesystem, dir_fd: int, name: str, fd: int, where: str, plan: ArchivePlan
    ) -> None:
        """Start in an empty file.

        Args:
            fs: The file system.
            dir_fd: The directory that ``name`` is relative to.
            name: The file.
            fd: Its open descriptor; the caller closes it.
            where: Its path, for messages.
            plan: Places of its raw chunks, and its Zarr documents.

        Raises:
            OSError: What the system says.
        """
        self._fs = fs
        self._fd = fd
        self._where = where
        self._plan = plan
        self._mutex = threading.Lock()
        self._crcs = np.zeros(len(plan.chunks), np.uint32)
        self._end = plan.end  # of the entries that have a place
        self._holes = 0  # bytes of them that are zero and not written
        self._records: list[bytes] = []  # central records of the entries without a planned place
        self._encoded = 0
        self._documents: dict[str, bytes] = {}
        if plan.end >= _RESERVE_FROM:
            files.reserve(fs, fd, plan.end)
        self._pages = PageWriter(fs, dir_fd, name, fd, packed_at=plan.packed_at, packed_end=plan.end)

    def write_chunks(self, chunks: Sequence[Chunk]) -> list[StoredChunk]:
        """Write each chunk's entry at its planned place, neighbours at once."""
        stored: list[StoredChunk] = []
        run: list[bytes | memoryview] = []
        run_at = run_end = 0
        for chunk in chunks:
            entry = self._plan.chunks[chunk.path]
            if entry.header_at < self._plan.packed_at:
                stored.append(self._write_large(entry, chunk))
                continue
            if entry.header_at != run_end:
                self._write_run(run_at, run)
                run, run_at = [], entry.header_at
            real, whole = chunk.slot.nbytes, chunk.layout.chunk_nbytes
            data = chunk.buffer[:real]
            rows = data if real == whole else bytes(data) + bytes(whole - real)
            blocks, trailer, crc32 = _checksums(data, whole)
            self._crcs[entry.index] = crc32
            run += entry.sealed(crc32), rows, trailer
            run_end = entry.data_at + whole + CHECKSUM_BYTES
            stored.append(StoredChunk(blocks, real + CHECKSUM_BYTES, entry.data_at))
        self._write_run(run_at, run)
        return stored

    def _write_run(self, at: int, run: list[bytes | memoryview]) -> None:
        """Write small entries that follow each other."""
        if run:
            with storage_errors("write", self._where):
                self._pages.write_all(at, run)

    def _write_large(self, entry: Entry, chunk: Chunk) -> StoredChunk:
        """Write an entry whose data begins at a page, from where it lies."""
        real, whole = chunk.slot.nbytes, chunk.layout.chunk_nbytes
        buffer = chunk.buffer
        blocks, trailer, crc32 = _checksums(buffer[:real], whole)
        self._crcs[entry.index] = crc32
        with storage_errors("write", self._where, chunk.path):
            self._pages.write(entry.header_at, memoryview(entry.sealed(crc32)))
            if real < whole:
                # The zeros up to the whole chunk are a hole.
                with self._mutex:
                    self._holes += whole - real
                self._pages.write(entry.data_at, buffer[:real])
                self._pages.write(entry.data_at + whole, memoryview(trailer))
            else:
                buffer[whole : whole + CHECKSUM_BYTES] = trailer
                self._pages.write(entry.data_at, buffer[: whole + CHECKSUM_BYTES])
        return StoredChunk(blocks, real + CHECKSUM_BYTES, entry.data_at)

    def write_encoded(self, path: str, data: bytes) -> StoredChunk:
        """Write an encoded chunk's entry behind those that have a place."""
        view = memoryview(data)
        blocks, trailer, crc32 = _checksums(view, view.nbytes)
        nbytes = view.nbytes + CHECKSUM_BYTES
        with self._mutex:
            header_at = self._end
            padding, data_at = zip_archive.place(header_at, len(path), nbytes, aligned=True)
            self._end = data_at + nbytes
            self._encoded += 1
            self._records.append(zip_archive.central_record(path, nbytes, crc32, header_at))
        header = zip_archive.local_header(path, nbytes, crc32, padding)
        with storage_errors("write", self._where, path):
            self._pages.write(header_at, memoryview(header))
            self._pages.write(data_at, view)
            self._pages.write(data_at + view.nbytes, memoryview(trailer))
        return StoredChunk(blocks, nbytes, data_at)

    def write_document(self, path: str, data: bytes) -> None:
        """Keep a document until all chunks have their places."""
        self._documents[path] = data

    def replace_document(self, path: str, data: bytes) -> None:
        """Keep another document instead."""
        self._documents[path] = data

    def sync(self) -> None:
        """Write the documents and all that is still gathered; :meth:`complete` makes it durable."""
        start, plan = self._end, self._plan
        pieces = [plan.documents]
        self._records.append(plan.document_records(start))
        self._end += len(plan.documents)
        for path, data in self._documents.items():
            if path not in plan.document_paths:
                pieces.append(self._entry(path, data))
        with storage_errors("write", self._where):
            self._pages.write_all(start, pieces)
            self._pages.flush()
        if self._pages.nbytes != self._end - self._holes:
            # Never so; said so that no manifest can follow.
            msg = f"{self._pages.nbytes} bytes were written, {self._end - self._holes} planned"
            raise WorkerError(msg)

    def complete(self, manifest: bytes) -> None:
        """Write the manifest, the central directory and the end, and make the whole file durable."""
        start, plan = self._end, self._plan
        entry = self._entry(MANIFEST_FILE, manifest)
        # In the order of the offsets, as they were given out.
        directory = plan.chunk_records(self._crcs) + b"".join(self._records)
        entries = len(plan.chunks) + self._encoded + len(self._documents) + 1
        data = entry + directory + zip_archive.end_records(entries, self._end, len(directory))
        with storage_errors("write", self._where, MANIFEST_FILE):
            files.write_all(self._fs, self._fd, memoryview(data), start)
            self._fs.ftruncate(self._fd, start + len(data))
            self._fs.fsync(self._fd)

    def close(self) -> None:
        """Close what it opened."""
        self._pages.close()

    def _entry(self, path: str, data: bytes) -> bytes:
        """Give a document the next place; return its entry."""
        crc32 = zip_archive.archive_crc32(data)
        self._records.append(zip_archive.central_record(path, len(data), crc32, self._end))
        entry = zip_archive.local_header(path, len(data), crc32, 0) + data
        self._end += len(entry)
        return entry


def small_bytes(arrays: Iterable[ArrayLayout]) -> int:
    """Return the most bytes of an archive that the small chunks of some arrays take, with their headers."""
    small = (
        slot.capacity + _HEADER for array in arrays for slot in array.slots if slot.capacity <= SMALL_LIMIT
    )
    return sum(small)


def _checksums(data: memoryview, whole: int) -> tuple[bytes, bytes, int]:
    """Return the checksums of a chunk, each block read once while it is in the cache.

    Args:
        data: The chunk's real or encoded bytes.
        whole: Length of the chunk with the zeros behind them.

    Returns:
        crc32c of each block of the data; that of the whole chunk, as it stands behind it; CRC-32 of both.
    """
    if data.nbytes == whole <= checksum.BLOCK:
        trailer = checksum.crc32c(data).to_bytes(CHECKSUM_BYTES, "little")
        return trailer, trailer, zip_archive.archive_crc32(trailer, zip_archive.archive_crc32(data))
    blocks = []
    crc32 = 0
    for at in range(0, data.nbytes, checksum.BLOCK):
        block = data[at : at + checksum.BLOCK]
        blocks.append(checksum.crc32c(block))
        crc32 = zip_archive.archive_crc32(block, crc32)
    zeros = whole - data.nbytes
    crc = checksum.crc32c_zeros(zeros, checksum.chain(blocks, data.nbytes))
    for at in range(0, zeros, checksum.BLOCK):
        crc32 = zip_archive.archive_crc32(memoryview(_ZEROS)[: zeros - at], crc32)
    trailer = crc.to_bytes(CHECKSUM_BYTES, "little")
    return np.array(blocks, "<u4").tobytes(), trailer, zip_archive.archive_crc32(trailer, crc32)
