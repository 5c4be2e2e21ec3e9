"""Records of an archive: a checkpoint as one ZIP file of stored entries.

Contract: pure, no I/O. An entry has less than 2**31 bytes, so only the offsets of local headers need ZIP64
fields. The same arguments always give the same bytes, and the parsers accept only those: whoever compares a
record with the one made here notices every flipped bit. Names are given as ASCII text. The order of the
entries, and all else that an archive promises, is in docs/format.md.
"""

from __future__ import annotations

import functools
import logging
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gockpt.errors import CheckpointCorrupt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Buffer

__all__ = [
    "CENTRAL_CRC_AT",
    "END_NBYTES",
    "LOCAL_CRC_AT",
    "LOCAL_HEADER_NBYTES",
    "MAX_ENTRY_NBYTES",
    "MAX_PADDING_NBYTES",
    "MAX_RECORD_NBYTES",
    "TAIL_NBYTES",
    "CentralEntry",
    "Tail",
    "alignment",
    "archive_crc32",
    "central_record",
    "central_record_nbytes",
    "end_records",
    "find_entry",
    "is_end",
    "local_header",
    "parse_directory",
    "parse_tail",
    "place",
]

_log = logging.getLogger("gockpt")

MAX_ENTRY_NBYTES = 2**31 - 1
"""Longest entry; tensorstore skips longer ones, and then reads zeros."""
_ALIGNMENT = 4096
_ALIGNMENT_SMALL = 64
_ALIGNED_FROM = 64 << 10

LOCAL_HEADER_NBYTES = 30
"""Bytes of a local header before the name and the padding."""
LOCAL_CRC_AT = 14
"""Offset of the CRC-32 in a local header: four bytes, little-endian."""
CENTRAL_CRC_AT = 16
"""Offset of the CRC-32 in a central record: four bytes, little-endian."""
MAX_PADDING_NBYTES = _ALIGNMENT + 5

_LAST_NAME = "gockpt.json"
_LAST_NAME_BYTES = _LAST_NAME.encode()
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_OFFSET64 = struct.Struct("<2HQ")
_PADDING = struct.Struct("<3H")
_PADDING_ID = 0xD935  # as written by zipalign: the alignment in two bytes, then zeros
_VERSION = 45  # of the first ZIP specification with ZIP64
_MADE_BY = 3 << 8 | _VERSION  # 3: Unix, so that the mode below is heeded
_DATE = 1 << 5 | 1  # 1980-01-01, the first day that a ZIP can name
_MODE = 0o100644 << 16
_FULL = 0xFFFFFFFF
_CENTRAL_MARK = b"PK\1\2"
_CENTRAL_BEGIN = (_CENTRAL_MARK, _MADE_BY, _VERSION, 0, 0, 0, _DATE)
_SHORT = struct.Struct("<H")

MAX_RECORD_NBYTES = _CENTRAL.size + _OFFSET64.size
"""Most bytes of a central record beside the name."""

_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_END = struct.Struct("<4s4H2LH")
END_NBYTES = _END64.size + _LOCATOR.size + _END.size
"""Length of the three end records: 98."""
_LAST_NBYTES = _CENTRAL.size + len(_LAST_NAME) + _OFFSET64.size
TAIL_NBYTES = _LAST_NBYTES + END_NBYTES
"""Length of the central record of ``gockpt.json`` (69) and the end records together."""


@dataclass(frozen=True, slots=True)
class CentralEntry:
    """One entry, as in the central directory.

    Attributes:
        name: Path inside the checkpoint.
        nbytes: Length of its data.
        crc32: CRC-32 of its data.
        header_at: Offset of its local header.
    """

    name: str
    nbytes: int
    crc32: int
    header_at: int


@dataclass(frozen=True, slots=True)
class Tail:
    """End of an archive: the last central record and the end records.

    Attributes:
        entries: Number of entries.
        directory_at: Offset of the central directory.
        directory_nbytes: Its length.
        manifest: Entry of ``gockpt.json``.
        manifest_at: Offset of the data of ``gockpt.json``.
    """

    entries: int
    directory_at: int
    directory_nbytes: int
    manifest: CentralEntry
    manifest_at: int


@functools.cache
def _crc32() -> Callable[[Buffer, int], int]:
    try:
        from isal.isal_zlib import crc32
    except ImportError:
        _log.info("CRC-32 by zlib: with the package isal, archives are written and verified faster")
        return zlib.crc32
    found: Callable[[Buffer, int], int] = crc32
    return found


def archive_crc32(data: Buffer, crc: int = 0) -> int:
    """Return ZIP's CRC-32 of ``data``, continuing from ``crc``, the CRC-32 of what precedes it.

    Examples:
        >>> hex(archive_crc32(b"123456789"))
        '0xcbf43926'
    """
    return _crc32()(data, crc)


def alignment(nbytes: int) -> int:
    """Return the alignment of the data of a chunk's entry: 4096 from 64 KiB on, below that 64.

    Args:
        nbytes: Length of the chunk's file, its checksum included.
    """
    return _ALIGNMENT if nbytes >= _ALIGNED_FROM else _ALIGNMENT_SMALL


