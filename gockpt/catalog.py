"""Catalog of checkpoints: listing, metadata, comparison, verification and pruning, without torch.

Promise: only :func:`prune` changes anything, and it removes only what retention allows.
"""

from __future__ import annotations

import dataclasses
import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gockpt.core import retention
from gockpt.core.array_spec import public_name
from gockpt.core.exactness import Deviation, deviation_of
from gockpt.core.nonfinite import NonFinite, nonfinite_of
from gockpt.core.runs import ancestors_of
from gockpt.core.shortened import shortened
from gockpt.core.step_number import checked_step
from gockpt.deferred_signals import deferred
from gockpt.errors import CheckpointCorrupt, ManifestCorrupt, NotACheckpoint, UsageError
from gockpt.garbage_collection import collection_paused
from gockpt.options import Keep
from gockpt.state.saved_document import SavedState, parse
from gockpt.storage.format.manifest import MANIFEST_FILE, STATE_FILE
from gockpt.storage.local.catalog import looked_through
from gockpt.storage.local.store import Store
from gockpt.storage.read.compare import DiffReport, compare
from gockpt.storage.read.find import (
    CheckpointEntry,
    damaged_checkpoints,
    latest_step,
    list_checkpoints,
    location_at,
    open_checkpoint,
)
from gockpt.storage.read.verify import MAX_PROBLEMS, Problem, VerifyReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gockpt.core.runs import Ancestor
    from gockpt.storage.object_store.client import Where
    from gockpt.storage.read.checkpoint import StoredCheckpoint

    OnProgress = Callable[[int, int], None]

_SHOWN = 20  # names in a message

__all__ = [
    "Metadata",
    "Pruned",
    "checkpoints",
    "diff",
    "latest",
    "metadata_of",
    "prune",
    "state_of",
    "steps",
    "verify",
]


@dataclass(frozen=True, slots=True)
class Metadata:
    """Metadata of a checkpoint: everything known about it besides its tensors.

    Attributes:
        step: The user's step that was saved.
        optimizer_steps: Optimizer updates that the run had seen.
        exact: Whether every bit equals that of a blocking save.
        inexact: The inexact tensors and their deviation, by name; empty for an exact one.
        deviation: Measured deviation over all of these; ``None`` for an exact one.
        nonfinite: The NaN and Inf in it; ``None`` if an older gockpt wrote it, which did not count them.
        extras: Names of the user's extras.
        optimizers: Class of each saved optimizer.
        buffers: Names of the model's entries that are buffers.
        path: Its directory or archive.
        seq: Its number among its path's publications; the highest is the newest.
        attempt: Unique to this writing of the step.
        run: The training run's id, which a load preserves.
        ancestors: The runs that its state descends from, the latest first: id, and ``seq`` of the last
            checkpoint that counts; ``None`` if an older gockpt wrote it, where ``run`` is a process's.
        parent: ``seq`` of the checkpoint that the run continued from, if known.
        created: ISO 8601 time.
        writer: Program and version that wrote it.
        attributes: Attributes of the Zarr root group.
    """

    step: int
    optimizer_steps: int
    exact: bool
    inexact: Mapping[str, Any]
    deviation: Deviation | None
    nonfinite: NonFinite | None
    extras: tuple[str, ...]
    optimizers: tuple[str, ...]
    buffers: tuple[str, ...]
    path: str
    seq: int
    attempt: str
    run: str
    ancestors: tuple[Ancestor, ...] | None
    parent: int | None
    created: str
    writer: Mapping[str, str]
    attributes: Mapping[str, Any]


def state_of(stored: StoredCheckpoint) -> SavedState:
    """Return a checkpoint's state document; every alias refers to an array.

    Raises:
        ManifestCorrupt: If it is damaged or not valid.
    """
    where = f"{stored.path}/{STATE_FILE}"
    state = parse(stored.state(), where=where)
    for alias, target in state.aliases.items():
        known = target in stored.arrays or target in state.subclasses
        if not known or alias in stored.arrays or alias in state.subclasses:
            msg = f"{where} is not valid: the alias {alias!r} refers to {target!r}"
            raise ManifestCorrupt(msg)
    for name, saved in state.subclasses.items():
        for inner, array in saved.arrays():
            if name in stored.arrays or public_name(array) not in stored.arrays:
                msg = f"{where} is not valid: {'/'.join((name, *inner))!r} refers to {public_name(array)!r}"
                raise ManifestCorrupt(msg)
    return state


