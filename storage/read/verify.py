"""Compare every file of a checkpoint with its manifest.

Promise: a bit flipped in any file is found, whichever; so is a file that is missing, swapped
with another, longer or shorter, or a link. Zarr's documents must also say what the manifest says, so
that other readers see the same arrays. What can't be told is a checkpoint rewritten as a whole.
Files of other programs (a file browser's, an editor's, NFS's) are named; no reader ever looks at them.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from gockpt.core.arena_layout import CHECKSUM_BYTES
from gockpt.core.array_spec import ArraySpec
from gockpt.errors import CheckpointCorrupt
from gockpt.storage.format import strict_json, zarr_metadata
from gockpt.storage.format.checksum import BLOCK, crc32c, expect_blocks, expect_checksum
from gockpt.storage.format.chunk_grid import chunk_key
from gockpt.storage.format.manifest import BLOCKS_FILE, GROUP_FILE, MANIFEST_FILE, STATE_FILE, Manifest, parse
from gockpt.storage.read.decode import read_chunk
from gockpt.storage.read.in_threads import in_threads
from gockpt.storage.read.location import GONE, MAX_MANIFEST_BYTES, Files, read_document, read_small
from gockpt.storage.read.read_execute import PIECE, Source
from gockpt.storage.read.scratch import Scratch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from gockpt.storage.format.codecs import Coded
    from gockpt.storage.format.manifest_entries import ArrayEntry, FileEntry

__all__ = ["MAX_PROBLEMS", "Problem", "VerifyReport", "verify_files"]

_log = logging.getLogger(__name__)

_OPTIONAL: dict[str, Any] = {"attributes": {}, "storage_transformers": []}
"""What a Zarr document means that leaves these out."""

MAX_PROBLEMS = 1000
"""Problems that a report names; those beyond are only counted."""

_MAX_REMEMBERED = 8 << 10


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it was written.

    Attributes:
        path: The file or directory, relative to the checkpoint's; empty for that itself.
        array: Public name of the array it belongs to, or ``None``.
        what: What is wrong with it.
    """

    path: str
    array: str | None
    what: str

    def __str__(self) -> str:
        return f"{self.path or '.'}{f' ({self.array})' if self.array else ''}: {self.what}"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a check of a whole checkpoint found.

    Attributes:
        path: The checkpoint.
        step: Its step.
        seq: Which publication it was.
        files: How many files it should consist of.
        nbytes: Bytes in its chunk files, padding and checksums included.
        problems: What is wrong, by path; empty when every byte is as written. A thousand at most.
        more: How many problems there are beside those; which are named is chance then.
        foreign: Paths of files and directories that are no part of the checkpoint, and do it no harm. A
            thousand at most.
        more_foreign: How many there are beside those.
    """

    path: str
    step: int
    seq: int
    files: int
    nbytes: int
    problems: tuple[Problem, ...]
    more: int = 0
    foreign: tuple[str, ...] = ()
    more_foreign: int = 0

    @property
    def ok(self) -> bool:
        """Whether every byte of the checkpoint is as written."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class _Task:
    """One file to check.

    Attributes:
        path: Relative to the checkpoint.
        array: The public name of its array, or ``None``.
        check: Returns what is wrong, or ``None``; gets its thread's memory.
        nbytes: Its share of the bytes in chunk files.
    """

    path: str
    array: str | None
    check: Callable[[Scratch], str | None]
    nbytes: int = 0


