"""NaN and Inf are counted by the definition of each format, in any form, wherever they stand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.kernels import nonfinite_numba

FLOATS = {
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "complex64": np.float32,
    "complex128": np.float64,
    **{
        name: getattr(ml_dtypes, name)
        for name in (
            "bfloat16", "float8_e5m2", "float8_e4m3fn",
            "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
        )
    },
}  # fmt: skip
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def defined(data: np.ndarray, dtype: str) -> tuple[int, int]:
    values = data.view(FLOATS[dtype])
    with np.errstate(all="ignore"):
        return int(np.isnan(values).sum()), int(np.isinf(values).sum())


@pytest.mark.parametrize("dtype", [name for name in FLOATS if np.dtype(FLOATS[name]).itemsize <= 2])
def test_every_value_of_a_small_format(dtype):
    kind = BITS[np.dtype(FLOATS[dtype]).itemsize]
    data = np.arange(np.iinfo(kind).max + 1, dtype=np.uint32).astype(kind).view(np.uint8)
    found = nonfinite_numba.count(data, dtype)
    assert found == defined(data, dtype)
    assert found[0] > 0


@given(st.sampled_from(sorted(FLOATS)), st.integers(0, 40_000), st.integers(0, 2**32 - 1), st.integers(0, 7))
def test_values_of_any_bits_anywhere(dtype, n, seed, shift):
    size = np.dtype(FLOATS[dtype]).itemsize
    rng = np.random.default_rng(seed)
    memory = np.zeros(n * size + 8, np.uint8)
    data = memory[shift : shift + n * size]  # most often not aligned
    if n:
        words = rng.standard_normal(n).astype(FLOATS[dtype]).view(BITS[size])
        odd = rng.integers(0, n, n // 1000 + 1)
        largest = np.iinfo(BITS[size]).max
        words[odd] = rng.integers(largest // 64 * 62, largest, odd.size, BITS[size], endpoint=True)
        data[:] = words.view(np.uint8)
    before = data.copy()
    assert nonfinite_numba.count(data, dtype) == defined(before, dtype)
    assert (data == before).all()


@pytest.mark.parametrize("place", [0, 1, 8191, 8192, 8193, 99_998, 99_999])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_single_one_at_either_end_of_a_tile(place, value):
    values = np.full(100_000, np.finfo(np.float32).max, np.float32)
    values[place] = value
    nan = bool(np.isnan(value))
    assert nonfinite_numba.count(values.view(np.uint8), "float32") == (nan, not nan)


def test_a_signalling_nan_and_one_of_any_payload():
    words = np.array([0x7F800001, 0xFF800001, 0x7FC12345, 0x7F800000, 0xFF800000, 0x7F7FFFFF], np.uint32)
    assert nonfinite_numba.count(words.view(np.uint8), "float32") == (3, 2)


@pytest.mark.parametrize("dtype", ["bool", "int8", "int64", "uint16", "uint32"])
def test_what_has_no_nan_has_none(dtype):
    assert not nonfinite_numba.is_counted(dtype)
    assert nonfinite_numba.count(np.full(64, 0xFF, np.uint8), dtype) == (0, 0)


def test_other_views_are_refused():
    for data in (np.zeros(6, np.uint8), np.zeros(8, np.float32), np.zeros((2, 4), np.uint8)):
        with pytest.raises(ValueError, match="expected a contiguous one-dimensional uint8 view"):
            nonfinite_numba.count(data, "float32")


@given(st.sampled_from(sorted(FLOATS)), st.integers(0, 2**32 - 1))
def test_numpy_finds_the_same_where_nothing_is_compiled(dtype, seed):
    data = np.random.default_rng(seed).integers(0, 256, 70_000 // 16 * 16, np.uint8)
    compiled = nonfinite_numba.count(data, dtype)
    nonfinite_numba.WHY_NOT = "this test says so"
    try:
        assert nonfinite_numba.count(data, dtype) == compiled == defined(data, dtype)
    finally:
        nonfinite_numba.WHY_NOT = ""
