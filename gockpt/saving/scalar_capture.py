"""Capture of an update's scalars that are still being computed on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gockpt.saving.copy_requests import ring_request
from gockpt.saving.piece_updates import ScalarCopies
from gockpt.staging.stager import Source
from gockpt.tensor_memory import is_dense

if TYPE_CHECKING:
    import torch

    from gockpt.replay.pending_scalars import PendingScalars
    from gockpt.saving.piece_updates import GradientCopy
    from gockpt.staging.stager import CopyRequest, Stager

__all__ = ["ScalarCapture"]


class ScalarCapture:
    """The pending scalars that one update needs, each of them once."""

    def __init__(self, stager: Stager) -> None:
        self._stager = stager
        self._tensors: dict[int, torch.Tensor] = {}
        self._found_inf: torch.Tensor | None = None
        self._wanted: list[tuple[PendingScalars, list[GradientCopy]]] = []

    def found(self, tensor: torch.Tensor) -> bool:
        """Take the number that says whether the update was skipped; ``False`` if it can't be copied."""
        if not self._add(tensor):
            return False
        self._found_inf = tensor
        return True

    def take(self, pending: PendingScalars) -> bool:
        """Take an update's scalars; ``False`` if they can't be copied."""
        return all(self._add(tensor) for tensor in pending.tensors)

    def wanted(self, pending: PendingScalars, gradients: list[GradientCopy]) -> None:
        """Note the gradients that need them."""
        self._wanted.append((pending, gradients))

    def _add(self, tensor: torch.Tensor) -> bool:
        if tensor.numel() != 1 or not self._stager.holds(tensor) or not is_dense(tensor):
            return False
        self._tensors[id(tensor)] = tensor
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.itemsize for tensor in self._tensors.values())

    def _ordered(self) -> list[torch.Tensor]:
        # Large ones first: then each is aligned, and there is no gap, so that they leave in one copy.
        return sorted(self._tensors.values(), key=lambda tensor: -tensor.itemsize)

    def requests(self, offset: int) -> list[CopyRequest]:
        """Return what is to be sent, each with its place, given the place of the first."""
        found = []
        for tensor in self._ordered():
            found.append(ring_request(Source(tensor, 0, tensor.itemsize, 0), offset))
            offset += tensor.itemsize
        return found

    def at(self, offset: int) -> ScalarCopies:
        """Return what is to be read when they have arrived."""
        ordered = self._ordered()
        numbers = {id(tensor): number for number, tensor in enumerate(ordered)}
        places = [
            (request.offset, tensor.dtype)
            for tensor, request in zip(ordered, self.requests(offset), strict=True)
        ]
        found = None if self._found_inf is None else numbers[id(self._found_inf)]
        rows = [
            (pending, tuple(numbers[id(tensor)] for tensor in pending.tensors), gradients)
            for pending, gradients in self._wanted
        ]
        return ScalarCopies(offset, places, found, rows)
