"""Search for the newest checkpoint that verifies or is finite.

Promise: with ``whole``, the returned checkpoint has just been read as a whole and verified; with ``finite``,
its parameters and optimizer state have no NaN or Inf. Every checkpoint passed over is logged and returned
with the reason.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gockpt.catalog import state_of
from gockpt.core.boxes import Box
from gockpt.core.nonfinite import NonFinite, is_judged, nonfinite_of, summary
from gockpt.errors import (
    CheckpointCorrupt,
    CheckpointNotFound,
    CheckpointPruned,
    FormatTooNew,
    ManifestCorrupt,
    NonFiniteCheckpoint,
)
from gockpt.storage.read.find import (
    damaged_checkpoints,
    list_checkpoints,
    open_checkpoint,
    open_listed,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gockpt.core.array_spec import ArraySpec
    from gockpt.state.saved_document import SavedState
    from gockpt.storage.object_store.client import Where
    from gockpt.storage.read.checkpoint import StoredCheckpoint

__all__ = ["PassedOver", "expect_finite", "newest_good"]

_log = logging.getLogger("gockpt")

SHOWN = 3
"""Problems of one checkpoint that are listed before the rest is counted."""

PART = 32 << 20
"""Bytes read at a time to count NaN and Inf in a checkpoint without counts."""


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A checkpoint that was not loaded because it is damaged or not finite.

    Attributes:
        step: Its step.
        path: Its directory or URL.
        why: The reason.
    """

    step: int
    path: str
    why: str


def newest_good(path: Where, *, whole: bool, finite: bool) -> tuple[StoredCheckpoint, tuple[PassedOver, ...]]:
    """Open the newest checkpoint that meets the conditions.

    Args:
        path: Where checkpoints are saved or uploaded to, or one checkpoint's own directory, archive or URL.
        whole: Whether every byte has to match its checksum; reads all of each checkpoint that is tried.
        finite: Whether parameters and optimizer state must have no NaN or Inf; reads them if a checkpoint
            has no counts.

    Returns:
        The open checkpoint, and those passed over: first the ones without a valid manifest, which may be
        newer or older, then the others, newest first.

    Raises:
        CheckpointNotFound: If there is no checkpoint.
        FormatTooNew: If a later gockpt wrote one that may be newer than all others.
        CheckpointCorrupt: If none is whole; names each one's problems.
        NonFiniteCheckpoint: If none meets the conditions, and at least one isn't finite.
        CheckpointPruned: If one was removed while it was read: a newer one may exist.
    """
    damaged = damaged_checkpoints(path)
    passed = [
        PassedOver(child.step, child.path, str(error))
        for child, error in damaged.items()
        if child.step is not None
    ]
    entries = list_checkpoints(path, superseded=True)
    newest = entries[-1].seq if entries else None
    for child, error in damaged.items():
        if isinstance(error, FormatTooNew) and not child.replaced and error.may_be_newer_than(newest):
            raise error
    if not entries and not passed:
        return open_checkpoint(path), ()  # raises, and names the path's contents
    infinite = False
    for entry in reversed(entries):
        try:
            stored = open_listed(path, entry)
        except CheckpointNotFound as error:
            msg = f"{entry.path} was removed while a newer checkpoint was being read; try again"
            raise CheckpointPruned(msg) from error
        try:
            why = _wrong(stored) if whole else None
            what = "damaged"
            if why is None and finite and (why := _infinite(stored)) is not None:
                infinite, what = True, "not finite"
        except BaseException:
            stored.close()
            raise
        if why is None:
            return stored, tuple(passed)
        stored.close()
        passed.append(PassedOver(entry.step, entry.path, why))
        at = (entry.step, entry.path, what, why)
        _log.warning("passing over the checkpoint of step %d, %s, which is %s: %s", *at)
    each = "; ".join(f"step {one.step} ({one.path}): {one.why}" for one in passed)
    if infinite:
        msg = (
            f"no checkpoint in {path!s} is finite, and nothing was changed; load without finite=True. {each}"
        )
        raise NonFiniteCheckpoint(msg)
    msg = f"no checkpoint in {path!s} is whole, and nothing was changed. {each}"
    raise CheckpointCorrupt(msg)


def expect_finite(stored: StoredCheckpoint) -> None:
    """Refuse a checkpoint whose parameters or optimizer state have NaN or Inf.

    Raises:
        NonFiniteCheckpoint: If they have.
    """
    why = _infinite(stored)
    if why is not None:
        msg = (
            f"the checkpoint of step {stored.step} is not finite, and nothing was changed: {why}. "
            "Load another step, the newest that is finite (without step), or this one without finite=True"
        )
        raise NonFiniteCheckpoint(msg)


def _wrong(stored: StoredCheckpoint) -> str | None:
    """Return a checkpoint's problems, after reading all of it; ``None`` if it has none."""
    report = stored.verify()
    if not report.ok:
        left = len(report.problems) - SHOWN + report.more
        more = f"; and {left} more" if left > 0 else ""
        return "; ".join(str(problem) for problem in report.problems[:SHOWN]) + more
    try:
        state_of(stored)
    except ManifestCorrupt as error:
        return str(error)
    return None


def _infinite(stored: StoredCheckpoint) -> str | None:
    """Return the NaN and Inf of parameters and optimizer state as text; ``None`` if they have none."""
    found = nonfinite_of(stored.manifest.attributes)
    if found is None:
        _log.info("step %d has no counts of NaN and Inf: reading it", stored.step)
        found = _counted(stored, state_of(stored))
    return None if found.finite else str(found)


def _counted(stored: StoredCheckpoint, saved: SavedState) -> NonFinite:
    """Read parameters and optimizer state, a part at a time, and count NaN and Inf in them."""
    from gockpt.kernels.nonfinite_numba import count, is_counted

    buffers = frozenset(saved.buffers)
    counts: dict[str, tuple[int, int]] = {}
    for name, array in stored.arrays.items():
        if is_counted(array.spec.dtype) and is_judged(name, buffers):
            nan = inf = 0
            for box in _parts(array.spec):
                data = np.empty(box.numel * array.spec.itemsize, np.uint8)
                stored.read_into(name, box, data)
                more = count(data, array.spec.dtype)
                nan, inf = nan + more[0], inf + more[1]
            counts[name] = (nan, inf)
    return summary(counts, buffers)


def _parts(spec: ArraySpec) -> Iterator[Box]:
    """Yield boxes of whole rows of about :data:`PART` bytes that make up an array."""
    if not spec.shape:
        yield Box((), ())
        return
    rows = max(1, PART * spec.shape[0] // max(1, spec.nbytes))
    for first in range(0, spec.shape[0], rows):
        many = min(rows, spec.shape[0] - first)
        yield Box((first, *([0] * (len(spec.shape) - 1))), (many, *spec.shape[1:]))
