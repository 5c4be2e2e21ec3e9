"""Copy one complete checkpoint into an object store, so that it is there as a whole or not at all.

Promise: nothing is uploaded but bytes that agree with the manifest, block by block; the manifest goes
last, and only when every other object is there. What an earlier upload of the same attempt left is not
sent again if its size and checksum are right. Two attempts never share a prefix. Memory stays within a few
parts per thread, whatever the size of a chunk.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from gockpt.core.arena_layout import CHECKSUM_BYTES
from gockpt.errors import CheckpointCorrupt, CheckpointPruned, ChunkCorrupt, RemoteError, UsageError
from gockpt.storage.format import step_names
from gockpt.storage.format.checksum import BLOCK, block_count, chain, crc32c, crc32c_zeros, expect_blocks
from gockpt.storage.format.manifest import BLOCKS_FILE, MANIFEST_FILE, parse
from gockpt.storage.object_store.client import TakenError
from gockpt.storage.read.in_threads import in_threads
from gockpt.storage.read.location import GONE, MAX_MANIFEST_BYTES, read_document, read_small
from gockpt.storage.read.object_location import ObjectLocation
from gockpt.storage.read.read_execute import Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from gockpt.storage.format.manifest import Manifest
    from gockpt.storage.format.manifest_entries import FileEntry
    from gockpt.storage.object_store.client import Objects
    from gockpt.storage.read.checkpoint import StoredCheckpoint
    from gockpt.storage.read.location import Files

__all__ = ["Uploaded", "upload_checkpoint"]

THREADS = 4
PART = 8 * BLOCK
"""Bytes of one request; larger objects go in parts of this size."""
PARALLEL = 2
"""Parts of one object on their way at once."""
_MAX_PARTS = 10_000  # of one object in S3


@dataclass(frozen=True, slots=True)
class Uploaded:
    """A checkpoint that is complete in an object store.

    Attributes:
        step: The user's step.
        seq: Which publication it was; the highest is the newest.
        attempt: Hexadecimal, unique to this writing of the step.
        url: Where it is: a Zarr group that any reader opens there.
        nbytes: Bytes of all its objects.
        sent: Bytes of those that had to be sent now; 0 when it was there already.
    """

    step: int
    seq: int
    attempt: str
    url: str
    nbytes: int
    sent: int


@dataclass(frozen=True, slots=True)
class _Object:
    """One object to be.

    Attributes:
        path: Relative to the checkpoint.
        nbytes: Its size.
        crc: Its checksum: all follows from the manifest, nothing is read for it.
        data: Gives its bytes, checked.
    """

    path: str
    nbytes: int
    crc: int
    data: Callable[[], bytes | Iterator[bytearray]]


def upload_checkpoint(
    stored: StoredCheckpoint,
    objects: Objects,
    *,
    prepare_thread: Callable[[], None] = lambda: None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Uploaded:
    """Upload an open checkpoint below a URL; an upload that was cut short is gone on with.

    Args:
        stored: The checkpoint; it must not be closed meanwhile.
        objects: Where it goes, into a prefix of its own.
        prepare_thread: Called first in every thread that is started.
        on_progress: Called with the bytes that are there and the bytes of all objects, from any thread.

    Raises:
        CheckpointCorrupt: If the checkpoint is damaged; nothing complete is there then.
        CheckpointPruned: If the checkpoint was removed meanwhile.
        UsageError: If another checkpoint there has the same ``seq``: it came from another path.
        RemoteError: If the store refuses or can't be reached.
    """
    manifest, files = stored.manifest, stored.files
    base = step_names.of_uploaded(manifest.step, manifest.seq, manifest.attempt)
    url = objects.url_of(base)
    with _explained(files, stored.path):
        whole = read_small(files, MANIFEST_FILE, limit=MAX_MANIFEST_BYTES)
        if parse(whole, where=f"{stored.path}/{MANIFEST_FILE}") != manifest:
            msg = f"{stored.path}: its manifest is not the one it was opened with"
            raise CheckpointCorrupt(msg)
        blocks = read_document(files, manifest.file(BLOCKS_FILE))
    todo = list(_objects(files, stored.path, manifest, np.frombuffer(blocks, "<u4")))
    nbytes = sum(item.nbytes for item in todo) + len(whole)
    there = _existing(objects, f"{base}/{MANIFEST_FILE}", len(whole))
    if there is not None:
        _expect_same(there, whole, url)
        return Uploaded(manifest.step, manifest.seq, manifest.attempt, url, nbytes, 0)
    _expect_own_number(objects, manifest, base)
    present = objects.tree(base)
    lock, done, sent = threading.Lock(), 0, 0

    def work(item: _Object, _: None) -> None:
        nonlocal done, sent
        key = f"{base}/{item.path}"
        missing = present.get(item.path) != item.nbytes or not _is_there(objects, key, item)
        if missing:
            part = max(PART, -(-item.nbytes // _MAX_PARTS))
            objects.put(key, item.data, crc=item.crc, part=part, parallel=PARALLEL)
        with lock:
            done += item.nbytes
            sent += item.nbytes if missing else 0
            on_progress(done, nbytes)

    in_threads(work, todo, threads=THREADS, name="gockpt-upload", memory=prepare_thread, patient=False)
    if done + len(whole) != nbytes:  # never: said so that no manifest can follow
        msg = f"{nbytes - len(whole) - done} bytes were not uploaded"
        raise RemoteError(msg)
    try:
        objects.create(f"{base}/{MANIFEST_FILE}", whole)
    except TakenError:
        # Somebody else uploaded the same attempt: the same bytes to the same places.
        _expect_same(_existing(objects, f"{base}/{MANIFEST_FILE}", len(whole)), whole, url)
    on_progress(nbytes, nbytes)
    return Uploaded(manifest.step, manifest.seq, manifest.attempt, url, nbytes, sent + len(whole))


def _objects(files: Files, path: str, manifest: Manifest, crcs: npt.NDArray[np.uint32]) -> Iterator[_Object]:
    """Yield every object but the manifest, with what it must be."""
    for file in (*manifest.files, *(entry.meta for entry in manifest.arrays)):
        yield _Object(file.path, file.size, file.crc32c, partial(_file_data, files, path, file))
    for entry, first in zip(manifest.arrays, manifest.first_blocks(), strict=False):
        source = Source(files, entry, None)
        for chunk in range(entry.chunks):
            nbytes, real = entry.file_nbytes(chunk), entry.covered_nbytes(chunk)
            at = first + entry.first_block(chunk)
            known = crcs[at : at + block_count(real)]
            content = crc32c_zeros(nbytes - CHECKSUM_BYTES - real, chain(known.tolist(), real))
            stored = content.to_bytes(CHECKSUM_BYTES, "little")
            data = partial(_chunk_data, source, chunk, path, known, stored)
            yield _Object(entry.chunk_path(chunk), nbytes, crc32c(stored, content), data)


def _file_data(files: Files, path: str, file: FileEntry) -> bytes:
    with _explained(files, path):
        return read_document(files, file)


def _chunk_data(
    source: Source, chunk: int, path: str, known: npt.NDArray[np.uint32], stored: bytes
) -> bytes | Iterator[bytearray]:
    """Return a chunk file's bytes, as a whole if they are few."""
    pieces = _chunk_pieces(source, chunk, path, known, stored)
    return b"".join(pieces) if source.entry.file_nbytes(chunk) <= PART else pieces


