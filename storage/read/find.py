"""Find complete checkpoints in a path or below a URL, and open one.

Promise: what is returned was complete and had a valid manifest when it was looked at. The newest is
the one with the highest ``seq``, whatever its step. What is incomplete is passed over in silence,
what is damaged with a warning in the log; neither hides what is intact. No older one is taken for the newest
where a later gockpt wrote a newer one, in a version of the format that can't be read.
"""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gockpt.errors import CheckpointNotFound, FormatTooNew, ManifestCorrupt, NotACheckpoint
from gockpt.storage.format.manifest import MANIFEST_FILE, Manifest, finite_of, glance, metrics_of, parse
from gockpt.storage.object_store.client import objects_at
from gockpt.storage.paths import local_path
from gockpt.storage.read.checkpoint import StoredCheckpoint, manifest_bytes
from gockpt.storage.read.in_threads import in_threads
from gockpt.storage.read.local_location import local_location
from gockpt.storage.read.location import GONE
from gockpt.storage.read.object_location import ObjectArchiveLocation, ObjectLocation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gockpt.storage.object_store.client import Where
    from gockpt.storage.read.location import Child, Files, Location

__all__ = [
    "CheckpointEntry",
    "damaged_checkpoints",
    "latest_step",
    "list_checkpoints",
    "location_at",
    "newest_manifest",
    "open_checkpoint",
    "open_listed",
]

_log = logging.getLogger(__name__)

THREADS = 4
_SHOWN = 20  # steps named in a message
_TRIES = 8  # how often checkpoints may be pruned between listing and opening before that is taken as it is


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


def location_at(where: Where) -> Location:
    """Open what the user named: a path of this machine, a URL, or an obstore store.

    Raises:
        UsageError: If it is neither a usable URL nor a path.
        CheckpointNotFound: If there is no such directory.
        NotACheckpoint: If it is neither a directory nor an archive.
    """
    if isinstance(where, os.PathLike) and not isinstance(os.fspath(where), str):
        return local_location(local_path(where))  # raises
    if isinstance(where, str) and where.endswith(".zip") and "://" in (above := where.rpartition("/")[0]):
        objects = objects_at(above)
        if objects is not None:
            return ObjectArchiveLocation(objects, where.rpartition("/")[2])
    objects = objects_at(where)
    return local_location(local_path(where)) if objects is None else ObjectLocation(objects)


def list_checkpoints(path: Where, *, superseded: bool = False) -> list[CheckpointEntry]:
    """Return the complete checkpoints in a path, oldest publication first.

    Args:
        path: Where checkpoints are saved, or one checkpoint itself; may not exist (yet). Or a URL.
        superseded: Whether to include those that a newer publication of their step replaced.

    Raises:
        NotACheckpoint: If ``path`` is neither a directory nor an archive.
        ManifestCorrupt: If ``path`` is one checkpoint's own, and damaged.
        RemoteError: If the store of a URL refuses or can't be reached.
    """
    try:
        location = location_at(path)
    except CheckpointNotFound:
        return []
    with closing(location):
        entries = _survey(location)[0]
    return [entry for entry in entries if superseded or not entry.superseded]


def latest_step(path: Where) -> int | None:
    """Return the step of the newest complete checkpoint, ``None`` if there is none.

    That takes far less than :func:`list_checkpoints`: only the newest manifest is read to its end.

    Raises:
        NotACheckpoint: If ``path`` is neither a directory nor an archive.
        ManifestCorrupt: If ``path`` is one checkpoint's own, and damaged.
        RemoteError: If the store of a URL refuses or can't be reached.
    """
    try:
        location = location_at(path)
    except CheckpointNotFound:
        return None
    with closing(location):
        newest = newest_manifest(location)
    return None if newest is None else newest.step


def newest_manifest(location: Location) -> Manifest | None:
    """Return the manifest of the newest complete checkpoint of a location, ``None`` if there is none.

    Raises:
        ManifestCorrupt: If the location is one checkpoint itself, and damaged.
        RemoteError: If the store of a URL refuses or can't be reached.
    """
    found = _open_newest(location, {})
    if found is None:
        return None
    with found:
        return found.manifest


def damaged_checkpoints(path: Where) -> dict[Child, ManifestCorrupt]:
    """Return each published checkpoint in a path whose manifest can't be believed, and the damage.

    Raises:
        CheckpointNotFound: If there is no such directory.
        NotACheckpoint: If ``path`` is neither a directory nor an archive.
        ManifestCorrupt: If ``path`` is one checkpoint's own, and damaged.
        RemoteError: If the store of a URL refuses or can't be reached.
    """
    with closing(location_at(path)) as location:
        return _survey(location)[1]


