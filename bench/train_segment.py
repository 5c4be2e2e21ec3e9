"""One segment of ``bench_train.py``: a fresh process that trains with one saver, and prints what it measured.

Untimed first: the saver's code is loaded by saving a toy, a few steps train without it (their peak is
what memory is compared with), and one whole save is made. Then the timed steps, with dues placed in the
middle of each interval, so that what a save does afterwards falls on timed steps as well. As many steps
without saving are timed right before or right after them: machines drift, and a minute later is another one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from corpus import Batch, Loader, standard_library
from gpt import Config, Training
from harness import peak_bytes, reset_peak
from train_savers import ON_A_DEVICE, SAVERS

if TYPE_CHECKING:
    from collections.abc import Callable

SEED = 20
WARM_STEPS = 2
PLAIN_STEPS = 4
LEAD = 9
"""Untimed steps up to and with the first due one."""
CORPUS_BYTES = 4_000_000


def main() -> None:
    wanted = parsed()
    # One process is what it is asked for here.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    torch.set_num_threads(wanted.threads)
    with tempfile.TemporaryDirectory(dir=wanted.directory, prefix="bench-train-") as directory:
        result = segment(wanted, Path(directory))
    # What is still to be written must not slow the next segment.
    os.sync()
    print(json.dumps(result))


def segment(wanted: argparse.Namespace, directory: Path) -> dict[str, Any]:
    kind, options = SAVERS[wanted.saver]
    if wanted.device != "cpu":
        torch.set_float32_matmul_precision("high")
        options = options | ON_A_DEVICE.get(wanted.saver, {})
    device = torch.device(wanted.device)
    load_code(kind, options, directory / "toy", wanted.device)
    config = Config(**json.loads(wanted.config))
    training = Training(
        config,
        steps=1000,
        seed=SEED,
        device=wanted.device,
        dtype=getattr(torch, wanted.dtype),
        fused=wanted.optimizer == "fused",
    )
    corpus = standard_library(CORPUS_BYTES)
    loader = Loader(corpus, context=config.context, batch=config.batch, seed=SEED)

    def train() -> None:
        batch = loader.next()
        # As most loops do, this one looks at its loss in every step, and so waits for the device.
        training.step(Batch(batch.inputs.to(device), batch.targets.to(device))).item()

    for number in range(WARM_STEPS + PLAIN_STEPS):
        if number == WARM_STEPS:
            reset_peak()  # building model and optimizer is not what saving is compared with
        train()
    plain_peak = peak_bytes()
    device_peak = peak_on(device)

    (directory / "run").mkdir()
    saver = kind(training.model, training.optimizer, directory / "run", every=wanted.every, **options)
    far = 1000 * wanted.every
    for step in range(far - LEAD + 1, far + 2):
        train()
        saver.tick(step)
    saver.finish()
    saver.timings.clear()

    def timed(tick: Callable[[int], None]) -> list[float]:
        durations = []
        for step in range(first, first + wanted.steps):
            now = perf_counter()
            train()
            tick(step)
            durations.append(round(perf_counter() - now, 5))
        return durations

    # Steps that start again at a small number: half an interval before the first due one.
    first = wanted.every - wanted.every // 2
    plain = timed(lambda _: None) if wanted.plain_first else []
    durations = timed(saver.tick)
    ended = perf_counter()
    saver.finish()
    drain = perf_counter() - ended
    os.sync()
    plain = plain or timed(lambda _: None)
    saver.close()
    return {
        "saver": wanted.saver,
        "every": wanted.every,
        "parameters": training.parameters,
        "state_bytes": state_bytes(training),
        "seconds": sum(durations),
        "plain_seconds": sum(plain),
        "tokens": wanted.steps * config.tokens_per_step,
        "step_seconds": durations,
        "plain_step_seconds": plain,
        "due": sum(step % wanted.every == 0 for step in range(first, first + wanted.steps)),
        "saves": [asdict(timing) for timing in saver.timings],
        "drain_seconds": drain,
        "plain_peak_bytes": plain_peak,
        "peak_growth_bytes": peak_bytes() - plain_peak,
        "device_peak_growth_bytes": peak_on(device) - device_peak,
    }


def peak_on(device: torch.device) -> int:
    """Return the most device memory that torch had allocated since this was asked last; 0 for the CPU."""
    if device.type == "cpu":
        return 0
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return int(peak)


def load_code(kind: Any, options: dict[str, Any], directory: Path, device: str = "cpu") -> None:
    """Make a save of a toy, so that no import and no compilation is measured as memory or time."""
    directory.mkdir()
    model = torch.nn.Linear(64, 64, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    saver = kind(model, optimizer, directory, every=5, **options)
    for step in range(1, 6):
        optimizer.zero_grad()
        model(torch.ones(2, 64, device=device)).sum().backward()
        optimizer.step()
        saver.tick(step)
    saver.finish()
    saver.close()


def state_bytes(training: Training) -> int:
    """Return the bytes of every weight and optimizer state."""
    states = (t for state in training.optimizer.state.values() for t in state.values())
    return sum(t.nbytes for t in (*training.model.parameters(), *states))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saver", choices=SAVERS, required=True)
    parser.add_argument("--every", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--plain-first", action="store_true")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--config", required=True, help="fields of gpt.Config, as JSON")
    parser.add_argument("--directory", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--optimizer", required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
