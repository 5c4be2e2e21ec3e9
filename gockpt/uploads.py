"""Copies in an object store: of one checkpoint by a call, or of each new one in the background."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from gockpt.core.runs import ancestors_of
from gockpt.core.step_number import checked_step
from gockpt.deferred_signals import deferred, let_through
from gockpt.errors import GockptError, NotFoundError, UploadError, UsageError
from gockpt.storage.format.manifest import run_of
from gockpt.storage.object_store.upload import Uploaded, upload_checkpoint
from gockpt.storage.paths import store_to_write
from gockpt.storage.read.find import list_checkpoints, newest_manifest, open_checkpoint
from gockpt.storage.read.object_location import ObjectLocation
from gockpt.workers.thread_pool import lower_priority

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from gockpt.core.runs import Run
    from gockpt.storage.format.manifest import Manifest
    from gockpt.storage.object_store.client import Objects, Where

__all__ = ["UploadStatus", "Uploads", "upload"]

_log = logging.getLogger("gockpt")

LOOK = 0.1
"""Seconds between two checks for signals while waiting."""


def upload(path: Where, url: Where, step: int | None = None) -> Uploaded:
    """Copy one complete checkpoint into an object store and return when it is complete there.

    Every byte is compared with its checksum before it is sent. An archive becomes one object; of a directory
    the manifest goes last. After an interruption no reader finds a checkpoint there; the next call sends an
    archive again, of a directory only the missing objects.

    Args:
        path: Where checkpoints are saved, or one checkpoint's own directory or archive.
        url: The destination, such as ``"s3://bucket/run"``; or an obstore store.
        step: The wanted step; ``None`` for the newest.

    Raises:
        CheckpointNotFound: If there is no complete checkpoint, or none of that step.
        CheckpointCorrupt: If it is damaged; it is not uploaded then.
        RemoteError: If the store refuses or can't be reached (call again), or has another object of its name.
        UsageError: If the URL can't be used, or holds checkpoints of another run.
    """
    with open_checkpoint(path, checked_step(step)) as stored:
        objects = store_to_write(url)
        _expect_related(stored.manifest, objects)
        return upload_checkpoint(stored, objects)


def _expect_related(manifest: Manifest, objects: Objects) -> None:
    """Refuse to mix the checkpoints of two runs unless one descends from the other."""
    newest = newest_manifest(ObjectLocation(objects))
    if newest is None or any(ancestors_of(one.attributes) is None for one in (manifest, newest)):
        return  # an older gockpt wrote one of them, so the ancestry is unknown
    if not run_of(manifest).owns(newest.run, newest.seq) and not run_of(newest).owns(
        manifest.run, manifest.seq
    ):
        msg = (
            f"{objects.url} holds checkpoints of another run (the newest: step {newest.step}, of run "
            f"{newest.run}), and nothing was changed; use a URL of its own for each run"
        )
        raise UsageError(msg)


class Publications(Protocol):
    """The writer of a path, as uploads see it."""

    def continue_after(self, seq: int) -> None:
        """Number later publications above ``seq``, which was used elsewhere."""

    def holding(self, seq: int) -> AbstractContextManager[None]:
        """Keep a publication from being pruned while the context is open."""


@dataclass(frozen=True, slots=True)
class UploadStatus:
    """Progress of the copies of one path's checkpoints.

    Attributes:
        url: The destination.
        newest: The last step whose upload was completed by this writer, if any.
        active: The step that is being uploaded, or ``None``.
        waiting: The step that comes next, or ``None``.
        done: Uploaded bytes of the active one.
        total: All bytes of the active one.
        error: Message of the last upload's error; ``None`` if it succeeded.
    """

    url: str
    newest: Uploaded | None
    active: int | None
    waiting: int | None
    done: int
    total: int
    error: str | None


@dataclass(frozen=True, slots=True)
class _Job:
    step: int
    seq: int
    path: str
    again: bool = False


class Uploads:
    """Background uploads of a path's newest checkpoint into an object store.

    One at a time, on a thread of its own. Of several that became complete meanwhile only the newest is
    uploaded. A failure is only logged; :meth:`wait` and :meth:`settle` try again and raise.
    """

    def __init__(self, url: Where, path: str, store: Publications, run: Run, *, nice: int) -> None:
        """List the store once, so that errors are raised at once.

        Later publications are numbered above those in the store, and the path's newest checkpoint is uploaded
        if it is of this run and isn't complete in the store.

        Raises:
            UsageError: If the URL can't be used.
            RemoteError: If the store refuses or can't be reached.
        """
        self._objects = store_to_write(url)
        self._store = store
        self._nice = nice
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._active: _Job | None = None
        self._waiting: _Job | None = None
        self._failed: _Job | None = None
        self._failure: BaseException | None = None
        self._newest: Uploaded | None = None
        self._progress = (0, 0)
        location = ObjectLocation(self._objects)
        there = location.children()
        highest = max((other.seq or 0 for other in there), default=0)
        if any(other.seq is None for other in there):  # archives that were copied there by other means
            newest = newest_manifest(location)
            highest = highest if newest is None else max(highest, newest.seq)
        store.continue_after(highest)
        mine = list_checkpoints(path)[-1:]
        for entry in mine:
            if not run.owns(entry.run, entry.seq):
                continue
            if entry.seq > highest or any(other.attempt == entry.attempt for other in there):
                self.offer(entry.step, entry.seq, entry.path)

    @property
    def status(self) -> UploadStatus:
        """Current progress."""
        with self._changed:
            return UploadStatus(
                url=self._objects.url,
                newest=self._newest,
                active=None if self._active is None else self._active.step,
                waiting=None if self._waiting is None else self._waiting.step,
                done=self._progress[0],
                total=self._progress[1],
                error=None if self._failure is None else str(self._failure),
            )

    @property
    def busy(self) -> bool:
        """Whether an upload is in flight."""
        return self._active is not None

    def offer(self, step: int, seq: int, path: str) -> None:
        """Queue a checkpoint for upload, in place of one that still waits; returns at once."""
        with self._changed:
            if self._waiting is not None:
                _log.info(
                    "step %d is not uploaded: step %d is newer, and step %s is still being uploaded",
                    self._waiting.step,
                    step,
                    "another" if self._active is None else self._active.step,
                )
            self._waiting, self._failed = _Job(step, seq, path), None
            self._start()

    def wait(self, timeout: float | None = None) -> None:
        """Return when no upload is in flight, or after ``timeout`` seconds. A failed one is tried again.

        Raises:
            UploadError: If the newest checkpoint could not be uploaded; raised once.
        """
        if os.getpid() != self._pid:
            return  # the thread is the parent's
        with deferred(), self._changed:
            self._retry()
        deadline = None if timeout is None else monotonic() + timeout
        while True:
            left = LOOK if deadline is None else min(LOOK, deadline - monotonic())
            with deferred(), self._changed:
                if self._changed.wait_for(lambda: self._active is None, max(0.0, left)):
                    self._raise_failure()
                    return
            if left <= 0:
                return
            let_through()

    def settle(self) -> bool:
        """Return at once whether nothing is left to do. A failed upload is first tried once more.

        That second try runs on the upload's thread.

        Raises:
            UploadError: If the newest checkpoint could not be uploaded in the second try; raised once.
        """
        if os.getpid() != self._pid:
            return True
        with self._changed:
            if self._failed is not None and not self._failed.again:
                self._retry()
            if self._active is not None:
                return False
            self._raise_failure()
            return True

    def _retry(self) -> None:
        """Start a failed upload again, if there is one; the lock is held."""
        if self._failed is not None:
            self._waiting, self._failed = replace(self._failed, again=True), None
            self._start()

    def _raise_failure(self) -> None:
        """Raise the last upload's error, if there is one; the lock is held."""
        failed, self._failed = self._failed, None
        failure = self._failure
        if failed is not None:
            msg = (
                f"the checkpoint of step {failed.step} is complete in {failed.path}, but could not be "
                f"uploaded: {failure}. To try again: gockpt.upload({failed.path!r}, {self._objects.url!r})"
            )
            raise UploadError(msg) from failure

    def _start(self) -> None:
        """Start the waiting upload, unless one is in flight; the lock is held."""
        if self._active is None and self._waiting is not None:
            self._active, self._waiting, self._progress = self._waiting, None, (0, 0)
            try:
                threading.Thread(
                    target=self._run, args=(self._active,), name="gockpt-upload", daemon=True
                ).start()
            except RuntimeError as error:  # no thread could be started; the save itself succeeded
                self._failure, self._failed, self._active = error, self._active, None

    def _run(self, job: _Job | None) -> None:
        """Upload ``job``, then the jobs that wait by then, which are taken under the lock."""
        while job is not None:
            failure: BaseException | None = None
            done: Uploaded | None = None
            try:
                lower_priority(self._nice)
                done = self._upload(job)
            except BaseException as error:  # noqa: BLE001 - wait() raises it
                failure = error
                _log.warning(
                    "step %d was not uploaded to %s: %s; wait() or the next checkpoint's upload tries again",
                    job.step,
                    self._objects.url,
                    error,
                )
                if not isinstance(error, GockptError):
                    _log.debug("of this upload", exc_info=True)
            with self._changed:
                if failure is None:
                    self._newest = done or self._newest
                self._failure, self._failed = failure, None if failure is None else job
                self._active, self._waiting, self._progress = self._waiting, None, (0, 0)
                job = self._active
                self._changed.notify_all()

    def _upload(self, job: _Job) -> Uploaded | None:
        """Upload one checkpoint; return ``None`` if it is gone, or another one has its place."""
        with self._store.holding(job.seq):
            try:
                with open_checkpoint(job.path) as stored:
                    if stored.seq == job.seq:
                        done = upload_checkpoint(
                            stored,
                            self._objects,
                            prepare_thread=partial(lower_priority, self._nice),
                            on_progress=self._show,
                        )
                        _log.info("uploaded step %d to %s: %.1f MB", done.step, done.url, done.sent / 1e6)
                        return done
            except NotFoundError:  # CheckpointPruned is one, too
                pass
        _log.warning("step %d was removed from %s before it was uploaded", job.step, job.path)
        return None

    def _show(self, done: int, total: int) -> None:
        self._progress = (done, total)
