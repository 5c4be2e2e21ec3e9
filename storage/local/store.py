"""Store: one directory of checkpoints with one writer.

Promise: whatever happened to earlier writers, a :class:`Store` finds every complete checkpoint unchanged,
removes only remains of writers that are certainly gone, and never touches entries that aren't gockpt's.
"""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from gockpt.core.runs import Run, adopted
from gockpt.errors import PathBusy, UsageError
from gockpt.garbage_collection import collection_paused
from gockpt.options import Keep
from gockpt.storage.format import step_names
from gockpt.storage.format.archive_plan import is_archivable
from gockpt.storage.format.json_fields import MAX_INTEGER
from gockpt.storage.format.zarr_outline import Outline
from gockpt.storage.local import files, owner
from gockpt.storage.local.catalog import Catalog, Place, identify, remove_entry
from gockpt.storage.local.compression import Compression
from gockpt.storage.local.draft import Contents
from gockpt.storage.local.failures import storage_errors
from gockpt.storage.local.filesystem import Filesystem
from gockpt.storage.local.transaction import Lineage, Transaction
from gockpt.storage.local.writer_lock import WriterLock
from gockpt.storage.paths import local_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager
    from types import TracebackType

    from gockpt.core.arena_layout import ArrayLayout

__all__ = ["Follow", "Layout", "Store"]

Layout = Literal["auto", "file", "directory"]
"""Layout of the checkpoints that a store writes."""

_log = logging.getLogger("gockpt")


@dataclass(frozen=True, slots=True)
class Follow:
    """The right to write into a path.

    Attributes:
        run: The run to write as.
        newest: The attempt of the newest checkpoint there when that was decided, if there was one.
        here: Whether the model was loaded from this path: then checkpoints of a gockpt that wrote no
            ancestors count as its own.
    """

    run: Run
    newest: str | None
    here: bool


