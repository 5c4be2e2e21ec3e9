"""How fast the run is: seconds per step and copy rate, measured as it goes."""

from __future__ import annotations

__all__ = ["Pace"]

_WEIGHT = 0.3


class Pace:
    """Running averages that a plan is made from.

    Attributes:
        step_seconds: Seconds from tick to tick without a save under way; ``None`` before two ticks.
        copy_rate: Bytes per second into the arena; ``None`` before the first save.
    """

    def __init__(self) -> None:
        self.step_seconds: float | None = None
        self.copy_rate: float | None = None
        self._last: float | None = None

    def tick(self, now: float, *, idle: bool) -> None:
        """Note a tick at ``now``; only steps without a save say what a step takes."""
        if self._last is not None and idle:
            self.step_seconds = _average(self.step_seconds, now - self._last)
        self._last = now

    def copied(self, nbytes: int, seconds: float) -> None:
        """Note that ``nbytes`` were copied in ``seconds``."""
        if nbytes and seconds > 0:
            self.copy_rate = _average(self.copy_rate, nbytes / seconds)


def _average(old: float | None, new: float) -> float:
    return new if old is None else (1 - _WEIGHT) * old + _WEIGHT * new
