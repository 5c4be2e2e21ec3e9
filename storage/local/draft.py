"""Draft of a checkpoint: its chunks, its documents and its manifest, whatever kind of files they go into.

Promise: after :meth:`Draft.sync` returned, all of it is on the disk; after :meth:`Draft.complete`, so is its
manifest. Every error is a :class:`StorageError` that names the file; after one the draft is unusable, and
nothing of it is written or synced again.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gockpt.core.arena_layout import CHECKSUM_BYTES
from gockpt.errors import ManifestCorrupt, UsageError
from gockpt.storage.format import checksum, chunk_grid, manifest, strict_json, zarr_metadata
from gockpt.storage.format.codecs import Coded
from gockpt.storage.format.json_fields import MAX_INTEGER
from gockpt.storage.format.manifest import BLOCKS_FILE, GROUP_FILE, STATE_FILE
from gockpt.storage.format.manifest_entries import ArrayEntry, FileEntry
from gockpt.storage.local.partial_files import Chunk
from gockpt.storage.local.stopwatch import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from gockpt.core.arena_layout import ArrayLayout, Slot
    from gockpt.storage.format.archive_plan import ArchivePlan
    from gockpt.storage.format.zarr_outline import ArrayFile, Outline
    from gockpt.storage.local.compression import Compression
    from gockpt.storage.local.partial_files import PartialFiles, StoredChunk

    Describe = Callable[[tuple[ArrayEntry, ...], tuple[FileEntry, ...]], manifest.Manifest]

__all__ = ["Contents", "Draft"]


@dataclass(frozen=True, slots=True)
class Contents:
    """Contents of a checkpoint to be written: everything but the bytes of its arrays.

    Attributes:
        arrays: All arrays, in the manifest's order.
        state: The state document: a JSON object.
        attributes: Attributes of the root group: a small JSON object.
        exact: Whether the checkpoint equals a blocking save bit for bit.
    """

    arrays: tuple[ArrayLayout, ...]
    state: Mapping[str, Any]
    attributes: Mapping[str, Any]
    exact: bool


@dataclass(slots=True)
class _Array:
    """An array to be written; ``blocks`` has a key for each chunk begun.

    Where it has a codec, ``stored`` has the encoded length of each chunk written; in an archive, ``at`` has
    the offset of each.
    """

    layout: ArrayLayout
    path: str
    made: ArrayFile | None = None
    blocks: dict[int, bytes | None] = field(default_factory=dict)
    stored: dict[int, int] = field(default_factory=dict)
    at: dict[int, int] = field(default_factory=dict)


class Draft:
    """One checkpoint that is being written. Chunks and documents may be written side by side.

    Attributes:
        nbytes: Bytes written so far: real rows, checksums, documents.
    """

    def __init__(
        self,
        files: PartialFiles,
        compression: Compression,
        outline: Outline,
        contents: Contents,
        plan: ArchivePlan | None = None,
    ) -> None:
        """Start with no files.

        Args:
            files: Where its files are written.
            compression: Which arrays are encoded.
            outline: What its arrays say of its files.
            contents: What there will be.
            plan: Places in the archive, if its files go into one.
        """
        self.nbytes = 0
        self._plan = plan
        self._files = files
        self._compression = compression
        self._outline = outline
        self._contents = contents
        self._stopwatch = Stopwatch()
        self._mutex = threading.Lock()
        self._making = threading.Lock()
        self._documenting = threading.Lock()
        self._arrays = {
            # The save's own layouts: whoever writes a chunk hands in the same objects.
            layout.spec.name: _Array(layout, outline.paths[layout.spec.name])
            for layout in contents.arrays
        }
        self._tried: manifest.Manifest | None = None
        self._documents: tuple[FileEntry, ...] | None = None

    def write_chunks(self, chunks: Sequence[tuple[ArrayLayout, Slot, memoryview]]) -> None:
        """Write chunks; see :meth:`gockpt.storage.local.transaction.Transaction.write_chunks`."""
        arrays = [self._expected(layout) for layout, _, _ in chunks]
        with self._mutex:
            for array, (layout, slot, _) in zip(arrays, chunks, strict=True):
                if slot.chunk in array.blocks:
                    msg = f"chunk {slot.chunk} of {layout.spec.public_name!r} was written before"
                    raise UsageError(msg)
                array.blocks[slot.chunk] = None
        raw: list[tuple[_Array, Chunk]] = []
        for array, (layout, slot, buffer) in zip(arrays, chunks, strict=True):
            codec = (array.made or self._make(array)).codec
            path = f"{array.path}/{chunk_grid.chunk_key(slot.chunk, len(layout.chunk_shape))}"
            if codec is None:
                raw.append((array, Chunk(path, layout, slot, buffer.cast("B"))))
                self._compression.sample(layout, slot, buffer)
                continue
            with self._compression.encoded(codec, layout, slot, buffer) as data, self._stopwatch:
                stored = self._files.write_encoded(path, data)
            self._note([(array, slot.chunk, stored)])
        if raw:
            with self._stopwatch:
                written = self._files.write_chunks([chunk for _, chunk in raw])
            found = zip(raw, written, strict=True)
            self._note([(array, chunk.slot.chunk, stored) for (array, chunk), stored in found])

    def _note(self, written: Iterable[tuple[_Array, int, StoredChunk]]) -> None:
        """Note what the manifest says of written chunks."""
        with self._mutex:
            for array, chunk, (blocks, nbytes, at) in written:
                array.blocks[chunk] = blocks
                array.stored[chunk] = nbytes - CHECKSUM_BYTES
                if at is not None:
                    array.at[chunk] = at
                self.nbytes += nbytes

    def restate(self, contents: Contents) -> None:
        """Hold other documents than it was begun with: the same arrays.

        Raises:
            UsageError: If the documents are written.
        """
        with self._documenting:
            if self._documents is not None:
                msg = "what a checkpoint holds can't be said otherwise once its documents are written"
                raise UsageError(msg)
            self._contents = contents

    def annotate(self, contents: Contents) -> None:
        """Have other attributes than it was begun with: once all chunks are written, before :meth:`finish`.

        Raises:
            StorageError: If the disk refuses.
        """
        with self._documenting:
            self._contents = contents
            if self._documents is None:
                return
            codecs = tuple((array.made or self._make(array)).codec for array in self._arrays.values())
            data = zarr_metadata.root(contents.attributes, self._outline.consolidated(codecs))
            self._files.replace_document(GROUP_FILE, data)
            self._count(len(data))
            entry = FileEntry(GROUP_FILE, len(data), checksum.crc32c(data))
            self._documents = tuple(entry if old.path == GROUP_FILE else old for old in self._documents)
            self._tried = None  # it was tried with the former attributes

    def write_documents(self, describe: Describe) -> None:
        """Write everything but the chunks, their checksums and the manifest; again is fine.

        Args:
            describe: Makes a manifest of what it says of the arrays and of the other files. It is tried here,
                while chunks are being written: parsing takes as long as the disk for 30 MB.

        Raises:
            UsageError: If an array's grid is none that readers know, a document has no exact form, or
                readers would refuse the manifest.
            StorageError: If the disk refuses.
        """
        with self._documenting:
            if self._documents is not None:
                return
            codecs = tuple((array.made or self._make(array)).codec for array in self._arrays.values())
            others = {
                STATE_FILE: strict_json.dumps(
                    dict(self._contents.state), what="the state document", depth=strict_json.STATE_DEPTH
                ),
                GROUP_FILE: zarr_metadata.root(self._contents.attributes, self._outline.consolidated(codecs)),
            }
            group = zarr_metadata.dump(zarr_metadata.group_document())
            documents = tuple(
                self._write_file(path, others.get(path, group))
                for path in self._outline.files
                if path != BLOCKS_FILE
            )
            if not any(codecs):  # else lengths are yet to be known
                raw = self._outline.raw(self._plan)
                blocks = FileEntry(BLOCKS_FILE, raw.blocks_nbytes, 0)
                content = describe(raw.entries, (*documents, blocks))
                if self._plan in self._outline.vetted:
                    _expect_readable(manifest.encode(_without_arrays(content)))
                    manifest.encode(content, raw.text)  # for its size
                else:
                    _expect_readable(manifest.encode(content, raw.text))
                    self._outline.vetted.add(self._plan)
                self._tried = content
            self._documents = documents

    def finish(self, describe: Describe) -> tuple[tuple[ArrayEntry, ...], tuple[FileEntry, ...]]:
        """Write what is left to write but the manifest: every chunk has been written.

        Returns:
            What the manifest says of the arrays and of the other files.

        Raises:
            UsageError: If chunks are missing; and as :meth:`write_documents`.
            StorageError: If the disk refuses.
        """
        for array in self._arrays.values():
            missing = [slot.chunk for slot in array.layout.slots if array.blocks.get(slot.chunk) is None]
            if missing:
                name = array.layout.spec.public_name
                msg = f"{name!r} lacks the chunks {missing[:8]}; write them before commit"
                raise UsageError(msg)
        self.write_documents(describe)
        blocks = b"".join(_block_checksums(array) for array in self._arrays.values())
        entry = self._write_file(BLOCKS_FILE, blocks)
        entries = self._entries() if self._tried is None else self._tried.arrays
        return entries, (*(self._documents or ()), entry)

    def sync(self) -> None:
        """Make every file durable."""
        with self._stopwatch:
            self._files.sync()

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
        known = self._tried is not None and content.arrays is self._tried.arrays
        data = manifest.encode(content, self._outline.raw(self._plan).text if known else None)
        if self._tried is None or not _is_as_good(content, self._tried):
            _expect_readable(data)
        self._files.complete(data)
        self.nbytes += len(data)

    def close(self) -> None:
        """Close all open files."""
        self._files.close()

    def _expected(self, layout: ArrayLayout) -> _Array:
        array = self._arrays.get(layout.spec.name)
        if array is None:
            msg = f"{layout.spec.public_name!r} is not among the arrays that the checkpoint was begun with"
            raise UsageError(msg)
        if array.layout is not layout and array.layout != layout:
            msg = f"{layout.spec.public_name!r} has another layout than the checkpoint was begun with"
            raise UsageError(msg)
        return array

    def _make(self, array: _Array) -> ArrayFile:
        """Write an array's document, unless it is there."""
        with self._making:
            if array.made is None:
                codec = self._compression.codec_for(array.layout)
                document = self._outline.document(array.layout, codec)
                self._write(document.entry.path, document.text)
                array.made = document
            return array.made

    def _write(self, path: str, data: bytes) -> None:
        self._files.write_document(path, data)
        self._count(len(data))

    def _count(self, nbytes: int) -> None:
        with self._mutex:
            self.nbytes += nbytes

    def _write_file(self, path: str, data: bytes) -> FileEntry:
        self._write(path, data)
        return FileEntry(path, len(data), checksum.crc32c(data))

    def _entries(self) -> tuple[ArrayEntry, ...]:
        is_archive = self._plan is not None
        return tuple(
            _entry(array, array.made or self._make(array), is_archive=is_archive)
            for array in self._arrays.values()
        )


