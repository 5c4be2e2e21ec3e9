"""CRC-32C: of bytes, of blocks, of zeros, and of two pieces put together.

Contract: every function agrees with the plain definition (Castagnoli polynomial, reflected, inverted
before and after), whatever the split into pieces. The hashing itself runs without the GIL and reads
the caller's memory in place. Legend: a *block* is :data:`BLOCK` bytes, the last one of a chunk less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from awscrt import checksums

from gockpt.errors import ChunkCorrupt

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt
    from typing_extensions import Buffer

__all__ = [
    "BLOCK",
    "block_count",
    "chain",
    "combine",
    "crc32c",
    "crc32c_blocks",
    "crc32c_zeros",
    "expect_blocks",
    "expect_checksum",
]

BLOCK = 1 << 20
"""Bytes that one entry of the block checksums covers."""


def crc32c(data: Buffer, value: int = 0) -> int:
    """Return the checksum of ``data``, continuing from ``value``, the checksum of what precedes it.

    Examples:
        >>> hex(crc32c(b"123456789"))
        '0xe3069283'
        >>> crc32c(b"6789", crc32c(b"12345")) == crc32c(b"123456789")
        True
    """
    result: int = checksums.crc32c(data, value)
    return result


def combine(first: int, second: int, second_nbytes: int) -> int:
    """Return the checksum of two pieces put together, from theirs and the second one's length.

    Examples:
        >>> combine(crc32c(b"12345"), crc32c(b"6789"), 4) == crc32c(b"123456789")
        True
    """
    result: int = checksums.combine_crc32c(first, second, second_nbytes)
    return result


def crc32c_zeros(nbytes: int, value: int = 0) -> int:
    """Return the checksum of ``nbytes`` zero bytes, continuing from ``value``; reads no memory.

    Examples:
        >>> crc32c_zeros(5, crc32c(b"ab")) == crc32c(b"ab" + bytes(5))
        True
    """
    # Double the run of zeros bit by bit: some thirty combinations for a gigabyte.
    power, power_nbytes = crc32c(b"\0"), 1
    while nbytes:
        if nbytes & 1:
            value = combine(value, power, power_nbytes)
        nbytes >>= 1
        power, power_nbytes = combine(power, power, power_nbytes), power_nbytes * 2
    return value


def block_count(nbytes: int) -> int:
    """Return how many blocks ``nbytes`` bytes have; the last may be shorter."""
    return -(-nbytes // BLOCK)


def crc32c_blocks(data: memoryview) -> npt.NDArray[np.uint32]:
    """Return the checksum of every block of ``data``, a contiguous view of bytes; little-endian."""
    nbytes = data.nbytes
    return np.array([crc32c(data[at : at + BLOCK]) for at in range(0, nbytes, BLOCK)], dtype="<u4")


def expect_blocks(
    views: Iterable[npt.NDArray[np.uint8]],
    known: Sequence[int] | npt.NDArray[np.uint32],
    *,
    where: str,
    start: int = 0,
) -> None:
    """Compare each block of a file's bytes with its checksum.

    Args:
        views: Whole blocks, one behind the other, whatever the split; only the very last may be shorter.
        known: Their checksums, in order, perhaps of more blocks.
        where: The file's path.
        start: Where in the file the first block begins.

    Raises:
        ChunkCorrupt: If one differs.
    """
    value = filled = index = 0

    def compare() -> None:
        if value != known[index]:
            at = start + index * BLOCK
            msg = f"{where}: the bytes from {at} on differ from the checksum of their block"
            raise ChunkCorrupt(msg)

    for view in views:
        at = 0
        while at < view.nbytes:
            n = min(BLOCK - filled, view.nbytes - at)
            value = crc32c(view[at : at + n].data, value)
            at += n
            filled += n
            if filled == BLOCK:
                compare()
                value, filled, index = 0, 0, index + 1
    if filled:
        compare()


def expect_checksum(stored: Buffer, value: int, *, where: str) -> None:
    """Compare the checksum at the end of a chunk file with that of all that stands before it.

    Raises:
        ChunkCorrupt: If it differs.
    """
    own = int.from_bytes(memoryview(stored).tobytes(), "little")
    if own != value:
        msg = f"{where}: its own checksum is {own:08x} instead of {value:08x}"
        raise ChunkCorrupt(msg)


def chain(blocks: Iterable[int], nbytes: int) -> int:
    """Return the checksum of ``nbytes`` bytes from the checksums of their blocks."""
    value, left = 0, nbytes
    for block in blocks:
        value = combine(value, int(block), min(BLOCK, left))
        left -= min(BLOCK, left)
    return value
