"""Windows of several steps off a device: parts, gradients behind them, replay, on the fake one."""

from __future__ import annotations

import pytest
import torch

from gockpt.replay import rules
from gockpt.replay.pending_scalars import PendingScalars

FEW = 1 << 16
PLENTY = 1 << 26
EVERY = 6


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd", "momentum", "overwriting"])
@pytest.mark.parametrize("window", [2, 4])
def test_what_is_published_is_the_boundary(devices, runs, replayed, kind, window):
    run = runs.Run(kind, window=window)
    run.ticks(2 * EVERY)
    saved = run.finish()
    assert [(s.step, s.window, s.attempts) for s in saved[1:]] == [(12, window, 1), (18, window, 1)]
    assert all(set(s.late_parts) == {"odd"} for s in saved[1:])
    assert replayed["updates"] > 9_000
    assert "can leave early, followed by gradients, and be replayed" in run.handles[-1].plan.explain()


@pytest.mark.parametrize("memory", [FEW, PLENTY], ids=["few", "snapshot"])
@pytest.mark.parametrize("window", [3, 5])
def test_by_whatever_way(devices, runs, variant, replayed, memory, window):
    run = runs.Run(window=window, device_memory=memory).ticks(2 * EVERY)
    assert run.handles[-1].plan.device_copies.startswith("kernels" if variant == "direct" else "staging")
    assert [s.window for s in run.finish()[1:]] == [window, window]
    assert replayed["updates"] > 9_000


def test_in_a_process_of_its_own(devices, runs, variant):
    run = runs.Run(worker="process").ticks(2 * EVERY)
    saved = run.finish()
    assert [(s.window, s.attempts, set(s.late_parts)) for s in saved[1:]] == 2 * [(4, 1, {"odd"})]


# -- who waits for whom


def test_training_goes_on_while_nothing_arrives(devices, runs, replayed):
    run = runs.Run()
    devices.gate.clear()
    run.ticks(EVERY)
    save = run.handles[-1]
    for _ in range(3):
        run.update()  # past the closing tick, too
    assert not save.captured.done()
    devices.gate.set()
    save.captured.result(60)
    assert replayed["updates"] >= 0
    assert (save.result(60).step, save.result().window, set(save.result().late_parts)) == (12, 4, {"odd"})
    run.finish()


def test_where_the_ring_is_full_pieces_leave_at_the_close(devices, runs):
    run = runs.Run(window=EVERY).ticks(EVERY)  # the ring is there from the second window on
    run.handles[-1].result(60)
    devices.gate.clear()
    run.ticks(EVERY)
    devices.gate.set()
    saved = run.finish()[-1]
    assert (saved.step, saved.window, saved.attempts) == (18, EVERY, 1)
    assert "the gradient ring is full" in saved.late_parts.values()


def test_state_that_arrives_behind_its_gradients_is_replayed_all_the_same(devices, runs):
    """On a slow bus parts wait for their turn, and gradients overtake them."""
    devices.settings = {"outer": 1e3}
    run = runs.Run(window=5).ticks(2 * EVERY)
    assert [(s.window, s.attempts, set(s.late_parts)) for s in run.finish()[1:]] == 2 * [(5, 1, {"odd"})]


# -- what can't follow


@pytest.mark.parametrize("what", ["everything", "the ring"])
def test_without_a_way_for_gradients_the_window_is_1(devices, runs, waits, what):
    state = 4 * 4 * (9_000 + 71 * 83) + 4 * 3_000 + 8 * 2_000
    devices.settings = {"refuse": 0 if what == "everything" else int(1.3 * state)}
    run = runs.Run(window=4).ticks(2 * EVERY)
    plan = run.handles[-1].plan
    assert plan.window == 1
    expected = "gradients can't follow by" if what == "everything" else "could not be registered"
    assert expected in plan.reason
    assert "nothing can be replayed" in plan.explain()
    if what == "everything":
        waits.clear()  # on the detour the host has to carry each slot on
    assert [(s.window, s.attempts) for s in run.finish()[1:]] == [(1, 1), (1, 1)]


