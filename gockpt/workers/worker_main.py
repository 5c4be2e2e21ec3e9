"""The worker process: the background of saves, without torch, beside the trainer.

It is started by :mod:`gockpt.workers.process_handle`, owns the path, and outlives the trainer for as long as
it takes to publish what was captured. Whatever was not captured when the trainer ends is given up.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import traceback
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from gockpt.errors import GockptError, WorkerError
from gockpt.once import leave_to_trainer
from gockpt.options import Options
from gockpt.staging.arena import Arena
from gockpt.storage.local import verified
from gockpt.storage.local.compression import Compression
from gockpt.storage.local.store import Store
from gockpt.workers import messages
from gockpt.workers.channel import Inbox
from gockpt.workers.orphans import open_store
from gockpt.workers.reports import Forward, JobNotes, Notes, Told, failure
from gockpt.workers.send_queue import BEAT_SECONDS, Outbox

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gockpt.workers.save_job import Job
    from gockpt.workers.thread_pool import Pool

__all__ = ["run"]

_log = logging.getLogger("gockpt")

_LAST_WORDS = 5.0
"""Seconds that a living trainer has to take what is told at the end."""


def run(fd: int, trainer: int) -> int:
    """Serve the trainer at the other end of ``fd`` until it ends or says so; return this process's status."""
    try:
        with socket.socket(fileno=fd) as sock:
            Worker(sock, trainer).run()
    except BaseException:  # noqa: BLE001 - its last words
        traceback.print_exc()
        return 1
    return 0


