"""State of a model and its optimizers at one moment, by name, as live objects.

Made by :func:`gockpt.state.collect.collect`, which copies no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    import torch

    from gockpt.core.array_spec import Name
    from gockpt.state.tensor_subclasses import Flattened, Inner

__all__ = [
    "Computed",
    "GroupEntry",
    "LiveState",
    "OptimizerEntry",
    "ParamEntry",
    "Subclassed",
    "WrapperEntry",
]


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ParamEntry:
    """One parameter in one optimizer.

    Attributes:
        fqn: Natural name, unique within its optimizer; ``group<g>.param<i>`` for one outside the model.
        param: The optimizer's own tensor object.
        optimizer_index: Index into :attr:`LiveState.optimizers`.
        group_index: Index of its param group.
        state: The tensors of its optimizer state, by key (live objects, not detached).
        name: The entry that holds the parameter itself.
        state_names: The entry that holds each tensor of ``state``.
        owner: The component of its states' names that names it: ``fqn``, or ``fqn~<n>`` if another
            optimizer holds the same parameter.
        raw: All of its optimizer state, as the optimizer holds it; ``None`` if it has none yet.
    """

    fqn: str
    param: torch.Tensor
    optimizer_index: int
    group_index: int
    state: dict[str, torch.Tensor]
    name: Name
    state_names: dict[str, Name]
    owner: str
    raw: Any


@dataclass(frozen=True, slots=True)
class GroupEntry:
    """One param group: the live dict, and its parameters in order."""

    options: dict[str, Any]
    params: list[ParamEntry]


@dataclass(frozen=True, slots=True)
class OptimizerEntry:
    """One optimizer that holds state.

    Attributes:
        optimizer: The live object, without its wrappers.
        kind: Its class: module and qualified name.
        groups: Its param groups.
        values: State under keys that aren't tensors.
        own: Whether it has saving or loading code of its own, whose result then is its state. Only tensors
            that its ``state_dict()`` returns unchanged have entries.
    """

    optimizer: Any
    kind: str
    groups: list[GroupEntry]
    values: dict[Any, Any]
    own: bool = False


@dataclass(frozen=True, slots=True)
class WrapperEntry:
    """An object around optimizers without state under ``state``.

    Attributes:
        wrapper: The live object.
        kind: Its class: module and qualified name.
        inside: Indices of the optimizers in it.
        own: Whether it saves and loads itself: by methods of its own, or with hooks.
    """

    wrapper: Any
    kind: str
    inside: tuple[int, ...]
    own: bool


@dataclass(frozen=True, slots=True)
class Computed:
    """An entry of a model's state without live memory: computed by ``state_dict()``.

    Attributes:
        value: Its value in the module's ``state_dict()``.
        model: Index of the model it belongs to.
        key: Its key in that model's own ``state_dict()``.
    """

    value: Any
    model: int
    key: str


@dataclass(frozen=True, slots=True)
class Subclassed:
    """A tensor subclass that is saved as its inner tensors.

    Attributes:
        flat: The tensor and its inner tensors.
        arrays: The entry that holds each inner tensor.
    """

    flat: Flattened
    arrays: dict[Inner, Name]


@dataclass(frozen=True)
class LiveState:
    """Live state of a model and its optimizers.

    Attributes:
        entries: Every array by name: ``("model", fqn)``, ``("optimizer", fqn, state)``. The live tensors, or
            detached aliases of those that require gradients; tensors that share memory and geometry have one
            entry.
        aliases: Public names of the others, each with the public name of the entry it shares.
        buffers: Names of entries that are buffers (due before the next forward), or of unknown kind. Never
            a parameter that an optimizer owns.
        optimizers: The live optimizers that hold state, without their wrappers.
        describe: Returns :attr:`params` and :attr:`trained`.
        computed: Model state without live memory, by natural name.
        metadata: ``state_dict()._metadata`` of each module, by natural name.
        keys: Natural names of all model state, in the order of its state dict.
        subclassed: Tensor subclasses by name; only their inner tensors are entries.
        inside: Names of these inner tensors.
        wrappers: Objects around the optimizers, the outermost of each first.
        kept: Results of :meth:`once`, shared by all states of the same layout.
    """

    entries: dict[Name, torch.Tensor]
    aliases: dict[str, str]
    buffers: set[Name]
    optimizers: list[Any]
    describe: Callable[[], tuple[list[ParamEntry], list[OptimizerEntry]]]
    computed: dict[str, Computed] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    subclassed: dict[Name, Subclassed] = field(default_factory=dict)
    inside: set[Name] = field(default_factory=set)
    wrappers: list[WrapperEntry] = field(default_factory=list)
    kept: dict[Hashable, Any] = field(default_factory=dict)

    @cached_property
    def _described(self) -> tuple[list[ParamEntry], list[OptimizerEntry]]:
        return self.describe()

    @property
    def params(self) -> list[ParamEntry]:
        """Every parameter of every optimizer."""
        return self._described[0]

    @property
    def trained(self) -> list[OptimizerEntry]:
        """The state of each optimizer, in the order of :attr:`optimizers`."""
        return self._described[1]

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return ``make()``, which is called once for all states of the same layout.

        Args:
            key: Identifies the result among those of this layout.
            make: Its result follows from the layout alone: the names, geometry, memory order, kinds and
                devices of all tensors, what is tied to what, and which optimizer and group each parameter
                is in. It holds no tensor and no module.
        """
        if key not in self.kept:
            self.kept[key] = make()
        return cast("T", self.kept[key])

    def arrays_of(self, name: Name) -> tuple[Name, ...]:
        """Return the entries that hold a named tensor: itself, or the inner tensors of a subclass."""
        known = self.subclassed.get(name)
        return (name,) if known is None else tuple(known.arrays.values())

    def tensors(self) -> dict[Name, torch.Tensor]:
        """Return every tensor as torch has it, by name: a subclass in place of its inner tensors."""
        found = {name: tensor for name, tensor in self.entries.items() if name not in self.inside}
        found.update({name: known.flat.tensor for name, known in self.subclassed.items()})
        return found
