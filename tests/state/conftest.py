"""A comparison that forgives nothing."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch

from gockpt.state.tensors import to_host
from gockpt.tensor_memory import as_bytes


def word(value):
    """Return text that is the same for equal values of equal types, in whatever order sets iterate."""
    if isinstance(value, (set, frozenset)):
        return f"{type(value)}{sorted(map(word, value))}"
    if type(value) is tuple:
        return f"{type(value)}{[*map(word, value)]}"
    return f"{type(value)}{value!r}"


def identical(a, b, where="value"):
    assert type(a) is type(b), f"{where}: {type(a)} and {type(b)}"
    if isinstance(a, torch.Tensor):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), where
        assert as_bytes(to_host(a)).tobytes() == as_bytes(to_host(b)).tobytes(), where
    elif isinstance(a, (np.ndarray, np.generic)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), where
        assert a.tobytes() == b.tobytes(), where
    elif isinstance(a, (dict, OrderedDict, Counter, defaultdict)):
        assert len(a) == len(b), where
        for (one, x), (other, y) in zip(a.items(), b.items(), strict=True):
            identical(one, other, f"{where} key")
            identical(x, y, f"{where}[{one!r}]")
        identical(getattr(a, "default_factory", None), getattr(b, "default_factory", None))
        identical(getattr(a, "__dict__", None), getattr(b, "__dict__", None))
    elif isinstance(a, (list, tuple, deque)):
        assert len(a) == len(b), where
        assert getattr(a, "maxlen", None) == getattr(b, "maxlen", None), where
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            identical(one, other, f"{where}[{index}]")
    elif isinstance(a, float):
        assert math.copysign(1, a) == math.copysign(1, b), where
        assert a == b or (math.isnan(a) and math.isnan(b)), where
    elif isinstance(a, complex):
        identical(a.real, b.real, where)
        identical(a.imag, b.imag, where)
    elif isinstance(a, (set, frozenset)):
        assert word(a) == word(b), where
    else:
        assert a == b, where


@pytest.fixture(scope="session")
def same():
    return identical
