"""Every call that takes a path takes the same ones: with ``~`` expanded, and none that is no path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from obstore.store import MemoryStore

import gockpt


def save(path):
    gockpt.save_overlapped(torch.nn.Linear(2, 2), None, path, step=1).result()


def save_by_object(path):
    gockpt.Checkpointer(torch.nn.Linear(2, 2), None, path)


READERS = {
    "load": lambda path: gockpt.load(path, torch.nn.Linear(2, 2)),
    "load previous": lambda path: gockpt.load(path, torch.nn.Linear(2, 2), on_damage="previous"),
    "open": lambda path: gockpt.open(path).close(),
    "steps": lambda path: gockpt.steps(path)[0],
    "latest": lambda path: gockpt.latest(path) + 0,
    "checkpoints": lambda path: gockpt.checkpoints(path)[0],
    "verify": gockpt.verify,
    "diff": lambda path: gockpt.diff(path, path),
    "prune": lambda path: gockpt.prune(path, 1),
    "upload": lambda path: gockpt.upload(path, (Path.cwd() / "bucket").as_uri()),
}
WRITERS = {"save_overlapped": save, "Checkpointer": save_by_object}


def test_a_home_is_expanded_wherever_a_path_is_taken(monkeypatch):
    home = Path.cwd() / "home"
    monkeypatch.setenv("HOME", str(home))
    save("~/ckpts")
    save_by_object(Path("~/other"))
    assert sorted(os.listdir(home)) == ["ckpts", "other"]
    for call in READERS.values():
        call("~/ckpts")
        call(Path("~/ckpts"))
    assert "~" not in os.listdir()
    done = subprocess.run(
        [sys.executable, "-m", "gockpt.cli", "ls", "~/ckpts"], capture_output=True, check=False, text=True
    )
    assert (done.returncode, "step" in done.stdout) == (0, True), done.stderr


@pytest.mark.parametrize("path", ["", b"x", None, 3, "a\0b", "~no-such-user/x"], ids=repr)
@pytest.mark.parametrize("name", [*READERS, *WRITERS])
def test_what_is_no_path_is_refused_by_every_call(name, path):
    with pytest.raises(gockpt.UsageError, match="path="):
        {**READERS, **WRITERS}[name](path)
    assert os.listdir() in ([], ["bucket"])


@pytest.mark.parametrize("path", ["s3://bucket/run", Path("s3://bucket/run"), "file:///tmp/x", "hdfs://a/b"])
@pytest.mark.parametrize("name", WRITERS)
def test_no_writer_takes_a_url(name, path):
    with pytest.raises(gockpt.UsageError, match=r"Options\(remote="):
        WRITERS[name](path)
    assert os.listdir() == []


@pytest.mark.parametrize("name", WRITERS)
def test_no_writer_takes_an_object_store(name):
    with pytest.raises(gockpt.UsageError, match=r"is an object store.*Options\(remote="):
        WRITERS[name](MemoryStore())
    assert os.listdir() == []
