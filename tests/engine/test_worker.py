"""The worker process's end of its socket: what was captured is published, whatever comes after it."""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys

import pytest

import gockpt
from gockpt.core.arena_layout import lay_out
from gockpt.core.array_spec import ArraySpec
from gockpt.core.descriptors import ArenaId, ArrayPlace, Capture
from gockpt.core.runs import Run
from gockpt.errors import WorkerError
from gockpt.staging.arena import Arena
from gockpt.storage.local.store import Follow
from gockpt.workers import channel, messages
from gockpt.workers.worker_main import Worker


@pytest.mark.parametrize("heard", [True, False])
def test_what_a_trainer_sent_is_taken_whatever_it_had_heard(heard):
    """A socket that is closed with something unread in it ends the other's stream by an error."""
    trainer, sock = socket.socketpair()
    with sock:
        worker = Worker(sock, os.getppid())
        if not heard:
            sock.send(b"news")
        trainer.sendall(channel.frame(messages.Leave()))
        trainer.close()
        assert worker._inbox.read() == [messages.Leave()]
        assert worker._inbox.read() is None
        worker._outbox.close()
        worker._inbox.close()


def test_descriptors_that_the_system_dropped_are_noticed(monkeypatch):
    """At the limit of open files it drops some, and says so: which, can't be told."""
    trainer, sock = socket.socketpair()
    with sock, trainer:
        worker = Worker(sock, os.getppid())
        recv_fds = socket.recv_fds

        def dropping(*arguments):
            data, descriptors, flags, address = recv_fds(*arguments)
            return data, descriptors, flags | socket.MSG_CTRUNC, address

        monkeypatch.setattr(socket, "recv_fds", dropping)
        trainer.sendall(channel.frame(messages.Leave()))
        with pytest.raises(WorkerError, match="too many open files"):
            worker._inbox.read()
        worker._outbox.close()
        worker._inbox.close()


# A worker that begins no checkpoint before the file "go" is there.
PROGRAM = """
import os, sys, time
from gockpt.workers.worker_main import run
from gockpt.storage.local.store import Store
begin = Store.begin
def held(*arguments, **more):
    while not os.path.exists("go"):
        time.sleep(0.01)
    return begin(*arguments, **more)
Store.begin = held
os._exit(run(int(sys.argv[1]), os.getppid()))
"""


class Trainer:
    """Talks to a worker process as the engine does."""

    def __init__(self, path):
        self.sock, other = socket.socketpair()
        with other:
            command = [sys.executable, "-c", PROGRAM, str(other.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[other.fileno()], stderr=subprocess.PIPE)
        self._frames = channel.Frames()
        follow = Follow(Run("ab" * 16), None, here=False)
        self.send(messages.Open(os.fsencode(path), follow, None, {"cpu_threads": 1}, 2))
        self.hear(messages.Opened)

    def send(self, message, fd=None):
        frame = channel.frame(message)
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        assert self.sock.sendmsg([frame], rights) == len(frame)

    def hear(self, kind):
        while True:
            data = self.sock.recv(1 << 16)
            assert data, "the worker has ended"
            if any(isinstance(message, kind) for message in self._frames.feed(data)):
                return


def garbage(trainer, arena):
    trainer.sock.sendall(b"\xff" * 16)


def memory_without_a_descriptor(trainer, arena):
    trainer.send(messages.GiveArena(2, arena.nbytes, (1, 2)))


@pytest.mark.parametrize(
    ("then", "words"),
    [(garbage, "is broken: a message"), (memory_without_a_descriptor, "is broken: memory came without")],
    ids=["garbage", "descriptor"],
)
def test_what_was_captured_is_published_though_the_next_message_is_none(tmp_path, monkeypatch, then, words):
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(tmp_path / "path")
    layout = lay_out([ArraySpec(("model", f"w{i}"), (50,), "float32") for i in range(5)])
    arena = Arena(layout.nbytes, shared=True)
    trainer.send(messages.GiveArena(1, arena.nbytes, (1,)), arena.fd)
    trainer.send(messages.Begin(1, (1, 1), (), None))
    places = tuple(ArrayPlace(one, ArenaId.STATE) for one in layout.arrays)
    trainer.send(messages.Close(1, (1, 1, 1), (), Capture(7, places, {}, {"version": 1}, {}, exact=True)))
    trainer.hear(messages.Taken)
    then(trainer, arena)
    (tmp_path / "go").touch()
    said = trainer.process.stderr.read().decode()
    assert trainer.process.wait(60) == 1
    trainer.process.stderr.close()
    trainer.sock.close()
    assert words in said.splitlines()[-1]
    assert gockpt.steps(tmp_path / "path") == [7]
    assert not [name for name in os.listdir(tmp_path / "path") if "partial" in name]
