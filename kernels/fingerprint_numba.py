"""A 64-bit fingerprint of an array's bits that is the same however the array is cut.

Contract: equal to ``reference.fingerprint`` for every item size. Fingerprints of pieces, each given its
first element's global index, sum modulo 2**64 to the fingerprint of the whole, in any order.

Definition. An element of 1, 2 or 4 bytes is one word, zero-extended to 32 bits, with its row-major
index as key ``k``; an element of 8 or 16 bytes is 2 or 4 little-endian 32-bit words with keys
``2i, 2i+1`` or ``4i .. 4i+3``. All arithmetic is modulo 2**32, ``lo`` and ``hi`` are the halves of ``k``::

    x = lo * 0x9E3779B1 + hi * 0x85EBCA77                  mix(k)  = x ^ (x >> 16)
    y = lo * 0xC2B2AE3D + hi * 0x27D4EB2E + 0x165667B1     mix'(k) = y ^ (y >> 15)
    a = fmix32(w ^ mix(k))        shifts 16 13 16, factors 0x85EBCA6B 0xC2B2AE35
    b = fmix32'(w + mix'(k))      shifts 16 15 16, factors 0x7FEB352D 0x846CA68B
    F = sum of ((b << 32) | a)    modulo 2**64

For a fixed key both ``a`` and ``b`` are bijections of the word, so a change in any single word always
shows; ``k -> (x, y)`` is a bijection too (its determinant is odd). Only 32-bit multiplications: the same
definition runs near memory speed on a GPU.
"""

from __future__ import annotations

import numpy as np

from gockpt.kernels import reference
from gockpt.kernels.numba_compile import (
    WHY_NOT,
    address_of,
    as_uint8,
    as_uint16,
    as_uint32,
    copy_bytes,
    serial,
)

__all__ = ["MODULUS", "copy_fingerprint", "fingerprint"]

MODULUS = 1 << 64
TILE = 1 << 15
"""Bytes worked on at a time: what was just copied is still in cache when it is read back. At most 65536."""

_WORDS = {1: 1, 2: 1, 4: 1, 8: 2, 16: 4}

_X_LO, _X_HI = np.uint32(0x9E3779B1), np.uint32(0x85EBCA77)
_Y_LO, _Y_HI, _Y_ADD = np.uint32(0xC2B2AE3D), np.uint32(0x27D4EB2E), np.uint32(0x165667B1)
_A1, _A2 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)
_B1, _B2 = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)
_13, _15, _16, _HALF = np.uint32(13), np.uint32(15), np.uint32(16), np.uint32(0xFFFF)


@serial
def _sum_words(words: np.ndarray, lo: np.uint32, hi: np.uint32) -> np.uint64:
    """Sum over at most 65536 ``words``; their keys are ``hi * 2**32 + lo`` and on, ``lo`` not wrapping.

    All lanes are 32 bits wide: the low words are summed in two halves, which can't overflow here.
    """
    x0 = np.uint32(lo * _X_LO + hi * _X_HI)
    y0 = np.uint32(lo * _Y_LO + hi * _Y_HI + _Y_ADD)
    low = np.uint32(0)
    middle = np.uint32(0)
    high = np.uint32(0)
    for i in range(words.size):
        w = np.uint32(words[i])
        k = np.uint32(i)
        x = np.uint32(x0 + k * _X_LO)
        a = np.uint32(w ^ x ^ (x >> _16))
        a = np.uint32((a ^ (a >> _16)) * _A1)
        a = np.uint32((a ^ (a >> _13)) * _A2)
        a = np.uint32(a ^ (a >> _16))
        y = np.uint32(y0 + k * _Y_LO)
        b = np.uint32(w + (y ^ (y >> _15)))
        b = np.uint32((b ^ (b >> _16)) * _B1)
        b = np.uint32((b ^ (b >> _15)) * _B2)
        b = np.uint32(b ^ (b >> _16))
        low = np.uint32(low + (a & _HALF))
        middle = np.uint32(middle + (a >> _16))
        high = np.uint32(high + b)
    return np.uint64(low) + (np.uint64(middle) << np.uint64(16)) + (np.uint64(high) << np.uint64(32))


