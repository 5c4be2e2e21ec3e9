"""What saving costs a training loop: tokens per second with each way to save, interleaved in one run.

In each round every variant trains in a fresh process, in shuffled order: the same number of steps with
saving and without, one right after the other, so that what the machine does besides hits both alike. "vs
none" is the ratio of the two, the median over rounds; that of "no saving" shows how far chance alone goes.
Other figures are medians as well. `bench/README.md` says how to read the table.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from gpt import SIZES, config_for
from harness import cores, device_facts, machine_facts, megabytes, settings_of, table, write_json
from train_savers import DEVICE_ONLY, SAVERS

NONE = "no saving"


def main() -> None:
    wanted = parsed()
    config = SIZES["tiny" if wanted.quick else "10m"]
    if wanted.params:
        config = config_for(wanted.params, context=config.context, batch=config.batch)
    config = replace(config, batch=wanted.batch or config.batch, context=wanted.context or config.context)
    variants = [
        (saver, every)
        for saver in SAVERS
        for every in wanted.every
        if not wanted.only or saver == NONE or any(part in saver for part in wanted.only)
        if worker_of(saver) in (None, *wanted.worker)
        if wanted.device != "cpu" or saver not in DEVICE_ONLY
    ]
    # Without a save, the interval means nothing: one segment of each is enough.
    variants = [v for v in variants if v[0] != NONE or v[1] == wanted.every[0]]
    facts = machine_facts(wanted.dir)
    if wanted.device != "cpu":
        facts |= device_facts(0)
    order = random.Random(wanted.seed)
    segments = []
    for number in range(wanted.rounds):
        order.shuffle(variants)
        for saver, every in variants:
            # Either way round as often: what comes second finds a machine that is warmer, and fuller.
            result = run(saver, every, wanted, json.dumps(asdict(config)), plain_first=number % 2 == 0)
            segments.append({"round": number, **result})
            speed = result["tokens"] / result["seconds"]
            ratio = result["plain_seconds"] / result["seconds"]
            words = f"{speed:.0f} tokens/s, {ratio:.3f} of not saving"
            print(f"round {number + 1}: {saver}, every {every}: {words}", file=sys.stderr)
    rows = [summary(segments, saver, every) for saver, every in sorted(variants, key=place)]
    if wanted.json != "-":
        show(rows, segments[0], config.tokens_per_step)
    if wanted.device != "cpu" and not wanted.json:
        device = facts["device"].lower().replace(" ", "-")
        name = f"{facts['date'][:10]}-gpu-{device}-train-{wanted.dtype}-{wanted.optimizer}.json"
        wanted.json = Path(__file__).parent / "results" / name
    if wanted.json:
        settings = settings_of(wanted, config=asdict(config))
        result = {
            "bench": "train",
            "machine": facts,
            "settings": settings,
            "summary": rows,
            "samples": segments,
        }
        write_json(wanted.json, result)


def worker_of(saver: str) -> str | None:
    """Return where a saver of this project does its background work; ``None`` for the others."""
    return SAVERS[saver][1].get("worker", "thread") if saver.startswith("gockpt") else None


def place(variant: tuple[str, int]) -> tuple[int, int]:
    """Order the table: by interval, then as the savers are listed."""
    saver, every = variant
    return (0 if saver == NONE else every, list(SAVERS).index(saver))


def run(
    saver: str, every: int, wanted: argparse.Namespace, config: str, *, plain_first: bool
) -> dict[str, Any]:
    """Train one segment in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("train_segment.py")), "--saver", saver]
    command += ["--every", str(every), "--steps", str(wanted.steps), "--threads", str(wanted.threads)]
    command += ["--config", config, "--directory", wanted.dir, "--device", wanted.device]
    command += ["--dtype", wanted.dtype, "--optimizer", wanted.optimizer]
    command += ["--plain-first"] if plain_first else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def summary(segments: list[dict[str, Any]], saver: str, every: int) -> dict[str, Any]:
    """Return one variant's medians."""
    own = [s for s in segments if s["saver"] == saver and s["every"] == every]
    saves = [timing for s in own for timing in s["saves"]]
    ratios = [s["plain_seconds"] / s["seconds"] for s in own]
    extra = [(s["seconds"] - s["plain_seconds"]) / len(s["saves"]) for s in own if s["saves"]]
    stalls = [sum(t["exposed"] for t in s["saves"]) for s in own]
    beyond = [s["plain_seconds"] / (s["seconds"] - stall) for s, stall in zip(own, stalls, strict=True)]
    durable = [t["durable"] for t in saves if t["durable"] is not None]
    slowed = [slowdown for s in own for slowdown in window_slowdowns(s)]
    return {
        "saver": saver,
        "every": every if saves else None,
        "tokens_per_second": median(s["tokens"] / s["seconds"] for s in own),
        "vs_none": median(ratios),
        "vs_none_range": [min(ratios), max(ratios)],
        "vs_none_beyond_stall": median(beyond),
        "exposed_seconds_per_save": median(t["exposed"] for t in saves) if saves else None,
        "extra_seconds_per_save": median(extra) if extra else None,
        "durable_seconds": median(durable) if durable else None,
        "window": median(t["window"] for t in saves) if saves else None,
        "saves": len(saves),
        "due": sum(s["due"] for s in own) if saves else 0,
        "peak_growth_bytes": median(s["peak_growth_bytes"] for s in own),
        "drain_seconds": median(s["drain_seconds"] for s in own),
        "device_peak_growth_bytes": median(s["device_peak_growth_bytes"] for s in own),
        "window_slowdown": median(slowed) if slowed else None,
    }


