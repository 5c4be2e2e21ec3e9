"""Bytes of stored arrays on their way into live memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gockpt.errors import StateMismatch
from gockpt.fitting import Create, Fill
from gockpt.lazy import read_whole
from gockpt.tensors import DTYPE_OF, as_bytes, may_alias_itself

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gockpt.storage.reader import StoredCheckpoint

__all__ = ["Filler", "copy_into"]


class Filler:
    """Reads the arrays of one checkpoint, into live memory or into new tensors.

    Attributes:
        overwritten: What live memory was overwritten, or begun to be, in order.
    """

    def __init__(self, stored: StoredCheckpoint) -> None:
        self.overwritten: list[str] = []
        self._stored = stored
        self._targets: dict[str, torch.Tensor] = {}
        self._staged: dict[str, torch.Tensor] = {}

    def read(self, name: tuple[str, ...]) -> torch.Tensor:
        """Return an array as a new CPU tensor."""
        return read_whole(self._stored, "/".join(name))

    def reader_to(self, device: torch.device) -> Callable[[tuple[str, ...]], torch.Tensor]:
        """Return a function like :meth:`read` that puts the tensors on a device."""
        return lambda name: self.read(name).to(device)

    def stage(self, fills: Iterable[Fill]) -> None:
        """Read what goes into memory that overlaps itself (``expand``), and make sure that it can.

        Raises:
            StateMismatch: If elements that share memory here have different values there.
        """
        for fill in fills:
            if not may_alias_itself(fill.target):
                continue
            values = read_whole(self._stored, fill.source)
            collapsed = values
            for dim, stride in enumerate(fill.target.stride()):
                if stride == 0 and fill.target.shape[dim] > 1:
                    collapsed = collapsed.narrow(dim, 0, 1)
            if not torch.equal(_bits(collapsed.expand_as(values)), _bits(values)):
                what = f"{fill.name}: its elements share memory here, and differ in the checkpoint"
                msg = f"{what}; nothing was changed. Give it memory of its own (.clone()) before loading"
                raise StateMismatch(msg, mismatched=(what,))
            self._staged[fill.name] = collapsed

    def fill(self, fill: Fill) -> None:
        """Overwrite live memory; directly where its bytes stand in the file's order."""
        target = fill.target
        self._targets.setdefault(fill.source, target)
        if not target.numel():
            return
        self.overwritten.append(fill.name)
        if fill.name in self._staged:
            staged = self._staged.pop(fill.name)
            for dim, size in enumerate(staged.shape):
                target = target.narrow(dim, 0, size)
            copy_into(target, staged)
        elif target.device.type == "cpu" and target.is_contiguous():
            self._stored.read_into(fill.source, None, as_bytes(target))
            if not target.is_inference():
                # Written behind autograd's back: whoever saved this tensor for backward must notice.
                torch.autograd.graph.increment_version(target)
        else:
            copy_into(target, read_whole(self._stored, fill.source))

    def create(self, create: Create) -> torch.Tensor:
        """Return a new tensor with an array's values; a view of what shared its memory when saved."""
        shared = self._targets.get(create.source)
        if shared is not None and shared.device == create.device:
            return shared.detach()
        spec = self._stored.arrays[create.source].spec
        dtype = DTYPE_OF[spec.dtype]
        if spec.shape == tuple(create.like.shape):
            # The parameter's memory order: where fused kernels' tails fall depends on it.
            new = torch.empty_like(create.like, dtype=dtype, device=create.device, requires_grad=False)
        else:
            new = torch.empty(spec.shape, dtype=dtype, device=create.device)
        self.fill(Fill(create.source, new, create.name))
        return new


def copy_into(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy values of the same dtype into live memory, whatever autograd thinks of it."""
    with torch.inference_mode(mode=target.is_inference()), torch.no_grad():
        target.copy_(source)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(as_bytes(tensor.contiguous()))
