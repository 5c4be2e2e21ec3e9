"""Fingerprints of many stretches of device memory in a few launches: the Triton version.

Contract: each is the number that ``gockpt.kernels.fingerprint_numba.fingerprint`` gives for the same bytes at
the same position; there is the definition. The sum modulo 2**64 is the same in any order, so blocks are added
by atomics and the result is still deterministic. Multiplications are 32 bits wide, with a product of 64.

Legend: WIDTH what every address is a multiple of, WORDS words per block, of 8 bytes each.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["fingerprint"]


@triton.jit
def _spread(x, FACTOR: tl.constexpr):
    """Return x, xored with the product of its lower half and the factor."""
    low = x.to(tl.uint32).to(tl.uint64)
    return x ^ (low * tl.full((), FACTOR, tl.uint64))


@triton.jit
def _mixed(words, key):
    """Return what each word adds to the sum."""
    x = _spread(words ^ key, 0xCC9E2D52)
    x = x ^ (x >> 32)
    x = _spread(x, 0x85EBCA6A) + key
    x = x ^ (x >> 32)
    return _spread(x, 0xC2B2AE36).to(tl.int64)


@triton.jit
def _key(number):
    """Return the key of a word by its number."""
    return (number + 1).to(tl.uint64) * tl.full((), 0x9E3779B97F4A7C15, tl.uint64)


@triton.jit
def _load_words(address, inner, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    """Return the words at an address: those that are inner ones, or all if that is None."""
    at = tl.arange(0, WORDS)
    if WIDTH >= 8:
        pointer = tl.multiple_of(address.to(tl.pointer_type(tl.uint64)), WIDTH)
        words = tl.load(pointer + at, mask=inner)
    else:
        kind: tl.constexpr = tl.uint32 if WIDTH == 4 else (tl.uint16 if WIDTH == 2 else tl.uint8)
        pointer = tl.multiple_of(address.to(tl.pointer_type(kind)), WIDTH) + at * (8 // WIDTH)
        words = tl.load(pointer, mask=inner).to(tl.uint64)
        for part in tl.static_range(1, 8 // WIDTH):
            words |= tl.load(pointer + part, mask=inner).to(tl.uint64) << (8 * WIDTH * part)
    return words


@triton.jit
def _end(address, left, number):
    """Return what a last word of only ``left`` bytes adds to the sum; 0 if there is none."""
    pointer = address.to(tl.pointer_type(tl.uint8))
    word = tl.full((), 0, tl.uint64)
    for byte in tl.static_range(7):
        word |= tl.load(pointer + byte, mask=byte < left, other=0).to(tl.uint64) << (8 * byte)
    return tl.where(left > 0, _mixed(word, _key(number + ((8 - left).to(tl.int64) << 61))), 0)


@triton.jit(do_not_specialize=["count"])
def fingerprint(addresses, places, blocks, sums, count, WIDTH: tl.constexpr, WORDS: tl.constexpr):
    """Add the fingerprints of ``count`` blocks to their spans' sums.

    Args:
        addresses: int64[S], see ``launch_tables.BlockTable``.
        places: int64[S, 2]: the first word's number, and the number of bytes.
        blocks: int32[B, 2].
        sums: int64[S]; modulo 2**64, and zero before.
        count: B.
        WIDTH: The table's ``width``.
        WORDS: ``launch_tables.WORDS``.
    """
    lanes = tl.arange(0, WORDS).to(tl.uint64) * tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    for block in range(tl.program_id(0), count, tl.num_programs(0)):
        row = blocks + block * 2
        span = tl.load(row).to(tl.int64)
        start = tl.load(row + 1).to(tl.int64) * WORDS
        number = tl.load(places + span * 2) + start
        rest = tl.load(places + span * 2 + 1) - start * 8
        address = tl.load(addresses + span) + start * 8
        at = tl.arange(0, WORDS)
        whole = rest // 8
        if whole >= WORDS:
            words = _load_words(address, None, WIDTH, WORDS)
            total = tl.sum(_mixed(words, _key(number) + lanes))
        else:
            inner = at < whole
            words = _load_words(address, inner, WIDTH, WORDS)
            total = tl.sum(tl.where(inner, _mixed(words, _key(number) + lanes), 0))
            total += _end(address + whole * 8, rest - whole * 8, number + whole)
        tl.atomic_add(sums + span, total, sem="relaxed")
