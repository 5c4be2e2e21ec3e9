"""How fast a checkpoint is read, cold and warm, as a whole and in parts, against others, in one run.

Every round does each task once in each way, in an order shuffled anew, into memory that is there already;
ratios are medians of the rounds' ratios. Cold: before it, the pages of the files are dropped from the page
cache (by ``posix_fadvise``, file by file; it is checked that they are gone). Before the first timed round
every way has to prove that it reads the right values. gockpt compares all it reads with its checksums, but
for the slices that say otherwise; the others have none. Exits with 1 if a bar is broken:

* cold, everything: at least 1.5 x torch.distributed.checkpoint.load;
* cold, the first quarter of every tensor: at least 4 x torch.distributed.checkpoint.load;
* warm, everything: at least 0.8 x safetensors.
"""

from __future__ import annotations

import gc
import mmap
import os
import random
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from bars import compared, parsed, parser
from harness import table
from safetensors import safe_open
from safetensors.torch import save_file
from states import STATES, filled
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

import gockpt
from gockpt.core.boxes import Box
from gockpt.storage.read.checkpoint import Wanted
from gockpt.storage.read.direct_io import ReadCalls
from gockpt.storage.read.find import open_checkpoint

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    Tensors = dict[str, torch.Tensor]
    Way = Callable[[], Tensors]

GOCKPT = "gockpt"
UNCHECKED = "gockpt, verify none"
DCP = "dcp.load"
SAFETENSORS = "safetensors"
RAW = "one file, direct"
RAW_THREADS = 4
PIECE = 8 << 20
BARS = (("everything, cold", DCP, 1.5), ("quarters, cold", DCP, 4.0), ("everything, warm", SAFETENSORS, 0.8))
ROWS = slice(100, 200)
DROPS = 5


class Quarters(DefaultLoadPlanner):
    """Asks for the region at the start of each stored tensor that fits the one to fill."""

    def create_local_plan(self) -> LoadPlan:
        """Return what to read."""
        items = []
        for name, tensor in self.state_dict.items():
            region = ChunkStorageMetadata(torch.Size([0] * tensor.ndim), tensor.size())
            items += create_read_items_for_chunk_list(name, self.metadata.state_dict_metadata[name], [region])
        return LoadPlan(items)


