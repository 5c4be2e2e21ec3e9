"""One training process of the demo: trains, maybe saves, maybe resumes, and reports what it does.

``demo.py`` starts it. It reports by writing one JSON object per line to the pipe it is given, so the
losses come back exactly, as the hexadecimal form of the float. Nothing here knows what the demo proves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import threading
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from corpus import Loader, standard_library
from gpt import SIZES, Training

import gockpt

if TYPE_CHECKING:
    from gockpt import SaveHandle

SEED = 20


class Reports:
    """Writes events to the demo. Thread-safe: a save reports from the thread that ends it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def __call__(self, event: str, **facts: Any) -> None:
        """Write one event."""
        line = json.dumps({"event": event, **facts}) + "\n"
        with self._lock:
            os.write(self._descriptor, line.encode())


def main() -> None:
    arguments = parsed()
    report = Reports(arguments.events)
    # Sums are split over threads: equal bits need an equal number of them in every process.
    torch.set_num_threads(arguments.threads)
    config = SIZES[arguments.size]
    training = Training(config, steps=arguments.steps, seed=SEED)
    corpus = standard_library(arguments.corpus_bytes)
    loader = Loader(corpus, context=config.context, batch=config.batch, seed=SEED)
    extra = {"schedule": training.schedule, "loader": loader}
    report(
        "ready",
        parameters=training.parameters,
        corpus_bytes=len(corpus.tokens),
        corpus_files=corpus.files,
        tokens_per_step=config.tokens_per_step,
    )

    first = 1
    if arguments.resume:
        restored = gockpt.load(arguments.checkpoints, training.model, training.optimizer, extra=extra)
        report(
            "resumed",
            step=restored.step,
            missing=sorted(restored.missing),
            unexpected=sorted(restored.unexpected),
        )
        first = restored.step + 1

    saves = Saves(arguments, training, extra, report) if arguments.checkpoints else None
    for step in range(first, arguments.steps + 1):
        began = perf_counter()
        loss = float(training.step(loader.next()))
        if saves is not None:
            saves.tick(step)
        report("step", step=step, loss=loss.hex(), seconds=perf_counter() - began)
        if saves is not None and arguments.hold_at and step >= arguments.hold_at and saves.window_open:
            report("holding", step=step, **saves.seen)
            sys.stdin.read()  # until it is killed
    if saves is not None:
        gockpt.wait()
    report("final", digest=digest(training), part=part(training, arguments.slice_of, arguments.slice_rows))


class Saves:
    """The one call in the loop, and reports about it."""

    def __init__(
        self, arguments: argparse.Namespace, training: Training, extra: dict[str, Any], report: Reports
    ) -> None:
        self._arguments = arguments
        self._training = training
        self._extra = extra
        self._report = report
        self._options = gockpt.Options(window=arguments.window, when_busy="wait")
        self._newest: SaveHandle | None = None
        self.seen: dict[str, Any] = {}

    @property
    def window_open(self) -> bool:
        """Whether the newest save waits for further steps of its window."""
        return self.seen.get("phase") == "open"

    def tick(self, step: int) -> None:
        """Tell gockpt that a step is complete."""
        handle = gockpt.save_overlapped(
            self._training.model,
            self._training.optimizer,
            self._arguments.checkpoints,
            step=step,
            every=self._arguments.every,
            extra=self._extra,
            options=self._options,
        )
        if handle is None:
            return
        if handle is not self._newest:
            self._newest = handle
            handle.add_done_callback(self._done)
        if step % self._arguments.every == self._arguments.every // 2 and not handle.done():
            # Half an interval later it is on disk, unless disk or cores are very busy. Waiting for it here
            # keeps the demo the same everywhere: else the next window may open late and be shorter.
            began = perf_counter()
            handle.result()
            self._report("waited", step=step, seconds=perf_counter() - began)
        progress = handle.progress()
        self.seen = {
            "due": handle.step,
            "phase": progress.phase,
            "done": progress.done,
            "total": progress.total,
        }
        self._report("progress", step=step, **self.seen)

    def _done(self, handle: SaveHandle) -> None:
        error = handle.exception(0)
        if error is not None:
            self._report("failed", step=handle.step, why=f"{type(error).__name__}: {error}")
            return
        saved = handle.result(0)
        self._report(
            "saved",
            step=saved.step,
            nbytes=saved.nbytes,
            window=saved.window,
            attempts=saved.attempts,
            exact=saved.exact,
            exposed_seconds=saved.exposed_seconds,
            hidden_seconds=saved.hidden_seconds,
            durable_seconds=saved.durable_seconds,
            path=str(saved.path),
        )


def digest(training: Training) -> str:
    """Return one SHA-256 over every weight and every optimizer state."""
    sha = hashlib.sha256()
    for name, parameter in training.model.named_parameters():
        state = training.optimizer.state[parameter]
        for key, tensor in [("", parameter.detach()), *sorted(state.items())]:
            sha.update(f"{name}/{key}".encode())
            sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def part(training: Training, name: str, rows: list[int]) -> str:
    """Return the bytes of some rows of one live weight, in hex."""
    weight = training.model.get_parameter(name).detach()
    return weight[rows[0] : rows[1]].contiguous().numpy().tobytes().hex()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, required=True, help="descriptor to report to")
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--steps", type=int, required=True, help="train up to this step")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--corpus-bytes", type=int, help="use only the beginning of the corpus")
    parser.add_argument("--slice-of", required=True, help="the weight of which rows are reported")
    parser.add_argument("--slice-rows", type=int, nargs=2, required=True, metavar=("FIRST", "STOP"))
    parser.add_argument("--checkpoints", help="save into this directory")
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--hold-at", type=int, help="stop inside the first window open at or after this step")
    return parser.parse_args()


if __name__ == "__main__":
    main()
