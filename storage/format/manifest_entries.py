"""Entries of the manifest for one file and for one array, and the sizes that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from gockpt.core.arena_layout import CHECKSUM_BYTES
from gockpt.storage.format import checksum
from gockpt.storage.format.chunk_grid import chunk_key, chunked_layout

if TYPE_CHECKING:
    from gockpt.core.arena_layout import ArrayLayout
    from gockpt.core.array_spec import ArraySpec
    from gockpt.storage.format.codecs import Coded

__all__ = ["ArrayEntry", "FileEntry"]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file that the manifest lists with its checksum.

    Attributes:
        path: Relative to the checkpoint's directory.
        size: Its exact length.
        crc32c: Of all its bytes.
    """

    path: str
    size: int
    crc32c: int


@dataclass(frozen=True, slots=True)
class ArrayEntry:
    """One stored array.

    Attributes:
        spec: Name, global shape and dtype.
        path: Its directory, relative to the checkpoint's; equals the escaped name.
        chunk_shape: Shape of a whole chunk; only dimension 0 is ever cut.
        meta: Its ``zarr.json``.
        coded: Encoding of its chunks; ``None``: raw.
        at: Offset of each chunk's data in the archive; ``None``: chunks are files of their own.
    """

    spec: ArraySpec
    path: str
    chunk_shape: tuple[int, ...]
    meta: FileEntry
    coded: Coded | None = None
    at: tuple[int, ...] | None = None

    @property
    def chunks(self) -> int:
        """Number of chunk files; 0 for an array without elements."""
        return _chunk_count(self.spec.shape, self.chunk_shape)

    @property
    def codec(self) -> str | None:
        """Codec of its chunks; ``None``: raw."""
        return None if self.coded is None else self.coded.codec

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of one whole chunk, padding included, decoded."""
        return math.prod(self.chunk_shape) * self.spec.itemsize

    @property
    def nbytes(self) -> int:
        """Length of all chunk files together."""
        if self.coded is not None:
            return sum(self.coded.nbytes) + self.chunks * CHECKSUM_BYTES
        return self.chunks * (self.chunk_nbytes + CHECKSUM_BYTES)

    def file_nbytes(self, chunk: int) -> int:
        """Return the length of a chunk's file: the whole or encoded chunk, and its checksum."""
        content = self.chunk_nbytes if self.coded is None else self.coded.nbytes[chunk]
        return content + CHECKSUM_BYTES

    def covered_nbytes(self, chunk: int) -> int:
        """Return the bytes of a chunk's file with block checksums: its real rows, or the encoded chunk."""
        if self.coded is not None:
            return self.coded.nbytes[chunk]
        return min(self.chunk_nbytes, self.spec.nbytes - chunk * self.chunk_nbytes)

    def first_block(self, chunk: int) -> int:
        """Return the number of blocks before ``chunk``; after the last chunk, the number of all."""
        if self.coded is not None:
            return self.coded.first_blocks[chunk]
        before = min(chunk, max(0, self.chunks - 1))
        last = checksum.block_count(self.covered_nbytes(before)) if chunk > before else 0
        return before * checksum.block_count(self.chunk_nbytes) + last

    @property
    def block_count(self) -> int:
        """Number of this array's entries in the block checksums."""
        if self.coded is not None:
            return self.first_block(self.chunks)
        return _raw_block_count(self.spec.shape, self.chunk_shape, self.spec.itemsize)

    def layout(self) -> ArrayLayout:
        """Return the geometry of its chunks; slot offsets count from 0."""
        return chunked_layout(self.spec, self.chunk_shape)

    def chunk_path(self, chunk: int) -> str:
        """Return the path of one chunk file, relative to the checkpoint's directory."""
        return f"{self.path}/{chunk_key(chunk, len(self.chunk_shape))}"


# The same for all arrays of a shape, of which a model has few.
@lru_cache(maxsize=1024)
def _chunk_count(shape: tuple[int, ...], chunk_shape: tuple[int, ...]) -> int:
    if not math.prod(shape):
        return 0
    return -(-shape[0] // chunk_shape[0]) if shape else 1


@lru_cache(maxsize=1024)
def _raw_block_count(shape: tuple[int, ...], chunk_shape: tuple[int, ...], itemsize: int) -> int:
    chunk_nbytes, nbytes = math.prod(chunk_shape) * itemsize, math.prod(shape) * itemsize
    whole = max(0, _chunk_count(shape, chunk_shape) - 1)
    return whole * checksum.block_count(chunk_nbytes) + checksum.block_count(nbytes - whole * chunk_nbytes)
