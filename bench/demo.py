"""Train a GPT, kill it in the middle of a save, resume, and prove that nothing changed.

    make demo                                  about two minutes on two cores
    python bench/demo.py --size tiny           a few seconds, on a toy

Three processes train the same model on the same text. The first is never interrupted and never saves.
The second saves every 20 steps, each save spread over a window of 4, and is killed by SIGKILL inside a
window. The third resumes from the newest complete checkpoint and goes on to the end. Then the losses are
compared bit for bit, and one slice of one tensor is read back. Exits with 1 if anything is not as promised.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

from demo_claims import claims
from demo_runs import Settings, train
from demo_show import Screen, Stage
from gpt import SIZES
from harness import cores, machine_facts, write_json

MARK = ".made-by-the-gockpt-demo"
"""Stands in a directory that the demo may empty."""

DEFAULTS = {
    "tiny": {"steps": 60, "corpus_bytes": 1_000_000},
    "10m": {"steps": 100, "corpus_bytes": None},
}


def main() -> int:
    arguments = parsed()
    directory = prepared(Path(arguments.dir))
    defaults = DEFAULTS[arguments.size]
    settings = Settings(
        size=arguments.size,
        steps=arguments.steps or defaults["steps"],
        every=arguments.every,
        window=arguments.window,
        threads=arguments.threads,
        corpus_bytes=defaults["corpus_bytes"],
        checkpoints=directory / "checkpoints",
    )
    check(settings)
    screen = Screen(quiet=arguments.json == "-")
    facts = machine_facts(directory)
    seconds: dict[str, float] = {}
    began = perf_counter()

    def lap(stage: str) -> None:
        seconds[stage] = perf_counter() - began - sum(seconds.values())

    screen.say(
        f"gockpt {facts['versions']['gockpt']}, torch {facts['versions']['torch']}, {facts['cpu']}, "
        f"{settings.threads} threads, {facts['filesystem']}"
    )
    screen.title(f"1. The reference: {settings.steps} steps, never interrupted, no saving")
    with Stage(screen, settings.steps) as stage:
        reference = train(settings, save=False, show=stage.event)
    lap("reference")

    screen.title(f"2. The same, saving every {settings.every} steps over a window of {settings.window}, until it is killed")
    with Stage(screen, settings.steps) as stage:
        killed = train(settings, "--hold-at", str(settings.killed_at), save=True, show=stage.event)
    lap("killed")
    left_behind = sorted(path.name for path in settings.checkpoints.glob("step-*"))
    screen.say(f"  on disk now: {', '.join(left_behind) or 'nothing'}")

    screen.title("3. A new process resumes from the newest complete checkpoint, and trains to the end")
    with Stage(screen, settings.steps) as stage:
        resumed = train(settings, "--resume", save=True, show=stage.event)
    lap("resumed")

    screen.title("What was shown")
    checked = claims(settings, reference, killed, resumed)
    lap("checks")
    screen.claims(checked)
    well = all(claim.holds for claim in checked)
    screen.say()
    screen.say(f"{'All of it holds' if well else 'NOT ALL OF IT HOLDS'}; {sum(seconds.values()):.0f} s in all.")
    screen.say(f'Look for yourself: python -c \'import gockpt; print(*gockpt.open("{settings.checkpoints}"), sep="\\n")\'')
    if arguments.json:
        write_json(
            arguments.json,
            {
                "demo": "train, kill, resume, compare",
                "ok": well,
                "claims": [asdict(claim) for claim in checked],
                "machine": facts,
                "settings": {**asdict(settings), "checkpoints": str(settings.checkpoints)},
                "saves": {"killed": killed.saves, "resumed": resumed.saves},
                "killed": {**killed.events.get("holding", {}), "status": killed.status, "on_disk": left_behind},
                "resumed": resumed.events.get("resumed", {}),
                "losses": {"reference": reference.losses, "killed": killed.losses, "resumed": resumed.losses},
                "seconds": seconds,
            },
        )
    return 0 if well else 1


def prepared(directory: Path) -> Path:
    """Return an empty directory; only one that the demo made is ever emptied."""
    if directory.exists() and any(directory.iterdir()):
        if not (directory / MARK).exists():
            sys.exit(f"{directory} is not empty and was not made by this demo; name another with --dir")
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARK).touch()
    return directory.resolve()


def check(settings: Settings) -> None:
    """Refuse settings for which the demo makes no sense."""
    if not 2 <= settings.window <= settings.every // 2:
        sys.exit(f"--window {settings.window}: from 2 steps to half of --every {settings.every}")
    if settings.steps % settings.every or settings.steps < 2 * settings.every:
        sys.exit(f"--steps {settings.steps}: a multiple of --every {settings.every}, twice it or more")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="10m", help="of the model (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of the uninterrupted run (default: 100; tiny: 60)")
    parser.add_argument("--every", type=int, default=20, help="steps between saves (default: %(default)s)")
    parser.add_argument("--window", type=int, default=4, help="steps of one save (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=min(8, cores()), help="for torch (default: %(default)s)")
    parser.add_argument("--dir", default="demo-run", help="where to work (default: ./%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write a summary; '-' is standard output, and nothing else is printed")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
