"""Find complete checkpoints below a URL, and open one.

Promise: as for a path (see :mod:`gockpt.storage.read.find`). What a store lists is only where to look:
complete is what has a manifest that can be read and says what its prefix says.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gockpt.errors import CheckpointNotFound, ManifestCorrupt, NotACheckpoint
from gockpt.storage.format import step_names
from gockpt.storage.format.manifest import MANIFEST_FILE
from gockpt.storage.read.checkpoint import StoredCheckpoint, read_manifest
from gockpt.storage.read.object_location import RemoteFolder

if TYPE_CHECKING:
    from gockpt.storage.format.manifest import Manifest
    from gockpt.storage.object_store.client import Objects

__all__ = [
    "THREADS",
    "Candidate",
    "candidates",
    "damaged",
    "has_manifest",
    "manifests",
    "newest_manifest",
    "newest_step",
    "open_at",
    "open_upload",
]

_log = logging.getLogger(__name__)

THREADS = 16
"""Requests in flight: a connection to an object store is slow, many are not."""

_SHOWN = 20  # steps named in a message


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """A prefix whose name is that of an uploaded checkpoint; whether it is complete its manifest says.

    Attributes:
        seq: Which publication it was.
        step: The user's step.
        attempt: Hexadecimal, unique to its writing.
        name: The prefix itself.
    """

    seq: int
    step: int
    attempt: str
    name: str


def candidates(objects: Objects) -> list[Candidate]:
    """Return what may be a checkpoint, oldest publication first.

    Raises:
        RemoteError: If the store refuses or can't be reached.
    """
    found = []
    for name in objects.children()[0]:
        known = step_names.parse_uploaded(name)
        if known is not None:
            found.append(Candidate(known.seq, known.step, known.attempt, name))
    return sorted(found)


def has_manifest(objects: Objects) -> bool:
    """Whether a URL is a checkpoint's own."""
    try:
        objects.stat(MANIFEST_FILE)
    except FileNotFoundError:
        return False
    return True


def manifests(objects: Objects) -> tuple[list[tuple[Candidate, Manifest]], dict[str, ManifestCorrupt]]:
    """Return the complete checkpoints below a URL, oldest first, and what is wrong with the damaged ones.

    Raises:
        RemoteError: If the store refuses or can't be reached.
    """
    found = candidates(objects)
    complete: list[tuple[Candidate, Manifest]] = []
    bad: dict[str, ManifestCorrupt] = {}
    with ThreadPoolExecutor(THREADS, thread_name_prefix="gockpt-list") as pool:
        for candidate, result in zip(found, pool.map(lambda one: _look(objects, one), found), strict=True):
            if isinstance(result, ManifestCorrupt):
                bad[candidate.name] = result
            elif result is not None:
                complete.append((candidate, result))
    return complete, bad


def damaged(objects: Objects) -> dict[str, ManifestCorrupt]:
    """Return what is wrong with each checkpoint below a URL whose manifest can't be believed."""
    return {} if has_manifest(objects) else manifests(objects)[1]


def open_at(objects: Objects, step: int | None) -> StoredCheckpoint:
    """Open the newest complete checkpoint below a URL, or that of one step, or the URL's own.

    Raises:
        CheckpointNotFound: If there is no complete checkpoint, or none of that step.
        NotACheckpoint: If there is something else.
        ManifestCorrupt: If that step's is damaged; without a step, if every one is.
        RemoteError: If the store refuses or can't be reached.
    """
    if has_manifest(objects):
        manifest = read_manifest(RemoteFolder(objects, ""), objects.url)
        if step not in (None, manifest.step):
            msg = f"{objects.url!r} is the checkpoint of step {manifest.step}, not of {step}"
            raise CheckpointNotFound(msg)
        return StoredCheckpoint(RemoteFolder(objects, ""), objects.url, manifest, threads=THREADS)
    found, bad = _newest(objects, step)
    if found is None:
        raise bad or _nothing_found(objects, step)
    candidate, manifest = found
    folder = RemoteFolder(objects, candidate.name)
    return StoredCheckpoint(folder, objects.url_of(candidate.name), manifest, threads=THREADS)


