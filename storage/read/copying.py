"""Bytes of a checkpoint, checked as they are read, for copies: its files but the manifest, or its archive.

Promise: no byte is handed out that does not agree with the manifest, block by block. Memory stays within one
piece for each chunk that is being read, whatever its size.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from gockpt.core.arena_layout import CHECKSUM_BYTES
from gockpt.errors import CheckpointCorrupt, CheckpointPruned, ChunkCorrupt
from gockpt.storage.format.checksum import BLOCK, block_count, chain, crc32c, crc32c_zeros, expect_blocks
from gockpt.storage.format.manifest import BLOCKS_FILE, MANIFEST_FILE, parse
from gockpt.storage.format.zip_archive import archive_crc32
from gockpt.storage.read.location import GONE, MAX_MANIFEST_BYTES, read_document, read_small
from gockpt.storage.read.read_execute import Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import numpy.typing as npt

    from gockpt.storage.format.manifest_entries import FileEntry
    from gockpt.storage.read.archive_files import ArchiveFiles
    from gockpt.storage.read.checkpoint import StoredCheckpoint
    from gockpt.storage.read.location import Files

__all__ = ["PIECE", "StoredFile", "archive_pieces", "chunk_files", "document_files"]

PIECE = 8 * BLOCK
"""Bytes that are read and handed out at once."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of a checkpoint.

    Attributes:
        path: Relative to the checkpoint.
        nbytes: Its size.
        crc: Its crc32c, which follows from the manifest: nothing is read for it.
        data: Gives its bytes, checked; in pieces if there are more than one piece of them.
    """

    path: str
    nbytes: int
    crc: int
    data: Callable[[], bytes | Iterator[bytearray]]

    def pieces(self) -> Iterator[bytes | bytearray]:
        """Yield its bytes, checked, in order."""
        data = self.data()
        yield from [data] if isinstance(data, bytes) else data

    def whole(self) -> bytes:
        """Return all its bytes, checked."""
        return b"".join(self.pieces())


def chunk_files(stored: StoredCheckpoint, verb: str) -> Iterator[StoredFile]:
    """Yield every chunk's file, in the order of the manifest.

    Args:
        stored: The checkpoint; it must not be closed meanwhile.
        verb: Past participle for messages, such as "uploaded".

    Raises:
        CheckpointCorrupt: If the checkpoint is damaged; when its data is asked for, too.
        CheckpointPruned: If the checkpoint was removed meanwhile.
    """
    manifest, files = stored.manifest, stored.files
    with _explained(files, stored.path, verb):
        _read_manifest(stored)
        crcs = np.frombuffer(read_document(files, manifest.file(BLOCKS_FILE)), "<u4")
    for entry, first in zip(manifest.arrays, manifest.first_blocks(), strict=False):
        source = Source(files, entry, None)
        for chunk in range(entry.chunks):
            nbytes, real = entry.file_nbytes(chunk), entry.covered_nbytes(chunk)
            at = first + entry.first_block(chunk)
            known = crcs[at : at + block_count(real)]
            content = crc32c_zeros(nbytes - CHECKSUM_BYTES - real, chain(known.tolist(), real))
            own = content.to_bytes(CHECKSUM_BYTES, "little")
            explained = partial(_explained, files, stored.path, verb)
            data = partial(_chunk_data, source, chunk, known, own, explained)
            yield StoredFile(entry.chunk_path(chunk), nbytes, crc32c(own, content), data)


def document_files(stored: StoredCheckpoint, verb: str) -> Iterator[StoredFile]:
    """Yield every other file but the manifest: arrays' documents, then those of groups, state, checksums."""
    manifest = stored.manifest
    for file in (*(entry.meta for entry in manifest.arrays), *manifest.files):
        data = partial(_file_data, stored.files, stored.path, verb, file)
        yield StoredFile(file.path, file.size, file.crc32c, data)


