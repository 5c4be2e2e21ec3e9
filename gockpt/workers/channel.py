"""Receiving half of the connection between trainer and worker process.

A frame is eight bytes of length, big-endian, and a message in as many bytes.

``multiprocessing.connection`` has such frames as well, but not what is needed around them: the memory of
arenas travels beside messages (``SCM_RIGHTS``), which its reads would drop; a peer that hangs, or is gone
while its children hold the socket, may leave half a message behind, for the rest of which its reads would
wait for ever; and its writes raise SIGPIPE in a program that has that signal end it.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections import deque
from typing import Any

from gockpt.errors import WorkerError
from gockpt.workers.messages import decode, encode

__all__ = ["Frames", "Inbox", "frame"]

_LENGTH = struct.Struct(">Q")
_MOST = 1 << 32
"""No message is that large; a length beyond it means that the stream is broken."""


def frame(message: Any) -> bytes:
    """Return a message's frame; raises as :func:`gockpt.workers.messages.encode` does."""
    data = encode(message)
    return _LENGTH.pack(len(data)) + data


class Frames:
    """Frames that have arrived, whole or in part."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """Return the messages that ``data`` completes.

        Raises:
            WorkerError: If it is no stream of messages.
        """
        self._buffer += data
        found = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > _MOST:
                msg = f"the stream between trainer and worker is broken: a message of {length} bytes"
                raise WorkerError(msg)
            begin, end = start + _LENGTH.size, start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            found.append(decode(bytes(self._buffer[begin:end])))
            start = end
        del self._buffer[:start]
        return found


class Inbox:
    """Messages from a process, and whether it has ended: its children may hold its end of the socket.

    Attributes:
        descriptors: Those that came with messages, oldest first.
    """

    def __init__(self, sock: socket.socket, pid: int, *, descriptors: int = 0) -> None:
        """Read from ``sock``; at most so many ``descriptors`` may come at once."""
        self._most = descriptors
        self.descriptors: deque[int] = deque()
        self._sock = sock
        self._frames = Frames()
        self._poller = select.poll()  # not `select`, which takes no descriptor from 1024 up
        self._poller.register(sock, select.POLLIN)
        try:
            self._pidfd = os.pidfd_open(pid)
        except (OSError, AttributeError):  # an older kernel: the owner looks with every beat
            self._pidfd = -1
        else:
            self._poller.register(self._pidfd, select.POLLIN)

    def wait(self, seconds: float) -> tuple[bool, bool]:
        """Wait until something can be read or the process has ended; return which of the two it is."""
        ready = dict(self._poller.poll(1000 * seconds))
        return self._sock.fileno() in ready, self._pidfd in ready

    def read(self) -> list[Any] | None:
        """Wait for data and return the messages it completes; ``None`` at the end of the stream.

        Raises:
            WorkerError: If it is no stream of messages, or a descriptor was lost.
        """
        try:
            data, descriptors, flags, _ = socket.recv_fds(self._sock, 1 << 18, self._most)
        except ConnectionError:
            # So ends the stream of a process that had not read all it was told. All it sent came before this.
            return None
        self.descriptors.extend(descriptors)
        if flags & socket.MSG_CTRUNC:
            # Which of several arenas came without its memory can't be told: none may be taken for another.
            msg = "memory could not be taken over: the process has too many open files (ulimit -n)"
            raise WorkerError(msg)
        return self._frames.feed(data) if data else None

    def close(self) -> None:
        """Look after the process no more. The socket is the owner's to close."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
