"""What happened when during one save: spans by lane, and the figures made from them."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from time import perf_counter

__all__ = ["Span", "Trace"]


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of time in one lane.

    Attributes:
        lane: ``"stall"`` (training waits), ``"copy"``, ``"replay"``, ``"write"`` or ``"commit"``.
        start: Seconds since the save began.
        end: Seconds since the save began.
        step: The user's step during it, for stalls; ``None`` in the background.
        what: What it was, for people.
    """

    lane: str
    start: float
    end: float
    step: int | None = None
    what: str = ""


class Trace:
    """Collects spans. Thread-safe."""

    def __init__(self, began: float | None = None) -> None:
        """Start at ``began``, in ``perf_counter`` seconds; now by default."""
        self.began = perf_counter() if began is None else began
        self._spans: list[Span] = []
        self._lock = threading.Lock()

    def span(self, lane: str, start: float, end: float, *, step: int | None = None, what: str = "") -> None:
        """Record a span given in ``perf_counter`` seconds."""
        with self._lock:
            self._spans.append(Span(lane, start - self.began, end - self.began, step, what))

    def spans(self) -> tuple[Span, ...]:
        """Return what was recorded so far, by start time."""
        with self._lock:
            return tuple(sorted(self._spans, key=lambda s: s.start))

    def seconds(self, lane: str) -> float:
        """Return the total seconds of one lane; threads that overlap add up."""
        with self._lock:
            return sum(s.end - s.start for s in self._spans if s.lane == lane)
