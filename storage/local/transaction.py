"""Transaction: the writing of one checkpoint, chunks first, in any order, then everything else.

Promise: readers see nothing of it until :meth:`Transaction.commit` has made all of it durable; then they see
all of it. After any error it stays failed, and the previous checkpoint of that step, and every other, is
unchanged.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

from gockpt import __version__
from gockpt.errors import SaveAborted, StorageError, UsageError
from gockpt.garbage_collection import collection_paused
from gockpt.storage.format import manifest, step_names
from gockpt.storage.local import files, owner, publish
from gockpt.storage.local.catalog import remove_entry
from gockpt.storage.local.draft import Contents, Draft
from gockpt.storage.local.failures import storage_errors
from gockpt.storage.local.partial_archive import PartialArchive
from gockpt.storage.local.partial_directory import PartialDirectory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from gockpt.core.arena_layout import ArrayLayout, Slot
    from gockpt.core.runs import Run
    from gockpt.storage.format.manifest_entries import ArrayEntry, FileEntry
    from gockpt.storage.format.zarr_outline import Outline
    from gockpt.storage.local.catalog import Catalog, Place
    from gockpt.storage.local.compression import Compression
    from gockpt.storage.local.partial_files import PartialFiles

__all__ = ["Lineage", "Published", "Transaction"]

_log = logging.getLogger("gockpt")

_HEARTBEAT_SECONDS = 60.0


@dataclass(slots=True)
class Lineage:
    """Lineage of a writer's checkpoints.

    Attributes:
        run: Their run.
        parent: ``seq`` of the checkpoint it resumed from or published last, if any.
        labelled: Whether the run's ancestors are written into them, and others' are never replaced.
    """

    run: Run
    parent: int | None
    labelled: bool = True

    def owns(self, identity: manifest.Identity) -> bool:
        """Whether a checkpoint is the run's own; a writer without a run owns all."""
        return not self.labelled or self.run.owns(identity.run, identity.seq)

    def label(self, contents: Contents) -> Contents:
        """Return what a checkpoint is to hold, with the run's ancestors among its attributes."""
        if not self.labelled:
            return contents
        own = contents.attributes.get(manifest.FORMAT, {})
        ancestors = [list(ancestor) for ancestor in self.run.ancestors]
        labelled = {manifest.FORMAT: {**own, "ancestors": ancestors}}
        return replace(contents, attributes={**contents.attributes, **labelled})


@dataclass(frozen=True, slots=True)
class Published:
    """A checkpoint that is complete, visible and durable.

    Attributes:
        step: The user's step.
        seq: Its number among its path's publications; the highest is the newest.
        attempt: Hexadecimal, unique to this writing of the step.
        path: Its directory or archive.
        nbytes: Bytes written: real rows or encoded chunks, checksums and documents; no padding.
        encoding_memory: The most bytes that encoding has held so far, beside the slots; 0 if all is raw.
    """

    step: int
    seq: int
    attempt: str
    path: str
    nbytes: int
    encoding_memory: int


class _Work:
    """A context manager around one piece of work: hundreds of a save, so no generator."""

    __slots__ = ("_alone", "_transaction")

    def __init__(self, transaction: Transaction, *, alone: bool = False) -> None:
        self._transaction = transaction
        self._alone = alone

    def __enter__(self) -> None:
        self._transaction._start(alone=self._alone)  # noqa: SLF001 - a part of it

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._transaction._end(error, alone=self._alone)  # noqa: SLF001 - a part of it


