"""Looking at checkpoints: which there are, what one holds, and slices of its tensors.

Promise: opening reads names, shapes and metadata only, and indexing a tensor reads the bytes of the
smallest box around what is wanted (in whole verified blocks), nothing else. What is returned was
compared with its checksums.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from gockpt.document import SavedState, parse
from gockpt.errors import ManifestCorrupt, TensorNotFound, UsageError
from gockpt.lazy import LazyTensor, not_found, read_whole
from gockpt.storage.listing import damaged_checkpoints, latest_step, list_checkpoints, open_checkpoint
from gockpt.storage.manifest import MANIFEST_FILE, STATE_FILE
from gockpt.storage.verify import Problem, VerifyReport
from gockpt.unplain import decode

if TYPE_CHECKING:
    from types import TracebackType

    from gockpt.storage.objects import Where
    from gockpt.storage.reader import StoredCheckpoint

__all__ = [
    "Checkpoint",
    "Metadata",
    "checked_step",
    "latest",
    "metadata_of",
    "open",
    "state_of",
    "steps",
    "verify",
]


@dataclass(frozen=True, slots=True)
class Metadata:
    """What is known about a checkpoint besides its tensors.

    Attributes:
        step: The user's step that was saved.
        optimizer_steps: Optimizer updates that the run had seen.
        exact: Whether every bit is what a blocking save would have written.
        inexact: Where it is not, and by how much, by name; empty for an exact one.
        extras: Names of the user's extras.
        optimizers: Class of each saved optimizer.
        buffers: Names of the model's entries that are buffers.
        path: Its directory.
        seq: Which publication of its path it was; the highest is the newest.
        attempt: Unique to this writing of the step.
        run: Shared by what one process published.
        parent: ``seq`` of the checkpoint that the run continued from, if known.
        created: ISO 8601 time.
        writer: Who wrote it.
        attributes: Attributes of the Zarr root group.
    """

    step: int
    optimizer_steps: int
    exact: bool
    inexact: Mapping[str, Any]
    extras: tuple[str, ...]
    optimizers: tuple[str, ...]
    buffers: tuple[str, ...]
    path: str
    seq: int
    attempt: str
    run: str
    parent: int | None
    created: str
    writer: Mapping[str, str]
    attributes: Mapping[str, Any]


class Checkpoint(Mapping[str, LazyTensor]):
    """A complete checkpoint as a mapping of names to lazy tensors; a context manager that closes it.

    Names are ``model/<fqn>``, ``optimizer/<fqn>/<state>`` and ``extra/<name>/...``; tied weights stand under
    each of their names.

    Attributes:
        metadata: Everything known about it besides the tensors.
        extra: The plain values of the user's extras, by name; each is read when asked for.
    """

    def __init__(self, stored: StoredCheckpoint) -> None:
        self._stored = stored
        self._state = state_of(stored)
        self._specs = {name: array.spec for name, array in stored.arrays.items()}
        for alias, target in self._state.aliases.items():
            self._specs[alias] = self._specs[target]
        self.metadata = metadata_of(stored, self._state)
        self.extra: Mapping[str, Any] = _Extras(stored, self._state)

    def __getitem__(self, name: str) -> LazyTensor:
        try:
            return LazyTensor(self._stored, self._specs[name], name)
        except (KeyError, TypeError):
            raise TensorNotFound(not_found(name, list(self._specs), self.metadata.step)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __repr__(self) -> str:
        return f"<Checkpoint step={self.metadata.step} tensors={len(self)} at {self.metadata.path!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close it; its tensors can't be read any more."""
        self._stored.close()


