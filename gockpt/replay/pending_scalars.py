"""Update scalars that are still being computed on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["PendingScalars"]


@dataclass(frozen=True, slots=True)
class PendingScalars:
    """Scalars of an update some of which are on a device, so that reading them now would wait for it.

    Returned by :func:`gockpt.replay.rules.scalars`. The tensors are copied from the device with the update's
    gradients. Nothing waits for them: ``row`` is called when they have arrived.

    Attributes:
        tensors: Tensors of one element each, on the parameter's device.
        row: Returns the kernel's scalars from the tensors' values, in order; ``None`` if it can't. It is
            called on another thread, once per update. It holds no tensor, and nothing that the next update
            changes.
    """

    tensors: tuple[Tensor, ...]
    row: Callable[[tuple[float, ...]], tuple[float, ...] | None]
