"""The fingerprint: its definition, its algebra, and what it must notice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gockpt.kernels import reference
from gockpt.kernels.fingerprint_numba import MODULUS, copy_fingerprint, fingerprint

ITEMSIZES = (1, 2, 4, 8, 16)


def some_bytes(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8)


cases = st.tuples(
    st.sampled_from(ITEMSIZES),
    st.integers(0, 3000) | st.sampled_from([32768, 32769, 65536, 70001]),
    st.integers(0, 2**40) | st.sampled_from([2**31 - 5, 2**30 - 3, 2**32 - 3, 2**34 - 1, 2**60]),
    st.integers(0, 2**32),
)


@given(cases)
@example((4, 100, 2**32 - 50, 0))
@example((8, 100, 2**31 - 50, 0))
@example((16, 100, 2**30 - 50, 0))
def test_fingerprint_equals_reference(case):
    itemsize, n, start, seed = case
    data = some_bytes(seed, n * itemsize)
    expected = reference.fingerprint(data, itemsize, start)
    target = np.full(data.size, 0xA5, np.uint8)
    assert fingerprint(data, itemsize, start) == expected
    assert copy_fingerprint(data, target, itemsize, start) == expected
    assert np.array_equal(target, data)


@pytest.mark.parametrize(
    ("itemsize", "start", "value"),
    [
        (1, 0, 0xE0F63C0AEC701F7A),
        (2, 0, 0xD3760B4DD8DC525E),
        (4, 0, 0xB83F96703429F960),
        (4, 2**33 + 1, 0x049EE77E27B4DBB5),
        (8, 2**33 + 1, 0xCBFF41359500AA3A),
        (16, 2**33 + 1, 0x4F9CDBE3B8A6B33A),
    ],
)
def test_definition_does_not_drift(itemsize, start, value):
    # Stored or sent fingerprints, and other implementations, rely on these very numbers.
    assert fingerprint(np.arange(48, dtype=np.uint8) * 5, itemsize, start) == value


@given(cases, st.lists(st.floats(0, 1), max_size=5), st.randoms(use_true_random=False))
def test_pieces_sum_to_the_whole_in_any_order(case, cuts, random):
    itemsize, n, start, seed = case
    data = some_bytes(seed, n * itemsize)
    edges = sorted({0, n, *(int(cut * n) for cut in cuts)})
    pieces = list(itertools.pairwise(edges))
    random.shuffle(pieces)
    total = sum(fingerprint(data[a * itemsize : b * itemsize], itemsize, start + a) for a, b in pieces)
    assert total % MODULUS == fingerprint(data, itemsize, start)


@given(cases.filter(lambda case: case[1] > 0), st.floats(0, 1, exclude_max=True))
def test_any_single_bit_is_seen(case, where):
    itemsize, n, start, seed = case
    data = some_bytes(seed, n * itemsize)
    before = fingerprint(data, itemsize, start)
    bit = int(where * data.size * 8)
    data[bit // 8] ^= 1 << bit % 8
    assert fingerprint(data, itemsize, start) != before


@pytest.mark.parametrize("itemsize", ITEMSIZES)
def test_swaps_shifts_and_negations_are_seen(itemsize):
    data = some_bytes(7, 512 * itemsize)
    elements = data.reshape(512, itemsize)
    seen = {fingerprint(data, itemsize), fingerprint(data, itemsize, 1)}
    count = 2
    for i in range(0, 510, 3):
        changed = elements.copy()
        changed[[i, i + 1]] = changed[[i + 1, i]]
        if np.array_equal(changed, elements):
            continue
        seen.add(fingerprint(changed.reshape(-1), itemsize))
        count += 1
    for shift in range(1, 512):
        seen.add(fingerprint(np.roll(elements, shift, axis=0).reshape(-1), itemsize))
        count += 1
    assert len(seen) == count


def test_equal_steps_in_neighbouring_elements_are_seen():
    # What a plain weighted sum misses: +1 ulp here, -1 ulp there, and second differences.
    words = np.full(300, 0x3F800000, np.uint32)
    seen = {fingerprint(words.view(np.uint8), 4)}
    for i in range(297):
        for steps in ((1, -1), (1, -2, 1), (1, 1), (2, -1, -1)):
            changed = words.copy()
            changed[i : i + len(steps)] += np.array(steps, np.int64).astype(np.uint32)
            seen.add(fingerprint(changed.view(np.uint8), 4))
    assert len(seen) == 1 + 297 * 4


def test_signed_zero_and_nan_payloads_differ():
    values = np.array([0.0, -0.0, np.nan, -np.nan], np.float32)
    payload = np.uint32([0x7FC00001]).view(np.float32)
    assert len({fingerprint(v.reshape(1).view(np.uint8), 4) for v in (*values, payload)}) == 5


@given(st.sampled_from(ITEMSIZES), st.integers(1, 15), st.integers(0, 2000), st.integers(0, 2**32))
def test_unaligned_views_work(itemsize, shift, n, seed):
    data = some_bytes(seed, n * itemsize)
    room = np.zeros(n * itemsize + 32, np.uint8)
    view = room[shift : shift + data.size]
    expected = reference.fingerprint(data, itemsize, 3)
    assert copy_fingerprint(data, view, itemsize, 3) == expected
    assert fingerprint(view, itemsize, 3) == expected
    assert copy_fingerprint(view, data.copy(), itemsize, 3) == expected
    assert not room[:shift].any()
    assert not room[shift + data.size :].any()


def test_read_only_source_is_enough():
    data = some_bytes(1, 64)
    data.flags.writeable = False
    assert fingerprint(data, 4) == copy_fingerprint(data, np.empty(64, np.uint8), 4)


@pytest.mark.parametrize(
    ("data", "itemsize", "start", "names"),
    [
        (np.zeros(8, np.uint8), 3, 0, "got 3"),
        (np.zeros(8, np.float32), 4, 0, "float32"),
        (np.zeros((2, 4), np.uint8), 4, 0, r"\(2, 4\)"),
        (np.zeros(16, np.uint8)[::2], 4, 0, r"strides \(2,\)"),
        (np.zeros(7, np.uint8), 4, 0, "4-byte elements"),
        (np.zeros(8, np.uint8), 4, -1, "got -1"),
    ],
)
def test_bad_views_are_named(data, itemsize, start, names):
    with pytest.raises(ValueError, match=names):
        fingerprint(data, itemsize, start)


def test_bad_targets_are_named():
    source, target = some_bytes(0, 8), np.zeros(8, np.uint8)
    with pytest.raises(ValueError, match="4 bytes"):
        copy_fingerprint(source, target[:4], 4)
    target.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        copy_fingerprint(source, target, 4)
