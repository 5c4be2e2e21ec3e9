"""``grad_dtype`` in windows off a device: encoded on the way, proven as it arrives, measured, and told."""

from __future__ import annotations

from dataclasses import replace
from time import sleep

import numpy as np
import pytest
import torch

import gockpt
from gockpt.core.descriptors import ArenaId
from gockpt.kernels.gradient_encoding import decode
from gockpt.replay.tiled import SCRATCH_BYTES
from gockpt.saving import late_pieces, update_order
from gockpt.staging.gradient_ring import Ring
from gockpt.workers.save_job import Job

EVERY = 6
BOTH = pytest.mark.parametrize("grad_dtype", ["fp16", "bf16"])


def finish(run):
    """Close; compare all with the moments: what is not exact must be near, and say by how much it is off."""
    run.saver.close()
    saved = [handle.result(60) for handle in run.handles]
    assert gockpt.steps("ckpts") == [one.step for one in saved]
    for one in saved:
        assert gockpt.verify("ckpts", one.step).ok
        with gockpt.open("ckpts", one.step) as found:
            inexact = found.metadata.inexact
            assert found.metadata.exact is one.exact is (not inexact)
            assert found.metadata.deviation == one.deviation
            for name, expected in run.moments[one.step].items():
                got = found[name][...]
                if name not in inexact:
                    assert torch.equal(bits(got), bits(expected)), f"step {one.step}: {name}"
                    continue
                finite = torch.isfinite(expected)
                assert torch.equal(torch.isfinite(got), finite)
                off = (got[finite].double() - expected[finite].double()).abs().max().item()
                assert 0 < inexact[name]["max_abs"] <= off
                assert off < 100 * max(inexact[name]["max_abs"], 1e-7), name
            if one.deviation is not None:
                assert one.deviation.grad_dtype == run.options.grad_dtype
                assert one.deviation.of_movement is None or one.deviation.of_movement < 0.02
    return saved


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def settled(run):
    """Let a save that is to be made again find a tick, and return what was saved."""
    while run.handles[-1].progress().phase in ("closing", "captured"):
        sleep(0.001)
    handle = run.handles[-1]
    run.tick()
    run.saver.wait()
    return handle.result(60)


def replayed_late(saved):
    return [(s.step, s.window, s.attempts, set(s.late_parts)) for s in saved[1:]]


@BOTH
@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd", "momentum", "overwriting"])
@pytest.mark.parametrize("window", [2, 4])
def test_rounding_is_measured_and_told(devices, runs, kind, window, grad_dtype):
    run = runs.Run(kind, window=window, grad_dtype=grad_dtype).ticks(2 * EVERY)
    saved = finish(run)
    assert replayed_late(saved) == [(12, window, 1, {"odd"}), (18, window, 1, {"odd"})]
    assert not saved[1].exact
    assert not saved[2].exact
    with gockpt.open("ckpts", 18) as found:
        assert {"model/a", "model/b"} & set(found.metadata.inexact)
        assert "model/odd" not in found.metadata.inexact
    assert devices.opened().calls["encode"] > 0


@BOTH
def test_in_a_process_of_its_own(devices, runs, grad_dtype):
    run = runs.Run(worker="process", grad_dtype=grad_dtype).ticks(2 * EVERY)
    saved = finish(run)
    assert replayed_late(saved) == [(12, 4, 1, {"odd"}), (18, 4, 1, {"odd"})]
    assert not saved[1].exact


def big():
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.randn(300_000))
    return model, [torch.optim.SGD(model.parameters(), lr=0.1)]


def test_about_half_as_many_bytes_travel_and_the_ring_is_half_as_large(devices, runs):
    moved, rings = {}, {}
    for grad_dtype in (None, "fp16", "bf16"):
        with runs.elsewhere():
            run = runs.Run(make=big, update=only_a, device_memory=1 << 20, grad_dtype=grad_dtype)
            device = devices.opened()
            before = len(device.copied)
            run.ticks(EVERY)
            saved = (finish if grad_dtype else type(run).finish)(run)
            assert [(s.window, s.attempts, s.late_parts) for s in saved[1:]] == [(4, 1, {})]
            moved[grad_dtype] = sum(device.copied[before:])
            rings[grad_dtype] = saved[-1].host_memory
            assert device.peak <= 1 << 20
    gradients = moved[None] - 1_200_000  # beside the state
    for grad_dtype in ("fp16", "bf16"):
        assert moved[grad_dtype] - 1_200_000 < 0.54 * gradients
        assert rings[grad_dtype] < rings[None] - 0.8 * gradients / 2


