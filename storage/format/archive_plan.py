"""Plan of an archive: the place of every entry whose length is known before the first chunk is written.

Contract: pure. Large raw chunks come first and small ones behind them, both in the manifest's order; then
encoded chunks as they are made; then the Zarr documents, the other documents and the manifest. The same
arrays and codecs always give the same plan.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gockpt.core.arena_layout import CHECKSUM_BYTES
from gockpt.storage.format import zip_archive
from gockpt.storage.format.chunk_grid import chunk_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from gockpt.core.arena_layout import ArrayLayout

__all__ = ["ArchivePlan", "Entry", "is_archivable"]

_CRC = struct.Struct("<L")


@dataclass(frozen=True, slots=True)
class Entry:
    """Place of one chunk.

    Attributes:
        index: Its number among the planned chunks.
        header_at: Offset of its local header.
        data_at: Offset of its data.
        header: Its local header, with a CRC-32 of 0.
    """

    index: int
    header_at: int
    data_at: int
    header: bytes

    def sealed(self, crc32: int) -> bytes:
        """Return the local header with the CRC-32 of the data."""
        at = zip_archive.LOCAL_CRC_AT
        return self.header[:at] + _CRC.pack(crc32) + self.header[at + _CRC.size :]


def is_archivable(arrays: Iterable[ArrayLayout]) -> bool:
    """Return whether every chunk is short enough for an entry of an archive."""
    return all(array.chunk_nbytes + CHECKSUM_BYTES <= zip_archive.MAX_ENTRY_NBYTES for array in arrays)


class ArchivePlan:
    """Places of the raw chunks of some arrays, and their Zarr documents.

    Attributes:
        chunks: The place of each raw chunk, by path.
        at: Offsets of the data of each array's chunks, by the array's number; ``None`` for encoded arrays.
        packed_at: Where the last large chunk ends: entries from here on share pages.
        end: Where the last raw chunk ends.
        documents: The Zarr documents with their local headers, one behind the other.
        document_paths: Their paths.
    """

    def __init__(
        self,
        arrays: Sequence[ArrayLayout],
        paths: Sequence[str],
        codecs: Sequence[str | None],
        documents: Sequence[tuple[str, bytes]],
    ) -> None:
        """Find a place for each raw chunk.

        Args:
            arrays: All arrays, in the manifest's order.
            paths: The directory of each.
            codecs: The codec of each; ``None``: raw.
            documents: Path and bytes of every Zarr document but the root's.
        """
        self.chunks: dict[str, Entry] = {}
        offsets: list[list[int]] = [[] for _ in arrays]
        raw = [number for number, codec in enumerate(codecs) if codec is None]
        large = [number for number in raw if _is_large(arrays[number])]
        records: list[bytes] = []
        at = self._place(large, arrays, paths, offsets, records, 0)
        self.packed_at = at
        small = [number for number in raw if not _is_large(arrays[number])]
        self.end = self._place(small, arrays, paths, offsets, records, at)
        self.at = [
            tuple(found) if codec is None else None for found, codec in zip(offsets, codecs, strict=True)
        ]
        lengths = np.array([len(record) for record in records], np.int64)
        self._crc_at = np.cumsum(lengths) - lengths + zip_archive.CENTRAL_CRC_AT
        self._records = b"".join(records)
        self._documents = [(name, len(data), zip_archive.archive_crc32(data)) for name, data in documents]
        self.document_paths = frozenset(name for name, _ in documents)
        pieces: list[bytes] = []
        for (name, nbytes, crc32), (_, data) in zip(self._documents, documents, strict=True):
            pieces += zip_archive.local_header(name, nbytes, crc32, 0), data
        self.documents = b"".join(pieces)
        self._document_records: dict[int, bytes] = {}

    def _place(
        self,
        numbers: Iterable[int],
        arrays: Sequence[ArrayLayout],
        paths: Sequence[str],
        offsets: list[list[int]],
        records: list[bytes],
        at: int,
    ) -> int:
        """Place the chunks of some arrays from an offset on; return where the last one ends."""
        for number in numbers:
            array = arrays[number]
            nbytes = array.chunk_nbytes + CHECKSUM_BYTES
            for slot in array.slots:
                name = f"{paths[number]}/{chunk_key(slot.chunk, len(array.chunk_shape))}"
                padding, data_at = zip_archive.place(at, len(name), nbytes, aligned=True)
                header = zip_archive.local_header(name, nbytes, 0, padding)
                self.chunks[name] = Entry(len(self.chunks), at, data_at, header)
                records.append(zip_archive.central_record(name, nbytes, 0, at))
                offsets[number].append(data_at)
                at = data_at + nbytes
        return at

    def chunk_records(self, crcs: npt.NDArray[np.uint32]) -> bytes:
        """Return the central records of the planned chunks.

        Args:
            crcs: CRC-32 of each chunk, by its number.
        """
        records = np.frombuffer(self._records, np.uint8).copy()
        positions = self._crc_at[:, None] + np.arange(_CRC.size)
        records[positions] = crcs.astype("<u4").view(np.uint8).reshape(-1, _CRC.size)
        return records.tobytes()

    def document_records(self, at: int) -> bytes:
        """Return the central records of the Zarr documents, which are written from ``at`` on."""
        known = self._document_records.get(at)
        if known is None:
            records, header_at = [], at
            for name, nbytes, crc32 in self._documents:
                records.append(zip_archive.central_record(name, nbytes, crc32, header_at))
                header_at = zip_archive.place(header_at, len(name), nbytes, aligned=False)[1] + nbytes
            known = b"".join(records)
            self._document_records = {at: known}
        return known


def _is_large(array: ArrayLayout) -> bool:
    """Whether an array's chunks begin at whole pages."""
    return zip_archive.alignment(array.chunk_nbytes + CHECKSUM_BYTES) > zip_archive.alignment(0)
