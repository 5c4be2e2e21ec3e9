"""Quantised gradients: what Triton writes and Numba reads, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gockpt.errors import UnsupportedState
from gockpt.kernels import reference
from gockpt.kernels.gradient16_format import RAW, Gradient, dequantise, plan_message
from gockpt.staging.pack_launch import Quantising

few = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
SPECIAL = np.array(
    [
        *(0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF),
        *(0x3F800000, 0x07800000, 0x07000000, 0x3F801000, 0x3F803000, 0x33000000, 0x7F000000),
    ],
    np.uint32,
)
BROKEN = np.array([0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFC12345], np.uint32)
KINDS = ("normal", "zero", "negative zero", "denormal", "bits", "special", "huge", "broken", "wide")


def values(kind, count, random):
    """Return float32 of one kind, as one block or less may hold."""
    normal = (random.standard_normal(count) * 10.0 ** random.integers(-30, 30)).astype(np.float32)
    if kind == "zero":
        return np.zeros(count, np.float32)
    if kind == "negative zero":
        return -np.zeros(count, np.float32)
    if kind == "denormal":
        return random.integers(0, 1 << 23, count).astype(np.uint32).view(np.float32)
    if kind == "bits":
        bits = random.integers(0, 1 << 32, count, np.uint32)
        return np.where((bits >> 23 & 255) == 255, bits ^ np.uint32(1 << 30), bits).view(np.float32)
    if kind == "special":
        return random.choice(SPECIAL, count).view(np.float32)
    if kind == "huge":
        return (random.uniform(-1, 1, count) * 3.4e38).astype(np.float32)
    if kind == "broken" and count:
        normal.view(np.uint32)[random.integers(0, count, 3)] = random.choice(BROKEN, 3)
    if kind == "wide":
        return np.ldexp(random.standard_normal(count), random.integers(-149, 126, count)).astype(np.float32)
    return normal


def gradient(kinds, count, seed):
    random = np.random.default_rng(seed)
    blocks = [
        values(kinds[number % len(kinds)], min(1024, count - first), random)
        for number, first in enumerate(range(0, count, 1024))
    ]
    return np.concatenate([np.zeros(0, np.float32), *blocks])


def same(a, b):
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def quantised(device, tensors, raw_slots, programs):
    quantising = Quantising(tensors, raw_slots, device)
    buffer = torch.full((quantising.message.nbytes + 64,), 0xA5, dtype=torch.uint8, device=device)
    quantising.launch(buffer, max_programs=programs)
    data = buffer.cpu().numpy()
    assert (data[quantising.message.nbytes :] == 0xA5).all()
    return quantising.message, data


cases = st.lists(
    st.tuples(
        st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
        st.integers(0, 40) | st.sampled_from([1023, 1024, 1025, 2047, 4096, 5000]),
        st.integers(0, 2),
        st.booleans(),
    ),
    max_size=5,
)


@pytest.mark.parametrize("programs", [1, 3])
@few
@given(cases, st.integers(0, 2**32 - 1))
@example([([kind], 1025, 0, False) for kind in KINDS], 0)
@example([([kind], 1025, 1, True) for kind in KINDS], 1)
def test_what_is_written_and_read_is_the_reference(device, programs, tensors, seed):
    gradients, contents = {}, []
    for number, (kinds, count, skip, brain) in enumerate(tensors):
        content = gradient(kinds, count + skip, seed + number)
        tensor = torch.from_numpy(content.copy()).to(device)
        if brain:  # cut, not rounded, so that every bit pattern is reached
            upper = (content.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
            tensor = torch.from_numpy(upper).to(device).view(torch.bfloat16)
            content = (content.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        gradients[f"g{number}"] = tensor[skip:]
        contents.append(content[skip:])
    total = sum(-(-content.size // 1024) for content in contents)
    message, data = quantised(device, gradients, total, programs)
    assert message.blocks == total
    assert message.incomplete(data) == 0
    all_codes = data[message.codes : message.codes + message.blocks]
    all_slots = data[message.slots : message.slots + 4 * message.blocks].view(np.int32)
    side = data[message.side : message.nbytes].view(np.uint32).reshape(-1, 1024)
    taken = all_slots[all_codes == RAW]
    assert sorted(taken) == list(range(taken.size))
    assert (all_slots[all_codes != RAW] == -1).all()
    for number, content in enumerate(contents):
        codes, halves, raw = reference.quantise(content)
        first, value = message.first_block[number], message.first_value[number]
        assert np.array_equal(all_codes[first : first + codes.size], codes)
        at = message.values + 2 * value
        assert np.array_equal(data[at : at + 2 * content.size].view(np.uint16), halves)
        assert np.array_equal(side[all_slots[first : first + codes.size][codes == RAW]], raw)
        expected = reference.dequantise(codes, halves, raw)
        out = np.full(content.size, 7, np.float32)
        message.read(data, number, out)
        assert same(out, expected)
        broken = np.repeat(codes == RAW, 1024)[: content.size]
        assert same(out[broken], content[broken])


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4), st.data())
def test_any_tile_may_be_read(kinds, data):
    content = gradient(kinds, data.draw(st.integers(0, 5000)), data.draw(st.integers(0, 2**32 - 1)))
    codes, halves, raw = reference.quantise(content)
    whole = reference.dequantise(codes, halves, raw)
    slots = np.full(codes.size, -1, np.int32)
    slots[codes == RAW] = np.arange(len(raw))
    first = data.draw(st.integers(0, content.size))
    out = np.empty(data.draw(st.integers(0, content.size - first)), np.float32)
    dequantise(codes, slots, halves, raw.reshape(-1), first, out)
    assert same(out, whole[first : first + out.size])


def test_every_half_and_every_code_is_read_as_the_reference_does():
    finite = np.arange(65536, dtype=np.uint16)
    finite = np.resize(finite[(finite & 0x7C00) != 0x7C00], 64 * 1024)
    for start in range(0, 255, 64):
        codes = np.arange(start, start + 64, dtype=np.uint8) % 255
        for turn in range(0, 64, 21):
            halves = np.roll(finite, turn * 1024)
            out = np.empty(halves.size, np.float32)
            dequantise(codes, np.full(64, -1, np.int32), halves, np.empty(0, np.uint32), 0, out)
            assert same(out, reference.dequantise(codes, halves, np.empty((0, 1024), np.uint32)))


@pytest.mark.parametrize(
    ("value", "code", "half"),
    [
        (1.0, 127, 0x7400),  # 2**14
        (-1.9990234375, 127, 0xF7FF),  # the last one before 2**15
        (1.99999988, 127, 0x7800),  # rounds to 2**15, which is finite
        (3.4028235e38, 254, 0x7800),
        (2.0**-112, 15, 0x7400),
        (2.0**-149, 0, 0x0002),  # 2**-149 * 2**126
        (0.0, 0, 0x0000),
        (-0.0, 0, 0x8000),
    ],
)
def test_the_format_does_not_drift(value, code, half):
    codes, halves, raw = reference.quantise(np.array([value], np.float32))
    assert (codes.tolist(), halves.tolist(), raw.shape) == ([code], [half], (0, 1024))


@given(st.sampled_from(["normal", "huge", "denormal", "wide"]), st.integers(0, 2**32 - 1))
def test_the_error_is_bounded_by_the_blocks_largest_value(kind, seed):
    content = gradient([kind], 1024, seed)
    back = reference.dequantise(*reference.quantise(content))
    top = float(np.abs(content).max())
    # Half an ulp of 11 bits; or of float16's smallest number, 2**-24 of a scale of 2**14 for the largest.
    bound = np.maximum(np.abs(content.astype(np.float64)) * 2**-11, top * 2**-38)
    assert (np.abs(back.astype(np.float64) - content) <= np.maximum(bound, 2**-150)).all()


def test_a_message_without_room_for_a_raw_block_is_refused(device):
    content = gradient(["broken"], 4000, 1)
    content[1024:2048] = 1
    tensors = {"g": torch.from_numpy(content.copy()).to(device)}
    message, data = quantised(device, tensors, 2, 1)
    assert message.incomplete(data) == 1
    slots = data[message.slots : message.slots + 16].view(np.int32)
    assert sorted(slots.tolist()) == [-1, -1, 0, 1]
    with pytest.raises(ValueError, match="found no raw slot: the message is incomplete"):
        message.read(data, 0, np.empty(4000, np.float32))
    out = np.empty(1024, np.float32)
    message.read(data, 0, out, 1024)
    assert (out == 1).all()


def test_what_is_no_gradient_is_refused(device):
    with pytest.raises(UnsupportedState, match="'w' is torch.float64"):
        Quantising({"w": torch.zeros(3, dtype=torch.float64, device=device)}, 0, device)
    with pytest.raises(ValueError, match="gradient 1 "):
        plan_message([Gradient(0, 3, 4), Gradient(2, 3, 4)], 0)
    with pytest.raises(ValueError, match="raw_slots must not be negative, got -1"):
        plan_message([], -1)


def test_stretches_beyond_the_tensor_are_refused():
    message = plan_message([Gradient(0, 10, 4), Gradient(64, 10, 4)], 0)
    data = np.zeros(message.nbytes, np.uint8)
    for first, count in ((5, 6), (-1, 3)):
        with pytest.raises(ValueError, match="which has 10"):
            message.read(data, 1, np.empty(count, np.float32), first)
    with pytest.raises(ValueError, match=r"from \d+ of"):
        message.read(data[:-1], 0, np.empty(1, np.float32))
    with pytest.raises(ValueError, match="wanted elements 0 to 4 of 3"):
        dequantise(
            np.zeros(1, np.uint8),
            np.zeros(1, np.int32),
            np.zeros(3, np.uint16),
            np.zeros(0, np.uint32),
            0,
            np.empty(4, np.float32),
        )
