"""Measured rates of a run: seconds per step and bytes copied per second."""

from __future__ import annotations

from collections import deque
from statistics import median

__all__ = ["Pace"]

_WEIGHT = 0.3
_STEPS = 32


class Pace:
    """Rates that a plan and the interval between saves are computed from.

    Attributes:
        step_seconds: Seconds from the end of a tick to the next one, with no save under way at either: the
            median of the last 32, which the first steps and an evaluation between two of them don't
            change; ``None`` before two ticks.
        copy_rate: Bytes per second into the arena; ``None`` before the first save.
    """

    def __init__(self) -> None:
        self.step_seconds: float | None = None
        self.copy_rate: float | None = None
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._left: float | None = None

    def tick(self, now: float, *, idle: bool) -> None:
        """Note that a tick begins at ``now``, and whether no save is under way."""
        if self._left is not None and idle:
            self._steps.append(now - self._left)
            self.step_seconds = median(self._steps)
        self._left = None

    def left(self, now: float, *, idle: bool) -> None:
        """Note that the tick ends at ``now``, and whether no save is under way."""
        self._left = now if idle else None

    def copied(self, nbytes: int, seconds: float) -> None:
        """Note that ``nbytes`` were copied in ``seconds``."""
        if nbytes and seconds > 0:
            rate = nbytes / seconds
            self.copy_rate = rate if self.copy_rate is None else _average(self.copy_rate, rate)


def _average(old: float, new: float) -> float:
    return (1 - _WEIGHT) * old + _WEIGHT * new
