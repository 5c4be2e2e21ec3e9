"""Copy one complete checkpoint into an object store, so that it is there as a whole or not at all.

Promise: nothing is uploaded but bytes that agree with the manifest, block by block; the manifest goes
last, and only when every other object is there. What an earlier upload of the same attempt left is not
sent again if its size and checksum are right. Two attempts never share a prefix. Memory stays within a few
parts per thread, whatever the size of a chunk.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gockpt.errors import RemoteError, UsageError
from gockpt.storage.format import step_names
from gockpt.storage.format.manifest import MANIFEST_FILE, encode
from gockpt.storage.object_store.client import TakenError
from gockpt.storage.read.copying import PIECE, chunk_files, document_files
from gockpt.storage.read.in_threads import in_threads
from gockpt.storage.read.object_location import ObjectLocation

if TYPE_CHECKING:
    from collections.abc import Callable

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
    manifest = stored.manifest
    base = step_names.of_uploaded(manifest.step, manifest.seq, manifest.attempt)
    url = objects.url_of(base)
    # In an object store, each file is an object of its own, whatever it is here.
    whole = encode(manifest.in_directory())
    todo = [*document_files(stored, "uploaded"), *chunk_files(stored, "uploaded")]
    nbytes = sum(item.nbytes for item in todo) + len(whole)
    there = _existing(objects, f"{base}/{MANIFEST_FILE}", len(whole))
    if there is not None:
        _expect_same(there, whole, url)
        return Uploaded(manifest.step, manifest.seq, manifest.attempt, url, nbytes, 0)
    _expect_own_number(objects, manifest, base)
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


def _expect_own_number(objects: Objects, manifest: Manifest, base: str) -> None:
    """Refuse to mix the checkpoints of two paths, whose numbers say nothing about each other."""
    for other in ObjectLocation(objects).children():
        if other.seq == manifest.seq and other.name != base:
            msg = (
                f"{objects.url} has another checkpoint with the number {manifest.seq} ({other.name}), from "
                "another path: which is newer can't be told. Use a URL of its own for each path"
            )
            raise UsageError(msg)
