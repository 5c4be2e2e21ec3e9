"""Comparison of a checkpoint with live objects: the plan of a load.

Promise: :func:`fit` reads no tensor and changes nothing. It finds everything that is missing, left over or
different, so that a load starts only if all of it fits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gockpt.core.array_spec import public_name
from gockpt.core.shortened import shortened
from gockpt.errors import ManifestCorrupt
from gockpt.loading.fit_model import Fill, ModelFit, fills_for
from gockpt.loading.load_plan import Create, FillInner, LoadPlan, OptimizerPlan, ParamPlan, Value
from gockpt.state.saved_forms import reordered_groups, standard_form, torch_form
from gockpt.state.saved_strides import order_of_state, strides_saved
from gockpt.state.strides import has_strides
from gockpt.state.tensors import DTYPE_OF, is_subclass
from gockpt.state.value_decoder import array_name, is_mapping, items

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gockpt.core.array_spec import ArraySpec
    from gockpt.state.live_state import LiveState, OptimizerEntry, ParamEntry
    from gockpt.state.saved_document import SavedOptimizer, SavedState
    from gockpt.state.value_encoder import Json

__all__ = ["fit"]


def fit(
    live: LiveState,
    saved: SavedState,
    arrays: Mapping[str, ArraySpec],
    *,
    model: list[ModelFit],
    with_optimizer: bool,
) -> LoadPlan:
    """Return the plan of a load.

    Args:
        live: The objects to load into.
        saved: The state document.
        arrays: Every stored array by public name.
        model: The fit of each part of the model; empty if the model is not loaded.
        with_optimizer: Whether optimizers are loaded.

    Raises:
        ManifestCorrupt: If the document refers to an array that the checkpoint lacks.
    """
    fitter = _Fitter(live, saved, arrays, model)
    for part in model:
        fitter.unfit |= part.unfit
    if with_optimizer:
        fitter.optimizers()
    return fitter.plan


class _Fitter:
    def __init__(
        self, live: LiveState, saved: SavedState, arrays: Mapping[str, ArraySpec], model: list[ModelFit]
    ) -> None:
        self.live = live
        self.saved = saved
        self.arrays = arrays
        self.plan = LoadPlan(model)
        self.fitted: set[str] = set()
        self.unfit: set[int | str] = set()
        # The array that fills the memory of each inner tensor in optimizer state.
        self.inner_sources: dict[int, str] = {}

    def resolve(self, public: str) -> str:
        return self.saved.aliases.get(public, public)

    def fill(self, source: str, target: torch.Tensor, name: str) -> None:
        """Plan to overwrite a parameter outside the model, or note how it differs."""
        spec = self.saved.subclasses.get(source) or self.arrays[source]
        fills = fills_for(source, spec, target, name, self.arrays)
        if isinstance(fills, str):
            self.plan.mismatched.append(f"{name}: {fills}")
            return
        self.plan.fills += fills
        self.fitted.add(name)

    # -- optimizers

    def optimizers(self) -> None:
        live, saved = self.live.trained, self.saved.optimizers
        for index in range(max(len(live), len(saved))):
            if index >= len(saved):
                self.plan.missing.append(f"optimizer {index} ({_class(live[index].kind)})")
            elif index >= len(live):
                self.plan.unexpected.append(f"optimizer {index} ({_class(saved[index].kind)})")
            elif _class(live[index].kind) != _class(saved[index].kind):
                self.plan.mismatched.append(
                    f"optimizer {index}: saved {saved[index].kind}, live {live[index].kind}"
                )
            else:
                self.optimizer(index, live[index], saved[index])
        self.plan.elsewhere = frozenset(self.saved.elsewhere)

    def optimizer(self, index: int, live: OptimizerEntry, saved: SavedOptimizer) -> None:
        standard = standard_form(saved)
        beyond: tuple[str, ...] = ()
        form: Json = None
        if standard is not None:
            whole, saved, beyond = saved.form, standard.saved, standard.beyond
            form = whole if live.own else None
        elif saved.form is not None:
            form = saved.form
        elif live.own:
            form = torch_form(saved)
        known = {fqn for group in saved.groups for fqn in group.params}

        def saved_name(fqn: str) -> str | None:
            """Return a parameter's name in the checkpoint; a tied one may be saved under any of its names."""
            if fqn in known:
                return fqn
            others = (alias for alias, target in self.live.aliases.items() if target == f"model/{fqn}")
            for public in (f"model/{fqn}", *others):
                other = self.resolve(public).removeprefix("model/")
                if other in known:
                    return other
            return None

        names = {param.fqn: saved_name(param.fqn) for group in live.groups for param in group.params}
        groups = self.groups(index, live, saved, names)
        order = [group for group in groups if group is not None]
        if form is not None and len(order) == len(groups) and order != sorted(order):
            form = reordered_groups(form, order)
            if form is None:
                self.plan.mismatched.append(f"param groups of optimizer {index}: they are in another order")
                return
        strides, subclasses = self.saved.strides or {}, self.saved.subclasses
        plan = OptimizerPlan(index, saved, groups, [], strides, subclasses, form, beyond)
        for group, source in zip(live.groups, groups, strict=True):
            options = dict(items(saved.groups[source].options)) if source is not None else {}
            for param in group.params:
                name = names[param.fqn]
                if name is not None and self.holds(param, name, saved):
                    plan.params.append(ParamPlan(param, self.state(param, name, saved, options)))
        if form is not None and len(plan.params) < sum(len(group.params) for group in live.groups):
            return  # its own code loads all or nothing, and differences were noted
        self.plan.optimizers.append(plan)

    def groups(
        self, index: int, live: OptimizerEntry, saved: SavedOptimizer, names: Mapping[str, str | None]
    ) -> list[int | None]:
        """Match groups by the names of their parameters; note groups that match none."""
        left = dict(enumerate(group.params for group in saved.groups))
        matched: list[int | None] = []
        for group in live.groups:
            wanted = tuple(names[param.fqn] or param.fqn for param in group.params)
            found = next((at for at, params in left.items() if params == wanted), None)
            matched.append(found)
            if found is not None:
                del left[found]
        if left or None in matched:
            here = [fqn for fqn, name in names.items() if name is None]
            there = [fqn for group in saved.groups for fqn in group.params if fqn not in names.values()]
            how = [f"only here: {shortened(here, 4)}"] if here else []
            how += [f"only in the checkpoint: {shortened(there, 4)}"] if there else []
            how = how or ["the same parameters, in other groups or in another order"]
            self.plan.mismatched.append(f"param groups of optimizer {index}: {'; '.join(how)}")
        return matched

    def holds(self, param: ParamEntry, name: str, saved: SavedOptimizer) -> bool:
        """Whether the checkpoint holds this very parameter, so that its saved state applies to it."""
        public = public_name(param.name)
        if param.name[0] == "model":
            return id(param.param) not in self.unfit and public not in self.unfit
        if name not in saved.outside:
            self.plan.missing.append(public)
            return False
        if public not in self.fitted:
            self.fill(self.stored(saved.outside[name]), self.live.tensors()[param.name], public)
        return public in self.fitted

    def stored(self, name: tuple[str, ...]) -> str:
        public = public_name(name)
        if public not in self.arrays and public not in self.saved.subclasses:
            msg = f"the state document refers to an array {public!r} that the checkpoint does not hold"
            raise ManifestCorrupt(msg)
        return public

    def state(
        self, param: ParamEntry, name: str, saved: SavedOptimizer, options: Mapping[Any, Json]
    ) -> list[tuple[Json, Fill | FillInner | Create | Value]] | Value | None:
        document = saved.states.get(name)
        device = param.param.device
        if document is None:
            return None
        if not is_mapping(document):
            return Value(document, device)
        planned: list[tuple[Json, Fill | FillInner | Create | Value]] = []
        of_param = self.resolve(public_name(param.name))
        for key, value in items(document):
            array = array_name(value)
            if array is None:
                planned.append((key, Value(value, device)))
                continue
            source = self.stored(array)
            if source in self.saved.subclasses:
                planned.append((key, self.subclass_state(key, value, source, param)))
                continue
            spec = self.arrays[source]
            label = f"optimizer/{param.owner}/{key}"
            there = _device(key, spec, param.param, options)
            tensor = param.state.get(key) if isinstance(key, str) else None
            order = order_of_state(self.saved, self.arrays, source, param.param, of_param)
            if (
                tensor is not None
                and not is_subclass(tensor)
                and tensor.shape == spec.shape
                and tensor.dtype == DTYPE_OF[spec.dtype]
                and tensor.device == there
                and (order is None or has_strides(tensor, order))
            ):
                planned.append((key, Fill(source, tensor, label)))
            else:
                planned.append((key, Create(source, param.param, there, label, order)))
        return planned

    def in_order(self, fill: Fill) -> bool:
        """Whether an inner tensor has the memory order of the saved one."""
        strides = strides_saved(self.saved.strides or {}, fill.source, self.arrays[fill.source])
        return has_strides(fill.target, strides)

    def shared(self, fills: list[Fill]) -> bool:
        """Whether the memory of these fills is also filled from other arrays."""
        places = [(fill.target.data_ptr(), fill.source) for fill in fills if fill.target.numel()]
        return any(self.inner_sources.setdefault(place, source) != source for place, source in places)

    def subclass_state(self, key: Json, document: Json, source: str, param: ParamEntry) -> FillInner | Value:
        """Plan to fill a live state that is a subclass, or to make a new one if it differs from the saved."""
        saved = self.saved.subclasses[source]
        label = f"optimizer/{param.owner}/{key}"
        tensor = param.state.get(key) if isinstance(key, str) else None
        if tensor is not None and tensor.device == param.param.device:
            fills = fills_for(source, saved, tensor, label, self.arrays)
            if not isinstance(fills, str) and not self.shared(fills) and all(map(self.in_order, fills)):
                return FillInner(tuple(fills))
        return Value(document, param.param.device)


def _device(key: Json, spec: ArraySpec, param: torch.Tensor, options: Mapping[Any, Json]) -> torch.device:
    """Return the device of a state in torch's optimizers: the CPU for step counters that no kernel reads."""
    if key == "step" and not spec.shape and not (options.get("capturable") or options.get("fused")):
        return torch.device("cpu")
    return param.device


def _class(kind: str) -> str:
    return kind.rpartition(".")[2]
