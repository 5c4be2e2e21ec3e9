"""Choice of the rank that saves in a process group: rank 0, for models that are equal on all ranks.

Promise: a model that ``DistributedDataParallel`` keeps equal on all ranks is saved by rank 0, and the other
ranks' calls return at once. A model or optimizer that may differ between ranks is refused by name, on every
rank: rank 0 would save only a part of it, or all ranks would write to the same path.
"""

from __future__ import annotations

import os
import threading
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from gockpt.errors import UsageError
from gockpt.once import warn_once
from gockpt.state.naming import TRANSPARENT, models_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Bystander", "is_bystander"]

_WAY_OUT = (
    "Wrap the model in DistributedDataParallel and make the call on every rank with the wrapped model: then "
    "rank 0 saves. Models that are sharded can be saved with torch.distributed.checkpoint"
)


def is_bystander(model: Any, optimizer: Any) -> bool:
    """Whether another rank saves this model: the process group has several, and this rank is not 0.

    Raises:
        UsageError: If the group has several ranks, and the model or optimizer is not equal on all of them.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return False
    ranks = distributed.get_world_size()
    if ranks == 1:
        return False
    found = _not_replicated(model, optimizer, ranks)
    if found is not None:
        msg = f"the process group has {ranks} ranks, and {found}, which gockpt can't save yet. {_WAY_OUT}"
        raise UsageError(msg)
    rank = distributed.get_rank()
    warn_once(
        "rank 0 saves",
        "rank 0 of %d saves the DistributedDataParallel model, with its own extras and random states; on the "
        "other ranks save calls return None (this is rank %d; logged once)",
        *(ranks, rank),
    )
    return rank != 0


def _not_replicated(model: Any, optimizer: Any, ranks: int) -> str | None:
    """Return the part that may differ between ranks, as text; ``None`` if everything is equal."""
    for _, part in models_of(model):
        if not isinstance(part, torch.nn.Module):
            return "the model is a mapping of tensors"
        sharded = _sharded(part)
        if sharded is not None:
            return sharded
        wrapper = _replica(part)
        if wrapper is None:
            return f"{type(part).__name__} is not wrapped in DistributedDataParallel"
        if distributed.get_world_size(wrapper.process_group) != ranks:
            return "DistributedDataParallel keeps the model equal on some of them only (process_group)"
        if wrapper.parameters_to_ignore:
            first = min(wrapper.parameters_to_ignore)
            return f"DistributedDataParallel was told to ignore {first!r}, which may differ between ranks"
    for one in optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]:
        if "ZeroRedundancyOptimizer" in _class_names(one):
            return "ZeroRedundancyOptimizer keeps a part of the optimizer's state on each rank"
    return None


def _replica(module: torch.nn.Module) -> DistributedDataParallel | None:
    """Return the wrapper that keeps a module equal on all ranks, also inside other wrappers."""
    while not isinstance(module, DistributedDataParallel):
        children = dict(module.named_children())
        inner = next((children[name] for name in TRANSPARENT if name in children), None)
        if inner is None:
            return None
        module = inner
    return module


def _sharded(module: torch.nn.Module) -> str | None:
    for name, part in module.named_modules():
        kinds = _class_names(part)
        for kind in ("FullyShardedDataParallel", "FSDPModule"):
            if kind in kinds:
                return f"{name or 'the model'} is sharded by FSDP ({kind})"
    for name, tensor in _tensors(module):
        if "DTensor" in _class_names(tensor) or "DTensor" in _class_names(tensor.data):
            return f"{name} is a DTensor"
    return None


def _tensors(module: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _class_names(one: object) -> set[str]:
    return {kind.__name__ for kind in type(one).__mro__}


class Bystander:
    """Engine of a rank for which another rank saves: counts steps and saves nothing."""

    handle: None = None
    busy = False
    window_open = False
    trained_elsewhere = False
    updating = False
    inside = False
    step_seconds = 0.0

    def __init__(self) -> None:
        """Start with no counted steps."""
        self.closed = False
        self.last_told = 0.0
        self.training_thread = threading.current_thread()
        self._pid = os.getpid()
        self.counted = (0, 0)

    @property
    def of_this_process(self) -> bool:
        """Whether this is the process in which it was made."""
        return os.getpid() == self._pid

    def tick(self, step: int | None, extra: object) -> None:
        """Count a step."""
        del extra
        last, updates = self.counted
        self.last_told = perf_counter()
        self.counted = (last + 1 if step is None else step, updates)

    def count_from(self, step: int, updates: int) -> None:
        """Continue the counts from these."""
        self.counted = (step, updates)

    def wait(self) -> None:
        """Return: nothing is in flight."""

    def finish(self, timeout: float | None = None) -> None:
        """Return: there is nothing to save."""

    def stands(self) -> bool:
        """Return ``True``: nothing here has to be saved before the process may end."""
        return True

    at_rest = only_waits = finishes = stands

    def abort_window(self, why: str) -> None:
        """Return: no window is open."""

    def let_go(self) -> None:
        """Return: nothing is held."""

    def rebind(self, model: Callable[[], Any]) -> None:
        """Return: no model is saved."""

    def close(self) -> None:
        """Return: nothing is held."""
        self.closed = True
