"""Reading of stored arrays into live memory and into new tensors."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np
import torch

from gockpt.core.array_spec import public_name
from gockpt.errors import ManifestCorrupt, StateMismatch
from gockpt.loading.fit_model import Assign, Fill
from gockpt.loading.lazy_tensor import read_whole
from gockpt.state.strides import allocate
from gockpt.state.tensors import DTYPE_OF, is_subclass, may_alias_itself
from gockpt.storage.read.checkpoint import Wanted
from gockpt.tensor_memory import as_bytes, dense_range

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gockpt.loading.load_plan import Create
    from gockpt.state.strides import Strides
    from gockpt.storage.read.checkpoint import StoredCheckpoint
    from gockpt.tensor_memory import Bytes

__all__ = ["Filler", "Kept", "copy_into"]


class Filler:
    """Reads the arrays of one checkpoint, into live memory or into new tensors.

    Attributes:
        overwritten: Live memory that was overwritten, or begun to be, in order.
    """

    def __init__(self, stored: StoredCheckpoint) -> None:
        self.overwritten: list[str] = []
        self._stored = stored
        self._targets: dict[str, torch.Tensor] = {}
        self._staged: dict[str, torch.Tensor] = {}
        # By id of a part, which the caller's plan keeps alive.
        self._filled: set[int] = set()
        self._new: dict[int, torch.Tensor] = {}

    def bytes_of(self, name: tuple[str, ...]) -> Bytes:
        """Return an array's bytes, row-major, in new memory."""
        public = public_name(name)
        data = np.empty(self._stored.arrays[public].spec.nbytes, np.uint8)
        if data.size:
            self._stored.read_into(public, None, data)
        return data

    def read(self, name: tuple[str, ...]) -> torch.Tensor:
        """Return an array as a new CPU tensor."""
        return read_whole(self._stored, public_name(name))

    def read_as(self, name: tuple[str, ...], strides: Strides | None, device: torch.device) -> torch.Tensor:
        """Return an array as a new tensor on a device, with these strides (``None``: row-major)."""
        values = self.read(name)
        if strides is None:
            return values.to(device)
        if len(strides) != values.dim():
            msg = f"the state document gives {public_name(name)!r} {len(strides)} strides"
            raise ManifestCorrupt(msg)
        return reordered(values, strides, device)

    def apart(self) -> Filler:
        """Return another filler whose tensors share no memory with those of this one."""
        return Filler(self._stored)

    def stage(self, fills: Iterable[Fill]) -> None:
        """Read the arrays for memory that overlaps itself (``expand``), and check that they fit into it.

        Raises:
            StateMismatch: If elements that share live memory have different saved values.
        """
        for fill in fills:
            if not may_alias_itself(fill.target):
                continue
            values = read_whole(self._stored, fill.source)
            collapsed = _collapsed(values, fill.target.stride())
            if collapsed is None:
                what = f"{fill.name}: its elements share memory, but differ in the checkpoint"
                msg = f"{what}; nothing was changed. Give it memory of its own (.clone()) before loading"
                raise StateMismatch(msg, mismatched=(what,))
            self._staged[fill.name] = collapsed

    def fill_many(self, parts: Iterable[Fill | Create]) -> None:
        """Read all arrays that go straight into CPU memory, in several threads.

        :meth:`fill` and :meth:`create` of the same parts then only do the remaining work. Memory that
        several parts share gets its values in the order of the parts, as without this call.
        """
        fills: list[tuple[Fill, int]] = []
        for part in parts:
            if isinstance(part, Fill):
                fill = part
            elif part.source in self._targets:
                continue  # it may become a view of the other one
            else:
                self._new[id(part)] = new = self._empty(part)
                fill = Fill(part.source, new, part.name)
            self._targets.setdefault(fill.source, fill.target)
            fills.append((fill, id(part)))
        later = _overlapping([fill.target for fill, _ in fills])
        straight: list[tuple[Fill, int]] = []
        wanted: list[Wanted] = []
        for index, (fill, identity) in enumerate(fills):
            data = None if index in later else _bytes_in_place(fill.target)
            if data is not None:
                straight.append((fill, identity))
                wanted.append(Wanted(fill.source, None, data))
        begun: dict[int, None] = {}  # in order and each once, though several threads add to it
        try:
            self._stored.read_many(wanted, begun=begun.setdefault)
        finally:
            self._written([straight[index][0] for index in begun])
        self._filled.update(identity for _, identity in straight)

    def fill(self, fill: Fill) -> None:
        """Overwrite live memory; directly if its bytes have the file's order."""
        target = fill.target
        self._targets.setdefault(fill.source, target)
        if not target.numel() or id(fill) in self._filled:
            return
        if _goes_straight(target):
            try:
                self._stored.read_into(fill.source, None, as_bytes(target))
            finally:
                self._written([fill])
            return
        self.overwritten.append(fill.name)
        if fill.name in self._staged:
            _copy_collapsed(target, self._staged.pop(fill.name))
        else:
            copy_into(target, read_whole(self._stored, fill.source))

    def assign(self, assign: Assign) -> None:
        """Copy a tensor that a hook made into live memory, as ``load_state_dict`` does."""
        self.overwritten.append(assign.name)
        copy_into(assign.target, assign.value)

    def create(self, create: Create) -> torch.Tensor:
        """Return a new tensor with an array's values; a view of the one whose memory it shared when saved."""
        new = self._new.pop(id(create), None)
        if new is not None and id(create) in self._filled:
            return new
        if new is None:
            shared = self._targets.get(create.source)
            if shared is not None and shared.device == create.device:
                return shared.detach()
            new = self._empty(create)
        fill = Fill(create.source, new, create.name)
        self.stage([fill])
        self.fill(fill)
        return new

    def _empty(self, create: Create) -> torch.Tensor:
        spec = self._stored.arrays[create.source].spec
        dtype = DTYPE_OF[spec.dtype]
        if create.strides is not None:
            return allocate(spec.shape, create.strides, dtype=dtype, device=create.device)
        if spec.shape == tuple(create.like.shape) and not is_subclass(create.like):
            # The parameter's memory order: it decides which elements are the tail of a fused kernel.
            return torch.empty_like(create.like, dtype=dtype, device=create.device, requires_grad=False)
        return torch.empty(spec.shape, dtype=dtype, device=create.device)

    def _written(self, fills: Sequence[Fill]) -> None:
        """Note that tensors' bytes were written behind autograd's back, or begun to be."""
        self.overwritten += (fill.name for fill in fills)
        # Autograd must notice if it saved these tensors for backward.
        torch.autograd.graph.increment_version(
            [fill.target for fill in fills if not fill.target.is_inference()]
        )


