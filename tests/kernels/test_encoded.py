"""Gradients encoded while they are packed: what Triton writes is what the host writes, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gockpt.errors import UnsupportedState
from gockpt.kernels.gradient16_launch import ROOMY, Place, fitting, form_of, layout, layout_of, plan_each
from gockpt.kernels.gradient16_numba import narrow, quantise
from gockpt.staging.pack_launch import Encoding

few = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
ODD = np.array(
    [0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x7F7FFFFF, 0x3F808000, 0x3F818000, 0xFF7F8000],
    np.uint32,
)
BROKEN = np.array([0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFC12345, 0xFFFFFFFF], np.uint32)


def gradient(count, broken, random):
    """Return normal numbers of all sizes, odd ones, and blocks with an Inf or NaN."""
    scale = np.repeat(10.0 ** random.integers(-40, 30, -(-count // 1024)), 1024)[:count]
    with np.errstate(all="ignore"):
        found = (random.standard_normal(count) * scale).astype(np.float32)
    found.view(np.uint32)[random.integers(0, count, 9)] = random.choice(ODD, 9)
    for block in random.choice(-(-count // 1024), broken, replace=False):
        at = random.integers(block * 1024, min(count, (block + 1) * 1024), 3)
        found.view(np.uint32)[at] = random.choice(BROKEN, 3)
    return found


def encoded(device, contents, encoding, raw, programs, skip=0):
    """Return where each gradient stands, and the buffer."""
    places, offset = [], 16
    for content in contents:
        nbytes = 2 * content.size if encoding == "bf16" else layout(content.size, raw).nbytes
        places.append((offset, nbytes))
        offset = -(-(offset + nbytes) // 16) * 16 + 32
    tensors = {}
    for number, content in enumerate(contents):
        padded = np.concatenate([np.zeros(skip * (number % 2), np.float32), content])
        tensors[str(number)] = torch.from_numpy(padded).to(device)[skip * (number % 2) :]
    buffer = torch.full((offset,), 0xA5, dtype=torch.uint8, device=device)
    order = list(reversed(range(len(places))))  # of no consequence
    chosen = {str(number): tensors[str(number)] for number in order}
    made = Encoding(chosen, encoding, [places[number] for number in order], offset, device)
    made.encode(buffer, max_programs=programs)
    return places, buffer.cpu().numpy()


counts = st.integers(1, 40) | st.sampled_from([1023, 1024, 1025, 2048, 3000, 4099])


@few
@given(
    st.lists(counts, min_size=1, max_size=4),
    st.integers(0, 2),
    st.sampled_from([1, 3]),
    st.sampled_from([0, 1, 4]),
    st.integers(0, 2**32 - 1),
)
@example([1025, 1024, 7], 1, 2, 1, 0)
def test_messages_of_their_own_are_the_hosts(device, sizes, broken, programs, skip, seed):
    random = np.random.default_rng(seed)
    contents = [gradient(n, min(broken, -(-n // 1024)), random) for n in sizes]
    places, data = encoded(device, contents, "fp16", 2, programs, skip)
    for content, (offset, nbytes) in zip(contents, places, strict=True):
        message = layout_of(nbytes, content.size)
        assert message.raw_slots == 2
        found = data[offset : offset + nbytes]
        expected = np.full(nbytes, 0xA5, np.uint8)
        assert quantise(content, message, expected) == message.incomplete(found) == 0
        assert found[:16].tolist() == expected[:16].tolist()
        got, wanted = np.empty(content.size, np.float32), np.empty(content.size, np.float32)
        message.read(found, 0, got)
        message.read(expected, 0, wanted)
        assert np.array_equal(got.view(np.uint32), wanted.view(np.uint32))
        # Which raw block has which slot is of no consequence; all else is the same.
        raw = int(expected[:4].view(np.int32)[0])
        if raw < 2:
            assert np.array_equal(found, expected)
        data[offset : offset + nbytes] = 0xA5
    assert (data == 0xA5).all()


@few
@given(
    st.lists(counts, min_size=1, max_size=4),
    st.sampled_from([1, 3]),
    st.sampled_from([0, 1, 4]),
    st.integers(0, 2**32 - 1),
)
@example([1025, 1024, 7], 2, 1, 0)
def test_bfloat16_is_the_hosts(device, sizes, programs, skip, seed):
    random = np.random.default_rng(seed)
    contents = [gradient(n, 1, random) for n in sizes]
    places, data = encoded(device, contents, "bf16", 0, programs, skip)
    for content, (offset, nbytes) in zip(contents, places, strict=True):
        expected = np.empty(content.size, np.uint16)
        narrow(content, expected)
        assert np.array_equal(data[offset : offset + nbytes].view(np.uint16), expected)
        data[offset : offset + nbytes] = 0xA5
    assert (data == 0xA5).all()


def test_each_message_counts_its_own_raw_blocks(device):
    random = np.random.default_rng(1)
    contents = [gradient(4000, broken, random) for broken in (3, 0, 2)]
    places, data = encoded(device, contents, "fp16", 2, 4)
    found = [
        layout_of(nbytes, content.size).incomplete(data[offset : offset + nbytes])
        for content, (offset, nbytes) in zip(contents, places, strict=True)
    ]
    assert found == [1, 0, 0]


@given(st.sampled_from(["fp16", "bf16", None]), st.integers(1, 1 << 24))
@example("fp16", 8 << 20)
def test_a_form_is_used_only_where_it_gains(encoding, count):
    form = form_of(encoding, count)
    assert (form.encoding is None) == (form.nbytes == 4 * count)
    if count >= 1024:
        assert form.encoding == encoding
        assert encoding is None or form.nbytes <= 2.1 * count + 80
    if form.encoding == "fp16":
        assert layout_of(form.nbytes, count).raw_slots == -(-count // 1024) // ROOMY


@given(st.integers(0, 40 << 20))
def test_what_fits_does(nbytes):
    count = fitting(nbytes)
    assert count % 16 == 0
    for encoding in ("fp16", "bf16") if count else ():
        assert form_of(encoding, count).nbytes <= nbytes
    if nbytes >= 4096:
        assert form_of("fp16", count + 4096).nbytes > nbytes


@pytest.mark.parametrize(
    "place",
    [
        Place(0, 0, 0, 64),
        Place(-4, 8, 0, 64),
        Place(2, 8, 0, 64),
        Place(0, 8, 8, 64),
        Place(0, 1000, 0, 64),
        Place(0, 8, 992, 64),
    ],
)
@pytest.mark.parametrize("encoding", ["fp16", "bf16"])
def test_what_can_not_stand_there_is_refused(encoding, place):
    with pytest.raises(ValueError, match="can't stand in a buffer of 1024 bytes"):
        plan_each(encoding, [place], 1024)


def test_gradients_that_meet_are_refused():
    with pytest.raises(ValueError, match="can't stand"):
        plan_each("bf16", [Place(0, 100, 16, 200), Place(0, 100, 208, 200)], 1024)


def test_launches_follow_memory_that_has_moved(device):
    first, second = torch.randn(2, 3000, device=device)
    made = Encoding({"a": first}, "bf16", [(0, 6000)], 6000, device)
    made.rebind({"a": second})
    buffer = torch.zeros(6000, dtype=torch.uint8, device=device)
    made.encode(buffer, max_programs=2)
    assert torch.equal(buffer.view(torch.bfloat16).cpu(), second.to(torch.bfloat16).cpu())


def test_what_is_no_float32_is_refused(device):
    with pytest.raises(UnsupportedState, match="'w' is torch.bfloat16"):
        Encoding({"w": torch.zeros(3, dtype=torch.bfloat16, device=device)}, "bf16", [(0, 6)], 64, device)
