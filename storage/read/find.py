"""Find complete checkpoints in a path, and open one.

Promise: what is returned was complete and had a valid manifest when it was looked at. The newest is
the one with the highest ``seq``, whatever its step. What is incomplete is passed over in silence,
what is damaged with a warning in the log; neither hides what is intact.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gockpt.errors import CheckpointCorrupt, CheckpointNotFound, ManifestCorrupt, NotACheckpoint
from gockpt.storage.format import step_names
from gockpt.storage.format.manifest import GROUP_FILE, MANIFEST_FILE, finite_of, glance, metrics_of, parse
from gockpt.storage.paths import located
from gockpt.storage.read import find_objects
from gockpt.storage.read.checkpoint import StoredCheckpoint, manifest_bytes, read_manifest
from gockpt.storage.read.local_location import LocalFolder
from gockpt.storage.read.safe_open import GONE, open_below, open_directory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gockpt.storage.format.manifest import Identity, Manifest
    from gockpt.storage.object_store.client import Objects, Where
    from gockpt.storage.read.local_location import Folder

__all__ = [
    "CheckpointEntry",
    "damaged_checkpoints",
    "latest_step",
    "list_checkpoints",
    "open_checkpoint",
    "open_listed",
]

_log = logging.getLogger(__name__)

THREADS = 4
_SHOWN = 20  # steps named in a message
_TRIES = 8  # how often all that was found may be pruned before it could be opened


@dataclass(frozen=True, slots=True)
class CheckpointEntry:
    """One complete checkpoint.

    Attributes:
        step: The user's step.
        seq: Which publication of its path it was.
        attempt: Hexadecimal, unique to its writing.
        path: Its directory.
        created: ISO 8601 time of its publication.
        nbytes: Bytes of its tensors.
        exact: Whether every bit is what a blocking save would have written.
        metrics: Plain numbers among its extras, by name.
        run: The training run's id.
        superseded: Whether a newer complete checkpoint of the same step stands beside it.
        finite: Whether parameters and optimizer state have no NaN or Inf; ``None`` if nobody counted.
    """

    step: int
    seq: int
    attempt: str
    path: str
    created: str
    nbytes: int
    exact: bool
    metrics: Mapping[str, float]
    run: str
    superseded: bool = False
    finite: bool | None = None


def list_checkpoints(path: Where, *, superseded: bool = False) -> list[CheckpointEntry]:
    """Return the complete checkpoints in a path, oldest publication first.

    Args:
        path: Where checkpoints are saved, or one checkpoint's own directory; may not exist (yet). Or a URL.
        superseded: Whether to include those that a newer publication of their step replaced.

    Raises:
        NotACheckpoint: If ``path`` is no directory.
    """
    try:
        at = located(path)
        if not isinstance(at, str):
            return _list_remote(at, superseded=superseded)
        path = at
        directory = _open_path(path)
    except CheckpointNotFound:
        return []
    try:
        if _has_manifest(directory):
            with _open_itself(directory, path, None, threads=1) as stored:
                return [_entry(path, stored.manifest)]
        entries = [
            replace(_entry(seen.path, seen.manifest), superseded=seen.superseded)
            for seen in _survey(directory, path, thorough=True)[0]
            if seen.manifest is not None
        ]
    finally:
        os.close(directory)
    return [entry for entry in entries if superseded or not entry.superseded]


def latest_step(path: Where) -> int | None:
    """Return the step of the newest complete checkpoint, ``None`` if there is none.

    That takes far less than :func:`list_checkpoints`: only the newest manifest is read to its end.

    Raises:
        NotACheckpoint: If ``path`` is no directory.
        RemoteError: If the store of a URL refuses or can't be reached.
    """
    try:
        at = located(path)
        if not isinstance(at, str):
            return find_objects.newest_step(at)
        path = at
        directory = _open_path(path)
    except CheckpointNotFound:
        return None
    try:
        itself = _has_manifest(directory)
        found = (
            _open_itself(directory, path, None, threads=1)
            if itself
            else _open_newest(directory, path, None, threads=1)
        )
    except ManifestCorrupt:
        if itself:
            raise
        return None
    finally:
        os.close(directory)
    if found is None:
        return None
    with found:
        return found.step


def damaged_checkpoints(path: Where) -> dict[str, ManifestCorrupt]:
    """Return what is wrong with each checkpoint of a path whose manifest can't be believed, by directory.

    Raises:
        CheckpointNotFound: If there is no such directory.
        NotACheckpoint: If ``path`` is no directory.
    """
    at = located(path)
    if not isinstance(at, str):
        return find_objects.damaged(at)
    path = at
    directory = _open_path(path)
    try:
        return {} if _has_manifest(directory) else _survey(directory, path, thorough=True)[1]
    finally:
        os.close(directory)


def open_checkpoint(path: Where, step: int | None = None, *, threads: int = THREADS) -> StoredCheckpoint:
    """Open the newest complete checkpoint in a path, or that of one step; reads only manifests.

    Args:
        path: Where checkpoints are saved, or one checkpoint's own directory, under any name. Or a URL.
        step: The wanted step; ``None`` for the newest publication.
        threads: How many threads a large read may use; from an object store it is always more.

    Raises:
        CheckpointNotFound: If there is no complete checkpoint, or none of that step.
        NotACheckpoint: If ``path`` is a file, or a directory that gockpt didn't write.
        ManifestCorrupt: If that step's is damaged; without a step, if every one is.
    """
    at = located(path)
    if not isinstance(at, str):
        return find_objects.open_at(at, step)
    path = at
    directory = _open_path(path)
    try:
        if _has_manifest(directory):
            return _open_itself(directory, path, step, threads=threads)
        found = _open_newest(directory, path, step, threads=threads)
        if found is None:
            raise _nothing_found(directory, path, step)
        return found
    finally:
        os.close(directory)


def open_listed(path: Where, entry: CheckpointEntry) -> StoredCheckpoint:
    """Open what :func:`list_checkpoints` listed of that path: of several uploads of a step, the very one.

    Raises:
        CheckpointNotFound: If it was removed since.
        ManifestCorrupt: If it is damaged now.
        RemoteError: If the store of a URL refuses or can't be reached.
    """
    objects = located(path)
    if isinstance(objects, str):
        return open_checkpoint(entry.path)
    if entry.path == objects.url:
        return find_objects.open_at(objects, entry.step)
    return find_objects.open_upload(objects, entry.step, entry.seq, entry.attempt)


def _open_newest(directory: int, path: str, step: int | None, *, threads: int) -> StoredCheckpoint | None:
    """Open the newest complete checkpoint in a path, or that of one step; ``None`` if there is none.

    Raises:
        ManifestCorrupt: If that step's is damaged; without a step, if every one is.
    """
    thorough = False
    for _ in range(_TRIES):
        entries, damaged = _survey(directory, path, step, thorough=thorough)
        if step is not None and step_names.of_step(step) in damaged:
            raise damaged[step_names.of_step(step)]
        wanted = [entry for entry in entries if not entry.superseded]
        for entry in reversed(wanted):
            found = _open_child(directory, path, os.path.basename(entry.path))
            if found is None:
                continue
            try:
                manifest = parse(found.data, where=f"{entry.path}/{MANIFEST_FILE}")
            except ManifestCorrupt:
                found.folder.close()
                if thorough:
                    raise
                thorough = True  # undamaged and yet not valid: now each has to be looked at
                break
            return StoredCheckpoint(found.folder, entry.path, manifest, threads=threads)
        if not wanted:
            break
        # Each was pruned or replaced since it was found, so something newer may be there.
    if step is None and damaged:
        raise next(reversed(damaged.values()))
    return None


def _list_remote(objects: Objects, *, superseded: bool) -> list[CheckpointEntry]:
    """Return the complete checkpoints below a URL, oldest publication first."""
    if find_objects.has_manifest(objects):
        with find_objects.open_at(objects, None) as stored:
            return [_entry(objects.url, stored.manifest)]
    found = [_entry(objects.url_of(at.name), manifest) for at, manifest in find_objects.manifests(objects)[0]]
    newest = {entry.step: entry.path for entry in found}
    entries = [replace(entry, superseded=entry.path != newest[entry.step]) for entry in found]
    return [entry for entry in entries if superseded or not entry.superseded]


def _open_path(path: str) -> int:
    """Open the directory that the user named."""
    try:
        return open_directory(path)
    except FileNotFoundError as error:
        msg = f"no checkpoint in {path!r}: there is no such directory"
        raise CheckpointNotFound(msg) from error
    except NotADirectoryError as error:
        msg = f"{path!r} is not a directory; give the path that checkpoints are saved into"
        raise NotACheckpoint(msg) from error


def _has_manifest(directory: int) -> bool:
    try:
        os.stat(MANIFEST_FILE, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _open_itself(directory: int, path: str, step: int | None, *, threads: int) -> StoredCheckpoint:
    """Open the checkpoint that the user's path itself is; its directory may have been renamed."""
    known = step_names.parse(os.path.basename(os.path.realpath(path)))
    if known is not None and known.kind in ("partial", "trash"):
        msg = f"{path!r} is a checkpoint that was never published, or is being deleted"
        raise NotACheckpoint(msg)
    folder = LocalFolder(os.dup(directory))
    try:
        manifest = read_manifest(folder, path)
        if step not in (None, manifest.step):
            msg = f"{path!r} is the checkpoint of step {manifest.step}, not of {step}"
            raise CheckpointNotFound(msg)
    except BaseException:
        folder.close()
        raise
    return StoredCheckpoint(folder, path, manifest, threads=threads)