def copy_into(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy values of the same dtype into live memory, also into leaves that require gradients."""
    with torch.inference_mode(mode=target.is_inference()), torch.no_grad():
        target.copy_(source)


class Kept:
    """Copies of live tensors on the CPU, to undo what a load overwrote."""

    def __init__(self, targets: Iterable[torch.Tensor]) -> None:
        """Copy the tensors' values."""
        self._copies = [(target, target.detach().to("cpu", copy=True)) for target in targets]

    def put_back(self) -> None:
        """Restore each tensor's former values."""
        for target, values in self._copies:
            collapsed = _collapsed(values, target.stride())
            _copy_collapsed(target, values if collapsed is None else collapsed)


def reordered(values: torch.Tensor, strides: Strides, device: torch.device) -> torch.Tensor:
    """Return the values in new memory with these strides; contiguous if they can't have them."""
    target = allocate(values.shape, strides, dtype=values.dtype, device=device)
    collapsed = _collapsed(values, target.stride())
    if collapsed is None:
        return values.to(device)
    _copy_collapsed(target, collapsed)
    return target


def _collapsed(values: torch.Tensor, strides: Strides) -> torch.Tensor | None:
    """Return one of each group of elements that would share memory (stride 0); ``None`` if values differ."""
    kept = values
    for dim, stride in enumerate(strides):
        if stride == 0 and values.shape[dim] > 1:
            kept = kept.narrow(dim, 0, 1)
    same = kept is values or torch.equal(_bits(kept.expand_as(values)), _bits(values))
    return kept if same else None


def _copy_collapsed(target: torch.Tensor, values: torch.Tensor) -> None:
    for dim, size in enumerate(values.shape):
        target = target.narrow(dim, 0, size)
    copy_into(target, values)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(as_bytes(tensor.contiguous()))


def _goes_straight(target: torch.Tensor) -> bool:
    """Whether a tensor's memory has the byte order of an array's file."""
    return target.device.type == "cpu" and target.is_contiguous()


def _bytes_in_place(target: torch.Tensor) -> Bytes | None:
    """Return the memory of a tensor that has the byte order of an array's file; the tensor keeps it alive.

    Returns:
        ``None`` if it is empty, not row-major, or not in CPU memory.
    """
    found = dense_range(target) if target.is_contiguous() else None
    if found is None or not all(found):
        return None
    address, nbytes = found
    return np.frombuffer(memoryview((ctypes.c_ubyte * nbytes).from_address(address)), np.uint8)


def _overlapping(targets: Sequence[torch.Tensor]) -> set[int]:
    """Return the indices of the targets that share memory with an earlier one.

    Targets that share memory only through a third one count as sharing it.
    """
    stretches = []
    for index, target in enumerate(targets):
        if target.is_cpu and (elements := target.numel()):
            if not target.is_contiguous():
                pairs = zip(target.shape, target.stride(), strict=True)
                elements = 1 + sum((size - 1) * stride for size, stride in pairs)
            start = target.data_ptr()
            stretches.append((start, start + elements * target.element_size(), index))
    stretches.sort()
    later: set[int] = set()
    end, first = 0, -1
    for start, stop, index in stretches:
        if start >= end:
            first, end = index, stop
            continue
        later.add(max(first, index))
        first = min(first, index)
        end = max(end, stop)
    return later
