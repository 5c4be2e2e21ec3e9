"""Timeline of one save: spans by lane, and the durations computed from them."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from time import perf_counter

__all__ = ["Span", "Trace"]


@dataclass(frozen=True, slots=True)
class Span:
    """One period of time in one lane.

    Attributes:
        lane: ``"stall"`` (training waits), ``"copy"``, ``"replay"``, ``"write"`` or ``"commit"``.
        start: Seconds since the save began.
        end: Seconds since the save began.
        step: The user's step during it, for stalls; ``None`` in the background.
        what: A description for people.
    """

    lane: str
    start: float
    end: float
    step: int | None = None
    what: str = ""


class Trace:
    """Collector of spans. Thread-safe."""

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
        """Return the spans recorded so far, by start time."""
        with self._lock:
            return tuple(sorted(self._spans, key=lambda s: s.start))

    def seconds(self, lane: str) -> float:
        """Return the total seconds of one lane; overlapping spans of several threads add up."""
        with self._lock:
            return sum(s.end - s.start for s in self._spans if s.lane == lane)
