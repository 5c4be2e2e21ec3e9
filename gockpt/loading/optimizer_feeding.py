"""Loading through optimizers' and wrappers' own ``load_state_dict``, with their saved ``state_dict()``."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gockpt.core.array_spec import public_name
from gockpt.loading.fit_model import Fill
from gockpt.loading.fit_subclass import make_subclass
from gockpt.loading.load_plan import Create
from gockpt.state.known_classes import class_name
from gockpt.state.state_document import OPTIONS
from gockpt.state.value_decoder import decode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gockpt.core.array_spec import Name
    from gockpt.loading.fill import Filler
    from gockpt.loading.load_plan import LoadPlan, OptimizerPlan
    from gockpt.state.live_state import LiveState
    from gockpt.state.value_encoder import Json

    Read = Callable[[Name], torch.Tensor]

__all__ = ["Feeding", "not_restored"]

SHARED = ("param_groups", "state")
"""Attributes that a wrapper may share with the optimizer in it."""


def not_restored(plan: LoadPlan) -> list[str]:
    """Return state of optimizers and wrappers, saved or live, that a load does not restore."""
    told = list(plan.untold)
    for optimizer in plan.optimizers:
        if optimizer.beyond and optimizer.form is None:
            keys = ", ".join(optimizer.beyond)
            told.append(f"{keys} in the state_dict() of {optimizer.saved.kind}, which nothing here loads")
    return told


@dataclass(slots=True)
class _Form:
    """Decoded form of one object.

    Attributes:
        owner: The optimizer or wrapper.
        value: The decoded form.
        inside: Plans of the optimizers that it may load: itself, or those it wraps.
        tensors: The tensors in the form, by the public name of their array.
    """

    owner: Any
    value: Any
    inside: list[OptimizerPlan]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


class Feeding:
    """All optimizers and wrappers of a load that have loading code of their own."""

    def __init__(self, plan: LoadPlan, live: LiveState, filler: Filler) -> None:
        """Decode each object's form and read its arrays; nothing live is changed."""
        self._plan = plan
        self._live = live
        self._filler = filler.apart()
        plans = {each.index: each for each in plan.optimizers}
        self._forms: list[_Form] = []
        for each in plan.wrappers:
            inside = [plans[index] for index in each.entry.inside]
            self._forms.append(self._decoded(each.entry.wrapper, each.form, inside))
        # The outermost first: objects that it loads itself are not loaded again.
        for optimizer in reversed(plan.optimizers):
            if optimizer.form is not None:
                self._forms.append(
                    self._decoded(live.optimizers[optimizer.index], optimizer.form, [optimizer])
                )
        self.loaded: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._forms)

    @property
    def owners(self) -> set[int]:
        """Indices of the optimizers that may be loaded by code of their own, or of a wrapper."""
        return {plan.index for form in self._forms for plan in form.inside}

    def run(self, ran: list[str]) -> None:
        """Call each object's ``load_state_dict`` once, except those that an earlier object called itself.

        Args:
            ran: Gets the class of each object before its code runs.
        """
        everybody = [*self._live.optimizers, *(entry.wrapper for entry in self._live.wrappers)]
        for form in self._forms:
            if id(form.owner) in self.loaded:
                continue
            ran.append(f"{class_name(type(form.owner))}.load_state_dict()")
            others = [one for one in everybody if one is not form.owner]
            sharing = [(one, name) for one in others for name in SHARED if _shares(one, form.owner, name)]
            with self._noting(others):
                form.owner.load_state_dict(form.value)
            self.loaded.add(id(form.owner))
            for one, name in sharing:
                # torch gives a loaded optimizer a new list, and a new dict.
                setattr(one, name, getattr(form.owner, name))
            for plan in form.inside:
                if id(self._live.optimizers[plan.index]) in self.loaded:
                    _undo_casts(self._live.optimizers[plan.index], plan, form.tensors)

    @contextmanager
    def _noting(self, others: Sequence[Any]) -> Iterator[None]:
        """Record other objects whose ``load_state_dict`` is called meanwhile."""
        with ExitStack() as stack:
            for one in others:
                attributes = getattr(one, "__dict__", None)
                if attributes is not None and hasattr(one, "load_state_dict"):
                    stack.enter_context(_watched(one, attributes, self.loaded))
            yield

    def _decoded(self, owner: Any, document: Json, inside: list[OptimizerPlan]) -> _Form:
        form = _Form(owner, None, inside)
        states = {
            part.source: _new(part)
            for plan in inside
            for param in plan.params
            if isinstance(param.state, list)
            for _, part in param.state
            if isinstance(part, (Create, Fill))
        }
        devices = [param.entry.param.device for plan in inside for param in plan.params]

        def read(name: Name) -> torch.Tensor:
            public = public_name(name)
            if public in form.tensors:
                return form.tensors[public]
            near = devices and (name[0] != OPTIONS or public in self._plan.elsewhere)
            there = devices[0] if near else torch.device("cpu")
            subclass = inside[0].subclasses.get(public)
            if public in states:
                values = self._filler.create(states[public])
            elif subclass is not None:
                values = make_subclass(subclass, read, there, public)
            else:
                values = self._filler.read_as(name, inside[0].strides.get(public), there)
            return form.tensors.setdefault(public, values)

        self._filler.fill_many(part for source, part in states.items() if source in _arrays(document))
        form.value = decode(document, read)
        return form


