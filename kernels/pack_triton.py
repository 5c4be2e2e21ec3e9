"""Pack scattered device memory into one buffer, and unpack it again: the Triton version.

Contract: byte for byte a memcpy of every span that ``launch_tables.plan_pack`` was given, whatever the bytes
mean; not a byte beside them is read or written. A launch only launches: tables and buffer are the caller's.

Legend: WIDTH what every address and offset is a multiple of (16, 8, 4, 2 or 1 bytes), WORDS words of
``min(WIDTH, 4)`` bytes per block. A whole block is moved unmasked, so that with WIDTH 16 all its accesses
are 128 bits wide; a span's last block is masked, and its last 1 to 3 bytes go one by one. The
grid may have any number of programs: each takes every n-th block, n being their number.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["pack"]


@triton.jit(do_not_specialize=["count"])
def pack(
    addresses,
    places,
    blocks,
    buffer,
    count,
    WIDTH: tl.constexpr,
    UNPACK: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Copy ``count`` blocks from where they are into ``buffer``, or back with UNPACK.

    Args:
        addresses: int64[S], see ``blocks.BlockTable``.
        places: int64[S, 2].
        blocks: int32[B, 2].
        buffer: The buffer's first byte, at a multiple of 16.
        count: B.
        WIDTH: The table's ``width``.
        UNPACK: Whether to copy out of the buffer.
        WORDS: ``blocks.WORDS``.
    """
    size: tl.constexpr = WIDTH if WIDTH < 4 else 4  # noqa: FURB136 - Triton compiles no min() of constants
    word: tl.constexpr = tl.uint32 if WIDTH >= 4 else (tl.uint16 if WIDTH == 2 else tl.uint8)
    whole: tl.constexpr = WORDS * size
    for block in range(tl.program_id(0), count, tl.num_programs(0)):
        row = blocks + block * 2
        span = tl.load(row).to(tl.int64)
        start = tl.load(row + 1).to(tl.int64) * whole
        place = tl.load(places + span * 2) + start
        rest = tl.load(places + span * 2 + 1) - start
        outside = (tl.load(addresses + span) + start).to(tl.pointer_type(word))
        inside = (buffer + place).to(tl.pointer_type(word), bitcast=True)
        outside = tl.multiple_of(outside, WIDTH)
        inside = tl.multiple_of(inside, WIDTH)
        source = inside if UNPACK else outside
        target = outside if UNPACK else inside
        at = tl.arange(0, WORDS)
        if rest >= whole:
            tl.store(target + at, tl.load(source + at))
        else:
            words = rest // size
            inner = at < words
            tl.store(target + at, tl.load(source + at, mask=inner), mask=inner)
            if size > 1:
                byte = tl.arange(0, size)
                left = byte < rest % size
                source_byte = (source + words).to(tl.pointer_type(tl.uint8), bitcast=True) + byte
                target_byte = (target + words).to(tl.pointer_type(tl.uint8), bitcast=True) + byte
                tl.store(target_byte, tl.load(source_byte, mask=left), mask=left)
