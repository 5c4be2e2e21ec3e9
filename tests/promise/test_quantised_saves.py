"""``grad_dtype``: a save that is not exact says so, and by how much; all that could be exact still is."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

import gockpt
from gockpt.core.descriptors import ArenaId
from gockpt.kernels import replay
from gockpt.replay import tiled
from gockpt.saving import gradient_capture
from gockpt.workers.save_job import Job

KINDS = {
    "adamw": (torch.optim.AdamW, {}),
    "adamw-fused": (torch.optim.AdamW, {"fused": True}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.01}),
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}),
}


def build_with(harness, name, lr=0.01):
    kind, options = KINDS[name]

    def build():
        model = harness.Tensors({"a": torch.randn(6000), "b": torch.randn(40, 41), "c": torch.randn(7)})
        return model, kind(model.parameters(), lr=lr, **options)

    return build


def update(model, optimizer, step):
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


def array(tensor):
    return tensor.detach().to(torch.float64).numpy().reshape(-1)


def check(loop, saved):
    """Compare what was published with the deep copy, and what was measured with the truth."""
    moment = loop.moments[saved.step]
    report = gockpt.verify(loop.path, saved.step)
    assert report.ok, report.problems
    with gockpt.open(loop.path, saved.step) as found:
        metadata = found.metadata
        assert metadata.exact is saved.exact
        assert metadata.deviation == saved.deviation
        assert metadata.attributes["gockpt"]["exact"] is saved.exact
        assert (saved.deviation is None) is saved.exact is (not metadata.inexact)
        worst = 0.0
        for name, expected in moment.arrays.items():
            got = found[name][...]
            if name not in metadata.inexact:
                assert got.numpy().tobytes() == expected.numpy().tobytes(), name
                continue
            said = metadata.inexact[name]
            live, there = array(expected), array(got)
            finite = np.isfinite(live)
            assert (np.isfinite(there) == finite).all()
            difference = np.where(finite, np.abs(np.where(finite, there, 0) - np.where(finite, live, 0)), 0)
            assert difference.max() > 0
            assert said["max_abs"] <= difference.max()
            assert 0 < said["sampled"] <= said["elements"] <= live.size
            true = np.linalg.norm(difference) / np.linalg.norm(live[finite])
            if said["sampled"] >= 64:
                assert true / 5 < said["of_values"] < true * 5
            worst = max(worst, said["max_abs"])
        if saved.deviation is not None:
            assert saved.deviation.max_abs == worst
            assert saved.deviation.tensors == len(metadata.inexact)
            assert saved.deviation.grad_dtype == loop.options.grad_dtype
            assert saved.deviation.of_movement is None or saved.deviation.of_movement < 0.02
    return metadata


def finish(loop):
    gockpt.wait()
    saved = [handle.result(60) for handle in loop.handles]
    return saved, [check(loop, one) for one in saved]


@pytest.mark.parametrize("grad_dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("window", [2, 5, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_measured_and_told(harness, kind, window, grad_dtype):
    with harness.closing():
        loop = harness.Loop(
            build_with(harness, kind), update, every=window, window=window, grad_dtype=grad_dtype
        )
        saved, found = finish(loop.run(3 * window))
    assert [(s.step, s.window, s.attempts) for s in saved] == [(n * window, window, 1) for n in (1, 2, 3)]
    assert saved[1].late_parts == saved[2].late_parts == {}
    assert not saved[1].exact
    assert "model/a" in found[1].inexact
    states = [name for name in found[1].inexact if name.startswith("optimizer/a/")]
    assert len(states) == {"sgd": 0, "momentum": 1, "nesterov": 1, "amsgrad": 3}.get(kind, 2)
    assert "optimizer/a/step" not in found[1].inexact


@pytest.mark.parametrize("grad_dtype", ["fp16", "bf16"])
def test_in_a_worker_process_as_well(harness, grad_dtype):
    with harness.closing():
        loop = harness.Loop(
            build_with(harness, "adamw"), update, every=4, window=4, grad_dtype=grad_dtype, worker="process"
        )
        saved, found = finish(loop.run(8))
    assert [(s.step, s.attempts, s.exact) for s in saved] == [(4, 1, False), (8, 1, False)]
    assert "optimizer/a/exp_avg_sq" in found[1].inexact


@pytest.mark.parametrize("grad_dtype", ["fp16", "bf16"])
def test_what_rounding_did_not_touch_is_exact(harness, grad_dtype):
    """A window of one step replays nothing; gradients that 16 bits can hold lose nothing."""

    def round_numbers(model, optimizer, step):
        for p in model.parameters():
            p.grad = torch.randint(-8, 9, p.shape).to(torch.float32) / 16
        optimizer.step()

    with harness.closing():
        loop = harness.Loop(build_with(harness, "adamw"), update, every=2, window=1, grad_dtype=grad_dtype)
        saved = loop.run(4).finish()
        assert all(s.exact and s.deviation is None for s in saved)
        loop = harness.Loop(
            build_with(harness, "adamw"), round_numbers, every=4, window=4, grad_dtype=grad_dtype
        )
        with harness.counting() as replayed:
            saved = loop.run(8).finish()
        assert replayed["updates"] > 0
        assert all(s.exact and s.deviation is None and s.attempts == 1 for s in saved)


def test_only_what_rounding_touched_is_not_exact(harness):
    """One parameter has no gradients while the window is open: it is proven by its bits, as ever."""

    def one_of_two(model, optimizer, step):
        model.a.grad = torch.randn_like(model.a)
        model.b.grad = torch.randn_like(model.b) if step < 3 else None
        model.c.grad = torch.ones(7)
        optimizer.step()

    with harness.closing():
        loop = harness.Loop(build_with(harness, "adamw"), one_of_two, every=8, window=4, grad_dtype="fp16")
        (saved,), (found,) = finish(loop.run(8))
    assert not saved.exact
    assert {name.split("/")[1] for name in found.inexact} == {"a"}


@pytest.mark.parametrize("grad_dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_inf_and_nan_stay_what_they_are(harness, kind, grad_dtype):
    def poisoned(model, optimizer, step):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        model.a.grad[1100:1110] = float("nan")
        model.a.grad[17] = float("inf")
        optimizer.step()

    with harness.closing():
        loop = harness.Loop(build_with(harness, kind), poisoned, every=4, window=4, grad_dtype=grad_dtype)
        saved, _ = finish(loop.run(8))
    assert [(s.step, s.attempts, s.exact) for s in saved] == [(4, 1, False), (8, 1, False)]
    assert np.isfinite(saved[1].deviation.max_abs)


def test_gradients_that_are_all_broken_wait_for_room_or_leave_late(harness, monkeypatch):
    """Nothing is gained where every block is raw; the ring has room for what is usual."""
    monkeypatch.setattr(gradient_capture, "RING_PATIENCE", 0.0)

    def broken(model, optimizer, step):
        for p in model.parameters():
            p.grad = torch.full_like(p, float("nan"))
        optimizer.step()

    with harness.closing():
        loop = harness.Loop(build_with(harness, "nesterov"), broken, every=4, window=4, grad_dtype="fp16")
        saved = loop.run(8)
        gockpt.wait()
        saved = [handle.result(60) for handle in loop.handles]
        assert all(s.exact for s in saved)
        for one in saved:
            loop.check(one.step)


@pytest.mark.parametrize("fused", [False, True])
def test_updates_that_the_scaler_skips(harness, fused):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    def scaled(model, optimizer, step):
        optimizer.zero_grad()
        loss = sum((p * torch.randn_like(p)).sum() for p in model.parameters())
        scaler.scale(loss * (float("inf") if step % 3 == 0 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()

    with harness.closing():
        name = "adamw-fused" if fused else "adamw"
        loop = harness.Loop(build_with(harness, name), scaled, every=5, window=5, grad_dtype="fp16")
        saved, _ = finish(loop.run(15))
    assert all(s.attempts == 1 for s in saved)
    assert not saved[2].exact


def wrong_lr(gradients, rows):
    return gradients, [(*row[:-1], row[-1] * 1.1) for row in rows]


def drop_one(gradients, rows):
    return gradients[1:], rows[1:]


def others_gradient(gradients, rows):
    return [np.ascontiguousarray(g[::-1]) for g in gradients], rows


@pytest.mark.parametrize("grad_dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("damage", [wrong_lr, drop_one, others_gradient], ids=lambda d: d.__name__)
@pytest.mark.parametrize("kind", ["adamw", "momentum"])
def test_replay_that_is_broken_is_caught(harness, monkeypatch, kind, damage, grad_dtype):
    """Nothing of it is published; the save is retargeted, and its parameters leave late from then on."""
    with harness.closing():
        loop = harness.Loop(build_with(harness, kind), update, every=6, window=4, grad_dtype=grad_dtype)
        loop.run(6)
        assert not loop.handles[0].result(30).exact
        real = replay.run

        def run(kernel, flags, p, states, grads, scalars, *, tail):
            grads, scalars = damage(list(grads), list(scalars))
            real(kernel, flags, p, states, grads, scalars, tail=tail)

        with monkeypatch.context() as patch:
            patch.setattr(replay, "run", run)
            loop.run(6)
            handle = loop.handles[-1]
            result = handle.result(30)
        assert result.attempts == 2
        assert result.exact
        assert any("did not match" in event for event in handle.events)
        loop.run(6)
        saved, _ = finish(loop)
    assert gockpt.steps(loop.path) == [s.step for s in saved]
    assert saved[-1].attempts == 1


def test_a_change_behind_the_optimizers_back_can_not_hide_in_the_rounding(harness):
    """A change as small as rounding, and ``verify="close"``: seen by its bits all the same."""

    def nudged(model, optimizer, step):
        update(model, optimizer, step)
        if step == 7:
            model.a.data[5] += 1e-6

    with harness.closing():
        loop = harness.Loop(
            build_with(harness, "adamw"), nudged, every=4, window=4, grad_dtype="bf16", verify="close"
        )
        saved, found = finish(loop.run(8))
    assert saved[1].attempts == 1
    assert set(saved[1].late_parts) == {"a"}
    # The rest of it, which was not changed, was replayed.
    with gockpt.open(loop.path, 8) as there:
        assert there["model/a"][5] == loop.moments[8].arrays["model/a"][5]
    assert "model/b" in found[1].inexact


@pytest.mark.parametrize("how", ["closure", "hook"])
def test_what_runs_inside_the_step_can_not_hide_in_the_rounding(harness, how):
    """Code between the last look and the update: its parameters leave at the close, exact."""
    handles = []

    def sneaky(model, optimizer, step):
        def nudge(*_):
            model.a.data[5] += 1e-6

        for p in model.parameters():
            p.grad = torch.randn_like(p)
        if step == 7 and how == "hook":
            handles.append(optimizer.register_step_pre_hook(nudge))
        optimizer.step(nudge) if step == 7 and how == "closure" else optimizer.step()

    with harness.closing():
        loop = harness.Loop(build_with(harness, "adamw"), sneaky, every=4, window=4, grad_dtype="bf16")
        loop.run(8)
        saved = [handle.result(30) for handle in loop.handles]
        assert (saved[1].exact, saved[1].attempts) == (True, 1)
        assert all("inside the step" in why for why in saved[1].late_parts.values())
        loop.check(8)


def test_the_ring_is_half_as_large_and_the_bound_holds(harness, monkeypatch):
    """``host_memory`` counts what decoding takes; what was asked for is enough."""
    taken, most = [], []
    real = np.empty

    class Numpy:
        def __getattr__(self, name):
            return getattr(np, name)

        @staticmethod
        def empty(*args, **kwargs):
            made = real(*args, **kwargs)
            taken.append(made.nbytes)
            return made

    monkeypatch.setattr(tiled, "np", Numpy())

    def large():
        model = harness.Tensors({"a": torch.randn(300, 1000)})
        return model, torch.optim.AdamW(model.parameters())

    with harness.closing():
        for grad_dtype in (None, "fp16", "bf16"):
            loop = harness.Loop(large, update, every=4, window=4, grad_dtype=grad_dtype)
            loop.run(8)
            saved = [handle.result(30) for handle in loop.handles]
            most.append((loop.handles[1].plan.ring_bytes, saved[1].host_memory))
            assert saved[1].exact is (grad_dtype is None)
            assert "gradient ring: " in loop.handles[1].plan.explain()
        loop = harness.Loop(large, update, every=4, window=4, grad_dtype="fp16", host_memory=5 << 20)
        with pytest.raises(gockpt.OptionsError, match="host_memory=5242880") as refused:
            loop.run(8)
        needed = int(str(refused.value).partition(" takes ")[2].split()[0])
        loop = harness.Loop(large, update, every=4, window=4, grad_dtype="fp16", host_memory=needed)
        loop.run(8)
        assert all(handle.result(30).window == 4 for handle in loop.handles)
    assert taken
    assert max(taken) <= tiled.SCRATCH_BYTES
    (plain, held), *others = most
    for ring, host in others:
        assert ring < 0.53 * plain
        assert host < held


@pytest.mark.parametrize("grad_dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("damage", ["lost", "bytes", "numbers"])
def test_a_gradient_that_is_not_the_one_that_was_posted_is_caught(harness, monkeypatch, damage, grad_dtype):
    """Probes are chosen by the first gradient, and see nothing of others that move other elements."""
    real, posted = Job.gradients, []

    def gradients(job, found):
        kept = []
        for gradient in found:
            if gradient.piece == 0:
                posted.append(job)
            if gradient.piece != 0 or posted.count(job) < 2:
                kept.append(gradient)
                continue
            if damage == "lost":
                job._ring.free(gradient.offset)
                continue
            kept.append(gradient)
            view = job._arenas[ArenaId.RING].view(gradient.offset, gradient.nbytes)
            if damage == "bytes":
                view[len(view) // 3 :][:40] ^= 0x55
            else:
                kept[-1] = replace(gradient, scalars=(*gradient.scalars[:-1], 1.0001 * gradient.scalars[-1]))
        real(job, kept)

    def sparse():
        model = harness.Tensors({"rows": torch.randn(4000, 16)})
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def few_rows(model, optimizer, step):
        grad = torch.zeros(4000, 16)
        grad[torch.randint(0, 4000, (100,))] = torch.randn(100, 16)
        model.rows.grad = grad
        optimizer.step()

    with harness.closing():
        loop = harness.Loop(sparse, few_rows, every=6, window=4, grad_dtype=grad_dtype)
        loop.run(6)
        with monkeypatch.context() as patch:
            patch.setattr(Job, "gradients", gradients)
            loop.run(6)
            result = loop.handles[-1].result(30)
        assert (result.attempts, result.exact) == (2, True)
        saved, _ = finish(loop)
    assert (saved[0].attempts, saved[0].exact) == (1, False)


def test_a_run_goes_on_from_it(harness, caplog):
    """Loading says that it is not exact; what is trained from there stays as near as it was."""
    with harness.closing():
        loop = harness.Loop(build_with(harness, "adamw"), update, every=4, window=4, grad_dtype="fp16")
        saved, _ = finish(loop.run(8))
        model, optimizer = loop.build()
        with caplog.at_level(logging.WARNING, "gockpt"):
            restored = gockpt.load(loop.path, model, optimizer, step=8)
        assert restored.metadata.exact is False
        assert restored.metadata.deviation == saved[1].deviation
        assert "loaded step 8, which is not exact: gradients in fp16" in caplog.text
        for step in range(9, 19):
            torch.manual_seed(step)
            update(model, optimizer, step)
            torch.manual_seed(step)
            update(loop.model, loop.optimizer, step)
    for name, expected in loop.model.state_dict().items():
        difference = (model.state_dict()[name] - expected).abs().max().item()
        assert difference < 100 * max(saved[1].deviation.max_abs, 1e-6), name


@pytest.mark.parametrize("value", ["float16", "int8", 16, True])
def test_another_dtype_is_refused(value):
    with pytest.raises(gockpt.OptionsError, match='None, "fp16" or "bf16"'):
        gockpt.Options(grad_dtype=value)
