"""Schedule of saves: the due ticks and the distance to the next one, as pure arithmetic on the user's steps.

A save is due when ``step // every`` grows, so a loop whose step skips multiples of ``every`` still saves, and
step 0 is not due. With ``every=1`` each call asks for *this* state: every call is due, whatever its step. The
stride between ticks is learned, so that a window can start early enough to end on the due tick.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Cadence", "Moment"]


@dataclass(frozen=True, slots=True)
class Moment:
    """One tick's place in the schedule.

    Attributes:
        due: A save is due at this very tick.
        ticks_left: Ticks from this one to the next due one; 0 if this one is due.
    """

    due: bool
    ticks_left: int


@dataclass(frozen=True, slots=True)
class Cadence:
    """The run's place in the schedule.

    Attributes:
        every: Steps from one due save to the next, at least 1.
        last_step: The step of the last tick; ``None`` before the first.
        stride: Steps between the last two ticks; 1 until two were seen.
    """

    every: int
    last_step: int | None = None
    stride: int = 1

    def tick(self, step: int) -> tuple[Cadence, Moment]:
        """Return the cadence after a tick at ``step``, and the tick's place in the schedule.

        A step below the last one (a run resumed in the same process) starts the schedule again.

        Examples:
            >>> c, m = Cadence(100).tick(97)
            >>> m
            Moment(due=False, ticks_left=3)
            >>> c.tick(100)[1]
            Moment(due=True, ticks_left=0)
        """
        last, stride = self.last_step, self.stride
        if last is None or step < last:
            last = max(step - 1, 0)
            stride = 1 if self.last_step is None else stride
        elif step > last:
            stride = step - last
        due = self.every == 1 or step // self.every > last // self.every
        following = (step // self.every + 1) * self.every
        left = 0 if due else -(-(following - step) // stride)
        return Cadence(self.every, step, stride), Moment(due, left)
