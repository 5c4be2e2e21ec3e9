"""The plan of a save: what it is made from, looked up where the state stands."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gockpt.options import MAX_WINDOW
from gockpt.planning.planner import make_plan
from gockpt.saving.facts import facts_of
from gockpt.saving.write_items import cut

if TYPE_CHECKING:
    from gockpt.options import Options
    from gockpt.planning.planner import Plan
    from gockpt.planning.rates import Pace
    from gockpt.saving.facts import Shape
    from gockpt.saving.memory import Memory
    from gockpt.staging.task_thread import TaskThread
    from gockpt.state.live_state import LiveState

__all__ = ["WindowPlanning"]


class WindowPlanning:
    """Makes the plans of one saver's saves."""

    def __init__(self, options: Options, pace: Pace, memory: Memory, tasks: TaskThread) -> None:
        """Plan with these options and measured rates; what is slow is done behind ``tasks``."""
        self._options = options
        self._pace = pace
        self._memory = memory
        self._tasks = tasks

    def plan_now(self, live: LiveState, shape: Shape, excluded: frozenset[str]) -> Plan:
        """Return the plan for a save whose closing tick is this one."""
        if self._options.window not in ("auto", 1):
            return self.plan(live, shape, 1, excluded)
        rates = (self._pace.step_seconds, self._pace.copy_rate)
        facts = shape.rough(*rates, self._options.grad_dtype)
        facts = replace(facts, obstacle=self._memory.obstacle(live))
        return make_plan(facts, window=self._options.window, ticks=1)

    def plan(self, live: LiveState, shape: Shape, ticks: int, excluded: frozenset[str]) -> Plan:
        """Return the plan for a save whose closing tick is ``ticks - 1`` ticks away.

        State on a device leaves early only if its gradients can be copied, too. Where they can't be yet,
        that is set up behind the caller, and this plan does without.

        Args:
            live: The state.
            shape: Its geometry.
            ticks: Ticks there are.
            excluded: Parameters whose replay is not trusted.
        """
        device = self._memory.device_stager(live)
        on_device = None if device is None else device.holds
        why = self._memory.obstacle(live)
        measured = (self._pace.step_seconds, self._pace.copy_rate, self._options.grad_dtype)
        facts = facts_of(live, shape, excluded, *measured, on_device=on_device, stay=None, obstacle=why)
        plan = make_plan(facts, window=self._options.window, ticks=ticks)
        if device is None or not facts.device_replay_bytes:
            return plan
        if plan.window > 1:
            # Room for the longest window too, or the ring would be made twice if the first one is cut short.
            longest = make_plan(facts, window=self._options.window, ticks=MAX_WINDOW)
            plans = [plan] if longest.window == plan.window else [plan, longest]
            most = self._memory.device_elements(device)
            cuts = [
                cut(
                    live,
                    shape.layout,
                    window=p.window,
                    excluded=excluded,
                    on_device=on_device,
                    device_elements=most,
                )
                for p in plans
            ]
            why = self._memory.reach(device, shape, list(zip(cuts, plans, strict=True)), self._tasks)
        else:
            why = self._memory.hindrance(device)
        if why is None:
            return plan
        facts = facts_of(live, shape, excluded, *measured, on_device=on_device, stay=why, obstacle=why)
        return make_plan(facts, window=self._options.window, ticks=ticks)
