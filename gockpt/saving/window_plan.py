"""The plan of a save: what it is made from, looked up where the state stands."""

from __future__ import annotations

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
    from gockpt.staging.host_stager import Transfer
    from gockpt.state.live_state import LiveState

__all__ = ["plan_for"]


def plan_for(
    live: LiveState,
    shape: Shape,
    *,
    ticks: int,
    options: Options,
    pace: Pace,
    excluded: frozenset[str],
    memory: Memory,
    transfer: Transfer,
) -> Plan:
    """Return the plan for a save whose closing tick is ``ticks - 1`` ticks away.

    State on a device leaves early only if its gradients can be copied, too. Where they can't be yet, that is
    set up behind the caller, and this plan does without.

    Args:
        live: The state.
        shape: Its geometry.
        ticks: Ticks there are.
        options: The options of the writer.
        pace: Measured rates.
        excluded: Parameters whose replay is not trusted.
        memory: Where the stagers and the arenas are.
        transfer: What is slow is done behind it.
    """
    device = memory.device_stager(live)
    on_device = None if device is None else device.holds
    why = memory.obstacle(live)
    measured = (pace.step_seconds, pace.copy_rate, options.grad_dtype)
    facts = facts_of(live, shape, excluded, *measured, on_device=on_device, stay=None, obstacle=why)
    plan = make_plan(facts, window=options.window, ticks=ticks)
    if device is None or not facts.device_replay_bytes:
        return plan
    if plan.window > 1:
        # Room for the longest window too, or the ring would be made twice when the first one is cut short.
        longest = make_plan(facts, window=options.window, ticks=MAX_WINDOW)
        plans = [plan] if longest.window == plan.window else [plan, longest]
        most = memory.device_elements(device)
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
        why = memory.reach(device, shape, list(zip(cuts, plans, strict=True)), transfer)
    else:
        why = memory.hindrance(device)
    if why is None:
        return plan
    facts = facts_of(live, shape, excluded, *measured, on_device=on_device, stay=why, obstacle=why)
    return make_plan(facts, window=options.window, ticks=ticks)