def _shares(one: Any, other: Any, name: str) -> bool:
    """Whether both objects have the same value as an attribute of their own."""
    held = getattr(one, "__dict__", {}).get(name)
    return held is not None and held is getattr(other, "__dict__", {}).get(name)


@contextmanager
def _watched(one: Any, attributes: dict[str, Any], loaded: set[int]) -> Iterator[None]:
    original = one.load_state_dict

    def load_state_dict(*args: Any, **kwargs: Any) -> Any:
        loaded.add(id(one))
        return original(*args, **kwargs)

    before = attributes.get("load_state_dict")
    attributes["load_state_dict"] = load_state_dict
    try:
        yield
    finally:
        if before is None:
            attributes.pop("load_state_dict", None)
        else:
            attributes["load_state_dict"] = before


def _undo_casts(optimizer: Any, plan: OptimizerPlan, tensors: dict[str, torch.Tensor]) -> None:
    """Restore the saved dtype of states that torch only cast to that of their parameter.

    This concerns only states that the saved optimizer itself held in another dtype; a state dict computed
    for saving may use any dtype.
    """
    for planned in plan.params:
        param = planned.entry.param
        state = optimizer.state.get(param)
        if not isinstance(state, dict) or not isinstance(planned.state, list):
            continue
        for key, part in planned.state:
            if not isinstance(part, (Create, Fill)) or key == "step":
                continue
            if not part.source.startswith("optimizer/"):
                continue
            saved, live = tensors.get(part.source), state.get(key)
            if saved is None or not isinstance(live, torch.Tensor) or live.dtype == saved.dtype:
                continue
            cast = saved.to(device=live.device, dtype=param.dtype)
            if live.dtype == param.dtype and live.shape == cast.shape and torch.equal(live, cast):
                state[key] = saved.to(live.device)


def _new(part: Create | Fill) -> Create:
    """Return the plan of a new tensor like the live one that would have been filled."""
    if isinstance(part, Create):
        return part
    return Create(part.source, part.target, part.target.device, part.name, part.target.stride())


def _arrays(document: Json) -> set[str]:
    """Return the public names of all arrays that a document refers to."""
    found: set[str] = set()
    left = [document]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left += part
        elif isinstance(part, dict):
            for key in ("$tensor", "$ndarray"):
                name = part.get(key)
                if isinstance(name, list) and all(isinstance(component, str) for component in name):
                    found.add(public_name(tuple(map(str, name))))
            left += part.values()
    return found
