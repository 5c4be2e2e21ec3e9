"""The reference's fused multiply-add against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from gockpt.kernels import reference

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def rounded(value: Fraction) -> np.float32:
    """Round an exact value to float32, ties to even."""
    if value == 0:
        return np.float32(0)
    magnitude = abs(value)
    exponent = max(math.floor(math.log2(magnitude)), -126) if magnitude >= Fraction(1, 2**149) else -126
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > -126 and magnitude < Fraction(2) ** exponent:
        exponent -= 1
    ulp = Fraction(2) ** (exponent - 23)
    result = round(magnitude / ulp) * ulp
    number = math.inf if result >= 2**128 else float(result)
    return np.float32(math.copysign(number, value))


@given(floats, floats, floats)
@example(1 + 2**-12, 1 + 2**-12, 2**-60)
@example(1 + 2**-23, 1 - 2**-23, -1.0)
@example(2.0**-100, 2.0**-49, 2.0**-126)
@example(2.0**127, 2.0, -(2.0**127))
def test_fma_rounds_once(a, b, c):
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    result = reference.fma(np.float32([a]), np.float32([b]), np.float32([c]))[0]
    assert result == rounded(exact)