def metadata_of(stored: StoredCheckpoint, state: SavedState) -> Metadata:
    """Return a checkpoint's metadata, from its manifest and state document."""
    manifest = stored.manifest
    return Metadata(
        step=manifest.step,
        optimizer_steps=state.optimizer_steps,
        exact=manifest.exact,
        inexact=state.inexact,
        deviation=None if manifest.exact else deviation_of(manifest.attributes),
        nonfinite=nonfinite_of(manifest.attributes),
        extras=tuple(state.extra),
        optimizers=tuple(entry.kind for entry in state.optimizers),
        buffers=state.buffers,
        path=stored.path,
        seq=manifest.seq,
        attempt=manifest.attempt,
        run=manifest.run,
        ancestors=ancestors_of(manifest.attributes),
        parent=manifest.parent,
        created=manifest.created,
        writer=manifest.writer,
        attributes=manifest.attributes,
    )


def steps(path: Where) -> list[int]:
    """Return the steps of the complete checkpoints in a path, ascending; none if it does not exist.

    Raises:
        NotACheckpoint: If the path is neither a directory nor an archive.
    """
    return sorted({entry.step for entry in list_checkpoints(path)})


def latest(path: Where) -> int | None:
    """Return the step of the newest complete checkpoint, ``None`` if there is none.

    The newest is the one published last: after a run went back to step 1000 and saved 1100, that is
    1100, though 1500 may still be there.

    Raises:
        NotACheckpoint: If the path is neither a directory nor an archive.
    """
    return latest_step(path)


def checkpoints(path: Where, *, superseded: bool = False) -> list[CheckpointEntry]:
    """Return an entry for each complete checkpoint in a path, oldest publication first.

    Reads the manifests only. The list is empty if the path does not exist.

    Args:
        path: Where checkpoints are saved or uploaded to, or one checkpoint's own directory, archive or URL.
        superseded: Whether to include those that a newer publication of their step replaced.

    Raises:
        NotACheckpoint: If the path is neither a directory nor an archive.
    """
    return list_checkpoints(path, superseded=superseded)


def diff(
    path_a: Where,
    path_b: Where,
    step_a: int | None = None,
    step_b: int | None = None,
    *,
    quick: bool = False,
    on_progress: OnProgress | None = None,
) -> DiffReport:
    """Compare two checkpoints: names, shapes, every byte, and their documents.

    Args:
        path_a: Where checkpoints are saved, or one checkpoint's own directory or archive; or a URL.
        path_b: The same, of the other.
        step_a: The wanted step of the first; ``None`` for the newest.
        step_b: The wanted step of the second; ``None`` for the newest.
        quick: Whether equal checksums (crc32c, of each MiB) are taken as equal bytes; otherwise all are read.
        on_progress: Called with the bytes compared and the total, from any thread.

    Raises:
        CheckpointNotFound: If there is no complete checkpoint, or none of that step.
        NotACheckpoint: If a path is a file or directory that gockpt didn't write.
        CheckpointCorrupt: If one of them is damaged.
    """
    with (
        open_checkpoint(path_a, checked_step(step_a)) as a,
        open_checkpoint(path_b, checked_step(step_b)) as b,
    ):
        return compare(a, b, quick=quick, on_progress=on_progress or _unseen)


@dataclass(frozen=True, slots=True)
class Pruned:
    """Result of a pruning, or of its dry run.

    Attributes:
        removed: The removed checkpoints, oldest publication first; superseded ones included.
        kept: The remaining checkpoints.
        dry_run: Whether nothing was really removed.
        other_runs: Number of checkpoints of other runs than the newest's, neither counted nor removed.
    """

    removed: tuple[CheckpointEntry, ...]
    kept: tuple[CheckpointEntry, ...]
    dry_run: bool
    other_runs: int = 0