class Transaction:
    """A checkpoint being written, made by ``Store.begin``; as a context manager it aborts if still open.

    Attributes:
        step: The user's step.
        attempt: Hexadecimal, unique to this writing of the step.
    """

    def __init__(
        self,
        place: Place,
        catalog: Catalog,
        lineage: Lineage,
        compression: Compression,
        outline: Outline,
        contents: Contents,
        *,
        step: int,
        attempt: str,
        archive: bool,
        on_end: Callable[[Transaction], None],
    ) -> None:
        """Create the partial, a directory or an archive, and its owner record.

        Raises:
            StorageError: If the disk refuses, or what stands in the step's place is no checkpoint.
        """
        self.step = step
        self.attempt = attempt
        self._place = place
        self._catalog = catalog
        self._lineage = lineage
        self._compression = compression
        contents = self._contents = lineage.label(contents)
        self._on_end = on_end
        self._archive = archive
        self._pid = os.getpid()
        self._partial = step_names.of_partial(step, attempt)
        self._failure: BaseException | None = None
        self._ended = False
        self._gone = False
        self._workers = 0
        self._changed = threading.Condition()
        self._beat = time.monotonic()
        fs, where = place.fs, place.of(self._partial)
        opened: list[int] = []
        try:
            with storage_errors("begin", where):
                place.lock.expect_held(place.fd)
                with catalog.turn:
                    publish.expect_step_replaceable(place, step, lineage.owns)
                who = owner.encode(owner.myself())
                self._owner_fd = files.write_new_file(fs, place.fd, step_names.of_owner(attempt), who)
                opened.append(self._owner_fd)
                if not archive:
                    fs.mkdir(self._partial, dir_fd=place.fd)
                flags = files.NEW_FILE if archive else files.DIRECTORY
                self._fd = fs.open(self._partial, flags, dir_fd=place.fd)
                opened.append(self._fd)
                self._inode = _inode(fs.fstat(self._fd))
                plan = outline.archive(compression.codec_for) if archive else None
                partial: PartialFiles = (
                    PartialDirectory(fs, self._fd, where)
                    if plan is None
                    else PartialArchive(fs, place.fd, self._partial, self._fd, where, plan)
                )
                self._draft = Draft(partial, compression, outline, contents, plan)
        except BaseException:
            for fd in opened:
                with suppress(OSError):
                    fs.close(fd)
            with suppress(OSError):
                files.remove_tree(fs, place.fd, self._partial)
                files.remove_tree(fs, place.fd, step_names.of_owner(attempt))
            raise

    def write_chunk(self, layout: ArrayLayout, slot: Slot, buffer: memoryview) -> None:
        """Write one chunk; see :meth:`write_chunks`."""
        self.write_chunks([(layout, slot, buffer)])

    def write_chunks(self, chunks: Sequence[tuple[ArrayLayout, Slot, memoryview]]) -> None:
        """Write chunks from their arena slots; safe to call from several threads, for different chunks.

        Args:
            chunks: For each, its array, which of its chunks, and the whole slot, writable. The bytes behind
                the real rows are overwritten: checksum, zeros. Page-aligned memory goes to the disk as it
                stands, other memory through a copy. Small chunks in the manifest's order are written at once
                where they are neighbours in the file.

        Raises:
            StorageError: If the disk refuses.
            UsageError: If a chunk was written before, or the checkpoint was begun without the array, or
                with another layout of it.
        """
        with _Work(self):
            self._draft.write_chunks(chunks)
            self._show_life()

    def restate(self, *, state: Mapping[str, Any], attributes: Mapping[str, Any], exact: bool) -> None:
        """Say otherwise what it holds than it was begun with; before the documents are written.

        Raises:
            UsageError: If they are.
        """
        with _Work(self):
            self._contents = self._lineage.label(
                replace(self._contents, state=state, attributes=attributes, exact=exact)
            )
            self._draft.restate(self._contents)

    def annotate(self, attributes: Mapping[str, Any]) -> None:
        """Have other attributes than it was begun with, known once every chunk is written; then commit.

        Raises:
            StorageError: If the disk refuses.
        """
        with _Work(self):
            self._contents = self._lineage.label(replace(self._contents, attributes=attributes))
            self._draft.annotate(self._contents)

    def write_documents(self) -> None:
        """Write all that is neither a chunk nor known only when all of these are written.

        :meth:`commit` does it where nobody did. Side by side with :meth:`write_chunk` it costs no time.

        Raises:
            StorageError: If the disk refuses.
            UsageError: If readers would not take what the checkpoint was begun with.
        """
        with _Work(self), collection_paused():
            self._draft.write_documents(self._tentatively)

    def commit(self) -> Published:
        """Make everything durable, every chunk having been written, and publish it under the step's name.

        Raises:
            StorageError: If the disk refuses, or the place was taken by something else meanwhile.
            UsageError: If chunks are missing, or as for :meth:`write_documents`.
        """
        with _Work(self, alone=True), collection_paused():
            arrays, documents = self._draft.finish(self._tentatively)
            self._draft.sync()
            with self._catalog.turn:
                content = self._manifest(arrays, documents, seq=self._catalog.next_seq())
                self._draft.complete(content)
                self._record(content, self._publish())
            # Still at work: who aborts meanwhile closes the place behind it.
            self._let_go()
        self._draft.learn()
        return Published(
            step=self.step,
            seq=content.seq,
            attempt=self.attempt,
            path=self._place.of(self._name),
            nbytes=self._draft.nbytes,
            encoding_memory=self._compression.peak_nbytes,
        )

    def abort(self) -> None:
        """Abort the save and delete its files after the last thread has stopped writing. Never raises.

        It waits for a :meth:`commit` in progress, whose publication stays. The next sweep deletes files that
        can't be deleted now.
        """
        with self._changed:
            if self._ended or os.getpid() != self._pid:
                return
            self._ended = True
            self._changed.wait_for(lambda: not self._workers)
        try:
            # Not by name alone: after an exchange whose sync failed, the name is the previous checkpoint's.
            if self._is_ours(self._partial):
                remove_entry(self._place, self._partial, self.attempt)
        except OSError:
            pass  # the next sweep deletes it
        except Exception:  # noqa: BLE001 - whoever waits for the failed save must hear of it all the same
            _log.warning("what a failed save had written could not be removed", exc_info=True)
        finally:
            self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _start(self, *, alone: bool) -> None:
        """Let one piece of work happen, unless it is over."""
        with self._changed:
            if os.getpid() != self._pid:
                msg = "a forked process can't go on with its parent's save"
                raise UsageError(msg)
            if self._ended:
                msg = f"the save of step {self.step} has ended"
                raise SaveAborted(msg)
            if self._failure is not None:
                why = str(self._failure) or type(self._failure).__name__
                msg = f"the save of step {self.step} failed before: {why}"
                raise StorageError(msg) from self._failure
            if alone and self._workers:
                msg = "commit while chunks are being written"
                raise UsageError(msg)
            self._workers += 1

    def _end(self, error: BaseException | None, *, alone: bool) -> None:
        """It has happened; an error, whatever it is, ends all."""
        with self._changed:
            self._failure = self._failure or error
            self._workers -= 1
            self._ended = self._ended or (alone and self._failure is None)
            self._changed.notify_all()

    def _show_life(self) -> None:
        """Let observers on other hosts know, now and then, that the writer lives."""
        now = time.monotonic()
        if now - self._beat >= _HEARTBEAT_SECONDS:
            self._beat = now
            with storage_errors("touch", self._place.of(step_names.of_owner(self.attempt))):
                self._place.fs.touch(self._owner_fd)

    def _tentatively(self, arrays: tuple[ArrayEntry, ...], files: tuple[FileEntry, ...]) -> manifest.Manifest:
        """Describe it with the lowest number that it could get: it gets its own when it is published."""
        parent = self._lineage.parent
        return self._manifest(arrays, files, seq=1 if parent is None else parent + 1)

    def _manifest(
        self, arrays: tuple[ArrayEntry, ...], files: tuple[FileEntry, ...], *, seq: int
    ) -> manifest.Manifest:
        return manifest.Manifest(
            step=self.step,
            seq=seq,
            attempt=self.attempt,
            run=self._lineage.run.id,
            parent=self._lineage.parent,
            exact=self._contents.exact,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            writer={"gockpt": __version__},
            attributes=self._contents.attributes,
            arrays=arrays,
            files=files,
        )

    def _publish(self) -> publish.Replaced:
        place = self._place
        with storage_errors("publish", place.of(self._partial)):
            place.lock.expect_held(place.fd)
            if not self._is_ours(self._partial):
                msg = f"{place.of(self._partial)} was taken away meanwhile; this save is given up"
                raise StorageError(msg)
            return publish.publish(place, self._partial, self.step, self._lineage.owns, archive=self._archive)

    def _record(self, content: manifest.Manifest, replaced: publish.Replaced) -> None:
        for archive in (False, True):
            self._catalog.forget(step_names.of_step(self.step, archive=archive))
        for one in replaced:
            self._catalog.add(*publish.set_aside(self._place, one, self.step))
        self._catalog.add(self._name, manifest.identity_of(content))
        self._lineage.parent = content.seq

    @property
    def _name(self) -> str:
        """The name that it is published under."""
        return step_names.of_step(self.step, archive=self._archive)

    def _is_ours(self, name: str) -> bool:
        place = self._place
        return place.has(name) and _inode(place.fs.stat(name, dir_fd=place.fd)) == self._inode

    def _let_go(self) -> None:
        with self._changed:
            if self._gone:
                return
            self._gone = True
        fs, place = self._place.fs, self._place
        self._draft.close()
        for fd in (self._fd, self._owner_fd):
            with suppress(OSError):
                fs.close(fd)
        with suppress(OSError):
            # Whatever still has the name needs the record, until the next sweep sees to it.
            if not place.has(self._partial):
                fs.unlink(step_names.of_owner(self.attempt), dir_fd=place.fd)
        self._on_end(self)


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