def open_checkpoint(path: Where, step: int | None = None, *, threads: int = THREADS) -> StoredCheckpoint:
    """Open the newest complete checkpoint in a path, or that of one step; reads only manifests.

    Args:
        path: Where checkpoints are saved, or one checkpoint itself, under any name. Or a URL.
        step: The wanted step; ``None`` for the newest publication.
        threads: How many threads a large read may use; from an object store it is always more.

    Raises:
        CheckpointNotFound: If there is no complete checkpoint, or none of that step.
        NotACheckpoint: If ``path`` is a file or directory that gockpt didn't write.
        ManifestCorrupt: If that step's is damaged; without a step, if every one is.
        FormatTooNew: If the wanted one is of a later version of the format; without a step, if one is that
            may be newer than all others.
        RemoteError: If the store of a URL refuses or can't be reached.
    """
    damaged: dict[Child, ManifestCorrupt] = {}
    with closing(location_at(path)) as location:
        found = _open_newest(location, damaged, step, threads)
        if found is None and damaged and step is None:
            raise next(iter(damaged.values()))
        if found is None:
            raise _nothing_found(location, step)
    if step not in (None, found.step):
        found.close()
        msg = f"{found.path!r} is the checkpoint of step {found.step}, not of {step}"
        raise CheckpointNotFound(msg)
    return found


def open_listed(path: Where, entry: CheckpointEntry) -> StoredCheckpoint:
    """Open what :func:`list_checkpoints` listed of that path: of several uploads of a step, the very one.

    Raises:
        CheckpointNotFound: If it was removed since.
        ManifestCorrupt: If it is damaged now.
        RemoteError: If the store of a URL refuses or can't be reached.
    """
    with closing(location_at(path)) as location:
        for child in location.children():
            found = _look(location, child) if child.path == entry.path else None
            if found is not None:
                return found.checkpoint(location, THREADS)
    msg = f"{entry.path} is no checkpoint any more"
    raise CheckpointNotFound(msg)


@dataclass(frozen=True, slots=True)
class _Glanced:
    """One published checkpoint that is complete as far as a glance at its manifest tells.

    Attributes:
        child: Its name.
        files: Its open files.
        seq: Which publication it is.
        data: Its manifest, undamaged.
    """

    child: Child
    files: Files
    seq: int
    data: bytes

    def checkpoint(self, location: Location, threads: int) -> StoredCheckpoint:
        """Return it once its manifest has been read to its end.

        Raises:
            ManifestCorrupt: If that is not valid; the files are closed then.
        """
        with _closed_on_error(self.files):
            manifest = parse(self.data, where=f"{self.child.path}/{MANIFEST_FILE}")
            threads = max(threads, location.parallel)
            return StoredCheckpoint(self.files, self.child.path, manifest, threads=threads)


def _look(location: Location, child: Child) -> _Glanced | None:
    """Open one published checkpoint and glance at its manifest; ``None`` if it is incomplete or gone.

    Raises:
        ManifestCorrupt: If it is damaged, a link, or another checkpoint than its name says.
    """
    try:
        files = location.open(child)
        with _closed_on_error(files):
            data = manifest_bytes(files, child.path)
            found = glance(data, where=f"{child.path}/{MANIFEST_FILE}")
            said = zip(
                (child.step, child.seq, child.attempt), (found.step, found.seq, found.attempt), strict=True
            )
            if not all(name in (None, manifest) for name, manifest in said):
                number = "" if child.seq is None else f"seq {found.seq}, "
                msg = f"{child.path} holds step {found.step}, {number}attempt {found.attempt}: it was renamed"
                raise ManifestCorrupt(msg)
    except OSError as error:
        if error.errno not in GONE:
            raise
        return None
    return _Glanced(child, files, found.seq, data)


def _open_newest(
    location: Location, damaged: dict[Child, ManifestCorrupt], step: int | None = None, threads: int = THREADS
) -> StoredCheckpoint | None:
    """Open the newest complete checkpoint of a location, or that of one step; ``None`` if there is none.

    Manifests are glanced at, as few as the names allow; only that of the newest is read to its end.

    Args:
        location: Where to look.
        damaged: Filled with all that are passed over since they are damaged, and the damage.
        step: The wanted step; ``None`` for any. A location that is one checkpoint itself may have another.
        threads: How many threads a large read may use at least.

    Raises:
        ManifestCorrupt: If that step's is damaged, or the location is one checkpoint itself.
        FormatTooNew: If the newest, as far as it can be told, is of a later version of the format.
    """

    def pass_over(child: Child, error: ManifestCorrupt) -> None:
        if not child.name or (step is not None and not child.replaced):
            raise error
        _log.warning("passing over a damaged checkpoint: %s", error)
        damaged[child] = error

    children, tries = location.children(), 0
    while True:
        wanted = [child for child in children if None in (step, child.step) or step == child.step]
        newest, missing = _newest_of(location, [one for one in wanted if one not in damaged], pass_over)
        with ExitStack() as opened:
            if newest is not None:
                opened.callback(newest.files.close)
            if missing and tries < _TRIES:
                # One was pruned before it could be looked at: a newer one may have come that wasn't listed.
                tries, before, children = tries + 1, children, location.children()
                if children != before:
                    continue
            opened.pop_all()
        _expect_readable(damaged, newest)
        if newest is None:
            return None
        try:
            return newest.checkpoint(location, threads)
        except ManifestCorrupt as error:
            pass_over(newest.child, error)  # undamaged and yet not valid


