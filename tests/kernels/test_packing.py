"""Pack, unpack and fingerprint by the Triton kernels, against plain copies and the Numba kernel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gockpt.errors import UnsupportedState
from gockpt.kernels.fingerprint_numba import fingerprint
from gockpt.staging.pack_launch import Fingerprints, Packing

# The fixture only chooses a device and its kernels; no example changes it.
few = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.integers(0, 70) | st.sampled_from([4095, 8191, 8192, 8193, 20001])
DTYPES = (
    *(torch.uint8, torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.int16),
    *(torch.float32, torch.int64, torch.float64, torch.complex64, torch.complex128),
)


def on(device, array):
    # An empty array of NumPy's becomes a tensor of stride 0, which torch views as no other dtype.
    return (
        torch.from_numpy(array).to(device) if array.size else torch.empty(0, dtype=torch.uint8, device=device)
    )


def bytes_of(tensor):
    return tensor.reshape(-1).view(torch.uint8).cpu().numpy()


@pytest.mark.parametrize("programs", [1, 3, 1000])
@few
@given(
    st.lists(st.tuples(sizes, st.integers(0, 17), st.integers(0, 17)), max_size=8), st.integers(0, 2**32 - 1)
)
@example([(8192, 0, 0), (8193, 0, 0), (8191, 0, 0), (16384, 0, 0), (0, 0, 0), (1, 0, 0)], 1)
@example([(8193, shift, 0) for shift in range(9)], 2)
def test_every_byte_goes_to_its_place_and_back(device, programs, stretches, seed):
    random = np.random.default_rng(seed)
    room, buffer, sources, offsets, here, there = [], [], [], [], 64, 0
    for nbytes, shift, gap in stretches:
        here += shift
        there += gap
        sources.append((here, nbytes))
        offsets.append(there)
        here, there = -(-(here + nbytes) // 16) * 16 + 16, -(-(there + nbytes) // 16) * 16
    content = random.integers(0, 256, here + 64, np.uint8)
    room = on(device, content.copy())
    buffer = torch.full((there + 64,), 0xA5, dtype=torch.uint8, device=device)
    expected = np.full(there + 64, 0xA5, np.uint8)
    for (start, nbytes), offset in zip(sources, offsets, strict=True):
        expected[offset : offset + nbytes] = content[start : start + nbytes]
    tensors = {f"t{i}": room[a : a + n] for i, (a, n) in enumerate(sources)}
    packing = Packing(tensors, offsets, there, device)
    packing.pack(buffer, max_programs=programs)
    assert np.array_equal(buffer.cpu().numpy(), expected)
    assert np.array_equal(room.cpu().numpy(), content)

    changed = random.integers(0, 256, there + 64, np.uint8)
    packing.unpack(on(device, changed), max_programs=programs)
    for (start, nbytes), offset in zip(sources, offsets, strict=True):
        content[start : start + nbytes] = changed[offset : offset + nbytes]
    assert np.array_equal(room.cpu().numpy(), content)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_mean_nothing(device, dtype):
    content = np.random.default_rng(3).integers(0, 256, 48 * 16, np.uint8)
    if dtype is torch.bool:
        content &= 1
    tensor = on(device, content).view(dtype)
    buffer = torch.zeros(content.size, dtype=torch.uint8, device=device)
    Packing({"t": tensor}, [0], content.size, device).pack(buffer, max_programs=2)
    assert np.array_equal(buffer.cpu().numpy(), content)
    prints = Fingerprints({"t": tensor}, [0], device)
    prints.launch(max_programs=2)
    assert prints.values() == {"t": fingerprint(content)}


def test_a_thousand_tensors_take_one_launch_for_each_alignment(device):
    random = np.random.default_rng(5)
    counts = (2 ** random.uniform(0, 8, 1000)).astype(int)
    tensors = {f"t{i}": torch.rand(n, device=device) for i, n in enumerate(counts.tolist())}
    ends = np.cumsum(4 * counts)
    packing = Packing(tensors, (ends - 4 * counts).tolist(), int(ends[-1]), device)
    assert len(packing._tables) <= 3  # floats at multiples of 16, 8 and 4
    buffer = torch.zeros(int(ends[-1]), dtype=torch.uint8, device=device)
    packing.pack(buffer, max_programs=64)
    assert torch.equal(buffer, torch.cat([t.view(torch.uint8) for t in tensors.values()]))


def test_dense_tensors_travel_in_storage_order_and_others_are_refused(device):
    dense = torch.rand(4, 6, device=device).t()
    buffer = torch.zeros(96, dtype=torch.uint8, device=device)
    Packing({"dense": dense}, [0], 96, device).pack(buffer, max_programs=1)
    assert torch.equal(buffer, dense.t().reshape(-1).view(torch.uint8))
    for name, bad in {"rows": dense[:, ::2], "same": torch.rand(3, 1, device=device).expand(3, 4)}.items():
        with pytest.raises(UnsupportedState, match=f"'model/{name}' does not fill"):
            Packing({"fine": dense, f"model/{name}": bad}, [0, 96], 400, device)


def test_this_steps_tensors_take_the_place_of_the_last_ones(device):
    first = {"a": torch.rand(5000, device=device), "b": torch.rand(7, device=device)}
    second = {name: torch.rand_like(tensor) for name, tensor in first.items()}
    packing = Packing(first, [0, 20000], 20028, device)
    prints = Fingerprints(first, [0, 80], device)
    packing.rebind(second)
    prints.rebind(second)
    buffer = torch.zeros(20028, dtype=torch.uint8, device=device)
    packing.pack(buffer, max_programs=4)
    assert torch.equal(buffer, torch.cat([t.view(torch.uint8) for t in second.values()]))
    prints.launch(max_programs=1)
    positions = {"a": 0, "b": 80}
    assert prints.values() == {
        name: fingerprint(bytes_of(tensor), positions[name]) for name, tensor in second.items()
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: {"b": t["a"]}, r"planned for the tensors \['a'\]"),
        (lambda t: {"a": t["a"][1:]}, "'a' had 100 elements of torch.float32"),
        (lambda t: {"a": t["a"].half()}, "has 100 of torch.float16"),
        (lambda t: {"a": torch.rand(101, device=t["a"].device)[1:]}, "is not a multiple of 16"),
        (lambda t: {"a": t["a"].to("meta")}, "'a' is on meta"),
    ],
)
def test_tensors_that_do_not_fit_the_plan_change_nothing(device, change, reason):
    tensors = {"a": torch.rand(100, device=device)}
    packing = Packing(tensors, [0], 400, device)
    with pytest.raises(ValueError, match=reason):
        packing.rebind(change(tensors))
    buffer = torch.zeros(400, dtype=torch.uint8, device=device)
    packing.pack(buffer, max_programs=1)
    assert torch.equal(buffer, tensors["a"].view(torch.uint8))


def test_a_buffer_that_does_not_fit_is_refused(device):
    packing = Packing({"a": torch.rand(8, device=device)}, [0], 32, device)
    room = torch.zeros(64, dtype=torch.uint8, device=device)
    for buffer in (room[:31], room[1:], room.view(torch.int8), room[::2]):
        with pytest.raises(ValueError, match="at least 32 contiguous bytes"):
            packing.pack(buffer, max_programs=1)
    with pytest.raises(ValueError, match="max_programs must be at least 1, got 0"):
        packing.pack(room, max_programs=0)


@pytest.mark.parametrize("programs", [1, 5])
@few
@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex128]),
            st.integers(0, 40) | st.sampled_from([2047, 2048, 2049, 5000]),
            st.integers(0, 4),
            st.sampled_from([0, 8, 2**34 - 24, 2**35 - 40, 2**33 - 56, 2**40, 2**62]),
        ),
        max_size=6,
    ),
    st.integers(0, 2**32 - 1),
)
@example([(torch.uint8, 5000, 1, 2**35 - 2048), (torch.complex128, 2049, 0, 2**35 - 600)], 0)
@example([(torch.uint8, 16384 + n, n, 8) for n in range(8)], 0)
@example([(torch.float32, 0, 0, 0)], 0)
def test_fingerprints_are_those_of_the_host(device, programs, stretches, seed):
    random = np.random.default_rng(seed)
    contents, tensors, positions = {}, {}, []
    for number, (dtype, count, skip, position) in enumerate(stretches):
        content = random.integers(0, 256, (count + skip) * dtype.itemsize, np.uint8)
        contents[f"t{number}"] = (content[skip * dtype.itemsize :].copy(), position)
        tensors[f"t{number}"] = on(device, content).view(dtype)[skip:]
        positions.append(position)
    prints = Fingerprints(tensors, positions, device)
    for _ in range(2):  # a second launch starts from zero again
        prints.launch(max_programs=programs)
    assert prints.values() == {name: fingerprint(*of) for name, of in contents.items()}


def test_pieces_sum_to_the_whole(device):
    content = np.random.default_rng(9).integers(0, 256, 40003, np.uint8)
    whole = on(device, content)
    cuts = [0, 8, 16392, 24008, 40003]
    pieces = {f"s{a}": whole[a:b] for a, b in itertools.pairwise(cuts)}
    prints = Fingerprints(pieces, cuts[:-1], device)
    prints.launch(max_programs=3)
    assert sum(prints.values().values()) % 2**64 == fingerprint(content)


def test_a_piece_that_begins_inside_a_word_is_refused(device):
    with pytest.raises(ValueError, match="stretch 0 does not begin at a multiple of 8 bytes"):
        Fingerprints({"t": torch.rand(8, device=device)}, [4], device)