def place(at: int, name_nbytes: int, nbytes: int, *, aligned: bool) -> tuple[int, int]:
    """Return the padding of a local header at ``at``, and the offset of the data behind it.

    Args:
        at: Offset of the local header.
        name_nbytes: Length of the name.
        nbytes: Length of the data.
        aligned: Whether to align the data: chunks are, documents are not.

    Examples:
        >>> place(0, 16, 70_000, aligned=True)
        (4050, 4096)
        >>> place(0, 30, 300, aligned=True)  # padding takes at least 6 bytes
        (68, 128)
        >>> place(0, 34, 300, aligned=True), place(0, 16, 300, aligned=False)
        ((0, 64), (0, 46))
    """
    end = at + LOCAL_HEADER_NBYTES + name_nbytes
    if not aligned:
        return 0, end
    step = alignment(nbytes)
    padding = -end % step
    if 0 < padding < _PADDING.size:
        padding += step
    return padding, end + padding


def local_header(name: str, nbytes: int, crc32: int, padding: int) -> bytes:
    """Return a local header with the name and the padding: what stands in front of the data.

    The CRC-32 is at :data:`LOCAL_CRC_AT`, whatever the name: it can be written there later.

    Args:
        name: Path inside the checkpoint.
        nbytes: Length of the data.
        crc32: CRC-32 of the data.
        padding: As returned by :func:`place`.
    """
    encoded = name.encode("ascii")
    fixed = (b"PK\3\4", _VERSION, 0, 0, 0, _DATE, crc32, nbytes, nbytes, len(encoded), padding)
    header = _LOCAL.pack(*fixed) + encoded
    if not padding:
        return header
    extra = _PADDING.pack(_PADDING_ID, padding - 4, alignment(nbytes))
    return header + extra + bytes(padding - len(extra))


def central_record(name: str, nbytes: int, crc32: int, header_at: int) -> bytes:
    """Return the record of one entry in the central directory.

    The CRC-32 is at :data:`CENTRAL_CRC_AT`, whatever the name: it can be written there later.

    Args:
        name: Path inside the checkpoint.
        nbytes: Length of the data.
        crc32: CRC-32 of the data.
        header_at: Offset of the local header.
    """
    encoded = name.encode("ascii")
    wide = header_at >= _FULL or name == _LAST_NAME
    offset, extra = (_FULL, _OFFSET64.pack(1, 8, header_at)) if wide else (header_at, b"")
    lengths = (nbytes, nbytes, len(encoded), len(extra))
    return _CENTRAL.pack(*_CENTRAL_BEGIN, crc32, *lengths, 0, 0, 0, _MODE, offset) + encoded + extra


def central_record_nbytes(name: str, header_at: int) -> int:
    """Return the length of :func:`central_record` for that name and offset."""
    wide = header_at >= _FULL or name == _LAST_NAME
    return _CENTRAL.size + len(name) + (_OFFSET64.size if wide else 0)


def end_records(entries: int, directory_at: int, directory_nbytes: int) -> bytes:
    """Return what stands behind the central directory: ZIP64 end record, its locator, and end record.

    The end record repeats the numbers that fit there: programs that don't know ZIP64 read small archives.

    Args:
        entries: Number of entries.
        directory_at: Offset of the central directory.
        directory_nbytes: Its length.
    """
    numbers = (entries, entries, directory_nbytes, directory_at)
    end64 = _END64.pack(b"PK\6\6", _END64.size - 12, _MADE_BY, _VERSION, 0, 0, *numbers)
    locator = _LOCATOR.pack(b"PK\6\7", 0, directory_at + directory_nbytes, 1)
    few = min(entries, 0xFFFF)
    end = _END.pack(b"PK\5\6", 0, 0, few, few, min(directory_nbytes, _FULL), min(directory_at, _FULL), 0)
    return end64 + locator + end


def is_end(data: bytes) -> bool:
    """Return whether the last bytes of a file look like those of a ZIP without a comment."""
    return data[-_END.size :][:4] == b"PK\5\6"


