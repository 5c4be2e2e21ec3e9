"""Fingerprints of many stretches of device memory in a few launches: the Triton version.

Contract: each is the number that ``gockpt.kernels.fingerprint_numba.fingerprint`` gives for the same bytes,
item size and start; there is the definition. The sum modulo 2**64 is the same in any order, so blocks are
added by atomics and the result is still deterministic. Multiplications are 32 bits wide.

Legend: WORD bytes per word (4, 2 or 1), WIDTH what every address is a multiple of, WORDS words per block.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["fingerprint"]


@triton.jit
def _times(value, FACTOR: tl.constexpr):
    """Multiply modulo 2**32."""
    return value * tl.full((), FACTOR, tl.uint32)


@triton.jit
def _word_sum(words, key, WORDS: tl.constexpr):
    """Return both 32-bit values of each word, whose keys count up from ``key``."""
    index = tl.arange(0, WORDS).to(tl.uint32)
    first = key.to(tl.uint32)
    lo = first + index
    upper = (key >> 32).to(tl.uint32)
    hi = tl.where(lo < first, upper + 1, upper)
    x = _times(lo, 0x9E3779B1) + _times(hi, 0x85EBCA77)
    a = words ^ x ^ (x >> 16)
    a = _times(a ^ (a >> 16), 0x85EBCA6B)
    a = _times(a ^ (a >> 13), 0xC2B2AE35)
    a = a ^ (a >> 16)
    y = _times(lo, 0xC2B2AE3D) + _times(hi, 0x27D4EB2E) + tl.full((), 0x165667B1, tl.uint32)
    b = words + (y ^ (y >> 15))
    b = _times(b ^ (b >> 16), 0x7FEB352D)
    b = _times(b ^ (b >> 15), 0x846CA68B)
    b = b ^ (b >> 16)
    return a, b


@triton.jit(do_not_specialize=["count"])
def fingerprint(
    addresses,
    places,
    blocks,
    sums,
    count,
    WORD: tl.constexpr,
    WIDTH: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Add the fingerprints of ``count`` blocks to their spans' sums.

    Args:
        addresses: int64[S], see ``blocks.BlockTable``.
        places: int64[S, 2]: the first word's key, and the number of words.
        blocks: int32[B, 2].
        sums: int64[S]; modulo 2**64, and zero before.
        count: B.
        WORD: The table's ``word``.
        WIDTH: The table's ``width``.
        WORDS: ``blocks.WORDS``.
    """
    kind: tl.constexpr = tl.uint32 if WORD == 4 else (tl.uint16 if WORD == 2 else tl.uint8)
    for block in range(tl.program_id(0), count, tl.num_programs(0)):
        row = blocks + block * 2
        span = tl.load(row).to(tl.int64)
        start = tl.load(row + 1).to(tl.int64) * WORDS
        key = tl.load(places + span * 2) + start
        rest = tl.load(places + span * 2 + 1) - start
        at = tl.arange(0, WORDS)
        address = tl.load(addresses + span) + start * WORD
        if WIDTH < WORD:
            one = address.to(tl.pointer_type(tl.uint8)) + at * WORD
            inner = at < rest
            words = tl.load(one, mask=inner, other=0).to(tl.uint32)
            for byte in tl.static_range(1, WORD):
                words |= tl.load(one + byte, mask=inner, other=0).to(tl.uint32) << (8 * byte)
        else:
            pointer = tl.multiple_of(address.to(tl.pointer_type(kind)), WIDTH)
            if rest >= WORDS:
                words = tl.load(pointer + at).to(tl.uint32)
            else:
                words = tl.load(pointer + at, mask=at < rest, other=0).to(tl.uint32)
        a, b = _word_sum(words, key, WORDS)
        inner = at < rest
        low = tl.sum(tl.where(inner, a, 0).to(tl.int64))
        high = tl.sum(tl.where(inner, b, 0).to(tl.int64))
        tl.atomic_add(sums + span, low + (high << 32), sem="relaxed")
