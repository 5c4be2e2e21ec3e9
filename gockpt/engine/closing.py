"""What only the closing tick knows: extras, random states and other small tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gockpt.engine.at_once import copy_at_once
from gockpt.engine.messages import ArrayPlace
from gockpt.layout import lay_out
from gockpt.schema import ArraySpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from gockpt.engine.memory import Memory

__all__ = ["write_additions"]


def write_additions(added: Mapping[tuple[str, ...], torch.Tensor], memory: Memory) -> tuple[ArrayPlace, ...]:
    """Copy the tensors of extras and random states into their own arena, now.

    They are laid out at the close because only then is it known which there are.
    """
    specs = [
        ArraySpec(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in added.items()
    ]
    layout = lay_out(specs)
    arena = memory.additions(layout)
    for array, tensor in zip(layout.arrays, added.values(), strict=True):
        copy_at_once(tensor, array, arena)
    return tuple(ArrayPlace(array, 2) for array in layout.arrays)
