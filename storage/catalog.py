"""What stands in a checkpoint path, as its writer knows it: who is newest, and what may go.

Promise: newest is the highest ``seq``, and no ``seq`` is given out twice. What isn't a complete checkpoint
by its name and its manifest is not in the catalog, so it is neither counted nor ever removed.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gockpt import retention
from gockpt.errors import ManifestCorrupt
from gockpt.storage import directory_names, files, manifest, strict_json, verified
from gockpt.storage.checked import MAX_INTEGER
from gockpt.storage.failures import storage_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gockpt.options import Keep
    from gockpt.storage.filesystem import Filesystem
    from gockpt.storage.lock import WriterLock

__all__ = ["Catalog", "Place", "identify", "remove_entry"]

_log = logging.getLogger(__name__)

# A line of JSON and its checksum line.
_MANIFEST_LIMIT = strict_json.MAX_BYTES + 4096


@dataclass(frozen=True, slots=True)
class Place:
    """Where checkpoints go, and the means to get there.

    Attributes:
        fs: The file system.
        fd: The open directory.
        path: Its path, for messages.
        lock: The right to write into it.
    """

    fs: Filesystem
    fd: int
    path: str
    lock: WriterLock

    def of(self, name: str) -> str:
        """Return the path of what stands there under a name, for messages."""
        return os.path.join(self.path, name)

    def has(self, name: str) -> bool:
        """Whether anything stands there under a name."""
        try:
            self.fs.stat(name, dir_fd=self.fd)
        except FileNotFoundError:
            return False
        return True


def identify(place: Place, name: str) -> manifest.Identity | None:
    """Return which checkpoint stands there under a name; ``None`` if it isn't a complete one.

    Raises:
        OSError: If that can't be told: no permission, a failing device.
    """
    fs = place.fs
    try:
        fd = fs.open(name, files.DIRECTORY, dir_fd=place.fd)
        try:
            data = files.read_small_file(fs, fd, manifest.MANIFEST_FILE, limit=_MANIFEST_LIMIT)
        finally:
            fs.close(fd)
        return manifest.identify(data, where=place.of(name))
    except (files.NotSmallRegularFile, ManifestCorrupt):
        return None
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return None  # gone, a file, or a link


def remove_entry(place: Place, name: str, attempt: str) -> None:
    """Delete a directory so that no reader ever lists a half of it: rename, sync, then delete.

    Raises:
        OSError: What the system says; what is left has a name that the next sweep deletes.
    """
    trash = directory_names.of_trash(attempt)
    files.remove_tree(place.fs, place.fd, trash)
    place.fs.rename(name, trash, dir_fd=place.fd)
    place.fs.fsync(place.fd)
    files.remove_tree(place.fs, place.fd, trash)


class Catalog:
    """The complete checkpoints of a place; safe to use from several threads.

    Attributes:
        turn: Held while a checkpoint gets its number and its name, and while some are removed: between a look
            at a name and its renaming nobody else may rename it.
    """

    __slots__ = ("_entries", "_held", "_mutex", "_place", "_seq", "turn")

    def __init__(self, place: Place) -> None:
        """Look at every name in the directory.

        Raises:
            StorageError: If the directory or one of the manifests can't be read.
        """
        self._place = place
        self._mutex = threading.Lock()
        self.turn = threading.Lock()
        self._entries: dict[str, manifest.Identity] = {}
        self._seq = 0
        self._held: set[int] = set()
        with storage_errors("look through", place.path):
            for name in place.fs.listdir(place.fd):
                known = directory_names.parse(name)
                if known is not None and known.kind in ("step", "old"):
                    self._look(name, known)

    def _look(self, name: str, known: directory_names.DirectoryName) -> None:
        found = identify(self._place, name)
        if found is None:
            return
        self._seq = max(self._seq, found.seq)
        # A copy under another name is not the checkpoint it was copied from.
        if found.step == known.step and known.attempt in (None, found.attempt):
            self._entries[name] = found

    def next_seq(self) -> int:
        """Return a number higher than any seen; a number given out is used up."""
        with self._mutex:
            self._seq += 1
            return self._seq

    def continue_after(self, seq: int) -> None:
        """Give out only numbers above ``seq`` from now on; not if there are none above it."""
        with self._mutex:
            if seq < MAX_INTEGER:
                self._seq = max(self._seq, seq)

    @contextmanager
    def holding(self, seq: int) -> Iterator[None]:
        """Spare a publication, whatever is pruned meanwhile; a later pruning takes it."""
        with self._mutex:
            self._held.add(seq)
        try:
            yield
        finally:
            with self._mutex:
                self._held.discard(seq)

    def add(self, name: str, identity: manifest.Identity) -> None:
        """Enter what was just published."""
        with self._mutex:
            self._entries[name] = identity

    def forget(self, name: str) -> None:
        """Strike a name off, if it is in."""
        with self._mutex:
            self._entries.pop(name, None)

    def prune(self, keep: Keep) -> list[int]:
        """Delete what need not be kept; returns the steps deleted, oldest publication first.

        What a newer publication of the same step replaced goes too; it neither counts nor is reported. The
        newest are looked at once more before anything goes: what is no complete checkpoint any more
        doesn't count. What is held is left for the next time.

        Raises:
            StorageError: If the disk refuses; what was deleted until then is deleted.
        """
        with storage_errors("look through", self._place.path):
            going = self._expendable(keep)
        with self._mutex:
            replaced = retention.superseded(self._publications(keep))
        steps = []
        for name, identity in going:
            with self._mutex:
                if identity.seq in self._held:
                    continue
            with storage_errors("delete", self._place.of(name)):
                # Not what another process put in its place meanwhile.
                if identify(self._place, name) == identity:
                    remove_entry(self._place, name, identity.attempt)
                    if identity.seq not in replaced:
                        steps.append(identity.step)
            self.forget(name)
        return steps

    def _publications(self, keep: Keep) -> list[retention.Publication]:
        """Return what retention needs to know of each entry; the caller holds the mutex."""
        return [
            retention.Publication(
                seq=identity.seq,
                step=identity.step,
                metric=None if keep.metric is None else identity.metrics.get(keep.metric),
                verified=verified.is_known(identity.attempt),
            )
            for identity in self._entries.values()
        ]

    def _expendable(self, keep: Keep) -> list[tuple[str, manifest.Identity]]:
        """Return what may go, oldest first, after a look at whether the newest that stay are still whole."""
        while True:
            with self._mutex:
                by_age = sorted(self._entries.items(), key=lambda item: item[1].seq)
                going = retention.expendable(self._publications(keep), keep)
            numbers = Counter(identity.seq for _, identity in by_age)
            # Two of one number: one was copied in from elsewhere, and which is meant can't be told.
            going = frozenset(seq for seq in going if numbers[seq] == 1)
            if not going:
                return []
            staying = [entry for entry in by_age if entry[1].seq not in going]
            lost = [name for name, identity in staying if identify(self._place, name) != identity]
            if not lost:
                return [entry for entry in by_age if entry[1].seq in going]
            for name in lost:
                _log.warning("%s is no complete checkpoint any more: it is not counted", self._place.of(name))
                self.forget(name)
