"""The newest checkpoint that verifies, and what had to be passed over to get there.

Promise: nothing is handed on that was not read as a whole and found right just before. What is passed over
is logged and named with what is wrong with it, never skipped in silence.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gockpt.errors import CheckpointCorrupt, CheckpointNotFound, CheckpointPruned, ManifestCorrupt
from gockpt.overview import state_of
from gockpt.storage import directory_names
from gockpt.storage.listing import damaged_checkpoints, list_checkpoints, open_checkpoint, open_listed
from gockpt.storage.paths import located

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gockpt.storage.objects import Where
    from gockpt.storage.reader import StoredCheckpoint

__all__ = ["PassedOver", "newest_whole"]

_log = logging.getLogger("gockpt")

SHOWN = 3
"""Problems of one checkpoint that are told before the rest is counted."""


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A checkpoint that was not loaded since it is damaged.

    Attributes:
        step: Its step.
        path: Its directory or URL.
        why: What is wrong with it.
    """

    step: int
    path: str
    why: str


def newest_whole(path: Where) -> tuple[StoredCheckpoint, tuple[PassedOver, ...]]:
    """Open the newest checkpoint of which every byte is as written; reads all of each that it tries.

    Returns:
        The open checkpoint, and what was passed over: first what has no valid manifest, which may be newer
        or older, then the others, newest first.

    Raises:
        CheckpointNotFound: If there is none at all.
        CheckpointCorrupt: If none is whole; says what is wrong with each.
        CheckpointPruned: If one was removed while it was being read: a newer one may be there.
    """
    passed = list(_without_manifest(path))
    entries = list_checkpoints(path, superseded=True)
    if not entries and not passed:
        return open_checkpoint(path), ()  # raises, and says what is there instead
    for entry in reversed(entries):
        try:
            stored = open_listed(path, entry)
        except CheckpointNotFound as error:
            msg = f"{entry.path} was removed while a newer checkpoint was being read; try again"
            raise CheckpointPruned(msg) from error
        try:
            why = _wrong(stored)
        except BaseException:
            stored.close()
            raise
        if why is None:
            return stored, tuple(passed)
        stored.close()
        passed.append(PassedOver(entry.step, entry.path, why))
        _log.warning("passing over the damaged checkpoint of step %d, %s: %s", entry.step, entry.path, why)
    each = "; ".join(f"step {one.step} ({one.path}): {one.why}" for one in passed)
    msg = f"no checkpoint in {path!s} is whole, and nothing was changed. {each}"
    raise CheckpointCorrupt(msg)


def _without_manifest(path: Where) -> Iterator[PassedOver]:
    objects = located(path)
    where = objects.rstrip("/") if isinstance(objects, str) else objects.url
    for name, error in damaged_checkpoints(path).items():
        known = directory_names.parse(name) or directory_names.parse_uploaded(name)
        if known is not None and known.step is not None:
            yield PassedOver(known.step, f"{where}/{name}", str(error))


def _wrong(stored: StoredCheckpoint) -> str | None:
    """Say what is wrong with a checkpoint, after reading all of it; ``None`` if nothing is."""
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