def test_the_first_window_waits_for_its_ring(devices, runs):
    run = runs.Run(window=4, ready=False)
    run.tick()
    run.get_ready()  # the stager
    run.ticks(2)
    assert run.handles == []
    (device,) = devices.made
    run.get_ready()
    assert len(device.registered) == 2
    run.ticks(3)
    assert run.handles[0].result(60).window <= 3
    run.finish()


def test_a_bound_of_host_memory_makes_the_ring_smaller_first(devices, runs):
    options = {"window": 5, "layout": "directory"}  # gathers nothing to write
    most = runs.Run(**options).ticks(EVERY).finish()[-1].host_memory
    with runs.elsewhere():
        limit = most - 20_000
        saved = runs.Run(**options, host_memory=limit).ticks(EVERY).finish()[-1]
        assert (saved.window, saved.attempts) == (5, 1)
        assert saved.host_memory <= limit


def test_a_mixed_model_leaves_by_both_ways(devices, runs, replayed):
    devices.holds = lambda tensor: tensor.shape[:1] != (71,)  # b and its states stand on the host
    run = runs.Run("adam").ticks(2 * EVERY)
    plan = run.handles[-1].plan
    assert 0 < plan.facts.device_replay_bytes < plan.facts.replay_bytes
    assert [(s.window, s.attempts, set(s.late_parts)) for s in run.finish()[1:]] == 2 * [(4, 1, {"odd"})]
    assert replayed["updates"] > 9_000


def test_the_window_follows_from_the_measured_rate(devices, runs, monkeypatch):
    run = runs.Run(window="auto", every=12)
    pace = run.saver._engine._pace
    run.ticks(12)
    assert pace.copy_rate is not None
    monkeypatch.setattr(pace, "copied", lambda nbytes, seconds: None)
    pace.copy_rate = 1e6
    state = run.saver._engine._save.shape.nbytes
    for _ in range(24):
        pace._steps.extend([state / 1e6 / 2.2] * 32)  # as if the last steps had all taken this long
        run.tick()
        run.get_ready()
    assert 2 < run.handles[-1].plan.window < 6
    assert "the fewest steps that hide the copy" in run.handles[-1].plan.reason
    assert run.finish()[-1].window == run.handles[-1].plan.window


# -- what loops do


def accumulate(run):
    for p in run.model.parameters():
        if p.requires_grad:
            p.grad = None if run.step % 2 else p.grad
    for _ in range(2):
        for p in run.model.parameters():
            if p.requires_grad:
                p.grad = torch.randn_like(p) if p.grad is None else p.grad.add_(torch.randn_like(p))
    run.optimizers[0].step()


def zero_in_place(run):
    run.optimizers[0].zero_grad(set_to_none=False)
    for p in run.model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad.add_(torch.randn_like(p))
    run.optimizers[0].step()
    run.optimizers[0].zero_grad(set_to_none=False)


def with_closure(run):
    def closure():
        run.gradients()
        return torch.zeros(())

    run.optimizers[0].step(closure)


def with_some_gradients(run):
    run.gradients()
    if run.step % 3:
        run.model.a.grad = None
    run.optimizers[0].step()


def with_changing_options(run):
    run.gradients()
    group = run.optimizers[0].param_groups[0]
    group["lr"] = 0.01 / (1 + run.step)
    group["weight_decay"] = 0.01 * (run.step % 3)
    run.optimizers[0].step()


def with_options_that_change_the_formula(run):
    run.gradients()
    group = run.optimizers[0].param_groups[0]
    if "momentum" in group:
        group["nesterov"] = run.step % 5 < 2
        group["dampening"] = 0
    else:
        group["capturable"] = False
        group["maximize"] = run.step % 5 < 2
    run.optimizers[0].step()


def without_an_update_sometimes(run):
    run.gradients()
    if run.step % 3:
        run.optimizers[0].step()


def with_two_updates_sometimes(run):
    for _ in range(1 + run.step % 2):
        run.gradients()
        run.optimizers[0].step()


def with_other_states(run):
    run.gradients()
    run.optimizers[0].step()
    if run.step in (9, 16):
        run.optimizers[0].load_state_dict(run.optimizers[0].state_dict())


