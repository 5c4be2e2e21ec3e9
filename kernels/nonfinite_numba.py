"""How many NaN and Inf there are among an array's elements.

Contract: by the definition of each format, in whatever form a NaN comes. A complex number counts by its two
parts. Formats are named as Zarr names them; what has neither NaN nor Inf (integers, bool) has none.

One pass finds the largest magnitude of each tile; only a tile that has NaN or Inf is read a second time.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from gockpt.kernels.numba_compile import WHY_NOT, address_of, serial

__all__ = ["TILE", "count", "is_counted"]

TILE = 1 << 15
"""Bytes looked at a time: what is read a second time is still in cache."""


class _Format(NamedTuple):
    """The bits of NaN and Inf, plus ``add`` and masked, are at least ``first``; those of Inf are ``inf``."""

    words: type[np.unsignedinteger]
    add: int
    mask: int
    first: int
    inf: int


_NO_INF = 0  # below all that is looked at
_FORMATS = {
    "float64": _Format(np.uint64, 0, (1 << 63) - 1, 0x7FF << 52, 0x7FF << 52),
    "float32": _Format(np.uint32, 0, 0x7FFFFFFF, 0x7F800000, 0x7F800000),
    "float16": _Format(np.uint16, 0, 0x7FFF, 0x7C00, 0x7C00),
    "bfloat16": _Format(np.uint16, 0, 0x7FFF, 0x7F80, 0x7F80),
    "float8_e5m2": _Format(np.uint8, 0, 0x7F, 0x7C, 0x7C),
    "float8_e4m3fn": _Format(np.uint8, 0, 0x7F, 0x7F, _NO_INF),
    # Their only NaN is what would be the negative zero.
    "float8_e4m3fnuz": _Format(np.uint8, 0x7F, 0xFF, 0xFF, _NO_INF),
    "float8_e5m2fnuz": _Format(np.uint8, 0x7F, 0xFF, 0xFF, _NO_INF),
    "float8_e8m0fnu": _Format(np.uint8, 0, 0xFF, 0xFF, _NO_INF),
}
_FORMATS["complex128"], _FORMATS["complex64"] = _FORMATS["float64"], _FORMATS["float32"]


def is_counted(dtype: str) -> bool:
    """Whether elements of this format can be NaN or Inf."""
    return dtype in _FORMATS


def count(data: np.ndarray, dtype: str) -> tuple[int, int]:
    """Return how many NaN and how many Inf there are. Releases the GIL, and never writes.

    Args:
        data: One-dimensional C-contiguous uint8 view of whole elements.
        dtype: Their format.

    Raises:
        ValueError: If ``data`` is no such view.
    """
    form = _FORMATS.get(dtype)
    if form is None or not data.size:
        return 0, 0
    size = np.dtype(form.words).itemsize
    if data.dtype != np.uint8 or data.ndim != 1 or not data.flags.c_contiguous or data.size % size:
        msg = f"expected a contiguous one-dimensional uint8 view of {dtype}, got {data.dtype} of {data.shape}"
        raise ValueError(msg)
    if address_of(data) % size:
        data = data.copy()
    words = data.view(form.words)
    add, mask, first = (form.words(value) for value in (form.add, form.mask, form.first))
    inf = form.words(form.inf)
    if WHY_NOT:
        return _count_plainly(words, add, mask, first, inf)
    large, infinite = _count(words, add, mask, first, inf)
    return int(large - infinite), int(infinite)


@serial
def _largest(words: np.ndarray, add: np.unsignedinteger, mask: np.unsignedinteger) -> np.unsignedinteger:
    """Return the largest magnitude. From 0 over a slice: no other form is vectorised."""
    largest = mask ^ mask
    for i in range(words.size):
        largest = max((words[i] + add) & mask, largest)
    return largest


@serial
def _count(
    words: np.ndarray,
    add: np.unsignedinteger,
    mask: np.unsignedinteger,
    first: np.unsignedinteger,
    inf: np.unsignedinteger,
) -> tuple[int, int]:
    """Return how many magnitudes are from ``first`` on, and how many are ``inf``."""
    large = infinite = 0
    tile = TILE // words.itemsize
    for low in range(0, words.size, tile):
        part = words[low : min(low + tile, words.size)]
        if _largest(part, add, mask) >= first:
            for i in range(part.size):
                magnitude = (part[i] + add) & mask
                large += magnitude >= first
                infinite += magnitude >= first and magnitude == inf
    return large, infinite


def _count_plainly(
    words: np.ndarray,
    add: np.unsignedinteger,
    mask: np.unsignedinteger,
    first: np.unsignedinteger,
    inf: np.unsignedinteger,
) -> tuple[int, int]:
    """Do as :func:`count` by NumPy, tile by tile."""
    large = infinite = 0
    tile = TILE // words.itemsize
    for low in range(0, words.size, tile):
        magnitudes = (words[low : low + tile] + add) & mask
        magnitudes = magnitudes[magnitudes >= first]
        large += magnitudes.size
        infinite += int((magnitudes == inf).sum())
    return large - infinite, infinite