def parse_tail(data: bytes, file_nbytes: int, *, where: str) -> Tail:
    """Return what the last :data:`TAIL_NBYTES` of an archive say.

    All offsets and lengths of the result lie inside the file.

    Args:
        data: The last bytes of the file, :data:`TAIL_NBYTES` of them.
        file_nbytes: Length of the whole file.
        where: Its path, for messages.

    Raises:
        CheckpointCorrupt: If the file does not end as an archive of gockpt's does.
    """
    if len(data) != TAIL_NBYTES:
        msg = (
            f"{where} has {len(data)} bytes at its end instead of {TAIL_NBYTES}: it is cut off, or no archive"
        )
        raise CheckpointCorrupt(msg)
    last, end = data[:_LAST_NBYTES], data[_LAST_NBYTES:]
    *_, entries, nbytes, at = _END64.unpack_from(end)
    start = file_nbytes - END_NBYTES
    if not (
        _LAST_NBYTES <= nbytes <= start and at == start - nbytes and 0 < entries <= nbytes // _CENTRAL.size
    ):
        msg = f"{where} doesn't end with the end records of a ZIP: it is cut off, or damaged, or no archive"
        raise CheckpointCorrupt(msg)
    if end_records(entries, at, nbytes) != end:
        msg = f"{where}: the end records of the ZIP are damaged, or another program wrote them"
        raise CheckpointCorrupt(msg)
    if last[_CENTRAL.size :][: len(_LAST_NAME)] != _LAST_NAME_BYTES:
        msg = f"{where}: {_LAST_NAME} is not the last entry of the ZIP"
        raise CheckpointCorrupt(msg)
    (found,) = _records(last, 1, where)
    manifest_at = found.header_at + LOCAL_HEADER_NBYTES + len(_LAST_NAME)
    if manifest_at + found.nbytes != at:
        msg = f"{where}: {_LAST_NAME} does not end where the central directory begins"
        raise CheckpointCorrupt(msg)
    return Tail(entries, at, nbytes, found, manifest_at)


def parse_directory(data: Buffer, tail: Tail, *, where: str) -> list[CentralEntry]:
    """Return the entries in a central directory, in its order; no name occurs twice.

    Args:
        data: The whole central directory.
        tail: End of the archive.
        where: Path of the archive, for messages.

    Raises:
        CheckpointCorrupt: If a record is not one of :func:`central_record`'s, if there are more or fewer,
            or if an entry reaches beyond the data of ``gockpt.json``.
    """
    found = list(_records(bytes(data), tail.entries, where))
    if len({entry.name for entry in found}) != len(found):
        msg = f"{where}: a name occurs twice in the central directory"
        raise CheckpointCorrupt(msg)
    limit = tail.manifest.header_at
    for entry in found[:-1]:
        if entry.header_at + LOCAL_HEADER_NBYTES + len(entry.name) + entry.nbytes > limit:
            msg = f"{where}: the entry {entry.name!r} reaches beyond the last entry"
            raise CheckpointCorrupt(msg)
    if found[-1] != tail.manifest:
        msg = f"{where}: {_LAST_NAME} is not the last entry of the ZIP"
        raise CheckpointCorrupt(msg)
    return found


def find_entry(data: bytes, name: str) -> CentralEntry | None:
    """Return the last entry of a name in a central directory, without a look at the others' records.

    Returns:
        The entry, or ``None`` if there is none of that name.

    Raises:
        CheckpointCorrupt: If its record is not one of :func:`central_record`'s.
    """
    encoded = name.encode("ascii", "replace")
    length = _SHORT.pack(len(encoded))
    name_at = len(data)
    while encoded and (name_at := data.rfind(encoded, 0, name_at)) >= 0:
        at = name_at - _CENTRAL.size
        if at >= 0 and data[at : at + 4] == _CENTRAL_MARK and data[at + 28 : at + 30] == length:
            return _record(data, at)[0]
        name_at += len(encoded) - 1
    return None


def _records(data: bytes, entries: int, where: str) -> Iterator[CentralEntry]:
    """Yield the entries of so many central records, which must fill the data."""
    at = 0
    for index in range(entries):
        try:
            entry, at = _record(data, at)
        except CheckpointCorrupt as error:
            msg = f"{where}: record {index} of the central directory: {error}"
            raise CheckpointCorrupt(msg) from error
        yield entry
    if at != len(data):
        msg = f"{where}: the central directory is longer than its {entries} records"
        raise CheckpointCorrupt(msg)


def _record(data: bytes, at: int) -> tuple[CentralEntry, int]:
    """Return the entry of the central record at an offset, and where the next one begins.

    Raises:
        CheckpointCorrupt: If it is not one of :func:`central_record`'s.
    """
    name_at = at + _CENTRAL.size
    if name_at <= len(data):
        fields = _CENTRAL.unpack_from(data, at)
        crc32, nbytes, whole, name_nbytes, extra_nbytes = fields[7:12]
        header_at = fields[16]
        extra_at = name_at + name_nbytes
        stop = extra_at + extra_nbytes
        raw = data[name_at:extra_at]
        is_wide = extra_nbytes > 0
        if is_wide and extra_nbytes == _OFFSET64.size and stop <= len(data):
            wide = _OFFSET64.unpack_from(data, extra_at)
            is_right = header_at == _FULL and wide[:2] == (1, 8)
            header_at = wide[2]
        else:
            is_right = not is_wide and stop <= len(data)
        if (
            is_right
            and is_wide == (header_at >= _FULL or raw == _LAST_NAME_BYTES)
            and fields[:7] == _CENTRAL_BEGIN
            and fields[12:16] == (0, 0, 0, _MODE)
            and nbytes == whole <= MAX_ENTRY_NBYTES
            and raw.isascii()
        ):
            return CentralEntry(raw.decode("ascii"), nbytes, crc32, header_at), stop
    msg = "it is damaged, or another program wrote it"
    raise CheckpointCorrupt(msg)