class Worker:
    """Takes messages on the main thread; nothing that waits is done there."""

    def __init__(self, sock: socket.socket, trainer: int) -> None:
        self._trainer = trainer
        self._inbox = Inbox(sock, trainer, descriptors=8)
        self._arenas: dict[int, Arena | GockptError] = {}
        self._jobs: dict[int, Job] = {}
        self._notes = Notes(self._jobs)
        self._outbox = Outbox(sock, gather=self._notes.gather, idle=messages.Beat())
        self._notes.wake = self._outbox.poke
        self._requests: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._left = False
        self._store: Store
        self._pool: Pool
        self._options = Options()
        self._held: dict[int, Any] = {}
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            messages.GiveArena: self._give_arena,
            messages.Begin: self._begin,
            messages.Gradients: lambda m: self._job(m.job, lambda job: job.gradients(m.gradients)),
            messages.Hurry: lambda m: self._job(m.job, lambda job: job.hurry(on=m.on)),
            messages.Discard: self._discard,
            messages.Close: self._close,
            messages.Abort: self._abort,
            messages.Boost: lambda m: self._job(m.job, self._boost),
            messages.Hold: self._hold,
            messages.Release: self._release,
            messages.ContinueAfter: lambda m: self._store.continue_after(m.seq),
            messages.Leave: self._leave,
        }

    def run(self) -> None:
        """Open the path, then take messages until the trainer leaves."""
        leave_to_trainer()
        _log.addHandler(Forward(self._outbox))
        _log.propagate = False
        _log.setLevel(logging.INFO)  # the trainer's logger has the last word
        try:
            first, waiting = self._first()
            if first is None or not self._open(first):
                return
            self._load()
            defect = None
            try:
                self._listen(waiting)
            except Exception as error:  # noqa: BLE001 - raised below: what was captured before is whole
                defect = error
            self._finish()
            if defect is not None:
                raise defect
        finally:
            self._outbox.close(_LAST_WORDS)

    # -- the trainer -------------------------------------------------------------------------

    def _listen(self, waiting: list[Any]) -> None:
        """Do what the trainer says, until it leaves or is gone and all it said is done."""
        for message in waiting:
            self._handle(message)
        while not self._left and not self._orphaned():
            if self._inbox.wait(BEAT_SECONDS)[0] and not self._receive():
                break
        if not self._left:
            self._drain()

    def _orphaned(self) -> bool:
        return os.getppid() != self._trainer or self._inbox.wait(0)[1]

    def _first(self) -> tuple[messages.Open | None, list[Any]]:
        """Wait for the first message; return it, and what came with it."""
        while os.getppid() == self._trainer:
            if self._inbox.wait(BEAT_SECONDS)[0]:
                received = self._inbox.read()
                if received is None:
                    break
                if received:
                    return received[0], received[1:]
        return None, []

    def _receive(self) -> bool:
        received = self._inbox.read()
        for message in received or ():
            self._handle(message)
        return received is not None

    def _drain(self) -> None:
        """Take what a trainer that is gone had still sent: a capture may be among it.

        The stream need not have an end: the trainer's children may hold its socket.
        """
        while self._inbox.wait(0)[0] and self._receive():
            pass

    def _handle(self, message: Any) -> None:
        self._handlers[type(message)](message)

    # -- beginning and end -------------------------------------------------------------------

    def _open(self, first: messages.Open) -> bool:
        self._options = Options(**first.options, keep=first.keep)
        threads = self._options.worker_threads
        try:
            self._store = open_store(
                lambda: Store(
                    os.fsdecode(first.path),
                    follow=first.follow,
                    parent=first.parent,
                    compression=Compression(self._options.compression, threads=threads),
                    layout=self._options.layout,
                ),
                give_up=lambda: os.getppid() != self._trainer,
            )
        except GockptError as error:
            self._outbox.post(messages.Refused(type(error).__name__, messages.printable(str(error))))
            return False
        self._outbox.post(messages.Opened())
        return True

    def _load(self) -> None:
        """Import what works, and let it be compiled behind the first messages."""
        from gockpt.workers.thread_pool import Pool

        self._pool = Pool(self._options.worker_threads, self._options.nice)
        threading.Thread(target=_warm, args=(self._options,), name="gockpt-warm", daemon=True).start()
        threading.Thread(target=self._serve_requests, name="gockpt-requests", daemon=True).start()

    def _finish(self) -> None:
        """Publish what was captured, give up the rest."""
        for job in list(self._jobs.values()):
            if job.closed:
                self._pool.boost(job)  # nobody trains any more, and somebody may wait
            else:
                job.abort()
        self._pool.join()
        self._store.close()

    def _leave(self, _: messages.Leave) -> None:
        self._left = True

    # -- messages ----------------------------------------------------------------------------

    def _job(self, number: int, action: Callable[[Job], None]) -> None:
        job = self._jobs.get(number)
        if job is None:
            return
        try:
            action(job)
        except Exception as error:  # noqa: BLE001 - a defect; the save must hear of it
            self._request(partial(self._give_up, number, job, error))

    def _give_up(self, number: int, job: Job, error: BaseException) -> None:
        job.abort()
        self._fail(number, error)

    def _fail(self, number: int, error: BaseException) -> None:
        self._jobs.pop(number, None)
        self._outbox.post(failure(number, error))

    def _give_arena(self, message: messages.GiveArena) -> None:
        for number in set(self._arenas) - set(message.live):
            del self._arenas[number]
        if not self._inbox.descriptors:
            msg = "the stream between trainer and worker is broken: memory came without a descriptor"
            raise WorkerError(msg)
        fd = self._inbox.descriptors.popleft()
        try:
            self._arenas[message.arena] = Arena.attach(fd, message.nbytes)
        except GockptError as error:
            self._arenas[message.arena] = error

    def _mapped(self, numbers: Sequence[int]) -> tuple[Arena, ...]:
        found = []
        for number in numbers:
            arena = self._arenas[number]
            if isinstance(arena, GockptError):
                raise arena
            found.append(arena)
        return tuple(found)

    def _begin(self, message: messages.Begin) -> None:
        from gockpt.kernels import mkl_sqrt
        from gockpt.workers.save_job import Job

        number = message.job
        notes = JobNotes(number, self._notes)
        try:
            root = None if message.root is None else os.fsdecode(message.root)
            if root is not None and mkl_sqrt.library() != root and not mkl_sqrt.load(root):
                msg = f"{root} can't be loaded, or has no vmsSqrt"
                raise WorkerError(msg)
            job = Job(
                arenas=self._mapped(message.arenas),
                pieces=message.pieces,
                ring=notes,
                store=self._store,
                outcome=Told(number, self._jobs, self._outbox, self._prune),
                trace=notes,
            )
        except Exception as error:  # noqa: BLE001 - told as the save's failure
            self._fail(number, error)
            return
        self._jobs[number] = job
        self._pool.serve(job)

    def _boost(self, job: Job) -> None:
        self._pool.boost(job)  # there is no pool yet when the table is made

    def _discard(self, message: messages.Discard) -> None:
        def discard() -> None:
            self._job(message.job, lambda job: job.discard(message.pieces))
            self._outbox.post(messages.Done(message.reply))

        # Nothing waits for pieces that nobody has worked on yet, and later messages rely on it.
        self._request(discard) if message.reply else discard()

    def _close(self, message: messages.Close) -> None:
        verified.learn(message.verified)
        taken = messages.Taken(message.job)

        def close(job: Job) -> None:
            job.close(message.capture, self._mapped(message.arenas), lambda: self._outbox.post(taken))

        self._job(message.job, close)

    def _abort(self, message: messages.Abort) -> None:
        def abort() -> None:
            job = self._jobs.pop(message.job, None)
            if job is not None:
                job.abort()
            self._outbox.post(messages.Done(message.reply))

        self._request(abort)

    def _hold(self, message: messages.Hold) -> None:
        if message.seq not in self._held:
            self._held[message.seq] = self._store.holding(message.seq)
            self._held[message.seq].__enter__()
        self._outbox.post(messages.Done(message.reply))

    def _release(self, message: messages.Release) -> None:
        held = self._held.pop(message.seq, None)
        if held is not None:
            held.__exit__(None, None, None)

    def _prune(self) -> None:
        from gockpt.workers.executor import prune

        prune(self._store, self._options)

    # -- what waits --------------------------------------------------------------------------

    def _request(self, action: Callable[[], None]) -> None:
        self._requests.put(action)

    def _serve_requests(self) -> None:
        while True:
            action = self._requests.get()
            try:
                action()
            except Exception:  # noqa: BLE001 - the next request must be served
                _log.exception("of a request of the trainer")


def _warm(options: Options) -> None:
    """Have the kernels compiled, or loaded from the disk, before the first save needs them."""
    import numpy as np

    from gockpt.workers.thread_pool import lower_priority

    lower_priority(options.nice)
    from gockpt.kernels import replay
    from gockpt.kernels.fingerprint_numba import fingerprint
    from gockpt.kernels.gradient_encoding import warm

    warm(options.grad_dtype)
    fingerprint(np.zeros(64, np.uint8))
    if replay.WHY_NOT:
        return
    for kernel, (states, columns) in replay.SHAPES.items():
        if kernel in replay.FORMS:  # a device's formulas, compiled where one is
            continue
        p, *rest = (np.zeros(16, np.float32) for _ in range(2 + states))
        replay.run(kernel, (0, 0), p, rest[1:], rest[:1], [(0.0,) * columns], tail=True)
