"""One worker process as the trainer sees it, from its start to its end, however that comes."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from functools import cache
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from gockpt import errors
from gockpt.deferred_signals import let_through
from gockpt.errors import GockptError, WorkerError
from gockpt.storage.local import verified
from gockpt.workers import messages
from gockpt.workers.channel import Inbox
from gockpt.workers.orphans import BOOT
from gockpt.workers.send_queue import BEAT_SECONDS, Outbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gockpt.core.descriptors import Capture
    from gockpt.staging.arena import Arena

__all__ = ["WorkerProcess", "error_of"]

_log = logging.getLogger("gockpt")

_FOR_THE_TRAINER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that terminals and schedulers send to all processes of a job, to be answered by its program."""

_LOOK = 0.1
"""Seconds between two looks whether a signal came, while waiting."""

_LAST_MOMENTS = 10.0
"""Seconds after which a process that was killed is not waited for any more: its disk doesn't answer."""


class Listener(Protocol):
    """A job whose messages arrive on the connection's thread: :class:`gockpt.workers.process_job.RemoteJob`.

    Attributes:
        number: The job's number.
    """

    number: int

    def hear(self, message: Any) -> None:
        """Take a message about the job."""

    def failed(self, error: BaseException) -> None:
        """Take that the process has ended."""

    def join(self) -> None:
        """Wait until all was reported."""


class WorkerProcess:
    """One worker process.

    Attributes:
        pid: Its process id.
        error: Why it can't be used any more; ``None`` while it can.
    """

    def __init__(
        self,
        first: messages.Open,
        timeout: float,
        numbers: weakref.WeakKeyDictionary[Arena, int],
        on_published: Callable[[int, str], None],
    ) -> None:
        self.error: BaseException | None = None
        self._timeout = timeout
        self._numbers = numbers
        self._on_published = on_published
        self._lock = threading.Lock()
        self._jobs: dict[int, Listener] = {}
        self._given: set[int] = set()
        self._replies: dict[int, threading.Event] = {}
        self._asked = 0
        self._opened = threading.Event()
        self._leaving = False
        self._killed_for: str | None = None
        self._sock, self._process = _spawn()
        self.pid = self._process.pid
        self._inbox = Inbox(self._sock, self.pid)
        _watch_forks()
        _living.add(self)
        self._outbox = Outbox(self._sock, broken=self._unsendable)
        self.post(first)
        self._thread = threading.Thread(target=self._receive, name="gockpt-worker-process", daemon=True)
        self._thread.start()

    def opened(self) -> BaseException | None:
        """Wait until it has taken the path; return why it could not."""
        while not self._opened.wait(_LOOK):
            let_through()
        return self.error

    def post(self, message: Any, arena: Arena | None = None) -> None:
        """Tell it something; if it is gone, nobody hears."""
        self._outbox.post(message, arena)

    def ask(self, question: Callable[[int], Any]) -> None:
        """Tell it something and wait for the answer, or for its end."""
        answered = threading.Event()
        with self._lock:
            if self.error is not None:
                return
            self._asked += 1
            number = self._asked
            self._replies[number] = answered
        self.post(question(number))
        answered.wait()

    def give(self, arenas: Iterable[Arena]) -> tuple[int, ...]:
        """Make sure that it has these arenas; return their numbers."""
        found = []
        for arena in arenas:
            number = self._numbers[arena]
            found.append(number)
            if number not in self._given:
                self._given.add(number)
                self.post(messages.GiveArena(number, arena.nbytes, tuple(self._numbers.values())), arena)
        return tuple(found)

    def expect(self, job: Listener) -> None:
        """Hand on what it tells of a job."""
        with self._lock:
            self._jobs[job.number] = job
            error = self.error
        if error is not None:
            job.failed(error)

    def close_job(self, number: int, capture: Capture, arenas: Iterable[Arena]) -> None:
        """Hand a capture over."""
        self.post(messages.Close(number, self.give(arenas), verified.known(), capture))

    def forget(self, job: Listener) -> None:
        """There is nothing more to be heard of a job."""
        with self._lock:
            self._jobs.pop(job.number, None)

    def end(self) -> None:
        """Let it finish what was captured; return when it has ended and all was reported."""
        self._leaving = True
        self.post(messages.Leave())
        self._thread.join()
        with self._lock:
            jobs = list(self._jobs.values())
        for job in jobs:
            job.join()

    def abandon(self) -> None:
        """End it, when there is nothing that it could finish."""
        self._leaving = True
        self._process.kill()
        self._thread.join()

    # -- the connection's thread -------------------------------------------------------------

    def _receive(self) -> None:
        silent = 0.0
        why: BaseException | None = None
        try:
            while True:
                before = monotonic()
                readable, ended = self._inbox.wait(BEAT_SECONDS)
                if readable:
                    received = self._inbox.read()
                    if received is None:
                        break
                    silent = 0.0
                    for message in received:
                        self._hear(message)
                    continue
                if ended or self._process.poll() is not None:
                    break
                # Not more than it was waited for: this process may have been stopped as well.
                silent += min(monotonic() - before, 2 * BEAT_SECONDS)
                if silent >= self._timeout:
                    self._killed_for = f"gave no sign of life for {self._timeout:g} s and was killed"
                    break
        except BaseException as error:  # noqa: BLE001 - nothing that is sent can be believed any more
            why = error
        self._finish(why)

    def _hear(self, message: Any) -> None:
        match message:
            case messages.Opened():
                self._opened.set()
            case messages.Refused():
                self.error = error_of(message.kind, message.text)
            case messages.Done():
                with self._lock:
                    answered = self._replies.pop(message.reply, None)
                if answered is not None:
                    answered.set()
            case messages.Log():
                _log.log(message.level, "%s", message.text)
            case messages.Beat():
                pass
            case _:
                if isinstance(message, messages.Publication):
                    self._on_published(message.published.seq, message.defect)
                with self._lock:
                    job = self._jobs.get(message.job)
                if job is not None:
                    job.hear(message)

    def _finish(self, why: BaseException | None) -> None:
        """It has ended, or must: nobody waits for it any more."""
        code = self._end_of_process(at_once=why is not None or self._killed_for is not None)
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._outbox.close()
        with self._lock:
            if self.error is None:
                self.error = WorkerError(f"the worker process {self._words(code, why)}")
            jobs = list(self._jobs.values())
            replies, self._replies = list(self._replies.values()), {}
        if not jobs and not self._leaving and self._opened.is_set():
            _log.warning("%s; the next save starts another one", self.error)
        self._opened.set()
        for answered in replies:
            answered.set()
        for job in jobs:
            job.failed(self.error)
        _living.discard(self)
        self._sock.close()
        self._inbox.close()

    def _end_of_process(self, *, at_once: bool) -> int | None:
        """Return its status; ``None`` if it doesn't even end when it is killed."""
        if not at_once:
            try:
                return self._process.wait(self._timeout)
            except subprocess.TimeoutExpired:
                self._killed_for = f"had no more to say, did not end for {self._timeout:g} s and was killed"
        self._process.kill()
        try:
            return self._process.wait(_LAST_MOMENTS)
        except subprocess.TimeoutExpired:
            return None

    def _words(self, code: int | None, why: BaseException | None) -> str:
        if why is not None:
            return f"said what can't be understood, and was killed: {why}"
        if self._killed_for:
            return self._killed_for + (", which has not ended it yet" if code is None else "")
        if code is None:
            return "does not end, although it was killed"
        if code == 0:
            return "ended, as if it had been told to leave"
        if code > 0:
            return f"ended with status {code}; standard error has its last words"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = "unknown"
        hint = "; out of memory?" if -code == signal.SIGKILL else ""
        return f"was killed by signal {-code} ({name}){hint}"

    def _unsendable(self, error: BaseException) -> None:
        if not isinstance(error, OSError):
            _log.error("a message to the worker process can't be sent", exc_info=error)
            self._killed_for = f"was killed, since it can't be told what to do: {error}"
            self._process.kill()

    def let_go(self) -> None:
        """In a forked child: keep nothing of the connection open, and never look after the process."""
        self._process.returncode = 0
        with suppress(OSError):
            os.close(self._sock.detach())
        with suppress(OSError):
            self._inbox.close()