@serial
def _fingerprint(source: int, target: int, n: int, width: int, lo: int, hi: int) -> np.uint64:
    """Fingerprint ``n`` words at ``target``, after copying them there from ``source`` unless that is 0."""
    total = np.uint64(0)
    upper = np.uint32(hi)
    tile = TILE // width
    for first in range(0, n, tile):
        count = min(tile, n - first)
        here = target + first * width
        if source != 0:
            copy_bytes(here, source + first * width, count * width)
        key = np.uint32(lo + first)
        if width == 1:
            total += _sum_words(as_uint8(here, count), key, upper)
        elif width == 2:
            total += _sum_words(as_uint16(here, count), key, upper)
        else:
            total += _sum_words(as_uint32(here, count), key, upper)
    return total


def fingerprint(data: np.ndarray, itemsize: int, start: int = 0) -> int:
    """Return the fingerprint of ``data``, whose first element has the global index ``start``.

    Releases the GIL. Nothing is copied unless ``data`` is not aligned to its words.

    Args:
        data: One-dimensional C-contiguous uint8 view of whole elements.
        itemsize: Bytes per element: 1, 2, 4, 8 or 16.
        start: Row-major index, in the whole array, of the first element in ``data``.

    Raises:
        ValueError: If ``data`` is no such view or ``itemsize`` no such size.
    """
    n = _check(data, itemsize, start)
    if WHY_NOT:
        return _plainly(data, itemsize, start)
    if address_of(data) % (itemsize // _WORDS[itemsize]):
        data = data.copy()
    return _run(0, address_of(data), n, itemsize, start)


def copy_fingerprint(src: np.ndarray, dst: np.ndarray, itemsize: int, start: int = 0) -> int:
    """Copy ``src`` to ``dst`` and return the fingerprint of the bytes that then stand in ``dst``.

    One pass over memory: each tile is read back from cache right after it was copied. What is
    fingerprinted is the target, so a source that changes meanwhile can't go unnoticed by comparing
    this value with the source's own. Releases the GIL.

    Args:
        src: One-dimensional C-contiguous uint8 view of whole elements.
        dst: Writable view of the same form and size, apart from ``src``.
        itemsize: Bytes per element: 1, 2, 4, 8 or 16.
        start: Row-major index, in the whole array, of the first element in ``src``.

    Raises:
        ValueError: If the views do not fit together, or ``itemsize`` is no such size.
    """
    n = _check(src, itemsize, start)
    _check(dst, itemsize, start)
    if dst.size != src.size or not dst.flags.writeable:
        state = "writable" if dst.flags.writeable else "read-only"
        msg = f"dst must be writable and hold {src.size} bytes like src, got {dst.size} bytes, {state}"
        raise ValueError(msg)
    if WHY_NOT or address_of(dst) % (itemsize // _WORDS[itemsize]):
        dst[:] = src
        return fingerprint(dst, itemsize, start)
    return _run(address_of(src), address_of(dst), n, itemsize, start)


def _plainly(data: np.ndarray, itemsize: int, start: int) -> int:
    """Return the fingerprint as NumPy computes it, in tiles: it takes some ten times their memory."""
    total = 0
    for first in range(0, data.size, TILE):
        total += reference.fingerprint(data[first : first + TILE], itemsize, start + first // itemsize)
    return total % MODULUS


def _run(source: int, target: int, n: int, itemsize: int, start: int) -> int:
    """Run the kernel once for each range of keys that share their upper half."""
    words = _WORDS[itemsize]
    width = itemsize // words
    total = done = 0
    while done < n:
        key = start * words + done
        lo, hi = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
        count = min(n - done, (1 << 32) - lo)
        here = source + done * width if source else 0
        total += int(_fingerprint(here, target + done * width, count, width, lo, hi))
        done += count
    return total % MODULUS


def _check(data: np.ndarray, itemsize: int, start: int) -> int:
    """Return how many words ``data`` holds, or raise."""
    if itemsize not in _WORDS:
        msg = f"itemsize must be one of {sorted(_WORDS)}, got {itemsize}"
        raise ValueError(msg)
    if data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous or data.size % itemsize:
        msg = (
            f"expected a contiguous one-dimensional uint8 view of whole {itemsize}-byte elements, "
            f"got {data.dtype} of shape {data.shape} and strides {data.strides}"
        )
        raise ValueError(msg)
    if start < 0:
        msg = f"start must not be negative, got {start}"
        raise ValueError(msg)
    return data.size // itemsize * _WORDS[itemsize]
