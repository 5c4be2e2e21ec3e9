"""The kernels that follow a device's formulas against their plain reference, in every form."""

from __future__ import annotations

import itertools
import math
import platform
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numba import njit

from gockpt.kernels import adam_cuda_rounding_numba, sgd_cuda_rounding_numba
from gockpt.kernels import reference_cuda_rounding as reference
from gockpt.kernels.numba_intrinsics import JIT
from gockpt.kernels.replay import FORMS, SHAPES, run

EVERY_FORM = [
    (kernel, form) for kernel in sorted(FORMS) for form in itertools.product(*map(range, FORMS[kernel]))
]
SPECIAL = (0.0, -0.0, 1e-41, -1e-39, 1e25, np.inf, -np.inf, np.nan)


def plain(kernel):
    if kernel in ("cuda_sgd", "cuda_momentum"):
        return reference.sgd
    return reference.fused_adam if kernel.startswith("cuda_fused") else reference.adam


def values(rng, n, scale=1e-3):
    x = np.exp(rng.normal(size=n) * 3) * rng.choice((-scale, scale), size=n)
    lot = rng.integers(0, 80, n)
    for i, special in enumerate(SPECIAL):
        x[lot == i] = special
    return x.astype(np.float32)


def row(rng, kernel):
    sign, wd, lr = float(rng.choice((-1, 1))), float(rng.choice((0, 0.1))), float(rng.uniform(0, 0.1))
    if kernel in ("cuda_sgd", "cuda_momentum"):
        return (sign, wd, float(rng.uniform(0, 1)), float(rng.uniform(0, 1)), float(rng.integers(2)), -lr)
    beta1, beta2 = float(rng.choice((0.9, 0.5, 0.3))), float(rng.uniform(0.9, 1))
    if kernel.startswith("cuda_fused"):
        coupled = bool(rng.integers(2))
        both = (wd, 0.0) if coupled else (0.0, wd)
        return (sign, *both, lr, beta1, beta2, 1 - beta1**3, (1 - beta2**3) ** 0.5, 1e-8)
    return (sign, wd, 1 - lr * 0.1, 1 - beta1, beta2, 1 - beta2, (1 - beta2**3) ** 0.5, 1e-8, -lr)


def problem(seed, kernel, n, updates):
    rng = np.random.default_rng(seed)
    states = [values(rng, n), *(abs(values(rng, n, 1e-6)) for _ in range(2))][: SHAPES[kernel][0]]
    grads = [values(rng, n) for _ in range(updates)]
    for g in grads:
        g.flags.writeable = False
    return values(rng, n, 0.1), states, grads, [row(rng, kernel) for _ in range(updates)]


def bits(arrays):
    return [a.view(np.uint32).tolist() for a in arrays]


@given(
    st.sampled_from(EVERY_FORM),
    st.sampled_from([1, 7, 100, 8191, 8193]),
    st.integers(0, 4),
    st.integers(0, 2**32),
)
def test_kernel_equals_reference(which, n, updates, seed):
    kernel, form = which
    p, states, grads, scalars = problem(seed, kernel, n, updates)
    mine = [p.copy(), *(s.copy() for s in states)]
    for g, s in zip(grads, scalars, strict=True):
        plain(kernel)(mine[0], mine[1:], g, s, form)
    run(kernel, form, p, states, grads, scalars, tail=True)
    assert bits([p, *states]) == bits(mine)


@pytest.mark.parametrize("kernel", sorted(FORMS))
def test_every_form_equals_the_reference(kernel):
    for form in itertools.product(*map(range, FORMS[kernel])):
        p, states, grads, scalars = problem(3, kernel, 20_000, 2)
        mine = [p.copy(), *(s.copy() for s in states)]
        for g, s in zip(grads, scalars, strict=True):
            plain(kernel)(mine[0], mine[1:], g, s, form)
        run(kernel, form, p, states, grads, scalars, tail=True)
        assert bits([p, *states]) == bits(mine), form


