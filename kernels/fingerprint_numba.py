"""A 64-bit fingerprint of an array's bits that is the same however the array is cut at whole words.

Contract: equal to ``reference.fingerprint``. Fingerprints of pieces, each given the position of its first
byte, sum modulo 2**64 to the fingerprint of the whole, in any order. The dtype does not matter.

Definition. The bytes are little-endian words of 8 bytes, counted from position 0. Word ``n`` has the key
``k = (n + 1) * 0x9E3779B97F4A7C15``. A last word of only ``r`` bytes is padded with zeros, and has the key of
``n + (8 - r) * 2**61``, so that its length counts. With ``low(x)`` the lower 32 bits, modulo 2**64::

    x = w ^ k
    x = x ^ low(x) * 0xCC9E2D52
    x = x ^ (x >> 32)
    x = (x ^ low(x) * 0x85EBCA6A) + k
    x = x ^ (x >> 32)
    x = x ^ low(x) * 0xC2B2AE36
    F = sum of x

Each line is a bijection: since the factors are even, bit ``i`` of the new lower half is bit ``i`` of the old
one, xored with what lower bits decide, and the upper half is xored with what the lower half decides. So for a
fixed key ``x`` is a bijection of the word, and a change confined to one word always shows. The key goes in
twice, so that no exchange of words can make up for the difference of their keys. Products are of 32 by 32
bits: one instruction on every vector unit and on a GPU, where a product of 64 by 64 bits is several.

Changes of several words are missed once in 2**64, as far as was seen: see ``docs/design-notes.md``.

Positions need not be those in an array: only pieces whose fingerprints are summed must agree on position 0,
and be cut at words from there. A word that is cut has no fingerprint that its parts' could sum to.
"""

from __future__ import annotations

import ctypes

import numpy as np

from gockpt.kernels import reference
from gockpt.kernels.numba_compile import WHY_NOT, address_of, as_uint8, load_uint64, serial, store_uint64

__all__ = ["MODULUS", "WORD", "copy_fingerprint", "copy_fingerprints", "fingerprint", "fingerprints"]

MODULUS = 1 << 64
WORD = 8
"""Bytes of a word: positions are multiples of it."""
TILE = 1 << 15
"""Bytes that NumPy works on at a time where nothing is compiled."""

_END = 1 << 63
_LAST = _END - 1
_KEY = np.uint64(0x9E3779B97F4A7C15)
_A, _B, _C = np.uint64(0xCC9E2D52), np.uint64(0x85EBCA6A), np.uint64(0xC2B2AE36)
_LOW, _1, _8, _32, _61 = (np.uint64(value) for value in (0xFFFFFFFF, 1, 8, 32, 61))


@serial
def _mixed(word: np.uint64, key: np.uint64) -> np.uint64:
    """Return what a word adds to the sum."""
    x = word ^ key
    x ^= (x & _LOW) * _A
    x ^= x >> _32
    x ^= (x & _LOW) * _B
    x += key
    x ^= x >> _32
    x ^= (x & _LOW) * _C
    return x


@serial
def _sum_words(address: int, count: int, number: int) -> np.uint64:
    """Sum over ``count`` words at any address, of which the first has this number."""
    total = np.uint64(0)
    key = (np.uint64(number) + _1) * _KEY
    for i in range(count):
        total += _mixed(load_uint64(address, i), key)
        key += _KEY
    return total


@serial
def _copy_words(source: int, target: int, count: int, number: int) -> np.uint64:
    """Copy words, each by one load and one store, and sum over what is stored."""
    total = np.uint64(0)
    key = (np.uint64(number) + _1) * _KEY
    for i in range(count):
        word = load_uint64(source, i)
        store_uint64(target, i, word)
        total += _mixed(word, key)
        key += _KEY
    return total


@serial
def _fingerprint(source: int, target: int, nbytes: int, number: int) -> np.uint64:
    """Fingerprint the bytes at ``target``, after copying them there from ``source`` unless that is 0."""
    count = nbytes // WORD
    left = nbytes - count * WORD
    total: np.uint64 = np.uint64(0)
    if source != 0:
        total += _copy_words(source, target, count, number)
    else:
        total += _sum_words(target, count, number)
    if left:
        ours = as_uint8(target + count * WORD, left)
        theirs = ours if source == 0 else as_uint8(source + count * WORD, left)
        word = np.uint64(0)
        for i in range(left):
            byte = theirs[i]
            if source != 0:
                ours[i] = byte
            word |= np.uint64(byte) << (_8 * np.uint64(i))
        last = np.uint64(number + count) + (np.uint64(WORD - left) << _61)
        total += _mixed(word, (last + _1) * _KEY)
    return total


@serial
def _fingerprints(
    sources: np.ndarray, targets: np.ndarray, nbytes: np.ndarray, numbers: np.ndarray, found: np.ndarray
) -> None:
    for row in range(found.size):
        found[row] = _fingerprint(sources[row], targets[row], nbytes[row], numbers[row])


