"""Record of the last tick, by which its state can still be saved under its own step.

At every tick the engine records *marks* of the state: addresses and version counters of all tensors, and
fingerprints of their bytes in host memory, of all of them if they are few (:data:`MOST_BYTES` in
:data:`MOST_TENSORS`), else of three places in some. A state that no longer fits its marks is not saved.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gockpt.errors import StateTooLarge
from gockpt.kernels.fingerprint_numba import fingerprints
from gockpt.saving.closing import added_at
from gockpt.state.tensors import is_subclass, refusal
from gockpt.tensor_memory import dense_range

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gockpt.saving.boundary import Boundary
    from gockpt.saving.memory import Memory
    from gockpt.state.live_state import LiveState

__all__ = ["MOST_REMEMBERED", "Addition", "LastTick"]

MOST_BYTES = 4 << 20
MOST_TENSORS = 32
PLACE = 4096
"""Bytes of one place of a tensor that is looked at in places."""
MOST_REMEMBERED = 16 << 20
"""Extras up to this many bytes are remembered at a tick at which nothing is saved."""

Addition = tuple[dict[str, Any], dict[tuple[str, ...], torch.Tensor]]
"""A state document, and the arrays that come with it."""

_version = vars(torch._C.TensorBase)["_version"].__get__  # noqa: SLF001 - without a call of Python's for each


@dataclass(frozen=True, slots=True)
class _Marks:
    """Marks of a state at one moment.

    Attributes:
        memory: Addresses and version counters of the tensors; ``None`` for one where that can't be told.
        bits: Fingerprints of the bytes looked at.
        whole: Whether ``bits`` are of all of the state.
    """

    memory: list[tuple[list[int], list[int]] | tuple[int, int] | None]
    bits: list[int]
    whole: bool


class LastTick:
    """The last tick: its boundary, marks of its state, and what else only it knew.

    Attributes:
        boundary: The last tick; ``None`` before the first.
        left_out: The last tick at which a due save was left out, until a later state is saved.
    """

    def __init__(self) -> None:
        self.boundary: Boundary | None = None
        self.left_out: Boundary | None = None
        self._tensors: list[weakref.ref[torch.Tensor]] = []
        self._shape: tuple[int, ...] = ()
        self._marks: _Marks | None = None
        self._addition: Addition | None = None

    def forget_state(self) -> None:
        """Forget everything about the state: the model is gone."""
        self._tensors, self._marks, self._addition = [], None, None

    def note(self, boundary: Boundary, model: Any, optimizers: Sequence[Any]) -> None:
        """Note marks of the state, which must be that of ``boundary``. Copies nothing."""
        self.boundary, self._addition, self._marks = boundary, None, None
        shape = _shape(optimizers)
        if shape != self._shape or not self._tensors:
            self._tensors = [weakref.ref(tensor) for tensor in _tensors(model, optimizers)]
            self._shape = shape
        self._marks = self._look()

    def remember(self, boundary: Boundary, live: LiveState, memory: Memory) -> None:
        """Remember extras, random states and options too, unless they take more than is allowed."""
        most = min(MOST_REMEMBERED, memory.spare)
        taken = 0

        def admit(nbytes: int) -> None:
            nonlocal taken
            taken += nbytes
            if taken > most:
                raise StateTooLarge

        with suppress(StateTooLarge):
            self._addition = added_at(live, boundary, admit)

    @property
    def addition(self) -> Addition | None:
        """Extras, random states and options as of the last tick, if they were remembered."""
        return self._addition

    def moved(self, model: Any, optimizers: Sequence[Any]) -> str | None:
        """Return the evidence that the state is no longer that of the last tick, or ``None``."""
        marks = self._marks
        if marks is None:
            return "nothing is known of the state at the last call"
        known = [reference() for reference in self._tensors]
        now = list(_tensors(model, optimizers))
        if len(known) != len(now) or any(a is not b for a, b in zip(known, now, strict=True)):
            return "tensors were added, removed or replaced"
        found = self._look()
        if found.bits != marks.bits:
            return "tensors have other values"
        if not marks.whole and found.memory != marks.memory:
            return "tensors were written or moved"
        return None

    def _look(self) -> _Marks:
        tensors = [tensor for reference in self._tensors if (tensor := reference()) is not None]
        whole = len(tensors) <= MOST_TENSORS and sum(tensor.nbytes for tensor in tensors) <= MOST_BYTES
        rows: list[tuple[int, int]] = []
        for tensor in tensors if whole else tensors[:: -(-len(tensors) // MOST_TENSORS)]:
            found = _range(tensor)
            whole = whole and found is not None
            if found is not None:
                rows += _places(*found, whole=whole)
        addresses, nbytes = np.array(rows, np.int64).reshape(-1, 2).T
        bits = fingerprints(addresses.copy(), nbytes.copy(), np.zeros(len(rows), np.int64))
        return _Marks(_memory(tensors), bits.tolist(), whole)


def _memory(tensors: list[torch.Tensor]) -> list[tuple[list[int], list[int]] | tuple[int, int] | None]:
    try:
        return [([*map(torch.Tensor.data_ptr, tensors)], [*map(_version, tensors)])]
    except (RuntimeError, NotImplementedError):  # such as a subclass without memory of its own
        return [_memory_of_one(tensor) for tensor in tensors]


def _memory_of_one(tensor: torch.Tensor) -> tuple[int, int] | None:
    try:
        return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version  # noqa: SLF001
    except (RuntimeError, NotImplementedError):
        return None


def _range(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Return the address and number of a tensor's bytes in host memory; ``None`` if it can't be looked at."""
    try:
        return dense_range(tensor)
    except (RuntimeError, NotImplementedError):
        return None


