"""Gradients in the ring: what comes out is what went in, rounded once, by no more than is said."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.kernels.gradient_encoding import decode, empty, encode, seal, uncertainty, usual_bytes
from gockpt.replay.rounding_probes import choose
from gockpt.staging.gradient_ring import Ring

BROKEN = np.array([0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345], np.uint32)


class Memory:
    """A ring over plain memory."""

    def __init__(self, nbytes):
        self.data = np.full(nbytes, 0xA5, np.uint8)
        self.ring = Ring(0, nbytes)

    def view(self, offset, nbytes):
        return self.data[offset : offset + nbytes]

    def encode(self, encoding, values):
        return encode(encoding, values, self.ring.allocate, self.view, self.ring.free)


def gradient(count, seed, broken):
    """Return values over many magnitudes, some of the blocks with an Inf or NaN."""
    random = np.random.default_rng(seed)
    powers = random.integers(-149, 120) + random.integers(-40, 1, count)
    values = np.ldexp(random.standard_normal(count), powers).astype(np.float32)
    for block in broken:
        if block * 1024 < count:
            inside = min(1024, count - block * 1024)
            values.view(np.uint32)[block * 1024 + random.integers(0, inside)] = random.choice(BROKEN)
    return values


counts = st.integers(1, 60) | st.sampled_from([1023, 1024, 1025, 4099, 9000])
blocks = st.lists(st.integers(0, 9), max_size=4)
encodings = st.sampled_from([None, "fp16", "bf16"])


@given(encodings, counts, st.integers(0, 2**32 - 1), blocks, st.data())
def test_what_is_read_is_within_the_uncertainty(encoding, count, seed, broken, data):
    values = gradient(count, seed, broken)
    memory = Memory(8 * count + 8192)
    found = memory.encode(encoding, values)
    encoded = memory.view(found.offset, found.nbytes)
    out = np.full(count, 7, np.float32)
    decode(found.encoding, encoded, count, 0, out)
    at = np.arange(count)
    moved = uncertainty(found.encoding, encoded, count, at, out)
    finite = np.isfinite(out) & np.isfinite(values)
    assert (finite | (out == values) | (np.isnan(out) & np.isnan(values)) | (np.abs(values) > 3.38e38)).all()
    assert (np.abs(out[finite].astype(np.float64) - values[finite]) <= moved[finite]).all()
    if encoding is None:
        assert out.tobytes() == values.tobytes()
    # Any stretch of it reads alike.
    low = data.draw(st.integers(0, count))
    part = np.full(data.draw(st.integers(0, count - low)), 7, np.float32)
    decode(found.encoding, encoded, count, low, part)
    assert part.tobytes() == out[low : low + part.size].tobytes()
    memory.ring.free(found.offset)
    assert memory.ring.in_use == 0


@given(st.integers(0, 2**32 - 1), blocks)
def test_blocks_with_an_inf_or_nan_travel_as_they_are(seed, broken):
    values = gradient(9000, seed, broken)
    memory = Memory(1 << 17)
    found = memory.encode("fp16", values)
    out = np.empty(9000, np.float32)
    decode(found.encoding, memory.view(found.offset, found.nbytes), 9000, 0, out)
    raw = {block for block in broken if block * 1024 < 9000}
    for block in raw:
        part = slice(block * 1024, (block + 1) * 1024)
        assert out[part].tobytes() == values[part].tobytes()
    assert found.nbytes <= values.nbytes
    # With five of nine blocks raw there is nothing left to gain.
    assert found.encoding == ("fp16" if len(raw) < 5 else None)


@pytest.mark.parametrize("encoding", [None, "fp16", "bf16"])
@pytest.mark.parametrize("count", [1, 3, 24, 25, 1000, 1 << 20])
def test_the_usual_size_is_what_a_finite_gradient_takes(encoding, count):
    memory = Memory(8 << 20)
    found = memory.encode(encoding, np.ones(count, np.float32))
    assert found.nbytes == usual_bytes(encoding, count) <= 4 * count
    if count >= 1000 and encoding is not None:
        assert found.nbytes < 2.1 * count


@pytest.mark.parametrize("encoding", [None, "fp16", "bf16"])
@pytest.mark.parametrize("broken", [(), (0,), range(9)])
def test_without_room_nothing_stays_behind(encoding, broken):
    values = gradient(9000, 3, broken)
    needed = Memory(1 << 17).encode(encoding, values).nbytes
    memory = Memory((needed - 1) // 64 * 64)
    assert memory.encode(encoding, values) is None
    assert memory.ring.in_use == 0


def test_no_value_makes_a_warning():
    """Signalling NaNs and overflow are values like others; warnings are errors here."""
    values = np.array([0x7F800001, 0xFFBFFFFF, 0x7F7FFFFF, 0x7F800000, 0x00000001], np.uint32).view(
        np.float32
    )
    values = np.tile(values, 500)
    for encoding in (None, "fp16", "bf16"):
        memory = Memory(1 << 16)
        found = memory.encode(encoding, values)
        data = memory.view(found.offset, found.nbytes)
        out = np.empty(values.size, np.float32)
        decode(found.encoding, data, values.size, 0, out)
        moved = uncertainty(found.encoding, data, values.size, np.arange(values.size), out)
        assert np.isfinite(moved).all()
        choose(found.encoding, data, values.size)


@pytest.mark.parametrize("encoding", [None, "fp16", "bf16"])
@pytest.mark.parametrize("count", [1, 30, 5000, 100_000])
def test_a_gradient_of_zeros_is_known_as_one(encoding, count):
    for value in (0.0, -0.0, 1e-30, 2.0, np.nan, -np.inf):
        values = np.zeros(count, np.float32)
        values[count * 2 // 3] = value
        memory = Memory(8 * count + 8192)
        found = memory.encode(encoding, values)
        assert empty(found.encoding, memory.view(found.offset, found.nbytes), count) is (value == 0)


def test_a_seal_names_piece_number_encoding_and_row():
    data = np.arange(64, dtype=np.uint8)
    mine = (3, None, data, 2, (0.5, 1.0))
    others = [
        (4, None, data, 2, (0.5, 1.0)),
        (3, "fp16", data, 2, (0.5, 1.0)),
        (3, "bf16", data, 2, (0.5, 1.0)),
        (3, None, data[::-1].copy(), 2, (0.5, 1.0)),
        (3, None, data, 3, (0.5, 1.0)),
        (3, None, data, 2, (1.0, 0.5)),
        (2, None, data, 3, (0.5, 1.0)),
    ]
    assert seal(*mine) == seal(*mine)
    assert len({seal(*one) for one in [mine, *others]}) == 1 + len(others)
