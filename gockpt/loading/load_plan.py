"""Values of a load's plan: the source of each live tensor, and the names that do not fit.

Made by :func:`gockpt.loading.fit.fit` and :func:`gockpt.loading.fit_wrapper.fit_wrappers`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gockpt.loading.fit_model import Fill, ModelFit

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from gockpt.state.live_state import ParamEntry, WrapperEntry
    from gockpt.state.saved_document import SavedOptimizer, SavedSubclass
    from gockpt.state.strides import Strides
    from gockpt.state.value_encoder import Json

__all__ = ["Create", "FillInner", "LoadPlan", "OptimizerPlan", "ParamPlan", "Value", "WrapperPlan"]


@dataclass(frozen=True, slots=True)
class Create:
    """Make a new tensor from an array.

    Attributes:
        source: Public name of the stored array.
        like: The parameter whose memory order it takes, if it has the same shape.
        device: Its device.
        name: Its live name, for messages.
        strides: Its own memory order; ``None`` for that of ``like``.
    """

    source: str
    like: torch.Tensor
    device: torch.device
    name: str
    strides: Strides | None = None


@dataclass(frozen=True, slots=True)
class FillInner:
    """Overwrite the inner tensors of a live tensor subclass."""

    fills: tuple[Fill, ...]


@dataclass(frozen=True, slots=True)
class Value:
    """Decode a value. Tensors in it go to the device."""

    document: Json
    device: torch.device


@dataclass(frozen=True, slots=True)
class ParamPlan:
    """The state that one parameter will have.

    Attributes:
        entry: The parameter.
        state: Encoded keys and their parts, in order; a single :class:`Value` if the state isn't a
            mapping; ``None`` for no state.
    """

    entry: ParamEntry
    state: list[tuple[Json, Fill | FillInner | Create | Value]] | Value | None


@dataclass(frozen=True, slots=True)
class OptimizerPlan:
    """State that one optimizer will have.

    Attributes:
        index: Its index among the live ones.
        saved: Its saved form.
        groups: For each live group the saved group of its options; ``None`` for none.
        params: The state of each parameter that fits.
        strides: Of arrays that are not row-major, by public name.
        subclasses: Every saved tensor subclass by public name.
        form: The argument of its own ``load_state_dict``; ``None`` to fill its state in place.
        beyond: Keys of the saved form that are not loaded.
    """

    index: int
    saved: SavedOptimizer
    groups: list[int | None]
    params: list[ParamPlan]
    strides: Mapping[str, Strides] = field(default_factory=dict)
    subclasses: Mapping[str, SavedSubclass] = field(default_factory=dict)
    form: Json = None
    beyond: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WrapperPlan:
    """State that a wrapper around optimizers is given.

    Attributes:
        entry: The live wrapper.
        form: The argument of its own ``load_state_dict``.
    """

    entry: WrapperEntry
    form: Json


@dataclass(slots=True)
class LoadPlan:
    """Plan of a whole load, and the names that do not fit.

    Attributes:
        model: The fit of each part of the model.
        fills: Parameters outside the model.
        optimizers: The plan of each optimizer.
        wrappers: The plan of each wrapper around them, the outermost of each first.
        elsewhere: Public names of arrays of optimizers that were not on the CPU.
        missing: Live names outside the model that the checkpoint lacks.
        unexpected: Names in the checkpoint, outside the model, that have no live counterpart.
        mismatched: Names outside the model that both have, with differences.
        untold: State that can't be restored, which is no reason to refuse the load.
    """

    model: list[ModelFit] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)
    optimizers: list[OptimizerPlan] = field(default_factory=list)
    wrappers: list[WrapperPlan] = field(default_factory=list)
    elsewhere: frozenset[str] = frozenset()
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    untold: list[str] = field(default_factory=list)

    def whole(self) -> ModelFit:
        """Return the model and everything outside it as one fit."""
        rest = ModelFit(self.fills, [], self.missing, self.unexpected, self.mismatched)
        parts = [*self.model, rest]
        return ModelFit(
            fills=[fill for part in parts for fill in part.fills],
            assigns=[assign for part in parts for assign in part.assigns],
            missing=[name for part in parts for name in part.missing],
            unexpected=[name for part in parts for name in part.unexpected],
            mismatched=[text for part in parts for text in part.mismatched],
            unfit={one for part in parts for one in part.unfit},
            taken=sum(part.taken for part in parts),
            refused=[text for part in parts for text in part.refused],
        )
