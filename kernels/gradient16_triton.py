"""Quantise gradients while packing them: float32 or bfloat16 to float16 with a power of two per block.

Contract: bit for bit ``reference.quantise``, except that which of the raw slots a block gets may differ
from run to run; the block's slot says which. ``gockpt.kernels.gradient16_format`` has the format. For
gradients of which each is a message of its own, or in bfloat16: the same bits as
``gockpt.kernels.gradient16_numba`` writes.

Legend: SIZE bytes per element (4 float32, 2 bfloat16), WIDTH what every address is a multiple of (16, or
SIZE). One program works on one block of 1024 elements at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["narrow_each", "quantise", "quantise_each", "reset"]


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


@triton.jit(do_not_specialize=["count"])
def reset(places, buffer, count):
    """Zero the counters of ``count`` messages, for :func:`quantise_each`.

    Args:
        places: int64[S, 7], see ``gradient16_launch.plan_each``.
        buffer: The buffer's first byte, at a multiple of 16.
        count: S.
    """
    for span in range(tl.program_id(0), count, tl.num_programs(0)):
        place = tl.load(places + span * 7 + 5)
        counter = (buffer + place).to(tl.pointer_type(tl.int32), bitcast=True)
        tl.store(counter + tl.arange(0, 4), tl.full((4,), 0, tl.int32))


@triton.jit(do_not_specialize=["count"])
def quantise_each(addresses, places, blocks, buffer, count, WIDTH: tl.constexpr):
    """Quantise ``count`` blocks of float32 gradients, each of which is a message of its own.

    Args:
        addresses: int64[S], see ``blocks.BlockTable``.
        places: int64[S, 7], see ``gradient16_launch.plan_each``.
        blocks: int32[B, 2].
        buffer: The buffer's first byte, at a multiple of 16; the messages' counters are zero.
        count: B.
        WIDTH: The table's ``width``.
    """
    for block in range(tl.program_id(0), count, tl.num_programs(0)):
        span = tl.load(blocks + block * 2).to(tl.int64)
        number = tl.load(blocks + block * 2 + 1)
        start = number.to(tl.int64) * 1024
        row = places + span * 7
        values = (buffer + tl.load(row) + start * 2).to(tl.pointer_type(tl.uint16), bitcast=True)
        values = tl.multiple_of(values, 16)
        rest = tl.load(row + 1) - start
        codes = buffer + tl.load(row + 2)
        slots = (buffer + tl.load(row + 3)).to(tl.pointer_type(tl.int32), bitcast=True)
        side = (buffer + tl.load(row + 4)).to(tl.pointer_type(tl.uint32), bitcast=True)
        side = tl.multiple_of(side, 16)
        counter = (buffer + tl.load(row + 5)).to(tl.pointer_type(tl.int32), bitcast=True)
        capacity = tl.load(row + 6)
        address = tl.load(addresses + span) + start * 4
        source = tl.multiple_of(address.to(tl.pointer_type(tl.uint32)), WIDTH)
        at = tl.arange(0, 1024)
        inner = at < rest
        if rest >= 1024:
            bits = _values(source + at, inner, 4, False)
            _write(bits, values, codes, slots, side, counter, number, capacity, at, inner, False)
        else:
            bits = _values(source + at, inner, 4, True)
            _write(bits, values, codes, slots, side, counter, number, capacity, at, inner, True)


@triton.jit
def _narrow(bits):
    """Round float32 to bfloat16 as ``gradient16_numba.narrow`` does, as bits."""
    upper = bits >> 16
    rounded = (bits + 0x7FFF + (upper & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, upper | 0x40, rounded).to(tl.uint16)


@triton.jit(do_not_specialize=["count"])
def narrow_each(addresses, places, blocks, buffer, count, WIDTH: tl.constexpr):
    """Round ``count`` blocks of float32 gradients to bfloat16.

    Args:
        addresses: int64[S], see ``blocks.BlockTable``.
        places: int64[S, 2], see ``gradient16_launch.plan_each``.
        blocks: int32[B, 2].
        buffer: The buffer's first byte, at a multiple of 16.
        count: B.
        WIDTH: The table's ``width``.
    """
    for block in range(tl.program_id(0), count, tl.num_programs(0)):
        span = tl.load(blocks + block * 2).to(tl.int64)
        start = tl.load(blocks + block * 2 + 1).to(tl.int64) * 1024
        row = places + span * 2
        values = (buffer + tl.load(row) + start * 2).to(tl.pointer_type(tl.uint16), bitcast=True)
        values = tl.multiple_of(values, 16)
        rest = tl.load(row + 1) - start
        address = tl.load(addresses + span) + start * 4
        source = tl.multiple_of(address.to(tl.pointer_type(tl.uint32)), WIDTH)
        at = tl.arange(0, 1024)
        if rest >= 1024:
            tl.store(values + at, _narrow(tl.load(source + at)))
        else:
            inner = at < rest
            tl.store(values + at, _narrow(tl.load(source + at, mask=inner, other=0)), mask=inner)
