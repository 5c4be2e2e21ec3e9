"""Matching of saved wrappers around optimizers to live ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gockpt.loading.load_plan import WrapperPlan
from gockpt.state.optimizer_forms import adds_to_live

if TYPE_CHECKING:
    from gockpt.loading.load_plan import LoadPlan
    from gockpt.state.live_state import LiveState
    from gockpt.state.saved_document import SavedState

__all__ = ["fit_wrappers"]


def fit_wrappers(live: LiveState, saved: SavedState, plan: LoadPlan) -> None:
    """Match wrappers by their class, in order, and add each one's form or difference to a plan.

    A wrapper that adds nothing to the state of the optimizers in it may be absent on either side. Call this
    after the optimizers have been matched.
    """
    groups = {one.index: one.groups for one in plan.optimizers}
    left = list(saved.wrappers or ())
    for entry in live.wrappers:
        if not entry.own:
            continue
        kind = _class(entry.kind)
        found = next((one for one in left if _class(one.kind) == kind), None)
        if found is not None:
            left.remove(found)
            orders = [groups.get(index, [None]) for index in entry.inside]
            if any(order != [*range(len(order))] for order in orders):
                # Its form may hold theirs, and only it could separate them.
                plan.mismatched.append(
                    f"optimizer wrapper {kind}: the optimizers in it do not fit as they are"
                )
            else:
                plan.wrappers.append(WrapperPlan(entry, found.form))
        elif saved.wrappers is None:
            plan.untold.append(f"state of {entry.kind}: the checkpoint is of a version that did not save it")
        elif adds_to_live(entry, live):
            plan.missing.append(f"optimizer wrapper {kind}")
    plan.unexpected += [f"optimizer wrapper {_class(one.kind)}" for one in left if one.adds]


def _class(kind: str) -> str:
    return kind.rpartition(".")[2]
