"""A real S3 server for the tests (moto's, in this process), checkpoints to put there, and faults."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import obstore
import pytest
import torch
from moto.server import ThreadedMotoServer
from obstore.store import S3Store

import gockpt
import gockpt.core.arena_layout
from gockpt.storage.object_store.client import Objects, objects_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KEYS = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLEKEY", "AWS_SECRET_ACCESS_KEY": "very-secret-text"}
FAST = {
    "max_retries": 1,
    "retry_timeout": timedelta(seconds=5),
    "backoff": {"init_backoff": timedelta(milliseconds=1)},
}


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """Where the S3 server answers."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def s3(endpoint):
    """A client of another make, to look at what is really there and to damage it."""
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )


@pytest.fixture
def bucket(endpoint, s3, monkeypatch) -> str:
    """A new, empty bucket, and an environment that leads to it."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT", endpoint)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    name = f"test-{secrets.token_hex(8)}"
    s3.create_bucket(Bucket=name)
    return name


@pytest.fixture
def url(bucket) -> str:
    """Where to upload to."""
    return f"s3://{bucket}/runs/one"


@pytest.fixture
def quick(endpoint) -> Callable[..., S3Store]:
    """A store that gives up after one try more, with any setting changed."""

    def make(bucket: str, **changes) -> S3Store:
        settings = {
            "prefix": "runs/one",
            "endpoint": endpoint,
            "region": "us-east-1",
            "access_key_id": KEYS["AWS_ACCESS_KEY_ID"],
            "secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"],
            "client_options": {"allow_http": True},
            "retry_config": FAST,
        }
        return S3Store(bucket, **(settings | changes))

    return make


@pytest.fixture(params=["file", "directory"])
def layout(request, monkeypatch) -> str:
    """Let saves make checkpoints of one form by default; tests run with each."""
    monkeypatch.setitem(gockpt.Options.__init__.__kwdefaults__, "layout", request.param)
    return request.param


@pytest.fixture
def suffix(layout) -> str:
    """End of the names of checkpoints of that form."""
    return ".zip" if layout == "file" else ""


@pytest.fixture
def small_chunks(monkeypatch):
    """Arrays above 10 kB have several chunks."""
    monkeypatch.setattr(gockpt.core.arena_layout, "WHOLE_LIMIT", 10_000)
    monkeypatch.setattr(gockpt.core.arena_layout, "CHUNK_TARGET", 9_000)


REPOSITORY = Path(__file__).resolve().parent.parent.parent

KILLED = """
import os, signal, sys, torch, gockpt
from gockpt.storage.object_store.client import Objects
left = [{nth}]
def counted(write):
    def call(self, *given, **more):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, *given, **more)
    return call
Objects.put, Objects.create = counted(Objects.put), counted(Objects.create)
"""


def run_process(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, to its end."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


@pytest.fixture
def process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script with arguments in another process."""
    return run_process


@pytest.fixture
def killed() -> Callable[..., None]:
    """Run a script that is killed at the ``nth`` object it writes."""

    def do(script: str, *arguments: object, nth: int) -> None:
        done = run_process(KILLED.format(nth=nth) + script, *arguments)
        assert done.returncode == -signal.SIGKILL, done.stderr

    return do


def tensors(marker: int = 0) -> dict[str, torch.Tensor]:
    """Return a small state: several chunks of one array, a padded last one, one without elements."""
    generator = torch.Generator().manual_seed(marker)
    return {
        "tall": torch.randn(100, 64, generator=generator),
        "w": torch.randn(5, 3, generator=generator).bfloat16(),
        "scale": torch.full((), float(marker)),
        "none": torch.empty(0, 4),
    }


@pytest.fixture
def save(small_chunks) -> Callable[..., dict[str, torch.Tensor]]:
    """Save a small state as one step, and return it."""

    def do(
        path: Path, step: int, marker: int | None = None, **state: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        held = state or tensors(step if marker is None else marker)
        with gockpt.Checkpointer(held, None, path) as saver:
            saver.after_step(step)
        return held

    return do


class Watched(Objects):
    """A store that counts, and fails or waits where a test says so.

    Attributes:
        calls: How often each kind of call was made.
        read_bytes: Bytes asked for by :meth:`read`.
        before: Called first in each call, with its kind and path; may raise.
    """

    def __init__(self, objects: Objects) -> None:
        super().__init__(objects._store, objects.url)
        self.calls: Counter[str] = Counter()
        self.written: list[str] = []
        self.read_bytes = 0
        self.before: Callable[[str, str], None] = lambda kind, path: None
        self._mutex = threading.Lock()

    def _count(self, kind: str, path: str) -> None:
        with self._mutex:
            self.calls[kind] += 1
        self.before(kind, path)

    def stat(self, path):
        self._count("stat", path)
        return super().stat(path)

    def read(self, path, start, nbytes):
        self._count("read", path)
        with self._mutex:
            self.read_bytes += nbytes
        return super().read(path, start, nbytes)

    def put(self, path, data, **more):
        self._count("put", path)
        super().put(path, data, **more)
        with self._mutex:
            self.written.append(path)

    def create(self, path, data):
        self._count("create", path)
        super().create(path, data)
        with self._mutex:
            self.written.append(path)

    def children(self, path=""):
        self._count("children", path)
        return super().children(path)

    def tree(self, path):
        self._count("tree", path)
        return super().tree(path)


@pytest.fixture
def watched() -> Callable[..., Watched]:
    """Watch a store, or an empty one in memory."""

    def do(store=None) -> Watched:
        if store is None:
            return Watched(Objects(obstore.store.MemoryStore(), "memory://test"))
        return Watched(objects_at(store))

    return do
