"""Who gets a rule and who leaves at the close: every condition, and what must not be refused."""

from __future__ import annotations

import functools
import pickle
import re
import types

import numpy as np
import pytest
import torch

from gockpt.replay import rules
from gockpt.replay.rules import Rule


def rule(optimizer, group=0, index=0):
    group = optimizer.param_groups[group]
    p = group["params"][index]
    return rules.rule_for(optimizer, group, p, optimizer.state[p])


def stepped(kind, p=None, **options):
    """An optimizer over one parameter that has taken one step."""
    p = torch.nn.Parameter(torch.ones(4, 6)) if p is None else p
    optimizer = kind([p], **{"lr": 0.1} | options)
    p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("kind", "options", "kernel", "states", "at"),
    [
        (torch.optim.AdamW, {}, "adam", ("exp_avg", "exp_avg_sq"), "post"),
        (torch.optim.Adam, {"amsgrad": True}, "amsgrad", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), "post"),
        (torch.optim.Adam, {"fused": True, "lr": 1}, "adam", ("exp_avg", "exp_avg_sq"), "post"),
        (torch.optim.Adam, {"decoupled_weight_decay": True}, "adam", ("exp_avg", "exp_avg_sq"), "post"),
        (torch.optim.SGD, {}, "sgd", (), "post"),
        (torch.optim.SGD, {"momentum": 0.9}, "momentum", ("momentum_buffer",), "post"),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, "momentum", ("momentum_buffer",), "post"),
        (
            torch.optim.SGD,
            {"momentum": 0.9, "nesterov": True, "foreach": True},
            "momentum",
            ("momentum_buffer",),
            "pre",
        ),
        (
            torch.optim.SGD,
            {"momentum": 0.9, "nesterov": True, "foreach": True, "weight_decay": 0.1},
            "momentum",
            ("momentum_buffer",),
            "post",
        ),
    ],
)
def test_torchs_own_optimizers_get_a_rule(kind, options, kernel, states, at):
    got = rule(stepped(kind, **options))
    assert isinstance(got, Rule), got
    assert (got.kernel, got.states, got.gradient_at) == (kernel, states, at)
    assert pickle.loads(pickle.dumps(got)) == got


def test_one_dimension_of_one_does_not_matter():
    p = torch.nn.Parameter(torch.ones(8, 3, 1, 1).to(memory_format=torch.channels_last))
    assert isinstance(rule(stepped(torch.optim.AdamW, p)), Rule)


class Mine(torch.optim.AdamW):
    pass


class Stranger(torch.nn.Parameter):
    pass


def channels_last():
    return torch.nn.Parameter(torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last))


def holes():
    return torch.ones(4, 8)[:, ::2].detach().requires_grad_()


def with_state(optimizer, **states):
    (p,) = optimizer.param_groups[0]["params"]
    for name, value in states.items():
        if value is None:
            del optimizer.state[p][name]
        else:
            optimizer.state[p][name] = value
    return optimizer


def with_options(optimizer, **options):
    optimizer.param_groups[0].update(options)
    return optimizer


ADAMW, SGD = torch.optim.AdamW, torch.optim.SGD


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: stepped(torch.optim.RMSprop), "RMSprop is not one of"),
        (lambda: stepped(Mine), "Mine is not one of"),
        (lambda: ADAMW([torch.nn.Parameter(torch.ones(3))]), "has no (exp_avg|exp_avg_sq|step) for it yet"),
        (lambda: SGD([torch.nn.Parameter(torch.ones(3))], momentum=0.9), "has no momentum_buffer for it yet"),
        (lambda: stepped(ADAMW, lr=torch.tensor(0.1)), "lr is a Tensor"),
        (lambda: stepped(ADAMW, betas=(torch.tensor(0.9), torch.tensor(0.99))), "betas are not"),
        (lambda: stepped(ADAMW, betas=(0.0, 0.9)), "beta1 is"),
        (lambda: stepped(ADAMW, betas=(2.0**-25, 0.9)), "beta1 is"),
        (lambda: with_options(stepped(SGD), weight_decay=torch.tensor(0.1)), "weight_decay is a Tensor"),
        (lambda: with_options(stepped(ADAMW), capturable=True), "capturable=True"),
        (lambda: with_options(stepped(ADAMW), differentiable=True), "differentiable=True"),
        (lambda: stepped(ADAMW, torch.nn.Parameter(torch.ones(3, dtype=torch.float64))), "float64"),
        (
            lambda: stepped(SGD, torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), fused=True),
            "bfloat16",
        ),
        (lambda: stepped(ADAMW, torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))), "complex64"),
        (lambda: stepped(ADAMW, Stranger(torch.ones(3))), "is a Stranger"),
        (lambda: stepped(ADAMW, channels_last()), "row-major"),
        (lambda: stepped(ADAMW, holes()), "row-major"),
        (lambda: with_state(stepped(ADAMW), exp_avg=torch.ones(6, 4).t()), "exp_avg does not lie"),
        (lambda: with_state(stepped(ADAMW), exp_avg=torch.ones(24)), r"exp_avg has shape \(24,\)"),
        (
            lambda: with_state(stepped(ADAMW), exp_avg_sq=torch.ones(4, 6).double()),
            "exp_avg_sq is torch.float64",
        ),
        (lambda: with_state(stepped(ADAMW), exp_avg=None), "no exp_avg"),
        (lambda: with_state(stepped(ADAMW), step=3), "no step"),
        (lambda: with_state(stepped(ADAMW), step=torch.ones(2)), "step is not one number"),
        (lambda: with_state(stepped(ADAMW), ema=torch.ones(4, 6)), "the state ema is not one"),
        (lambda: with_options(stepped(ADAMW, amsgrad=True), amsgrad=False), "max_exp_avg_sq is not one"),
        (lambda: with_options(stepped(ADAMW), amsgrad=True), "no max_exp_avg_sq"),
        (lambda: with_options(stepped(SGD, momentum=0.9), momentum=0), "momentum_buffer is not one"),
        (lambda: with_options(stepped(SGD), foreach=True, fused=True), "can't be run on probe"),
    ],
)
def test_reasons(build, reason):
    got = rule(build())
    assert isinstance(got, str)
    assert re.search(reason, got)


