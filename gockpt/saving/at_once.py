"""Arrays that are copied inside a tick: buffers, small ones, and what can't be copied behind a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gockpt.core.arena_layout import ArrayLayout, Slot
    from gockpt.staging.arena import Arena

__all__ = ["AtOnce", "copy_at_once"]


class AtOnce:
    """Arrays that are copied inside a tick, and their places in the arena.

    They are copied at every tick of a window, so the arena holds them as of the last tick.
    """

    def __init__(self, arrays: Iterable[ArrayLayout], arena: Arena) -> None:
        self._arrays = [(a.spec.name, a.slots) for a in arrays]
        self._arena = arena
        self._targets: dict[tuple[str, ...], list[torch.Tensor]] = {}

    def copy(self, entries: dict[tuple[str, ...], torch.Tensor]) -> None:
        """Copy all of them now."""
        for name, slots in self._arrays:
            source = entries[name]
            targets = self._targets.get(name)
            if targets is None:
                targets = self._targets[name] = [_target(source, slot, self._arena) for slot in slots]
            if len(targets) == 1:
                targets[0].copy_(source)
                continue
            for slot, target in zip(slots, targets, strict=True):
                target.copy_(source[slot.row : slot.row + slot.rows])

    def same(self, entries: dict[tuple[str, ...], torch.Tensor]) -> bool:
        """Whether all of them still equal their last copies, bit for bit."""
        return all(
            torch.equal(_bits(target), _bits(_rows(entries[name], slot)))
            for name, slots in self._arrays
            for slot, target in zip(slots, self._targets.get(name, ()), strict=True)
        )


def copy_at_once(tensor: torch.Tensor, layout: ArrayLayout, arena: Arena) -> None:
    """Copy a whole tensor, of any memory order, row-major into its slots."""
    for slot in layout.slots:
        _target(tensor, slot, arena).copy_(_rows(tensor.detach(), slot))


def _rows(tensor: torch.Tensor, slot: Slot) -> torch.Tensor:
    return tensor[slot.row : slot.row + slot.rows] if tensor.dim() else tensor


def _target(tensor: torch.Tensor, slot: Slot, arena: Arena) -> torch.Tensor:
    shape = (slot.rows, *tensor.shape[1:]) if tensor.dim() else ()
    return torch.from_numpy(arena.view(slot.offset, slot.nbytes)).view(tensor.dtype).view(shape)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).cpu()
