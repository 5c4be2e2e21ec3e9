"""Copy one complete checkpoint into an object store, so that it is there as a whole or not at all.

Promise: nothing is uploaded but bytes that agree with the manifest, block by block. An archive becomes one
object, which appears when its last byte was compared. A directory's files become objects below a prefix: the
manifest goes last, and only when every other one is there; what an earlier upload of the same attempt left is
not sent again if its size and checksum are right. Two attempts never share a name. Memory stays within a few
parts per thread, whatever the size of a chunk.
"""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gockpt.errors import ManifestCorrupt, RemoteError, UsageError
from gockpt.storage.format import step_names
from gockpt.storage.format.manifest import MANIFEST_FILE, encode, parse
from gockpt.storage.object_store.client import TakenError
from gockpt.storage.read.archive_files import ArchiveFiles
from gockpt.storage.read.checkpoint import manifest_bytes
from gockpt.storage.read.copying import PIECE, archive_pieces, chunk_files, document_files
from gockpt.storage.read.in_threads import in_threads
from gockpt.storage.read.object_location import ObjectArchiveLocation, ObjectLocation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from gockpt.storage.format.manifest import Manifest
    from gockpt.storage.object_store.client import Objects
    from gockpt.storage.read.checkpoint import StoredCheckpoint
    from gockpt.storage.read.copying import StoredFile

__all__ = ["Uploaded", "upload_checkpoint"]

THREADS = 4
PART = PIECE
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
        url: Where it is: one object, an archive, or a prefix that is a Zarr group.
        nbytes: Bytes of all its objects.
        sent: Bytes of those that had to be sent now; 0 when it was there already.
    """

    step: int
    seq: int
    attempt: str
    url: str
    nbytes: int
    sent: int


def upload_checkpoint(
    stored: StoredCheckpoint,
    objects: Objects,
    *,
    prepare_thread: Callable[[], None] = lambda: None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Uploaded:
    """Upload an open checkpoint below a URL, in the form that it has.

    An upload of an archive that was cut short begins again; that of a directory is gone on with.

    Args:
        stored: The checkpoint; it must not be closed meanwhile.
        objects: Where it goes, under a name of its own.
        prepare_thread: Called first in every thread that is started.
        on_progress: Called with the bytes that are there and the bytes of all objects, from any thread.

    Raises:
        CheckpointCorrupt: If the checkpoint is damaged; nothing complete is there then.
        CheckpointPruned: If the checkpoint was removed meanwhile.
        UsageError: If another checkpoint there has the same ``seq``: it came from another path.
        RemoteError: If the store refuses or can't be reached, or has another object of that name.
    """
    if isinstance(stored.files, ArchiveFiles):
        return _upload_archive(stored, stored.files, objects, prepare_thread, on_progress)
    return _upload_files(stored, objects, prepare_thread, on_progress)


def _upload_archive(
    stored: StoredCheckpoint,
    archive: ArchiveFiles,
    objects: Objects,
    prepare_thread: Callable[[], None],
    on_progress: Callable[[int, int], None],
) -> Uploaded:
    manifest, nbytes = stored.manifest, archive.nbytes
    key = step_names.of_uploaded(manifest.step, manifest.seq, manifest.attempt, archive=True)
    url, sent = objects.url_of(key), 0
    given_up = threading.Event()

    def pieces() -> Iterator[bytes]:
        done = 0
        for piece in _regrouped(archive_pieces(stored, archive, "uploaded"), PART):
            done += len(piece)
            if given_up.is_set():
                msg = f"the upload to {url} was given up"
                raise RemoteError(msg)
            if done == nbytes > PART and _has_archive(objects, key, manifest):
                # Nothing can be made conditional on the completing of an object in parts: looked for here.
                raise TakenError(key)
            on_progress(done, nbytes)
            yield piece

    def work(key: str, _: None) -> None:
        nonlocal sent
        try:
            if nbytes <= PART:
                objects.create(key, b"".join(pieces()))
            else:
                part = max(PART, -(-nbytes // _MAX_PARTS))
                objects.put(key, pieces, crc=None, part=part, parallel=THREADS * PARALLEL)
            sent = nbytes
        except TakenError:
            if not _has_archive(objects, key, manifest):
                msg = f"{url} was there, and was removed meanwhile; try again"
                raise RemoteError(msg) from None

    if not _has_archive(objects, key, manifest):
        _expect_own_number(objects, manifest)
        try:
            # The second thread has nothing to do: with one, Ctrl-C would wait for the whole upload.
            in_threads(work, [key], threads=2, name="gockpt-upload", memory=prepare_thread, patient=False)
        finally:
            given_up.set()
    on_progress(nbytes, nbytes)
    return Uploaded(manifest.step, manifest.seq, manifest.attempt, url, nbytes, sent)


def _regrouped(pieces: Iterable[bytes | bytearray], nbytes: int) -> Iterator[bytes]:
    """Yield the same bytes in pieces of that length; the last one, perhaps shorter, when all are known."""
    held = bytearray()
    for piece in pieces:
        held += piece
        while len(held) > nbytes:
            yield bytes(memoryview(held)[:nbytes])
            del held[:nbytes]
    yield bytes(held)


def _has_archive(objects: Objects, key: str, manifest: Manifest) -> bool:
    """Return whether the checkpoint's archive is there.

    Raises:
        RemoteError: If another object has its name.
    """
    location = ObjectArchiveLocation(objects, key)
    try:
        with closing(location.open(*location.children())) as files:
            found = parse(manifest_bytes(files, location.path), where=location.path)
    except FileNotFoundError:
        return False
    except ManifestCorrupt as error:
        msg = f"{location.path} is there, and is no archive of this checkpoint ({error}): remove it"
        raise RemoteError(msg) from error
    if found.in_directory() != manifest.in_directory():
        msg = f"{location.path} has another {MANIFEST_FILE} than this checkpoint: remove it"
        raise RemoteError(msg)
    return True


def _upload_files(
    stored: StoredCheckpoint,
    objects: Objects,
    prepare_thread: Callable[[], None],
    on_progress: Callable[[int, int], None],
) -> Uploaded:
    manifest = stored.manifest
    base = step_names.of_uploaded(manifest.step, manifest.seq, manifest.attempt)
    url = objects.url_of(base)
    whole = encode(manifest)
    todo = [*document_files(stored, "uploaded"), *chunk_files(stored, "uploaded")]
    nbytes = sum(item.nbytes for item in todo) + len(whole)
    there = _existing(objects, f"{base}/{MANIFEST_FILE}", len(whole))
    if there is not None:
        _expect_same(there, whole, url)
        return Uploaded(manifest.step, manifest.seq, manifest.attempt, url, nbytes, 0)
    _expect_own_number(objects, manifest)
    present = objects.tree(base)
    lock, done, sent = threading.Lock(), 0, 0

    def work(item: StoredFile, _: None) -> None:
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


def _is_there(objects: Objects, key: str, item: StoredFile) -> bool:
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


def _expect_own_number(objects: Objects, manifest: Manifest) -> None:
    """Refuse to mix the checkpoints of two paths, whose numbers say nothing about each other."""
    for other in ObjectLocation(objects).children():
        if other.seq == manifest.seq and other.attempt != manifest.attempt:
            msg = (
                f"{objects.url} has another checkpoint with the number {manifest.seq} ({other.name}), from "
                "another path: which is newer can't be told. Use a URL of its own for each path"
            )
            raise UsageError(msg)
