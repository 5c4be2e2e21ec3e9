"""One complete checkpoint, opened for reading.

Promise: only bytes that the manifest vouches for are handed out (with ``verify=True``), only the
wanted ones are read, and a checkpoint that is pruned meanwhile is told apart from a damaged one.
Zarr's documents are never consulted: the manifest says everything.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from gockpt.core.array_spec import public_name
from gockpt.errors import (
    CheckpointCorrupt,
    CheckpointPruned,
    ChunkCorrupt,
    ManifestCorrupt,
    TensorNotFound,
    UsageError,
)
from gockpt.storage.format import strict_json
from gockpt.storage.format.manifest import BLOCKS_FILE, MANIFEST_FILE, STATE_FILE, Manifest
from gockpt.storage.local import verified
from gockpt.storage.read.location import GONE, MAX_MANIFEST_BYTES, read_document, read_small
from gockpt.storage.read.read_execute import PIECE, Source, Task, execute
from gockpt.storage.read.read_plan import plan_reads
from gockpt.storage.read.verify import VerifyReport, verify_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    import numpy.typing as npt

    from gockpt.core.arena_layout import ArrayLayout
    from gockpt.core.array_spec import ArraySpec
    from gockpt.core.boxes import Box
    from gockpt.storage.format.manifest_entries import ArrayEntry
    from gockpt.storage.read.location import Files

__all__ = ["StoredArray", "StoredCheckpoint", "Wanted", "manifest_bytes"]

MAX_GAP = 64 << 10
"""Gaps between wanted bytes below this are read along: a seek would cost as much."""


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One array of a checkpoint.

    Attributes:
        entry: What the manifest says about it.
        first_block: Where its entries begin in the block checksums.
    """

    entry: ArrayEntry
    first_block: int

    @property
    def spec(self) -> ArraySpec:
        """Name, global shape and dtype."""
        return self.entry.spec

    @property
    def layout(self) -> ArrayLayout:
        """The geometry of its chunks, computed anew; slot offsets count from 0."""
        return self.entry.layout()


@dataclass(frozen=True, slots=True)
class Wanted:
    """A region of an array, and where it goes.

    Attributes:
        name: Public name of the array.
        box: The region; ``None`` for the whole array.
        out: 1-D ``uint8``, C-contiguous, writable, exactly the region's bytes; need not be aligned.
    """

    name: str
    box: Box | None
    out: npt.NDArray[np.uint8]