def only_a(run):
    run.model.a.grad = torch.randn_like(run.model.a)
    run.optimizers[0].step()


@BOTH
def test_the_bound_of_host_memory_holds(devices, runs, grad_dtype):
    options = {"window": 5, "grad_dtype": grad_dtype, "layout": "directory"}  # gathers nothing to write
    with runs.elsewhere(), pytest.raises(gockpt.OptionsError, match="host_memory=900000"):
        runs.Run(**options, host_memory=900_000)
    with runs.elsewhere():
        most = finish(runs.Run(**options).ticks(EVERY))[-1].host_memory
    with runs.elsewhere():
        limit = most + 2 * SCRATCH_BYTES + 300_000  # what replay decodes into, and the probes
        saved = finish(runs.Run(**options, host_memory=limit).ticks(EVERY))[-1]
        assert (saved.window, saved.attempts, saved.exact) == (5, 1, False)
        assert saved.host_memory <= limit


def test_without_it_nothing_is_encoded(devices, runs):
    saved = runs.Run().ticks(2 * EVERY).finish()
    assert all(s.exact and s.deviation is None for s in saved)
    assert "encode" not in devices.opened().calls


@BOTH
def test_gradients_that_16_bits_can_hold_lose_nothing(devices, runs, grad_dtype):
    def update(run):
        for p in run.model.parameters():
            if p.requires_grad:
                p.grad = torch.randint(-8, 9, p.shape).to(p.dtype) / 16
        run.optimizers[0].step()

    run = runs.Run("adamw", update=update, grad_dtype=grad_dtype).ticks(2 * EVERY)
    saved = run.finish()
    assert replayed_late(saved) == [(12, 4, 1, {"odd"}), (18, 4, 1, {"odd"})]
    assert all(s.exact and s.deviation is None for s in saved)
    assert devices.opened().calls["encode"] > 0


# -- what is not there, or not as it was


