"""An update's numbers of which some stand on a device still when the update has been queued."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["LateNumbers"]


@dataclass(frozen=True, slots=True)
class LateNumbers:
    """What :func:`gockpt.replay.rules.scalars` returns where reading a number would wait for a device.

    The tensors leave the device with the update's gradients, as they are when that is queued. Nothing waits
    for them: ``row`` is called when they have arrived.

    Attributes:
        tensors: On the parameter's device, of one element each.
        row: Makes the kernel's numbers from the tensors' values, in order; ``None`` if it can't. It is called
            on another thread, once per update. It holds no tensor, and nothing that the next update changes.
    """

    tensors: tuple[Tensor, ...]
    row: Callable[[tuple[float, ...]], tuple[float, ...] | None]
