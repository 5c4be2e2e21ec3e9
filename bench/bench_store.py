"""How fast a checkpoint becomes durable, against the disk itself and against others, in one run.

Every round writes the same state once in each way, in an order shuffled anew, until it survives a power
loss; ratios are medians of the rounds' ratios. Files of former rounds are emptied, and removed only at the
end: a file system that has just removed thousands of files creates new ones more slowly. Exits with 1 if a
bar is broken:

* at least 0.93 of one file written directly for state A, 0.90 for B, and 0.90 of fio with 8 MB blocks at
  queue depth 8 where fio is installed (else of eight threads that do the same);
* at least 1.8 x torch.save with fsync for state A, 1.4 x for state B;
* at least 1.3 x the best torch.distributed.checkpoint.save, 2.2 x zarr-python's LocalStore;
* no more CPU time than a checkpoint that is a directory takes;
* for state C at least 40 x a directory, for D 10 x; these two are compared with few ways only.

"gockpt" is the default, one file. Its store is opened once, as in training: what follows from the arrays is
worked out in the warm-up round.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
import zarr
from bars import compared, parsed, parser
from harness import table
from states import MANY, STATES, filled

from gockpt.core.arena_layout import CHUNK_TARGET, lay_out
from gockpt.core.array_spec import ArraySpec
from gockpt.staging.arena import Arena
from gockpt.storage.format.checksum import crc32c_blocks
from gockpt.storage.local.filesystem import Filesystem
from gockpt.storage.local.store import Store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from gockpt.core.arena_layout import ArrayLayout, Slot
    from gockpt.storage.local.store import Layout

PIECE = 8 << 20
GOCKPT = "gockpt"
RAW = "one file, direct"
QUEUE = "8 MB, 8 in flight"
DIRECTORY = "gockpt, directory"
TORCH = "torch.save + fsync"
ZARR = "zarr-python LocalStore + syncfs"
SMALL, BATCH = 64 << 10, 64  # as in a save


class Subject:
    """One state, twice: as ordinary tensors, and in an arena as a save has it."""

    def __init__(self, tensors: dict[tuple[str, ...], torch.Tensor]) -> None:
        self.tensors = tensors
        specs = [
            ArraySpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in tensors.items()
        ]
        self.layout = lay_out(specs)
        self.arena = Arena(self.layout.nbytes)
        self.arena.prefault()
        for array in self.layout.arrays:
            flat = self.tensors[array.spec.name].reshape(-1).view(torch.uint8).numpy()
            at = 0
            for slot in array.slots:
                self.arena.view(slot.offset, slot.nbytes)[:] = flat[at : at + slot.nbytes]
                at += slot.nbytes
        self.nbytes = sum(array.spec.nbytes for array in self.layout.arrays)
        self.named = {"/".join(name): tensor for name, tensor in self.tensors.items()}

    def checksum_seconds(self) -> float:
        """Return the CPU time that one thread takes for the checksums of all chunks."""
        began = time.thread_time()
        for array in self.layout.arrays:
            for slot in array.slots:
                crc32c_blocks(self.arena.view(slot.offset, slot.nbytes).data)
        return time.thread_time() - began


def write_step(subject: Subject, store: Store, step: int, *, threads: int) -> None:
    """Write as a save does: one thread the documents and from the small end, the others from the large."""
    chunks = [(array, slot) for array in subject.layout.arrays for slot in array.slots]
    small = [chunk for chunk in chunks if chunk[1].nbytes < SMALL]
    large = sorted((c for c in chunks if c[1].nbytes >= SMALL), key=lambda chunk: chunk[1].nbytes)
    left = deque([*(small[at : at + BATCH] for at in range(0, len(small), BATCH)), *([c] for c in large)])
    with store.begin(step, subject.layout.arrays, state={}, attributes={}, exact=True) as transaction:

        def work(take: Callable[[], list[tuple[ArrayLayout, Slot]]]) -> None:
            if take == left.popleft:
                transaction.write_documents()
            with suppress(IndexError):  # nothing is left
                while True:
                    view = subject.arena.view
                    transaction.write_chunks(
                        [(array, slot, view(slot.offset, slot.capacity).data) for array, slot in take()]
                    )

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, [left.popleft, *[left.pop] * (threads - 1)]))
        transaction.commit()


def write_raw(subject: Subject, path: Path, *, threads: int) -> None:
    """Write the arena's bytes into one file, directly: what the disk takes."""
    nbytes = subject.nbytes // 4096 * 4096
    data = subject.arena.data[:nbytes].data
    fd = os.open(path / "raw", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    try:
        os.posix_fallocate(fd, 0, nbytes)

        def write(start: int) -> None:
            if os.pwrite(fd, data[start : start + PIECE], start) != min(PIECE, nbytes - start):
                msg = "a short write"
                raise OSError(msg)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(write, range(0, nbytes, PIECE)))
        os.fsync(fd)
    finally:
        os.close(fd)