def open_upload(objects: Objects, step: int, seq: int, attempt: str) -> StoredCheckpoint:
    """Open one upload below a URL and no other, whatever else there is of its step.

    Raises:
        CheckpointNotFound: If it isn't there any more.
        ManifestCorrupt: If it is damaged.
        RemoteError: If the store refuses or can't be reached.
    """
    candidate = Candidate(seq, step, attempt, step_names.of_uploaded(step, seq, attempt))
    url, found = objects.url_of(candidate.name), _look(objects, candidate)
    if isinstance(found, ManifestCorrupt):
        raise found
    if found is None:
        msg = f"{url} is no checkpoint any more"
        raise CheckpointNotFound(msg)
    return StoredCheckpoint(RemoteFolder(objects, candidate.name), url, found, threads=THREADS)


def newest_step(objects: Objects) -> int | None:
    """Return the step of the newest complete checkpoint, or ``None``; reads no more than it needs.

    Raises:
        RemoteError: If the store refuses or can't be reached.
    """
    if has_manifest(objects):
        return read_manifest(RemoteFolder(objects, ""), objects.url).step
    found, _ = _newest(objects, None)
    return None if found is None else found[1].step


def newest_manifest(objects: Objects) -> Manifest | None:
    """Return the manifest of the newest complete checkpoint below a URL, ``None`` if there is none.

    Raises:
        RemoteError: If the store refuses or can't be reached.
    """
    found, _ = _newest(objects, None)
    return None if found is None else found[1]


def _newest(
    objects: Objects, step: int | None
) -> tuple[tuple[Candidate, Manifest] | None, ManifestCorrupt | None]:
    """Return the newest complete checkpoint (of that step), and what is wrong with one that was passed over.

    Raises:
        ManifestCorrupt: If a step is wanted, and its newest is damaged.
    """
    bad: ManifestCorrupt | None = None
    for candidate in reversed(candidates(objects)):
        if step not in (None, candidate.step):
            continue
        result = _look(objects, candidate)
        if isinstance(result, ManifestCorrupt):
            if step is not None:
                raise result
            bad = result
        elif result is not None:
            return (candidate, result), bad
    return None, bad


def _look(objects: Objects, candidate: Candidate) -> Manifest | ManifestCorrupt | None:
    """Return a candidate's manifest, what is wrong with it, or ``None`` if it has none (yet)."""
    url = objects.url_of(candidate.name)
    try:
        manifest = read_manifest(RemoteFolder(objects, candidate.name), url)
        found = (manifest.step, manifest.seq, manifest.attempt)
        if found != (candidate.step, candidate.seq, candidate.attempt):
            msg = f"{url} holds step {found[0]}, seq {found[1]}, attempt {found[2]}: it was renamed"
            raise ManifestCorrupt(msg)
    except FileNotFoundError:
        return None
    except ManifestCorrupt as error:
        _log.warning("passing over a damaged checkpoint: %s", error)
        return error
    return manifest


def _nothing_found(objects: Objects, step: int | None) -> CheckpointNotFound | NotACheckpoint:
    """Return the error that says what is there instead."""
    steps = sorted({candidate.step for candidate, _ in manifests(objects)[0]})
    if steps:
        shown = ", ".join(str(n) for n in steps[-_SHOWN:])
        there = f"the last {_SHOWN} of {len(steps)} are" if len(steps) > _SHOWN else "there are"
        return CheckpointNotFound(f"no checkpoint of step {step} in {objects.url!r}; {there} {shown}")
    prefixes, names = objects.children()
    if names or any(step_names.parse_uploaded(name) is None for name in prefixes):
        other = (names or prefixes)[0]
        return NotACheckpoint(f"{objects.url!r} holds no uploaded checkpoints, but {other!r} and the like")
    return CheckpointNotFound(f"no complete checkpoint in {objects.url!r}")
