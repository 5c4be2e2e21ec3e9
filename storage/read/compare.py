"""Compare two checkpoints: names, shapes, bytes, and what their documents say.

Promise: tensors that are called equal have equal bytes, each of which was compared with its checksum; with
``quick=True``, equal checksums of every MiB. Memory stays within two pieces of 8 MB per thread (some
times that while differing elements are counted), however large the tensors are; of compressed ones, within
as many chunks.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from gockpt.core.boxes import Box
from gockpt.storage.read.element_values import magnitudes_of_difference
from gockpt.storage.read.in_threads import in_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from gockpt.storage.format.manifest_entries import ArrayEntry
    from gockpt.storage.read.checkpoint import StoredCheckpoint

__all__ = ["DiffReport", "MetadataDifference", "TensorDifference", "compare", "pieces"]

PIECE = 8 << 20
"""Bytes of one tensor that are compared at once."""

THREADS = 4

_VALUES = 8
"""Values a list may have to be shown whole."""


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A tensor that both have, and that is not the same.

    Attributes:
        name: Its public name.
        shapes: Its shape in each.
        dtypes: Its dtype in each.
        elements: How many elements differ in their bits; ``None`` where shape or dtype do.
        max_abs_difference: The largest distance of two finite values; ``None`` if there is no such pair.
        not_finite: How many of the differing elements are a NaN or an infinity in at least one of them.
    """

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    dtypes: tuple[str, str]
    elements: int | None = None
    max_abs_difference: float | None = None
    not_finite: int = 0


@dataclass(frozen=True, slots=True)
class MetadataDifference:
    """Something in the documents that is not the same.

    Attributes:
        where: Its place, such as ``state.json/extra/sched/last_epoch``.
        values: What stands there in each: JSON values; long ones are described, absent ones ``None``.
    """

    where: str
    values: tuple[Any, Any]


@dataclass(frozen=True, slots=True)
class DiffReport:
    """What two checkpoints differ in.

    Attributes:
        paths: Where they are.
        steps: Their steps.
        only_in_a: Names that only the first has.
        only_in_b: Names that only the second has.
        changed: Tensors that both have and that differ.
        same: How many tensors are the same in both.
        metadata: Differences of the documents, but for what each save has its own of: step, time and so on.
        nbytes: Bytes that were compared, or taken as equal by their checksums, of each.
        quick: Whether equal checksums were taken as equal bytes.
    """

    paths: tuple[str, str]
    steps: tuple[int, int]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    changed: tuple[TensorDifference, ...]
    same: int
    metadata: tuple[MetadataDifference, ...]
    nbytes: int
    quick: bool

    @property
    def same_tensors(self) -> bool:
        """Whether both hold the same tensors, bit for bit."""
        return not (self.only_in_a or self.only_in_b or self.changed)

    @property
    def equal(self) -> bool:
        """Whether nothing differs at all."""
        return self.same_tensors and not self.metadata


def compare(
    a: StoredCheckpoint,
    b: StoredCheckpoint,
    *,
    quick: bool = False,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    threads: int = THREADS,
) -> DiffReport:
    """Compare two open checkpoints.

    Args:
        a: The first.
        b: The second.
        quick: Whether equal checksums of equally chunked arrays are taken as equal bytes.
        on_progress: Called with the bytes compared and the bytes there are (of one side), from any thread.
        threads: How many pieces are compared at once.

    Raises:
        CheckpointCorrupt: If one of them is damaged where it was read.
        CheckpointPruned: If one was removed meanwhile.
    """
    both = [name for name in a.arrays if name in b.arrays]
    unlike = {name for name in both if _geometry(a, name) != _geometry(b, name)}
    alike = [name for name in both if name not in unlike]
    total = sum(a.arrays[name].spec.nbytes for name in alike)
    known = {name for name in alike if quick and _same_checksums(a, b, name)}
    counts = {name: _Count() for name in alike}
    for stored in (a, b):  # a size that is a lie shows here, before there are pieces to compare
        if alike:
            stored.block_checksums(alike[0])
    tasks = (
        (name, box)
        for name in alike
        if name not in known
        for box in _boxes(a.arrays[name].entry, b.arrays[name].entry)
    )
    lock = threading.Lock()
    done = sum(a.arrays[name].spec.nbytes for name in known)
    on_progress(done, total)

    def work(task: tuple[str, Box], buffers: list[npt.NDArray[np.uint8]]) -> None:
        nonlocal done
        name, box = task
        spec = a.arrays[name].spec
        nbytes = box.numel * spec.itemsize
        if nbytes > buffers[0].nbytes:
            buffers[:] = _buffers(nbytes)
        ours, theirs = (buffer[:nbytes] for buffer in buffers)
        a.read_into(name, box, ours)
        b.read_into(name, box, theirs)
        found = _differences(ours, theirs, spec.dtype, spec.itemsize)
        with lock:
            counts[name].add(found)
            done += nbytes
            on_progress(done, total)

    in_threads(work, tasks, threads=threads, name="gockpt-compare", memory=_buffers)
    changed = []
    for name in both:
        shapes = (a.arrays[name].spec.shape, b.arrays[name].spec.shape)
        dtypes = (a.arrays[name].spec.dtype, b.arrays[name].spec.dtype)
        if name in unlike:
            changed.append(TensorDifference(name, shapes, dtypes))
        elif counts[name].elements:
            count = counts[name]
            changed.append(
                TensorDifference(name, shapes, dtypes, count.elements, count.largest, count.not_finite)
            )
    return DiffReport(
        paths=(a.path, b.path),
        steps=(a.step, b.step),
        only_in_a=tuple(name for name in a.arrays if name not in b.arrays),
        only_in_b=tuple(name for name in b.arrays if name not in a.arrays),
        changed=tuple(changed),
        same=len(both) - len(changed),
        metadata=tuple(_metadata(a, b)),
        nbytes=total,
        quick=quick,
    )