def archive_pieces(stored: StoredCheckpoint, archive: ArchiveFiles, verb: str) -> Iterator[bytes | bytearray]:
    """Yield all bytes of an archive, in order, in pieces of any length.

    Beside what the manifest says, each entry is compared with its local header, padding and CRC-32.

    Args:
        stored: The checkpoint; it must not be closed meanwhile.
        archive: Its files.
        verb: Past participle for messages, such as "uploaded".

    Raises:
        CheckpointCorrupt: If a byte is not as it was written; before the archive's end is yielded.
        CheckpointPruned: If the checkpoint was removed meanwhile.
    """
    explained = partial(_explained, archive, stored.path, verb)
    known = {file.path: file for file in (*document_files(stored, verb), *chunk_files(stored, verb))}
    with explained():
        for fault in archive.faults():
            raise CheckpointCorrupt(fault)
        whole, entries, end = _read_manifest(stored), archive.entries(), archive.end()
    known[MANIFEST_FILE] = StoredFile(MANIFEST_FILE, len(whole), crc32c(whole), lambda: whole)
    for entry, start in entries:
        with explained():
            file = known.get(entry.name)
            if file is None or file.nbytes != entry.nbytes:
                msg = f"{entry.name}: the central directory and the manifest say different files or lengths"
                raise CheckpointCorrupt(msg)
            header = archive.header(entry, start)
        yield header
        crc32 = 0
        for piece in file.pieces():
            crc32 = archive_crc32(piece, crc32)
            yield piece
        if crc32 != entry.crc32:
            with explained():
                msg = f"{entry.name}: its CRC-32 is {crc32:08x}, the ZIP says {entry.crc32:08x}"
                raise CheckpointCorrupt(msg)
    yield end


def _read_manifest(stored: StoredCheckpoint) -> bytes:
    """Return the manifest's file, which must say what it said when the checkpoint was opened."""
    whole = read_small(stored.files, MANIFEST_FILE, limit=MAX_MANIFEST_BYTES)
    if parse(whole, where=f"{stored.path}/{MANIFEST_FILE}") != stored.manifest:
        msg = f"{stored.path}: its manifest is not the one it was opened with"
        raise CheckpointCorrupt(msg)
    return whole


def _file_data(files: Files, path: str, verb: str, file: FileEntry) -> bytes:
    with _explained(files, path, verb):
        return read_document(files, file)


def _chunk_data(
    source: Source,
    chunk: int,
    known: npt.NDArray[np.uint32],
    own: bytes,
    explained: Callable[[], AbstractContextManager[None]],
) -> bytes | Iterator[bytearray]:
    """Return a chunk file's bytes, as a whole if they are few."""
    pieces = _chunk_pieces(source, chunk, known, own, explained)
    return b"".join(pieces) if source.entry.file_nbytes(chunk) <= PIECE else pieces


def _chunk_pieces(
    source: Source,
    chunk: int,
    known: npt.NDArray[np.uint32],
    own: bytes,
    explained: Callable[[], AbstractContextManager[None]],
) -> Iterator[bytearray]:
    """Yield a chunk file's bytes, each piece once it agrees with the manifest."""
    real, whole = source.entry.covered_nbytes(chunk), source.entry.file_nbytes(chunk)
    with explained(), source.open(chunk) as file:
        for start in range(0, whole, PIECE):
            data = bytearray(min(PIECE, whole - start))
            file.read_into([memoryview(data)], start)
            piece = np.frombuffer(data, np.uint8)
            rows, behind = piece[: max(0, real - start)], piece[max(0, real - start) :]
            expect_blocks([rows], known[start // BLOCK :], where=file.path, start=start)
            # What stands behind the rows: zeros, then the chunk's own checksum.
            first = max(start, real)
            padding = behind[: max(0, whole - CHECKSUM_BYTES - first)]
            checksum = behind[padding.nbytes :].tobytes()
            at = first + padding.nbytes - (whole - CHECKSUM_BYTES)
            if padding.any() or checksum != own[at : at + len(checksum)]:
                msg = f"{file.path}: the padding or the checksum behind its {real} bytes is wrong"
                raise ChunkCorrupt(msg)
            yield data


@contextmanager
def _explained(files: Files, path: str, verb: str) -> Iterator[None]:
    """Turn what goes wrong with the checkpoint's own files into an error that says what it means."""
    try:
        yield
    except CheckpointCorrupt as error:
        msg = f"{error} (in {path}); it was not {verb}"
        raise type(error)(msg) from error
    except OSError as error:
        if error.errno not in GONE:
            raise
        if files.is_gone():
            msg = f"{path} was removed before it was {verb}"
            raise CheckpointPruned(msg) from error
        msg = f"{error.filename or 'a file'} is missing (in {path}); it was not {verb}"
        raise ChunkCorrupt(msg) from error