@BOTH
@pytest.mark.parametrize("damage", ["lost", "doubled", "swapped", "bytes", "numbers", "of another piece"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_gradient_that_is_not_the_one_that_was_sent_is_caught(
    devices, runs, monkeypatch, kind, damage, grad_dtype
):
    """On its way from the stager to replay: whatever rounding would explain of it."""
    run = runs.Run(kind, grad_dtype=grad_dtype)
    give_back, spared = Ring.free, []
    real, held, first = Job.gradients, [], 1 + (kind == "sgd")  # the first one brings the probes' places

    def gradients(job, found):
        kept = list(found)
        mine = [n for n, g in enumerate(kept) if g.piece == 0 and g.number >= first]
        for n in mine[:1]:
            gradient = kept[n]
            view = job._arenas[ArenaId.RING].view(gradient.offset, gradient.nbytes)
            if damage == "lost":
                kept.pop(n)
                job._ring.free(gradient.offset)
            elif damage == "doubled":
                # From the same block, which is given back once: the ring may have no room for another.
                spared.append(gradient.offset)
                kept.insert(n, gradient)
            elif damage == "swapped":
                held.append(kept.pop(n))
                if len(held) == 2:
                    kept += reversed(held)
            elif damage == "bytes":
                view[len(view) // 2 :][:2] ^= 0x01
            elif damage == "numbers":
                row = (*gradient.scalars[:-1], gradient.scalars[-1] * (1 + 1e-6))
                kept[n] = replace(gradient, scalars=row)
            else:
                others = [m for m, g in enumerate(kept) if g.nbytes == gradient.nbytes and m != n]
                if others:
                    kept[n] = replace(gradient, offset=kept[others[0]].offset)
                    kept[others[0]] = replace(kept[others[0]], offset=gradient.offset)
                else:
                    view[:2] ^= 0x10
        real(job, kept)

    def free(ring, offset):
        if offset in spared:
            spared.remove(offset)
        else:
            give_back(ring, offset)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "gradients", gradients)
        patch.setattr(Ring, "free", free)
        run.ticks(EVERY)
        result = settled(run)
    assert (result.attempts, result.exact) == (2, True)
    assert any("did not match" in event for event in run.handles[-1].events)
    finish(run)


@BOTH
def test_messages_of_two_pieces_that_change_places_are_caught(devices, runs, monkeypatch, grad_dtype):
    """Seals, numbers and all; they are so alike that rounding would explain it."""

    def update(run):
        pattern = torch.randn(16).repeat(19_200)[:300_000]
        run.model.a.grad = pattern * (1 + 2**-12 * torch.rand(300_000))
        run.optimizers[0].step()

    run = runs.Run(make=big, update=update, grad_dtype=grad_dtype)
    real, changed = Job.gradients, []

    def gradients(job, found):
        kept = list(found)
        for at in [n for n, g in enumerate(kept) if g.piece == 0]:
            one = kept[at]
            alike = [n for n, g in enumerate(kept) if (g.nbytes, g.number) == (one.nbytes, one.number)]
            other = kept[alike[1]]
            # Where the probes stand is their pieces' own.
            kept[at] = replace(other, piece=one.piece, probes=one.probes)
            kept[alike[1]] = replace(one, piece=other.piece, probes=other.probes)
            changed.append(other.piece)
        real(job, kept)

    with monkeypatch.context() as patch:
        patch.setattr(Job, "gradients", gradients)
        run.ticks(EVERY)
        result = settled(run)
    assert changed
    assert (result.attempts, result.exact) == (2, True)
    finish(run)


@BOTH
@pytest.mark.parametrize("what", ["slot", "ring", "samples"])
def test_what_the_bus_gets_wrong_is_seen(devices, runs, monkeypatch, what, grad_dtype):
    """Between the device and the host's proof: that piece leaves again, or the save is made again."""
    run = runs.Run("sgd", grad_dtype=grad_dtype).ticks(3)
    device = devices.opened()
    run.let_arrive()
    real, hurt = device.copy, []
    ring = run.saver._engine._save.memory.arenas[ArenaId.RING]
    base = ring.data.ctypes.data
    behind = run.saver._engine._save.attempt._ring.nbytes

    def copy(stream, memory, place, target):
        at = target.ctypes.data - base
        there = 0 <= at < ring.nbytes
        of_samples = there and at >= behind
        if there and not hurt and target.nbytes > 64 and of_samples == (what == "samples"):
            hurt.append(target)
            if what == "slot":
                memory[place + 40] ^= 1  # after the device has looked
                real(stream, memory, place, target)
                return
            real(stream, memory, place, target)
            device.until(lambda: not device.unfinished())
            target[40] ^= 1
            return
        real(stream, memory, place, target)

    monkeypatch.setattr(device, "copy", copy)
    run.ticks(3)
    settled(run)
    assert hurt
    saved = finish(run)[1]
    late = "its gradient did not arrive as it was" in saved.late_parts.values()
    assert saved.attempts == 2 or (late and what != "samples")


def test_a_stream_that_waits_for_nothing_is_caught(devices, runs):
    """The slot is used again while it is being copied."""
    devices.settings = {"outer": 1e3}
    run = runs.Run(grad_dtype="bf16")
    device = devices.opened()
    device.deaf = {"training"}
    run.ticks(2)
    devices.gate.clear()
    run.ticks(2)
    devices.gate.set()
    run.ticks(2)
    settled(run)
    saved = finish(run)
    assert any(s.attempts > 1 or set(s.late_parts) - {"odd"} for s in saved)
    device.violations.clear()  # it was told to


@pytest.mark.parametrize("number", [0, 1, 5])
@pytest.mark.parametrize("name", ["encode", "prints", "copy"])
def test_a_device_that_refuses_costs_what_left_early(devices, runs, waits, name, number):
    run = runs.Run(grad_dtype="fp16")
    device = devices.opened()
    device.fail = {name: {device.calls.get(name, -1) + 1 + number}}
    run.ticks(6)
    run.tick()
    run.saver.wait()
    run.ticks(6)
    assert finish(run)[-1].step in (18, 19, 20)
    waits.clear()  # what the device has begun is awaited when it refuses, once


# -- Inf and NaN


def poison(grad, blocks):
    for block in blocks:
        grad[block * 1024 + 5 : block * 1024 + 8] = float("nan")
        grad[block * 1024 + 17] = float("inf")


def wide():
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.randn(64 * 1024 * 17))
    return model, [torch.optim.SGD(model.parameters(), lr=0.1)]


@BOTH
def test_inf_and_nan_stay_what_they_are(devices, runs, grad_dtype):
    """In a piece of 64 blocks there is room for one raw block."""

    def update(run):
        run.model.a.grad = torch.randn_like(run.model.a)
        poison(run.model.a.grad, [3])
        run.optimizers[0].step()

    run = runs.Run(make=wide, update=update, window=2, device_memory=1 << 22, grad_dtype=grad_dtype)
    saved = finish(run.ticks(EVERY))
    assert [(s.window, s.attempts, s.exact, s.late_parts) for s in saved[1:]] == [(2, 1, False, {})]
    assert np.isfinite(saved[-1].deviation.max_abs)


def test_what_found_no_raw_slot_is_never_replayed(devices, runs, monkeypatch):
    """Known in time, the piece leaves at the close; known too late, the save is made again."""
    asked = []
    real = update_order.incomplete

    def incomplete(*args):
        asked.append(real(*args))
        return asked[-1]

    monkeypatch.setattr(update_order, "incomplete", incomplete)

    def update(run):
        run.gradients()
        run.model.a.grad[100] = float("nan")
        run.optimizers[0].step()

    run = runs.Run("sgd", update=update, grad_dtype="fp16")
    for _ in range(EVERY):
        run.tick()
        run.let_arrive()
    settled(run)
    saved = finish(run)[1]
    assert any(asked)
    told = late_pieces.BROKEN in saved.late_parts.values()
    assert told or saved.attempts == 2


def test_what_is_found_too_late_to_leave_at_the_close_says_why(devices, runs):
    """No copy lost a race: nothing is copied at once because of it from then on."""

    def update(run):
        run.gradients()
        if run.step in (10, 11):
            run.model.a.grad[100] = float("nan")
        run.optimizers[0].step()

    run = runs.Run("sgd", update=update, grad_dtype="fp16").ticks(2)
    run.let_arrive()
    devices.gate.clear()
    run.ticks(4)
    devices.gate.set()
    assert settled(run).attempts == 2
    assert f"model/a can't be replayed: {late_pieces.BROKEN}" in run.handles[-1].events
    assert run.saver._engine._save.overtaken == frozenset()
    run.ticks(EVERY - 1)
    assert finish(run)[-1].attempts == 1


@BOTH
def test_updates_that_a_scaler_skips_cost_nothing(devices, runs, grad_dtype):
    """Their gradients are full of Inf, and no message has room for that: nobody wants them."""

    def update(run):
        run.gradients()
        optimizer = run.optimizers[0]
        skip = run.step % 3 == 1
        if skip:
            run.model.a.grad.fill_(float("inf"))
        optimizer.found_inf = torch.tensor(float(skip))
        optimizer.grad_scale = torch.tensor(1.0)
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale

    run = runs.Run("adamw", update=update, grad_dtype=grad_dtype).ticks(2 * EVERY)
    saved = finish(run)
    assert replayed_late(saved) == [(12, 4, 1, {"odd"}), (18, 4, 1, {"odd"})]
    assert not saved[-1].exact


# -- probes


@BOTH
def test_probes_stand_where_the_first_gradient_is_large_if_it_has_arrived(
    devices, runs, monkeypatch, grad_dtype
):
    spread, chosen = [], []
    real, seen = update_order.spread, update_order.choose
    monkeypatch.setattr(update_order, "spread", lambda count: spread.append(count) or real(count))
    monkeypatch.setattr(update_order, "choose", lambda *args: chosen.append(seen(*args)) or chosen[-1])
    run = runs.Run("sgd", make=rows, update=few_rows, grad_dtype=grad_dtype)
    run.ticks(2)
    devices.gate.clear()  # nothing arrives any more
    chosen.clear()
    run.ticks(4)
    assert spread
    assert not chosen
    devices.gate.set()
    run.handles[-1].result(60)
    spread.clear()
    run.patient = True
    run.ticks(EVERY)
    assert chosen
    assert not spread
    saved = finish(run)
    assert [s.attempts for s in saved] == [1, 1, 1]
    assert not saved[-1].exact


def rows():
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.randn(1000, 16))
    return model, [torch.optim.SGD(model.parameters(), lr=0.1)]


