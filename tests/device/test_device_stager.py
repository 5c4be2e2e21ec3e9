"""The stager of a device, on a fake one: what arrives, in which order, who waits, and what goes wrong.

Each rule of ordering has a scene in which wrong bytes arrive, or an unfinished access is overtaken, or the
training stream waits too long, once the rule is broken.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.errors import SaveAborted, SaveError
from gockpt.kernels.fingerprint_numba import fingerprint
from gockpt.staging.arena import Arena
from gockpt.staging.copy_batches import cut_batches
from gockpt.staging.device_budget import Room
from gockpt.staging.device_stager import DeviceStager
from gockpt.staging.stager import CopyRequest, Source, Urgency

KB = 1024


class Scene:
    """A device, an arena, a stager, and tensors that are given places in turn."""

    def __init__(self, fakes, room=None, *, arena=1 << 20, made=None, **options):
        self.device = fakes.Device(**(made or {}))
        self.arena = Arena(arena)
        self.arena.data[:] = 9
        self.room = room or Room(4 * KB, 4, 0)
        sizes = {"thread": False, "copy_bytes": 4 * KB, "piece_bytes": 256 * KB}
        self.stager = DeviceStager(self.device, [self.arena], self.room, **{**sizes, **options})
        self.random = np.random.default_rng(0)
        self.end = 0
        self.held = []

    def tensor(self, nbytes, owner="opt", *, gap=0, held=True):
        content = self.random.integers(0, 256, nbytes, np.uint8)
        if held:
            self.held.append(content)
        self.end += gap
        request = CopyRequest(Source(content, 0, nbytes, 24), 0, self.end, owner)
        self.end += nbytes
        return request

    def tensors(self, count, nbytes, owner="opt"):
        return [self.tensor(nbytes, owner) for _ in range(count)]

    def arrived(self, request):
        return self.arena.view(request.offset, request.source.nbytes)

    def poll(self, seconds, step):
        """Let time go by, looking at what has landed every ``step`` seconds."""
        for _ in range(round(seconds / step)):
            self.device.advance(step)
            self.stager.poll()

    def update(self, requests, owner="opt"):
        """Run one optimizer step over some of them: guard, then overwrite."""
        self.stager.guard({owner})
        for request in requests:
            self.device.write(request.source.memory, 0)

    def end_well(self):
        """Finish; nothing may have been used wrongly, and all memory is given back."""
        self.stager.finish()
        assert self.device.violations == []
        assert self.device.peak <= self.room.nbytes
        self.stager.close()
        assert self.device.violations == []
        assert self.device.used == 0
        assert self.device.registered == []


def content_of(requests):
    return [s.source.memory.copy() for s in requests]


@pytest.fixture
def scene(fakes):
    return lambda *args, **options: Scene(fakes, *args, **options)


VARIANTS = pytest.mark.parametrize(
    "options",
    [{}, {"direct": True}, {"made": {"refuse": 0}}],
    ids=["staging", "direct", "detour"],
)


# -- what arrives


@VARIANTS
def test_what_stood_there_at_the_boundary_arrives(scene, options):
    at = scene(**options)
    requests = [*at.tensors(5, 3 * KB), at.tensor(40 * KB), at.tensor(100, gap=28)]
    before = content_of(requests)
    at.device.write(requests[0].source.memory, 1, seconds=5)  # the last update: still to run
    before[0][:] = 1
    sent = at.stager.copy(requests, Urgency.STATE)
    at.device.compute(1)
    at.update(requests)
    at.end_well()
    assert sent.proven
    for request, content in zip(requests, before, strict=True):
        assert np.array_equal(at.arrived(request), content)
    assert (at.arena.view(requests[-1].offset - 28, 28) == 9).all()
    assert (at.arena.data[at.end :] == 9).all()


@VARIANTS
@pytest.mark.parametrize("urgency", [Urgency.BUFFER, Urgency.GRADIENT])
def test_what_is_due_at_once_may_be_overwritten_at_once(scene, options, urgency):
    at = scene(**options)
    requests = at.tensors(20, 3 * KB)
    before = content_of(requests)
    sent = at.stager.copy(requests, urgency)
    for request in requests:
        at.device.write(request.source.memory, 0)  # no guard
    at.end_well()
    assert sent.proven
    assert all(np.array_equal(at.arrived(s), b) for s, b in zip(requests, before, strict=True))


@VARIANTS
def test_a_snapshot_as_large_as_the_state_needs_no_guard_and_no_wait(scene, options):
    at = scene(Room(4 * KB, 4, 80 * KB), **options)
    requests = at.tensors(20, 3 * KB)
    before = content_of(requests)
    sent = at.stager.copy(requests, Urgency.SNAPSHOT)
    for request in requests:
        at.device.write(request.source.memory, 0)
    at.device.drain()
    assert at.device.training.stalled == 0
    at.end_well()
    assert sent.proven
    assert all(np.array_equal(at.arrived(s), b) for s, b in zip(requests, before, strict=True))


def test_what_scratch_has_no_room_for_leaves_behind_the_step(scene):
    at = scene(Room(4 * KB, 2, 30 * KB))
    requests = at.tensors(20, 4 * KB)
    before = content_of(requests)
    sent = at.stager.copy(requests, Urgency.SNAPSHOT)
    at.device.compute(3)
    at.update(requests)
    at.device.drain()
    # 13 of 20 loads leave by two slots: 11 of them have landed when the last is packed.
    assert at.device.training.stalled == pytest.approx(11 * 4 * KB / 1e4 - 3, abs=0.1)
    at.end_well()
    assert sent.proven
    assert all(np.array_equal(at.arrived(s), b) for s, b in zip(requests, before, strict=True))


def test_scratch_is_used_again_once_it_is_drained_and_not_before(scene):
    at = scene(Room(4 * KB, 2, 16 * KB))
    rounds = []
    for _ in range(3):
        requests = at.tensors(4, 4 * KB)
        rounds.append((at.stager.copy(requests, Urgency.SNAPSHOT), requests, content_of(requests)))
        at.update(requests)
        at.device.advance(0.3)
        at.stager.poll()
    at.end_well()
    for sent, requests, before in rounds:
        assert sent.proven
        assert all(np.array_equal(at.arrived(s), b) for s, b in zip(requests, before, strict=True))


def test_a_drained_snapshot_makes_room_for_the_next(scene):
    at = scene(Room(4 * KB, 2, 16 * KB))
    for _ in range(4):
        requests = at.tensors(4, 4 * KB)
        sent = at.stager.copy(requests, Urgency.SNAPSHOT)
        for request in requests:
            at.device.write(request.source.memory, 0)  # no guard
        at.stager.finish(sent)
        assert sent.proven
    at.end_well()


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_nothing_sent_has_arrived(scene, sizes):
    at, told = scene(), threading.Event()
    at.device.compute(5)
    sent = at.stager.copy([at.tensor(n) for n in sizes], Urgency.STATE, on_done=told.set)
    assert sent.proven
    assert told.is_set()
    assert at.device.now == 0
    at.end_well()


def test_the_kernels_fingerprints_are_handed_on(scene):
    from gockpt.kernels.fingerprint_numba import fingerprint

    at = scene()
    requests = at.tensors(2, 5 * KB)
    sent = at.stager.copy(requests, Urgency.STATE)
    at.stager.finish(sent)
    assert sent.expected == [fingerprint(s.source.memory, 24) for s in requests]


# -- the proof


@VARIANTS
def test_a_change_between_boundary_and_pack_is_seen(scene, options):
    """As when averaged weights are swapped in: no hook sees that, and the bytes come back later."""
    at = scene(**options)
    requests = at.tensors(3, 20 * KB)
    sent = at.stager.copy(requests, Urgency.STATE)
    at.device.write(requests[1].source.memory, 0)  # unguarded
    at.stager.finish()
    assert sent.done.is_set()
    assert sent.lost == [requests[1]]
    assert not sent.proven


def test_a_byte_that_the_bus_got_wrong_is_seen(scene):
    at = scene()
    requests = at.tensors(3, KB)
    sent = at.stager.copy(requests, Urgency.GRADIENT)
    at.device.drain()
    at.arrived(requests[2])[500] ^= 1
    at.stager.finish()
    assert sent.lost == [requests[2]]


# -- who waits for what


def test_an_update_waits_for_packs_not_for_copies(scene):
    at = scene()
    requests = at.tensors(4, 4 * KB)
    at.stager.copy(requests, Urgency.STATE)
    at.update(requests)
    at.device.drain()
    assert at.device.training.stalled == pytest.approx(16 * KB / at.device.inner, rel=0.01)
    assert at.device.now > 16 * KB / at.device.outer
    at.end_well()


def test_an_update_of_others_does_not_wait(scene):
    at = scene()
    at.stager.copy(at.tensors(20, 4 * KB, "a"), Urgency.STATE)
    at.stager.guard({"b", "c"})
    at.device.drain()
    assert at.device.training.stalled == 0
    assert "pack" not in at.device.calls  # nor did anything leave for it
    at.end_well()


def test_what_leaves_later_is_not_waited_for(scene):
    at = scene()
    first, second = at.tensors(3, 4 * KB, "a"), at.tensors(10, 4 * KB, "b")
    at.stager.copy([*first, *second], Urgency.STATE)
    at.stager.poll()
    at.update(first, "a")
    at.device.drain()
    assert at.device.training.stalled == pytest.approx(12 * KB / at.device.inner, rel=0.01)
    at.stager.guard(None)
    at.end_well()


def test_what_an_update_needs_overtakes_what_waits(scene):
    at = scene(Room(4 * KB, 2, 0))
    first, second = at.tensors(30, 4 * KB, "a"), at.tensors(2, 4 * KB, "b")
    sent = at.stager.copy([*first, *second], Urgency.STATE)
    before = content_of(second)
    at.stager.poll()  # four loads leave: twice the ring
    at.update(second, "b")
    at.device.drain()
    # Of six loads, four have landed when the last is packed; without overtaking, it would be thirty of 32.
    assert at.device.training.stalled == pytest.approx(4 * 4 * KB / at.device.outer, rel=0.1)
    at.stager.guard(None)
    at.end_well()
    assert sent.proven
    assert all(np.array_equal(at.arrived(s), b) for s, b in zip(second, before, strict=True))


def expected_stall(room, loads, owner, seconds, device):
    """Work out the wait of an update of ``owner`` that comes ``seconds`` after the boundary."""

    def run(order, jumped):
        packed = landed = last = 0.0
        ends = []
        for number, load in enumerate(order):
            free = ends[number - room.slots] if number >= room.slots else 0.0
            begin = seconds if number >= jumped else 0.0
            packed = max(packed, free, begin) + load.nbytes / device.inner
            landed = max(landed, packed) + load.nbytes / device.outer
            ends.append(landed)
            if owner in load.owners:
                last = packed
        return last, ends

    _, ends = run(loads, len(loads))
    queued = sum(end <= seconds for end in ends) + 2 * room.slots
    order = loads[:queued] + [load for load in loads[queued:] if owner in load.owners]
    return max(0.0, run(order, queued)[0] - seconds)


@given(
    st.lists(st.tuples(st.integers(1, 12 * KB), st.sampled_from("ab")), min_size=1, max_size=25),
    st.integers(1, 5),
    st.integers(0, 120).map(lambda tenths: tenths / 10),
    st.sampled_from("ab"),
)
def test_the_wait_is_what_the_bandwidths_say(fakes, rows, slots, seconds, owner):
    at = Scene(fakes, Room(4 * KB, slots, 0))
    requests = [at.tensor(-(-n // 64) * 64, whose) for n, whose in rows]
    loads = cut_batches(requests, slot_bytes=4 * KB, copy_bytes=4 * KB, piece_bytes=256 * KB)
    at.stager.copy(requests, Urgency.STATE)
    at.stager.poll()
    at.device.compute(seconds)
    if seconds:
        at.poll(seconds, seconds / 400)
    at.update([s for s in requests if s.owner == owner], owner)
    at.device.drain()
    expected = expected_stall(at.room, loads, owner, seconds, at.device)
    # A load is seen to have landed up to a 400th late, so one more or less may have been queued by then.
    one_load = 4 * KB / at.device.outer
    assert at.device.training.stalled == pytest.approx(expected, abs=one_load + 0.1)
    through = max((i + 1 for i, load in enumerate(loads) if owner in load.owners), default=0)
    most = at.room.stall(4 * KB * through, bytes_per_second=1e4, hidden_seconds=seconds)
    assert at.device.training.stalled <= most + 0.1 + sum(load.nbytes for load in loads) / at.device.inner
    at.stager.guard(None)
    at.end_well()


def test_the_training_thread_never_waits_on_the_host(scene):
    """Not with a full ring, and not for gradients that are larger than it."""
    at = scene(made={"fail": {"synchronize": set(range(1000))}})
    at.stager.copy(at.tensors(50, 4 * KB), Urgency.STATE)
    at.stager.guard(None)
    at.stager.copy(at.tensors(20, 4 * KB), Urgency.GRADIENT)
    assert at.device.now == 0
    assert "synchronize" not in at.device.calls


# -- what goes first


def test_gradients_leave_before_state_that_waits(scene):
    at, order = scene(Room(4 * KB, 2, 0)), []
    at.stager.copy(at.tensors(20, 4 * KB), Urgency.STATE, on_done=lambda: order.append("state"))
    at.stager.poll()
    before = len(at.device.copied) + 3
    gradients = at.tensors(3, 4 * KB)
    sent = at.stager.copy(gradients, Urgency.GRADIENT, on_done=lambda: order.append("gradient"))
    assert len(at.device.copied) == before  # they are queued behind no more than what left already
    assert before == 3 + 2 * at.room.slots
    at.stager.finish(sent)
    assert order == ["gradient"]
    at.end_well()
    assert order == ["gradient", "state"]


def test_a_snapshot_drains_behind_the_state_that_waits(scene):
    at, order = scene(Room(4 * KB, 2, 40 * KB)), []
    at.stager.copy(at.tensors(9, 4 * KB), Urgency.SNAPSHOT, on_done=lambda: order.append("snapshot"))
    at.stager.copy(at.tensors(9, 4 * KB), Urgency.STATE, on_done=lambda: order.append("state"))
    at.end_well()
    assert order == ["state", "snapshot"]


def test_what_an_update_may_wait_for_leaves_before_what_is_in_scratch(scene):
    at = scene(Room(4 * KB, 2, 16 * KB))
    at.stager.copy(at.tensors(8, 4 * KB), Urgency.SNAPSHOT)
    assert at.device.calls["pack"] + 1 == 4
    at.stager.poll()  # twice the ring
    assert at.device.calls["pack"] + 1 == 8
    at.end_well()

    at = scene(Room(4 * KB, 2, 40 * KB))
    at.stager.copy(at.tensors(9, 4 * KB), Urgency.SNAPSHOT)
    at.stager.copy(at.tensors(9, 4 * KB), Urgency.STATE)
    at.stager.poll()
    assert at.device.calls["pack"] + 1 == 9 + 4
    at.end_well()


def test_copies_and_registered_pieces_stay_small(scene):
    at = scene(Room(64 * KB, 2, 0), copy_bytes=10 * KB)
    at.stager.copy([at.tensor(500 * KB), at.tensor(100 * KB)], Urgency.STATE)
    at.end_well()
    assert max(at.device.copied) <= 10 * KB
    assert sum(at.device.copied) == 600 * KB
    assert max(at.device.pieces) <= 256 * KB
    assert sum(at.device.pieces) == 1 << 20


def test_a_ring_in_use_is_not_queued_up_without_end(scene):
    at = scene(Room(4 * KB, 3, 0))
    at.stager.copy(at.tensors(40, 4 * KB), Urgency.STATE)
    for _ in range(10):
        at.stager.poll()
    assert at.device.calls["pack"] + 1 == 6  # twice the ring, until the host sees one land
    at.end_well()


# -- what is held


@VARIANTS
def test_sources_live_until_they_have_left_and_no_longer(scene, options):
    at = scene(**options)
    requests = [at.tensor(4 * KB, held=False) for _ in range(12)]
    alive = [weakref.ref(s.source.memory) for s in requests]
    before = content_of(requests)
    places = [at.arrived(s) for s in requests]
    sent = at.stager.copy(requests, Urgency.STATE)
    del requests
    at.device.advance(100)
    at.stager.finish(sent)
    assert sent.proven
    assert all(np.array_equal(a, b) for a, b in zip(places, before, strict=True))
    gc.collect()
    assert not any(ref() is not None for ref in alive)
    at.end_well()


# -- each rule, broken


def run_through(at):
    """Send, train and finish so that every wait matters; return whether all went well."""
    for seconds in (0.1, 3):
        requests = at.tensors(12, 4 * KB)
        content = at.random.integers(0, 256, 4 * KB, np.uint8)
        for request in requests:
            at.device.write(request.source.memory, content, seconds=0.01)
        sent = at.stager.copy(requests, Urgency.STATE)
        at.device.compute(seconds)
        at.stager.guard({"opt"})
        for request in requests:
            at.device.write(request.source.memory, 0, seconds=0.01)
        gradients = at.tensors(12, 4 * KB)
        also = at.stager.copy(gradients, Urgency.GRADIENT)
        for request in gradients:
            at.device.write(request.source.memory, 0)
        at.stager.finish()
        right = all(np.array_equal(at.arrived(s), content) for s in requests)
        if not (sent.proven and also.proven and right) or at.device.violations:
            return False
    return True


@pytest.mark.parametrize("stream", ["training", "side 1", "side 2"], ids=["update", "pack", "copy"])
def test_a_stream_that_does_not_wait_is_seen(scene, stream):
    assert run_through(scene())
    at = scene()
    at.device.deaf.add(stream)
    assert not run_through(at)


# -- what goes wrong


CALLS = ("pack", "copy", "prints", "record", "wait", "allocate", "query", "synchronize")


@VARIANTS
@given(
    st.sampled_from(CALLS),
    st.integers(0, 40),
    st.sampled_from([Urgency.STATE, Urgency.SNAPSHOT, Urgency.GRADIENT]),
)
def test_whatever_call_fails_everything_ends_and_the_next_save_goes_well(
    fakes, options, name, number, urgency
):
    made = {**options.get("made", {}), "fail": {name: {number}}}
    at = Scene(fakes, Room(4 * KB, 3, 12 * KB), **{**options, "made": made})
    failed = False
    try:
        requests = at.tensors(10, 4 * KB)
        sent = at.stager.copy(requests, urgency)
        at.poll(1, 0.1)
        at.stager.guard({"opt"})
        for request in requests:
            at.device.write(request.source.memory, 0)
        at.stager.finish(sent)
    except SaveError as error:
        assert f"{name} refused" in str(error)  # noqa: PT017 - it may also not fail at all
        failed = True
    assert at.stager.idle
    assert failed == (at.device.calls.get(name, -1) >= number)
    at.device.fail = {}
    at.stager.cancel()
    at.device.drain()
    again = at.tensors(10, 4 * KB)
    before = content_of(again)
    sent = at.stager.copy(again, urgency)
    at.update(again)
    at.end_well()
    assert sent.proven
    assert all(np.array_equal(at.arrived(s), b) for s, b in zip(again, before, strict=True))


def test_an_error_in_the_background_is_raised_by_the_next_call_once(scene):
    at, told = scene(made={"fail": {"copy": {2}}}), []
    sent = at.stager.copy(at.tensors(6, 4 * KB), Urgency.STATE, on_done=lambda: told.append(sent.error))
    at.stager.poll()
    assert sent.done.is_set()
    assert not sent.proven
    (error,) = told
    with pytest.raises(SaveError, match=r"the fake device refused .*copy refused.*training is not") as caught:
        at.stager.guard({"opt"})
    assert caught.value is error
    at.stager.guard({"opt"})
    at.end_well()


def test_all_have_ended_before_anyone_is_told(scene, caplog):
    """Who is told may wait for others; and if telling one fails, the others are told all the same."""
    s = scene()
    seen = []

    def told():
        seen.append(second.done.is_set())
        msg = "a defect"
        raise RuntimeError(msg)

    first = s.stager.copy(s.tensors(2, KB), Urgency.STATE, on_done=told)
    second = s.stager.copy(s.tensors(2, KB), Urgency.STATE, on_done=lambda: seen.append("second"))
    s.device.fail = {"synchronize": {s.device.calls.get("synchronize", -1) + 1}}
    with pytest.raises(SaveError, match="synchronize refused"):
        s.stager.finish(first)
    assert seen == [True, "second"]
    assert "what follows a refused copy failed" in caplog.text
    assert isinstance(second.error, SaveError)


def test_nothing_new_leaves_before_what_failed_was_awaited(scene, monkeypatch):
    """A load that failed half-way has a slot and no event: the next one in it would not wait for its copy."""
    s = scene(Room(4 * KB, 1, 0))
    s.stager.copy(s.tensors(2, KB), Urgency.STATE)
    real, refused = s.stager._fail, []

    def send():
        with pytest.raises(SaveError):
            s.stager.copy(s.tensors(1, KB), Urgency.GRADIENT)
        refused.append("refused")

    def fail(error):
        if not refused:
            refused.append("asked")
            thread = threading.Thread(target=send)
            thread.start()
            thread.join()
        real(error)

    monkeypatch.setattr(s.stager, "_fail", fail)
    s.device.fail = {"record": {s.device.calls["record"] + 2}}
    s.stager.poll()
    assert refused == ["asked", "refused"]
    s.device.fail = {}
    again = s.tensor(KB)
    with contextlib.suppress(SaveError):  # what was refused is told once
        s.stager.copy([], Urgency.STATE)
    s.stager.finish(s.stager.copy([again], Urgency.STATE))
    assert s.arrived(again).tobytes() == again.source.memory.tobytes()


def test_memory_of_a_device_that_does_not_answer_is_left_alone(scene, caplog):
    at = scene()
    sent = at.stager.copy(at.tensors(6, 4 * KB), Urgency.STATE)
    at.stager.poll()
    at.device.fail = {"synchronize": set(range(1000)), "record": set(range(1000)), "query": set(range(1000))}
    alive = weakref.ref(at.arena.data)
    at.stager.poll()
    assert isinstance(sent.error, SaveError)
    at.stager.close()
    assert at.device.registered
    assert at.device.used
    at.device.fail = {}
    del at.stager, at.arena, sent
    assert "the fake device does not answer" in caplog.text
    caplog.clear()  # its tracebacks hold the stager
    gc.collect()
    assert alive() is not None  # mapped and registered: the device may still write there


@VARIANTS
@given(st.integers(0, 30), st.sampled_from([Urgency.STATE, Urgency.SNAPSHOT, Urgency.GRADIENT]))
def test_after_a_cancellation_nothing_writes_into_the_arena(fakes, options, tenths, urgency):
    at = Scene(fakes, Room(4 * KB, 3, 12 * KB), **options)
    sent = at.stager.copy([at.tensor(4 * KB, held=False) for _ in range(10)], urgency)
    if tenths:
        at.poll(tenths / 10, 0.1)
    ended = sent.done.is_set()
    at.stager.cancel()
    at.arena.data[:] = 5
    at.device.drain()
    assert (at.arena.data == 5).all()
    assert sent.done.is_set()
    if not ended:
        assert isinstance(sent.error, SaveAborted)
        assert not sent.proven
    assert at.stager.idle
    at.end_well()


@pytest.mark.parametrize("urgency", [Urgency.STATE, Urgency.SNAPSHOT])
def test_what_was_about_to_leave_at_a_cancellation_does_not(scene, urgency):
    """Between taking a load out and queuing it, another thread may have given everything up."""
    at = scene(Room(4 * KB, 2, 4 * KB))
    at.stager.copy(at.tensors(1, 4 * KB), urgency)
    (flight,), at.stager._waiting = at.stager._waiting, []
    at.stager.cancel()
    packs = at.device.calls.get("pack")
    at.stager._issue(flight, at.stager._pipeline.beside)
    at.arena.data[:] = 5
    at.end_well()
    assert at.device.calls.get("pack") == packs
    assert (at.arena.data == 5).all()


def test_a_closed_stager_is_closed(scene):
    at = scene()
    at.stager.close()
    at.stager.close()
    with pytest.raises(SaveError, match="copying from the fake device has ended"):
        at.stager.copy([], Urgency.STATE)


def test_inside_a_graph_nothing_is_queued(scene):
    at = scene()
    requests = at.tensors(3, KB)
    sent = at.stager.copy(requests, Urgency.STATE)
    before = dict(at.device.calls)
    at.device.graph = True
    at.stager.guard({"opt"})
    with pytest.raises(SaveError, match="a graph is being captured"):
        at.stager.copy(requests, Urgency.GRADIENT)
    assert at.device.calls == before
    assert at.stager.graphed
    at.device.graph = False
    at.end_well()
    assert sent.proven


# -- the detour


def test_the_detour_is_said_and_leaves_nothing_registered(scene):
    at = scene(made={"refuse": 512 * KB}, direct=True)
    assert (
        "a detour through pinned memory: 1048576 bytes of host memory could not be registered"
        in at.stager.variant
    )
    assert "no memory may be locked" in at.stager.variant
    assert at.device.registered == []
    at.stager.copy(at.tensors(20, 4 * KB), Urgency.STATE)
    at.end_well()
    assert sum(block.nbytes for block in at.device.pinned_memory) == at.room.ring_bytes


def test_the_variants_have_names(scene):
    assert scene().stager.variant == "staging and the copy engine"
    assert scene(direct=True).stager.variant == "kernels that store into registered memory"


def test_stages_are_seen_in_profiles(scene):
    at = scene()
    at.stager.copy(at.tensors(2, KB), Urgency.STATE)
    at.stager.guard(None)
    at.end_well()
    assert set(at.device.ranges) == {
        *("gockpt boundary", "gockpt guard", "gockpt pack", "gockpt copy", "gockpt arrival")
    }


# -- the thread


@VARIANTS
def test_a_thread_receives_what_lands(scene, options):
    at, told = scene(**options, thread=True), threading.Event()
    requests = at.tensors(30, 4 * KB)
    before = content_of(requests)
    sent = at.stager.copy(requests, Urgency.STATE, on_done=told.set)
    at.update(requests)
    assert told.wait(30)
    assert sent.proven
    assert all(np.array_equal(at.arrived(s), b) for s, b in zip(requests, before, strict=True))
    thread = at.stager._thread
    at.end_well()
    assert not thread.is_alive()


@VARIANTS
@given(st.integers(0, 60))
def test_a_thread_and_a_cancellation_get_along(fakes, options, count):
    at = Scene(fakes, **options, thread=True)
    for _ in range(3):
        sent = at.stager.copy(at.tensors(count, 4 * KB), Urgency.STATE)
        at.stager.cancel()
        assert sent.done.is_set()
        at.arena.data[:] = 5
        at.device.drain()
        assert (at.arena.data == 5).all()
    at.end_well()


@pytest.mark.parametrize("moment", ["before", "meanwhile"])
def test_a_result_that_is_dropped_while_it_is_judged(scene, moment):
    """A cancellation on another thread drops the requests at any moment."""
    at = scene()
    sent = at.stager.copy(at.tensors(3, KB), Urgency.STATE)
    values = sent.prints.values

    def drop():
        found = values()
        sent.end()
        return found

    if moment == "before":
        sent.end()
    else:
        sent.prints = SimpleNamespace(values=drop)
    sent.judge()
    assert sent.requests == ()
    at.stager.cancel()


def test_a_thread_ends_with_its_owner(scene, monkeypatch):
    monkeypatch.setattr("gockpt.staging.device_queue.IDLE", 0.01)
    at = scene(thread=True)
    at.stager.finish(at.stager.copy(at.tensors(3, KB), Urgency.STATE))
    thread = at.stager._thread
    del at.stager
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


# -- all of it


urgencies = st.sampled_from(list(Urgency))


@st.composite
def runs(draw):
    """Draw a device, a room, and some steps of training with what each of them sends."""
    steps = draw(
        st.lists(
            st.tuples(
                st.lists(st.tuples(urgencies, st.integers(1, 12), st.integers(0, 5)), max_size=3),
                st.floats(0, 2),
                st.integers(0, 4),
                st.permutations("abc"),
            ),
            min_size=1,
            max_size=4,
        )
    )
    return {
        "room": Room(64 * draw(st.integers(1, 64)), draw(st.integers(1, 4)), 64 * draw(st.integers(0, 200))),
        "made": {
            "inner": draw(st.sampled_from([1e4, 1e6, 1e8])),
            "outer": draw(st.sampled_from([1e3, 1e4, 1e6])),
            "glance": draw(st.sampled_from([1e5, 1e9])),
            "refuse": draw(st.sampled_from([None, None, 0])),
        },
        "direct": draw(st.booleans()),
        "copy_bytes": draw(st.integers(16, 5000)),
        "piece_bytes": 64 * draw(st.integers(8, 300)),
        "steps": steps,
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


@given(runs())
def test_training_and_the_stager_side_by_side(fakes, run):
    """Whatever is sent, wherever time goes: what arrives is the boundary, within the bound, and all ends."""
    steps, seed = run.pop("steps"), run.pop("seed")
    at = Scene(fakes, **run)
    at.random = random = np.random.default_rng(seed)
    sent = []
    live = {owner: [] for owner in "abc"}
    for results, seconds, polls, order in steps:
        for urgency, count, size in results:
            requests = [
                at.tensor(
                    16 * int(random.integers(0, 2 + 60 * size)),
                    "abc"[int(random.integers(0, 3))],
                    gap=16 * int(random.integers(0, 2)),
                )
                for _ in range(count)
            ]
            for request in requests:  # work that is still to run at the boundary
                at.device.write(request.source.memory, request.source.memory.copy(), 1e-4)
                live[request.owner].append(request)
            before = content_of(requests)
            sent.append((at.stager.copy(requests, urgency), requests, before))
            if urgency in (Urgency.BUFFER, Urgency.GRADIENT):
                for request in requests:
                    at.device.write(request.source.memory, 0, 1e-4)
        at.device.compute(seconds)
        for _ in range(polls):
            at.device.advance(seconds / 5)
            at.stager.poll()
        for owner in order:
            at.stager.guard({owner})
            for request in live[owner]:
                at.device.write(request.source.memory, 1, 1e-4)
    at.device.drain()
    at.end_well()
    for result, requests, before in sent:
        assert result.proven
        for request, content in zip(requests, before, strict=True):
            assert np.array_equal(at.arrived(request), content)
    inside = np.zeros(at.arena.nbytes, bool)
    for _, requests, _ in sent:
        for request in requests:
            inside[request.offset : request.offset + request.source.nbytes] = True
    assert (at.arena.data[~inside] == 9).all()


# -- looks, and a second arena


@VARIANTS
def test_a_look_waits_for_nothing_and_says_what_stood_there(scene, options):
    at = scene(**options)
    request = at.tensor(3 * KB)
    at.device.compute(5)
    at.device.write(request.source.memory, 1)
    seen = at.stager.fingerprint([request.source])
    at.device.write(request.source.memory, 2)
    assert at.device.now == 0.0
    assert not seen.done.is_set()
    at.stager.finish(seen)
    ones = np.full(3 * KB, 1, np.uint8)
    assert seen.expected == [fingerprint(ones, 24)]
    assert (at.arena.data == 9).all()
    at.end_well()


def test_a_look_is_refused_inside_a_graph_and_told_when_it_fails(scene):
    at = scene(made={"fail": {"prints": {0}}})
    request = at.tensor(KB)
    with pytest.raises(SaveError, match="prints refused"):
        at.stager.fingerprint([request.source])
    at.device.graph = True
    with pytest.raises(SaveError, match="a graph is being captured"):
        at.stager.fingerprint([request.source])
    at.device.graph = False
    at.end_well()


def test_a_second_arena_can_come_and_go(scene):
    at = scene()
    other = Arena(1 << 16)
    assert at.stager.admit(other) is None
    request = at.tensor(KB)
    sent = at.stager.copy([CopyRequest(request.source, 1, 64, "opt")], Urgency.GRADIENT)
    at.stager.finish(sent)
    assert sent.proven
    assert np.array_equal(other.view(64, KB), request.source.memory)
    at.stager.dismiss()
    assert len(at.device.registered) == 4  # the first arena's pieces
    at.end_well()
    assert at.stager.admit(other) == "copying from the fake device has ended"


def test_a_second_arena_that_can_not_be_registered_is_told_why(scene):
    at = scene(made={"refuse": 1 << 20})
    assert "could not be registered (no memory may be locked)" in at.stager.admit(Arena(1 << 20))
    assert at.stager.variant == "staging and the copy engine"
    at.end_well()


def test_what_is_hastened_arrives_before_what_is_sent_later(scene):
    """Both go to the same place; without it, what waits in scratch memory would land last."""
    at = scene(room=Room(4 * KB, 4, 40 * KB))
    first = at.tensor(40 * KB)
    second = CopyRequest(at.tensor(40 * KB).source, 0, first.offset, "opt")
    at.stager.copy([first], Urgency.SNAPSHOT)
    at.stager.flush()
    at.stager.copy([second], Urgency.STATE)
    at.stager.guard(None)
    at.end_well()
    assert np.array_equal(at.arrived(first), second.source.memory)