def prune(path: Where, keep: int | Keep, *, dry_run: bool = False) -> Pruned:
    """Remove checkpoints that no rule keeps; see :class:`~gockpt.options.Keep`. Readers survive it.

    Only checkpoints of the newest one's run are counted and removed, unless ``keep`` includes other runs.

    Args:
        path: Where checkpoints are saved; on this machine.
        keep: The number of newest checkpoints to keep, or all rules.
        dry_run: Whether to only return the result, by the same rules. Then nothing is locked or written.

    Raises:
        PathBusy: If a run saves there: let it prune with ``Options(keep=...)``.
        CheckpointNotFound: If the path doesn't exist, or has no complete checkpoint.
        NotACheckpoint: If the path is a file, or one checkpoint itself.
        CheckpointCorrupt: If only the newest would remain, which is read as a whole first, and it is damaged.
        StorageError: If the disk refuses; checkpoints to keep are not touched.
        UsageError: If the path is a URL, ``keep`` is a number below 1, or no checkpoint has the metric by
            which the best are chosen.
    """
    rules = keep if isinstance(keep, Keep) else Keep(newest=keep)
    with closing(location_at(path)) as location:
        path = location.path
        if location.kind == "object store":
            msg = f"{path} is in an object store, where gockpt deletes nothing; use the store's own tools"
            raise UsageError(msg)
    with open_checkpoint(path) as stored:
        itself = list_checkpoints(path)[-1:]
        if itself and os.path.realpath(itself[0].path) == os.path.realpath(path):
            msg = f"{path!s} is the checkpoint of step {stored.step} itself; give the path it was saved into"
            raise NotACheckpoint(msg)
    before = list_checkpoints(path, superseded=True)
    _expect_metric(before, rules)
    if rules.newest == 1 and not (report := verify(path)).ok:
        msg = (
            f"the newest checkpoint in {path!s}, step {report.step}, is damaged: {report.problems[0]}. "
            "Nothing was removed; keep at least 2"
        )
        raise CheckpointCorrupt(msg)
    if dry_run:
        with looked_through(path) as catalog:
            others = catalog.keep_to_newest_run()
            gone = {name for name, _ in catalog.expendable(rules)}
    else:
        with deferred(), Store(path) as store:
            others = store.keep_to_newest_run()
            store.prune(rules)
        left = {entry.path for entry in list_checkpoints(path, superseded=True)}
        gone = {Path(entry.path).name for entry in before if entry.path not in left}
    return Pruned(
        removed=tuple(entry for entry in before if Path(entry.path).name in gone),
        kept=tuple(entry for entry in before if Path(entry.path).name not in gone),
        dry_run=dry_run,
        other_runs=0 if rules.other_runs else others,
    )


def _expect_metric(entries: list[CheckpointEntry], keep: Keep) -> None:
    """Refuse to keep the best by a metric that no checkpoint has: it may be misspelt."""
    counted = [entry for entry in entries if not entry.superseded]
    judged = [retention.Publication(e.seq, e.step, e.metrics.get(keep.metric or "")) for e in counted]
    if not retention.unjudged(judged, keep):
        return
    names = sorted({name for entry in counted for name in entry.metrics})
    shown = shortened([repr(name) for name in names], _SHOWN)
    there = f"their numbers are {shown}" if names else "they have no numbers at all"
    msg = (
        f"metric={keep.metric!r}: no checkpoint here has a number of that name; {there}. Nothing was removed"
    )
    raise UsageError(msg)


def _unseen(_done: int, _total: int) -> None:
    """Ignore progress."""


def verify(path: Where, step: int | None = None, *, on_progress: OnProgress | None = None) -> VerifyReport:
    """Read every byte of a checkpoint and compare it with its checksums.

    Without a step it is the newest with a readable manifest; unreadable manifests are reported too.

    Args:
        path: Where checkpoints are saved or uploaded to, or one checkpoint's own directory, archive or URL.
        step: The wanted step; ``None`` for the newest.
        on_progress: Called with the bytes checked and the total, from any thread.

    Returns:
        The report: ``.ok``, ``.problems`` by file, and ``.more``, the number of unlisted ones. Damage is
        reported, not raised.

    Raises:
        CheckpointNotFound: If there is no complete checkpoint, or none of that step.
        NotACheckpoint: If the path is a file or directory that gockpt didn't write.
    """
    try:
        with collection_paused():
            stored = open_checkpoint(path, checked_step(step))
    except ManifestCorrupt as error:
        problem = Problem(MANIFEST_FILE, None, str(error))
        unknown = -1
        return VerifyReport(str(path), unknown if step is None else step, unknown, 0, 0, (problem,))
    with stored:
        report = stored.verify(on_progress=on_progress or _unseen)
        if report.ok:
            try:
                state_of(stored)
            except ManifestCorrupt as error:
                return dataclasses.replace(report, problems=(Problem(STATE_FILE, None, str(error)),))
    if step is None:
        # One of these may be the newest, so each is a problem of the path.
        damaged = tuple(
            Problem(f"{child.name}/{MANIFEST_FILE}", None, str(error))
            for child, error in damaged_checkpoints(path).items()
        )
        problems = (*report.problems, *damaged)
        more = report.more + len(problems[MAX_PROBLEMS:])
        report = dataclasses.replace(report, problems=problems[:MAX_PROBLEMS], more=more)
    return report
