"""What stored elements are as numbers, also where NumPy has no such type."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["as_numbers", "magnitudes_of_difference"]

# Exponent bits, mantissa bits, bias. "fn" has no infinities and one NaN; "fnuz" has its NaN at minus zero.
_FLOAT8 = {
    "float8_e4m3fn": (4, 3, 7),
    "float8_e5m2": (5, 2, 15),
    "float8_e4m3fnuz": (4, 3, 8),
    "float8_e5m2fnuz": (5, 2, 16),
}


def as_numbers(data: npt.NDArray[np.uint8], dtype: str) -> np.ndarray[Any, Any]:
    """Return elements as float64 or complex128 numbers; integers of 64 bits are rounded.

    Args:
        data: Their bytes, one row for each element.
        dtype: As in the manifest.
    """
    flat = np.ascontiguousarray(data).reshape(-1)
    if dtype.startswith("float8"):
        return _table(dtype)[flat]
    if dtype == "bfloat16":
        values: np.ndarray[Any, Any] = (flat.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = flat.view(np.dtype(dtype).newbyteorder("<"))
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return values.astype(np.complex128 if dtype.startswith("complex") else np.float64)


def magnitudes_of_difference(
    a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8], dtype: str
) -> tuple[npt.NDArray[np.float64], int]:
    """Return the distances of all pairs of finite numbers, and how many pairs that are.

    Integers are subtracted exactly; a distance of 2^53 or more is then rounded. One beyond the largest number
    of 64 bits is that.
    """
    if dtype.startswith(("int", "uint")):
        native = np.dtype(dtype).newbyteorder("<")
        ours, theirs = (np.ascontiguousarray(x).reshape(-1).view(native) for x in (a, b))
        distance = np.where(ours > theirs, ours, theirs).astype(native) - np.minimum(ours, theirs)
        return distance.view(native.str.replace("i", "u")).astype(np.float64), len(distance)
    with np.errstate(all="ignore"):
        first, second = as_numbers(a, dtype), as_numbers(b, dtype)
        both = np.isfinite(first) & np.isfinite(second)
        distance = np.abs(first[both] - second[both]).astype(np.float64)
        return np.minimum(distance, np.finfo(np.float64).max), int(both.sum())


@functools.cache
def _table(dtype: str) -> npt.NDArray[np.float64]:
    """Return the value of each of the 256 bit patterns of a type of 8 bits."""
    bits = np.arange(256)
    if dtype == "float8_e8m0fnu":
        return np.where(bits == 255, np.nan, np.ldexp(1.0, np.minimum(bits, 254) - 127))
    width, mantissa, bias = _FLOAT8[dtype]
    exponent = (bits >> mantissa) & ((1 << width) - 1)
    fraction = bits & ((1 << mantissa) - 1)
    size = np.where(
        exponent == 0,
        np.ldexp(fraction.astype(np.float64), 1 - bias - mantissa),
        np.ldexp(1.0 + fraction / (1 << mantissa), exponent - bias),
    )
    values = np.where(bits & 0x80, -size, size)
    if dtype.endswith("fnuz"):
        values[0x80] = np.nan
    elif dtype == "float8_e4m3fn":
        values[[0x7F, 0xFF]] = np.nan
    else:
        top = exponent == (1 << width) - 1
        values[top] = np.where(fraction[top] > 0, np.nan, np.copysign(np.inf, values[top]))
    return values
