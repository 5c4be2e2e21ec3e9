"""Changes of many words: none that training makes leaves a fingerprint as it was, by the million.

A fingerprint is a sum, so a change leaves it as it was only if the differences of the words' values cancel.
All differences of one kind of change, one per word, are therefore compared with each other: of n words,
n**2 / 2 changes of two words are tried by one sort. In the same way the sums over all first words are: two
that are equal would be a stretch of words whose change does not show, and there are n**2 / 2 stretches.
"""

from __future__ import annotations

import numpy as np
import pytest

from gockpt.kernels import reference
from gockpt.kernels.fingerprint_numba import fingerprint

ONE = np.uint64(1)
BITS = {f"bit {bit}": 1 << bit for bit in range(64)}
FLIPS = BITS | {
    "float32 signs": 0x8000000080000000,
    "bfloat16 signs": 0x8000800080008000,
    "lowest bits of float32": 0x0000000100000001,
    "lowest bits of bfloat16": 0x0001000100010001,
    "all bits": 2**64 - 1,
    "lowest bits of bytes": 0x0101010101010101,
}
STEPS = {
    "float32": 1,
    "upper float32": 1 << 32,
    "both float32": 0x0000000100000001,
    "float32 exponents": 0x0080000000800000,
    "bfloat16": 0x0001000100010001,
    "bfloat16 exponent": 1 << 55,
    "three units": 3,
    "float64 exponent": 1 << 52,
}
CONTENTS = ("zeros", "ones", "normal float32", "normal bfloat16", "any")


def contents(count: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(count)
    values = random.standard_normal(4 * count).astype(np.float32) * np.float32(0.02)
    upper = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return {
        "zeros": np.zeros(count, np.uint64),
        "ones": np.full(2 * count, 1, np.float32).view(np.uint64),
        "normal float32": values[: 2 * count].view(np.uint64),
        "normal bfloat16": upper.view(np.uint64),
        "any": random.integers(0, 2**64, count, np.uint64),
    }


def numbers(count: int, first: int = 0) -> np.ndarray:
    return np.arange(count, dtype=np.uint64) + np.uint64(first)


def check_pairs(what: str, differences: np.ndarray) -> None:
    """No difference is 0, and no two cancel or are equal: then neither is done and undone elsewhere."""
    assert differences.all(), what
    sizes = np.minimum(differences, ~differences + ONE)
    sizes.sort()
    assert (sizes[1:] != sizes[:-1]).all(), what


def check_ranges(what: str, differences: np.ndarray) -> None:
    """No stretch of words, of whatever length, can change like that and leave the sum."""
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(differences, dtype=np.uint64)])
    sums.sort()
    assert (sums[1:] != sums[:-1]).all(), what


def check_changes_of_two_words(name: str, count: int, first: int) -> None:
    words, at = contents(count)[name], numbers(count, first)
    before = reference.mixed(words, at)
    for kind, flip in FLIPS.items():
        found = reference.mixed(words ^ np.uint64(flip), at) - before
        check_pairs(kind, found)
        check_ranges(kind, found)
    for kind, step in STEPS.items():
        more = reference.mixed(words + np.uint64(step), at) - before
        less = reference.mixed(words - np.uint64(step), at) - before
        # Up here and down there; and a second difference over neighbours: +1, -2, +1.
        check_pairs(kind, np.concatenate([more, less]))
        twice = reference.mixed(words - np.uint64(2 * step), at) - before
        check_pairs(f"{kind}, over three", more[:-2] + twice[1:-1] + more[2:])


def check_moves(name: str, count: int, first: int) -> None:
    words, at = contents(count)[name], numbers(count, first)
    before = reference.mixed(words, at)
    zeroed = reference.mixed(np.zeros_like(words), at) - before
    check_pairs("zeroed", zeroed)
    check_ranges("zeroed", zeroed)
    check_ranges("constant", (reference.mixed(np.full_like(words, words[0]), at) - before)[1:])
    for distance in (1, 2, 3, 8, 64, 512, 1024, 4096, count // 2):
        ahead = reference.mixed(words[distance:], at[:-distance]) - before[:-distance]
        check_ranges(f"copied over what is {distance} words before", ahead)
        behind = reference.mixed(words[:-distance], at[distance:]) - before[distance:]
        check_ranges(f"copied over what is {distance} words behind", behind)
        # Each word and its partner are exchanged, once or at two places.
        check_pairs(f"exchanged over {distance} words", ahead + behind)
    for shift in range(1, 8):  # by elements that are no whole words
        low, high = np.uint64(8 * shift), np.uint64(64 - 8 * shift)
        moved = (words[1:] << low) | (words[:-1] >> high)
        check_ranges(f"shifted by {shift} bytes", reference.mixed(moved, at[1:]) - before[1:])


@pytest.mark.parametrize("first", [0, 2**32 - 1000, 2**59])
@pytest.mark.parametrize("name", CONTENTS)
def test_changes_of_two_words_and_of_stretches_do_not_cancel(name, first):
    check_changes_of_two_words(name, 1 << 12, first)


@pytest.mark.parametrize("name", CONTENTS[2:])
def test_words_that_are_moved_zeroed_or_exchanged_are_seen(name):
    check_moves(name, 1 << 17, 0)


@pytest.mark.soak
@pytest.mark.parametrize("first", [0, 2**32 - 1000])
@pytest.mark.parametrize("name", CONTENTS)
def test_far_more_changes_of_two_words_are_seen(name, first):
    check_changes_of_two_words(name, 1 << 21, first)


@pytest.mark.soak
@pytest.mark.parametrize("name", CONTENTS[2:])
def test_far_more_words_that_are_moved_are_seen(name):
    check_moves(name, 1 << 22, 2**32 - 1000)


def test_the_kernel_sees_what_these_values_say():
    words = contents(1 << 12)["normal float32"]
    values = words.view(np.float32)
    rolled = [fingerprint(np.roll(values, shift).view(np.uint8)) for shift in range(4 * 512)]
    assert len(set(rolled)) == len(rolled)
    total = int(np.sum(reference.mixed(words, numbers(words.size, 5)), dtype=np.uint64))
    assert fingerprint(words.view(np.uint8), 40) == total