class Subject:
    """One state, written in three forms, and the memory it is read into."""

    def __init__(self, kind: str, path: Path) -> None:
        self.path = path
        values = {".".join(name): tensor for name, tensor in filled(STATES[kind]()).items()}
        self.values = values
        with gockpt.Checkpointer(values, None, path / "gockpt") as checkpointer:
            checkpointer.after_step(1)
        writer = dcp.FileSystemWriter(path / "dcp")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it runs in one process only
            dcp.save(dict(values), storage_writer=writer, no_dist=True)
        save_file(values, path / "state.safetensors")
        os.sync()
        self.targets = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
        self.quarters = {name: tensor[: max(1, len(tensor) // 4)] for name, tensor in self.targets.items()}
        whole = sum(tensor.nbytes for tensor in values.values()) // PIECE * PIECE
        self.raw = memoryview(mmap.mmap(-1, max(whole, mmap.PAGESIZE)))[:whole]
        self.raw[:] = bytes(whole)  # its pages are there
        self.largest = max(values, key=lambda name: values[name].nbytes)

    def drop(self, *, surely: bool) -> None:
        """Drop every file's pages from the page cache; ``surely`` raises where some stay."""
        for _ in range(DROPS):
            left = {file: pages for file in self.path.rglob("*") if file.is_file() and (pages := _drop(file))}
            if not left:
                return
            gc.collect()  # what is mapped stays
            os.sync()  # and what is dirty
        if surely:
            msg = f"pages stay in the page cache, so nothing cold can be measured: {left}"
            raise RuntimeError(msg)

    def warm(self) -> None:
        """Read every file once."""
        for file in self.path.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    while opened.read(8 << 20):
                        pass

    # -- the ways

    def all_gockpt(self) -> Tensors:
        """Load all by gockpt."""
        gockpt.load(self.path / "gockpt", self.targets, rng=False)
        return self.targets

    def all_dcp(self) -> Tensors:
        """Load all by torch.distributed.checkpoint."""
        reader = dcp.FileSystemReader(self.path / "dcp")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it runs in one process only
            dcp.load(self.targets, storage_reader=reader, no_dist=True)
        return self.targets

    def all_safetensors(self) -> Tensors:
        """Load all by safetensors."""
        # Into the memory that is there: on the CPU its own tensors are views of the mapped file.
        with safe_open(self.path / "state.safetensors", "pt") as file:
            for name, target in self.targets.items():
                target.copy_(file.get_tensor(name))
        return self.targets

    def all_raw(self) -> Tensors:
        """Read as many bytes of one file, directly, into aligned memory: what the disk gives."""
        fd = os.open(self.path / "state.safetensors", os.O_RDONLY | os.O_DIRECT)
        try:
            nbytes = len(self.raw)

            def read(start: int) -> None:
                if os.preadv(fd, [self.raw[start : start + PIECE]], start) != PIECE:
                    msg = "a short read"
                    raise OSError(msg)

            with ThreadPoolExecutor(RAW_THREADS) as pool:
                list(pool.map(read, range(0, nbytes, PIECE)))
        finally:
            os.close(fd)
        return {}

    def quarters_gockpt(self) -> Tensors:
        """Read the quarters by gockpt."""
        with open_checkpoint(self.path / "gockpt") as stored:
            stored.read_many([_wanted(f"model/{name}", part) for name, part in self.quarters.items()])
        return self.quarters

    def quarters_dcp(self) -> Tensors:
        """Read the quarters by torch.distributed.checkpoint."""
        reader = dcp.FileSystemReader(self.path / "dcp")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it runs in one process only
            dcp.load(self.quarters, storage_reader=reader, planner=Quarters(), no_dist=True)
        return self.quarters

    def slice_gockpt(self, verify: str) -> Tensors:
        """Open and read a slice by gockpt."""
        with gockpt.open(self.path / "gockpt", verify=verify) as checkpoint:
            return {self.largest: checkpoint[f"model/{self.largest}"][ROWS]}

    def slice_safetensors(self) -> Tensors:
        """Open and read a slice by safetensors."""
        with safe_open(self.path / "state.safetensors", "pt") as file:
            return {self.largest: file.get_slice(self.largest)[ROWS].clone()}

    def tasks(self) -> dict[str, dict[str, Way]]:
        """Return what is timed: the ways of every task, by their names."""
        everything = {GOCKPT: self.all_gockpt, DCP: self.all_dcp, SAFETENSORS: self.all_safetensors}
        slices: dict[str, Way] = {
            GOCKPT: lambda: self.slice_gockpt("blocks"),
            UNCHECKED: lambda: self.slice_gockpt("none"),
            SAFETENSORS: self.slice_safetensors,
        }
        return {
            "everything, cold": {**everything, RAW: self.all_raw},
            "everything, warm": everything,
            "quarters, cold": {GOCKPT: self.quarters_gockpt, DCP: self.quarters_dcp},
            "100 rows, cold": slices,
            "100 rows, warm": slices,
        }

    def check(self, found: Tensors, what: str) -> None:
        """Compare what a way returned with what was written."""
        for name, tensor in found.items():
            where = ROWS if what.startswith("100 rows") else slice(0, len(tensor))
            if not torch.equal(tensor, self.values[name][where]):
                msg = f"{what}: {name} is not what was written"
                raise RuntimeError(msg)


def _drop(file: Path) -> int:
    """Drop a file's pages from the page cache, and return how many stay."""
    fd = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with suppress(OSError):  # an older kernel doesn't tell
            return ReadCalls().cached_pages(fd, 0, file.stat().st_size)
    finally:
        os.close(fd)
    return 0


def _wanted(name: str, part: torch.Tensor) -> Wanted:
    """Return the request for the region at the start of an array that fits a tensor."""
    region = Box((0,) * part.ndim, tuple(part.shape))
    return Wanted(name, region, part.numpy().reshape(-1).view("u1"))


def measure(kind: str, wanted: argparse.Namespace) -> dict[str, Any]:
    """Return every sample of one state."""
    with tempfile.TemporaryDirectory(dir=wanted.dir, prefix="bench-load-") as top:
        subject = Subject(kind, Path(top))
        tasks = subject.tasks()
        seconds = {task: {way: [] for way in ways} for task, ways in tasks.items()}
        order = random.Random(0)
        for number in range(-1, wanted.rounds):  # one round to warm up and to compare
            for task, ways in tasks.items():
                names = list(ways)
                order.shuffle(names)
                for name in names:
                    subject.drop(surely=not wanted.quick)
                    if task.endswith("warm"):
                        subject.warm()
                    if number < 0:
                        for target in subject.targets.values():
                            target.fill_(float("nan"))
                    began = time.perf_counter()
                    found = ways[name]()
                    took = time.perf_counter() - began
                    if number < 0:
                        subject.check(found, task)
                    else:
                        seconds[task][name].append(took)
        sizes = {
            "everything": sum(tensor.nbytes for tensor in subject.targets.values()),
            "quarters": sum(tensor.nbytes for tensor in subject.quarters.values()),
            "100 rows": subject.values[subject.largest][ROWS].nbytes,
        }
        return {"state": kind, "arrays": len(subject.values), "nbytes": sizes, "seconds": seconds}


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each bar with what was measured."""
    bars = []
    for task, other, bar in BARS:
        seconds = result["seconds"][task]
        pairs = zip(seconds[other], seconds[GOCKPT], strict=True)
        ratio = median(theirs / ours for theirs, ours in pairs)
        bars.append({"task": task, "against": other, "ratio": ratio, "bar": bar, "held": ratio >= bar})
    return bars


def show(result: dict[str, Any]) -> None:
    nbytes = result["nbytes"]
    print(f"\nState {result['state']}: {result['arrays']} arrays, {nbytes['everything'] / 1e9:.2f} GB")
    rows = []
    for task, ways in result["seconds"].items():
        size = nbytes[task.split(",")[0]]
        for way, taken in sorted(ways.items(), key=lambda pair: median(pair[1])):
            speed = [f"{size / seconds / 1e9:.2f}" for seconds in (median(taken), min(taken))]
            rows.append([f"{task}: {way}", f"{1000 * median(taken):.1f}", *speed])
    print(table(["", "median ms", "median GB/s", "best GB/s"], rows), end="\n\n")
    cells = [
        [
            f"{bar['task']}: {bar['against']}",
            f"{bar['ratio']:.2f}",
            f"{bar['bar']:.2f}",
            "held" if bar["held"] else "BROKEN",
        ]
        for bar in result["bars"]
    ]
    print(table([f"{GOCKPT} against", "ratio", "bar", ""], cells))


def main() -> int:
    wanted = parsed(parser(__doc__, directory="where to write and read"))
    return compared("load", wanted, measure=measure, judge=judge, show=show)


if __name__ == "__main__":
    sys.exit(main())