def window_slowdowns(segment: dict[str, Any]) -> list[float]:
    """Return by what part the steps of each window lasted longer than its plan had said; 0.03: 3 per cent.

    The steps are those of its ticks and the one after, behind which the closing tick's copies leave. The
    plan's stall is not counted. What a saver does not plan, it has no figure for.
    """
    usual = median(segment["plain_step_seconds"])
    first = segment["every"] - segment["every"] // 2
    found = []
    for save in segment["saves"]:
        steps = range(save["step"] - save["window"] + 1, save["step"] + 2)
        if save["planned"] is None or steps[0] < first or steps[-1] >= first + len(segment["step_seconds"]):
            continue
        seconds = sum(segment["step_seconds"][step - first] for step in steps)
        found.append((seconds - save["planned"]) / (usual * len(steps)) - 1)
    return found


def show(rows: list[dict[str, Any]], segment: dict[str, Any], tokens: int) -> None:
    """Print the table."""
    print(
        f"{segment['parameters'] / 1e6:.1f} M parameters, state {megabytes(segment['state_bytes'])}, "
        f"{tokens} tokens per step"
    )
    header = ["saver", "every", "saves", "window", "tokens/s", "vs none", "range", "beyond stall"]
    header += ["exposed/save", "extra/save", "in the window", "durable after", "peak RSS"]
    print(table(header, [cells(row) for row in rows]))


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row as text."""

    def seconds(name: str) -> str:
        return "-" if row[name] is None else f"{1e3 * row[name]:.1f} ms"

    low, high = row["vs_none_range"]
    return [
        row["saver"],
        "-" if row["every"] is None else str(row["every"]),
        "-" if not row["due"] else f"{row['saves']} of {row['due']}",
        "-" if row["window"] is None else f"{row['window']:.0f}",
        f"{row['tokens_per_second']:.0f}",
        f"{row['vs_none']:.3f}",
        f"{low:.3f}-{high:.3f}",
        f"{row['vs_none_beyond_stall']:.3f}",
        seconds("exposed_seconds_per_save"),
        seconds("extra_seconds_per_save"),
        "-" if row["window_slowdown"] is None else f"{100 * row['window_slowdown']:+.1f} %",
        seconds("durable_seconds"),
        f"+{megabytes(row['peak_growth_bytes'])}",
    ]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=int, help="about this many parameters (default: about 10 million)")
    parser.add_argument("--batch", type=int, help="sequences per step")
    parser.add_argument("--context", type=int, help="tokens per sequence")
    parser.add_argument("--rounds", type=int, help="default: 5; quick: 1")
    parser.add_argument("--steps", type=int, help="timed steps per segment (default: 50; quick: 20)")
    parser.add_argument(
        "--every", type=int, nargs="+", help="steps between saves (default: 10 50; quick: 10)"
    )
    parser.add_argument("--only", nargs="+", metavar="PART", help="only savers with this in their name")
    parser.add_argument(
        "--worker",
        nargs="+",
        choices=("thread", "process"),
        default=["thread"],
        help="where gockpt's background runs; both are compared in one run (default: thread)",
    )
    parser.add_argument("--threads", type=int, help="for torch (default: the usable cores; quick: 1)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="what trains (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the parameters (default: %(default)s)",
    )
    parser.add_argument(
        "--optimizer",
        choices=("fused", "foreach"),
        default="fused",
        help="which of AdamW's implementations (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: %(default)s)")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where to save (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all samples; '-' is standard output")
    parser.add_argument("--quick", action="store_true", help="a toy in seconds: shows that it runs, no more")
    wanted = parser.parse_args()
    wanted.rounds = wanted.rounds or (1 if wanted.quick else 5)
    wanted.steps = wanted.steps or (20 if wanted.quick else 50)
    wanted.threads = wanted.threads or (1 if wanted.quick else min(8, cores()))
    wanted.every = sorted(set(wanted.every or ([10] if wanted.quick else [10, 50])))
    if wanted.steps < max(wanted.every):
        parser.error(
            f"--steps {wanted.steps} is less than --every {max(wanted.every)}: nothing would be saved"
        )
    return wanted


if __name__ == "__main__":
    main()
