"""The fingerprint: its definition, its algebra, and what it must notice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gockpt.kernels import reference
from gockpt.kernels.fingerprint_numba import (
    MODULUS,
    copy_fingerprint,
    copy_fingerprints,
    fingerprint,
    fingerprints,
)

END = 1 << 63


def some_bytes(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8)


cases = st.tuples(
    st.integers(0, 3000) | st.sampled_from([32768, 32769, 65536, 70001, 262143]),
    st.integers(0, 2**40).map(lambda n: 8 * n)
    | st.sampled_from([2**34 - 40, 2**35 - 400, 2**35, 2**62, END - 2**20]),
    st.integers(0, 2**32),
)


@given(cases)
@example((1000, 2**35 - 400, 0))
@example((0, 0, 0))
def test_fingerprint_equals_reference(case):
    n, position, seed = case
    data = some_bytes(seed, n)
    expected = reference.fingerprint(data, position)
    target = np.full(n, 0xA5, np.uint8)
    assert fingerprint(data, position) == expected
    assert copy_fingerprint(data, target, position) == expected
    assert np.array_equal(target, data)


@pytest.mark.parametrize(
    ("count", "position", "value"),
    [
        (48, 0, 0xED87ACE346A85A02),
        (48, 2**36 + 8, 0x6B3703914986D87E),
        (47, 0, 0x7E170591BDF73458),
        (1, 2**62, 0x3C4C0D6A630F80C6),
        (0, 0, 0),
    ],
)
def test_definition_does_not_drift(count, position, value):
    # Other implementations rely on these very numbers.
    assert fingerprint(np.arange(count, dtype=np.uint8) * 5, position) == value


@given(cases, st.lists(st.floats(0, 1), max_size=5), st.randoms(use_true_random=False))
def test_pieces_sum_to_the_whole_in_any_order(case, cuts, random):
    n, position, seed = case
    data = some_bytes(seed, n)
    edges = sorted({0, n, *(int(cut * n) // 8 * 8 for cut in cuts)})
    pieces = list(itertools.pairwise(edges))
    random.shuffle(pieces)
    total = sum(fingerprint(data[a:b], position + a) for a, b in pieces)
    assert total % MODULUS == fingerprint(data, position)


@given(cases.filter(lambda case: case[0] > 0), st.floats(0, 1, exclude_max=True))
def test_any_single_bit_is_seen(case, where):
    n, position, seed = case
    data = some_bytes(seed, n)
    before = fingerprint(data, position)
    bit = int(where * n * 8)
    data[bit // 8] ^= 1 << bit % 8
    assert fingerprint(data, position) != before


@given(cases.filter(lambda case: case[0] > 0), st.data())
def test_any_change_of_one_word_is_seen(case, draw):
    n, position, seed = case
    data = some_bytes(seed, n)
    before = fingerprint(data, position)
    at = 8 * draw.draw(st.integers(0, (n - 1) // 8))
    word = data[at : at + 8]
    other = draw.draw(st.binary(min_size=word.size, max_size=word.size).filter(lambda b: b != word.tobytes()))
    word[:] = np.frombuffer(other, np.uint8)
    assert fingerprint(data, position) != before


def test_the_length_of_the_last_word_counts():
    padded = np.zeros(24, np.uint8)
    padded[:17] = some_bytes(1, 17)
    assert len({fingerprint(padded[:n]) for n in range(25)}) == 25
    assert len({fingerprint(np.zeros(n, np.uint8)) for n in range(65)}) == 65


def test_keys_differ_wherever_a_word_may_be():
    positions = [8 << bit for bit in range(60)]
    far = [position + 8 * n for position in positions for n in range(3) if position + 8 * n < END - 8]
    word = np.full(8, 0x3F, np.uint8)
    assert len({fingerprint(word, position) for position in far}) == len(set(far))


def test_signed_zero_and_nan_payloads_differ():
    values = np.array([0.0, -0.0, np.nan, -np.nan], np.float32)
    payload = np.uint32([0x7FC00001]).view(np.float32)
    assert len({fingerprint(v.reshape(1).view(np.uint8)) for v in (*values, payload)}) == 5


@given(st.integers(0, 15), st.integers(0, 15), st.integers(0, 3000), st.integers(0, 2**32))
def test_unaligned_views_work(shift, other, n, seed):
    data = some_bytes(seed, n)
    room, copy = np.zeros(n + 32, np.uint8), np.zeros(n + 32, np.uint8)
    view, target = room[shift : shift + n], copy[other : other + n]
    expected = reference.fingerprint(data, 24)
    assert copy_fingerprint(data, view, 24) == expected
    assert fingerprint(view, 24) == expected
    assert copy_fingerprint(view, target, 24) == expected
    assert np.array_equal(target, data)
    for memory, start in ((room, shift), (copy, other)):
        assert not memory[:start].any()
        assert not memory[start + n :].any()


def test_read_only_source_is_enough():
    data = some_bytes(1, 61)
    data.flags.writeable = False
    assert fingerprint(data) == copy_fingerprint(data, np.empty(61, np.uint8))


@pytest.mark.parametrize(
    ("data", "position", "names"),
    [
        (np.zeros(8, np.float32), 0, "float32"),
        (np.zeros((2, 4), np.uint8), 0, r"\(2, 4\)"),
        (np.zeros(16, np.uint8)[::2], 0, r"strides \(2,\)"),
        (np.zeros(8, np.uint8), -8, "got -8 for 8 bytes"),
        (np.zeros(8, np.uint8), 4, "multiple of 8 from 0 to 2\\*\\*63, got 4"),
        (np.zeros(8, np.uint8), 1, "got 1"),
        (np.zeros(8, np.uint8), END - 8, "for 8 bytes"),
    ],
)
def test_bad_views_are_named(data, position, names):
    with pytest.raises(ValueError, match=names):
        fingerprint(data, position)
    with pytest.raises(ValueError, match=names):
        copy_fingerprint(data, data, position)


def test_bad_targets_are_named():
    source, target = some_bytes(0, 8), np.zeros(8, np.uint8)
    with pytest.raises(ValueError, match="4 bytes"):
        copy_fingerprint(source, target[:4])
    target.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        copy_fingerprint(source, target)


# -- tables of memory


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 2**20).map(lambda n: 8 * n)), max_size=9))
def test_rows_of_a_table_are_fingerprinted_and_copied_one_by_one(rows):
    parts = [some_bytes(number, n) for number, (n, _) in enumerate(rows)]
    targets = [np.full(n + 2, 0xA5, np.uint8) for n, _ in rows]

    def column(values):
        return np.array([*values], np.int64)

    sizes, positions = column(n for n, _ in rows), column(position for _, position in rows)
    sources = column(part.ctypes.data for part in parts)
    expected = [fingerprint(part, position) for part, (_, position) in zip(parts, rows, strict=True)]
    assert fingerprints(sources, sizes, positions).tolist() == expected
    found = copy_fingerprints(sources, column(t.ctypes.data + 1 for t in targets), sizes, positions)
    assert found.tolist() == expected
    for part, target in zip(parts, targets, strict=True):
        assert np.array_equal(target[1:-1], part)
        assert target[0] == target[-1] == 0xA5


@pytest.mark.parametrize(
    ("address", "nbytes", "position", "names"),
    [
        (0, 8, 0, "row 1 has 8 bytes and no memory"),
        (8, -8, 0, "got 0 for -8 bytes in row 1"),
        (8, 8, 4, "got 4 for 8 bytes in row 1"),
        (8, 8, -8, "got -8"),
        (8, 8, END - 8, "for 8 bytes in row 1"),
    ],
)
def test_bad_rows_are_named(address, nbytes, position, names):
    fine = np.zeros(8, np.uint8).ctypes.data
    columns = [np.array(column, np.int64) for column in ((fine, address), (0, nbytes), (0, position))]
    with pytest.raises(ValueError, match=names):
        fingerprints(*columns)
    with pytest.raises(ValueError, match=names):
        copy_fingerprints(columns[0], *columns)
    with pytest.raises(ValueError, match="four int64 columns"):
        fingerprints(columns[0][:1], *columns[1:])