def _chunk_pieces(
    source: Source, chunk: int, path: str, known: npt.NDArray[np.uint32], stored: bytes
) -> Iterator[bytearray]:
    """Yield a chunk file's bytes, each piece once it agrees with the manifest."""
    real, whole = source.entry.covered_nbytes(chunk), source.entry.file_nbytes(chunk)
    with _explained(source.files, path), source.open(chunk) as file:
        for start in range(0, whole, PART):
            data = bytearray(min(PART, whole - start))
            file.read_into([memoryview(data)], start)
            piece = np.frombuffer(data, np.uint8)
            rows, behind = piece[: max(0, real - start)], piece[max(0, real - start) :]
            expect_blocks([rows], known[start // BLOCK :], where=file.path, start=start)
            # What stands behind the rows: zeros, then the chunk's own checksum.
            first = max(start, real)
            padding = behind[: max(0, whole - CHECKSUM_BYTES - first)]
            own = behind[padding.nbytes :].tobytes()
            at = first + padding.nbytes - (whole - CHECKSUM_BYTES)
            if padding.any() or own != stored[at : at + len(own)]:
                msg = f"{file.path}: the padding or the checksum behind its {real} bytes is wrong"
                raise ChunkCorrupt(msg)
            yield data


def _is_there(objects: Objects, key: str, item: _Object) -> bool:
    try:
        return objects.stat(key) == (item.nbytes, f"{item.crc:08x}")
    except FileNotFoundError:
        return False


def _existing(objects: Objects, key: str, nbytes: int) -> bytes | None:
    """Return what is at a key, as far as it matters; ``None`` if nothing is."""
    try:
        data, size = objects.read(key, 0, nbytes)
    except FileNotFoundError:
        return None
    return bytes(data) if size == nbytes else b""


def _expect_same(there: bytes | None, whole: bytes, url: str) -> None:
    if there != whole:
        msg = f"{url} has another {MANIFEST_FILE} than this checkpoint: remove it, or use another URL"
        raise RemoteError(msg)


def _expect_own_number(objects: Objects, manifest: Manifest, base: str) -> None:
    """Refuse to mix the checkpoints of two paths, whose numbers say nothing about each other."""
    for other in ObjectLocation(objects).children():
        if other.seq == manifest.seq and other.name != base:
            msg = (
                f"{objects.url} has another checkpoint with the number {manifest.seq} ({other.name}), from "
                "another path: which is newer can't be told. Use a URL of its own for each path"
            )
            raise UsageError(msg)


@contextmanager
def _explained(files: Files, path: str) -> Iterator[None]:
    """Turn what goes wrong with the checkpoint's own files into an error that says what it means."""
    try:
        yield
    except CheckpointCorrupt as error:
        msg = f"{error} (in {path}); it was not uploaded"
        raise type(error)(msg) from error
    except OSError as error:
        if error.errno not in GONE:
            raise
        if files.is_gone():
            msg = f"{path} was removed before it was uploaded"
            raise CheckpointPruned(msg) from error
        msg = f"{error.filename or 'a file'} is missing (in {path}); it was not uploaded"
        raise ChunkCorrupt(msg) from error
