"""What the demo prints: a progress bar while a process trains, a line per save, and what was shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness import megabytes
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from demo_claims import Claim

__all__ = ["Screen", "Stage"]


class Screen:
    """The terminal; a quiet one prints nothing."""

    def __init__(self, *, quiet: bool) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, text: str = "") -> None:
        """Print a line."""
        self.console.print(text, markup=False)

    def title(self, text: str) -> None:
        """Print what comes next."""
        self.console.print()
        self.console.print(text, style="bold", markup=False)

    def claims(self, claims: Sequence[Claim]) -> None:
        """Print every claim with whether it holds."""
        for claim in claims:
            mark, style = ("✓", "green") if claim.holds else ("✗", "bold red")
            self.console.print(f"  {mark} {claim.text}", style=style, markup=False)


class Stage:
    """Shows one training process: give it every event, inside a ``with`` block."""

    def __init__(self, screen: Screen, steps: int, *, introduce: bool) -> None:
        self._screen = screen
        self._bar = Progress(
            TextColumn("  step {task.completed:>3.0f} of {task.total:.0f}"),
            BarColumn(16),
            TextColumn("{task.description}"),
            console=screen.console,
            disable=not screen.console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=steps)
        self._introduce = introduce
        self._training = ""
        self._saving = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._saving = ""
        self._describe()
        self._bar.stop()

    def event(self, event: dict[str, Any]) -> None:
        """Show one event."""
        show = getattr(self, f"_{event['event']}", None)
        if show is not None:
            show(event)
        self._describe()

    def _ready(self, event: dict[str, Any]) -> None:
        if self._introduce:
            self._screen.say(
                f"  a GPT with {event['parameters'] / 1e6:.1f} M parameters reads Python's standard library: "
                f"{megabytes(event['corpus_bytes'])}, {event['tokens_per_step']} bytes per step"
            )

    def _resumed(self, event: dict[str, Any]) -> None:
        self._bar.update(self._task, completed=event["step"])
        self._screen.say(f"  resumed from step {event['step']}")

    def _step(self, event: dict[str, Any]) -> None:
        loss = float.fromhex(event["loss"])
        self._training = f"loss {loss:.3f}, {1e3 * event['seconds']:.0f} ms"
        self._bar.update(self._task, completed=event["step"])

    def _progress(self, event: dict[str, Any]) -> None:
        share = 100 * event["done"] / max(1, event["total"])
        words = {"open": "leaving (window open)", "closing": "leaving", "captured": "replay, writing"}
        phase = words.get(event["phase"])
        self._saving = f", save of {event['due']}: {share:.0f} % {phase}" if phase else ""

    def _waited(self, event: dict[str, Any]) -> None:
        if event["seconds"] > 0.01:
            self._screen.say(
                f"  after step {event['step']} the demo waited {1e3 * event['seconds']:.0f} ms for that save"
            )

    def _saved(self, event: dict[str, Any]) -> None:
        exact = "exact to the bit" if event["exact"] else "NOT exact"
        exposed, hidden = 1e3 * event["exposed_seconds"], 1e3 * event["hidden_seconds"]
        self._screen.say(
            f"  saved step {event['step']:>3}: {megabytes(event['nbytes'])} over {event['window']} steps, "
            f"{exposed:.0f} ms exposed, {hidden:.0f} ms hidden, {exact}"
        )

    def _failed(self, event: dict[str, Any]) -> None:
        self._screen.say(f"  the save of step {event['step']} FAILED: {event['why']}")

    def _holding(self, event: dict[str, Any]) -> None:
        self._screen.say(
            f"  after step {event['step']}, inside the window of the save of step {event['due']} "
            f"({megabytes(event['done'])} of {megabytes(event['total'])} have left): SIGKILL"
        )

    def _describe(self) -> None:
        self._bar.update(self._task, description=self._training + self._saving)
