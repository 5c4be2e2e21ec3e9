"""What the demo claims, each claim checked against what the processes reported and what the disk holds."""

from __future__ import annotations

from dataclasses import dataclass
from signal import SIGKILL
from typing import TYPE_CHECKING

import numpy as np
import zarr
from zarr.storage import ZipStore

import gockpt

if TYPE_CHECKING:
    from demo_runs import Run, Settings

__all__ = ["Claim", "claims"]


@dataclass(frozen=True, slots=True)
class Claim:
    """One thing that the demo shows.

    Attributes:
        name: Short, for programs.
        holds: Whether it was so.
        text: One plain sentence; what went wrong instead, if it did.
    """

    name: str
    holds: bool
    text: str


def claims(settings: Settings, reference: Run, killed: Run, resumed: Run) -> list[Claim]:
    """Return every claim, checked."""
    return [
        *_of_saving(settings, reference, killed, resumed),
        *_of_the_kill(settings, killed),
        *_of_resuming(settings, reference, resumed),
        *_of_the_files(settings, reference),
    ]


def _claim(name: str, wrong: str | None, text: str) -> Claim:
    return Claim(name, wrong is None, text if wrong is None else f"NOT SO: {wrong}. Expected: {text}")


def _of_saving(settings: Settings, reference: Run, killed: Run, resumed: Run) -> list[Claim]:
    wrong = None
    saves = [*killed.saves, *resumed.saves]
    due = settings.due_steps(1, settings.killed_at) + settings.due_steps(
        settings.resumed_from + 1, settings.steps
    )
    if [save["step"] for save in saves] != due:
        wrong = f"the saves are of steps {[save['step'] for save in saves]}"
    for save in saves:
        if not save["exact"] or save["window"] != settings.window or save["attempts"] != 1:
            wrong = f"a save came out differently: {save}"
    complete = _claim(
        "saves",
        wrong,
        f"Every checkpoint holds exactly the step that was due, and left over {settings.window} steps.",
    )
    steps = range(1, settings.killed_at + 1)
    undisturbed = _claim(
        "undisturbed",
        _unequal(reference, killed, steps),
        f"Saving changed nothing: the {len(steps)} losses up to the kill equal those of the run without it.",
    )
    return [complete, undisturbed]


def _of_the_kill(settings: Settings, killed: Run) -> list[Claim]:
    held = killed.events.get("holding", {})
    wrong = None
    if killed.status != -SIGKILL:
        wrong = f"the process ended with status {killed.status}"
    elif (held.get("step"), held.get("due"), held.get("phase")) != (
        settings.killed_at,
        settings.killed_due,
        "open",
    ):
        wrong = f"it was killed here: {held}"
    return [
        _claim(
            "killed",
            wrong,
            f"SIGKILL hit after step {settings.killed_at}, inside the window of the save of step "
            f"{settings.killed_due}.",
        )
    ]


def _of_resuming(settings: Settings, reference: Run, resumed: Run) -> list[Claim]:
    found = resumed.events.get("resumed", {})
    wrong = None
    if resumed.status != 0:
        wrong = f"the resumed process ended with status {resumed.status}"
    elif found.get("step") != settings.resumed_from or found["missing"] or found["unexpected"]:
        wrong = f"it resumed so: {found}"
    newest = _claim(
        "resumed",
        wrong,
        f"The third process went on from step {settings.resumed_from}, the newest complete checkpoint: "
        "weights, optimizer, schedule, loader and random states.",
    )
    steps = range(settings.resumed_from + 1, settings.steps + 1)
    losses = _claim(
        "losses",
        _unequal(reference, resumed, steps),
        f"All {len(steps)} losses after the resume equal those of the uninterrupted run, bit for bit.",
    )
    ends = [run.events.get("final", {}).get("digest") for run in (reference, resumed)]
    wrong = None if ends[0] is not None and ends[0] == ends[1] else f"the digests are {ends}"
    text = (
        "At the last step every weight and every optimizer state equals the uninterrupted run's, bit for bit."
    )
    return [newest, losses, _claim("state", wrong, text)]


def _unequal(reference: Run, other: Run, steps: range) -> str | None:
    """Return where two runs' losses differ first, or ``None``."""
    for step in steps:
        pair = reference.losses.get(step), other.losses.get(step)
        if None in pair or pair[0] != pair[1]:
            return f"the losses of step {step} are {pair[0]} and {pair[1]}"
    return None


def _of_the_files(settings: Settings, reference: Run) -> list[Claim]:
    name = f"model/{settings.weight}"
    first, stop = settings.rows
    sound = f"Each byte of the newest checkpoint, step {settings.steps}, matches its checksums."
    same = (
        f"{name}[{first}:{stop}] is the same numbers through gockpt.open, through plain zarr, "
        "and in the memory of the uninterrupted run."
    )
    try:
        report = gockpt.verify(settings.checkpoints)
        with gockpt.open(settings.checkpoints) as checkpoint:
            ours = checkpoint[name][first:stop].numpy()
            archive = checkpoint.metadata.path
        with ZipStore(archive, mode="r") as store:
            theirs = np.asarray(zarr.open_group(store, mode="r")[name][first:stop])
    except (gockpt.GockptError, OSError, KeyError) as error:
        why = f"{type(error).__name__}: {error}"
        return [_claim("verified", why, sound), _claim("slice", why, same)]
    damaged = None
    if not report.ok:
        damaged = f"damaged: {report.problems[0]}"
    elif report.step != settings.steps:
        damaged = f"the newest checkpoint is of step {report.step}"
    wrong = None
    if ours.tobytes() != theirs.tobytes() or ours.shape != theirs.shape:
        wrong = "the two read different values"
    elif ours.tobytes().hex() != reference.events.get("final", {}).get("part"):
        wrong = "the values are not those of the uninterrupted run"
    return [_claim("verified", damaged, sound), _claim("slice", wrong, same)]
