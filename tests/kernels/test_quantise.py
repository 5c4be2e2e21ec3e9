"""Quantising on the host: what Numba writes is the reference, bit for bit, and bfloat16 is torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from gockpt.kernels import reference
from gockpt.kernels.gradient16_format import RAW, Gradient, plan_message
from gockpt.kernels.gradient16_numba import narrow, quantise, widen

EDGES = np.array(
    [
        *(0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF),
        *(0x3F800000, 0x07800000, 0x07000000, 0x3F801000, 0x3F803000, 0x33000000, 0x7F000000, 0x38800000),
        *(0x387FE000, 0x387FF000, 0x33800000, 0x33C00000, 0xB3400000, 0x477FE000, 0x477FF000),
    ],
    np.uint32,
)
BROKEN = np.array([0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFC12345], np.uint32)
KINDS = ("normal", "zero", "negative zero", "denormal", "bits", "edges", "huge", "broken", "wide")


def block(kind, count, random):
    """Return float32 of one kind, as one block or less may hold."""
    if kind == "zero":
        return np.zeros(count, np.float32)
    if kind == "negative zero":
        return -np.zeros(count, np.float32)
    if kind == "denormal":
        return random.integers(0, 1 << 23, count).astype(np.uint32).view(np.float32)
    if kind == "bits":
        bits = random.integers(0, 1 << 32, count, np.uint32)
        return np.where((bits >> 23 & 255) == 255, bits ^ np.uint32(1 << 30), bits).view(np.float32)
    if kind == "edges":
        return random.choice(EDGES, count).view(np.float32)
    if kind == "huge":
        return (random.uniform(-1, 1, count) * 3.4e38).astype(np.float32)
    if kind == "wide":
        return np.ldexp(random.standard_normal(count), random.integers(-149, 126, count)).astype(np.float32)
    made = (random.standard_normal(count) * 10.0 ** random.integers(-30, 30)).astype(np.float32)
    if kind == "broken":
        made.view(np.uint32)[random.integers(0, count, 3)] = random.choice(BROKEN, 3)
    return made


def gradient(kinds, count, seed):
    random = np.random.default_rng(seed)
    firsts = range(0, count, 1024)
    blocks = [
        block(kinds[n % len(kinds)], min(1024, count - first), random) for n, first in enumerate(firsts)
    ]
    return np.concatenate([np.zeros(0, np.float32), *blocks])


counts = st.integers(0, 40) | st.sampled_from([1, 7, 1023, 1024, 1025, 2047, 4096, 5000])
kinds = st.lists(st.sampled_from(KINDS), min_size=1, max_size=4)


def written(values, raw_slots):
    """Return the message of ``values`` and how many raw blocks found no slot."""
    message = plan_message([Gradient(0, values.size, 4)], raw_slots)
    data = np.full(message.nbytes + 64, 0xA5, np.uint8)
    lost = quantise(values, message, data)
    assert (data[message.nbytes :] == 0xA5).all()
    return message, data, lost


@given(kinds, counts, st.integers(0, 2**32 - 1))
@example(list(KINDS), 9 * 1024 + 1, 0)
def test_what_is_written_is_the_reference(chosen, count, seed):
    values = gradient(chosen, count, seed)
    codes, halves, raw = reference.quantise(values)
    message, data, lost = written(values, codes.size)
    assert lost == message.incomplete(data) == 0
    assert data[:16].view(np.int32).tolist() == [len(raw), 0, 0, 0]
    assert np.array_equal(data[message.codes : message.codes + codes.size], codes)
    at = message.values
    assert np.array_equal(data[at : at + 2 * count].view(np.uint16), halves)
    slots = data[message.slots : message.slots + 4 * codes.size].view(np.int32)
    assert slots[codes == RAW].tolist() == list(range(len(raw)))
    assert (slots[codes != RAW] == -1).all()
    side = data[message.side : message.side + 4096 * len(raw)].view(np.uint32)
    assert np.array_equal(side, raw.reshape(-1))
    out = np.full(count, 7, np.float32)
    message.read(data, 0, out)
    assert np.array_equal(out.view(np.uint32), reference.dequantise(codes, halves, raw).view(np.uint32))


@given(counts, st.integers(0, 4), st.integers(0, 2**32 - 1))
def test_raw_blocks_without_a_slot_are_counted(count, raw_slots, seed):
    """What found room is there; that the message must not be read is known."""
    values = gradient(["broken", "normal"], count, seed)
    raw = len(reference.quantise(values)[2])
    message, data, lost = written(values, raw_slots)
    assert lost == message.incomplete(data) == max(0, raw - raw_slots)


@pytest.mark.parametrize("kind", [np.float64, np.float16])
def test_what_does_not_fit_is_refused(kind):
    message = plan_message([Gradient(0, 5, 4)], 0)
    data = np.zeros(message.nbytes, np.uint8)
    for values, memory in (
        (np.zeros(4, np.float32), data),
        (np.zeros(5, np.float32), data[:-1]),
        (np.zeros(5, kind), data),
    ):
        with pytest.raises(ValueError, match="can't take"):
            quantise(values, message, memory)
    assert not data.any()


@given(kinds, counts, st.integers(0, 2**32 - 1))
@example(list(KINDS), 9 * 1024 + 1, 0)
def test_bfloat16_is_rounded_as_torch_does(chosen, count, seed):
    values = gradient(chosen, count, seed)
    halves = np.full(count, 7, np.uint16)
    narrow(values, halves)
    wide = np.full(count, 7, np.float32)
    widen(halves, wide)
    expected = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    broken = np.isnan(values)
    assert np.array_equal(wide.view(np.uint32)[~broken], expected.view(np.uint32)[~broken])
    assert np.isnan(wide[broken]).all()
    assert np.array_equal(np.signbit(wide), np.signbit(values))
    again = np.empty(count, np.uint16)
    narrow(wide, again)
    assert np.array_equal(again, halves)


def test_sizes_that_differ_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        narrow(np.zeros(3, np.float32), np.zeros(4, np.uint16))
    with pytest.raises(ValueError, match="do not fit"):
        widen(np.zeros(3, np.uint16), np.zeros(4, np.float32))