def _entry(array: _Array, made: ArrayFile, *, is_archive: bool) -> ArrayEntry:
    layout, coded = array.layout, None
    if made.codec is not None:
        coded = Coded(made.codec, tuple(array.stored[slot.chunk] for slot in layout.slots))
    at = tuple(array.at[slot.chunk] for slot in layout.slots) if is_archive else None
    return ArrayEntry(layout.spec, array.path, layout.chunk_shape, made.entry, coded, at)


def _without_arrays(content: manifest.Manifest) -> manifest.Manifest:
    """Return a manifest as short as can be that readers take if they take this one's arrays."""
    own = (content.file(GROUP_FILE), content.file(STATE_FILE), FileEntry(BLOCKS_FILE, 0, 0))
    return replace(content, arrays=(), files=own)


def _block_checksums(array: _Array) -> bytes:
    return b"".join(array.blocks[slot.chunk] or b"" for slot in array.layout.slots)


def _expect_readable(data: bytes) -> None:
    """Refuse a manifest that readers would refuse: better no checkpoint than one that nobody can open.

    Raises:
        UsageError: If they would.
    """
    try:
        manifest.parse(data, where="the manifest")
    except ManifestCorrupt as error:
        msg = f"this can't be published: {error}"
        raise UsageError(msg) from error


def _is_as_good(content: manifest.Manifest, tried: manifest.Manifest) -> bool:
    """Whether it differs from one that readers take in nothing but what can't make them refuse it.

    That is: when it was made, a number that is still higher than the parent's, one checksum.
    """
    blocks = content.file(BLOCKS_FILE)
    files = tuple(
        replace(entry, crc32c=blocks.crc32c) if entry.path == BLOCKS_FILE else entry for entry in tried.files
    )
    alike = replace(tried, seq=content.seq, created=content.created, files=files)
    return tried.seq <= content.seq <= MAX_INTEGER and alike == content
