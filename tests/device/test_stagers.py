"""What callers rely on of every stager: the same trials for host memory and for a device."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from gockpt.core.descriptors import ArenaId
from gockpt.errors import SaveAborted
from gockpt.kernels.fingerprint_numba import fingerprint
from gockpt.kernels.gradient_encoding import decode, seal_position
from gockpt.staging.arena import Arena
from gockpt.staging.device_budget import Room
from gockpt.staging.device_stager import DeviceStager
from gockpt.staging.gradient_ring import Ring
from gockpt.staging.host_stager import HostStager
from gockpt.staging.stager import CopyRequest, Source, Urgency
from gockpt.staging.task_thread import TaskThread
from gockpt.tensor_memory import as_bytes

NBYTES = 1 << 20
INSIDE = (Urgency.BUFFER, Urgency.GRADIENT)


class Scene:
    """A stager, its arenas, and tensors that are given places in turn."""

    def __init__(self, make):
        self.arenas = [Arena(NBYTES), Arena(NBYTES)]
        self.ring = Ring(0, NBYTES)
        self.stager = make(self.arenas)
        self.end = 0

    def request(self, count=5000, owner="opt"):
        source = Source(torch.randn(count), 0, 4 * count, 0)
        offset, self.end = self.end, self.end + 4096 * -(-source.nbytes // 4096)
        return CopyRequest(source, ArenaId.STATE, offset, owner)

    def requests(self, count=3):
        return [self.request() for _ in range(count)]

    def arrived(self, request):
        return self.arenas[request.arena].view(request.offset, request.nbytes).tobytes()


@pytest.fixture(params=["host", "device"])
def scene(request):
    if request.param == "host":
        thread = TaskThread()
        yield Scene(lambda arenas: HostStager(thread, arenas))
        thread.close()
        return
    devices = request.getfixturevalue("devices")
    made = Scene(
        lambda arenas: DeviceStager(devices.open(torch.device("cpu")), arenas, Room(64 << 10, 2, 1 << 18))
    )
    yield made
    made.stager.close()


def content(requests):
    return [as_bytes(request.source.memory).tobytes() for request in requests]


def prints(requests):
    return [fingerprint(as_bytes(request.source.memory), 0) for request in requests]


def change(requests):
    for request in requests:
        request.source.memory.add_(1)


@pytest.mark.parametrize("urgency", list(Urgency))
def test_what_arrives_is_what_the_sources_were_at_the_call(scene, urgency):
    requests = scene.requests()
    wanted, expected = content(requests), prints(requests)
    sent = scene.stager.copy(requests, urgency)
    if urgency not in INSIDE:
        scene.stager.guard({"opt"})
    change(requests)
    scene.stager.finish(sent)
    assert sent.proven
    assert sent.expected == expected
    assert [scene.arrived(request) for request in requests] == wanted


def test_what_is_guarded_for_another_owner_still_arrives(scene):
    requests = scene.requests()
    wanted = content(requests)
    sent = scene.stager.copy(requests, scene.stager.behind)
    scene.stager.guard({"another"})
    scene.stager.finish(sent)
    assert sent.proven
    assert [scene.arrived(request) for request in requests] == wanted


def test_fingerprints_are_those_of_the_call(scene):
    requests = scene.requests()
    sources, expected = [request.source for request in requests], prints(requests)
    assert scene.stager.fingerprint_now(sources) == expected
    seen = scene.stager.fingerprint(sources)
    change(requests)
    scene.stager.finish(seen)
    assert seen.expected == expected
    assert scene.stager.fingerprint_now(sources) == prints(requests) != expected


def test_fingerprints_that_were_taken_already_prove_a_copy(scene):
    requests = scene.requests()
    seen = scene.stager.fingerprint([request.source for request in requests[:2]])
    sent = scene.stager.copy(requests, scene.stager.behind, seen=seen)
    scene.stager.guard(None)
    scene.stager.finish(sent)
    assert sent.proven
    assert sent.expected == prints(requests)


def test_the_end_is_told_once(scene):
    told, ended = [], threading.Event()

    def on_done():
        told.append(1)
        ended.set()

    sent = scene.stager.copy(scene.requests(), scene.stager.behind, on_done=on_done)
    scene.stager.guard(None)
    scene.stager.finish(sent)
    assert ended.wait(60)
    scene.stager.finish(sent)
    assert told == [1]


def test_nothing_arrives_after_a_cancellation(scene):
    requests = scene.requests()
    told = []
    sent = scene.stager.copy(requests, scene.stager.behind, on_done=lambda: told.append(1))
    scene.stager.cancel()
    assert sent.done.is_set()
    now = [scene.arrived(request) for request in requests]
    change(requests)
    assert [scene.arrived(request) for request in requests] == now
    if not sent.proven:  # it may have been faster
        assert told == []
        with pytest.raises(SaveAborted):
            scene.stager.finish(sent)
    again = scene.stager.copy(requests, Urgency.GRADIENT)
    scene.stager.finish(again)
    assert again.proven


@pytest.mark.parametrize("grad_dtype", [None, "fp16", "bf16"])
def test_gradients_are_placed_in_the_ring_and_sealed_by_their_bytes(scene, grad_dtype):
    gradients = [torch.randn(count) for count in (64, 3000, 4096)]
    positions = [seal_position(number) for number in (1, 2, 3)]
    requests = [
        scene.stager.place_gradient(Source(g, 0, g.nbytes, position), grad_dtype, scene.ring)
        for g, position in zip(gradients, positions, strict=True)
    ]
    sent = scene.stager.copy(requests, Urgency.GRADIENT)
    wanted = [g.numpy().copy() for g in gradients]
    for gradient in gradients:
        gradient.zero_()
    scene.stager.finish(sent)
    assert sent.proven
    for request, values, position, expected in zip(requests, wanted, positions, sent.expected, strict=True):
        data = scene.arenas[ArenaId.RING].view(request.offset, request.nbytes)
        encoding = None if request.form is None else request.form.encoding
        found = np.empty_like(values)
        decode(encoding, data, values.size, 0, found)
        assert np.allclose(found, values, rtol=2**-8, atol=2**-12)
        assert encoding is not None or (found == values).all()
        if grad_dtype is not None:
            assert expected == fingerprint(data, position)


def test_a_gradient_without_room_is_not_placed(scene):
    full = scene.ring.allocate(NBYTES)
    source = Source(torch.randn(100), 0, 400, 0)
    assert scene.stager.place_gradient(source, None, scene.ring) is None
    scene.ring.free(full)
    assert scene.stager.place_gradient(source, None, scene.ring) is not None


def test_a_number_is_known_or_would_be_waited_for(scene):
    number = torch.tensor(2.5)
    assert scene.stager.holds(number)
    assert scene.stager.value(number) in (2.5, None)


def test_what_is_flushed_arrives_before_what_is_sent_next(scene):
    first = scene.requests()
    sent = scene.stager.copy(first, scene.stager.behind)
    scene.stager.flush()
    second = [CopyRequest(scene.request().source, r.arena, r.offset, r.owner) for r in first]
    wanted = content(second)
    last = scene.stager.copy(second, Urgency.GRADIENT)
    scene.stager.finish(last)
    scene.stager.finish(sent)
    assert last.proven
    assert [scene.arrived(request) for request in second] == wanted
