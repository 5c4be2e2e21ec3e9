"""Array specs and dtypes, against the types that numpy and ml_dtypes know."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.core.array_spec import DTYPES, ArraySpec


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_a_dtype_has_the_itemsize_of_its_namesake_and_zero_bytes_as_fill(name):
    entry = DTYPES[name]
    known = np.dtype(name if entry.core else getattr(ml_dtypes, name))
    assert entry.itemsize == known.itemsize
    fill = complex(*entry.fill_value) if isinstance(entry.fill_value, list) else entry.fill_value
    assert np.array(fill).astype(known).tobytes() == bytes(known.itemsize)
    assert entry.name == name


@given(st.lists(st.integers(0, 9), max_size=5).map(tuple), st.sampled_from(sorted(DTYPES)))
def test_sizes_of_a_spec(shape, dtype):
    spec = ArraySpec(("optimizer", "layer.weight", "exp_avg"), shape, dtype)
    assert spec.numel == math.prod(shape)
    assert spec.itemsize == DTYPES[dtype].itemsize
    assert spec.nbytes == spec.numel * spec.itemsize
    assert spec.public_name == "optimizer/layer.weight/exp_avg"
