"""Giving a live optimizer its saved options and states, without the casts of ``load_state_dict``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gockpt.filling import copy_into
from gockpt.fitting import Create, Fill, Value
from gockpt.unplain import decode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gockpt.filling import Filler
    from gockpt.fitting import OptimizerPlan

@dataclass(frozen=True, slots=True)
class _Prepared:
    """Decoded values of one optimizer.

    Attributes:
        values: By ``id`` of their :class:`Value`, which the plan holds.
        options: Of each live group; ``None`` where none are taken over.
        own: State under keys that are no parameters.
        more: What its own ``state_dict`` adds.
    """

    values: dict[int, Any]
    options: list[Any]
    own: dict[Any, Any]
    more: dict[str, Any]


    # -- optimizers

    def prepare(self, plan: OptimizerPlan) -> _Prepared:
        """Decode everything of an optimizer that is no array of its own."""
        values: dict[int, Any] = {}
        for param in plan.params:
            for document in (
                [param.state] if isinstance(param.state, Value) else [v for _, v in param.state or ()]
            ):
                if isinstance(document, Value):
                    values[id(document)] = decode(document.document, self.reader_to(document.device))
        options = [
            None if source is None else decode(plan.saved.groups[source].options, self.read)
            for source in plan.groups
        ]
        return _Prepared(
            values=values,
            options=options,
            own=decode(plan.saved.values, self.read),
            more=decode(plan.saved.more, self.read),
        )

    def apply_optimizer(self, live: LiveState, plan: OptimizerPlan, prepared: _Prepared) -> None:
        optimizer = live.optimizers[plan.index]
        if prepared.more:
            # It replaces groups and states by casts of themselves: everything else comes after it.
            optimizer.load_state_dict({**optimizer.state_dict(), **prepared.more})
        for g, options in enumerate(prepared.options):
            if options is not None:
                self.apply_options(f"optimizer {plan.index}, group {g}", optimizer.param_groups[g], options)
        for param in plan.params:
            tensor = param.entry.param
            if param.state is None:
                optimizer.state.pop(tensor, None)
                continue
            if isinstance(param.state, Value):
                optimizer.state[tensor] = prepared.values[id(param.state)]
                continue
            state = {}
            for key, source in param.state:
                decoded = decode(key, self.read)
                if isinstance(source, Fill):
                    self.fill(source)
                    state[decoded] = param.entry.state[decoded]
                elif isinstance(source, Create):
                    state[decoded] = self.create(source)
                else:
                    state[decoded] = prepared.values[id(source)]
            present = optimizer.state.get(tensor)
            if isinstance(present, dict):
                present.clear()
                present.update(state)
            else:
                optimizer.state[tensor] = state
        for key in [key for key in optimizer.state if not isinstance(key, torch.Tensor)]:
            del optimizer.state[key]
        optimizer.state.update(prepared.own)

    def apply_options(self, where: str, group: dict[str, Any], options: Mapping[str, Any]) -> None:
        for key, value in options.items():
            if key in ("params", "param_names"):
                continue
            if key not in group:
                self.options_new.append(f"{where}: {key}")
            group[key] = _into(group.get(key), value)
        kept = [key for key in group if key not in options and key not in ("params", "param_names")]
        self.options_kept += [f"{where}: {key}" for key in kept]

def _into(live: Any, value: Any) -> Any:
    """Return what an option becomes: a live tensor stays that tensor if it can hold the saved value."""
    if not isinstance(live, torch.Tensor):
        return value
    if isinstance(value, torch.Tensor):
        if live.shape != value.shape or live.dtype != value.dtype:
            return value
        _copy(value, live)
        return live
    if type(value) in (int, float) and live.numel() == 1:
        held = torch.full_like(live, value)
        if held.item() == value:
            _copy(held, live)
            return live
    return value


