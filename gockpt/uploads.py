"""Copies in an object store: one checkpoint by a call, or each new one behind a running training."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from gockpt.catalog import checked_step
from gockpt.core.runs import ancestors_of
from gockpt.deferred_signals import deferred, let_through
from gockpt.errors import GockptError, NotFoundError, UploadError, UsageError
from gockpt.storage.format.manifest import run_of
from gockpt.storage.object_store.upload import Uploaded, upload_checkpoint
from gockpt.storage.paths import store_to_write
from gockpt.storage.read.find import list_checkpoints, newest_manifest, open_checkpoint
from gockpt.storage.read.object_location import ObjectLocation

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from gockpt.core.runs import Run
    from gockpt.storage.format.manifest import Manifest
    from gockpt.storage.object_store.client import Objects, Where

__all__ = ["UploadStatus", "Uploads", "upload"]

_log = logging.getLogger("gockpt")

LOOK = 0.1
"""Seconds between two looks whether a signal came, while waiting."""


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
        UsageError: If the URL can't be used, or holds checkpoints of another run.
    """
    with open_checkpoint(path, checked_step(step)) as stored:
        objects = store_to_write(url)
        _expect_related(stored.manifest, objects)
        return upload_checkpoint(stored, objects)


def _expect_related(manifest: Manifest, objects: Objects) -> None:
    """Refuse to mix the checkpoints of two runs, of which none descends from the other."""
    newest = newest_manifest(ObjectLocation(objects))
    if newest is None or any(ancestors_of(one.attributes) is None for one in (manifest, newest)):
        return  # an older gockpt wrote one of them, and it can't be told
    if not run_of(manifest).owns(newest.run, newest.seq) and not run_of(newest).owns(
        manifest.run, manifest.seq
    ):
        msg = (
            f"{objects.url} holds checkpoints of another run (the newest: step {newest.step}, of run "
            f"{newest.run}), and nothing was changed; use a URL of its own for each run"
        )
        raise UsageError(msg)


class Publications(Protocol):
    """The writer of a path, as far as uploads concern it."""

    def continue_after(self, seq: int) -> None:
        """Number publications from above ``seq`` on, which was given out elsewhere."""

    def holding(self, seq: int) -> AbstractContextManager[None]:
        """Keep a publication from being pruned while the context is open."""


@dataclass(frozen=True, slots=True)
class UploadStatus:
    """How far the copies of one path's checkpoints are.

    Attributes:
        url: Where they go.
        newest: The last one that became complete there since this writer began, if any.
        active: The step that is being uploaded, or ``None``.
        waiting: The step that comes next, or ``None``.
        done: Bytes of the active one that are there.
        total: Bytes that it has.
        error: What the last upload failed of, in words; ``None`` if it went well.
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
    """Copies the newest checkpoint of a path into an object store whenever there is a newer one.

    One at a time, on a thread of its own. Of several that became complete meanwhile only the newest is
    uploaded. A failure is logged and disturbs nobody; :meth:`wait` and :meth:`settle` try again and raise.
    """

    def __init__(self, url: Where, path: str, store: Publications, run: Run, *, nice: int) -> None:
        """Look into the store once, so that what can't work shows at once.

        Numbers of publications go on above those that are there, and the path's newest checkpoint is
        uploaded if it is of this run, and isn't there yet, or not as a whole.

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
        there = ObjectLocation(self._objects).children()
        highest = max((other.seq or 0 for other in there), default=0)
        store.continue_after(highest)
        mine = list_checkpoints(path)[-1:]
        for entry in mine:
            if not run.owns(entry.run, entry.seq):
                continue
            if entry.seq > highest or any(other.attempt == entry.attempt for other in there):
                self.offer(entry.step, entry.seq, entry.path)

    @property
    def status(self) -> UploadStatus:
        """How far it is."""
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
        """Whether something is being uploaded."""
        return self._active is not None

    def offer(self, step: int, seq: int, path: str) -> None:
        """Upload a checkpoint next; returns at once. One that has waited until now is left out."""
        with self._changed:
            if self._waiting is not None:
                _log.info(
                    "step %d is not uploaded: step %d is newer, and step %s is still on its way",
                    self._waiting.step,
                    step,
                    "another" if self._active is None else self._active.step,
                )
            self._waiting, self._failed = _Job(step, seq, path), None
            self._start()

    def wait(self, timeout: float | None = None) -> None:
        """Return when nothing is being uploaded, or after ``timeout`` seconds. What failed is tried again.

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
        """Return whether nothing is left to do, at once. What failed is first tried once more, on its thread.

        Raises:
            UploadError: If the newest checkpoint could not be uploaded then either; raised once.
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
        """Begin once more with what failed, if anything did; the lock is held."""
        if self._failed is not None:
            self._waiting, self._failed = replace(self._failed, again=True), None
            self._start()

    def _raise_failure(self) -> None:
        """Raise what the last upload failed of, if it did; the lock is held."""
        failed, self._failed = self._failed, None
        failure = self._failure
        if failed is not None:
            msg = (
                f"the checkpoint of step {failed.step} is complete in {failed.path}, but could not be "
                f"uploaded: {failure}. To try again: gockpt.upload({failed.path!r}, {self._objects.url!r})"
            )
            raise UploadError(msg) from failure

    def _start(self) -> None:
        """Begin with what waits, unless something is on its way; the lock is held."""
        if self._active is None and self._waiting is not None:
            self._active, self._waiting, self._progress = self._waiting, None, (0, 0)
            try:
                threading.Thread(
                    target=self._run, args=(self._active,), name="gockpt-upload", daemon=True
                ).start()
            except RuntimeError as error:  # no thread to be had: the save has gone well all the same
                self._failure, self._failed, self._active = error, self._active, None

    def _run(self, job: _Job | None) -> None:
        """Upload ``job``, then whatever waits by then; which that is is settled under the lock."""
        while job is not None:
            failure: BaseException | None = None
            done: Uploaded | None = None
            try:
                self._be_nice()
                done = self._upload(job)
            except BaseException as error:  # noqa: BLE001 - wait() raises it
                failure = error
                _log.warning(
                    "step %d was not uploaded to %s: %s; the next checkpoint will be, or this one by wait()",
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
        """Upload one checkpoint; ``None`` if it is gone, or another one stands in its place."""
        with self._store.holding(job.seq):
            try:
                with open_checkpoint(job.path) as stored:
                    if stored.seq == job.seq:
                        done = upload_checkpoint(
                            stored,
                            self._objects,
                            prepare_thread=self._be_nice,
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

    def _be_nice(self) -> None:
        # On Linux the priority belongs to the thread, not to the process. Refused where the process itself
        # is nicer than that.
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._nice)
