"""Permission to save a model into a path, or an object store, that holds checkpoints already.

Promise: a refusal is raised before anything is deleted, written or created there.
"""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from gockpt.core.runs import beginning, claim
from gockpt.errors import CheckpointNotFound, ExistingCheckpoints, NotACheckpoint, UsageError
from gockpt.state.lineage import origin_of, run_of, runs_of_process
from gockpt.storage.format import step_names
from gockpt.storage.format.manifest import MANIFEST_FILE
from gockpt.storage.local.failures import storage_errors
from gockpt.storage.local.filesystem import Filesystem
from gockpt.storage.local.store import Follow
from gockpt.storage.local.writer_lock import expect_free
from gockpt.storage.paths import store_to_write
from gockpt.storage.read.find import newest_manifest
from gockpt.storage.read.local_location import LocalLocation
from gockpt.storage.read.object_location import ObjectLocation

if TYPE_CHECKING:
    from gockpt.core.runs import Claim, Run
    from gockpt.options import Options
    from gockpt.storage.format.manifest import Manifest
    from gockpt.validation import Model

__all__ = ["expect_remote", "homes", "permitted"]

_log = logging.getLogger("gockpt")


def homes(path: str, options: Options) -> tuple[str, ...]:
    """Return the locations of a path's checkpoints: the path, and its object store."""
    return (path,) if options.remote is None else (path, options.remote.rstrip("/"))


def permitted(path: str, model: Model, options: Options) -> Follow:
    """Return the run as which a model is saved into a directory.

    Raises:
        ExistingCheckpoints: If another run's checkpoints are there.
        UsageError: If it is a checkpoint itself.
        PathBusy: If another run's are there, and it is saving there right now.
        StorageError: If the directory can't be listed.
    """
    known = step_names.parse(Path(path).name)
    is_archive = known is not None and known.archive and Path(path).is_file()
    if is_archive or os.path.lexists(f"{path}/{MANIFEST_FILE}"):
        kind = "archive" if is_archive else "directory"
        msg = f"{path} is one checkpoint's own {kind}; pass the directory above it, or another path"
        raise UsageError(msg)
    origin, run = origin_of(model), run_of(model)
    here = origin is not None and origin.path == path
    new_id = secrets.token_hex(16)
    newest = _newest_in(path)
    if newest is None:
        home = origin is not None and origin.path in homes(path, options)
        loaded = None if origin is None else (origin.run, origin.seq)
        return Follow(beginning(new_id=new_id, run=run, loaded=loaded, home=home), None, here)
    found = _claimed(model, path, (newest.run, newest.seq), run, new_id, options)
    if found is None:
        expect_free(Filesystem(), path)
        raise ExistingCheckpoints(
            _refusal(path, newest.step, newest.run, "path", f"gockpt.load({path!r}, ...)")
        )
    return Follow(found.run, newest.attempt, here)


def _newest_in(path: str) -> Manifest | None:
    """Return the newest checkpoint of a directory; ``None`` if it has none, or doesn't exist."""
    with storage_errors("look through", path):
        try:
            location = LocalLocation(path)
        except (CheckpointNotFound, NotACheckpoint):
            return None
        with closing(location):
            return newest_manifest(location)


def expect_remote(url: str, model: Model, run: Run, options: Options) -> None:
    """Check that an object store holds no other run's checkpoints.

    Raises:
        ExistingCheckpoints: If it does.
        UsageError: If the URL can't be used.
        RemoteError: If the store refuses or can't be reached.
    """
    manifest = newest_manifest(ObjectLocation(store_to_write(url)))
    if manifest is None:
        return
    found = _claimed(model, url.rstrip("/"), (manifest.run, manifest.seq), run, run.id, options)
    if found is None:
        load = f"gockpt.load({url!r}, ...)"
        raise ExistingCheckpoints(_refusal(url, manifest.step, manifest.run, "URL as Options(remote=)", load))
    if found.foreign:
        _log.warning("%s holds checkpoints of other runs, the newest of step %d", url, manifest.step)


def _claimed(
    model: Model, home: str, newest: tuple[str, int], run: Run | None, new_id: str, options: Options
) -> Claim | None:
    """Return the run as which a model may be saved next to ``newest`` (run, seq) of ``home``, or ``None``."""
    origin = origin_of(model)
    return claim(
        newest,
        new_id=new_id,
        run=run,
        loaded=None if origin is None else (origin.run, origin.seq),
        here=origin is not None and origin.path == home,
        process=runs_of_process(),
        anyway=options.existing == "continue",
    )


def _refusal(where: str, step: int, run: str, other: str, load: str) -> str:
    return (
        f"{where} holds checkpoints that this model was not loaded from (the newest: step {step}, of run "
        f"{run}), and nothing was changed. To go on with that run, {load} first, into this model; to start "
        f"another one, use another {other}; to save beside them, pass Options(existing='continue'), which "
        "never replaces or removes theirs"
    )