def verify_files(
    files: Files,
    path: str,
    manifest: Manifest,
    *,
    threads: int,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> VerifyReport:
    """Check the files of a checkpoint against the manifest it was opened with.

    Args:
        files: The files of the checkpoint.
        path: Where it is, for the report.
        manifest: Its manifest.
        threads: How many files are read at once; each thread takes one piece of memory, or one encoded chunk.
        on_progress: Called with the bytes checked and the bytes in all chunk files, from any thread.
    """
    problems = _Problems()
    files = files.checked()
    for fault in files.faults():
        problems.add(Problem("", None, fault))
    foreign: list[str] = []
    for found in _surplus(files, path, manifest):
        if isinstance(found, Problem):
            problems.add(found)
        else:
            foreign.append(found)
    blocks = manifest.file(BLOCKS_FILE)
    crcs: npt.NDArray[np.uint32] | None = None
    try:
        crcs = np.frombuffer(read_document(files, blocks), "<u4")
    except (CheckpointCorrupt, OSError) as error:
        problems.add(Problem(BLOCKS_FILE, None, _words(error, BLOCKS_FILE)))
    tasks = _tasks(files, manifest, crcs)
    lock = threading.Lock()
    done, total = 0, sum(entry.nbytes for entry in manifest.arrays)

    def work(task: _Task, scratch: Scratch) -> None:
        nonlocal done
        try:
            what = task.check(scratch)
        except (CheckpointCorrupt, OSError) as error:
            what = _words(error, task.path)
        if what is not None:
            problems.add(Problem(task.path, task.array, what))
        if task.nbytes:
            with lock:
                done += task.nbytes
                on_progress(done, total)

    in_threads(work, tasks, threads=threads, name="gockpt-verify", memory=Scratch)
    chunks = sum(entry.chunks for entry in manifest.arrays)
    return VerifyReport(
        path=path,
        step=manifest.step,
        seq=manifest.seq,
        files=1 + len(manifest.files) + len(manifest.arrays) + chunks,
        nbytes=total,
        problems=tuple(sorted(problems.named, key=lambda problem: (problem.path, problem.what))),
        more=problems.more,
        foreign=tuple(sorted(foreign)[:MAX_PROBLEMS]),
        more_foreign=len(foreign[MAX_PROBLEMS:]),
    )


class _Problems:
    """What was found, within bounds; safe to use from several threads.

    Attributes:
        named: The first so many.
        more: How many came after them.
    """

    def __init__(self) -> None:
        self.named: list[Problem] = []
        self.more = 0
        self._mutex = threading.Lock()

    def add(self, problem: Problem) -> None:
        with self._mutex:
            if len(self.named) < MAX_PROBLEMS:
                self.named.append(problem)
            else:
                self.more += 1


def _words(error: CheckpointCorrupt | OSError, path: str) -> str:
    """Return an error's words about a file, whose path is said already."""
    if isinstance(error, CheckpointCorrupt):
        return str(error).removeprefix(path).removeprefix(" is damaged").lstrip(": ")
    return "missing" if error.errno in GONE else f"can't be read: {error.strerror}"


def _surplus(root: Files, where: str, manifest: Manifest) -> Iterator[Problem | str]:
    """Yield the paths of all that is there and no part of the checkpoint, and what can't be looked through.

    What is absent shows when it is read.
    """
    expected: dict[str, set[str]] = {"": {MANIFEST_FILE, STATE_FILE, BLOCKS_FILE}}
    arrays = {entry.path: entry for entry in manifest.arrays}
    for file in (*manifest.files, *(entry.meta for entry in manifest.arrays)):
        path, _, name = file.path.rpartition("/")
        expected.setdefault(path, set()).add(name)
        if path:
            above, _, name = path.rpartition("/")
            expected.setdefault(above, set()).add(name)
    linked = 0
    for path, names in expected.items():
        entry = arrays.get(path)
        if entry is not None:
            names.update(chunk_key(chunk, len(entry.chunk_shape)) for chunk in range(entry.chunks))
        try:
            present = root.names(path)
        except (CheckpointCorrupt, OSError) as error:
            yield Problem(path, None, _words(error, path))
            continue
        linked += present.linked
        for name in present:
            if name not in names:
                yield f"{path}/{name}".lstrip("/")
    if linked:
        _log.warning(
            "%d files of %s have other hard links: writing there changes the checkpoint", linked, where
        )


def _tasks(files: Files, manifest: Manifest, crcs: npt.NDArray[np.uint32] | None) -> Iterator[_Task]:
    """Yield a task for every file but the block checksums."""
    yield _Task(MANIFEST_FILE, None, lambda _: _check_manifest(files, manifest))
    for file in manifest.files:
        if file.path != BLOCKS_FILE:
            yield _Task(file.path, None, partial(_check_file, files, manifest, file))
    for entry, first in zip(manifest.arrays, manifest.first_blocks(), strict=False):
        name = entry.spec.public_name
        yield _Task(entry.meta.path, name, partial(_check_array_document, files, entry))
        own = None if crcs is None else crcs[first : first + entry.block_count]
        source = Source(files, entry, own)
        for chunk in range(entry.chunks):
            check = partial(_check_chunk, source, chunk)
            yield _Task(entry.chunk_path(chunk), name, check, entry.file_nbytes(chunk))


def _check_manifest(files: Files, manifest: Manifest) -> str | None:
    data = read_small(files, MANIFEST_FILE, limit=MAX_MANIFEST_BYTES)
    return None if parse(data, where=MANIFEST_FILE) == manifest else "not the manifest it was opened with"


def _check_file(files: Files, manifest: Manifest, file: FileEntry, _: object) -> str | None:
    data = read_document(files, file)
    if not file.path.endswith(GROUP_FILE):
        return None
    document = strict_json.loads(data, what="it")
    if type(document) is not dict or _differing(document, zarr_metadata.group_document(), ("attributes",)):
        return "not the document of a Zarr group"
    if file.path != GROUP_FILE:
        return None
    if document.get("attributes") != manifest.attributes:
        return "its attributes are not those in the manifest"
    return _check_consolidated(document.get("consolidated_metadata"), manifest)


def _check_consolidated(consolidated: Any, manifest: Manifest) -> str | None:
    """Say where the documents repeated in the root's differ from those that stand by the arrays."""
    if consolidated is None:
        return None
    metadata = consolidated.get("metadata") if type(consolidated) is dict else None
    if type(metadata) is not dict:
        return "its consolidated metadata is no object"
    arrays = {entry.path: entry for entry in manifest.arrays}
    for path, entry in arrays.items():
        spec = entry.spec
        key = _differing_array(metadata.get(path), spec.shape, spec.dtype, entry.chunk_shape, entry.codec)
        if key is not None:
            return f"its consolidated metadata has another {key} for {path} than the manifest"
    known = {file.path.removesuffix(f"/{GROUP_FILE}") for file in manifest.files} | arrays.keys()
    surplus = sorted(metadata.keys() - known)
    return f"its consolidated metadata has {surplus[0]!r}, the manifest has not" if surplus else None


def _check_array_document(files: Files, entry: ArrayEntry, _: object) -> str | None:
    data = read_document(files, entry.meta)
    # Larger ones than are ever written must not stay in memory.
    differing = _differing_bytes if len(data) <= _MAX_REMEMBERED else _differing_bytes.__wrapped__
    key = differing(data, entry.spec.shape, entry.spec.dtype, entry.chunk_shape, entry.codec)
    return None if key is None else f"its {key} is not the one that follows from the manifest"


@lru_cache(maxsize=256)  # arrays of one shape have the same document
def _differing_bytes(
    data: bytes, shape: tuple[int, ...], dtype: str, chunk_shape: tuple[int, ...], codec: str | None
) -> str | None:
    return _differing_array(strict_json.loads(data, what="it"), shape, dtype, chunk_shape, codec)


def _differing_array(
    document: Any, shape: tuple[int, ...], dtype: str, chunk_shape: tuple[int, ...], codec: str | None
) -> str | None:
    """Return the first key that an array's document has otherwise than its entry calls for, or ``None``."""
    expected = zarr_metadata.array_document(ArraySpec((), shape, dtype), chunk_shape, codec)
    # Zarr lets dimensions have no names, as in checkpoints written before they had.
    absent = type(document) is dict and document.get("dimension_names") is None
    return _differing(document, expected, ("dimension_names",) if absent else ())


def _differing(document: Any, expected: dict[str, Any], ignored: tuple[str, ...] = ()) -> str | None:
    """Return the first key that a document has otherwise than expected, or ``None``."""
    if type(document) is not dict:
        return "document"
    return next(
        (
            key
            for key in expected
            if key not in ignored and document.get(key, _OPTIONAL.get(key)) != expected[key]
        ),
        None,
    )


def _check_chunk(source: Source, chunk: int, scratch: Scratch) -> str | None:
    """Say what is wrong with one chunk file: its rows by blocks, its padding, its own checksum."""
    if source.entry.coded is not None:
        return _check_encoded_chunk(source, source.entry.coded, chunk, scratch)
    buffer = scratch.take(PIECE)
    with source.open(chunk, scratch) as file:
        real, whole = source.grid.real_nbytes(chunk), file.nbytes - CHECKSUM_BYTES
        first = source.grid.first_block(chunk)
        value = 0
        for start in range(0, real, PIECE):
            data = buffer[: min(PIECE, real - start)]
            file.read_into([data.data], start)
            if source.crcs is not None:
                known = source.crcs[first + start // BLOCK :]
                expect_blocks([data], known, where=file.path, start=start)
            value = crc32c(data.data, value)
        for start in range(real, whole, PIECE):
            data = buffer[: min(PIECE, whole - start)]
            file.read_into([data.data], start)
            if data.any():
                return f"the padding from byte {real} on is not all zero"
            value = crc32c(data.data, value)
        file.read_into([buffer[:CHECKSUM_BYTES].data], whole)
        expect_checksum(buffer[:CHECKSUM_BYTES].data, value, where=file.path)
    return None


def _check_encoded_chunk(source: Source, coded: Coded, chunk: int, scratch: Scratch) -> str | None:
    """Say what is wrong with the padding of an encoded chunk; of all else, reading it tells."""
    scratch.take(0)  # what a raw chunk took is free again
    with source.open(chunk, scratch) as file:
        data = read_chunk(file, source.entry, coded, chunk, source.crcs)
    real = source.grid.real_nbytes(chunk)
    return (
        f"the padding from byte {real} of the decoded chunk on is not all zero" if data[real:].any() else None
    )
