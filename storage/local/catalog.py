"""Catalog of the checkpoints in a path, as its writer sees them: the newest one, and those to remove.

Promise: newest is the highest ``seq``, and no ``seq`` is used twice. Only complete checkpoints, by name and
manifest, are in the catalog; anything else is neither counted nor ever removed.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gockpt.core import retention
from gockpt.core.runs import Run, adopted
from gockpt.errors import CheckpointCorrupt, ManifestCorrupt
from gockpt.storage.format import manifest, step_names, strict_json, zip_archive
from gockpt.storage.format.json_fields import MAX_INTEGER
from gockpt.storage.local import files, verified
from gockpt.storage.local.failures import storage_errors
from gockpt.storage.local.filesystem import Filesystem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gockpt.core.runs import Ancestor
    from gockpt.options import Keep
    from gockpt.storage.local.writer_lock import WriterLock

__all__ = ["Catalog", "Directory", "Place", "identify", "looked_through", "remove_entry"]

_log = logging.getLogger(__name__)

# A line of JSON and its checksum line.
_MANIFEST_LIMIT = strict_json.MAX_BYTES + 4096


@dataclass(frozen=True, slots=True)
class Directory:
    """An open directory of checkpoints, for reading.

    Attributes:
        fs: The file system.
        fd: The open directory.
        path: Its path, for messages.
    """

    fs: Filesystem
    fd: int
    path: str

    def of(self, name: str) -> str:
        """Return the path of an entry, for messages."""
        return os.path.join(self.path, name)

    def has(self, name: str) -> bool:
        """Whether an entry of that name exists."""
        try:
            self.fs.stat(name, dir_fd=self.fd)
        except FileNotFoundError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Place(Directory):
    """An open directory of checkpoints, with the right to write there.

    Attributes:
        lock: The writer lock: that right.
    """

    lock: WriterLock


def identify(place: Directory, name: str) -> manifest.Identity | None:
    """Return the identity of an entry's checkpoint; ``None`` if it isn't a complete one.

    Raises:
        OSError: If it can't be read: no permission, a failing device.
    """
    try:
        return manifest.identify(_manifest_of(place, name), where=place.of(name))
    except (files.NotSmallRegularFile, ManifestCorrupt):
        return None
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return None  # gone, or a link


def _manifest_of(place: Directory, name: str) -> bytes:
    fs = place.fs
    try:
        fd = fs.open(name, files.DIRECTORY, dir_fd=place.fd)
    except NotADirectoryError:
        return _manifest_in_archive(place, name)
    try:
        return files.read_small_file(fs, fd, manifest.MANIFEST_FILE, limit=_MANIFEST_LIMIT)
    finally:
        fs.close(fd)


def _manifest_in_archive(place: Directory, name: str) -> bytes:
    """Return the last entry of an archive.

    Raises:
        NotSmallRegularFile: If it is no regular file.
        ManifestCorrupt: If it doesn't end as an archive does.
        OSError: What the system says.
    """
    fs, where = place.fs, place.of(name)
    with files.opened_regular(fs, place.fd, name) as (fd, size):
        end = files.read_exactly(fs, fd, zip_archive.TAIL_NBYTES, max(0, size - zip_archive.TAIL_NBYTES))
        try:
            tail = zip_archive.parse_tail(end, size, where=where)
        except CheckpointCorrupt as error:
            raise ManifestCorrupt(str(error)) from error
        if tail.manifest.nbytes > _MANIFEST_LIMIT:
            msg = f"{where} has a manifest of {tail.manifest.nbytes} bytes"
            raise ManifestCorrupt(msg)
        return files.read_exactly(fs, fd, tail.manifest.nbytes, tail.manifest_at)


def remove_entry(place: Place, name: str, attempt: str) -> None:
    """Delete a checkpoint so that no reader ever lists a half of it.

    An archive goes at once; a directory is renamed, which is made durable, and then deleted.

    Raises:
        OSError: The system's error; the remains have a name that the next pruning or sweep deletes.
    """
    if stat.S_ISREG(place.fs.stat(name, dir_fd=place.fd).st_mode):
        place.fs.unlink(name, dir_fd=place.fd)
        place.fs.fsync(place.fd)
        return
    trash = step_names.of_trash(attempt)
    files.remove_tree(place.fs, place.fd, trash)
    place.fs.rename(name, trash, dir_fd=place.fd)
    place.fs.fsync(place.fd)
    files.remove_tree(place.fs, place.fd, trash)


class Catalog:
    """The complete checkpoints of a place; safe to use from several threads.

    Attributes:
        turn: Lock held while a checkpoint gets its number and its name, and while some are removed: no other
            thread may rename an entry between its check and its renaming.
    """

    __slots__ = ("_entries", "_held", "_mutex", "_owns", "_place", "_read", "_seq", "_told", "turn")

    def __init__(self, place: Directory) -> None:
        """Read every entry of the directory.

        Raises:
            StorageError: If the directory or one of the manifests can't be read.
        """
        self._place = place
        self._mutex = threading.Lock()
        self.turn = threading.Lock()
        self._entries: dict[str, manifest.Identity] = {}
        self._seq = 0
        self._held: set[int] = set()
        self._read: set[str] = set()  # attempts whose manifests are known to be valid to their ends
        self._told = False
        self._owns: Callable[[manifest.Identity], bool] = _anybody
        with storage_errors("look through", place.path):
            for name in place.fs.listdir(place.fd):
                known = step_names.parse(name)
                if known is not None and known.kind in ("step", "old"):
                    self._look(name, known)

    def _look(self, name: str, known: step_names.EntryName) -> None:
        found = identify(self._place, name)
        if found is None:
            return
        self._seq = max(self._seq, found.seq)
        # A copy under another name is not the checkpoint it was copied from.
        if found.step == known.step and known.attempt in (None, found.attempt):
            self._entries[name] = found

    @property
    def newest(self) -> manifest.Identity | None:
        """The newest publication."""
        with self._mutex:
            return max(self._entries.values(), key=lambda entry: entry.seq, default=None)

    @property
    def unlabelled(self) -> list[Ancestor]:
        """Run and ``seq`` of each one without a list of ancestors, written by an older gockpt."""
        with self._mutex:
            return [(entry.run, entry.seq) for entry in self._entries.values() if entry.ancestors is None]

    def belong_to(self, owns: Callable[[manifest.Identity], bool]) -> int:
        """Let retention count and remove only what ``owns`` accepts; return the number of the others."""
        with self._mutex:
            self._owns = owns
            return sum(not owns(entry) for entry in self._entries.values())

    def keep_to_newest_run(self) -> int:
        """Let retention count and remove only checkpoints of the newest one's run.

        Returns:
            The number of checkpoints of other runs.
        """
        newest = self.newest
        if newest is None:
            return 0
        run = Run(newest.run, newest.ancestors or ())
        if newest.ancestors is None:
            run = adopted(run, self.unlabelled)
        return self.belong_to(lambda one: run.owns(one.run, one.seq))

    def next_seq(self) -> int:
        """Return a number higher than any seen; a number given out is used up."""
        with self._mutex:
            self._seq += 1
            return self._seq

    def continue_after(self, seq: int) -> None:
        """Return only numbers above ``seq`` from now on; no effect if there are none above it."""
        with self._mutex:
            if seq < MAX_INTEGER:
                self._seq = max(self._seq, seq)

    @contextmanager
    def holding(self, seq: int) -> Iterator[None]:
        """Keep a publication from being pruned while the context is open."""
        with self._mutex:
            self._held.add(seq)
        try:
            yield
        finally:
            with self._mutex:
                self._held.discard(seq)

    def add(self, name: str, identity: manifest.Identity) -> None:
        """Enter a new publication."""
        with self._mutex:
            self._entries[name] = identity
            self._read.add(identity.attempt)

    def forget(self, name: str) -> None:
        """Remove a name, if it is there."""
        with self._mutex:
            self._entries.pop(name, None)

    def prune(self, place: Place, keep: Keep) -> list[int]:
        """Delete checkpoints that no rule keeps; return the deleted steps, oldest publication first.

        Superseded publications are deleted too; they are neither counted nor returned. A held publication is
        left for the next pruning. Remains of an earlier pruning are deleted.

        Raises:
            StorageError: If the disk refuses; earlier deletions of this call stay.
        """
        _empty_trash(place)
        going = self.expendable(keep)
        with self._mutex:
            replaced = retention.superseded(self._publications(self._counted(keep), keep))
        steps = []
        for name, identity in going:
            with self._mutex:
                if identity.seq in self._held:
                    continue
            with storage_errors("delete", place.of(name)):
                # Not a directory that another process put in its place meanwhile.
                if identify(place, name) == identity:
                    remove_entry(place, name, identity.attempt)
                    if identity.seq not in replaced:
                        steps.append(identity.step)
            self.forget(name)
        return steps

    def _counted(self, keep: Keep) -> list[tuple[str, manifest.Identity]]:
        """Return the entries that retention may remove, oldest first; the caller holds the mutex."""
        counted = [item for item in self._entries.items() if keep.other_runs or self._owns(item[1])]
        return sorted(counted, key=lambda item: item[1].seq)

    def _publications(
        self, entries: list[tuple[str, manifest.Identity]], keep: Keep
    ) -> list[retention.Publication]:
        """Return each entry as retention sees it."""
        return [
            retention.Publication(
                seq=identity.seq,
                step=identity.step,
                metric=None if keep.metric is None else identity.metrics.get(keep.metric),
                verified=verified.is_known(identity.attempt),
                finite=identity.finite,
            )
            for _, identity in entries
        ]

    def expendable(self, keep: Keep) -> list[tuple[str, manifest.Identity]]:
        """Return the names that may be removed, oldest first: for :meth:`prune` and for its dry run.

        Each one is read again: an entry that no longer has a valid manifest is neither counted nor removed.

        Raises:
            StorageError: If one can't be read.
        """
        with storage_errors("look through", self._place.path):
            return self._expendable(keep)

    def _expendable(self, keep: Keep) -> list[tuple[str, manifest.Identity]]:
        while True:
            with self._mutex:
                by_age = self._counted(keep)
                numbers = Counter(identity.seq for identity in self._entries.values())
            publications = self._publications(by_age, keep)
            going = retention.expendable(publications, keep)
            if publications and not self._told and retention.unjudged(publications, keep):
                self._told = True
                _log.warning(
                    "no checkpoint in %s has a number named %r, so the best can't be told: all are kept "
                    "until one has it (told once)",
                    *(self._place.path, keep.metric),
                )
            # Two with one number: one is a copy from elsewhere, and nothing tells which.
            going = frozenset(seq for seq in going if numbers[seq] == 1)
            if not going:
                return []
            lost = [name for name, identity in by_age if not self._still_there(name, identity)]
            if not lost:
                return [entry for entry in by_age if entry[1].seq in going]
            for name in lost:
                _log.warning("%s is no longer a complete checkpoint: it is not counted", self._place.of(name))
                self.forget(name)

    def _still_there(self, name: str, identity: manifest.Identity) -> bool:
        """Whether an entry still is the entered checkpoint, with a manifest that readers accept."""
        if identify(self._place, name) != identity:
            return False
        if identity.attempt not in self._read:
            # Undamaged is not yet valid. Once is enough: with its checksum it stays the same.
            try:
                manifest.parse(_manifest_of(self._place, name), where=self._place.of(name))
            except (files.NotSmallRegularFile, ManifestCorrupt, FileNotFoundError):
                return False
            self._read.add(identity.attempt)
        return True


def _anybody(_: manifest.Identity) -> bool:
    return True


@contextmanager
def looked_through(path: str) -> Iterator[Catalog]:
    """Open the catalog of a path that this process doesn't write into; nothing is locked or changed.

    Raises:
        StorageError: If the directory or one of the manifests can't be read.
    """
    fs = Filesystem()
    with storage_errors("look through", path):
        fd = fs.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield Catalog(Directory(fs, fd, path))
    finally:
        fs.close(fd)


def _empty_trash(place: Place) -> None:
    """Delete remains that could not be deleted before; those that still can't be wait for the next call."""
    try:
        names = place.fs.listdir(place.fd)
    except OSError as error:
        _log.warning("%s could not be listed to delete remains: %s", place.path, error)
        return
    for name in names:
        known = step_names.parse(name)
        if known is None or known.kind != "trash":
            continue
        try:
            files.remove_tree(place.fs, place.fd, name)
        except OSError as error:
            _log.warning("%s is still not deleted: %s", place.of(name), error)
