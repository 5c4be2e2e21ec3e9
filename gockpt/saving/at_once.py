"""Arrays that are copied inside a tick: buffers, small ones, and what can't be copied behind a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from gockpt.kernels.fingerprint_numba import copy_fingerprints, fingerprints

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gockpt.core.arena_layout import ArrayLayout, Slot
    from gockpt.core.array_spec import Name
    from gockpt.staging.arena import Arena

__all__ = ["AtOnce", "Slots", "copy_at_once", "slots_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """A table of the slots of some arrays.

    Attributes:
        arrays: The arrays.
        array: int64[S]: which of them each slot belongs to.
        starts: int64[S]: where its first byte is in its array.
        nbytes: int64[S]: its bytes.
        offsets: int64[S]: where they go in the arena.
    """

    arrays: tuple[ArrayLayout, ...]
    array: np.ndarray
    starts: np.ndarray
    nbytes: np.ndarray
    offsets: np.ndarray

    @property
    def names(self) -> list[Name]:
        """Names of the arrays."""
        return [array.spec.name for array in self.arrays]


def slots_of(arrays: Iterable[ArrayLayout]) -> Slots:
    """Return the table of all slots of ``arrays``."""
    chosen = tuple(arrays)
    rows = [
        (number, start, slot.nbytes, slot.offset)
        for number, array in enumerate(chosen)
        for start, slot in zip(_starts(array.slots), array.slots, strict=True)
    ]
    table = np.ascontiguousarray(np.array(rows, np.int64).reshape(-1, 4).T)
    return Slots(chosen, *table)


class AtOnce:
    """Arrays that are copied inside a tick, and their places in the arena.

    They are copied at every tick of a window, so the arena holds them as of the last tick. Row-major ones in
    host memory are copied by one call for all of them, the others by torch.
    """

    def __init__(self, slots: Slots, arena: Arena) -> None:
        self._slots = slots
        self._arena = arena
        self._names = slots.names
        self._targets = slots.offsets + arena.address
        self._positions = np.zeros_like(self._targets)
        self._copied: np.ndarray | None = None
        """Fingerprints of the last copies of what is copied by the table."""

    def copy(self, entries: Mapping[Name, torch.Tensor]) -> None:
        """Copy all of them now."""
        tensors = [entries[name] for name in self._names]
        rows, others = self._divided(tensors)
        sources = self._sources(tensors)
        self._copied = copy_fingerprints(
            *(column[rows] for column in (sources, self._targets, self._slots.nbytes, self._positions))
        )
        for number in others:
            copy_at_once(tensors[number], self._slots.arrays[number], self._arena)

    def same(self, entries: Mapping[Name, torch.Tensor]) -> bool:
        """Whether all of them still equal their last copies, bit for bit."""
        if self._copied is None:
            return not self._names
        tensors = [entries[name] for name in self._names]
        rows, others = self._divided(tensors)
        sources = self._sources(tensors)
        now = fingerprints(*(column[rows] for column in (sources, self._slots.nbytes, self._positions)))
        return np.array_equal(now, self._copied) and all(
            torch.equal(_bits(_target(tensors[n], slot, self._arena)), _bits(_rows(tensors[n], slot)))
            for n in others
            for slot in self._slots.arrays[n].slots
        )

    def _divided(self, tensors: Sequence[torch.Tensor]) -> tuple[np.ndarray, list[int]]:
        """Return the slots that are copied by the table: bool[S]; and the numbers of the other arrays."""
        plain = np.fromiter(map(_is_row_major, tensors), bool, len(tensors))
        return plain[self._slots.array], np.flatnonzero(~plain).tolist()

    def _sources(self, tensors: Sequence[torch.Tensor]) -> np.ndarray:
        addresses = np.fromiter(map(torch.Tensor.data_ptr, tensors), np.int64, len(tensors))
        sources: np.ndarray = addresses[self._slots.array] + self._slots.starts
        return sources


def copy_at_once(tensor: torch.Tensor, layout: ArrayLayout, arena: Arena) -> None:
    """Copy a whole tensor, of any memory order, row-major into its slots."""
    for slot in layout.slots:
        _target(tensor, slot, arena).copy_(_rows(tensor.detach(), slot))


def _starts(slots: Sequence[Slot]) -> list[int]:
    """Return where each slot's first byte is in its array."""
    starts, at = [], 0
    for slot in slots:
        starts.append(at)
        at += slot.nbytes
    return starts


def _is_row_major(tensor: torch.Tensor) -> bool:
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _rows(tensor: torch.Tensor, slot: Slot) -> torch.Tensor:
    return tensor[slot.row : slot.row + slot.rows] if tensor.dim() else tensor


def _target(tensor: torch.Tensor, slot: Slot, arena: Arena) -> torch.Tensor:
    shape = (slot.rows, *tensor.shape[1:]) if tensor.dim() else ()
    return torch.from_numpy(arena.view(slot.offset, slot.nbytes)).view(tensor.dtype).view(shape)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).cpu()