def fingerprint(data: np.ndarray, position: int = 0) -> int:
    """Return the fingerprint of ``data``, whose first byte stands at ``position``.

    Releases the GIL, and copies nothing. ``data`` may be at any address.

    Args:
        data: One-dimensional C-contiguous uint8 view.
        position: Where its first byte is in what it is a piece of: a multiple of 8.

    Raises:
        ValueError: If ``data`` is no such view, or ``position`` is not at a word.
    """
    _check(data, position)
    if WHY_NOT:
        return _plainly(data, position)
    return int(_fingerprint(0, address_of(data), data.size, position // WORD))


def copy_fingerprint(src: np.ndarray, dst: np.ndarray, position: int = 0) -> int:
    """Copy ``src`` to ``dst`` and return the fingerprint of the bytes that then stand in ``dst``.

    One pass over memory: each word is read once, and what is stored is what is fingerprinted. So a source
    that changes meanwhile can't go unnoticed by comparing this value with the source's own. Releases the
    GIL. Both may be at any address.

    Args:
        src: One-dimensional C-contiguous uint8 view.
        dst: Writable view of the same form and size, apart from ``src``.
        position: Where their first byte is in what they are a piece of: a multiple of 8.

    Raises:
        ValueError: If the views do not fit together, or ``position`` is not at a word.
    """
    _check(src, position)
    _check(dst, position)
    if dst.size != src.size or not dst.flags.writeable:
        state = "writable" if dst.flags.writeable else "read-only"
        msg = f"dst must be writable and hold {src.size} bytes like src, got {dst.size} bytes, {state}"
        raise ValueError(msg)
    if WHY_NOT:
        dst[:] = src
        return _plainly(dst, position)
    return int(_fingerprint(address_of(src), address_of(dst), src.size, position // WORD))


def fingerprints(addresses: np.ndarray, nbytes: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return the fingerprint of each row of a table of memory, in one call: uint64[R].

    Releases the GIL. The caller vouches for the memory, and keeps it alive.

    Args:
        addresses: Where each row's bytes begin: int64[R], any address.
        nbytes: How many there are: int64[R].
        positions: Where each row's first byte is in what it is a piece of: int64[R], multiples of 8.

    Raises:
        ValueError: If the tables do not fit together, a row has no memory, or a position is not at a word.
    """
    return _of_rows(np.zeros_like(addresses), addresses, nbytes, positions)


def copy_fingerprints(
    sources: np.ndarray, targets: np.ndarray, nbytes: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    """Copy each row from its source to its target; return the fingerprints of what stands there then.

    As :func:`copy_fingerprint` for each row, and as :func:`fingerprints` otherwise: the caller vouches for
    the memory of both, int64[R] addresses each.

    Raises:
        ValueError: As :func:`fingerprints`.
    """
    _expect_memory(sources, nbytes)
    return _of_rows(sources, targets, nbytes, positions)


def _of_rows(
    sources: np.ndarray, targets: np.ndarray, nbytes: np.ndarray, positions: np.ndarray
) -> np.ndarray:
    columns = (sources, targets, nbytes, positions)
    if any(c.dtype != np.int64 or c.shape != (targets.size,) or not c.flags.c_contiguous for c in columns):
        msg = f"expected four int64 columns of one length, got {[(c.dtype, c.shape) for c in columns]}"
        raise ValueError(msg)
    _expect_memory(targets, nbytes)
    bad = np.flatnonzero(
        (nbytes < 0) | (positions < 0) | (positions % WORD != 0) | (positions > _LAST - nbytes)
    )
    if bad.size:
        row = int(bad[0])
        msg = (
            f"position must be a multiple of {WORD} from 0 to 2**63, got {positions[row]} for {nbytes[row]} "
            f"bytes in row {row}"
        )
        raise ValueError(msg)
    found = np.empty(targets.size, np.uint64)
    if not WHY_NOT:
        _fingerprints(sources, targets, nbytes, positions // WORD, found)
        return found
    for row, (source, target, count, position) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        data = _memory(target, count)
        if source:
            data[:] = _memory(source, count)
        found[row] = _plainly(data, position)
    return found


def _expect_memory(addresses: np.ndarray, nbytes: np.ndarray) -> None:
    missing = np.flatnonzero((addresses == 0) & (nbytes > 0))
    if missing.size:
        msg = f"row {missing[0]} has {nbytes[missing[0]]} bytes and no memory"
        raise ValueError(msg)


def _memory(address: int, nbytes: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(address))


def _plainly(data: np.ndarray, position: int) -> int:
    """Return the fingerprint as NumPy computes it, in tiles: it takes some ten times their memory."""
    parts = range(0, data.size, TILE)
    return sum(reference.fingerprint(data[at : at + TILE], position + at) for at in parts) % MODULUS


def _check(data: np.ndarray, position: int) -> None:
    if data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous:
        msg = (
            "expected a contiguous one-dimensional uint8 view, "
            f"got {data.dtype} of shape {data.shape} and strides {data.strides}"
        )
        raise ValueError(msg)
    if position < 0 or position % WORD or position + data.size >= _END:
        msg = f"position must be a multiple of {WORD} from 0 to 2**63, got {position} for {data.size} bytes"
        raise ValueError(msg)
