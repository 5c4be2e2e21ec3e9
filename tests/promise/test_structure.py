"""Parameters, groups, states, dtypes that come, go or change inside a window: exact at its close."""

from __future__ import annotations

import pytest
import torch

import gockpt

EVERY, WINDOW = 6, 4


class Changing:
    """A loop in which the structure changes once, at a chosen step and on a chosen side of the tick."""

    def __init__(self, harness, change, *, at=4, after_tick=True, make=None):
        self.harness, self.change, self.at, self.after_tick = harness, change, at, after_tick
        self.path = harness.directory()
        self.model = harness.Tensors({"a": torch.randn(1500), "b": torch.randn(40, 41)})
        self.optimizer = (make or (lambda m: torch.optim.AdamW(m.parameters(), lr=0.05)))(self.model)
        self.moments = {}
        self.handles = []

    def run(self, ticks=2 * EVERY + 1):
        options = gockpt.Options(window=WINDOW, when_busy="wait", nice=0)
        for step in range(1, ticks + 1):
            if step == self.at and not self.after_tick:
                self.change(self)
            for p in self.model.parameters():
                p.grad = torch.randn_like(p) if p.requires_grad else None
            self.optimizer.step()
            self.moments[step] = self.harness.take(step, self.model, self.optimizer)
            handle = gockpt.save_overlapped(
                self.model, self.optimizer, self.path, step=step, every=EVERY, options=options
            )
            if handle is not None and handle not in self.handles:
                self.handles.append(handle)
            if step == self.at and self.after_tick:
                self.change(self)
        gockpt.wait()
        return [handle.result(30) for handle in self.handles]


def add_group(run):
    run.model.register_parameter("new", torch.nn.Parameter(torch.randn(700)))
    run.optimizer.add_param_group({"params": [run.model.new], "lr": 0.1})


def add_untrained_parameter(run):
    run.model.register_parameter("new", torch.nn.Parameter(torch.randn(700), requires_grad=False))


def add_buffer(run):
    run.model.register_buffer("new", torch.randn(300))


def remove_parameter(run):
    del run.optimizer.param_groups[0]["params"][1]
    run.optimizer.state.pop(run.model.b)
    del run.model.b


def drop_a_state(run):
    run.optimizer.state.pop(run.model.a)


def drop_all_states(run):
    run.optimizer.state.clear()


def freeze(run):
    run.model.a.requires_grad_(False)


def double(run):
    run.model.double()
    run.optimizer.state.clear()


def half(run):
    run.model.a.data = run.model.a.data.to(torch.bfloat16)
    run.optimizer.state.pop(run.model.a)


def reshape(run):
    run.model.b.data = run.model.b.data.reshape(-1)
    run.optimizer.state.pop(run.model.b)


def other_memory_order(run):
    run.model.b.data = run.model.b.data.t().contiguous().t()


def new_parameter_same_name(run):
    old, run.model.a = run.model.a, torch.nn.Parameter(torch.randn(1500))
    run.optimizer.param_groups[0]["params"][0] = run.model.a
    run.optimizer.state.pop(old)


def regroup(run):
    del run.optimizer.param_groups[0]["params"][1]
    run.optimizer.add_param_group({"params": [run.model.b], "weight_decay": 0.3})


def turn_on_amsgrad(run):
    run.optimizer.param_groups[0]["amsgrad"] = True
    for state in run.optimizer.state.values():
        state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg"])


def switch_to_fused(run):
    run.optimizer.param_groups[0].update(fused=True, foreach=False)


CHANGES = (
    add_group, add_untrained_parameter, add_buffer, remove_parameter, drop_a_state, drop_all_states, freeze,
    double, half, reshape, other_memory_order, new_parameter_same_name, regroup, turn_on_amsgrad,
    switch_to_fused,
)  # fmt: skip


@pytest.mark.parametrize("after_tick", [True, False], ids=["after the tick", "before the step"])
@pytest.mark.parametrize("at", [3, 5, 6])
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_a_change_inside_the_window(harness, change, at, after_tick):
    with harness.closing():
        run = Changing(harness, change, at=at, after_tick=after_tick)
        saved = run.run()
    for result in saved:
        harness.check_open(run.path, run.moments[result.step])
    assert [s.step for s in saved[1:]] == [2 * EVERY]
    assert saved[0].step == EVERY or (at == EVERY and after_tick and saved[0].attempts > 1)
    assert saved[0].attempts == 1 or saved[0].step > EVERY


def test_what_was_added_inside_the_window_loads_again(harness):
    with harness.closing():
        run = Changing(harness, add_group)
        saved = run.run()
    fresh = harness.Tensors({"a": torch.zeros(1500), "b": torch.zeros(40, 41), "new": torch.zeros(700)})
    optimizer = torch.optim.AdamW([fresh.a, fresh.b], lr=0.05)
    optimizer.add_param_group({"params": [fresh.new]})
    harness.check_load(run.path, run.moments[saved[0].step], fresh, optimizer)


def test_state_that_appears_late(harness):
    """Two of four experts are first used inside the window: their optimizer state is new there."""

    def build():
        model = harness.Tensors({f"expert{i}": torch.randn(600) for i in range(4)})
        return model, torch.optim.AdamW(model.parameters(), lr=0.05)

    def update(model, optimizer, step):
        for number, p in enumerate(model.parameters()):
            p.grad = torch.randn_like(p) if number < 2 or step >= 4 else None
        optimizer.step()

    with harness.closing():
        loop = harness.Loop(build, update, every=EVERY, window=WINDOW)
        saved = loop.run(2 * EVERY + 1).finish()
    assert [(s.step, s.attempts) for s in saved] == [(6, 1), (12, 1)]
    assert saved[1].window == WINDOW
    assert not saved[1].late_parts


def test_momentum_that_appears_late(harness):
    def build():
        model = harness.Tensors({"a": torch.randn(600), "b": torch.randn(600)})
        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def update(model, optimizer, step):
        model.a.grad = torch.randn_like(model.a)
        model.b.grad = torch.randn_like(model.b) if step == 5 or step > 7 else None
        optimizer.step()

    with harness.closing():
        loop = harness.Loop(build, update, every=EVERY, window=WINDOW)
        saved = loop.run(2 * EVERY + 1).finish()
    assert [(s.step, s.attempts) for s in saved] == [(6, 1), (12, 1)]


def test_frozen_and_thawed_layer_by_layer(harness):
    def build():
        model = harness.Tensors({f"p{i}": torch.randn(500) for i in range(6)})
        return model, torch.optim.AdamW(model.parameters(), lr=0.05)

    def update(model, optimizer, step):
        for number, p in enumerate(model.parameters()):
            p.requires_grad_(number >= 6 - step)
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()

    with harness.closing():
        loop = harness.Loop(build, update, every=4, window=4)
        saved = loop.run(13).finish()
    assert [s.step for s in saved] == [4, 8, 12, 13]


def test_the_optimizer_holds_other_parameters_than_the_model(harness):
    """After load_state_dict(assign=True) training goes nowhere; that is an error that says so."""
    model = harness.Tensors({"a": torch.randn(1500)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model.a.grad = torch.randn(1500)
    optimizer.step()
    path = harness.directory()
    gockpt.save_overlapped(model, optimizer, path, step=1).result()
    model.load_state_dict({"a": torch.nn.Parameter(torch.randn(1500))}, assign=True)
    with pytest.raises(gockpt.UsageError, match="assign=True"):
        gockpt.save_overlapped(model, optimizer, path, step=2)
