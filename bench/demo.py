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
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

from demo_claims import claims
from demo_runs import Run, Settings, train
from demo_show import Screen, Stage
from gpt import SIZES
from harness import cores, machine_facts, write_json

MARK = ".made-by-the-gockpt-demo"
"""Stands in a directory that the demo may empty."""

DEFAULTS = {
    # One thread: threads that wait for each other suffer most on a busy machine, and tests may be.
    "tiny": {"steps": 60, "corpus_bytes": 1_000_000, "threads": 1},
    "10m": {"steps": 100, "corpus_bytes": None, "threads": min(8, cores())},
}


def main() -> int:
    arguments = parsed()
    directory = prepared(Path(arguments.dir))
    settings = chosen(arguments, directory)
    screen = Screen(quiet=arguments.json == "-")
    facts = machine_facts(directory)
    versions = facts["versions"]
    began = perf_counter()
    screen.say(
        f"gockpt {versions['gockpt']}, torch {versions['torch']}, {facts['cpu']}, "
        f"{settings.threads} threads, {facts['filesystem']}"
    )

    def stage(title: str, *options: str, save: bool = True) -> Run:
        screen.title(title)
        with Stage(screen, settings.steps, introduce=not save) as shown:
            return train(settings, *options, save=save, show=shown.event)

    reference = stage(f"1. The reference: {settings.steps} steps, no saving, never interrupted", save=False)
    how = f"a save every {settings.every} steps, each spread over {settings.window}"
    killed = stage(f"2. The same, {how}; killed inside one", "--hold-at", str(settings.killed_at))
    left_behind = sorted(path.name for path in settings.checkpoints.glob("step-*"))
    screen.say(f"  on disk now: {', '.join(left_behind) or 'nothing'}")
    resumed = stage("3. A new process resumes from the newest complete checkpoint", "--resume")

    screen.title("What was shown")
    checked = claims(settings, reference, killed, resumed)
    well = all(claim.holds for claim in checked)
    seconds = perf_counter() - began
    screen.claims(checked)
    screen.say(f"\n{'All of it holds' if well else 'NOT ALL OF IT HOLDS'}; {seconds:.0f} seconds in all.")
    screen.say(f"The checkpoints stay in {settings.checkpoints}; gockpt.open() and zarr read them.")
    if arguments.json:
        summary = {
            "demo": "train, kill, resume, compare",
            "ok": well,
            "claims": [asdict(claim) for claim in checked],
            "seconds": seconds,
            "machine": facts,
            "settings": {**asdict(settings), "checkpoints": str(settings.checkpoints)},
            "left_behind": left_behind,
            "runs": {
                "reference": asdict(reference),
                "killed": asdict(killed),
                "resumed": asdict(resumed),
            },
        }
        write_json(arguments.json, summary)
    return 0 if well else 1


def chosen(arguments: argparse.Namespace, directory: Path) -> Settings:
    """Return what to do, or say why it makes no sense and exit."""
    defaults = DEFAULTS[arguments.size]
    steps, every, window = arguments.steps or defaults["steps"], arguments.every, arguments.window
    if not 2 <= window <= every // 2:
        sys.exit(f"--window {window}: from 2 steps to half of --every {every}")
    if steps % every or steps < 2 * every:
        sys.exit(f"--steps {steps}: a multiple of --every {every}, twice it or more")
    return Settings(
        size=arguments.size,
        steps=steps,
        every=every,
        window=window,
        threads=arguments.threads or defaults["threads"],
        corpus_bytes=defaults["corpus_bytes"],
        checkpoints=directory / "checkpoints",
    )


def prepared(directory: Path) -> Path:
    """Return an empty directory; only one that the demo made is ever emptied."""
    if directory.exists() and any(directory.iterdir()):
        if not (directory / MARK).exists():
            sys.exit(f"{directory} is not empty and was not made by this demo; name another with --dir")
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARK).touch()
    return directory.resolve()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="10m", help="of the model (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of the uninterrupted run (default: 100; tiny: 60)")
    parser.add_argument("--every", type=int, default=20, help="steps between saves (default: %(default)s)")
    parser.add_argument("--window", type=int, default=4, help="steps of one save (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="for torch (default: the usable cores; tiny: 1)")
    parser.add_argument("--dir", default="demo-run", help="where to work (default: ./%(default)s)")
    parser.add_argument(
        "--json", metavar="FILE", help="write a summary; '-' is standard output, and nothing else is printed"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