@given(
    st.sampled_from(EVERY_FORM),
    st.lists(st.integers(0, 1250), max_size=4),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_one_pass_over_pieces_equals_single_updates_of_the_whole(which, cuts, seed, tail):
    kernel, form = which
    n = 20_000
    p, states, grads, scalars = problem(seed, kernel, n, 3)
    whole = [p.copy(), *(s.copy() for s in states)]
    for g, s in zip(grads, scalars, strict=True):
        run(kernel, form, whole[0], whole[1:], [g], [s], tail=True)
    edges = sorted({0, n, *(16 * cut for cut in cuts)})
    for a, b in itertools.pairwise(edges):
        run(kernel, form, p[a:b], [s[a:b] for s in states], [g[a:b] for g in grads], scalars, tail=tail)
    assert bits([p, *states]) == bits(whole)


@pytest.mark.parametrize("kernel", sorted(FORMS))
def test_what_arithmetic_makes_is_cudas_nan(kernel):
    states = [np.ones(4, np.float32) for _ in range(SHAPES[kernel][0])]
    p, g = np.ones(4, np.float32), np.array([np.nan, -np.nan, np.inf, 1], np.float32)
    g.view(np.uint32)[0] = 0x7FC12345
    scalars = row(np.random.default_rng(0), kernel)
    run(kernel, tuple(0 for _ in FORMS[kernel]), p, states, [g], [scalars], tail=True)
    for array in (p, *states[:1]):
        assert array.view(np.uint32)[:2].tolist() == [0x7FFFFFFF] * 2
        assert np.isfinite(array[3])


@pytest.mark.parametrize(
    ("kernel", "form"), [("cuda_adam", (0, 0, 3)), ("cuda_sgd", (0, 1)), ("cuda_sgd", (0, -1, 0))]
)
def test_forms_that_there_are_not(kernel, form):
    p, states, grads, scalars = problem(0, kernel, 16, 1)
    before = bits([p, *states])
    with pytest.raises(ValueError, match=re.escape(f"{kernel} has no form {form}")):
        run(kernel, form, p, states, grads, scalars, tail=True)
    assert bits([p, *states]) == before


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
doubles = st.floats(-1e60, 1e60).filter(lambda x: x == 0 or abs(x) > 1e-60)


@given(doubles, doubles, doubles)
@example(1 + 2**-52, 1 - 2**-52, -1.0)
@example(1 + 2**-27, 1 + 2**-27, 2**-120)
@example(0.1, 3.0, -0.30000000000000004)
def test_the_references_double_fma_rounds_once(a, b, c):
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    result = float(reference.fma64([a], [b], [c])[0])
    if exact == 0:
        assert result == 0
        return
    below, above = math.nextafter(result, -math.inf), math.nextafter(result, math.inf)
    distance = abs(Fraction(result) - exact)
    assert distance <= min(abs(Fraction(below) - exact), abs(Fraction(above) - exact))
    if distance == abs(Fraction(below) - exact) or distance == abs(Fraction(above) - exact):
        assert np.float64(result).view(np.int64) % 2 == 0


WIDE = {
    "x86_64": {"root": r"vsqrtps\t.*%[yz]mm", "fma": r"vfn?m(add|sub)\d+p[sd]\t.*%[yz]mm"},
    "aarch64": {"root": r"fsqrt\tv\d+\.4s", "fma": r"fml[as]\tv\d+\.[24][sd]"},
}[platform.machine()]
ONE, SCALARS = np.zeros(64, np.float32), np.zeros(9, np.float64)


@pytest.mark.parametrize(
    ("loop", "arguments", "instructions"),
    [
        (adam_cuda_rounding_numba._moments, (*[ONE] * 4, SCALARS, 0), ("fma",)),
        (adam_cuda_rounding_numba._denominator, (ONE, 1.0, 1.0, 0, ONE), ("root",)),
        (adam_cuda_rounding_numba._move, (*[ONE] * 3, 1.0, 0), ("fma",)),
        (adam_cuda_rounding_numba._single, (*[ONE] * 4, SCALARS, 0, 0, 1), ("fma",)),
        (adam_cuda_rounding_numba._double, (*[ONE] * 4, SCALARS, 0, 0, 1), ("fma",)),
        (adam_cuda_rounding_numba._descend, (*[ONE] * 3, SCALARS), ("root",)),
        (sgd_cuda_rounding_numba._single, (*[ONE] * 3, SCALARS, 0, 1), ("fma",)),
        (sgd_cuda_rounding_numba._double, (*[ONE] * 3, SCALARS, 0, 1), ("fma",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_loops_run_on_wide_vectors(loop, arguments, instructions):
    fresh = njit(**JIT)(loop.py_func)
    with np.errstate(all="ignore"):
        fresh(*(a.copy() if isinstance(a, np.ndarray) else a for a in arguments))
    (code,) = fresh.inspect_asm().values()
    for name in instructions:
        assert re.search(WIDE[name], code), f"no wide {name}"
