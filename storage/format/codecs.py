"""Codecs of whole chunks: their names in Zarr, encoding and decoding.

Promise: every codec here is read by zarr-python, zarrs and tensorstore; :func:`decode` returns the bytes that
:func:`encode` was given or raises, and never writes outside the target, whatever its input: the size that
encoded bytes state is compared with the expected one before anything is decoded. Both release the GIL while
they work.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from gockpt.errors import ChunkCorrupt
from gockpt.storage.format.checksum import block_count

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "CODECS",
    "MAX_CHUNK_NBYTES",
    "Coded",
    "decode",
    "encode",
    "expect_nbytes",
    "most_nbytes",
    "zarr_codec",
]

CODECS = ("zstd", "blosc")
"""Every codec that is ever written, and read. A name stands for one set of parameters, for good."""

MAX_CHUNK_NBYTES = 1 << 28
"""Larger chunks are stored raw: a reader holds a whole one in memory to decode it."""

_LEVEL = 1
_BITSHUFFLE_UP_TO = 4
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_HEADER_NBYTES = 18
_BLOSC_HEADER = struct.Struct("<4BIII")
_BLOSC_RAW, _BLOSC_ZSTD = 2, 4


@dataclass(frozen=True, slots=True)
class Coded:
    """Encoding of the chunks of one array.

    Attributes:
        codec: One of :data:`CODECS`.
        nbytes: Encoded length of each chunk, without its checksum.
        first_blocks: Index of each chunk's first block among the array's blocks; at the end their number.
    """

    codec: str
    nbytes: tuple[int, ...]
    first_blocks: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        firsts = tuple(accumulate((block_count(n) for n in self.nbytes), initial=0))
        object.__setattr__(self, "first_blocks", firsts)


def zarr_codec(codec: str, itemsize: int) -> dict[str, Any]:
    """Return a codec's entry in an array's ``zarr.json``.

    blosc sorts the bits of small elements and the bytes of large ones: measured to be smaller on weights and
    moments of training, and on token ids.

    Examples:
        >>> zarr_codec("zstd", 4)
        {'name': 'zstd', 'configuration': {'level': 1, 'checksum': False}}
    """
    if codec == "zstd":
        return {"name": "zstd", "configuration": {"level": _LEVEL, "checksum": False}}
    configuration = {
        "typesize": itemsize,
        "cname": "zstd",
        "clevel": _LEVEL,
        "shuffle": "bitshuffle" if itemsize <= _BITSHUFFLE_UP_TO else "shuffle",
        "blocksize": 0,
    }
    return {"name": "blosc", "configuration": configuration}


def most_nbytes(nbytes: int) -> int:
    """Return the greatest encoded length of ``nbytes`` bytes, a bound for every codec."""
    return nbytes + (nbytes >> 8) + 64


def encode(codec: str, itemsize: int, data: memoryview | npt.NDArray[np.uint8]) -> bytes:
    """Return an encoded chunk; at most :func:`most_nbytes` long, equal for equal data.

    Args:
        codec: One of :data:`CODECS`.
        itemsize: Bytes of one element.
        data: The whole chunk, padding included; C-contiguous, at most :data:`MAX_CHUNK_NBYTES`.
    """
    # Here, so that importing gockpt doesn't import them.
    from numcodecs import blosc, zstd

    if codec == "zstd":
        return bytes(zstd.compress(data, _LEVEL))
    shuffle = blosc.BITSHUFFLE if itemsize <= _BITSHUFFLE_UP_TO else blosc.SHUFFLE
    return bytes(blosc.compress(data, b"zstd", _LEVEL, shuffle, blosc.AUTOBLOCKS, itemsize))


def decode(codec: str, data: npt.NDArray[np.uint8], out: npt.NDArray[np.uint8], *, where: str) -> None:
    """Decode ``data`` into ``out``, which must have exactly the decoded size.

    Args:
        codec: One of :data:`CODECS`.
        data: An encoded chunk, 1-D ``uint8``.
        out: 1-D ``uint8``, C-contiguous, writable.
        where: The chunk's file, for messages.

    Raises:
        ChunkCorrupt: If the bytes aren't such a chunk; ``out`` is undefined then.
    """
    from numcodecs import blosc, zstd

    expect_nbytes(codec, data, out.nbytes, where=where)
    try:
        (zstd if codec == "zstd" else blosc).decompress(data, out)
    except (RuntimeError, ValueError) as error:
        msg = f"{where}: can't be decoded as {codec}: {error}"
        raise ChunkCorrupt(msg) from error


def expect_nbytes(codec: str, data: npt.NDArray[np.uint8], nbytes: int, *, where: str) -> None:
    """Refuse an encoded chunk whose header doesn't state ``nbytes`` as the decoded size.

    Raises:
        ChunkCorrupt: If it states another size, or none.
    """
    stated = _zstd_content(data) if codec == "zstd" else _blosc_content(data)
    if stated != nbytes:
        says = "don't say how many they stand for" if stated is None else f"say they stand for {stated} bytes"
        msg = f"{where}: its {data.nbytes} encoded bytes {says} instead of {nbytes}"
        raise ChunkCorrupt(msg)


def _zstd_content(data: npt.NDArray[np.uint8]) -> int | None:
    """Return the content size that a zstd frame states; see RFC 8878, section 3.1.1.1."""
    head = data[:_ZSTD_HEADER_NBYTES].tobytes()
    if len(head) < 6 or head[:4] != _ZSTD_MAGIC:
        return None
    flags = head[4]
    single, size_flag = flags >> 5 & 1, flags >> 6
    at = 5 + (not single) + (0, 1, 2, 4)[flags & 3]
    length = (single, 2, 4, 8)[size_flag]
    if not length or len(head) < at + length:
        return None
    return int.from_bytes(head[at : at + length], "little") + (256 if length == 2 else 0)


def _blosc_content(data: npt.NDArray[np.uint8]) -> int | None:
    """Return the content size that a blosc buffer of zstd states, if its own stated length is right."""
    if data.nbytes < _BLOSC_HEADER.size:
        return None
    _, _, flags, _, nbytes, _, stored = _BLOSC_HEADER.unpack(data[: _BLOSC_HEADER.size].tobytes())
    whole = stored == data.nbytes and (flags & _BLOSC_RAW or flags >> 5 == _BLOSC_ZSTD)
    return int(nbytes) if whole else None
