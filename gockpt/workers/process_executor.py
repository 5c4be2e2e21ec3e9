"""The background of saves in a process of its own: the next one is started when a save needs it."""

from __future__ import annotations

import os
import socket
import sys
import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Unpack

from gockpt.errors import OptionsError, WorkerError
from gockpt.kernels import mkl_sqrt
from gockpt.staging.arena import Arena
from gockpt.workers import messages
from gockpt.workers.process_handle import WorkerProcess
from gockpt.workers.process_job import RemoteJob

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gockpt.options import Options
    from gockpt.storage.local.store import Follow
    from gockpt.workers.job_client import JobParts

__all__ = ["InProcess"]


class InProcess:
    """Keeps a worker process for one path; its successor is started when a save needs one."""

    def __init__(self, path: str, options: Options, *, parent: int | None, follow: Follow) -> None:
        """Start it and wait until it has taken the path.

        Raises:
            OptionsError: If this system can't share memory by descriptors, or doesn't say which Python runs.
            PathBusy: If another process writes there.
            StorageError: If the path is a file, read-only, or the disk refuses otherwise.
            WorkerError: If it can't be started, or ends.
        """
        if not hasattr(os, "memfd_create") or not hasattr(socket, "send_fds") or not sys.executable:
            msg = 'worker="process" needs Linux and a Python executable; use worker="thread"'
            raise OptionsError(msg)
        self._path = path
        self._options = options
        self._follow = follow
        self._parent = parent
        self._after = 0
        self._defect = ""
        self._held: set[int] = set()
        self._lock = threading.RLock()
        self._numbers: weakref.WeakKeyDictionary[Arena, int] = weakref.WeakKeyDictionary()
        self._last_number = 0
        self._jobs = 0
        self._worker = self._start()
        try:
            error = self._worker.opened()
            if error is not None:
                raise error
        except BaseException:
            self._worker.abandon()
            raise

    def arena(self, nbytes: int) -> Arena:
        """Return memory that is shared with the worker."""
        arena = Arena(nbytes, shared=True)
        with self._lock:
            self._last_number += 1
            self._numbers[arena] = self._last_number
        return arena

    def job(self, **parts: Unpack[JobParts]) -> RemoteJob:
        """Return a job for the worker; a new worker if there is none any more."""
        with self._lock:
            if self._worker.error is not None:
                # Not ended by end(): that waits for outcomes, which wait for the lock of whoever calls this.
                self._worker = self._start()
            self._jobs += 1
            return RemoteJob(self._worker, self._jobs, **parts)

    def serve(self, job: RemoteJob) -> None:
        """Let the worker start on it."""
        job.begin(mkl_sqrt.library())

    def boost(self, job: RemoteJob) -> None:
        """Have a thread of normal priority work on it as well."""
        job.boost()

    def prune(self) -> None:
        """Raise what went wrong with it in the worker, which has done so already, since it may be alone."""
        defect, self._defect = self._defect, ""
        if defect:
            raise WorkerError(defect)

    def close(self) -> None:
        """Let the worker finish what was captured; return when it has ended and all was reported."""
        self._worker.end()

    def continue_after(self, seq: int) -> None:
        """Number publications from above ``seq`` on, which was given out elsewhere."""
        with self._lock:
            self._after = max(self._after, seq)
            self._worker.post(messages.ContinueAfter(seq))

    @contextmanager
    def holding(self, seq: int) -> Iterator[None]:
        """Keep a publication from being pruned while the context is open."""
        with self._lock:
            self._held.add(seq)
            worker = self._worker
        worker.ask(lambda reply: messages.Hold(seq, reply))
        try:
            yield
        finally:
            with self._lock:
                self._held.discard(seq)
                self._worker.post(messages.Release(seq))

    def _start(self) -> WorkerProcess:
        o = self._options
        plain = {
            "cpu_threads": o.worker_threads,
            "nice": o.nice,
            "compression": o.compression,
            "layout": o.layout,
            "grad_dtype": o.grad_dtype,
        }
        first = messages.Open(os.fsencode(self._path), self._follow, self._parent, plain, o.keep)
        worker = WorkerProcess(first, o.worker_timeout, self._numbers, self._published)
        worker.post(messages.ContinueAfter(self._after))
        for seq in self._held:
            worker.post(messages.Hold(seq, 0))
        return worker

    def _published(self, seq: int, defect: str) -> None:
        self._parent = seq
        self._defect = self._defect or defect
