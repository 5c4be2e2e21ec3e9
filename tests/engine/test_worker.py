"""The worker process's end of its socket."""

from __future__ import annotations

import os
import socket

import pytest

from gockpt.engine import notices, wire
from gockpt.engine.worker import Worker


@pytest.mark.parametrize("heard", [True, False])
def test_what_a_trainer_sent_is_taken_whatever_it_had_heard(heard):
    """A socket that is closed with something unread in it ends the other's stream by an error."""
    trainer, sock = socket.socketpair()
    with sock:
        worker = Worker(sock, os.getppid())
        if not heard:
            sock.send(b"news")
        trainer.sendall(wire.encode(notices.Leave()))
        trainer.close()
        assert worker._read() == [notices.Leave()]
        assert worker._read() is None
        worker._outbox.close()