class Store:
    """The one writer of a path, from construction to :meth:`close`; a context manager.

    Attributes:
        path: The directory, absolute.
        run: The training run of everything it publishes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fs: Filesystem | None = None,
        follow: Follow | None = None,
        parent: int | None = None,
        compression: Compression | None = None,
        layout: Layout = "directory",
    ) -> None:
        """Make the directory if need be, take its writer lock, and sweep up after writers that died.

        Args:
            path: Where checkpoints go.
            fs: The file system; the real one by default.
            follow: As which run, and after which checkpoint. Without it nothing is looked at: each
                checkpoint there counts as its own, and what it publishes names no ancestors.
            parent: ``seq`` of the checkpoint that the run resumed from, if it did.
            compression: What is encoded, and how; nothing by default.
            layout: ``"file"``: one archive per checkpoint; ``"directory"``: a directory of files; ``"auto"``:
                an archive, unless a chunk is too long for one.

        Raises:
            PathBusy: If another process, or another store of this one, writes there, or has published
                after what is to be followed.
            StorageError: If the path is a file, read-only, or the disk refuses otherwise.
        """
        self.path = os.path.abspath(local_path(path))
        fs = fs or Filesystem()
        self._pid = os.getpid()
        self._compression = compression or Compression(None, threads=1)
        self._layout = layout
        self._outline: Outline | None = None  # of the latest save: the next one mostly has the same arrays
        self._transactions: set[Transaction] = set()
        self._closed = False
        with storage_errors("save into", self.path):
            _make_directories(fs, self.path)
            # The user's own path may be a link; everything below it may not.
            fd = fs.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._place = Place(fs, fd, self.path, WriterLock(fs, fd, self.path))
            try:
                # Before anything is removed: it may have become another run's path meanwhile.
                self._catalog = Catalog(self._place)
                self.run = Run(secrets.token_hex(16)) if follow is None else self._followed(follow)
                self._lineage = Lineage(self.run, parent, labelled=follow is not None)
                others = self._catalog.belong_to(self._lineage.owns)
                if others:
                    _log.warning(
                        "%s holds %d checkpoints of other runs than this one: they are neither counted nor "
                        "removed, unless Options(keep=Keep(other_runs=True)) says so",
                        *(self.path, others),
                    )
                if _sweep(self._place):
                    self._catalog = Catalog(self._place)
                    self._catalog.belong_to(self._lineage.owns)
                if parent is not None:  # what it resumed from may have been moved away since
                    self._catalog.continue_after(parent)
            except BaseException:
                self._place.lock.release()
                raise
        except BaseException:
            with suppress(OSError):
                fs.close(fd)
            raise

    def _followed(self, follow: Follow) -> Run:
        """Return the run, unless a newest checkpoint is there that it was not allowed to follow."""
        newest = self._catalog.newest
        known = newest is None or newest.attempt == follow.newest
        if newest is not None and not known and not follow.run.owns(newest.run, newest.seq):
            msg = f"another process published a checkpoint in {self.path} just now; try again"
            raise PathBusy(msg)
        return adopted(follow.run, self._catalog.unlabelled) if follow.here else follow.run

    def begin(
        self,
        step: int,
        arrays: Sequence[ArrayLayout],
        *,
        state: Mapping[str, Any],
        attributes: Mapping[str, Any],
        exact: bool,
    ) -> Transaction:
        """Start to write a checkpoint; it becomes visible by :meth:`Transaction.commit` only.

        Args:
            step: The user's step.
            arrays: All arrays, in the manifest's order.
            state: The state document: a JSON object.
            attributes: Attributes of the root group: a small JSON object.
            exact: Whether the checkpoint equals a blocking save bit for bit.

        Raises:
            UsageError: If the step is no integer from 0 to 2**63 - 1, names can't stand together, a chunk is
                too long for an archive that was asked for, or the store was closed or forked.
            StorageError: If the disk refuses, or what stands in the step's place is no checkpoint.
        """
        self._expect_usable()
        if type(step) is not int or not 0 <= step <= MAX_INTEGER:
            msg = f"step must be an integer from 0 to 2**63 - 1, got {step!r}"
            raise UsageError(msg)
        arrays = tuple(arrays)
        outline = self._outline
        if outline is None or outline.arrays != arrays:
            with collection_paused():
                self._outline = outline = Outline(arrays)
        transaction = Transaction(
            self._place,
            self._catalog,
            self._lineage,
            self._compression,
            outline,
            Contents(arrays, state, attributes, exact),
            step=step,
            attempt=secrets.token_hex(16),
            archive=self._layout != "directory" and self._fits_archive(arrays),
            on_end=self._transactions.discard,
        )
        self._transactions.add(transaction)
        return transaction

    def _fits_archive(self, arrays: Sequence[ArrayLayout]) -> bool:
        """Whether arrays can be written into an archive.

        Raises:
            UsageError: If they can't, and an archive was asked for.
        """
        fits = is_archivable(arrays)
        if not fits and self._layout == "file":
            msg = (
                "a row of an array has 2 GiB or more, which no reader of archives takes: "
                'save with Options(layout="directory"), or "auto"'
            )
            raise UsageError(msg)
        return fits

    def prune(self, keep: int | Keep) -> list[int]:
        """Delete all but the newest ``keep`` checkpoints, by publication; readers survive it.

        What a newer publication of its step replaced is deleted as well, and doesn't count. What stays
        beyond the newest, :mod:`gockpt.core.retention` says.

        Returns:
            The steps that are gone, oldest publication first.

        Raises:
            UsageError: If fewer than one would be kept, or the store was closed or forked.
            StorageError: If the disk refuses; nothing that was to be kept is touched.
        """
        self._expect_usable()
        if not isinstance(keep, Keep):
            if type(keep) is not int or keep < 1:
                msg = f"keep must be at least 1, got {keep!r}: the newest checkpoint is never deleted"
                raise UsageError(msg)
            keep = Keep(newest=keep)
        with self._catalog.turn:
            return self._catalog.prune(self._place, keep)

    def keep_to_newest_run(self) -> int:
        """Let :meth:`prune` count and remove only the newest checkpoint's run.

        Returns:
            How many are of other runs.
        """
        return self._catalog.keep_to_newest_run()

    def continue_after(self, seq: int) -> None:
        """Number publications from above ``seq`` on, which was given out elsewhere."""
        self._catalog.continue_after(seq)

    def holding(self, seq: int) -> AbstractContextManager[None]:
        """Keep :meth:`prune` from deleting a publication while the context is open."""
        return self._catalog.holding(seq)

    def close(self) -> None:
        """Abort what was begun and not committed, and let others write here. Again is fine."""
        if self._closed:
            return
        self._closed = True
        for transaction in list(self._transactions):
            transaction.abort()
        self._place.lock.release()
        with suppress(OSError):
            self._place.fs.close(self._place.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _expect_usable(self) -> None:
        if self._closed:
            msg = f"the store of {self.path} was closed"
            raise UsageError(msg)
        if os.getpid() != self._pid:
            msg = f"a forked process can't write into its parent's store; let it open {self.path} for itself"
            raise UsageError(msg)


def _make_directories(fs: Filesystem, path: str) -> None:
    """Make a directory and its parents, and make each that was made durable."""
    missing = []
    while True:
        try:
            fs.stat(path)
            break
        except FileNotFoundError:
            missing.append(path)
            path = os.path.dirname(path)
    for directory in reversed(missing):
        try:
            fs.mkdir(directory)
        except FileExistsError:  # somebody else was faster
            continue
    for directory in missing:
        fd = fs.open(os.path.dirname(directory), os.O_RDONLY | os.O_DIRECTORY)
        try:
            fs.fsync(fd)
        finally:
            fs.close(fd)


def _sweep(place: Place) -> bool:
    """Remove what writers that are certainly gone left behind; see :mod:`gockpt.storage.local.owner`.

    Returns:
        Whether anything got the name of a checkpoint by that.
    """
    named = False
    with storage_errors("clean up", place.path):
        present = place.fs.listdir(place.fd)
        known = {name: found for name in present if (found := step_names.parse(name)) is not None}
        partials = {found.attempt for found in known.values() if found.kind == "partial"}
        for name, found in known.items():
            attempt = str(found.attempt)
            if found.kind == "trash":
                files.remove_tree(place.fs, place.fd, name)
            elif found.kind == "partial" and _is_abandoned(place, name, attempt):
                named |= _clear(place, name, found)
            elif found.kind == "owner" and attempt not in partials and _is_abandoned(place, name, attempt):
                files.remove_tree(place.fs, place.fd, name)
    return named


def _is_abandoned(place: Place, name: str, attempt: str) -> bool:
    """Whether the writer of an attempt is gone; ``name`` is what it left, in case it left no record."""
    fs, record = place.fs, step_names.of_owner(attempt)
    try:
        who = owner.parse(files.read_small_file(fs, place.fd, record, limit=owner.MAX_OWNER_BYTES))
        seen = fs.stat(record, dir_fd=place.fd).st_mtime
    except (FileNotFoundError, files.NotSmallRegularFile):
        who = None
        try:
            seen = fs.stat(name, dir_fd=place.fd).st_mtime
        except FileNotFoundError:  # its writer lives, and is done with it
            return False
    return owner.is_abandoned(who, observer=owner.myself(), quiet_seconds=place.lock.server_time() - seen)


def _clear(place: Place, name: str, found: step_names.EntryName) -> bool:
    """Remove a partial that nobody writes, unless it is the predecessor that its attempt had replaced.

    Returns:
        Whether it is, and got the name of a checkpoint.
    """
    fs = place.fs
    identity = identify(place, name)
    is_predecessor = (
        identity is not None and identity.step == found.step and identity.attempt != found.attempt
    )
    if identity is not None and is_predecessor:
        # The writer died between the exchange and the renaming of what it got in exchange.
        fs.rename(name, step_names.of_old(identity.step, identity.attempt), dir_fd=place.fd)
        fs.fsync(place.fd)
    else:
        remove_entry(place, name, str(found.attempt))
    files.remove_tree(fs, place.fd, step_names.of_owner(str(found.attempt)))
    return is_predecessor