class _Extras(Mapping[str, Any]):
    def __init__(self, stored: StoredCheckpoint, state: SavedState) -> None:
        self._stored = stored
        self._state = state

    def __getitem__(self, name: str) -> Any:
        return decode(self._state.extra[name], lambda array: read_whole(self._stored, "/".join(array)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._state.extra)

    def __len__(self) -> int:
        return len(self._state.extra)

    def __repr__(self) -> str:
        return f"<extras: {', '.join(self) or 'none'}>"


def state_of(stored: StoredCheckpoint) -> SavedState:
    """Return what the state document says, with every alias leading to an array.

    Raises:
        ManifestCorrupt: If it is damaged or not valid.
    """
    where = f"{stored.path}/{STATE_FILE}"
    state = parse(stored.state(), where=where)
    for alias, target in state.aliases.items():
        if target not in stored.arrays or alias in stored.arrays:
            msg = f"{where} is not valid: the alias {alias!r} leads to {target!r}"
            raise ManifestCorrupt(msg)
    return state


def metadata_of(stored: StoredCheckpoint, state: SavedState) -> Metadata:
    """Return what manifest and state document say about a checkpoint."""
    manifest = stored.manifest
    return Metadata(
        step=manifest.step,
        optimizer_steps=state.optimizer_steps,
        exact=manifest.exact,
        inexact=state.inexact,
        extras=tuple(state.extra),
        optimizers=tuple(entry.kind for entry in state.optimizers),
        buffers=state.buffers,
        path=stored.path,
        seq=manifest.seq,
        attempt=manifest.attempt,
        run=manifest.run,
        parent=manifest.parent,
        created=manifest.created,
        writer=manifest.writer,
        attributes=manifest.attributes,
    )


def open(path: Where, step: int | None = None) -> Checkpoint:
    """Open a checkpoint for looking into it; reads names, shapes and metadata, no tensor.

    Args:
        path: Where checkpoints are saved, or one checkpoint's own directory.
        step: The wanted step; ``None`` for the newest (published last, whatever its step).

    Raises:
        CheckpointNotFound: If there is no complete checkpoint, or none of that step.
        NotACheckpoint: If the path is a file, or a directory that gockpt didn't write.
        ManifestCorrupt: If its manifest or state document is damaged.
    """
    stored = open_checkpoint(path, checked_step(step))
    try:
        return Checkpoint(stored)
    except BaseException:
        stored.close()
        raise


def steps(path: Where) -> list[int]:
    """Return the steps of the complete checkpoints in a path, ascending; none if it does not exist.

    Raises:
        NotACheckpoint: If the path is no directory.
    """
    return sorted({entry.step for entry in list_checkpoints(path)})


def latest(path: Where) -> int | None:
    """Return the step of the newest complete checkpoint, ``None`` if there is none.

    The newest is the one published last: after a run went back to step 1000 and saved 1100, that is
    1100, though 1500 may still be there.

    Raises:
        NotACheckpoint: If the path is no directory.
    """
    return latest_step(path)


def verify(path: Where, step: int | None = None) -> VerifyReport:
    """Read every byte of a checkpoint and compare it with what was written.

    Without a step it is the newest whose manifest can be read; those whose manifest can't are reported too.

    Returns:
        The report: ``.ok``, and ``.problems`` by file. Damage is reported, not raised.

    Raises:
        CheckpointNotFound: If there is no complete checkpoint, or none of that step.
        NotACheckpoint: If the path is a file, or a directory that gockpt didn't write.
    """
    try:
        stored = open_checkpoint(path, checked_step(step))
    except ManifestCorrupt as error:
        problem = Problem(MANIFEST_FILE, None, str(error))
        unknown = -1
        return VerifyReport(str(path), unknown if step is None else step, unknown, 0, 0, (problem,))
    with stored:
        report = stored.verify()
        if report.ok:
            try:
                state_of(stored)
            except ManifestCorrupt as error:
                return dataclasses.replace(report, problems=(Problem(STATE_FILE, None, str(error)),))
    if step is None:
        # One of these may be the newest: a path with such a checkpoint in it is not well.
        damaged = tuple(
            Problem(f"{name}/{MANIFEST_FILE}", None, str(error))
            for name, error in damaged_checkpoints(path).items()
        )
        report = dataclasses.replace(report, problems=(*report.problems, *damaged))
    return report


def checked_step(step: Any) -> int | None:
    """Return the step that a caller asked for, or raise :class:`UsageError`."""
    if step is None:
        return None
    if hasattr(step, "__index__") and not isinstance(step, bool) and operator.index(step) >= 0:
        return operator.index(step)
    msg = f"step={step!r}: expected a whole number from 0, or None for the newest"
    raise UsageError(msg)
