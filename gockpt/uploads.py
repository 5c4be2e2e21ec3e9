"""Copies in an object store: one checkpoint by a call, or each new one behind a running training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gockpt.checkpoint import checked_step
from gockpt.errors import UsageError
from gockpt.storage.listing import open_checkpoint
from gockpt.storage.objects import objects_at
from gockpt.storage.upload import Uploaded, upload_checkpoint

if TYPE_CHECKING:
    from gockpt.storage.objects import Objects, Where

__all__ = ["Uploaded", "upload"]


def upload(path: Where, url: Where, step: int | None = None) -> Uploaded:
    """Copy one complete checkpoint into an object store and return when it is complete there.

    Every byte is compared with its checksum before it is sent, and the manifest goes last: what an
    interruption leaves is no checkpoint to any reader, and the next call sends only what is missing.

    Args:
        path: Where checkpoints are saved, or one checkpoint's own directory.
        url: Where to, such as ``"s3://bucket/run"``; or an obstore store.
        step: The wanted step; ``None`` for the newest.

    Raises:
        CheckpointNotFound: If there is no complete checkpoint, or none of that step.
        CheckpointCorrupt: If it is damaged; then it isn't uploaded.
        RemoteError: If the store refuses or can't be reached; call again to go on.
        UsageError: If the URL can't be used, or holds checkpoints that were saved into another path.
    """
    with open_checkpoint(path, checked_step(step)) as stored:
        return upload_checkpoint(stored, store_at(url))


def store_at(url: Where) -> Objects:
    """Return the objects below a URL that can be written to.

    Raises:
        UsageError: If it is no such URL.
    """
    objects = objects_at(url, make=True)
    if objects is None:
        msg = f"{url!r} is no URL of an object store, such as 's3://bucket/run' or 'gs://bucket/run'"
        raise UsageError(msg)
    return objects