def error_of(kind: str, text: str) -> GockptError:
    """Return an error of the worker's as this process would have made it."""
    found: type[GockptError] = getattr(errors, kind) if kind in errors.__all__ else WorkerError
    return found(text)


def _spawn() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start a worker; return this end of the connection to it.

    Not by ``multiprocessing``, which would import the user's program again, nor by ``fork``, which would
    copy a process with threads in it.
    """
    ours, theirs = (_above_standard(end) for end in socket.socketpair())
    paths = [os.path.abspath(path) for path in sys.path]  # noqa: PTH100 - links stay as they are
    with theirs:
        argument = json.dumps([theirs.fileno(), os.getpid(), paths])
        # The mask is inherited, and stays: the worker ends when its trainer does, not before.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_TRAINER)
        try:
            process = subprocess.Popen(  # noqa: S603 - this very Python, on our own module
                [sys.executable, "-P", "-c", BOOT, argument],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None if _is_open(2) else subprocess.DEVNULL,
                cwd="/",
            )
        except (OSError, MemoryError, ValueError) as error:
            ours.close()
            msg = f"the worker process can't be started: {error}"
            raise WorkerError(msg) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return ours, process


_living: weakref.WeakSet[WorkerProcess] = weakref.WeakSet()


@cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_let_go)


def _let_go() -> None:
    for worker in list(_living):
        worker.let_go()
    _living.clear()


def _above_standard(end: socket.socket) -> socket.socket:
    """Return a socket at a descriptor that is none of standard input, output and error."""
    if end.fileno() > 2:
        return end
    with end:
        return socket.socket(fileno=fcntl.fcntl(end.fileno(), fcntl.F_DUPFD_CLOEXEC, 3))


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
