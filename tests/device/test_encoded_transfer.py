"""Gradients that are encoded on their way off a device: into one load, into place, and proven."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.errors import SaveError
from gockpt.kernels.fingerprint_numba import fingerprint
from gockpt.kernels.gradient16_launch import form_of, layout_of
from gockpt.kernels.gradient16_numba import narrow, quantise
from gockpt.staging.arena import Arena
from gockpt.staging.copy_batches import cut_batches
from gockpt.staging.device_budget import Room
from gockpt.staging.device_stager import DeviceStager
from gockpt.staging.stager import CopyRequest, Source, Urgency

KB = 1024


def encoded(values, form):
    found = np.zeros(form.nbytes, np.uint8)
    if form.encoding == "bf16":
        narrow(values, found.view(np.uint16))
    else:
        assert not quantise(values, layout_of(form.nbytes, values.size), found)
    return found


def request(values, encoding, offset, position=1 << 40):
    source = Source(values.view(np.uint8), 0, values.nbytes, position)
    return CopyRequest(source, 0, offset, "opt", form_of(encoding, values.size))


rows = st.lists(
    st.tuples(st.sampled_from([None, "fp16", "bf16"]), st.integers(64, 1500), st.integers(0, 2)), max_size=8
)


@given(rows, st.integers(60, 120), st.integers(1, 900), st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_loads_carry_what_is_encoded_in_one_piece_to_its_place(cargo, slot, copy, piece, seed):
    random = np.random.default_rng(seed)
    requests, end = [], 0
    for encoding, count, gap in cargo:
        values = random.standard_normal(count).astype(np.float32)
        found = request(values, encoding, end + 64 * gap)
        if found.form.encoding is None:
            found = CopyRequest(found.source, 0, found.offset, "opt")
        requests.append(found)
        end = -(-(found.offset + found.nbytes) // 64) * 64
    arena, wanted = np.full(end + 64, 9, np.uint8), np.full(end + 64, 9, np.uint8)
    slot_bytes, piece_bytes = 64 * slot, 64 * piece
    loads = cut_batches(requests, slot_bytes=slot_bytes, copy_bytes=copy, piece_bytes=piece_bytes)
    whole = []
    for load in loads:
        assert load.used <= slot_bytes
        memory = np.full(slot_bytes, 77, np.uint8)
        for part in load.slices:
            sent = part.request
            content = sent.source.memory[part.low : part.low + part.nbytes]
            if sent.form is not None:
                whole.append(part.number)
                assert (part.low, part.nbytes, part.place % 64) == (0, sent.nbytes, 0)
                content = encoded(sent.source.memory.view(np.float32), sent.form)
                wanted[sent.offset : sent.offset + sent.nbytes] = content
            else:
                wanted[part.offset : part.offset + part.nbytes] = content
            memory[part.place : part.place + part.nbytes] = content
        for c in load.copies:
            assert 0 < c.nbytes <= copy
            assert c.offset // piece_bytes == (c.offset + c.nbytes - 1) // piece_bytes
            arena[c.offset : c.offset + c.nbytes] = memory[c.place : c.place + c.nbytes]
    assert np.array_equal(arena, wanted)
    assert whole == [number for number, sent in enumerate(requests) if sent.form is not None]


@pytest.mark.parametrize(("offset", "slot"), [(32, 1 << 16), (0, 1024)])
def test_what_can_not_leave_in_one_piece_is_refused(offset, slot):
    one = request(np.zeros(2000, np.float32), "bf16", offset)
    with pytest.raises(ValueError, match="can't leave by a slot of"):
        cut_batches([one], slot_bytes=slot, copy_bytes=64, piece_bytes=64)


class Scene:
    def __init__(self, fakes, **made):
        self.device = fakes.Device(**made)
        self.arena = Arena(1 << 20)
        self.arena.data[:] = 9
        self.stager = DeviceStager(
            self.device, [self.arena], Room(8 * KB, 3, 0), thread=False, copy_bytes=KB, piece_bytes=16 * KB
        )
        random = np.random.default_rng(0)
        self.values = [random.standard_normal(n).astype(np.float32) for n in (3000, 700, 40, 1024, 2500)]
        kinds = ["fp16", "bf16", None, "fp16", "bf16"]
        self.requests, end = [], 0
        for number, (values, kind) in enumerate(zip(self.values, kinds, strict=True)):
            found = request(values, kind, end, (number + 1) << 40)
            self.requests.append(found if kind else CopyRequest(found.source, 0, end, "opt"))
            end += -(-found.nbytes // 64) * 64
        self.end = end

    def wanted(self):
        return [
            v.view(np.uint8).copy() if s.form is None else encoded(v, s.form)
            for v, s in zip(self.values, self.requests, strict=True)
        ]

    def finish(self):
        self.stager.finish()
        violations = self.device.violations
        self.stager.close()
        assert self.device.used == 0
        return violations


@pytest.mark.parametrize("rounds", [1, 3])
def test_what_arrives_is_the_gradient_in_16_bits(fakes, rounds):
    at = Scene(fakes)
    for _ in range(rounds):
        wanted = at.wanted()
        sent = at.stager.copy(at.requests, Urgency.GRADIENT)
        for values in at.values:
            at.device.write(values.view(np.uint8), 0)  # the next backward pass
        at.stager.finish()
        assert sent.proven
        assert sent.nbytes == sum(w.size for w in wanted)
        for number, (s, content) in enumerate(zip(at.requests, wanted, strict=True)):
            found = at.arena.view(s.offset, s.nbytes)
            if number != 2 and s.form.encoding == "fp16":
                message = layout_of(s.nbytes, at.values[number].size)
                stands = slice(message.values, message.values + 2 * at.values[number].size)
                assert np.array_equal(found[stands], content[stands])
            else:
                assert np.array_equal(found, content)
            assert sent.expected[number] == fingerprint(found, s.source.position)
        assert (at.arena.data[at.end :] == 9).all()
        for values in at.values:
            values[:] = np.random.default_rng(rounds).standard_normal(values.size)
    assert at.finish() == []


@pytest.mark.parametrize("stream", ["training", "side 2"])
def test_a_stream_that_does_not_wait_is_seen(fakes, stream):
    """A slot that is overwritten while it is copied, or copied while it is written."""
    at = Scene(fakes)
    at.device.deaf = {stream}
    at.device.compute(1)
    sent = at.stager.copy(at.requests, Urgency.GRADIENT)
    more = at.stager.copy(at.requests, Urgency.GRADIENT)
    violations = at.finish()
    assert violations
    assert sent.lost or more.lost


def test_what_the_bus_gets_wrong_is_seen(fakes):
    at = Scene(fakes)
    real = at.device.copy

    def copy(stream, memory, place, target):
        real(stream, memory, place, target)
        if at.device.calls["copy"] == 1:
            at.device.until(lambda: not at.device.unfinished())
            target[5] ^= 16

    at.device.copy = copy
    sent = at.stager.copy(at.requests, Urgency.GRADIENT)
    at.finish()
    assert len(sent.lost) == 1


@pytest.mark.parametrize(
    ("name", "number"), [("encode", 0), ("encode", 1), ("prints", 0), ("prints", 1), ("pack", 0)]
)
def test_a_device_that_refuses_is_told_and_the_next_goes_well(fakes, name, number):
    at = Scene(fakes, fail={name: {number}})

    def send():
        at.stager.finish(at.stager.copy(at.requests, Urgency.GRADIENT))

    with pytest.raises(SaveError, match=f"{name} refused"):
        send()
    again = at.stager.copy(at.requests, Urgency.GRADIENT)
    at.stager.finish(again)
    assert again.proven
    assert at.finish() == []
