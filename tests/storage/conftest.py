"""For the tests of the write side: a small state to save, a checker of its own, and a file system that
can be made to fail.

The checker shares no code with the package but the checksum's name: it reads the manifest as plain JSON
and compares every byte, so that writer and reader can't agree on a mistake.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import re
import struct
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from awscrt.checksums import crc32c

from gockpt.core.arena_layout import ArrayLayout
from gockpt.core.array_spec import ArraySpec
from gockpt.storage.format.chunk_grid import chunked_layout
from gockpt.storage.local.filesystem import CALLS, Filesystem
from gockpt.storage.local.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from gockpt.storage.local.transaction import Published, Transaction

Tree = dict[str, bytes | None]
"""Relative path to content; ``None`` for a directory."""

BLOCK = 1 << 20
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float64": 8, "uint8": 1, "bool": 1, "int64": 8}

# One chunk through direct I/O; a last chunk whose checksum lies far behind its rows; one whose checksum
# fits its slot; a 0-d, an empty and a nested array.
SAMPLE = (
    (("model", "big"), (70000,), "float32", 70000),
    (("model", "tall"), (2100,), "float32", 2048),
    (("model", "w"), (5, 3), "bfloat16", 4),
    (("model", "scale"), (), "float64", 1),
    (("model", "none"), (0, 4), "float32", 1),
    (("optimizer", "w", "exp_avg"), (5, 3), "float32", 5),
)
SMALL = SAMPLE[1:]


@dataclass(frozen=True)
class Sample:
    """Arrays laid out in one arena, filled from a marker so that each save has other bytes."""

    layouts: tuple[ArrayLayout, ...]
    nbytes: int

    def arena(self, marker: int) -> np.ndarray:
        """Return page-aligned memory with the marker's bytes, and rubbish in every slot's slack."""
        data = np.frombuffer(mmap.mmap(-1, max(4096, self.nbytes)), np.uint8)
        data[:] = 0xAA
        for layout in self.layouts:
            content = self.content(layout, marker)
            at = 0
            for slot in layout.slots:
                data[slot.offset : slot.offset + slot.nbytes] = content[at : at + slot.nbytes]
                at += slot.nbytes
        return data

    def content(self, layout: ArrayLayout, marker: int) -> np.ndarray:
        """Return all bytes of an array."""
        seed = (marker, *"/".join(layout.spec.name).encode())
        data = np.random.default_rng(seed).integers(0, 256, layout.spec.nbytes, np.uint8)
        return data & 1 if layout.spec.dtype == "bool" else data

    def write(self, transaction: Transaction, marker: int) -> None:
        """Write every chunk."""
        arena = self.arena(marker)
        for layout in self.layouts:
            for slot in layout.slots:
                transaction.write_chunk(layout, slot, arena[slot.offset : slot.offset + slot.capacity].data)

    def begin(self, store: Store, step: int, marker: int = 1) -> Transaction:
        """Begin a checkpoint, with the marker in the state document."""
        return store.begin(
            step, self.layouts, state={"marker": marker}, attributes={"title": "sample"}, exact=True
        )

    def save(self, store: Store, step: int, marker: int) -> Published:
        """Begin, write and commit one checkpoint; abort it if that fails."""
        with self.begin(store, step, marker) as transaction:
            self.write(transaction, marker)
            return transaction.commit()


def make_sample(arrays: Iterable[tuple[tuple[str, ...], tuple[int, ...], str, int]]) -> Sample:
    """Lay out arrays given as (name, shape, dtype, rows of a chunk)."""
    layouts, base = [], 0
    for name, shape, dtype, rows in arrays:
        chunk = (rows, *(max(1, n) for n in shape[1:])) if shape else ()
        layout = chunked_layout(ArraySpec(name, shape, dtype), chunk)
        slots = tuple(replace(slot, offset=slot.offset + base) for slot in layout.slots)
        base += sum(slot.capacity for slot in slots)
        layouts.append(ArrayLayout(layout.spec, chunk, slots))
    return Sample(tuple(layouts), base)


# -- the checker ----------------------------------------------------------------------------------


def read_tree(path: str | os.PathLike[str]) -> Tree:
    """Return everything below a directory; links are shown by what they say."""
    tree: Tree = {}
    for parent, directories, names in os.walk(path):
        for name in [*directories, *names]:
            full = os.path.join(parent, name)
            inside = os.path.relpath(full, path)
            if os.path.islink(full):
                tree[inside] = f"link to {os.readlink(full)}".encode()
            elif os.path.isdir(full):
                tree[inside] = None
            else:
                with open(full, "rb") as file:
                    tree[inside] = file.read()
    return tree


def below(tree: Tree, name: str) -> Tree:
    """Return the part of a tree below one of its directories."""
    return {path[len(name) + 1 :]: data for path, data in tree.items() if path.startswith(f"{name}/")}


def unpacked(data: bytes) -> tuple[Tree, list[str]]:
    """Return the files in an archive as a tree, and what is wrong with the archive itself."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        bad = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        return {}, [f"no archive: {error}"]
    if bad is not None:
        return {}, [f"{bad} has another CRC-32"]
    names = archive.namelist()
    tree: Tree = {name: archive.read(name) for name in names}
    found = [] if len(set(names)) == len(names) else ["a name occurs twice"]
    for name in names:
        parts = name.split("/")
        tree.update(dict.fromkeys(("/".join(parts[:n]) for n in range(1, len(parts))), None))
    if names[-1:] != ["gockpt.json"]:
        found.append("the manifest is not the last entry")
        return tree, found
    at = 0
    for entry in archive.infolist():
        length, extra = struct.unpack_from("<HH", data, entry.header_offset + 26)
        if entry.header_offset != at or entry.compress_type:
            found.append(f"{entry.filename} doesn't begin where the entry before it ends")
        at = entry.header_offset + 30 + length + extra + entry.file_size
    if at != archive.start_dir:
        found.append("there is something before the central directory")
    for array in json.loads(tree["gockpt.json"].split(b"\n")[0])["arrays"]:
        for number, offset in enumerate(array["at"]):
            content = tree[f"{array['path']}/{_key_of(array, number)}"]
            if data[offset : offset + len(content)] != content:
                found.append(f"chunk {number} of {array['path']} is not where the manifest says")
    return tree, found


