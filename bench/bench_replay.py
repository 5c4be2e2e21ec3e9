"""How fast optimizer updates are replayed, against torch's own steps, in one run.

AdamW on float32. Every round times each way once, in turn, so that what the machine does besides hits all
of them alike; times are medians over rounds and ratios are medians of the rounds' ratios. First of all,
replay and torch are compared bit for bit. Exits with 1 if a bar is broken:

* one update by the kernel at least 0.9 x as fast as torch's fused step and 5 x its foreach step;
* eight updates in one pass at least 1.5 x as fast as eight passes, on two threads.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from harness import machine_facts, settings_of, table, write_json

from gockpt.kernels.replay import run
from gockpt.replay import rules

if TYPE_CHECKING:
    from collections.abc import Callable

UPDATES = 8
PIECE = 1 << 20
"""Elements that a thread takes at a time; a multiple of the kernels' alignment."""

OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}


def main() -> int:
    wanted = parsed()
    facts = machine_facts(tempfile.gettempdir())
    subject = Subject(wanted.params)
    subject.check()
    samples: dict[str, list[float]] = {}
    for threads in sorted({1, wanted.threads}):
        torch.set_num_threads(threads)
        with ThreadPoolExecutor(threads) as pool:
            arms = subject.arms(pool)
            for arm in arms.values():
                arm()
            for number in range(wanted.rounds):
                names = list(arms)
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    began = time.perf_counter()
                    arms[name]()
                    samples.setdefault(f"{name}, {threads} thread(s)", []).append(time.perf_counter() - began)
    bars = judge(samples, wanted.threads)
    if wanted.json != "-":
        show(samples, bars, wanted.params)
    if wanted.json:
        settings = settings_of(wanted, updates=UPDATES, **OPTIONS)
        result = {"bench": "replay", "machine": facts, "settings": settings, "bars": bars, "seconds": samples}
        write_json(wanted.json, result)
    return 0 if wanted.quick or all(bar["held"] for bar in bars) else 1


class Subject:
    """The same parameters three times: for the kernel, torch fused and torch foreach."""

    def __init__(self, n: int) -> None:
        rng = np.random.default_rng(0)
        start = rng.standard_normal(n, np.float32)
        self.grads = [rng.standard_normal(n, np.float32) * np.float32(1e-3) for _ in range(UPDATES)]
        self.optimizers = {
            "fused": torch.optim.AdamW([torch.from_numpy(start.copy())], fused=True, **OPTIONS),
            "foreach": torch.optim.AdamW([torch.from_numpy(start.copy())], foreach=True, **OPTIONS),
        }
        for optimizer in self.optimizers.values():
            optimizer.param_groups[0]["params"][0].grad = torch.from_numpy(self.grads[0])
            optimizer.step()
        optimizer = self.optimizers["fused"]
        (p,) = optimizer.param_groups[0]["params"]
        rule = rules.rule_for(optimizer, optimizer.param_groups[0], p, optimizer.state[p])
        if isinstance(rule, str):
            msg = f"this torch can't be replayed here: {rule}"
            raise SystemExit(msg)
        self.rule = rule
        self.p = p.numpy().copy()
        self.states = [optimizer.state[p][name].numpy().copy() for name in rule.states]
        self.row = self.scalars()

    def scalars(self) -> tuple[float, ...]:
        """Return the numbers of the fused optimizer's last update."""
        optimizer = self.optimizers["fused"]
        (p,) = optimizer.param_groups[0]["params"]
        row = rules.scalars(self.rule, optimizer.param_groups[0], optimizer.state[p])
        if row is None:
            msg = "the rule does not hold for its own optimizer"
            raise SystemExit(msg)
        return row

    def check(self) -> None:
        """Stop unless replay equals torch's fused step bit for bit. No speed of something wrong."""
        optimizer = self.optimizers["fused"]
        (p,) = optimizer.param_groups[0]["params"]
        optimizer.step()
        self.row = self.scalars()
        self.update(0, self.p.size, self.grads[:1])
        if not np.array_equal(p.numpy().view(np.uint32), self.p.view(np.uint32)):
            msg = "replay differs from torch: no speeds are shown"
            raise SystemExit(msg)

    def update(self, first: int, last: int, grads: list[np.ndarray]) -> None:
        """Replay one piece."""
        states = [s[first:last] for s in self.states]
        pieces = [g[first:last] for g in grads]
        rows, tail = [self.row] * len(grads), last == self.p.size
        run(self.rule.kernel, self.rule.flags, self.p[first:last], states, pieces, rows, tail=tail)

    def arms(self, pool: ThreadPoolExecutor) -> dict[str, Callable[[], None]]:
        """Return what is timed, by name."""
        n = self.p.size
        edges = [*range(0, n, PIECE), n]

        def everywhere(grads: list[np.ndarray]) -> None:
            list(pool.map(lambda ends: self.update(*ends, grads), pairwise(edges)))

        def one_by_one() -> None:
            for gradient in self.grads:
                everywhere([gradient])

        return {
            "kernel, 1 update": partial(everywhere, self.grads[:1]),
            "torch fused": self.optimizers["fused"].step,
            "torch foreach": self.optimizers["foreach"].step,
            "kernel, 8 updates in 1 pass": partial(everywhere, self.grads),
            "kernel, 8 passes": one_by_one,
        }


def judge(samples: dict[str, list[float]], threads: int) -> list[dict[str, Any]]:
    """Return each bar with what was measured."""
    bars = [
        (f"kernel, 1 update, {count} thread(s)", f"{other}, {count} thread(s)", bar)
        for count in sorted({1, threads})
        for other, bar in (("torch fused", 0.9), ("torch foreach", 5.0))
    ]
    count = f"{threads} thread(s)"
    bars.append((f"kernel, 8 updates in 1 pass, {count}", f"kernel, 8 passes, {count}", 1.5))
    judged = []
    for ours, theirs, bar in bars:
        ratio = median(b / a for a, b in zip(samples[ours], samples[theirs], strict=True))
        judged.append({"this": ours, "against": theirs, "ratio": ratio, "bar": bar, "held": ratio >= bar})
    return judged


def show(samples: dict[str, list[float]], bars: list[dict[str, Any]], n: int) -> None:
    rows = []
    for name, seconds in samples.items():
        updates = UPDATES if "8" in name else 1
        middle = median(seconds)
        speed = n * updates / middle / 1e6
        rows.append([name, f"{middle * 1e3:.1f}", f"{min(seconds) * 1e3:.1f}", f"{speed:.0f}"])
    print(table(["AdamW, float32", "median ms", "best ms", "M parameter updates/s"], rows))
    print()
    cells = [
        [b["this"], b["against"], f"{b['ratio']:.2f}", b["bar"], "held" if b["held"] else "BROKEN"]
        for b in bars
    ]
    print(table(["faster", "than", "ratio", "bar", ""], cells))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=int, help="default: 16 Mi; quick: 1 Mi")
    parser.add_argument("--rounds", type=int, help="default: 15; quick: 3")
    parser.add_argument("--threads", type=int, default=2, help="beside one (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all samples; '-' is standard output")
    parser.add_argument("--quick", action="store_true", help="a toy in seconds: shows that it runs, no more")
    wanted = parser.parse_args()
    wanted.params = wanted.params or (1 << 20 if wanted.quick else 1 << 24)
    wanted.rounds = wanted.rounds or (3 if wanted.quick else 15)
    return wanted


if __name__ == "__main__":
    sys.exit(main())
