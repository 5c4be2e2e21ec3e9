"""Outline of a checkpoint: the documents that follow from its arrays, computed once for all saves of a run.

Promise: an outline gives the same results as a new one for the same arrays. It holds nothing specific to a
save (numbers, attributes, the choice of encoded arrays). Safe to use from several threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gockpt.errors import UsageError
from gockpt.storage.format import array_paths, checksum, chunk_grid, manifest, zarr_metadata
from gockpt.storage.format.archive_plan import ArchivePlan
from gockpt.storage.format.manifest import GROUP_FILE
from gockpt.storage.format.manifest_arrays import encode_arrays
from gockpt.storage.format.manifest_entries import ArrayEntry, FileEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gockpt.core.arena_layout import ArrayLayout

__all__ = ["ArrayFile", "Outline", "RawArrays"]


@dataclass(frozen=True, slots=True)
class ArrayFile:
    """The document of one array.

    Attributes:
        codec: Codec of the array's chunks; ``None``: raw.
        text: Its bytes.
        entry: Its entry in the manifest.
    """

    codec: str | None
    text: bytes
    entry: FileEntry


@dataclass(frozen=True, slots=True)
class RawArrays:
    """A manifest's list of arrays if all are raw.

    Attributes:
        entries: The entry of each array.
        text: The list as JSON: see :func:`~gockpt.storage.format.manifest_arrays.encode_arrays`.
        blocks_nbytes: Length of the file of their block checksums.
    """

    entries: tuple[ArrayEntry, ...]
    text: bytes
    blocks_nbytes: int


class Outline:
    """Paths of all arrays, and their documents.

    Attributes:
        arrays: All arrays, in the manifest's order.
        paths: The directory of each, by name.
        files: The paths of all files that are neither in an array's directory nor the manifest.
        groups: The directories that hold arrays, but for the root: parents before children.
        vetted: The plans, as for :meth:`raw`, with which a manifest of these arrays, all raw, was parsed and
            accepted.
    """

    def __init__(self, arrays: Iterable[ArrayLayout]) -> None:
        """Compute the path of every array.

        Raises:
            UsageError: If names conflict.
            UnsupportedState: If a name has no path.
        """
        self.arrays = tuple(arrays)
        self.vetted: set[ArchivePlan | None] = set()
        found = [array.spec.name for array in self.arrays]
        array_paths.check_names(found)
        self.paths = array_paths.escape_all(found)
        self.files = manifest.expected_files(self.paths)
        ends = len(GROUP_FILE) + 1
        self.groups = [path[:-ends] for path in self.files if path.endswith(f"/{GROUP_FILE}")]
        self._texts: dict[tuple[Any, ...], tuple[bytes, int]] = {}
        self._documents: dict[tuple[tuple[str, ...], str | None], ArrayFile] = {}
        self._consolidated: tuple[tuple[str | None, ...], bytes | None] | None = None
        self._raw: dict[ArchivePlan | None, RawArrays] = {}
        self._plan: tuple[tuple[str | None, ...], ArchivePlan] | None = None

    def document(self, array: ArrayLayout, codec: str | None) -> ArrayFile:
        """Return the document of an array whose chunks are encoded with a codec.

        Raises:
            UsageError: If its grid isn't regular, as readers expect.
        """
        name = array.spec.name
        made = self._documents.get((name, codec))
        if made is None:
            if not chunk_grid.is_regular(array):
                msg = f"{array.spec.public_name!r} is not cut on a regular grid: {array}"
                raise UsageError(msg)
            # The document doesn't name its array: thousands of the same shape have the same one.
            kind = (array.spec.shape, array.spec.dtype, array.chunk_shape, codec)
            known = self._texts.get(kind)
            if known is None:
                text = zarr_metadata.dump(zarr_metadata.array_document(array.spec, array.chunk_shape, codec))
                known = self._texts[kind] = text, checksum.crc32c(text)
            entry = FileEntry(f"{self.paths[name]}/{GROUP_FILE}", len(known[0]), known[1])
            self._documents[name, codec] = made = ArrayFile(codec, known[0], entry)
        return made

    def consolidated(self, codecs: tuple[str | None, ...]) -> bytes | None:
        """Return all documents in one, for the root's; ``None`` if readers are better off without.

        Args:
            codecs: The codec of each array's chunks.
        """
        known = self._consolidated
        if known is None or known[0] != codecs:
            texts = {
                self.paths[array.spec.name]: self.document(array, codec).text
                for array, codec in zip(self.arrays, codecs, strict=True)
            }
            dtypes = [array.spec.dtype for array in self.arrays]
            known = codecs, zarr_metadata.consolidated(groups=self.groups, arrays=texts, dtypes=dtypes)
            self._consolidated = known
        return known[1]

    def archive(self, codec_for: Callable[[ArrayLayout], str | None]) -> ArchivePlan:
        """Return the places of all raw chunks in an archive, and the documents that it holds.

        Args:
            codec_for: Returns the codec of an array's chunks; ``None``: raw.
        """
        codecs = tuple(codec_for(array) for array in self.arrays)
        if self._plan is None or self._plan[0] != codecs:
            group = zarr_metadata.dump(zarr_metadata.group_document())
            documents = [(f"{path}/{GROUP_FILE}", group) for path in self.groups]
            for array, codec in zip(self.arrays, codecs, strict=True):
                made = self.document(array, codec)
                documents.append((made.entry.path, made.text))
            paths = [self.paths[array.spec.name] for array in self.arrays]
            self._plan = codecs, ArchivePlan(self.arrays, paths, codecs, documents)
            self._raw = {plan: raw for plan, raw in self._raw.items() if plan is None}
        return self._plan[1]

    def raw(self, plan: ArchivePlan | None = None) -> RawArrays:
        """Return the manifest's list of the arrays if all are raw.

        Args:
            plan: Their places in an archive; ``None`` in a directory.
        """
        raw = self._raw.get(plan)
        if raw is None:
            entries = tuple(
                ArrayEntry(
                    array.spec,
                    self.paths[array.spec.name],
                    array.chunk_shape,
                    self.document(array, None).entry,
                    at=None if plan is None else plan.at[number],
                )
                for number, array in enumerate(self.arrays)
            )
            nbytes = 4 * sum(entry.block_count for entry in entries)
            raw = self._raw[plan] = RawArrays(entries, encode_arrays(entries), nbytes)
        return raw