def few_rows(run):
    patient = getattr(run, "patient", False)
    grad = torch.randn(1000, 16)
    if patient:
        grad.zero_()[torch.randint(0, 1000, (60,))] = torch.randn(60, 16)
    run.model.a.grad = grad
    run.optimizers[0].step()
    if patient:
        run.let_arrive()


def one_row(run):
    grad = torch.zeros(1000, 16)
    if run.step not in getattr(run, "idle", ()):
        grad[105] = torch.randn(16)
    run.model.a.grad = grad
    run.optimizers[0].step()
    if getattr(run, "patient", False):
        run.let_arrive()


@BOTH
@pytest.mark.parametrize("wrong", [False, True])
def test_a_piece_whose_probes_saw_nothing_is_not_called_measured(
    devices, runs, monkeypatch, wrong, grad_dtype
):
    """Where no gradient arrives by the closing tick, they stand anywhere."""
    from gockpt.kernels import replay

    real = replay.run

    def run_wrong(kernel, flags, p, states, grads, scalars, *, tail):
        rows = [(*row[:-1], row[-1] * 1.5) for row in scalars] if wrong else scalars
        real(kernel, flags, p, states, grads, rows, tail=tail)

    run = runs.Run(make=rows, update=one_row, grad_dtype=grad_dtype)
    with monkeypatch.context() as patch:
        patch.setattr(replay, "run", run_wrong)
        run.ticks(2)
        devices.gate.clear()
        run.ticks(4)
        devices.gate.set()
        result = settled(run)
    assert (result.attempts, result.exact) == (2, True)
    assert any("no probe saw" in event for event in run.handles[-1].events)
    finish(run)