def pieces(shape: tuple[int, ...], itemsize: int, limit: int) -> Iterator[Box]:
    """Yield boxes of at most ``limit`` bytes that cover an array, each element once, in row-major order.

    Examples:
        >>> [box.start for box in pieces((2, 3), 4, 8)]
        [(0, 0), (0, 2), (1, 0), (1, 2)]
    """
    if 0 in shape:
        return
    inner = itemsize
    # The innermost dimensions that fit as a whole; the next one is cut, those before it taken one by one.
    axis = len(shape)
    while axis and inner * shape[axis - 1] <= limit:
        axis -= 1
        inner *= shape[axis]
    if not axis:
        yield Box((0,) * len(shape), shape)
        return
    axis -= 1
    rows = max(1, limit // inner)
    tail = shape[axis + 1 :]
    for outer in product(*(range(n) for n in shape[:axis])):
        for row in range(0, shape[axis], rows):
            start = (*outer, row, *(0 for _ in tail))
            yield Box(start, (*(1 for _ in outer), min(rows, shape[axis] - row), *tail))


@dataclass(slots=True)
class _Count:
    """What was found in the pieces of one tensor."""

    elements: int = 0
    largest: float | None = None
    not_finite: int = 0

    def add(self, found: tuple[int, float | None, int]) -> None:
        elements, largest, not_finite = found
        self.elements += elements
        self.not_finite += not_finite
        if largest is not None:
            self.largest = largest if self.largest is None else max(self.largest, largest)


def _boxes(a: ArrayEntry, b: ArrayEntry) -> Iterator[Box]:
    """Yield what is compared at once: a piece, or a whole chunk where reading a part means decoding all."""
    limit = max([PIECE, *(entry.chunk_nbytes for entry in (a, b) if entry.codec is not None)])
    return pieces(a.spec.shape, a.spec.itemsize, limit)


def _buffers(nbytes: int = PIECE) -> list[npt.NDArray[np.uint8]]:
    return [np.empty(nbytes, np.uint8), np.empty(nbytes, np.uint8)]


def _geometry(stored: StoredCheckpoint, name: str) -> tuple[tuple[int, ...], str]:
    spec = stored.arrays[name].spec
    return spec.shape, spec.dtype


def _same_checksums(a: StoredCheckpoint, b: StoredCheckpoint, name: str) -> bool:
    ours, theirs = a.arrays[name].entry, b.arrays[name].entry
    if ours.chunk_shape != theirs.chunk_shape or ours.coded != theirs.coded:
        return False
    return bool(np.array_equal(a.block_checksums(name), b.block_checksums(name)))


def _differences(
    a: np.ndarray[Any, Any], b: np.ndarray[Any, Any], dtype: str, itemsize: int
) -> tuple[int, float | None, int]:
    """Return how many elements differ, the largest finite distance, and how many are not finite."""
    if np.array_equal(a, b):
        return 0, None, 0
    where = np.flatnonzero((a.reshape(-1, itemsize) != b.reshape(-1, itemsize)).any(axis=1))
    ours, theirs = a.reshape(-1, itemsize)[where], b.reshape(-1, itemsize)[where]
    distances, finite = magnitudes_of_difference(ours, theirs, dtype)
    largest = float(distances.max()) if distances.size else None
    return len(where), largest, len(where) - int(finite)


def _metadata(a: StoredCheckpoint, b: StoredCheckpoint) -> Iterator[MetadataDifference]:
    if a.exact != b.exact:
        yield MetadataDifference("gockpt.json/exact", (a.exact, b.exact))
    ours, theirs = dict(a.manifest.writer), dict(b.manifest.writer)
    yield from _documents("gockpt.json/writer", ours, theirs)
    own = ({**a.manifest.attributes}, {**b.manifest.attributes})
    for attributes in own:
        attributes.pop("gockpt", None)  # repeats step and state.json
    yield from _documents("gockpt.json/attributes", *own)
    states = (a.state(), b.state())
    for state in states:
        state.pop("step", None)
    yield from _documents("state.json", *states)


_ABSENT = object()


def _documents(where: str, a: Any, b: Any) -> Iterator[MetadataDifference]:
    """Yield the innermost places at which two JSON values differ."""
    if type(a) is type(b) is dict:
        for key in [*a, *(key for key in b if key not in a)]:
            yield from _documents(f"{where}/{key}", a.get(key, _ABSENT), b.get(key, _ABSENT))
    elif type(a) is type(b) is list and len(a) == len(b) and any(isinstance(x, dict | list) for x in a + b):
        for index, (ours, theirs) in enumerate(zip(a, b, strict=True)):
            yield from _documents(f"{where}/{index}", ours, theirs)
    elif type(a) is not type(b) or a != b or str(a) != str(b):  # -0.0 equals 0.0
        yield MetadataDifference(where, (_shown(a), _shown(b)))


def _shown(value: Any) -> Any:
    if value is _ABSENT:
        return None
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, list) and (len(value) > _VALUES or any(isinstance(x, dict | list) for x in value)):
        return f"a list of {len(value)}"
    return (
        f"{value[:80]}... ({len(value)} characters)" if isinstance(value, str) and len(value) > 100 else value
    )
