"""Gradients as float16 with a power of two per block: the format, its layout, and how they are read back.

A *block* is up to 1024 consecutive elements of one tensor. Its *code* is one byte, the largest biased
exponent among its float32 values (bits 30 to 23). The code is scale and flag in one:

- 0 to 254: the block's values ``x`` travel as ``float16(x * 2**k)``, rounded to nearest even, with
  ``k = min(141 - code, 126)``. So the largest one lands in [2**14, 2**15) and nothing overflows. The
  limit makes ``2**-k`` a normal float32; it is reached by blocks without a value of 2**-112 or more
  (all zeros among them), whose values stay below 2**15 as well. Signs, that of -0.0 too, are kept.
- 255: there is an Inf or NaN. The block travels *raw*, as float32 bits, in a slot of the side area; its
  float16 values are zeros.

bfloat16 gradients are widened first, which is exact. One *message* holds many tensors:

======== ======================== ==========================================================
section  type                     what
======== ======================== ==========================================================
counter  int32, then 12 bytes     how many raw blocks there are
codes    uint8[B]                 of all blocks, tensor after tensor
slots    int32[B]                 the slot of a raw block, -1 for every other
values   uint16[...]              float16 bits; each tensor starts at a multiple of 8
side     uint32[R, 1024]          raw blocks, padded with zeros; only the used slots hold anything
======== ======================== ==========================================================

Sections start at multiples of 16 bytes. Slots are taken in the order in which the blocks happen to be worked
on; what is read back does not depend on it.

**Bound and overflow.** With R = B no message can overflow; that is twice the room of the float32 gradients.
With a smaller R, a raw block that finds no slot has slot -1, and the counter says how many there are.
Such a message is incomplete and :func:`dequantise` refuses it: what it holds must travel another way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gockpt.kernels.launch_tables import BlockTable, cut
from gockpt.kernels.numba_compile import serial

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["BLOCK", "RAW", "Gradient", "Message", "dequantise", "plan_message"]

BLOCK = 1024
RAW = 255

_MAGNITUDE, _SIGN, _NORMAL = np.uint32(0x7FFF), np.uint32(0x8000), np.uint32(0x0400)
_HALF, _BIAS = np.uint32(0x3F000000), np.uint32(0x38000000)
_13, _16, _23 = np.uint32(13), np.uint32(16), np.uint32(23)


@dataclass(frozen=True, slots=True)
class Gradient:
    """One tensor to be quantised: ``count`` values of ``itemsize`` bytes (4 float32, 2 bfloat16)."""

    address: int
    count: int
    itemsize: int


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """Where everything stands in one message.

    Attributes:
        nbytes: All of it.
        blocks: B.
        raw_slots: R.
        codes: Byte offset of the codes.
        slots: Byte offset of the slots.
        values: Byte offset of the values.
        side: Byte offset of the side area.
        first_value: For each tensor, the index of its first value in that section.
        first_block: For each tensor, the index of its first block.
        counts: For each tensor, how many values it has.
        tables: The launches that write it.
    """

    nbytes: int
    blocks: int
    raw_slots: int
    codes: int
    slots: int
    values: int
    side: int
    first_value: tuple[int, ...]
    first_block: tuple[int, ...]
    counts: tuple[int, ...]
    tables: tuple[BlockTable, ...]

    def incomplete(self, data: np.ndarray) -> int:
        """Return how many raw blocks of a message found no slot; its tensors must travel another way."""
        return max(0, int(data[:4].view(np.int32)[0]) - self.raw_slots)

    def read(self, data: np.ndarray, tensor: int, out: np.ndarray, first: int = 0) -> None:
        """Write ``out.size`` values of one tensor, from its element ``first`` on, to ``out``.

        Releases the GIL while it works. Meant for tiles: any stretch may be read, in any order.

        Args:
            data: The message: one-dimensional contiguous uint8 view, at a multiple of 4 bytes.
            tensor: The tensor's index in the list that was planned.
            out: Contiguous one-dimensional float32.
            first: Index of the first element wanted.

        Raises:
            ValueError: If a raw block is wanted that found no slot, or the stretch is not the tensor's.
        """
        count = self.counts[tensor]
        if first < 0 or first + out.size > count or data.size < self.nbytes:
            msg = (
                f"wanted elements {first} to {first + out.size} of tensor {tensor}, which has {count}, "
                f"from {data.size} of {self.nbytes} bytes"
            )
            raise ValueError(msg)
        block, value = self.first_block[tensor], self.first_value[tensor]
        many = -(-count // BLOCK)
        dequantise(
            data[self.codes : self.codes + self.blocks][block : block + many],
            data[self.slots : self.slots + 4 * self.blocks].view(np.int32)[block : block + many],
            data[self.values + 2 * value : self.values + 2 * (value + count)].view(np.uint16),
            data[self.side : self.nbytes].view(np.uint32),
            first,
            out,
        )


def plan_message(gradients: Sequence[Gradient], raw_slots: int) -> Message:
    """Return the layout of a message and the launches that write it.

    Args:
        gradients: What it holds; tensors without elements take no room.
        raw_slots: R, how many blocks with an Inf or NaN there may be. ``sum(ceil(count / 1024))`` is
            always enough.

    Raises:
        ValueError: If an item size is neither 2 nor 4, or an address no multiple of it.
    """
    for number, g in enumerate(gradients):
        if g.itemsize not in (2, 4) or g.count < 0 or g.address < 0 or g.address % g.itemsize:
            msg = f"gradient {number} is not at a multiple of its 2 or 4 bytes per value: {g}"
            raise ValueError(msg)
    if raw_slots < 0:
        msg = f"raw_slots must not be negative, got {raw_slots}"
        raise ValueError(msg)
    rows = np.array([(g.address, g.count, g.itemsize) for g in gradients], np.int64).reshape(-1, 3)
    address, count, size = rows.T
    many = -(-count // BLOCK)
    block_ends, room = np.cumsum(many), (count + 7) // 8 * 8
    first_block, first_value = block_ends - many, np.cumsum(room) - room
    blocks = int(many.sum())
    codes = 16
    slots = codes + _up(blocks)
    values = slots + _up(4 * blocks)
    side = values + 2 * int(room.sum())
    wide = address % 16 == 0
    tables = []
    for aligned in (True, False):
        for itemsize in (4, 2):
            chosen = np.flatnonzero((wide == aligned) & (size == itemsize) & (count > 0))
            if chosen.size:
                places = np.stack([first_value[chosen], count[chosen], first_block[chosen]], axis=1)
                width = 16 if aligned else itemsize
                table = cut(count[chosen], BLOCK)
                tables.append(BlockTable(width, itemsize, chosen, address[chosen], places, table))
    return Message(
        nbytes=side + 4 * BLOCK * raw_slots,
        blocks=blocks,
        raw_slots=raw_slots,
        codes=codes,
        slots=slots,
        values=values,
        side=side,
        first_value=tuple(first_value.tolist()),
        first_block=tuple(first_block.tolist()),
        counts=tuple(count.tolist()),
        tables=tuple(tables),
    )


def _up(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


@serial
def _widen(halves: np.ndarray, inverse: np.float32, bits: np.ndarray, floats: np.ndarray) -> None:
    """One tile of finite float16 to float32, times ``inverse``. ``bits`` and ``floats`` are one memory.

    A subnormal is built as 0.5 + m * 2**-24, less 0.5: no operand is subnormal, so that flushing of
    subnormals, if the process has turned it on, does not reach it.
    """
    for i in range(halves.size):
        magnitude = np.uint32(halves[i]) & _MAGNITUDE
        bits[i] = _HALF + magnitude if magnitude < _NORMAL else (magnitude << _13) + _BIAS
    for i in range(halves.size):
        value = floats[i]
        small = (np.uint32(halves[i]) & _MAGNITUDE) < _NORMAL
        floats[i] = (value - np.float32(0.5) if small else value) * inverse
    for i in range(halves.size):
        bits[i] = bits[i] | ((np.uint32(halves[i]) & _SIGN) << _16)


@serial
def _dequantise(
    codes: np.ndarray,
    slots: np.ndarray,
    halves: np.ndarray,
    side: np.ndarray,
    first: int,
    bits: np.ndarray,
    floats: np.ndarray,
    scale_bits: np.ndarray,
    scale: np.ndarray,
) -> int:
    """Return the first raw block without a slot, or -1 when all was written."""
    done = 0
    while done < bits.size:
        block = (first + done) // BLOCK
        inside = first + done - block * BLOCK
        count = min(BLOCK - inside, bits.size - done)
        code = int(codes[block])
        if code == RAW:
            slot = int(slots[block])
            if slot < 0 or (slot + 1) * BLOCK > side.size:
                return block
            source = side[slot * BLOCK + inside : slot * BLOCK + inside + count]
            target = bits[done : done + count]
            for i in range(count):
                target[i] = source[i]
        else:
            power = min(141 - code, 126)
            scale_bits[0] = np.uint32(127 - power) << _23
            _widen(
                halves[first + done : first + done + count],
                scale[0],
                bits[done : done + count],
                floats[done : done + count],
            )
        done += count
    return -1


def dequantise(
    codes: np.ndarray, slots: np.ndarray, halves: np.ndarray, side: np.ndarray, first: int, out: np.ndarray
) -> None:
    """Write a stretch of one tensor's values, as float32, to ``out``.

    Equal to ``reference.dequantise`` in every bit. Releases the GIL and starts no thread.

    Args:
        codes: uint8, one for each of the tensor's blocks.
        slots: int32, likewise.
        halves: uint16, the tensor's values.
        side: uint32, all slots one after the other.
        first: Index of the first element wanted.
        out: Contiguous one-dimensional float32; its length says how many are wanted.

    Raises:
        ValueError: If the stretch is not inside the tensor, or a raw block in it found no slot; what
            ``out`` holds then is undefined.
    """
    if (
        first < 0
        or first + out.size > halves.size
        or codes.size * BLOCK < halves.size
        or slots.size < codes.size
    ):
        msg = f"wanted elements {first} to {first + out.size} of {halves.size} in {codes.size} blocks"
        raise ValueError(msg)
    scale_bits = np.zeros(1, np.uint32)
    bits = out.view(np.uint32)
    scale = scale_bits.view(np.float32)
    lost = _dequantise(codes, slots, halves, side, first, bits, out, scale_bits, scale)
    if lost >= 0:
        msg = f"block {lost} has an Inf or NaN and found no raw slot: the message is incomplete"
        raise ValueError(msg)