class StoredCheckpoint:
    """A complete checkpoint, by its open files; a context manager that closes them.

    Reads may come from several threads at once. It stays readable when its directory is renamed.

    Attributes:
        path: Where it was opened.
        manifest: Everything known without reading data.
        arrays: Every stored array by its public name, in the manifest's order.
    """

    def __init__(self, files: Files, path: str, manifest: Manifest, *, threads: int) -> None:
        """Take over the files of a checkpoint; large reads use up to ``threads``.

        Raises:
            ManifestCorrupt: If such files can't have that manifest; they stay open then.
        """
        files.accept(manifest, where=path)
        self.path = path
        self.manifest = manifest
        self.arrays: Mapping[str, StoredArray] = MappingProxyType(
            {
                public_name(entry.spec.name): StoredArray(entry, first)
                for entry, first in zip(manifest.arrays, manifest.first_blocks(), strict=False)
            }
        )
        self._files = files
        # Most callers never close a checkpoint they look into; its files are closed with it.
        self._close = weakref.finalize(self, files.close)
        self._threads = threads
        self._lock = threading.Lock()
        self._crcs: npt.NDArray[np.uint32] | None = None
        self._bytes_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<StoredCheckpoint step={self.step} seq={self.seq} arrays={len(self.arrays)} at {self.path!r}>"
        )

    def close(self) -> None:
        """Close the files. Not while another thread reads; again does nothing."""
        self._close()

    @property
    def files(self) -> Files:
        """The files of which it consists."""
        return self._opened()

    @property
    def step(self) -> int:
        """The user's step."""
        return self.manifest.step

    @property
    def seq(self) -> int:
        """Which publication of its path it was."""
        return self.manifest.seq

    @property
    def exact(self) -> bool:
        """Whether every bit equals a blocking save's."""
        return self.manifest.exact

    @property
    def bytes_read(self) -> int:
        """Bytes of chunk files read so far, by all calls; what direct I/O read beside them included."""
        return self._bytes_read

    def state(self) -> dict[str, Any]:
        """Return the state document as it was given at commit.

        Raises:
            ManifestCorrupt: If it differs from what was written, or is no JSON object.
            CheckpointPruned: If the checkpoint was removed meanwhile.
        """
        data = self._document(STATE_FILE)
        where = f"{self.path}/{STATE_FILE}"
        document = strict_json.loads(data, what=where, depth=strict_json.STATE_DEPTH)
        if type(document) is not dict:
            msg = f"{where} holds no JSON object"
            raise ManifestCorrupt(msg)
        return document

    def read_into(
        self, name: str, box: Box | None, out: npt.NDArray[np.uint8], *, verify: bool = True
    ) -> int:
        """Fill ``out`` with a region of an array, row-major; read no bytes beyond what that takes.

        Args:
            name: Public name of the array.
            box: The wanted region; ``None`` for the whole array.
            out: 1-D ``uint8``, C-contiguous, writable, exactly the region's bytes; need not be aligned.
            verify: Whether to read whole 1 MiB blocks and compare them with their checksums. Without
                it, rows are read exactly, and columns with the gaps between them that are small.

        Returns:
            The bytes read from chunk files.

        Raises:
            TensorNotFound: If there is no array of that name.
            UsageError: If the box is not inside the array, or ``out`` doesn't fit.
            ChunkCorrupt: If bytes are missing or wrong; the content of ``out`` is undefined then.
            CheckpointPruned: If the checkpoint was removed meanwhile.
        """
        return self.read_many([Wanted(name, box, out)], verify=verify)

    def read_many(
        self,
        wanted: Sequence[Wanted],
        *,
        verify: bool = True,
        begun: Callable[[int], None] = lambda _: None,
    ) -> int:
        """Fill many targets, which must not overlap, by one set of threads.

        Nothing is read before all of it is known to fit. Memory beside the targets is one piece of 8 MB
        per thread at most.

        Args:
            wanted: What to read, and where it goes; read about in this order.
            verify: As for :meth:`read_into`.
            begun: Called with an index into ``wanted`` before anything is written there; perhaps several
                times, and from several threads.

        Returns:
            The bytes read from chunk files.

        Raises:
            GockptError: As for :meth:`read_into`; the content of all that was begun is undefined then.
        """
        files = self._opened()
        arrays = [self._array(one.name) for one in wanted]
        for array, one in zip(arrays, wanted, strict=True):
            if one.box is not None:
                _check_box(array.spec, one.box)
            _check_target(array.spec, one.box, one.out)
        blocks = self._block_crcs() if verify and any(one.out.nbytes for one in wanted) else None
        tasks = []
        for array, one in zip(arrays, wanted, strict=True):
            crcs = None if blocks is None else blocks[array.first_block :]
            tasks.append(Task(one.name, Source(files, array.entry, crcs), one.box, one.out))
        got = execute(
            tasks,
            plan=lambda task: plan_reads(
                task.source.grid, task.region, verify=verify, piece=PIECE, max_gap=MAX_GAP
            ),
            threads=self._threads,
            explained=lambda name: self._explained(name, ChunkCorrupt),
            begun=begun,
        )
        with self._lock:
            self._bytes_read += got
        return got

    def verify(self, *, on_progress: Callable[[int, int], None] = lambda _done, _total: None) -> VerifyReport:
        """Read every file and compare it with the manifest; problems are reported, not raised.

        Args:
            on_progress: Called with the bytes checked and the bytes in all chunk files, from any thread.

        Raises:
            CheckpointPruned: If the checkpoint was removed meanwhile.
        """
        files = self._opened()
        report = verify_files(files, self.path, self.manifest, threads=self._threads, on_progress=on_progress)
        if report.problems and files.is_gone():
            raise CheckpointPruned(self._pruned())
        if not files.is_copy:
            verified.remember(self.manifest.attempt, ok=report.ok)
        return report

    def block_checksums(self, name: str) -> npt.NDArray[np.uint32]:
        """Return the crc32c of every block of an array's chunks; see :mod:`gockpt.storage.format.checksum`.

        Raises:
            TensorNotFound: If there is no array of that name.
            ManifestCorrupt: If they differ from what was written.
        """
        array = self._array(name)
        return self._block_crcs()[array.first_block :][: array.entry.block_count]

    def _opened(self) -> Files:
        if not self._close.alive:
            msg = f"the checkpoint {self.path!r} is closed; open it again"
            raise UsageError(msg)
        return self._files

    def _array(self, name: str) -> StoredArray:
        try:
            return self.arrays[name]
        except KeyError:
            some = ", ".join(repr(known) for known in list(self.arrays)[:3])
            more = f"; it has {len(self.arrays)} names, such as {some}" if some else ""
            msg = f"no tensor {name!r} in the checkpoint of step {self.step}{more}"
            raise TensorNotFound(msg) from None

    def _block_crcs(self) -> npt.NDArray[np.uint32]:
        """Return the checksums of all blocks; read, and checked as a whole, once."""
        with self._lock:
            if self._crcs is None:
                data = self._document(BLOCKS_FILE)
                self._crcs = np.frombuffer(data, "<u4")
            return self._crcs

    def _document(self, path: str) -> bytes:
        """Return a file that the manifest vouches for, checked."""
        entry = self.manifest.file(path)
        files = self._opened()
        with self._explained(path, ManifestCorrupt):
            return read_document(files, entry)

    @contextmanager
    def _explained(self, what: str, kind: type[CheckpointCorrupt]) -> Iterator[None]:
        """Turn what goes wrong with a file into an error that says whose file, and what it means."""
        try:
            yield
        except ManifestCorrupt:
            raise
        except CheckpointCorrupt as error:
            msg = f"{what}: {error} (in {self.path}); older checkpoints are not affected"
            raise kind(msg) from error
        except OSError as error:
            if error.errno not in GONE:
                raise
            if self._files.is_gone():
                raise CheckpointPruned(self._pruned()) from error
            msg = f"{what}: {error.filename or 'a file'} is missing (in {self.path})"
            raise kind(msg) from error

    def _pruned(self) -> str:
        return (
            f"the checkpoint of step {self.step} ({self.path}) was removed while it was being read; "
            "open a newer one"
        )