def write_fio(subject: Subject, path: Path) -> float:
    """Let fio write as many bytes; returns the seconds that it says it took, its fsync included."""
    command = ["fio", "--name=write", f"--filename={path / 'fio'}", "--rw=write", "--bs=8M", "--iodepth=8"]
    command += ["--ioengine=io_uring", "--direct=1", "--end_fsync=1", "--output-format=json"]
    command += [f"--size={subject.nbytes // PIECE * PIECE}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    write = json.loads(done.stdout)["jobs"][0]["write"]
    return subject.nbytes / write["bw_bytes"]


def write_torch(subject: Subject, path: Path) -> None:
    with (path / "state.pt").open("wb") as file:
        torch.save(subject.named, file)
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(path)


def write_dcp(subject: Subject, path: Path, *, threads: int) -> None:
    writer = dcp.FileSystemWriter(
        path / "dcp", thread_count=threads, sync_files=True, single_file_per_rank=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it runs in one process only
        dcp.save(dict(subject.named), storage_writer=writer, no_dist=True)
    _sync_directory(path / "dcp")


def write_zarr(subject: Subject, path: Path) -> None:
    group = zarr.open_group(path / "zarr", mode="w")
    for name, tensor in subject.named.items():
        shape = tuple(tensor.shape)
        row = tensor.nbytes // max(1, shape[0])
        chunk = (max(1, min(shape[0], CHUNK_TARGET // max(1, row))), *shape[1:])
        array = group.create_array(name, shape=shape, chunks=chunk, dtype="float32", compressors=None)
        array[...] = tensor.numpy()
    fd = os.open(path, os.O_RDONLY)
    try:
        Filesystem().syncfs(fd)
    finally:
        os.close(fd)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def arms_of(
    subject: Subject, threads: int, stores: dict[str, Store], *, many: bool
) -> dict[str, Callable[[Path], float | None]]:
    """Return what is timed, by name; one that keeps its own clock returns seconds."""

    def save(layout: str, threads: int) -> Callable[[Path], None]:
        steps = itertools.count()
        return lambda _: write_step(subject, stores[layout], next(steps), threads=threads)

    arms: dict[str, Callable[[Path], float | None]] = {
        GOCKPT: save("file", threads),
        DIRECTORY: save("directory", threads),
        RAW: lambda path: write_raw(subject, path, threads=threads),
        TORCH: lambda path: write_torch(subject, path),
    }
    if many:
        return arms
    arms |= {
        f"{GOCKPT}, 1 thread": save("one thread", 1),
        "dcp.save, 1 thread": lambda path: write_dcp(subject, path, threads=1),
        "dcp.save, 2 threads": lambda path: write_dcp(subject, path, threads=2),
        "dcp.save, 4 threads": lambda path: write_dcp(subject, path, threads=4),
        ZARR: lambda path: write_zarr(subject, path),
    }
    if shutil.which("fio"):
        arms["fio 8 MB, depth 8"] = lambda path: write_fio(subject, path)
    else:
        arms[QUEUE] = lambda path: write_raw(subject, path, threads=8)
    return arms


def measure(kind: str, wanted: argparse.Namespace) -> dict[str, Any]:
    """Return every sample of one state."""
    subject = Subject(filled(STATES[kind]()))
    names_of_stores = ("file", "directory", "one thread")
    stores: dict[str, Store] = {}
    arms = arms_of(subject, wanted.threads, stores, many=kind in MANY)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    order = random.Random(0)
    with tempfile.TemporaryDirectory(dir=wanted.dir, prefix="bench-store-") as top, ExitStack() as stack:
        for name in names_of_stores:
            layout: Layout = "directory" if name == "directory" else "file"
            stores[name] = stack.enter_context(Store(Path(top, name), layout=layout))
        for number in range(-1, wanted.rounds):  # one round to warm up
            names = list(arms)
            order.shuffle(names)
            for name in names:
                path = Path(top, f"{number}-{names.index(name)}")
                path.mkdir()
                os.sync()
                before, began = _cpu_seconds(), time.perf_counter()
                own = arms[name](path)
                took = time.perf_counter() - began
                if number >= 0:
                    seconds[name].append(took if own is None else own)
                    cpu[name].append(_cpu_seconds() - before)
                _empty(path)
                for store in stores.values():
                    _empty(Path(store.path))
    checksums = median(subject.checksum_seconds() for _ in range(3))
    return {
        "state": kind,
        "arrays": len(subject.tensors),
        "nbytes": subject.nbytes,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "checksum_cpu_seconds": checksums,
    }


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _empty(path: Path) -> None:
    """Give the disk space back, and keep the files."""
    for file in path.rglob("*"):
        if file.is_file() and file.stat().st_size > SMALL:
            os.truncate(file, 0)


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each bar with what was measured."""
    seconds = result["seconds"]
    ours = seconds[GOCKPT]
    if result["state"] in MANY:
        wanted = [(DIRECTORY, 40.0 if result["state"] == "C" else 10.0)]
    else:
        best_dcp = min(
            (name for name in seconds if name.startswith("dcp")), key=lambda name: median(seconds[name])
        )
        queue = next(name for name in seconds if name == QUEUE or name.startswith("fio"))
        wanted = [
            (RAW, 0.9 if result["state"] == "B" else 0.93),
            (queue, 0.9),
            (TORCH, 1.4 if result["state"] == "B" else 1.8),
            (best_dcp, 1.3),
            (ZARR, 2.2),
        ]
    bars = []
    for other, bar in wanted:
        ratio = median(theirs / mine for theirs, mine in zip(seconds[other], ours, strict=True))
        bars.append({"against": other, "ratio": ratio, "bar": bar, "held": ratio >= bar})
    cpu, limit = (median(result["cpu_seconds"][name]) for name in (GOCKPT, DIRECTORY))
    bars.append({"against": "CPU seconds of a directory", "ratio": cpu, "bar": limit, "held": cpu <= limit})
    return bars


def show(result: dict[str, Any]) -> None:
    nbytes = result["nbytes"]
    print(
        f"\nState {result['state']}: {result['arrays']} arrays, {nbytes / 1e9:.2f} GB, written until durable"
    )
    rows = [
        [
            name,
            f"{nbytes / median(taken) / 1e9:.2f}",
            f"{nbytes / min(taken) / 1e9:.2f}",
            f"{median(result['cpu_seconds'][name]):.2f}",
        ]
        for name, taken in sorted(result["seconds"].items(), key=lambda pair: median(pair[1]))
    ]
    print(table(["way", "median GB/s", "best GB/s", "CPU s"], rows))
    print(f"checksums alone: {result['checksum_cpu_seconds']:.2f} s of CPU\n")
    cells = [
        [bar["against"], f"{bar['ratio']:.2f}", f"{bar['bar']:.2f}", "held" if bar["held"] else "BROKEN"]
        for bar in result["bars"]
    ]
    print(table([f"{GOCKPT} against", "ratio", "bar", ""], cells))


def main() -> int:
    made = parser(__doc__, directory="where to write")
    made.add_argument("--threads", type=int, default=8, help="that write (default: %(default)s)")
    wanted = parsed(made)
    return compared("store", wanted, measure=measure, judge=judge, show=show)


if __name__ == "__main__":
    sys.exit(main())
