"""Quantise gradients while packing them: float32 or bfloat16 to float16 with a power of two per block.

Contract: bit for bit ``reference.quantise``, except that which of the raw slots a block gets may differ
from run to run; the block's slot says which. ``gockpt.kernels.quantised`` has the format.

Legend: SIZE bytes per element (4 float32, 2 bfloat16), WIDTH what every address is a multiple of (16, or
SIZE). One program works on one block of 1024 elements at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["quantise"]


@triton.jit
def _values(source, inner, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Return the bits of a block's elements as float32; zeros where there is none."""
    bits = tl.load(source, mask=inner, other=0) if MASKED else tl.load(source)
    return bits if SIZE == 4 else bits.to(tl.uint32) << 16


@triton.jit
def _write(bits, payload, codes, slots, side, counter, block, capacity, at, inner, MASKED: tl.constexpr):
    """Write one block: its code, its float16 values and, if it is raw, its slot."""
    code = tl.max(((bits >> 23) & 255).to(tl.int32))
    power = tl.minimum(141 - code, 126)
    scale = ((power + 127) << 23).to(tl.float32, bitcast=True)
    finite = tl.where(code == 255, 0, bits).to(tl.float32, bitcast=True)
    halves = (finite * scale).to(tl.float16).to(tl.uint16, bitcast=True)
    if MASKED:
        tl.store(payload + at, halves, mask=inner)
    else:
        tl.store(payload + at, halves)
    tl.store(codes + block, code.to(tl.uint8))
    slot = tl.full((), -1, tl.int32)
    if code == 255:
        slot = tl.atomic_add(counter, 1, sem="relaxed")
        if slot < capacity:
            place = side + slot.to(tl.int64) * 1024
            tl.store(place + at, bits)
        else:
            slot = tl.full((), -1, tl.int32)
    tl.store(slots + block, slot)


@triton.jit(do_not_specialize=["count", "capacity"])
def quantise(
    addresses,
    places,
    blocks,
    payload,
    codes,
    slots,
    side,
    counter,
    count,
    capacity,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Quantise ``count`` blocks.

    Args:
        addresses: int64[S], see ``blocks.BlockTable``.
        places: int64[S, 3]: a span's first value in ``payload``, its length, its first block in ``codes``.
        blocks: int32[B, 2].
        payload: uint16, the values' section, at a multiple of 16 bytes.
        codes: uint8, one for each block of the message.
        slots: int32, likewise.
        side: uint32[capacity, 1024].
        counter: int32, zero before; afterwards how many raw blocks there are, with or without a slot.
        count: B.
        capacity: How many slots ``side`` has.
        SIZE: 4 for float32, 2 for bfloat16.
        WIDTH: The table's ``width``.
    """
    kind: tl.constexpr = tl.uint32 if SIZE == 4 else tl.uint16
    for block in range(tl.program_id(0), count, tl.num_programs(0)):
        span = tl.load(blocks + block * 2).to(tl.int64)
        number = tl.load(blocks + block * 2 + 1)
        start = number.to(tl.int64) * 1024
        row = places + span * 3
        values = tl.multiple_of(payload + tl.load(row) + start, 16)
        rest = tl.load(row + 1) - start
        here = tl.load(row + 2) + number
        address = tl.load(addresses + span) + start * SIZE
        source = tl.multiple_of(address.to(tl.pointer_type(kind)), WIDTH)
        at = tl.arange(0, 1024)
        inner = at < rest
        if rest >= 1024:
            bits = _values(source + at, inner, SIZE, False)
            _write(bits, values, codes, slots, side, counter, here, capacity, at, inner, False)
        else:
            bits = _values(source + at, inner, SIZE, True)
            _write(bits, values, codes, slots, side, counter, here, capacity, at, inner, True)
