"""Launches of the device kernels on torch tensors: pack, unpack, quantise, encode, fingerprint.

Each class plans once, for given tensors, and keeps its tables on the device. Its methods only launch, on
the current stream: they allocate nothing, wait for nothing and read nothing back. The tensors are
kept alive as long as the object is; what they hold while a launch is in flight is the caller's concern.

Needs Triton, which torch brings along where it is built for GPUs. It is imported at the first launch.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gockpt.errors import UnsupportedState
from gockpt.kernels import launch_tables
from gockpt.kernels.gradient16_format import Gradient, Message, plan_message
from gockpt.kernels.gradient16_launch import Place, plan_each
from gockpt.tensor_memory import is_dense

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from gockpt.kernels.launch_tables import BlockTable

__all__ = ["Encoding", "Fingerprints", "Packing", "Quantising"]


class _Launches:
    """Tables on the device, and the tensors they speak of."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._tensors = dict(tensors)
        self._device = device
        self._tables: list[tuple[BlockTable, torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for name, tensor in self._tensors.items():
            _check(name, tensor, device)

    def _upload(self, tables: Sequence[BlockTable]) -> None:
        for table in tables:
            addresses, places, rows = (
                self._on_its_way(part).to(self._device, non_blocking=True)
                for part in (table.addresses, table.places, table.blocks)
            )
            self._tables.append((table, addresses, places, rows))

    def _on_its_way(self, part: np.ndarray) -> torch.Tensor:
        """Return a table in memory from which a copy to the device does not hold up the caller."""
        here = torch.from_numpy(np.ascontiguousarray(part))
        return here.pin_memory() if self._device.type == "cuda" else here

    def rebind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let the same launches speak of other tensors: this step's gradients, say.

        Args:
            tensors: The same names in the same order, with the same dtypes and numbers of elements.

        Raises:
            ValueError: If they are others, or one is less aligned than before; nothing was changed.
            UnsupportedState: If one of them doesn't fill its memory without gaps.
        """
        if list(tensors) != list(self._tensors):
            msg = f"planned for the tensors {list(self._tensors)}, got {list(tensors)}"
            raise ValueError(msg)
        for name, tensor in tensors.items():
            _check(name, tensor, self._device)
            before = self._tensors[name]
            if tensor.dtype != before.dtype or tensor.numel() != before.numel():
                msg = (
                    f"{name!r} had {before.numel()} elements of {before.dtype} when this was planned, "
                    f"and has {tensor.numel()} of {tensor.dtype}"
                )
                raise ValueError(msg)
        addresses = [tensor.data_ptr() for tensor in tensors.values()]
        moved = [launch_tables.rebound(table, addresses) for table, *_ in self._tables]
        for at, table in enumerate(moved):
            self._tables[at][1].copy_(self._on_its_way(table.addresses), non_blocking=True)
            self._tables[at] = (table, *self._tables[at][1:])
        self._tensors = dict(tensors)

    def _on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()


class Packing(_Launches):
    """Many tensors, and their places in one buffer.

    A tensor that fills its memory without gaps is copied in storage order, whatever its strides.
    """

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], offsets: Sequence[int], nbytes: int, device: torch.device
    ) -> None:
        """Plan the copies.

        Args:
            tensors: What is packed, by name.
            offsets: For each of them, the byte of the buffer where it starts.
            nbytes: Size of the buffer.
            device: Where tensors and buffer are.

        Raises:
            ValueError: If two would meet in the buffer, or one does not fit, or is on another device.
            UnsupportedState: If a tensor has holes or overlaps itself; its name is in the message.
        """
        super().__init__(tensors, device)
        self.nbytes = nbytes
        spans = [
            launch_tables.Span(tensor.data_ptr(), tensor.nbytes, offset)
            for tensor, offset in zip(self._tensors.values(), offsets, strict=True)
        ]
        self._upload(launch_tables.plan_pack(spans, nbytes))

    def pack(self, buffer: torch.Tensor, *, max_programs: int) -> None:
        """Copy all tensors into ``buffer``.

        Args:
            buffer: Contiguous uint8, at a multiple of 16 bytes; bytes that no tensor has stay as they are.
                On the device, or in host memory that is registered with it.
            max_programs: The most programs of a launch: bounds what it takes from the training beside it.
        """
        self._launch(buffer, max_programs, unpack=False)

    def unpack(self, buffer: torch.Tensor, *, max_programs: int) -> None:
        """Copy all tensors' bytes out of ``buffer``, back to where they are."""
        self._launch(buffer, max_programs, unpack=True)

    def _launch(self, buffer: torch.Tensor, max_programs: int, *, unpack: bool) -> None:
        from gockpt.kernels.pack_triton import pack

        _check_buffer(buffer, self.nbytes, self._device)
        with self._on_device():
            for table, addresses, places, rows in self._tables:
                pack[_grid(table, max_programs)](
                    addresses,
                    places,
                    rows,
                    buffer,
                    len(table.blocks),
                    WIDTH=table.width,
                    UNPACK=unpack,
                    WORDS=launch_tables.WORDS,
                    enable_fp_fusion=False,
                )


class Fingerprints(_Launches):
    """The fingerprints of many tensors, each as a whole or as a piece of one."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], positions: Sequence[int], device: torch.device
    ) -> None:
        """Plan the launches.

        Args:
            tensors: What is fingerprinted, by name, in storage order.
            positions: For each, the position of its first byte: a multiple of 8.
            device: Where they are.

        Raises:
            ValueError: If one is on another device, or a position is not at a word.
            UnsupportedState: If a tensor has holes or overlaps itself; its name is in the message.
        """
        super().__init__(tensors, device)
        self._upload(
            launch_tables.plan_fingerprints(
                [
                    launch_tables.Piece(tensor.data_ptr(), tensor.nbytes, position)
                    for tensor, position in zip(self._tensors.values(), positions, strict=True)
                ]
            )
        )
        self._sums = [
            torch.empty(len(table.spans), dtype=torch.int64, device=device) for table, *_ in self._tables
        ]
        self._sent: list[torch.Tensor] | None = None

    def launch(self, *, max_programs: int) -> None:
        """Start working them out; :meth:`values` has them afterwards."""
        from gockpt.kernels.fingerprint_triton import fingerprint

        self._sent = None
        with self._on_device():
            for (table, addresses, places, rows), sums in zip(self._tables, self._sums, strict=True):
                sums.zero_()
                fingerprint[_grid(table, max_programs)](
                    addresses,
                    places,
                    rows,
                    sums,
                    len(table.blocks),
                    WIDTH=table.width,
                    WORDS=launch_tables.WORDS,
                    enable_fp_fusion=False,
                )

    def send(self) -> None:
        """Start copying them to the host; :meth:`values` then waits for nothing.

        It is for the caller to know, by an event recorded after this, that they are there.
        """
        self._sent = [sums.to("cpu", non_blocking=True) for sums in self._sums]

    def values(self) -> dict[str, int]:
        """Return the fingerprints of the last launch. Waits for it; 0 for a tensor without elements."""
        found = [0] * len(self._tensors)
        for (table, *_), sums in zip(self._tables, self._sent or self._sums, strict=True):
            for span, value in zip(table.spans.tolist(), sums.tolist(), strict=True):
                found[span] = value % (1 << 64)
        return dict(zip(self._tensors, found, strict=True))


class Quantising(_Launches):
    """Gradients that are quantised into one message, see ``gockpt.kernels.gradient16_format``.

    Attributes:
        message: Its layout; also what reads it on the host.
    """

    message: Message

    def __init__(self, tensors: Mapping[str, torch.Tensor], raw_slots: int, device: torch.device) -> None:
        """Plan the message.

        Args:
            tensors: float32 or bfloat16 gradients, by name, in storage order.
            raw_slots: How many blocks with an Inf or NaN there is room for.
            device: Where they are.

        Raises:
            ValueError: If one is on another device.
            UnsupportedState: If a tensor has holes, overlaps itself, or has another dtype.
        """
        super().__init__(tensors, device)
        for name, tensor in self._tensors.items():
            if tensor.dtype not in (torch.float32, torch.bfloat16):
                msg = f"{name!r} is {tensor.dtype}; only float32 and bfloat16 gradients are quantised"
                raise UnsupportedState(msg)
        self.message = plan_message(
            [Gradient(t.data_ptr(), t.numel(), t.itemsize) for t in self._tensors.values()], raw_slots
        )
        self._upload(self.message.tables)

    def launch(self, buffer: torch.Tensor, *, max_programs: int) -> None:
        """Write the message to ``buffer``: contiguous uint8, at a multiple of 16 bytes."""
        from gockpt.kernels.gradient16_triton import quantise

        plan = self.message
        _check_buffer(buffer, plan.nbytes, self._device)
        buffer[:16].zero_()
        codes = buffer[plan.codes : plan.codes + plan.blocks]
        slots = buffer[plan.slots : plan.slots + 4 * plan.blocks].view(torch.int32)
        values = buffer[plan.values : plan.side].view(torch.uint16)
        side = buffer[plan.side : plan.nbytes].view(torch.uint32)
        counter = buffer[:16].view(torch.int32)
        with self._on_device():
            for table, addresses, places, rows in self._tables:
                quantise[_grid(table, max_programs)](
                    addresses,
                    places,
                    rows,
                    values,
                    codes,
                    slots,
                    side,
                    counter,
                    len(table.blocks),
                    plan.raw_slots,
                    SIZE=table.word,
                    WIDTH=table.width,
                    enable_fp_fusion=False,
                )


class Encoding(_Launches):
    """Gradients that are encoded while they are packed, each at its place, see ``gradient16_launch``."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        encoding: str,
        places: Sequence[tuple[int, int]],
        nbytes: int,
        device: torch.device,
    ) -> None:
        """Plan the launches.

        Args:
            tensors: float32 gradients, by name, in storage order.
            encoding: ``"fp16"`` or ``"bf16"``.
            places: For each of them, the byte of the buffer where it starts, and how many it takes.
            nbytes: Size of the buffer.
            device: Where tensors and buffer are.

        Raises:
            ValueError: If two would meet in the buffer, or one does not fit, or is on another device.
            UnsupportedState: If a tensor has holes, overlaps itself, or has another dtype.
        """
        super().__init__(tensors, device)
        for name, tensor in self._tensors.items():
            if tensor.dtype != torch.float32:
                msg = f"{name!r} is {tensor.dtype}; only float32 gradients are encoded"
                raise UnsupportedState(msg)
        self.nbytes = nbytes
        self._encoding = encoding
        rows = [
            Place(tensor.data_ptr(), tensor.numel(), offset, size)
            for tensor, (offset, size) in zip(self._tensors.values(), places, strict=True)
        ]
        self._upload(plan_each(encoding, rows, nbytes))

    def encode(self, buffer: torch.Tensor, *, max_programs: int) -> None:
        """Write all of them to ``buffer``: contiguous uint8, at a multiple of 16 bytes."""
        from gockpt.kernels.gradient16_triton import narrow_each, quantise_each, reset

        _check_buffer(buffer, self.nbytes, self._device)
        rounding = self._encoding == "bf16"
        kernel = narrow_each if rounding else quantise_each
        with self._on_device():
            for table, addresses, places, rows in self._tables:
                if not rounding:
                    many = len(places)
                    reset[(min(many, max_programs),)](places, buffer, many, enable_fp_fusion=False)
                kernel[_grid(table, max_programs)](
                    addresses,
                    places,
                    rows,
                    buffer,
                    len(table.blocks),
                    WIDTH=table.width,
                    enable_fp_fusion=False,
                )


def _grid(table: BlockTable, max_programs: int) -> tuple[int]:
    if max_programs < 1:
        msg = f"max_programs must be at least 1, got {max_programs}"
        raise ValueError(msg)
    return (min(len(table.blocks), max_programs),)


def _check(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Raise unless a tensor's elements fill one stretch of the device's memory exactly once."""
    if tensor.device != device:
        msg = f"{name!r} is on {tensor.device}, the others on {device}"
        raise ValueError(msg)
    if not is_dense(tensor):
        msg = (
            f"{name!r} does not fill one contiguous stretch of memory (shape {tuple(tensor.shape)}, "
            f"layout {tensor.layout}): pass a contiguous copy"
        )
        raise UnsupportedState(msg)


def _check_buffer(buffer: torch.Tensor, nbytes: int, device: torch.device) -> None:
    fits = buffer.dtype == torch.uint8 and buffer.dim() == 1 and buffer.is_contiguous()
    there = buffer.device == device or (buffer.device.type == "cpu" and buffer.is_pinned())
    if not fits or buffer.numel() < nbytes or buffer.data_ptr() % 16 or not there:
        msg = (
            f"the buffer must be at least {nbytes} contiguous bytes (uint8) on {device}, "
            f"at a multiple of 16, got {buffer.dtype} of shape {tuple(buffer.shape)} "
            f"at {buffer.data_ptr()} on {buffer.device}"
        )
        raise ValueError(msg)