@BOTH
def test_a_gradient_of_zeros_places_no_probes(devices, runs, grad_dtype):
    """A row that does not move at first is followed from where it does."""
    run = runs.Run(make=rows, update=one_row, grad_dtype=grad_dtype)
    run.patient, run.idle = True, (8, 9)
    run.ticks(EVERY)
    (_, saved) = finish(run)
    assert (saved.attempts, saved.exact) == (1, False)


@BOTH
def test_a_gradient_of_a_skipped_update_places_no_probes(devices, runs, monkeypatch, grad_dtype):
    seen = []
    real = update_order.choose

    def choose(encoding, data, count):
        values = np.empty(count, np.float32)
        decode(encoding, data, count, 0, values)
        seen.append(bool(np.isfinite(values).all()))
        return real(encoding, data, count)

    monkeypatch.setattr(update_order, "choose", choose)

    def update(run):
        run.gradients()
        optimizer = run.optimizers[0]
        skip = run.step in (8, 9)
        if skip:
            run.model.a.grad[::2000] = float("inf")
            run.model.b.grad[::30] = float("inf")
        optimizer.found_inf = torch.tensor(float(skip))
        optimizer.grad_scale = torch.tensor(1.0)
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale
        if run.step > EVERY:
            run.let_arrive()

    run = runs.Run("adamw", update=update, grad_dtype=grad_dtype).ticks(EVERY)
    saved = finish(run)
    assert not saved[-1].exact
    assert seen
    assert all(seen)


# -- what must not hide in the rounding


