"""Writer of one chunk's file: from its arena slot without a copy, or encoded.

Promise: the file holds the real rows, zeros up to the whole chunk (sparse) and the checksum of both,
little-endian; or the encoded chunk and its checksum. Its length is exact, and no byte of stale memory reaches
the disk: a small chunk is written to its exact length, and the slot of a large one is zeroed after the rows
first. Large chunks are written in whole pages at page offsets, so that the same calls serve direct and
buffered I/O; the length is set last. Nothing is synced here.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gockpt.core.arena_layout import ALIGNMENT, CHECKSUM_BYTES
from gockpt.storage.format import checksum
from gockpt.storage.local import files

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from gockpt.core.arena_layout import ArrayLayout, Slot
    from gockpt.storage.local.filesystem import Filesystem

__all__ = ["DIRECT_FROM", "WrittenChunk", "most_bounced", "write_chunk", "write_encoded"]

DIRECT_FROM = 256 << 10
"""Smaller chunks go through the page cache, where many leave as one; direct I/O waits for each."""

_BOUNCE = 8 << 20
_RESERVE_FROM = 1 << 20


@dataclass(frozen=True, slots=True)
class WrittenChunk:
    """A chunk that was written and not yet synced.

    Attributes:
        fd: Its open file: only this descriptor certainly reports a failed write.
        blocks: crc32c of each block of its real or encoded bytes, little-endian uint32.
        nbytes: Bytes of the file that were written, padding excluded.
        direct: Whether it went past the page cache.
        refused: Whether the file system refused that.
    """

    fd: int
    blocks: npt.NDArray[np.uint32]
    nbytes: int
    direct: bool
    refused: bool


def _pages(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _is_aligned(buffer: memoryview) -> bool:
    return bool(np.frombuffer(buffer, np.uint8).ctypes.data % ALIGNMENT == 0)


def most_bounced(nbytes: int) -> int:
    """Return the most memory that writing a file of ``nbytes`` from unaligned memory takes beside it."""
    pages = _pages(nbytes)
    return min(_BOUNCE, pages) if pages >= DIRECT_FROM else 0


def _trailer(data: bytes, lead: int = 0) -> memoryview:
    """Return whole pages with ``data`` behind ``lead`` zero bytes."""
    pages = mmap.mmap(-1, _pages(lead + len(data)))
    pages[lead : lead + len(data)] = data
    return memoryview(pages)


def write_chunk(
    fs: Filesystem,
    dir_fd: int,
    name: str,
    *,
    layout: ArrayLayout,
    slot: Slot,
    buffer: memoryview,
    direct: bool,
    known: bool = False,
) -> WrittenChunk:
    """Create the file ``name`` and write the slot's chunk into it.

    Args:
        fs: The file system.
        dir_fd: The directory that ``name`` is relative to.
        name: The file, which must not exist.
        layout: The chunk's array.
        slot: Which chunk.
        buffer: The whole slot: writable bytes, ``slot.capacity`` of them. What lies behind the real
            rows is overwritten.
        direct: Whether to try direct I/O; if the file system refuses it, the page cache is used. Memory that
            isn't page-aligned is copied by pieces of 8 MiB.
        known: Whether another file there was written directly: its alignment is then not queried again.

    Raises:
        ValueError: If the buffer is not the slot's size.
        OSError: The system's error. The file is unusable then.
    """
    if buffer.nbytes != slot.capacity:
        msg = f"the buffer has {buffer.nbytes} bytes, its slot {slot.capacity}"
        raise ValueError(msg)
    buffer = buffer.cast("B")
    real, whole = slot.nbytes, layout.chunk_nbytes
    if real == whole and slot.capacity < DIRECT_FROM:
        return _write_small(fs, dir_fd, name, buffer, whole)
    blocks = checksum.crc32c_blocks(buffer[:real])
    crc = checksum.crc32c_zeros(whole - real, checksum.chain(blocks.tolist(), real))
    crc_bytes = crc.to_bytes(CHECKSUM_BYTES, "little")

    buffer[real:] = bytes(slot.capacity - real)
    # The checksum stands at `whole`. Where it reaches into the slot's pages it is put there, and what
    # reaches beyond goes out in pages of its own, behind the hole.
    fits = whole + CHECKSUM_BYTES <= slot.capacity
    end = _pages(whole + CHECKSUM_BYTES) if fits else _pages(real)
    inside = max(0, min(CHECKSUM_BYTES, end - whole))
    buffer[whole : whole + inside] = crc_bytes[:inside]
    pieces = [(buffer[:end], 0)]
    if not fits:
        start = max(end, whole // ALIGNMENT * ALIGNMENT)
        begin = max(whole, start)
        pieces.append((_trailer(crc_bytes[begin - whole :], begin - start), start))

    fd, used, refused = _write_pieces(
        fs, dir_fd, name, pieces, end=end, nbytes=whole + CHECKSUM_BYTES, direct=direct, known=known
    )
    return WrittenChunk(fd, blocks, real + CHECKSUM_BYTES, used, refused)


def _write_small(fs: Filesystem, dir_fd: int, name: str, buffer: memoryview, nbytes: int) -> WrittenChunk:
    """Write a chunk and its checksum through the page cache, in one call.

    A checkpoint has hundreds of these, and their cost is that of the calls.
    """
    blocks = checksum.crc32c_blocks(buffer[:nbytes])
    end = nbytes + CHECKSUM_BYTES
    buffer[nbytes:end] = int(blocks[0]).to_bytes(CHECKSUM_BYTES, "little")  # less than a block: that is all
    return WrittenChunk(files.write_new_file(fs, dir_fd, name, buffer[:end]), blocks, end, False, False)


def write_encoded(
    fs: Filesystem, dir_fd: int, name: str, *, data: bytes, direct: bool, known: bool = False
) -> WrittenChunk:
    """Create the file ``name`` and write an encoded chunk into it.

    Args:
        fs: The file system.
        dir_fd: The directory that ``name`` is relative to.
        name: The file, which must not exist.
        data: The encoded chunk.
        direct: As for :func:`write_chunk`.
        known: As for :func:`write_chunk`.

    Raises:
        OSError: The system's error. The file is unusable then.
    """
    view = memoryview(data)
    blocks = checksum.crc32c_blocks(view)
    crc = checksum.chain(blocks.tolist(), view.nbytes).to_bytes(CHECKSUM_BYTES, "little")
    # All but the last pages are written as they stand; those take the checksum, and zeros behind it.
    body = view.nbytes // ALIGNMENT * ALIGNMENT
    last = _trailer(data[body:] + crc)
    pieces = [(view[:body], 0), (last, body)] if body else [(last, 0)]
    nbytes = view.nbytes + CHECKSUM_BYTES
    fd, used, refused = _write_pieces(
        fs, dir_fd, name, pieces, end=_pages(nbytes), nbytes=nbytes, direct=direct, known=known
    )
    return WrittenChunk(fd, blocks, nbytes, used, refused)


def _write_pieces(
    fs: Filesystem,
    dir_fd: int,
    name: str,
    pieces: Sequence[tuple[memoryview, int]],
    *,
    end: int,
    nbytes: int,
    direct: bool,
    known: bool,
) -> tuple[int, bool, bool]:
    """Create a file of ``nbytes`` with these whole pages at their offsets, no hole before ``end``.

    Returns:
        The open file, whether it was written directly, and whether the file system refused that.
    """
    wanted = direct and end >= DIRECT_FROM
    fd, direct = _create(fs, dir_fd, name, direct=wanted, known=known)
    try:
        if end >= _RESERVE_FROM:
            files.reserve(fs, fd, end)
        for piece, offset in pieces:
            try:
                _write(fs, fd, piece, offset, direct=direct)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                # Some file systems accept the flag and refuse the write. Whatever part was written
                # is written again, through the page cache.
                direct, refusing = False, fd
                fd = fs.open(name, os.O_WRONLY | os.O_NOFOLLOW, dir_fd=dir_fd)
                fs.close(refusing)
                files.write_all(fs, fd, piece, offset)
        fs.ftruncate(fd, nbytes)
    except BaseException:
        fs.close(fd)
        raise
    return fd, direct, wanted and not direct


def _write(fs: Filesystem, fd: int, piece: memoryview, offset: int, *, direct: bool) -> None:
    """Write whole pages; direct I/O takes them from aligned memory only, so others are copied there first."""
    if not direct or _is_aligned(piece):
        files.write_all(fs, fd, piece, offset)
        return
    bounce = memoryview(mmap.mmap(-1, min(_BOUNCE, piece.nbytes)))
    for start in range(0, piece.nbytes, _BOUNCE):
        part = piece[start : start + _BOUNCE]
        bounce[: part.nbytes] = part
        files.write_all(fs, fd, bounce[: part.nbytes], offset + start)


def _create(fs: Filesystem, dir_fd: int, name: str, *, direct: bool, known: bool) -> tuple[int, bool]:
    if direct:
        try:
            fd = fs.open(name, files.NEW_FILE | os.O_DIRECT, dir_fd=dir_fd)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            try:
                fits = known or 0 < fs.direct_alignment(fd) <= ALIGNMENT
            except BaseException:
                fs.close(fd)
                raise
            if fits:
                return fd, True
            fs.close(fd)
        # Refused, or only in larger units than pages. The file may have been created all the same.
        with contextlib.suppress(FileNotFoundError):
            fs.unlink(name, dir_fd=dir_fd)
    return fs.open(name, files.NEW_FILE, dir_fd=dir_fd), False
