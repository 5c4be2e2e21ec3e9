"""Whether ``compression="auto"`` chooses well: what saves take with it and with each fixed one.

All in one run. A GPT is trained for some steps first, since what compresses depends on the values; its
state is written with its moments, and its weights once more as bfloat16. The disk is the real one, and the
same made slower: large writes wait for their turn, as they would for a device that takes so many bytes a
second. Each way has a store of its own that it has saved into before ("auto" learns from a store's first
saves). Every round saves once in each way, in an order shuffled anew, until it is durable; ratios are
medians of the rounds' ratios. Exits with 1 if a bar is broken:

* on each disk, "auto" reaches at least 0.90 of the speed of the best choice.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from bars import parser
from bench_store import Subject, write_step
from corpus import Loader, standard_library
from gpt import SIZES, Training
from harness import cores, machine_facts, megabytes, settings_of, table, write_json

from gockpt.storage.format.codecs import CODECS
from gockpt.storage.local.compression import AUTO, Compression
from gockpt.storage.local.filesystem import Filesystem
from gockpt.storage.local.store import Store

if TYPE_CHECKING:
    import argparse

    import torch

BAR = 0.9
RAW = "raw"
WAYS = (RAW, *CODECS, AUTO)
SMALL = 64 << 10
DISKS = (None, 1000, 400, 100, 25)
"""Bytes a second that a disk takes, in millions; ``None``: as many as it does."""
QUICK_DISKS = (None, 100)


class Slower(Filesystem):
    """The real file system on a disk that takes so many bytes a second; small writes stay in the cache."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._mutex = threading.Lock()
        self._ready = 0.0

    def pwrite(self, fd: int, data: memoryview | bytes, offset: int) -> int:
        """Write as the real one, and return when the slower disk would."""
        written = super().pwrite(fd, data, offset)
        if written < SMALL:
            return written
        with self._mutex:
            self._ready = max(self._ready, time.perf_counter()) + written / self._rate
            until = self._ready
        time.sleep(max(0.0, until - time.perf_counter()))
        return written


def trained(size: str, steps: int) -> dict[tuple[str, ...], torch.Tensor]:
    """Return the state of a GPT that was trained for some steps, and its weights as bfloat16."""
    config = SIZES[size]
    training = Training(config, steps=steps, seed=0)
    loader = Loader(standard_library(), context=config.context, batch=config.batch, seed=0)
    for _ in range(steps):
        training.step(loader.next())
    tensors: dict[tuple[str, ...], torch.Tensor] = {}
    for name, parameter in training.model.named_parameters():
        state = training.optimizer.state[parameter]
        tensors["model", name] = parameter.detach()
        tensors["half", name] = parameter.detach().bfloat16()
        tensors["optimizer", name, "exp_avg"] = state["exp_avg"]
        tensors["optimizer", name, "exp_avg_sq"] = state["exp_avg_sq"]
    return tensors


def measure(subject: Subject, disk: int | None, wanted: argparse.Namespace) -> dict[str, Any]:
    """Return every sample of one disk."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    stored: dict[str, int] = {}
    order = random.Random(0)
    with ExitStack() as stack:
        top = stack.enter_context(tempfile.TemporaryDirectory(dir=wanted.dir, prefix="bench-compression-"))
        stores = {}
        for way in WAYS:
            fs = Filesystem() if disk is None else Slower(disk * 1e6)
            compression = Compression(None if way == RAW else way, threads=wanted.encoders)
            store = Store(Path(top, way), fs=fs, compression=compression)
            stores[way] = stack.enter_context(store)
            write_step(subject, store, 0, threads=wanted.threads)
        for number in range(1, wanted.rounds + 1):
            for way in order.sample(WAYS, len(WAYS)):
                os.sync()
                began = time.perf_counter()
                write_step(subject, stores[way], number, threads=wanted.threads)
                seconds[way].append(time.perf_counter() - began)
        for way in WAYS:
            step = Path(top, way, f"step-{wanted.rounds:010}")
            stored[way] = sum(file.stat().st_size for file in step.rglob("*") if file.is_file())
    best = min((way for way in WAYS if way != AUTO), key=lambda way: median(seconds[way]))
    ratio = median(theirs / mine for theirs, mine in zip(seconds[best], seconds[AUTO], strict=True))
    bar = {"against": best, "ratio": ratio, "bar": BAR, "held": ratio >= BAR}
    return {"disk_mb_s": disk, "seconds": seconds, "stored_bytes": stored, "bars": [bar]}


def show(result: dict[str, Any], nbytes: int) -> None:
    disk = "as it is" if result["disk_mb_s"] is None else f"{result['disk_mb_s']} MB/s"
    print(f"\nDisk {disk}: {megabytes(nbytes)}, written until durable")
    rows = [
        [way, f"{median(result['seconds'][way]):.3f}", megabytes(result["stored_bytes"][way])] for way in WAYS
    ]
    print(table(["compression", "s", "stored"], rows))
    for bar in result["bars"]:
        verdict = "held" if bar["held"] else "BROKEN"
        print(f"auto: {bar['ratio']:.2f} of the speed of {bar['against']}, the best (bar {BAR}): {verdict}")


def main() -> int:
    made = parser(__doc__, directory="where to write", states=False)
    made.add_argument("--threads", type=int, default=8, help="that write (default: %(default)s)")
    made.add_argument("--encoders", type=int, help="that encode at a time (default: half the cores)")
    made.add_argument("--steps", type=int, help="of training before (default: 100; quick: 2)")
    wanted = made.parse_args()
    wanted.rounds = wanted.rounds or (1 if wanted.quick else 7)
    wanted.encoders = wanted.encoders or max(1, cores() // 2)
    wanted.steps = wanted.steps or (2 if wanted.quick else 100)
    facts = machine_facts(wanted.dir)
    subject = Subject(trained("tiny" if wanted.quick else "10m", wanted.steps))
    results = []
    for disk in QUICK_DISKS if wanted.quick else DISKS:
        results.append(measure(subject, disk, wanted))
        if wanted.json != "-":
            show(results[-1], subject.nbytes)
    if wanted.json:
        found = {"bench": "compression", "machine": facts, "settings": settings_of(wanted)}
        write_json(wanted.json, {**found, "nbytes": subject.nbytes, "results": results})
    return 0 if wanted.quick or all(bar["held"] for each in results for bar in each["bars"]) else 1


if __name__ == "__main__":
    sys.exit(main())
