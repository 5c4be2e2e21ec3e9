"""The contents of a checkpoint that is being written: directories, chunks, documents.

Promise: after :meth:`Draft.sync` returned, all of it is on the disk; after :meth:`Draft.complete`, so is
the manifest that vouches for it. Every error is a :class:`StorageError` that names the file; after one the
draft is of no use, and nothing of it is written or synced again.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from gockpt.errors import ManifestCorrupt, UsageError
from gockpt.layout import CHECKSUM_BYTES
from gockpt.storage import checksum, chunk_writer, files, manifest, names, strict_json, zarr_documents
from gockpt.storage.codecs import Coded
from gockpt.storage.failures import storage_errors
from gockpt.storage.manifest import (
    BLOCKS_FILE,
    GROUP_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    ArrayEntry,
    FileEntry,
)
from gockpt.storage.stopwatch import Stopwatch
from gockpt.storage.unsynced import Unsynced

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from gockpt.layout import ArrayLayout, Slot
    from gockpt.storage.compression import Compression
    from gockpt.storage.filesystem import Filesystem

__all__ = ["Draft"]

_MANIFEST_IN_THE_MAKING = f"{MANIFEST_FILE}.tmp"


@dataclass(slots=True)
class _Array:
    """An array whose directory and document were written; ``blocks`` has a key for each chunk begun.

    Where it has a codec, ``stored`` has the encoded length of each chunk written.
    """

    layout: ArrayLayout
    path: str
    document: dict[str, Any]
    meta: FileEntry
    codec: str | None
    blocks: dict[int, npt.NDArray[np.uint32] | None] = field(default_factory=dict)
    stored: dict[int, int] = field(default_factory=dict)


class Draft:
    """One open directory that is nobody else's. :meth:`write_chunk` is safe to call from several threads.

    Attributes:
        nbytes: Bytes written so far: real rows, checksums, documents.
    """

    def __init__(self, fs: Filesystem, dir_fd: int, where: str, compression: Compression) -> None:
        """Start in an empty directory.

        Args:
            fs: The file system.
            dir_fd: The directory; stays the caller's.
            where: Its path, for messages.
            compression: Which arrays are encoded.

        Raises:
            OSError: If the file system can't be identified.
        """
        self.nbytes = 0
        self._fs = fs
        self._fd = dir_fd
        self._where = where
        self._compression = compression
        self._stopwatch = Stopwatch()
        self._mutex = threading.Lock()
        self._unsynced = Unsynced(fs, dir_fd, where)
        self._arrays: dict[tuple[str, ...], _Array] = {}
        self._directories: dict[str, None] = {}  # parents before children
        self._spelling: dict[str, str] = {}  # of every directory by its lower-case path
        self._direct = True

    def write_chunk(self, layout: ArrayLayout, slot: Slot, buffer: memoryview) -> None:
        """Write one chunk; see :meth:`gockpt.storage.transaction.Transaction.write_chunk`."""
        with self._mutex:
            array = self._array(layout)
            if slot.chunk in array.blocks:
                msg = f"chunk {slot.chunk} of {layout.spec.public_name!r} was written before"
                raise UsageError(msg)
            array.blocks[slot.chunk] = None
        name = f"{array.path}/{manifest.chunk_key(slot.chunk, len(layout.chunk_shape))}"
        with storage_errors("write", os.path.join(self._where, name)):
            written = self._write(name, array, slot, buffer)
            self._unsynced.add(name, written.fd)
        with self._mutex:
            array.blocks[slot.chunk] = written.blocks
            array.stored[slot.chunk] = written.nbytes - CHECKSUM_BYTES
            self.nbytes += written.nbytes
            self._direct = self._direct and not written.refused

    def _write(self, name: str, array: _Array, slot: Slot, buffer: memoryview) -> chunk_writer.WrittenChunk:
        """Write a chunk's file, raw or encoded."""
        layout = array.layout
        if array.codec is None:
            self._compression.sample(layout, slot, buffer)
            with self._stopwatch:
                return chunk_writer.write_chunk(
                    self._fs, self._fd, name, layout=layout, slot=slot, buffer=buffer, direct=self._direct
                )
        with self._compression.encoded(array.codec, layout, slot, buffer) as data, self._stopwatch:
            return chunk_writer.write_encoded(self._fs, self._fd, name, data=data, direct=self._direct)

    def write_documents(
        self, arrays: Sequence[ArrayLayout], *, state: Mapping[str, Any], attributes: Mapping[str, Any]
    ) -> tuple[tuple[ArrayEntry, ...], tuple[FileEntry, ...]]:
        """Write everything but the chunks and the manifest.

        Returns:
            What the manifest says of the arrays and of the other files.

        Raises:
            UsageError: If chunks are missing, names can't stand together, or a document has no exact form.
            StorageError: If the disk refuses.
        """
        with self._mutex:
            self._expect_complete(arrays)
            ordered = [self._array(layout) for layout in arrays]
            paths = names.escape_all(layout.spec.name for layout in arrays)
            self._move(paths)
            described = {
                STATE_FILE: strict_json.dumps(
                    dict(state), what="the state document", depth=strict_json.STATE_DEPTH
                ),
                BLOCKS_FILE: b"".join(_block_checksums(array) for array in ordered),
            }
            others: dict[str, Any] = {GROUP_FILE: self._root(ordered, attributes)}
            documents = []
            for path in manifest.expected_files(paths):
                data = described.get(path)
                if data is None:
                    data = zarr_documents.dump(others.get(path, zarr_documents.group_document()))
                documents.append(self._write_file(path, data))
            entries = [_entry(array) for array in ordered]
        return tuple(entries), tuple(documents)

    def sync(self) -> None:
        """Make every file and every directory durable, children before parents."""
        with self._stopwatch:
            self._unsynced.sync(reversed(self._directories))
            self._sync_itself()

    def learn(self) -> None:
        """Let later checkpoints profit from how fast this one, synced now, was written."""
        layouts = [array.layout for array in self._arrays.values()]
        self._compression.learn(layouts, nbytes=self.nbytes, seconds=self._stopwatch.seconds)

    def complete(self, content: manifest.Manifest) -> None:
        """Write the manifest: the mark that all the rest is there.

        Raises:
            UsageError: If readers would refuse it.
            StorageError: If the disk refuses.
        """
        fs = self._fs
        data = manifest.encode(content)
        try:
            manifest.parse(data, where="the manifest")
        except ManifestCorrupt as error:
            # Better no checkpoint than one that no reader accepts.
            msg = f"this can't be published: {error}"
            raise UsageError(msg) from error
        with storage_errors("write", os.path.join(self._where, MANIFEST_FILE)):
            fd = files.write_new_file(fs, self._fd, _MANIFEST_IN_THE_MAKING, data)
            try:
                fs.fsync(fd)
            finally:
                fs.close(fd)
            fs.rename(_MANIFEST_IN_THE_MAKING, MANIFEST_FILE, dir_fd=self._fd)
        self._sync_itself()
        self.nbytes += len(data)

    def close(self) -> None:
        """Let go of all open files."""
        self._unsynced.close()

    def _sync_itself(self) -> None:
        with storage_errors("write", self._where):
            self._fs.fsync(self._fd)

    # -- arrays: called with the mutex held -------------------------------------------------------

    def _array(self, layout: ArrayLayout) -> _Array:
        """Return the array's record; its directory and document are written the first time."""
        array = self._arrays.get(layout.spec.name)
        if array is None:
            if not manifest.is_regular(layout):
                msg = f"{layout.spec.public_name!r} is not cut on a regular grid: {layout}"
                raise UsageError(msg)
            path = self._free_path(layout.spec.name)
            self._make_directory(path)
            codec = self._compression.codec_for(layout)
            document = zarr_documents.array_document(layout.spec, layout.chunk_shape, codec)
            meta = self._write_file(f"{path}/{GROUP_FILE}", zarr_documents.dump(document))
            array = self._arrays[layout.spec.name] = _Array(layout, path, document, meta, codec)
        elif array.layout is not layout and array.layout != layout:
            msg = f"{layout.spec.public_name!r} has another layout than when it was first written"
            raise UsageError(msg)
        return array

    def _free_path(self, name: tuple[str, ...]) -> str:
        """Return the name's usual path, or a placeholder if another name's differs from it in case only.

        Which names collide is known only when all are; then :meth:`_move` moves them.
        """
        parts = [names.escape(component) for component in name]
        prefixes = ["/".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        if any(self._spelling.get(prefix.lower(), prefix) != prefix for prefix in prefixes):
            return names.placeholder(name)
        return prefixes[-1]

    def _make_directory(self, path: str) -> None:
        parts = path.split("/")
        for depth in range(1, len(parts) + 1):
            directory = "/".join(parts[:depth])
            if directory not in self._directories:
                with storage_errors("make", os.path.join(self._where, directory)):
                    self._fs.mkdir(directory, dir_fd=self._fd)
                self._directories[directory] = None
                self._spelling[directory.lower()] = directory

    def _write_file(self, path: str, data: bytes) -> FileEntry:
        with storage_errors("write", os.path.join(self._where, path)):
            self._unsynced.add(path, files.write_new_file(self._fs, self._fd, path, data))
        self.nbytes += len(data)
        return FileEntry(path, len(data), checksum.crc32c(data))

    def _expect_complete(self, arrays: Sequence[ArrayLayout]) -> None:
        names.check_names(layout.spec.name for layout in arrays)
        given = {layout.spec.name for layout in arrays}
        for name in self._arrays.keys() - given:
            msg = f"{'/'.join(name)!r} was written, but is not among the arrays to publish"
            raise UsageError(msg)
        for layout in arrays:
            written = self._arrays[layout.spec.name].blocks if layout.spec.name in self._arrays else {}
            missing = [slot.chunk for slot in layout.slots if written.get(slot.chunk) is None]
            if missing:
                msg = f"{layout.spec.public_name!r} lacks the chunks {missing[:8]}; write them before commit"
                raise UsageError(msg)

    def _move(self, paths: Mapping[tuple[str, ...], str]) -> None:
        """Move the arrays that collide with others to the paths that all names together give them."""
        moving = [array for name, array in self._arrays.items() if array.path != paths[name]]
        for array in moving:
            self._rename(array, names.placeholder(array.layout.spec.name))
        # Empty ones must go before their like-spelt successors come: case may not count here.
        needed = {array.path for array in moving}
        for path in paths.values():
            parts = path.split("/")
            needed.update("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        for directory in reversed(list(self._directories)):
            if directory not in needed:
                with storage_errors("remove", os.path.join(self._where, directory)):
                    self._fs.rmdir(directory, dir_fd=self._fd)
                del self._directories[directory]
        for array in moving:
            self._rename(array, paths[array.layout.spec.name])

    def _rename(self, array: _Array, path: str) -> None:
        if array.path == path:
            return
        if "/" in path:
            self._make_directory(path.rpartition("/")[0])
        with storage_errors("rename", os.path.join(self._where, array.path)):
            self._fs.rename(array.path, path, dir_fd=self._fd)
        self._unsynced.renamed(array.path, path)
        self._directories.pop(array.path)
        self._directories[path] = None
        array.meta = FileEntry(f"{path}/{GROUP_FILE}", array.meta.size, array.meta.crc32c)
        array.path = path

    def _group_paths(self) -> list[str]:
        arrays = {array.path for array in self._arrays.values()}
        return sorted(directory for directory in self._directories if directory not in arrays)

    def _root(self, ordered: Sequence[_Array], attributes: Mapping[str, Any]) -> dict[str, Any]:
        return zarr_documents.root_document(
            attributes,
            groups=self._group_paths(),
            arrays={array.path: array.document for array in ordered},
            dtypes=[array.layout.spec.dtype for array in ordered],
        )


def _entry(array: _Array) -> ArrayEntry:
    coded = None
    if array.codec is not None:
        coded = Coded(array.codec, tuple(array.stored[slot.chunk] for slot in array.layout.slots))
    return ArrayEntry(array.layout.spec, array.path, array.layout.chunk_shape, array.meta, coded)


def _block_checksums(array: _Array) -> bytes:
    return b"".join(np.asarray(array.blocks[slot.chunk], "<u4").tobytes() for slot in array.layout.slots)
