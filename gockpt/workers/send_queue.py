"""Sends messages from a thread of its own: nobody who has something to tell waits for the other side."""

from __future__ import annotations

import array
import socket
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from gockpt.workers.channel import frame

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gockpt.staging.arena import Arena

__all__ = ["BEAT_SECONDS", "Outbox"]

BEAT_SECONDS = 0.5
"""How often a worker shows that it lives."""


class Outbox:
    """The sending half of one end of a connection."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        gather: Callable[[], Iterable[Any]] = lambda: (),
        idle: Any = None,
        broken: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        """Start the thread.

        Args:
            sock: Where to.
            gather: Returns what goes before what was posted: small things that came together meanwhile.
            idle: Sent whenever nothing else was for :data:`BEAT_SECONDS`; ``None`` for nothing.
            broken: Called once if a message can't be sent; the other side finds the stream at its end.
        """
        self._sock = sock
        self._gather = gather
        self._idle = idle
        self._broken = broken
        self._changed = threading.Condition()
        self._queue: deque[tuple[Any, Arena | None]] = deque()
        self._poked = False
        self._closed = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="gockpt-outbox", daemon=True)
        self._thread.start()

    def post(self, message: Any, arena: Arena | None = None) -> None:
        """Send a message soon, with the descriptor of ``arena`` if there is one."""
        with self._changed:
            if not self._ended:
                self._queue.append((message, arena))
                self._changed.notify()

    def poke(self) -> None:
        """There is something to gather."""
        with self._changed:
            self._poked = True
            self._changed.notify()

    def close(self, timeout: float | None = None) -> None:
        """Send what was posted, for ``timeout`` seconds at most, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    ready = self._changed.wait_for(
                        lambda: self._queue or self._poked or self._closed,
                        None if self._idle is None else BEAT_SECONDS,
                    )
                    posted = list(self._queue)
                    self._poked = False
                    closed = self._closed
                if ready:
                    self._send(posted)
                else:
                    self._sock.sendall(frame(self._idle), socket.MSG_NOSIGNAL)
                with self._changed:
                    for _ in posted:
                        self._queue.popleft()
                    if closed and not self._queue:
                        return
        except BaseException as error:  # noqa: BLE001 - the other side is gone, or can't be told
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
            self._broken(error)
        finally:
            with self._changed:
                self._ended = True
                self._queue.clear()

    def _send(self, posted: Iterable[tuple[Any, Arena | None]]) -> None:
        data = bytearray()
        for message in self._gather():
            data += frame(message)
        for message, arena in posted:
            framed = frame(message)
            if arena is None:
                data += framed
                continue
            self._sock.sendall(data, socket.MSG_NOSIGNAL)
            data.clear()
            # Not by `send_fds`, which drops the flags it is given: this process may be one that SIGPIPE ends.
            descriptor = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [arena.fd]))
            sent = self._sock.sendmsg([framed], [descriptor], socket.MSG_NOSIGNAL)
            data += framed[sent:]
        self._sock.sendall(data, socket.MSG_NOSIGNAL)