def _expect_readable(damaged: dict[Child, ManifestCorrupt], newest: _Glanced | None) -> None:
    """Refuse to take a checkpoint as the newest where one of a later version of the format may be newer.

    Raises:
        FormatTooNew: If there is one; the files of ``newest`` are closed then.
    """
    seq = None if newest is None else newest.seq
    for child, error in damaged.items():
        if isinstance(error, FormatTooNew) and not child.replaced and error.may_be_newer_than(seq):
            if newest is not None:
                newest.files.close()
            raise error


def _newest_of(
    location: Location, children: list[Child], pass_over: Callable[[Child, ManifestCorrupt], None]
) -> tuple[_Glanced | None, bool]:
    """Return the newest complete checkpoint of some, and whether any was incomplete or gone.

    Args:
        location: Where they stand.
        children: What to look at, in the location's order.
        pass_over: Called for each that is damaged; may raise.
    """
    newest: _Glanced | None = None
    complete, missing = set[int | None](), False
    with ExitStack() as opened:
        for child in children:
            if newest is not None and child.seq is not None and child.seq <= newest.seq:
                break  # the names say that all others are older
            if child.replaced and child.step in complete:
                continue
            try:
                found = _look(location, child)
            except ManifestCorrupt as error:
                pass_over(child, error)
                continue
            if found is None:
                missing = True
                continue
            if not child.replaced:
                complete.add(child.step)
            if newest is not None and newest.seq >= found.seq:
                found.files.close()
                continue
            opened.close()
            newest = found
            opened.callback(newest.files.close)
        opened.pop_all()
    return newest, missing


def _survey(location: Location) -> tuple[list[CheckpointEntry], dict[Child, ManifestCorrupt]]:
    """Read every manifest below a location to its end: that takes many times as long as a glance.

    Returns:
        The complete checkpoints, oldest publication first, and the damaged ones.
    """
    children = looked_at = location.children()
    results: list[Manifest | ManifestCorrupt | None] = []
    for _ in range(_TRIES):
        looked_at, results = children, _read_all(location, children)
        children = looked_at if None not in results else location.children()
        if children == looked_at:
            break
        # One was pruned before it could be looked at: then a newer one may have come that wasn't listed.
    pairs = list(zip(looked_at, results, strict=True))[::-1]
    entries = [(child, _entry(child.path, found)) for child, found in pairs if isinstance(found, Manifest)]
    # What was replaced counts only where its successor isn't there: a crash between two renames.
    entries.sort(key=lambda pair: (not pair[0].replaced, pair[1].seq))
    newest = {entry.step: entry.path for _, entry in entries}
    found = [replace(entry, superseded=entry.path != newest[entry.step]) for _, entry in entries]
    damaged = {child: error for child, error in pairs if isinstance(error, ManifestCorrupt)}
    return sorted(found, key=lambda entry: entry.seq), damaged


def _read_all(location: Location, children: list[Child]) -> list[Manifest | ManifestCorrupt | None]:
    found: dict[Child, Manifest | ManifestCorrupt | None] = {}

    def read(child: Child, _: object) -> None:
        found[child] = _read(location, child)

    threads = min(location.parallel, len(children))
    in_threads(read, children, threads=threads, name="gockpt-list", memory=object)
    return [found[child] for child in children]


def _read(location: Location, child: Child) -> Manifest | ManifestCorrupt | None:
    """Return a child's manifest, the damage to it, or ``None`` if it is incomplete or gone."""
    try:
        found = _look(location, child)
        if found is None:
            return None
        with closing(found.files):
            return parse(found.data, where=f"{child.path}/{MANIFEST_FILE}")
    except ManifestCorrupt as error:
        if not child.name:
            raise
        _log.warning("passing over a damaged checkpoint: %s", error)
        return error


@contextmanager
def _closed_on_error(files: Files) -> Iterator[None]:
    try:
        yield
    except BaseException:
        files.close()
        raise


def _nothing_found(location: Location, step: int | None) -> CheckpointNotFound | NotACheckpoint:
    """Return the error that says what is there instead."""
    path, steps = location.path, sorted({entry.step for entry in _survey(location)[0]})
    if steps and step is None:
        msg = f"every checkpoint in {path!r} was removed before it could be opened; try again"
        return CheckpointNotFound(msg)
    if steps:
        shown = ", ".join(str(n) for n in steps[-_SHOWN:])
        there = f"the last {_SHOWN} of {len(steps)} are" if len(steps) > _SHOWN else "there are"
        return CheckpointNotFound(f"no checkpoint of step {step} in {path!r}; {there} {shown}")
    return location.not_found()


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
