"""Start the demo's training processes, and gather what they report."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Run", "Settings", "train"]

SILENCE_SECONDS = 300
"""A child that reports nothing for this long is taken to hang."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the demo does.

    Attributes:
        size: Name of the model's size.
        steps: Training steps of an uninterrupted run.
        every: Steps from one save to the next.
        window: Steps that one save is spread over.
        threads: Threads that torch computes with, the same in every process.
        corpus_bytes: Use only the beginning of the corpus; ``None`` uses all.
        checkpoints: Where checkpoints are saved.
        weight: Name of the parameter of which a slice is read back.
        rows: First row of that slice, and the one after the last.
    """

    size: str
    steps: int
    every: int
    window: int
    threads: int
    corpus_bytes: int | None
    checkpoints: Path
    weight: str = "blocks.1.up.weight"
    rows: tuple[int, int] = (8, 12)

    @property
    def killed_due(self) -> int:
        """The save that is interrupted: the one in the middle, never the first."""
        return self.every * max(2, (self.steps // self.every + 1) // 2)

    @property
    def killed_at(self) -> int:
        """The step after which the process is killed: half of the window's steps were taken."""
        return self.killed_due - self.window // 2

    @property
    def resumed_from(self) -> int:
        """The newest checkpoint that is complete by then."""
        return self.killed_due - self.every

    def due_steps(self, first: int, last: int) -> list[int]:
        """Return the steps to be saved from step ``first`` to step ``last``."""
        return [step for step in range(first, last + 1) if step % self.every == 0]


@dataclass(slots=True)
class Run:
    """What one training process reported.

    Attributes:
        losses: Loss of each step, as the hexadecimal form of the float: equal text is equal bits.
        saves: One dictionary of facts per published checkpoint.
        events: Every other event by name; the newest of each.
        status: Exit status; negative is the signal that ended it.
    """

    losses: dict[int, str] = field(default_factory=dict)
    saves: list[dict[str, Any]] = field(default_factory=list)
    events: dict[str, dict[str, Any]] = field(default_factory=dict)
    status: int | None = None

    def take(self, event: dict[str, Any]) -> None:
        """Note one event."""
        name = event["event"]
        if name == "step":
            self.losses[event["step"]] = event["loss"]
        elif name == "saved":
            self.saves.append(event)
        else:
            self.events[name] = event


def train(settings: Settings, *options: str, save: bool, show: Callable[[dict[str, Any]], None]) -> Run:
    """Run one training process to its end, or kill it when it reports that it holds inside a window.

    Args:
        settings: What to train.
        options: Further options of ``demo_train.py``.
        save: Whether it is given the directory of checkpoints.
        show: Called with every event.

    Raises:
        TimeoutError: If the process reports nothing for minutes; it is killed.
    """
    reading, writing = os.pipe()
    command = [sys.executable, str(Path(__file__).with_name("demo_train.py"))]
    command += ["--events", str(writing), "--size", settings.size, "--steps", str(settings.steps)]
    command += ["--threads", str(settings.threads), "--slice-of", settings.weight]
    command += ["--slice-rows", *map(str, settings.rows)]
    command += ["--every", str(settings.every), "--window", str(settings.window)]
    if settings.corpus_bytes is not None:
        command += ["--corpus-bytes", str(settings.corpus_bytes)]
    if save:
        command += ["--checkpoints", str(settings.checkpoints)]
    # Threads that spin while they wait for each other make a step many times slower on a busy machine.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    # Its standard input is a pipe that nothing is ever written to: reading from it is how it holds.
    with subprocess.Popen(
        [*command, *options], pass_fds=(writing,), stdin=subprocess.PIPE, env=environment
    ) as process:
        os.close(writing)
        run = Run()
        try:
            for event in _events(reading):
                run.take(event)
                show(event)
                if event["event"] == "holding":
                    process.send_signal(signal.SIGKILL)
        except BaseException:
            process.kill()
            raise
        finally:
            os.close(reading)
        run.status = process.wait()
    return run


def _events(descriptor: int) -> Any:
    rest = b""
    while True:
        ready, _, _ = select.select([descriptor], [], [], SILENCE_SECONDS)
        if not ready:
            msg = f"the training process reported nothing for {SILENCE_SECONDS} seconds"
            raise TimeoutError(msg)
        data = os.read(descriptor, 1 << 16)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield json.loads(line)
