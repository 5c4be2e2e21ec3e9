"""Choice of the interval for ``every="auto"`` from the measured cost of saves: pure arithmetic.

A first save costs more than later ones: kernels are compiled, optimizers are tried on probes, memory is
touched for the first time; and again when a save is the first to be spread over a window. So the first save
of each kind is left out, three more are measured at short intervals, and the choice uses medians: a single
save that was delayed by the disk or the machine changes nothing.
"""

from __future__ import annotations

from collections import deque
from statistics import median_high
from typing import TYPE_CHECKING

from gockpt.planning.planner import choose_every

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["FIRST", "Interval"]

FIRST = 10
"""Steps between saves before an interval is chosen, unless a save takes longer to be durable."""

LEAST = 3
"""Saves of a kind that are measured before an interval is chosen."""

MOST = 7
"""Last saves of a kind that the medians are taken of."""


class Interval:
    """The steps between two saves, chosen again after each save.

    Attributes:
        every: The current interval.
    """

    def __init__(self, overhead: float) -> None:
        """Start with :data:`FIRST`; ``overhead`` is the largest share of training time that saves take."""
        self.every = FIRST
        self._overhead = overhead
        self._costs: dict[Hashable, deque[tuple[float, float]]] = {}
        self._chosen = False

    def saved(
        self, kind: Hashable, *, stall_seconds: float, durable_seconds: float, step_seconds: float
    ) -> int:
        """Record the cost of a save, and return the interval.

        Args:
            kind: Saves of one kind are compared with each other; the first one is left out.
            stall_seconds: Exposed seconds of the save.
            durable_seconds: Seconds from its start until it was durable.
            step_seconds: Seconds that a step without saving takes.
        """
        costs = self._costs.get(kind)
        if costs is None:
            self._costs[kind] = deque(maxlen=MOST)
            return self.every
        costs.append((stall_seconds, durable_seconds))
        stall = median_high(stall for stall, _ in costs)
        durable = median_high(durable for _, durable in costs)
        enough = len(costs) >= LEAST
        if enough or not self._chosen:
            self._chosen |= enough
            self.every = choose_every(
                stall_seconds=stall if enough else 0.0,
                step_seconds=step_seconds,
                durable_seconds=durable,
                overhead=self._overhead,
            )
            if not enough:
                self.every = max(FIRST, self.every)
        return self.every
