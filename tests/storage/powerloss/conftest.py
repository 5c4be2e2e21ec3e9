"""Real file systems on a disk that keeps a log, and what that disk may hold after the power went.

A FUSE server stands for the disk (``logging_disk.py``), a loop device lies on its one file, and a real file
system on that. From the log follows what a power loss at any point may leave: all that was written before
the last flush, and of the rest none, all, or any part, in pieces of 4 KiB.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER = 16
FLUSH = b"\xff" * HEADER
PIECE = 4096
MAKE = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-J", "size=4"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
MEBIBYTES = {"ext4": 48, "xfs": 320, "btrfs": 128}


def run(*command: str | os.PathLike[str]) -> str:
    """Run a command that must succeed; returns what it printed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


@contextlib.contextmanager
def mounted(image: Path, where: Path) -> Iterator[None]:
    """Mount the file system inside a file through a loop device."""
    where.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        device = run("losetup", "-f", "--show", image)
        stack.callback(run, "losetup", "-d", device)
        run("mount", device, where)
        stack.callback(run, "umount", where)
        yield


@contextlib.contextmanager
def served(image: Path, log: Path, where: Path) -> Iterator[Path]:
    """Serve a copy of an image as a file whose writes and flushes are logged."""
    where.mkdir()
    script = Path(__file__).with_name("logging_disk.py")
    server = subprocess.Popen([sys.executable, str(script), where, image, log])
    try:
        for _ in range(600):  # a mount can't be waited for, only looked at
            if (where / "disk").exists():
                break
            assert server.poll() is None, "the FUSE server ended: are mfusepy and libfuse installed?"
            time.sleep(0.05)
        yield where / "disk"
    finally:
        if os.path.ismount(where):
            run("umount", where)
        server.wait(60)


@dataclass(frozen=True)
class Event:
    """One write (``data``) or flush (``data`` is ``None``), and the log's length behind it."""

    offset: int
    data: bytes | None
    end: int


def read_log(path: Path) -> list[Event]:
    log, events, at = path.read_bytes(), [], 0
    while at < len(log):
        head = log[at : at + HEADER]
        at += HEADER
        if head == FLUSH:
            events.append(Event(0, None, at))
        else:
            offset, size = (int.from_bytes(head[k : k + 8], "little") for k in (0, 8))
            at += size
            events.append(Event(offset, log[at - size : at], at))
    return events


def states(base: Path, events: list[Event], start: int, cuts: int, seeds: int) -> Iterator[tuple[int, str]]:
    """Let ``base`` become each state in turn, from log position ``start`` on; yields position and kind.

    What is yielded is already in place; between two, the file is put back to what was flushed.
    """
    fd = os.open(base, os.O_RDWR)
    try:
        later = [number for number, event in enumerate(events) if event.end >= start]
        chosen = set(later[:: max(1, len(later) // cuts)]) | {later[-1]}
        unflushed: list[Event] = []
        for number, event in enumerate(events):
            if event.data is None:
                for write in unflushed:
                    os.pwrite(fd, write.data, write.offset)
                unflushed = []
            else:
                unflushed.append(event)
            if number not in chosen:
                continue
            before = [(write.offset, os.pread(fd, len(write.data), write.offset)) for write in unflushed]
            for kind in ("none", "all", *range(seeds)) if unflushed else ("none",):
                chance = random.Random(f"{number} {kind}")
                for write in unflushed if kind != "none" else ():
                    for at in range(0, len(write.data), PIECE):
                        if kind == "all" or chance.random() < 0.5:
                            os.pwrite(fd, write.data[at : at + PIECE], write.offset + at)
                yield event.end, str(kind)
                for offset, data in before:
                    os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


@pytest.fixture
def work() -> Iterator[Path]:
    """Return a directory in memory: the tests write the same images many times."""
    with tempfile.TemporaryDirectory(prefix="gockpt-powerloss-", dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture(params=list(MAKE))
def blank(request, work) -> Path:
    """Return an image with a new file system."""
    needed = [tool for tool in ("losetup", "mount", "umount") if not shutil.which(tool)]
    if os.geteuid() != 0 or needed or not os.path.exists("/dev/fuse"):
        pytest.fail(f"power loss is tried as root, with /dev/fuse and loop devices; missing: {needed}")
    make = MAKE[request.param]
    if not shutil.which(make[0]):
        pytest.skip(f"{make[0]} is not installed")
    image = work / "blank"
    with image.open("wb") as file:
        file.truncate(MEBIBYTES[request.param] << 20)
    run(*make, image)
    return image


@pytest.fixture(scope="session")
def disks() -> SimpleNamespace:
    return SimpleNamespace(mounted=mounted, served=served, read_log=read_log, states=states, run=run)