def _entry(path: str, manifest: Manifest) -> CheckpointEntry:
    return CheckpointEntry(
        step=manifest.step,
        seq=manifest.seq,
        attempt=manifest.attempt,
        path=path,
        created=manifest.created,
        nbytes=sum(entry.spec.nbytes for entry in manifest.arrays),
        exact=manifest.exact,
        metrics=metrics_of(manifest.attributes),
        finite=finite_of(manifest.attributes),
        run=manifest.run,
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    """One complete checkpoint as a survey sees it.

    Attributes:
        path: Its directory.
        step: The user's step.
        seq: Which publication it was.
        manifest: What a thorough survey read.
        superseded: Whether a newer complete checkpoint of the same step stands beside it.
    """

    path: str
    step: int
    seq: int
    manifest: Manifest | None
    superseded: bool = False


def _survey(
    directory: int, path: str, step: int | None = None, *, thorough: bool = False
) -> tuple[list[_Seen], dict[str, ManifestCorrupt]]:
    """Look at everything in a path that by its name is a published checkpoint (of that step, if given).

    Args:
        directory: The open path.
        path: Its name.
        step: The only step to look at.
        thorough: Whether manifests are read to their ends: that takes many times as long. Without it,
            one that agrees with its checksum and says who it is counts as valid.

    Returns:
        The complete ones, oldest publication first, and what is wrong with the damaged ones, by name.
    """
    names = _candidates(directory, step)
    for _ in range(_TRIES):
        published: list[_Seen] = []
        replaced: list[_Seen] = []
        damaged: dict[str, ManifestCorrupt] = {}
        for name, kind in names.items():
            child, manifest = os.path.join(path, name), None
            try:
                found = _open_child(directory, path, name)
                if found is not None:
                    found.folder.close()
                    if thorough:
                        manifest = parse(found.data, where=f"{child}/{MANIFEST_FILE}")
            except ManifestCorrupt as error:
                _log.warning("passing over a damaged checkpoint: %s", error)
                damaged[name] = error
                continue
            if found is not None:
                seen = _Seen(child, found.identity.step, found.identity.seq, manifest)
                (published if kind == "step" else replaced).append(seen)
        looked_at, names = names, _candidates(directory, step)
        if names == looked_at or len(published) + len(replaced) + len(damaged) == len(looked_at):
            break
        # One was pruned before it could be looked at: then a newer one may have come that wasn't listed.
    # What was replaced counts only where its successor isn't there: a crash between two renames.
    replaced.sort(key=lambda entry: entry.seq)
    newest = {entry.step: entry.path for entry in replaced + published}
    entries = [replace(entry, superseded=entry.path != newest[entry.step]) for entry in replaced + published]
    return sorted(entries, key=lambda entry: entry.seq), damaged


def _candidates(directory: int, step: int | None) -> dict[str, str]:
    """Return the names in a path that stand for published checkpoints, with their kind."""
    names = {name: step_names.parse(name) for name in sorted(os.listdir(directory))}
    return {
        name: known.kind
        for name, known in names.items()
        if known is not None and known.kind in ("step", "old") and step in (None, known.step)
    }


@dataclass(frozen=True, slots=True)
class _Child:
    """One published checkpoint of a path.

    Attributes:
        folder: Its open directory.
        identity: Which one it is; its name says the same.
        data: Its manifest, undamaged.
    """

    folder: Folder
    identity: Identity
    data: bytes


def _open_child(directory: int, path: str, name: str) -> _Child | None:
    """Open one published checkpoint of a path; ``None`` if it is incomplete or gone.

    Raises:
        ManifestCorrupt: If it is damaged, a link, or another checkpoint than its name says.
    """
    child = os.path.join(path, name)
    try:
        folder = LocalFolder(open_below(directory, name, is_directory=True))
    except CheckpointCorrupt as error:
        msg = f"{child}: {error}; to read it, give its own path"
        raise ManifestCorrupt(msg) from error
    except OSError as error:
        if error.errno in GONE:
            return None
        raise
    try:
        data = manifest_bytes(folder, child)
        found = glance(data, where=f"{child}/{MANIFEST_FILE}")
        known = step_names.parse(name)
        if known is None or known.step != found.step or known.attempt not in (None, found.attempt):
            msg = f"{child} holds step {found.step}, attempt {found.attempt}: it was renamed"
            raise ManifestCorrupt(msg)
    except BaseException as error:
        folder.close()
        if isinstance(error, OSError) and error.errno in GONE:
            return None
        raise
    return _Child(folder, found, data)


def _nothing_found(directory: int, path: str, step: int | None) -> CheckpointNotFound | NotACheckpoint:
    """Return the error that says what is there instead."""
    steps = sorted({entry.step for entry in _survey(directory, path, thorough=True)[0]})
    if steps and step is None:
        return CheckpointNotFound(
            f"every checkpoint in {path!r} was removed before it could be opened; try again"
        )
    if steps:
        shown = ", ".join(str(n) for n in steps[-_SHOWN:])
        there = f"the last {_SHOWN} of {len(steps)} are" if len(steps) > _SHOWN else "there are"
        return CheckpointNotFound(f"no checkpoint of step {step} in {path!r}; {there} {shown}")
    names = sorted(os.listdir(directory))
    if GROUP_FILE in names:
        why = f"has no {MANIFEST_FILE}: it was never completed, or gockpt didn't write it"
        return NotACheckpoint(f"{path!r} {why}")
    if names and not any(name == step_names.LOCK_FILE or step_names.parse(name) for name in names):
        return NotACheckpoint(f"{path!r} holds no checkpoints, but {names[0]!r} and the like")
    return CheckpointNotFound(f"no complete checkpoint in {path!r}")