def _places(address: int, nbytes: int, *, whole: bool) -> list[tuple[int, int]]:
    """Return the address and number of the bytes that are looked at: all of them, or three places."""
    if whole or nbytes <= 3 * PLACE:
        return [(address, nbytes)]
    return [(address + at, PLACE) for at in (0, nbytes // 2, nbytes - PLACE)]


def _shape(optimizers: Sequence[Any]) -> tuple[int, ...]:
    """Return numbers that change when optimizers get other parameters or new state."""
    groups = [len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups]
    return *groups, *(len(optimizer.state) for optimizer in optimizers)


def _tensors(model: Any, optimizers: Sequence[Any]) -> Iterator[torch.Tensor]:
    """Yield the live tensors that a model and its optimizers are made of, tied ones once."""
    seen: set[int] = set()
    for tensor in (*_of_model(model), *_of_optimizers(optimizers)):
        for part in _inner(tensor):
            if id(part) not in seen:
                seen.add(id(part))
                yield part


def _inner(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a tensor, or those that a subclass is made of; nothing where a save would refuse it."""
    if is_subclass(tensor):
        try:
            parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]  # type: ignore[attr-defined]
        except Exception:  # noqa: BLE001 - code of the class's own: a save names it, and refuses the tensor
            return
        for part in parts:
            if isinstance(part, torch.Tensor):
                yield from _inner(part)
    elif refusal(tensor) is None:
        yield tensor


def _of_model(model: Any) -> Iterator[torch.Tensor]:
    if isinstance(model, Mapping):
        yield from model.values()
        return
    for part in [model] if isinstance(model, torch.nn.Module) else model or ():
        for module in part.modules():
            yield from (p for p in module._parameters.values() if p is not None)  # noqa: SLF001
            left_out = module._non_persistent_buffers_set  # noqa: SLF001
            yield from (b for n, b in module._buffers.items() if b is not None and n not in left_out)  # noqa: SLF001


def _of_optimizers(optimizers: Sequence[Any]) -> Iterator[torch.Tensor]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for param in group["params"]:
                yield param
                state = optimizer.state.get(param)
                if isinstance(state, Mapping):
                    yield from (value for value in state.values() if isinstance(value, torch.Tensor))
