"""Replay against a CUDA device itself: every bit of p and all states. Runs with `make gpu`."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gockpt.kernels import replay as kernels
from gockpt.replay import calibration_cuda
from gockpt.replay import rules as replay
from gockpt.replay.calibration import Case
from gockpt.replay.calibration_cuda import candidates, diagnose
from gockpt.replay.calibration_runs import lab_for
from gockpt.replay.pending_scalars import PendingScalars

pytestmark = pytest.mark.gpu

ADAM, ADAMW, SGD = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD
IMPLEMENTATIONS = {
    "default": {},
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
FLAVOURS = [
    (ADAM, {}),
    (ADAM, {"weight_decay": 0.1, "maximize": True}),
    (ADAM, {"amsgrad": True, "betas": (0.4, 0.9)}),
    (ADAMW, {}),
    (ADAMW, {"amsgrad": True, "weight_decay": 0.3}),
    (SGD, {}),
    (SGD, {"weight_decay": 0.1, "maximize": True}),
    (SGD, {"momentum": 0.9, "dampening": 0.3}),
    (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (SGD, {"momentum": 0.9, "nesterov": True}),
]
SHAPES = [(1,), (17,), (3, 5, 7), (1023,), (4096,), (1 << 20,), (300_007,)]


@pytest.fixture
def lab():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return lab_for(torch.device("cuda", torch.cuda.current_device()))


def report(lab, case):
    """Say how far each candidate is from the device, the nearest first."""
    found = sorted(diagnose(case, lab, candidates(case)), key=lambda d: sum(d.elements))
    lines = [f"{case} on {lab.key}: elements that differ, ulps, NaN bits"]
    lines += [f"  {d.candidate}: {d.elements} {d.ulps} {d.nans}" for d in found[:12]]
    return "\n".join(lines)


def drawn(generator, shape, scale):
    values = np.exp(generator.normal(size=shape) * 2) * generator.choice((-scale, scale), size=shape)
    return torch.from_numpy(values.astype(np.float32)).cuda()


def name(value):
    return ",".join(f"{k}={v}" for k, v in value.items()) or "plain" if isinstance(value, dict) else None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("kind", "options"), FLAVOURS, ids=name)
def test_five_updates_are_replayed_to_the_last_bit(lab, kind, implementation, options):
    generator = np.random.default_rng(7)
    params = [torch.nn.Parameter(drawn(generator, shape, 0.05)) for shape in SHAPES]
    optimizer = kind(params, **{"lr": 1e-3} | IMPLEMENTATIONS[implementation] | options)
    group = optimizer.param_groups[0]

    def update():
        for p in params:
            p.grad = drawn(generator, tuple(p.shape), 1e-3)
        before = [p.grad.cpu().numpy().reshape(-1).copy() for p in params]
        optimizer.step()
        return before

    for _ in range(3):
        update()
    rules = [replay.rule_for(optimizer, group, p, optimizer.state[p], lab) for p in params]
    if any(isinstance(rule, str) for rule in rules):
        case = Case(kind, kernel_of(group), group["foreach"], group["fused"])
        pytest.fail(f"{rules[0]}\n{report(lab, case)}")

    def live(p, rule):
        tensors = (p.detach(), *(optimizer.state[p][key] for key in rule.states))
        return [t.cpu().numpy().reshape(-1) for t in tensors]

    mine = [[a.copy() for a in live(p, rule)] for p, rule in zip(params, rules, strict=True)]
    gradients, rows = [[] for _ in params], [[] for _ in params]
    for number in range(5):
        group["lr"] = 1e-3 * (1 + 0.37 * number)
        before = update()
        for i, (p, rule) in enumerate(zip(params, rules, strict=True)):
            gradients[i].append(before[i] if rule.gradient_at == "pre" else p.grad.cpu().numpy().reshape(-1))
            row = replay.scalars(rule, group, optimizer.state[p])
            if isinstance(row, PendingScalars):
                row = row.row(tuple(float(t) for t in row.tensors))
            rows[i].append(row)
    for i, (p, rule) in enumerate(zip(params, rules, strict=True)):
        kernels.run(rule.kernel, rule.flags, mine[i][0], mine[i][1:], gradients[i], rows[i], tail=True)
        for array, expected, what in zip(mine[i], live(p, rule), ("p", *rule.states), strict=True):
            bad = np.flatnonzero(array.view(np.uint32) != expected.view(np.uint32))
            assert not bad.size, f"{what} of {array.size}, {rule}: {bad.size} differ, first at {bad[:5]}"


def kernel_of(group):
    if "betas" in group:
        return "amsgrad" if group["amsgrad"] else "adam"
    return "momentum" if group["momentum"] else "sgd"


@pytest.mark.parametrize("kind", [ADAMW, SGD])
def test_a_learning_rate_and_a_scaler_on_the_device(lab, kind):
    generator = np.random.default_rng(8)
    p = torch.nn.Parameter(drawn(generator, (5000,), 0.05))
    lr = torch.tensor(1e-3, device=lab.device)
    optimizer = kind([p], lr=lr, fused=True, **({"momentum": 0.9} if kind is SGD else {}))
    group = optimizer.param_groups[0]
    p.grad = drawn(generator, (5000,), 1e-3)
    optimizer.step()
    rule = replay.rule_for(optimizer, group, p, optimizer.state[p], lab)
    assert isinstance(rule, replay.Rule), rule
    arrays = [t.detach().cpu().numpy() for t in (p, *(optimizer.state[p][key] for key in rule.states))]
    gradients, rows = [], []
    for number in range(3):
        lr.fill_(1e-3 * (1 + number))
        p.grad = drawn(generator, (5000,), 1e-3)
        optimizer.grad_scale = torch.full((), 8.0, device=lab.device)
        optimizer.found_inf = torch.zeros((), device=lab.device)
        optimizer.step()
        gradients.append(p.grad.cpu().numpy())
        late = replay.scalars(rule, group, optimizer.state[p])
        rows.append(late.row(tuple(float(t) for t in late.tensors)))
    kernels.run(rule.kernel, rule.flags, arrays[0], arrays[1:], gradients, rows, tail=True)
    live = [t.detach().cpu().numpy() for t in (p, *(optimizer.state[p][key] for key in rule.states))]
    for array, expected in zip(arrays, live, strict=True):
        assert np.array_equal(array.view(np.uint32), expected.view(np.uint32))


def test_calibration_leaves_training_alone(lab, monkeypatch):
    monkeypatch.setattr(calibration_cuda, "_findings", {})
    calls = []
    hooks = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("post")),
    ]
    side = torch.cuda.Stream()

    def world():
        generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        here = torch.cuda.current_stream(), torch.cuda.current_device(), torch.is_grad_enabled()
        return *generators, torch.cuda.get_rng_state().tolist(), *here

    try:
        with torch.cuda.stream(side), torch.no_grad():
            before = world()
            torch.cuda._sleep(2_000_000_000)  # about a second
            asleep = torch.cuda.Event()
            asleep.record()
            calibration_cuda.finding_for(Case(SGD, "momentum", None, None), lab)
            assert not asleep.query(), "it waited for what training had queued"
            assert world() == before
    finally:
        for hook in hooks:
            hook.remove()
        torch.cuda.synchronize()
    assert not calls


def test_nothing_is_tried_while_a_graph_is_being_captured(lab, monkeypatch):
    monkeypatch.setattr(calibration_cuda, "_findings", {})
    case = Case(ADAMW, "adam", None, None)
    x = torch.ones(8, device=lab.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x + 1
        said = calibration_cuda.finding_for(case, lab)
    assert "a CUDA graph is being captured" in said
    graph.replay()
    assert y.sum().item() == 16
    assert "captured" not in str(calibration_cuda.finding_for(case, lab))


def test_numbers_are_taken_without_waiting(lab):
    p = torch.nn.Parameter(torch.ones(1000, device=lab.device))
    optimizer = ADAMW([p], fused=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    rule = replay.rule_for(optimizer, optimizer.param_groups[0], p, optimizer.state[p], lab)
    assert isinstance(rule, replay.Rule), rule
    replay.scalars(rule, optimizer.param_groups[0], optimizer.state[p])  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    asleep = torch.cuda.Event()
    asleep.record()
    optimizer.step()
    late = replay.scalars(rule, optimizer.param_groups[0], optimizer.state[p])
    assert not asleep.query()
    first, second = (float(tensor) for tensor in late.tensors)
    assert (first, second) == pytest.approx((0.9**3, 0.999**3))