def test_state_elsewhere_is_no_state():
    optimizer = stepped(ADAMW)
    (p,) = optimizer.param_groups[0]["params"]
    assert "float32 on the CPU" in rules.rule_for(
        optimizer, optimizer.param_groups[0], torch.ones(4, 6, device="meta"), optimizer.state[p]
    )


def test_schedulers_only_count_steps():
    optimizer = stepped(ADAMW)
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 3), torch.optim.lr_scheduler.LinearLR(optimizer)]
    assert "step" in optimizer.__dict__  # what this test is about
    assert isinstance(rule(optimizer), Rule)
    assert len(schedulers) == 2


def test_a_patched_step_is_refused_wherever_it_hides():
    def clamp_after(step):
        @functools.wraps(step)  # copies the scheduler's mark, too
        def wrapper(*args, **kwargs):
            return step(*args, **kwargs)

        return wrapper

    plain = stepped(ADAMW)
    plain.step = clamp_after(plain.step)
    assert rule(plain) == "step was replaced on the optimizer"

    over_scheduler = stepped(ADAMW)
    torch.optim.lr_scheduler.StepLR(over_scheduler, 3)
    over_scheduler.step = clamp_after(over_scheduler.step)
    assert over_scheduler.step._wrapped_by_lr_sched
    assert rule(over_scheduler) == "step was replaced on the optimizer"

    under_scheduler = stepped(ADAMW)
    under_scheduler.step = types.MethodType(lambda self: None, under_scheduler)
    torch.optim.lr_scheduler.StepLR(under_scheduler, 3)
    assert rule(under_scheduler) == "step was replaced on the optimizer"

    compiled = stepped(ADAMW)
    compiled.step = torch.compile(compiled.step, backend="eager")
    assert rule(compiled) == "step was replaced on the optimizer"


def test_a_class_that_was_patched_is_refused(monkeypatch):
    own = torch.optim.SGD.step

    @functools.wraps(own)
    def wrapper(self, closure=None):
        return own(self, closure)

    optimizer = stepped(SGD)
    monkeypatch.setattr(torch.optim.SGD, "step", wrapper)
    assert rule(optimizer) == "SGD.step was replaced on the class"


def test_compiling_a_model_changes_nothing():
    torch.compile(torch.nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))  # patches torch.optim's classes
    assert isinstance(rule(stepped(ADAMW)), Rule)


def test_flushed_denormals_are_refused():
    optimizer = stepped(ADAMW)
    try:
        if torch.set_flush_denormal(True):
            assert "set_flush_denormal" in rule(optimizer)
    finally:
        torch.set_flush_denormal(False)
    assert isinstance(rule(optimizer), Rule)


def test_the_smallest_beta_that_is_replayed(make, draw_gradient):
    run = make("AdamW", "for-loop", [(1007,)], betas=(2.0**-24.9, 0.9))
    run.start_recording()
    run.step([draw_gradient(np.random.default_rng(0), (1007,))])
    run.check()


@pytest.mark.parametrize(
    "change",
    [
        {"lr": torch.tensor(0.1)},
        {"betas": (torch.tensor(0.9), 0.9)},
        {"betas": (0.0, 0.9)},
        {"foreach": True},
        {"fused": True},
        {"amsgrad": True},
        {"capturable": True},
        {"decoupled_weight_decay": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_rule_ends_when_options_change_under_it(change):
    optimizer = stepped(ADAMW)
    (p,), state = optimizer.param_groups[0]["params"], optimizer.state
    good = rule(optimizer)
    assert len(rules.scalars(good, optimizer.param_groups[0], state[p])) == 9
    with_options(optimizer, **change)
    assert rules.scalars(good, optimizer.param_groups[0], state[p]) is None


def test_a_momentum_rule_ends_when_the_gradient_starts_to_be_overwritten():
    optimizer = stepped(SGD, momentum=0.9, nesterov=True, foreach=True, weight_decay=0.1)
    (p,), group = optimizer.param_groups[0]["params"], optimizer.param_groups[0]
    good = rule(optimizer)
    assert rules.scalars(good, group, optimizer.state[p]) == (1.0, 0.1, 0.9, 1.0, 1.0, -0.1)
    group["weight_decay"] = 0
    assert rules.scalars(good, group, optimizer.state[p]) is None
    group["momentum"] = 0
    assert rules.scalars(good, group, optimizer.state[p]) is None


def test_gradients_that_cannot_be_replayed_are_named():
    p = torch.nn.Parameter(torch.ones(4, 6))
    assert "no gradient" in rules.gradient_reason(p)
    p.grad = torch.ones(4, 6)
    assert rules.gradient_reason(p) is None
    p.grad = torch.ones(6, 4).t()
    assert "row-major" in rules.gradient_reason(p)
    p.grad = torch.ones(4, 6).to_sparse()
    assert "sparse" in rules.gradient_reason(p)