@pytest.mark.parametrize("verify", ["full", "close"])
@pytest.mark.parametrize("when", ["before the update", "after the update", "before the closing tick"])
@pytest.mark.parametrize("arrives", [True, False])
def test_a_small_change_behind_the_optimizers_back_is_seen_by_its_bits(devices, runs, verify, when, arrives):
    """Also where that is found out only after the closing tick."""
    step = 11 if when == "before the closing tick" else 9

    def update(run):
        run.gradients()
        if run.step == step and when == "before the update":
            run.model.a.data.view(torch.int32)[7] ^= 1
        run.optimizers[0].step()
        if run.step == step and when != "before the update":
            run.model.a.data.view(torch.int32)[7] ^= 1

    run = runs.Run("sgd", update=update, grad_dtype="bf16", verify=verify).ticks(4)
    if not arrives:
        run.let_arrive()
        devices.gate.clear()
    run.ticks(2)
    devices.gate.set()
    settled(run)
    saved = finish(run)[1]
    if saved.attempts == 1:
        assert "a" in saved.late_parts
    with gockpt.open("ckpts", saved.step) as found:
        assert found["model/a"][7] == run.moments[saved.step]["model/a"][7]


@BOTH
def test_what_left_is_looked_at_whatever_verify_says(devices, runs, grad_dtype):
    """Otherwise nothing would be known that the closing tick can be compared with."""
    saved = finish(runs.Run("adamw", grad_dtype=grad_dtype, verify="close").ticks(2 * EVERY))
    assert replayed_late(saved) == [(12, 4, 1, {"odd"}), (18, 4, 1, {"odd"})]
    assert not saved[-1].exact


@pytest.mark.parametrize("how", ["closure", "hook"])
def test_what_runs_inside_the_step_can_not_hide_either(devices, runs, how):
    def update(run):
        run.gradients()

        def nudge(*_):
            run.model.a.data.view(torch.int32)[7] ^= 1

        if run.step == 10 and how == "hook":
            run.optimizers[0].register_step_pre_hook(nudge)
        run.optimizers[0].step(nudge) if run.step == 10 and how == "closure" else run.optimizers[0].step()

    run = runs.Run("sgd", update=update, grad_dtype="fp16").ticks(EVERY)
    saved = finish(run)[1]
    assert (saved.exact, saved.attempts) == (True, 1)
    assert all("inside the step" in saved.late_parts[name] for name in ("a", "b"))


@BOTH
def test_replay_that_is_broken_is_caught(devices, runs, monkeypatch, grad_dtype):
    from gockpt.kernels import replay

    run = runs.Run("adamw", grad_dtype=grad_dtype)
    real = replay.run

    def wrong(kernel, flags, p, states, grads, scalars, *, tail):
        real(kernel, flags, p, states, grads, [(*row[:-1], row[-1] * 1.1) for row in scalars], tail=tail)

    with monkeypatch.context() as patch:
        patch.setattr(replay, "run", wrong)
        run.ticks(EVERY)
        result = settled(run)
    assert (result.attempts, result.exact) == (2, True)
    finish(run)


def test_a_mixed_model_is_sampled_on_both_sides(devices, runs):
    devices.holds = lambda tensor: tensor.shape[:1] != (71,)  # b and its states stand on the host
    run = runs.Run("adam", grad_dtype="fp16").ticks(2 * EVERY)
    saved = finish(run)
    assert replayed_late(saved) == [(12, 4, 1, {"odd"}), (18, 4, 1, {"odd"})]
    with gockpt.open("ckpts", 18) as found:
        assert {"model/a", "model/b"} <= set(found.metadata.inexact)


def test_the_kernels_of_a_small_slot_get_small_pieces(devices, runs):
    """What leaves in one piece must fit into a slot."""
    run = runs.Run(make=wide, update=only_a, window=2, device_memory=1 << 16, grad_dtype="fp16")
    saved = finish(run.ticks(EVERY))
    assert [(s.window, s.attempts, s.exact, s.late_parts) for s in saved[1:]] == [(2, 1, False, {})]
    assert devices.opened().peak <= 1 << 16