def _key_of(array: dict[str, Any], number: int) -> str:
    return ".".join(["c", str(number), *("0" * (len(array["shape"]) - 1))]) if array["shape"] else "c"


def problems(tree: Tree) -> list[str]:
    """Return everything that is wrong with one checkpoint, given as a tree."""
    data = tree.get("gockpt.json")
    if data is None:
        return ["no manifest"]
    lines = data.splitlines(keepends=True)
    if len(lines) != 2 or json.loads(lines[1]) != {"crc32c": f"{crc32c(lines[0]):08x}"}:
        return ["bad manifest"]
    document = json.loads(lines[0])
    found, expected, blocks = [], {"gockpt.json"}, bytearray()

    def compare(path: str, size: int, crc: str | None) -> bytes:
        expected.add(path)
        content = tree.get(path)
        if content is None:
            found.append(f"{path} is missing")
        elif len(content) != size:
            found.append(f"{path} has {len(content)} bytes instead of {size}")
        elif crc is not None and f"{crc32c(content):08x}" != crc:
            found.append(f"{path} has another checksum")
        return content or b""

    for entry in document["files"]:
        compare(entry["path"], entry["size"], entry["crc32c"])
    for array in document["arrays"]:
        compare(f"{array['path']}/zarr.json", array["meta"]["size"], array["meta"]["crc32c"])
        size = ITEMSIZES[array["dtype"]]
        chunk = math.prod(array["chunk"]) * size
        left = math.prod(array["shape"]) * size
        for number in range(-(-left // chunk)):
            key = _key_of(array, number)
            content = compare(f"{array['path']}/{key}", chunk + 4, None)
            if content[-4:] != crc32c(content[:-4]).to_bytes(4, "little"):
                found.append(f"{array['path']}/{key} has another checksum")
            real = content[: min(chunk, left)]
            if any(content[len(real) : -4]):
                found.append(f"{array['path']}/{key} is padded with something")
            for at in range(0, len(real), BLOCK):
                blocks += crc32c(real[at : at + BLOCK]).to_bytes(4, "little")
            left -= len(real)
    if tree.get("blocks.crc32c") != bytes(blocks):
        found.append("the block checksums differ")
    files = {path for path, content in tree.items() if content is not None}
    found += [f"{path} is not in the manifest" for path in sorted(files - expected)]
    folders = {os.path.dirname(path) for path in expected}
    folders |= {
        "/".join(folder.split("/")[:n]) for folder in folders for n in range(1, folder.count("/") + 1)
    }
    directories = {path for path, content in tree.items() if content is None}
    found += [f"the directory {path} is not needed" for path in sorted(directories - folders)]
    return found


@dataclass(frozen=True)
class Seen:
    """A checkpoint under a public name: what it says, and what is wrong with it."""

    name: str
    seq: int
    marker: int
    problems: tuple[str, ...]


def examine(tree: Tree) -> list[Seen]:
    """Return every checkpoint that a reader would see in a path, oldest publication first."""
    seen = []
    for name in tree:
        if re.fullmatch(r"step-[0-9]{10}(\.zip|\.old-[0-9a-f]+)?", name):
            data = tree[name]
            checkpoint, wrong = (below(tree, name), []) if data is None else unpacked(data)
            wrong = tuple(wrong or problems(checkpoint))
            if wrong:
                seen.append(Seen(name, -1, -1, wrong))
            else:
                document = json.loads(checkpoint["gockpt.json"].split(b"\n")[0])
                seen.append(Seen(name, document["seq"], json.loads(checkpoint["state.json"])["marker"], ()))
    return sorted(seen, key=lambda one: one.seq)


# -- faults ---------------------------------------------------------------------------------------


class NoWait(Filesystem):
    """Never waits for the disk: what a process did is seen by the next one, synced or not."""

    def fsync(self, fd: int) -> None:
        os.fstat(fd)

    def syncfs(self, fd: int) -> None:
        os.fstat(fd)


class Interposer(NoWait):
    """Every call goes through :meth:`around`, which by default carries it out."""

    def around(
        self, name: str, call: Callable[[], Any], arguments: tuple[Any, ...], dir_fd: int | None
    ) -> Any:
        return call()


def _interpose(name: str) -> Callable[..., Any]:
    real = getattr(NoWait, name)

    def method(self: Interposer, *arguments: Any, **keywords: Any) -> Any:
        return self.around(
            name, lambda: real(self, *arguments, **keywords), arguments, keywords.get("dir_fd")
        )

    return method


for _name in CALLS:
    setattr(Interposer, _name, _interpose(_name))


class Recorder(Interposer):
    """Writes down the name of each call, and its first argument, and carries it out."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def around(self, name, call, arguments, dir_fd):
        self.calls.append((name, arguments[0]))
        return call()

    @property
    def names(self) -> list[str]:
        """The names alone."""
        return [name for name, _ in self.calls]


class FailingAt(Interposer):
    """Call number ``at`` (from 0) of those named fails; once only, like a device that reports once."""

    def __init__(self, at: int, code: int, *, only: str | None = None, times: int = 1) -> None:
        self.at, self.code, self.only, self.times = at, code, only, times
        self.count = 0
        self.hit: str | None = None

    def around(self, name, call, arguments, dir_fd):
        if self.only in (None, name):
            self.count += 1
            if self.at < self.count <= self.at + self.times:
                self.hit = name
                if name == "close":  # the descriptor is gone, whatever close reports
                    call()
                raise OSError(self.code, os.strerror(self.code))
        return call()


class Killed(BaseException):
    """The process is gone: nothing after this has an effect."""


class KilledAt(Interposer):
    """The process ends right before, or right after, call number ``at``."""

    def __init__(self, at: int, *, after: bool) -> None:
        self.at, self.after = at, after
        self.count = 0
        self.dead = False
        self.held: set[int] = set()

    def bury(self, store: Store | None) -> None:
        """Do what the kernel does for a process that is gone: end its lock, close what it had open."""
        if store is not None:
            store._place.lock.release()
        while self.held:
            os.close(self.held.pop())

    def around(self, name, call, arguments, dir_fd):
        if self.dead:
            if name == "close":  # the kernel does it for the dead
                self.held.discard(arguments[0])
                return call()
            raise Killed
        self.dead = self.count == self.at
        self.count += 1
        if self.dead and not self.after:
            raise Killed
        if name == "close":
            self.held.discard(arguments[0])
        result = call()
        if self.dead:
            if name == "open":
                os.close(result)
            raise Killed
        if name == "open":
            self.held.add(result)
        return result


@pytest.fixture
def scratch(tmp_path) -> Iterator[Path]:
    """Return an empty directory in memory, where there is one: for tests that make thousands of files."""
    if os.path.isdir("/dev/shm") and os.access("/dev/shm", os.W_OK):
        with tempfile.TemporaryDirectory(prefix="gockpt-test-", dir="/dev/shm") as directory:
            yield Path(directory)
    else:
        yield tmp_path


@pytest.fixture(params=["directory", "file"])
def layout(request, monkeypatch) -> str:
    """Let every store write checkpoints of one layout, and then of the other."""
    monkeypatch.setitem(Store.__init__.__kwdefaults__, "layout", request.param)
    return request.param


@pytest.fixture(scope="session")
def sample() -> Sample:
    return make_sample(SAMPLE)


@pytest.fixture(scope="session")
def small_sample() -> Sample:
    return make_sample(SMALL)


@pytest.fixture(scope="session")
def sampling() -> SimpleNamespace:
    """Make samples of other arrays."""
    return SimpleNamespace(make=make_sample, Sample=Sample)


@pytest.fixture(scope="session")
def checker() -> SimpleNamespace:
    """Look at what is on the disk without the package."""
    return SimpleNamespace(read=read_tree, examine=examine, problems=problems, below=below)


@pytest.fixture(scope="session")
def faults() -> SimpleNamespace:
    """File systems that fail."""
    return SimpleNamespace(
        NoWait=NoWait,
        Interposer=Interposer,
        Recorder=Recorder,
        FailingAt=FailingAt,
        Killed=Killed,
        KilledAt=KilledAt,
    )