def with_hooks_of_others(run):
    def before(*_):
        run.model.a.data.mul_(0.9)

    if not run.step:
        run.optimizers[0].register_step_pre_hook(before)
        run.optimizers[0].register_step_post_hook(lambda *_: run.optimizers[0].zero_grad())
    run.gradients()
    run.optimizers[0].step()


LOOPS = (
    accumulate, zero_in_place, with_closure, with_some_gradients, with_changing_options,
    with_options_that_change_the_formula, without_an_update_sometimes, with_two_updates_sometimes,
    with_other_states, with_hooks_of_others,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["adamw", "overwriting"])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_loops_of_all_kinds(devices, runs, kind, loop):
    run = runs.Run(kind, update=loop).ticks(3 * EVERY)
    run.saver.wait()
    saved = run.finish()
    assert [s.step for s in saved] == [6, 12, 18, 24] or loop is with_hooks_of_others
    assert len(saved) == 4


def test_steps_that_a_scaler_skips_are_not_replayed(devices, runs, replayed):
    """What it found stands on the device, and nobody waits for it."""

    def update(run):
        run.gradients()
        optimizer = run.optimizers[0]
        optimizer.found_inf = torch.tensor(float(run.step % 3 == 1))
        optimizer.grad_scale = torch.tensor(1.0)
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale

    run = runs.Run("adamw", update=update).ticks(2 * EVERY)
    assert [(s.step, s.window, s.attempts, set(s.late_parts)) for s in run.finish()[1:]] == [
        (12, 4, 1, {"odd"}),
        (18, 4, 1, {"odd"}),
    ]
    assert replayed["updates"] > 0


def test_numbers_on_the_device_travel_with_the_gradients(devices, runs, monkeypatch, replayed):
    """What a rule for fused or capturable optimizers gives: the step's count is a tensor on the device."""
    real, asked = rules.scalars, []

    def scalars(rule, group, state):
        row = real(rule, group, state)
        if row is None or "step" not in state:
            return row
        options = {name: value for name, value in group.items() if name != "params"}
        asked.append(rule.kernel)
        return PendingScalars(
            (state["step"],), lambda values: rules.calibration.row(rule.kernel, options, {"step": values[0]})
        )

    monkeypatch.setattr(rules, "scalars", scalars)
    run = runs.Run("adamw").ticks(2 * EVERY)
    assert [(s.window, s.attempts, set(s.late_parts)) for s in run.finish()[1:]] == 2 * [(4, 1, {"odd"})]
    assert asked
    assert replayed["updates"] > 9_000


def test_numbers_that_can_not_be_used_make_their_pieces_late(devices, runs, monkeypatch):
    real = rules.scalars

    def scalars(rule, group, state):
        row = real(rule, group, state)
        return row and PendingScalars((state["step"],), lambda values: None)

    monkeypatch.setattr(rules, "scalars", scalars)
    run = runs.Run("adamw").ticks(EVERY)
    saved = run.finish()[-1]
    # It depends on when they arrive: before the closing tick, or not.
    told = {"its parameter group's options changed"} <= set(saved.late_parts.values())
    assert (saved.step, saved.attempts) == ((12, 1) if told else (12, 2))


def test_an_exception_in_a_step_costs_what_left_early(devices, runs):
    run = runs.Run().ticks(4)
    with pytest.raises(ZeroDivisionError):
        run.optimizers[0].step(lambda: 1 / 0)
    run.ticks(2)
    saved = run.finish()[-1]
    assert (saved.step, saved.window) == (12, 1)


def test_a_compiled_model_is_saved(devices, runs, replayed):
    run = runs.Run()
    forward = torch.compile(lambda: run.model.a.square().sum() + run.model.b.sum(), backend="eager")

    def update():
        for optimizer in run.optimizers:
            optimizer.zero_grad()
            forward().backward()
            optimizer.step()

    run.update = update
    run.ticks(EVERY)
    assert run.finish()[-1].window == 4
    assert replayed["updates"] > 9_000
