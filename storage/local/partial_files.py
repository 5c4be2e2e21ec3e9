"""Protocol of the files of one checkpoint that is being written, in a directory or in an archive.

Contract for every backend: files are written under relative paths of plain components, each once, from
several threads; after :meth:`PartialFiles.sync` all of them are written, and after
:meth:`PartialFiles.complete` they and the manifest are on the disk. Every error is a
:class:`~gockpt.errors.StorageError` that names the file; after one, nothing may be written or synced again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gockpt.core.arena_layout import ArrayLayout, Slot

__all__ = ["Chunk", "PartialFiles", "StoredChunk"]


class Chunk(NamedTuple):
    """A chunk to be written as it lies in its arena slot.

    Attributes:
        path: The chunk's file, whose array's document was written before.
        layout: The chunk's array.
        slot: Which of its chunks.
        buffer: The whole slot, writable bytes; what lies behind the real rows is overwritten.
    """

    path: str
    layout: ArrayLayout
    slot: Slot
    buffer: memoryview


class StoredChunk(NamedTuple):
    """A chunk that was written and not yet synced.

    Attributes:
        blocks: crc32c of each block of its real or encoded bytes, each as four bytes, little-endian.
        nbytes: Bytes of the file that were written, padding excluded.
        at: Where its bytes begin in the archive; ``None`` in a directory.
    """

    blocks: bytes
    nbytes: int
    at: int | None = None


class PartialFiles(Protocol):
    """The files of one checkpoint that is being written."""

    def write_chunks(self, chunks: Sequence[Chunk]) -> list[StoredChunk]:
        """Write chunks, and behind each its checksum."""

    def write_encoded(self, path: str, data: bytes) -> StoredChunk:
        """Write an encoded chunk, and its checksum behind it."""

    def write_document(self, path: str, data: bytes) -> None:
        """Write a file that is no chunk; the directory that it lies in is made if need be."""

    def replace_document(self, path: str, data: bytes) -> None:
        """Write other bytes into a document that was written before."""

    def sync(self) -> None:
        """Make all that was written durable, or leave that to :meth:`complete`."""

    def complete(self, manifest: bytes) -> None:
        """Write the manifest, the mark that all the rest is there, and make it durable."""

    def close(self) -> None:
        """Close all files without syncing them."""
