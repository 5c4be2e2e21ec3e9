"""Conversion of a checkpoint between its two forms, a directory and an archive, without torch.

Promise: the checkpoint is only read; the target appears as a whole, or not at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gockpt.core.step_number import checked_step
from gockpt.storage.local import packing
from gockpt.storage.paths import local_path
from gockpt.storage.read.find import list_checkpoints, open_checkpoint

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from gockpt.storage.object_store.client import Where
    from gockpt.storage.read.find import CheckpointEntry

__all__ = ["pack", "unpack"]


def pack(
    path: Where,
    target: str | os.PathLike[str],
    step: int | None = None,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> CheckpointEntry:
    """Write a checkpoint as an archive: one uncompressed ZIP file, which Zarr readers open too.

    Everything is compared with its checksums while it is copied.

    Args:
        path: Where checkpoints are saved or uploaded to, or one checkpoint's own directory, archive or URL.
        target: The archive to be, such as ``step-0000001200.zip``; nothing may stand there.
        step: The wanted step; ``None`` for the newest.
        on_progress: Called with the bytes copied and the total.

    Returns:
        An entry for the archive, as of :func:`gockpt.checkpoints`.

    Raises:
        CheckpointNotFound: If there is no complete checkpoint, or none of that step.
        NotACheckpoint: If the path is no checkpoint of gockpt's.
        CheckpointCorrupt: If the checkpoint is damaged.
        StorageError: If the disk refuses.
        UsageError: If something stands at the target, or a chunk has 2 GiB or more.
    """
    goal = local_path(target)
    with open_checkpoint(path, checked_step(step)) as stored:
        packing.pack(stored, goal, on_progress=on_progress or _unseen)
    return list_checkpoints(goal)[0]


def unpack(
    path: Where,
    target: str | os.PathLike[str],
    step: int | None = None,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> CheckpointEntry:
    """Write a checkpoint as a directory: one file for each chunk and document.

    Everything is compared with its checksums while it is copied. A directory that was packed is the same
    again, byte for byte.

    Args:
        path: Where checkpoints are saved or uploaded to, or one checkpoint's own directory, archive or URL.
        target: The directory to be, such as ``step-0000001200``; nothing may stand there.
        step: The wanted step; ``None`` for the newest.
        on_progress: Called with the bytes copied and the total.

    Returns:
        An entry for the directory, as of :func:`gockpt.checkpoints`.

    Raises:
        CheckpointNotFound: If there is no complete checkpoint, or none of that step.
        NotACheckpoint: If the path is no checkpoint of gockpt's.
        CheckpointCorrupt: If the checkpoint is damaged.
        StorageError: If the disk refuses.
        UsageError: If something stands at the target.
    """
    goal = local_path(target)
    with open_checkpoint(path, checked_step(step)) as stored:
        packing.unpack(stored, goal, on_progress=on_progress or _unseen)
    return list_checkpoints(goal)[0]


def _unseen(_done: int, _total: int) -> None:
    """Ignore progress."""
