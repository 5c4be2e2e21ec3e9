"""Plan of a save: its distribution over a window, as pure arithmetic without tensors or clocks.

Symbols: ``s`` state bytes, ``g`` bytes of one full gradient, ``r = g/s``, ``T`` seconds of one
step, ``B`` bytes per second off the device, ``x = s/(B*T)``: steps that the bare copy takes.

Each step of a window first sends the gradients that are due and fills the rest of its byte budget
``C`` with state, so parts shrink geometrically by ``1 - r``: after N steps ``(C/r)(1 - (1-r)^N)``
bytes of state have left. The smallest N that hides the copy is ``ln(1 - r*x) / ln(1 - r)``; it exists
only while ``x < 1/r``. (The equal parts and the fixed window of GoCkpt, arXiv 2511.07035 section 4.2,
are a special case that is optimal only for r = 1/7.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gockpt.options import MAX_WINDOW

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Facts", "Plan", "choose_every", "make_plan", "part_ranges"]

RING_GRADIENTS = 2
"""Full gradients that the ring holds at most: one being replayed, one arriving."""
DEVICE_GRADIENTS = 3
"""The same for a device: one more may be queued there."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Sizes and measured rates that a plan is computed from.

    Attributes:
        state_bytes: All bytes of the checkpoint that are copied (s).
        replay_bytes: The part of them whose later steps can be replayed.
        grad_bytes: Bytes of one full gradient of the replayable parameters (g).
        step_seconds: Measured seconds from tick to tick (T); ``None`` before two ticks.
        bytes_per_second: Measured copy rate (B); ``None`` before the first copy.
        device_bytes: Bytes of the state on a device that are copied in the background.
        device_replay_bytes: The part of them whose later steps can be replayed.
        obstacle: Why state on a device is not copied in the background, or not early; else ``None``.
    """

    state_bytes: int
    replay_bytes: int
    grad_bytes: int
    step_seconds: float | None = None
    bytes_per_second: float | None = None
    device_bytes: int = 0
    device_replay_bytes: int = 0
    obstacle: str | None = None

    @property
    def ratio(self) -> float:
        """r: gradient bytes per byte of state that was already copied."""
        return self.grad_bytes / self.replay_bytes if self.replay_bytes else 0.0

    @property
    def load(self) -> float | None:
        """x: steps that the bare copy takes; ``None`` while unmeasured."""
        if not self.step_seconds or not self.bytes_per_second:
            return None
        return self.state_bytes / (self.bytes_per_second * self.step_seconds)


@dataclass(frozen=True, slots=True)
class Plan:
    """Plan of one save, with its reason.

    Attributes:
        window: Ticks of the window, N. With 1, everything is copied behind the next forward and backward.
        shares: For each part but the last, its share of the replayable bytes; the rest, and everything that
            can't be replayed, is copied at the closing tick.
        ring_bytes: Size of the ring of gradients that wait for replay.
        facts: The facts it was computed from.
        reason: The reason for this window, in one sentence.
        device_copies: How state on a device is copied in the background; ``None`` if none is.
    """

    window: int
    shares: tuple[float, ...]
    ring_bytes: int
    facts: Facts
    reason: str
    device_copies: str | None = None

    @property
    def stall_seconds(self) -> float | None:
        """Seconds by which copies that are not done in time lengthen the window's steps.

        ``None`` while step time or copy rate are not measured. The time of the ticks themselves is left out.
        """
        f = self.facts
        if not f.step_seconds or not f.bytes_per_second:
            return None
        stall = left = 0.0
        for share in (*self.shares, None):
            gradients = left * f.ratio
            state = f.state_bytes - left if share is None else share * f.replay_bytes
            stall += max(0.0, (gradients + state) / f.bytes_per_second - f.step_seconds)
            left += state
        return stall

    def explain(self) -> str:
        """Return the plan as a few readable lines."""
        f = self.facts
        load = "not measured yet" if f.load is None else f"{f.load:.3g} steps"
        lines = [
            f"window: {self.window} step{'s' if self.window > 1 else ''}: {self.reason}",
            f"state: {_mb(f.state_bytes)}, of which {_mb(f.replay_bytes)} can be replayed",
            f"one gradient: {_mb(f.grad_bytes)} (r = {f.ratio:.3f}); the bare copy takes {load}",
            f"gradient ring: {_mb(self.ring_bytes)}",
        ]
        if self.shares:
            rest = 1.0 - sum(self.shares)
            parts = " + ".join(f"{100 * share:.0f} %" for share in (*self.shares, rest))
            lines.append(f"parts of the replayable state: {parts}")
        if self.stall_seconds is not None:
            lines.append(f"steps wait for copies: {1e3 * self.stall_seconds:.1f} ms in all")
        if self.device_copies is not None:
            lines.append(f"off the device: {self.device_copies}")
        if f.device_bytes:
            lines.append(
                f"on the device: {_mb(f.device_bytes)}, of which {_mb(f.device_replay_bytes)} can leave "
                "early, followed by gradients, and be replayed"
            )
        return "\n".join(lines)


def make_plan(facts: Facts, *, window: int | Literal["auto"], ticks: int) -> Plan:
    """Return the plan for a save whose closing tick is ``ticks - 1`` ticks away.

    Args:
        facts: Sizes and measured rates.
        window: The forced window, or ``"auto"``.
        ticks: Number of available ticks, with the closing one; a longer window is cut to it.

    Raises:
        ValueError: If ``ticks`` is below 1.
    """
    if ticks < 1:
        msg = f"a window needs at least one tick, got {ticks}"
        raise ValueError(msg)
    wanted, reason = (window, "asked for") if window != "auto" else _auto_window(facts)
    if not facts.replay_bytes and wanted > 1:
        wanted, reason = 1, "nothing can be replayed, so all of it leaves at the closing step"
    if wanted > ticks:
        wanted, reason = ticks, f"{reason}; cut from {wanted}: the due step is only {ticks - 1} ticks away"
    if wanted == 1 and window != 1 and facts.obstacle is not None:
        reason = f"{reason}; {facts.obstacle}"
    shares = _shares(facts, wanted)
    ring = 0
    if wanted > 1:
        gradients = min(DEVICE_GRADIENTS if facts.device_replay_bytes else RING_GRADIENTS, wanted - 1)
        ring = math.ceil(gradients * facts.grad_bytes * min(1.0, sum(shares)))
    return Plan(wanted, shares, ring, facts, reason)


def _auto_window(facts: Facts) -> tuple[int, str]:
    load, ratio = facts.load, facts.ratio
    if load is None:
        return 1, "step time and copy rate are not measured yet"
    if load <= 1.0:
        return 1, "one step hides the whole copy"
    if ratio <= 0.0:
        return 1, "nothing can be replayed, so all of it leaves at the closing step"
    best = max(1, round(1.0 / ratio + 0.5))
    if ratio * load < 1.0 and ratio < 1.0:
        exact = math.ceil(math.log(1.0 - ratio * load) / math.log(1.0 - ratio))
        if exact <= MAX_WINDOW:
            return max(1, exact), "the fewest steps that hide the copy and the gradients after it"
    return min(best, MAX_WINDOW), "no window hides all; this one leaves the smallest stall (N = 1/r + 1/2)"


def _shares(facts: Facts, window: int) -> tuple[float, ...]:
    """Return the share of replayable bytes for every part but the last.

    All steps have the same budget: C bytes of state and gradients together. The last step's budget first
    takes the bytes that can't be replayed; the last replayable part gets the remainder.
    """
    if window <= 1:
        return ()
    ratio = facts.ratio
    fixed = max(0, facts.state_bytes - facts.replay_bytes)
    last = window - 1
    # C from: replayable + fixed = sum of C(1-r)^k over all N steps.
    sent = sum((1.0 - ratio) ** k for k in range(window))
    budget = (facts.replay_bytes + fixed) / sent
    if fixed > budget * (1.0 - ratio) ** last:
        budget = facts.replay_bytes / sum((1.0 - ratio) ** k for k in range(last))
    return tuple(budget * (1.0 - ratio) ** k / facts.replay_bytes for k in range(last))


def part_ranges(sizes: Sequence[int], shares: Sequence[float]) -> list[range]:
    """Cut a sequence of pieces into consecutive parts of about the given shares.

    Args:
        sizes: Bytes of every piece, in the order in which they are copied.
        shares: Share of the total for every part but the last.

    Returns:
        ``len(shares) + 1`` ranges of piece indices: disjoint, in order, together all pieces.

    Examples:
        >>> part_ranges([1] * 10, [0.5, 0.3])
        [range(0, 5), range(5, 8), range(8, 10)]
    """
    total = sum(sizes)
    ranges = []
    start = 0
    filled = 0
    target = 0.0
    for share in shares:
        target += share * total
        stop = start
        # A piece belongs to the part in which more than half of it falls.
        while stop < len(sizes) and filled + sizes[stop] / 2 <= target:
            filled += sizes[stop]
            stop += 1
        ranges.append(range(start, stop))
        start = stop
    ranges.append(range(start, len(sizes)))
    return ranges


def choose_every(
    *, stall_seconds: float, step_seconds: float, durable_seconds: float, overhead: float
) -> int:
    """Return the shortest interval in steps that keeps saving within its share of the run.

    The interval is never shorter than the time one save takes to be durable, since one save is in
    flight at a time.

    Args:
        stall_seconds: Exposed seconds of one save.
        step_seconds: Seconds of one step without saving.
        durable_seconds: Seconds from the start of a save until it is durable.
        overhead: Largest share of training time.

    Examples:
        >>> choose_every(stall_seconds=0.02, step_seconds=0.1, durable_seconds=0.5, overhead=0.01)
        20
    """
    if step_seconds <= 0:
        return 1
    by_stall = math.ceil(stall_seconds / (overhead * step_seconds) - 1e-9)
    by_disk = math.ceil(durable_seconds / step_seconds)
    return max(1, by_stall, by_disk)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
