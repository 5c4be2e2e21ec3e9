"""Read chunks that are encoded: each is read whole, checked, and decoded at once.

Promise: with checksums at hand, nothing is decoded but bytes that agree with them; a chunk that is decoded
has exactly the size of a whole chunk. Memory beside the target stays within one chunk, encoded and decoded,
per thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gockpt.core.arena_layout import CHECKSUM_BYTES
from gockpt.storage.format.checksum import chain, expect_blocks, expect_checksum
from gockpt.storage.format.codecs import decode, expect_nbytes

if TYPE_CHECKING:
    import numpy.typing as npt

    from gockpt.storage.format.codecs import Coded
    from gockpt.storage.format.manifest_entries import ArrayEntry
    from gockpt.storage.read.location import File

__all__ = ["read_chunk"]


def read_chunk(
    file: File,
    entry: ArrayEntry,
    coded: Coded,
    chunk: int,
    crcs: npt.NDArray[np.uint32] | None,
    out: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.uint8]:
    """Return a whole chunk, padding included, decoded.

    Args:
        file: Its file, of the length that the manifest says.
        entry: Its array.
        coded: How that is encoded.
        chunk: Which of its chunks.
        crcs: The block checksums of the array; ``None``: only what the codec itself notices is noticed.
        out: Where to put it: 1-D ``uint8``, C-contiguous, of a whole chunk; new memory by default.

    Raises:
        ChunkCorrupt: If bytes differ from their checksums, or are no such chunk.
    """
    data = np.empty(entry.file_nbytes(chunk), np.uint8)
    file.read_into([data.data], 0)
    content = data[:-CHECKSUM_BYTES]
    if crcs is not None:
        own = crcs[coded.first_blocks[chunk] : coded.first_blocks[chunk + 1]].tolist()
        expect_blocks([content], own, where=file.path)
        expect_checksum(data[-CHECKSUM_BYTES:].data, chain(own, content.nbytes), where=file.path)
    # Before memory is taken for what it claims to hold.
    expect_nbytes(coded.codec, content, entry.chunk_nbytes, where=file.path)
    whole = np.empty(entry.chunk_nbytes, np.uint8) if out is None else out
    decode(coded.codec, content, whole, where=file.path)
    return whole