def manifest_bytes(files: Files, path: str) -> bytes:
    """Return what stands in the manifest's file.

    Raises:
        FileNotFoundError: If there is none.
        ManifestCorrupt: If it is no regular file, or too large.
    """
    try:
        return read_small(files, MANIFEST_FILE, limit=MAX_MANIFEST_BYTES)
    except CheckpointCorrupt as error:
        msg = f"{path}: {error}"
        raise ManifestCorrupt(msg) from error


def _check_box(spec: ArraySpec, box: Box) -> None:
    """Refuse a region that does not lie inside the array."""
    if len(box.shape) != len(spec.shape) or any(
        at + n > extent for at, n, extent in zip(box.start, box.shape, spec.shape, strict=True)
    ):
        msg = f"{box} does not lie inside {spec.public_name!r} of shape {spec.shape}"
        raise UsageError(msg)


def _check_target(spec: ArraySpec, box: Box | None, out: npt.NDArray[np.uint8]) -> None:
    """Refuse a target that isn't exactly the region's bytes."""
    nbytes = spec.nbytes if box is None else box.numel * spec.itemsize
    flags = out.flags
    if out.dtype != np.uint8 or out.shape != (nbytes,) or not (flags.c_contiguous and flags.writeable):
        region = "all" if box is None else str(box)
        msg = (
            f"reading {region} of {spec.public_name!r} ({spec.dtype}) needs a writable, contiguous uint8 "
            f"array of shape ({nbytes},), got {out.dtype} of shape {out.shape}"
        )
        raise UsageError(msg)
