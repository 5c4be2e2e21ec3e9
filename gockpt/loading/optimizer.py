"""Loading of a live optimizer's options and states, without the casts of ``load_state_dict``."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from gockpt.core.array_spec import public_name
from gockpt.errors import ManifestCorrupt
from gockpt.loading.fill import copy_into
from gockpt.loading.fit_model import Fill
from gockpt.loading.fit_subclass import make_subclass
from gockpt.loading.load_plan import Create, FillInner, Value
from gockpt.state.value_decoder import decode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gockpt.core.array_spec import Name
    from gockpt.loading.fill import Filler
    from gockpt.loading.load_plan import OptimizerPlan, ParamPlan
    from gockpt.state.value_encoder import Json

__all__ = ["OptimizerRestore", "OptionsReport"]


@dataclass(slots=True)
class OptionsReport:
    """Options of param groups that only one side has.

    Attributes:
        new: Options that were set though the live group did not have them.
        kept: Options of live groups that the checkpoint lacks; left as they were.
    """

    new: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)


class OptimizerRestore:
    """One optimizer's load: its constructor decodes everything whose content may be invalid."""

    def __init__(self, plan: OptimizerPlan, filler: Filler) -> None:
        """Decode options and values; states that are arrays of their own are not read."""
        self._plan = plan
        self._filler = filler
        self._options = [
            None if source is None else self._decode_dict(plan.saved.groups[source].options, "options")
            for source in plan.groups
        ]
        self._own = self._decode_dict(plan.saved.values, "values")
        # By id of the Value, which the plan keeps alive.
        self._values: dict[int, Any] = {}
        # The keys of each parameter's states, in the plan's order.
        self._keys: list[list[Any]] = []
        for param in plan.params:
            parts = _parts(param)
            self._keys.append([self._decode_key(key) for key, _ in parts])
            for _, part in parts:
                if isinstance(part, Value):
                    self._values[id(part)] = decode(part.document, self._reader_to(part.device))
        filler.stage(part for part in self.arrays() if isinstance(part, Fill))

    def _decode_dict(self, document: Json, what: str) -> dict[Any, Any]:
        value = decode(document, self._reader_to(torch.device("cpu")))
        if isinstance(value, dict):
            return value
        msg = f"optimizer {self._plan.index}: its saved {what!r} are {str(value)[:60]}"
        raise ManifestCorrupt(msg)

    def _decode_key(self, document: Json) -> Any:
        key = decode(document, self._filler.read)
        try:
            hash(key)
        except TypeError as error:
            msg = f"optimizer {self._plan.index}: {str(key)[:60]} can't be the name of a state"
            raise ManifestCorrupt(msg) from error
        return key

    def _reader_to(self, device: torch.device) -> Callable[[Name], torch.Tensor]:
        """Return a function that reads an array as a new tensor on a device, in its saved memory order."""
        return partial(self._read_to, device)

    def _read_to(self, device: torch.device, name: Name) -> torch.Tensor:
        public = public_name(name)
        saved = self._plan.subclasses.get(public)
        if saved is not None:
            return make_subclass(saved, self._reader_to(device), device, public)
        return self._filler.read_as(name, self._plan.strides.get(public), device)

    def arrays(self) -> list[Fill | Create]:
        """Return the states that are arrays of their own."""
        parts = (part for param in self._plan.params for _, part in _parts(param))
        return [each for part in parts if not isinstance(part, Value) for each in _arrays(part)]

    def apply(self, optimizer: Any, report: OptionsReport) -> None:
        """Change the live optimizer."""
        for index, options in enumerate(self._options):
            if options is not None:
                where = f"optimizer {self._plan.index}, group {index}"
                _apply_options(where, optimizer.param_groups[index], options, report)
        for param, keys in zip(self._plan.params, self._keys, strict=True):
            self._apply_state(optimizer, param, keys)
        for key in [key for key in optimizer.state if not isinstance(key, torch.Tensor)]:
            del optimizer.state[key]
        optimizer.state.update(self._own)

    def _apply_state(self, optimizer: Any, plan: ParamPlan, keys: list[Any]) -> None:
        param = plan.entry.param
        if plan.state is None:
            optimizer.state.pop(param, None)
            return
        if isinstance(plan.state, Value):
            optimizer.state[param] = self._values[id(plan.state)]
            return
        state: dict[Any, Any] = {}
        for name, (_, part) in zip(keys, _parts(plan), strict=True):
            if isinstance(part, Fill):
                self._filler.fill(part)
                state[name] = plan.entry.state[name]
            elif isinstance(part, FillInner):
                for fill in part.fills:
                    self._filler.fill(fill)
                state[name] = plan.entry.state[name]
            elif isinstance(part, Create):
                state[name] = self._filler.create(part)
            else:
                state[name] = self._values[id(part)]
        live = optimizer.state.get(param)
        if isinstance(live, dict):
            live.clear()
            live.update(state)
        else:
            optimizer.state[param] = state


def _arrays(part: Fill | FillInner | Create) -> tuple[Fill | Create, ...]:
    return part.fills if isinstance(part, FillInner) else (part,)


def _parts(plan: ParamPlan) -> list[tuple[Any, Fill | FillInner | Create | Value]]:
    if isinstance(plan.state, Value):
        return [(None, plan.state)]
    return list(plan.state or ())


def _apply_options(
    where: str, group: dict[str, Any], options: Mapping[str, Any], report: OptionsReport
) -> None:
    for key, value in options.items():
        if key not in group:
            report.new.append(f"{where}: {key}")
        group[key] = _into(group.get(key), value)
    kept = [key for key in group if key not in options and key not in ("params", "param_names")]
    report.kept += [f"{where}: {key}" for key in kept]


def _into(live: Any, value: Any) -> Any:
    """Return the option's new value: the live tensor itself if it can hold the saved value."""
    if not isinstance(live, torch.Tensor):
        return value
    if isinstance(value, torch.Tensor):
        if live.shape != value.shape or live.dtype != value.dtype:
            return value
        copy_into(live, value)
        return live
    if type(value) in (int, float) and live.numel() == 1:
        held = torch.full_like(live, value)
        if held.item() == value:
            copy_into(live, held)
            return live
    return value
