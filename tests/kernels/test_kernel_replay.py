"""The replay kernels against the plain reference: values, tiles, pieces, and bad calls."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.kernels import mkl_sqrt, reference
from gockpt.kernels.replay import ALIGNMENT, run

STATES = {"adam": 2, "amsgrad": 3, "sgd": 0, "momentum": 1}
SIZES = st.sampled_from([0, 1, 7, 15, 16, 17, 100, 8191, 8192, 8193, 20000])


def values(rng: np.random.Generator, n: int, scale: float = 1e-3) -> np.ndarray:
    """Log-normal, both signs, with zeros, denormals and values whose squares overflow."""
    x = np.exp(rng.normal(size=n) * 3) * rng.choice((-scale, scale), size=n)
    lot = rng.integers(0, 60, n)
    for i, special in enumerate((0.0, -0.0, 1e-41, 1e25)):
        x[lot == i] = special
    return x.astype(np.float32)


def row(rng: np.random.Generator, kernel: str) -> tuple[float, ...]:
    """One update's scalars, as wild as users are."""
    sign, wd, lr = float(rng.choice((-1, 1))), float(rng.choice((0, 0.1))), float(rng.uniform(0, 0.1))
    if kernel in ("sgd", "momentum"):
        return (sign, wd, float(rng.uniform(0, 1)), float(rng.uniform(0, 1)), float(rng.integers(2)), -lr)
    beta1, beta2 = float(rng.choice((0.9, 0.5, 0.3))), float(rng.uniform(0.9, 1))
    decay = 1 - lr * 0.1
    return (sign, wd, decay, 1 - beta1, beta2, 1 - beta2, 1 - beta2**0.5, 1e-8, -lr)


def problem(seed: int, kernel: str, n: int, updates: int):
    """Parameters, states, gradients (read-only) and scalars."""
    rng = np.random.default_rng(seed)
    states = [values(rng, n), *(abs(values(rng, n, 1e-6)) for _ in range(2))][: STATES[kernel]]
    grads = [values(rng, n) for _ in range(updates)]
    for g in grads:
        g.flags.writeable = False
    return values(rng, n, 0.1), states, grads, [row(rng, kernel) for _ in range(updates)]


def plain(kernel, vector, p, states, grads, scalars):
    """The reference, one update after the other."""
    p, states = p.copy(), [s.copy() for s in states]
    step = reference.adam if kernel in ("adam", "amsgrad") else reference.sgd
    for g, s in zip(grads, scalars, strict=True):
        step(p, states, g, s, tail=p.size % vector if vector else 0)
    return [a.view(np.uint32).tolist() for a in (p, *states)]


def bits(p, states):
    return [a.view(np.uint32).tolist() for a in (p, *states)]


@given(
    st.sampled_from(sorted(STATES)),
    st.sampled_from([0, 8, 16]),
    SIZES,
    st.integers(0, 5),
    st.integers(0, 2**32),
)
def test_kernel_equals_reference(kernel, vector, n, updates, seed):
    p, states, grads, scalars = problem(seed, kernel, n, updates)
    expected = plain(kernel, vector, p, states, grads, scalars)
    run(kernel, (vector, 0), p, states, grads, scalars, tail=True)
    assert bits(p, states) == expected


@given(
    st.sampled_from(sorted(STATES)),
    st.sampled_from([0, 8]),
    SIZES,
    st.integers(1, 16),
    st.lists(st.floats(0, 1), max_size=4),
    st.integers(0, 2**32),
)
def test_one_pass_over_pieces_equals_single_updates_of_the_whole(kernel, vector, n, updates, cuts, seed):
    p, states, grads, scalars = problem(seed, kernel, n, updates)
    whole, whole_states = p.copy(), [s.copy() for s in states]
    for g, s in zip(grads, scalars, strict=True):
        run(kernel, (vector, 0), whole, whole_states, [g], [s], tail=True)
    edges = sorted({0, n, *(int(cut * n) // ALIGNMENT * ALIGNMENT for cut in cuts)})
    for a, b in itertools.pairwise(edges):
        piece = [s[a:b] for s in states]
        run(kernel, (vector, 0), p[a:b], piece, [g[a:b] for g in grads], scalars, tail=b == n)
    assert bits(p, states) == bits(whole, whole_states)


def test_vector_width_shows_only_in_the_tail():
    # Otherwise every test of the tail rule would pass without one.
    for kernel in ("adam", "momentum"):
        p, states, grads, scalars = problem(3, kernel, 8 * 8192 + 7, 4)
        others = p.copy(), [s.copy() for s in states]
        run(kernel, (0, 0), p, states, grads, scalars, tail=True)
        run(kernel, (8, 0), *others, grads, scalars, tail=True)
        different = np.flatnonzero(states[-1].view(np.uint32) != others[1][-1].view(np.uint32))
        assert different.size
        assert different.min() >= 8 * 8192


def test_no_updates_change_nothing():
    p, states, *_ = problem(0, "adam", 100, 0)
    before = bits(p, states)
    run("adam", (8, 0), p, states, [], [], tail=True)
    assert bits(p, states) == before


def test_inner_piece_must_be_whole_vectors():
    p, states, grads, scalars = problem(0, "adam", 17, 1)
    before = bits(p, states)
    with pytest.raises(ValueError, match="multiple of 16 elements, got 17"):
        run("adam", (8, 0), p, states, grads, scalars, tail=False)
    assert bits(p, states) == before


def test_missing_root_is_said():
    p, states, grads, scalars = problem(0, "adam", 16, 1)
    before, known = bits(p, states), mkl_sqrt.known()
    mkl_sqrt.use(None)
    try:
        with pytest.raises(RuntimeError, match="prepare"):
            run("adam", (0, 1), p, states, grads, scalars, tail=True)
    finally:
        mkl_sqrt.use(*known)
    assert bits(p, states) == before


def change(**what):
    """Arguments of a good call with some replaced."""
    p, states, grads, scalars = problem(0, "adam", 16, 2)
    return {
        "kernel": "adam",
        "flags": (0, 0),
        "p": p,
        "states": states,
        "grads": grads,
        "scalars": scalars,
    } | what


def frozen(n: int) -> np.ndarray:
    array = np.zeros(n, np.float32)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (change(kernel="lion"), "no kernel named 'lion'"),
        (change(states=[]), "got 0 states"),
        (change(scalars=[(1.0,)]), r"lengths \[1\]"),
        (change(grads=[np.zeros(16, np.float32)]), "1 gradients"),
        (change(p=np.zeros(16)), "float64"),
        (change(p=np.zeros((4, 4), np.float32)), r"\(4, 4\)"),
        (change(p=np.zeros(32, np.float32)[::2]), "contiguous"),
        (change(grads=[np.zeros(15, np.float32)] * 2), r"\(15,\)"),
        (change(p=frozen(16)), "writable"),
        (change(states=[frozen(16), frozen(16)]), "writable"),
    ],
)
def test_bad_calls_are_named(call, names):
    kernel, flags = call.pop("kernel"), call.pop("flags")
    with pytest.raises(ValueError, match=names):
        run(kernel, flags, **call, tail=True)
