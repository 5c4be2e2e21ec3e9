"""How much host memory a save takes: the growth of the process's peak, against what is promised.

The bar: the peak of resident memory grows by no more than state bytes x 1.15 + the gradient ring. Each
window is measured in a fresh process: a GPT trains some steps, its peak is taken, then it trains on while
it is saved several times, and the peak is taken again. Exits with 1 if the bar is broken.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from corpus import Loader, standard_library
from gpt import Training, config_for
from harness import machine_facts, megabytes, peak_bytes, reset_peak, settings_of, table, write_json
from train_savers import Gockpt
from train_segment import load_code, state_bytes

import gockpt

STATE_SHARE = 1.15
WARM_STEPS = 3
PLAIN_STEPS = 5
EVERY = 8
SAVES = 3


def main() -> int:
    wanted = parsed()
    if wanted.inside is not None:
        print(json.dumps(measure(wanted)))
        return 0
    facts = machine_facts(wanted.dir)
    rows = [in_a_process(wanted, window) for window in wanted.windows]
    if wanted.json != "-":
        print(table(HEADER, [cells(row) for row in rows]))
    if wanted.json:
        write_json(
            wanted.json,
            {"bench": "memory", "machine": facts, "settings": settings_of(wanted), "samples": rows},
        )
    return 0 if all(row["held"] for row in rows) else 1


def in_a_process(wanted: argparse.Namespace, window: int) -> dict[str, Any]:
    """Measure one window in a fresh process."""
    command = [sys.executable, __file__, "--inside", str(window), "--params", str(wanted.params)]
    done = subprocess.run([*command, "--dir", wanted.dir], check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(wanted: argparse.Namespace) -> dict[str, Any]:
    """Return what saving over one window takes in this very process."""
    window = wanted.inside
    torch.set_num_threads(1)  # memory is measured here, not speed
    config = config_for(wanted.params, context=32, batch=1)
    with tempfile.TemporaryDirectory(dir=wanted.dir, prefix="bench-memory-") as directory:
        load_code(Gockpt, {"window": window}, Path(directory, "toy"))
        training = Training(config, steps=100, seed=0)
        loader = Loader(standard_library(1_000_000), context=config.context, batch=1, seed=0)
        for number in range(WARM_STEPS + PLAIN_STEPS):
            if number == WARM_STEPS:
                reset_peak()  # the first steps make the optimizer's state
            training.step(loader.next())
        plain = peak_bytes()
        options = gockpt.Options(window=window, keep=2)
        windows = []
        with gockpt.Checkpointer(
            training.model, training.optimizer, Path(directory, "run"), every=EVERY, options=options
        ) as saver:
            for step in range(1, EVERY * SAVES + 1):
                training.step(loader.next())
                handle = saver.after_step(step)
                if handle is not None and step % EVERY == 0:
                    saved = handle.result()  # so that each one is taken, however slow the disk
                    windows.append(saved.window)
            growth = peak_bytes() - plain
            ring = handle.plan.ring_bytes
            arena = saved.host_memory - ring
    state = state_bytes(training)
    bar = int(state * STATE_SHARE) + ring
    return {
        "window": window,
        "windows": windows,
        "parameters": training.parameters,
        "state_bytes": state,
        "arena_bytes": arena,
        "ring_bytes": ring,
        "plain_peak_bytes": plain,
        "growth_bytes": growth,
        "growth_per_state": growth / state,
        "bar_bytes": bar,
        "growth_per_bar": growth / bar,
        "held": growth <= bar and windows == [window] * SAVES,
    }


HEADER = ["window", "state", "arena", "ring", "peak without", "peak grew by", "of state", "bar", "of bar", ""]


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row as text."""
    names = ("state_bytes", "arena_bytes", "ring_bytes", "plain_peak_bytes", "growth_bytes")
    sizes = [megabytes(row[name]) for name in names]
    share = [f"{row['growth_per_state']:.3f}", megabytes(row["bar_bytes"]), f"{row['growth_per_bar']:.3f}"]
    return [str(row["window"]), *sizes, *share, "held" if row["held"] else "BROKEN"]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 4], help="default: %(default)s")
    parser.add_argument("--params", type=int, help="about this many (default: 34 million; quick: 10 million)")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where to save (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all samples; '-' is standard output")
    parser.add_argument("--quick", action="store_true", help="a smaller model")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    wanted.params = wanted.params or (10_000_000 if wanted.quick else 34_000_000)
    return wanted


if __name__ == "__main__":
    sys.exit(main())
