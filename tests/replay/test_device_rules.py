"""Who on a device gets a rule, and that replay by it equals the device: on one that is simulated."""

from __future__ import annotations

import itertools
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gockpt.kernels import replay as kernels
from gockpt.replay import calibration_cuda, device_scalars, rules
from gockpt.replay.calibration import STATES, Case
from gockpt.replay.calibration_cuda import Candidate, candidates
from gockpt.replay.pending_scalars import PendingScalars
from gockpt.replay.rules import Rule

ADAM, ADAMW, SGD = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD


@pytest.fixture(autouse=True, scope="module")
def _known_apart():
    """Keep what is found of simulated devices among these trials."""
    before = dict(calibration_cuda._findings)
    yield
    calibration_cuda._findings.clear()
    calibration_cuda._findings.update(before)


def stepped(kind, p=None, **options):
    """An optimizer over one parameter that has taken one step."""
    p = torch.nn.Parameter(torch.ones(4, 6)) if p is None else p
    own = {key: v.clone() if isinstance(v, torch.Tensor) else v for key, v in options.items()}
    optimizer = kind([p], **{"lr": 0.1} | own)
    p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def kernel_of(optimizer):
    group = optimizer.param_groups[0]
    if "betas" in group:
        return "amsgrad" if group["amsgrad"] else "adam"
    return "momentum" if group["momentum"] else "sgd"


@pytest.fixture(scope="module")
def lab_like(simulated_lab):
    """Return a simulated device that treats an optimizer in the ``index``-th likely way."""

    def make(optimizer, index=0):
        group = optimizer.param_groups[0]
        case = Case(type(optimizer), kernel_of(optimizer), group["foreach"], group["fused"])
        truth = candidates(case)[index]
        return simulated_lab(truth, key=("simulated", truth))

    return make


def rule(optimizer, lab):
    group = optimizer.param_groups[0]
    p = group["params"][0]
    return rules.rule_for(optimizer, group, p, optimizer.state[p], lab)


@pytest.mark.parametrize(
    ("kind", "options", "kernel", "late"),
    [
        (ADAMW, {}, "cuda_adam", None),
        (ADAM, {"amsgrad": True, "foreach": False}, "cuda_amsgrad", None),
        (ADAMW, {"fused": True}, "cuda_fused_adam", "single"),
        (ADAM, {"fused": True, "amsgrad": True}, "cuda_fused_amsgrad", "single"),
        (ADAMW, {"fused": True, "lr": torch.tensor(0.1)}, "cuda_fused_adam", "single"),
        (SGD, {}, "cuda_sgd", None),
        (SGD, {"momentum": 0.9, "fused": True}, "cuda_momentum", None),
    ],
)
def test_torchs_own_optimizers_get_a_rule(lab_like, kind, options, kernel, late):
    optimizer = stepped(kind, **options)
    lab = lab_like(optimizer)
    got = rule(optimizer, lab)
    assert isinstance(got, Rule), got
    assert (got.kernel, got.flags, got.late, got.gradient_at) == (kernel, lab.truth.form, late, "post")
    assert got.follows_device
    assert pickle.loads(pickle.dumps(got)) == got
    # Without a laboratory, these tensors are the CPU's.
    plain = rule(optimizer, None)
    assert isinstance(plain, str) or not plain.follows_device


class Stranger(torch.nn.Parameter):
    pass


def elsewhere():
    return torch.nn.Parameter(torch.ones(4, 6, device="meta"))


def with_state(optimizer, **states):
    (p,) = optimizer.param_groups[0]["params"]
    optimizer.state[p].update(states)
    return optimizer


def with_options(optimizer, **options):
    optimizer.param_groups[0].update(options)
    return optimizer


def with_more(optimizer, *params):
    optimizer.param_groups[0]["params"].extend(params)
    return optimizer


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: stepped(torch.optim.RMSprop), "RMSprop is not one of"),
        (lambda: stepped(ADAMW, lr=torch.tensor(0.1), foreach=False), "lr is a Tensor"),
        (lambda: with_options(stepped(ADAMW, fused=True), lr=elsewhere()), "lr is a Parameter"),
        (lambda: with_options(stepped(ADAMW), capturable=True), "capturable=True"),
        (lambda: stepped(ADAMW, betas=(0.0, 0.9)), "beta1 is"),
        (lambda: stepped(ADAMW, torch.nn.Parameter(torch.ones(3, dtype=torch.float64))), "float64"),
        (lambda: stepped(ADAMW, elsewhere()), "on meta .* not dense float32 on the CPU"),
        (lambda: with_state(stepped(ADAMW), exp_avg=elsewhere().detach()), "exp_avg is .* on meta"),
        (
            lambda: with_state(stepped(ADAMW), step=torch.ones((), device="meta")),
            "step is not one number on the",
        ),
        (lambda: with_more(stepped(ADAMW), elsewhere()), "group holds a Parameter on meta"),
        (lambda: with_more(stepped(SGD), Stranger(torch.ones(2))), "group holds a Stranger on cpu"),
        (lambda: with_options(stepped(SGD), foreach=True, fused=True), "no kernel equals|can't be run"),
    ],
)
def test_reasons(lab_like, build, reason):
    optimizer = build()
    group = optimizer.param_groups[0]
    p = group["params"][0]
    lab = lab_like(stepped(ADAMW))
    got = rules.rule_for(optimizer, group, p, optimizer.state.get(p, {}), lab)
    assert isinstance(got, str)
    assert re.search(reason, got), got


def test_others_in_the_group_do_not_matter_where_the_user_has_chosen(lab_like):
    optimizer = with_more(stepped(ADAMW, foreach=True), elsewhere())
    assert isinstance(rule(optimizer, lab_like(optimizer)), Rule)


def test_flushed_denormals_are_refused(lab_like):
    optimizer = stepped(ADAMW)
    lab = lab_like(optimizer)
    try:
        if torch.set_flush_denormal(True):
            assert "set_flush_denormal" in rule(optimizer, lab)
    finally:
        torch.set_flush_denormal(False)


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
def test_a_rule_ends_when_options_change_under_it(lab_like, change):
    optimizer = stepped(ADAMW)
    (p,), state = optimizer.param_groups[0]["params"], optimizer.state
    good = rule(optimizer, lab_like(optimizer))
    assert len(rules.scalars(good, optimizer.param_groups[0], state[p])) == 9
    with_options(optimizer, **change)
    assert rules.scalars(good, optimizer.param_groups[0], state[p]) is None


def test_a_rule_ends_when_the_gradient_starts_to_be_overwritten(lab_like):
    optimizer = stepped(SGD, momentum=0.9, nesterov=True, weight_decay=0.1)
    (p,), group = optimizer.param_groups[0]["params"], optimizer.param_groups[0]
    for overwrites in (False, True):
        lab = lab_like(optimizer)
        lab.key = ("overwrites", overwrites)
        lab.overwrites = overwrites
        group["weight_decay"] = 0.1
        good = rule(optimizer, lab)
        assert (good.gradient_at, good.overwrites) == ("post", overwrites)
        assert rules.scalars(good, group, optimizer.state[p]) is not None
        group["weight_decay"] = 0
        assert (rules.scalars(good, group, optimizer.state[p]) is None) is overwrites
        assert rule(optimizer, lab).gradient_at == ("pre" if overwrites else "post")


def test_numbers_on_the_device_are_not_read_but_sent(lab_like):
    optimizer = stepped(ADAMW, fused=True)
    group = optimizer.param_groups[0]
    got = rule(optimizer, lab_like(optimizer))
    # As on a device: nothing may look at what stands there.
    on_device = {"step": torch.ones((), device="meta")}
    late = device_scalars.numbers(got.kernel, got.flags, got.late, group, on_device)
    assert isinstance(late, PendingScalars)
    assert [(t.device.type, t.numel(), t.dtype) for t in late.tensors] == [("meta", 1, torch.float32)] * 2
    group["lr"] = torch.ones((), device="meta")
    late = device_scalars.numbers(got.kernel, got.flags, got.late, group, on_device)
    assert len(late.tensors) == 3
    group["lr"] = 0.5  # what was captured stays as it was
    row = late.row((0.25, 0.5, 0.125))
    assert row[3] == 0.125
    assert row[6:8] == (0.75, float(np.sqrt(np.float32(0.5))))


def test_corrections_are_rounded_as_the_kernel_rounds_them():
    known = (1.0, 0.0, 0.0, 0.1, 0.9, 0.999, np.nan, np.nan, 1e-8)
    powers = np.random.default_rng(0).uniform(0.01, 0.99, (1000, 2)).astype(np.float32)
    differ = 0
    for first, second in powers:
        single, double = (
            device_scalars.filled("cuda_fused_adam", form, known, (float(first), float(second)), None)[6:8]
            for form in ((0, 0, 0, 1), (1, 1, 1, 1))
        )
        one = np.float32(1)
        assert single == (one - first, np.sqrt(one - second))
        exact = 1 - float(first), (1 - float(second)) ** 0.5
        assert double == tuple(float(np.float32(value)) for value in exact)
        differ += single != double
    assert differ > 10


def test_an_update_of_many_parameters_takes_few_launches(lab_like):
    p = [torch.nn.Parameter(torch.ones(3)) for _ in range(5)]
    optimizer = ADAMW(p, fused=True)
    states = [{"step": torch.tensor(float(i))} for i in range(5)]
    group = optimizer.param_groups[0]
    together = device_scalars.numbers_of("cuda_fused_adam", (0, 0, 0, 1), "single", group, states)
    for late, state in zip(together, states, strict=True):
        alone = device_scalars.numbers("cuda_fused_adam", (0, 0, 0, 1), "single", group, state)
        values = [tuple(float(t) for t in numbers.tensors) for numbers in (late, alone)]
        assert values[0] == values[1]
        assert late.row(values[0]) == alone.row(values[1])


def values_of(found):
    """Return an update's numbers as they are once all have arrived."""
    return found.row(tuple(float(t) for t in found.tensors)) if isinstance(found, PendingScalars) else found


def test_numbers_of_a_group_are_those_of_each_in_few_launches(lab_like, monkeypatch):
    lab = lab_like(stepped(ADAMW, fused=True))
    ps = [torch.nn.Parameter(torch.ones(4, 6)) for _ in range(5)]
    optimizer = stepped(ADAMW, fused=True)
    optimizer.add_param_group({"params": ps})
    group, states = optimizer.param_groups[0], [{"step": torch.tensor(float(n))} for n in range(1, 6)]
    got = rule(optimizer, lab)
    assert got.late is not None
    alone = [rules.scalars(got, group, state) for state in states]
    real, launched = device_scalars.power, []
    monkeypatch.setattr(device_scalars, "power", lambda *args: launched.append(args) or real(*args))
    together = rules.scalars_of(got, group, states)
    assert len(launched) == 2
    assert [values_of(found) for found in together] == [values_of(found) for found in alone]
    # Counters that can't be looked at together are looked at one by one.
    states[2]["step"] = states[2]["step"].double()
    odd = rules.scalars_of(got, group, states)
    assert len(launched) == 2 + 10
    alone = [rules.scalars(got, group, state) for state in states]
    assert [values_of(found) for found in odd] == [values_of(found) for found in alone]
    group["amsgrad"] = True
    assert rules.scalars_of(got, group, states) == [None] * 5


def test_numbers_that_are_known_here_are_those_of_each(lab_like):
    optimizer = stepped(ADAM, foreach=True)
    group, states = optimizer.param_groups[0], [{"step": torch.tensor(float(n))} for n in range(1, 4)]
    got = rule(optimizer, lab_like(optimizer))
    assert got.late is None
    expected = [rules.scalars(got, group, state) for state in states]
    assert rules.scalars_of(got, group, states) == expected
    assert None not in expected


def test_powers_are_the_ones_asked_for():
    steps = torch.tensor([3.0, 17.0])
    for form, kind in (("single", np.float32), ("single from a tensor", np.float32), ("double", np.float64)):
        got = device_scalars.power(form, 0.9, steps)
        assert got.numpy().dtype == kind
        assert np.allclose(got.numpy(), [0.9**3, 0.9**17], rtol=1e-6, atol=0)
    with torch.inference_mode():
        assert device_scalars.power("single", 0.9, steps).tolist() == pytest.approx([0.9**3, 0.9**17])


def test_gradients_must_stand_where_the_parameter_does():
    p = elsewhere()
    p.grad = torch.ones_like(p)
    assert rules.gradient_reason(p) is None
    host = torch.nn.Parameter(torch.ones(4, 6))
    host.grad = torch.ones(4, 6)
    assert rules.gradient_reason(host) is None


FLAVOURS = [
    (ADAM, {"weight_decay": 0.1}),
    (ADAMW, {"amsgrad": True}),
    (ADAMW, {"fused": True}),
    (ADAM, {"fused": True, "amsgrad": True, "weight_decay": 0.01}),
    (ADAMW, {"fused": True, "lr": torch.tensor(1e-3)}),
    (SGD, {"weight_decay": 0.1}),
    (SGD, {"momentum": 0.9, "dampening": 0.3, "fused": True}),
    (SGD, {"momentum": 0.9, "dampening": 0.9, "fused": True}),
    (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
]


@given(
    flavour=st.sampled_from(FLAVOURS),
    index=st.integers(0, 2),
    lrs=st.lists(st.floats(1e-5, 1), min_size=5, max_size=5),
    maximize=st.lists(st.booleans(), min_size=5, max_size=5),
    cut=st.integers(0, 256).map(lambda c: 16 * c),
    seed=st.integers(0, 2**32),
)
def test_replay_equals_the_device(lab_like, draw_gradient, flavour, index, lrs, maximize, cut, seed):
    kind, options = flavour
    rng = np.random.default_rng(seed)
    p = torch.nn.Parameter(torch.from_numpy(draw_gradient(rng, (4099,), scale=0.05)))
    optimizer = stepped(kind, p, **options)
    group, state = optimizer.param_groups[0], optimizer.state[p]
    lab = lab_like(optimizer, index)
    got = rule(optimizer, lab)
    assert isinstance(got, Rule), got

    live = [t.detach().numpy() for t in (p, *(state[name] for name in got.states))]  # updated in place
    mine = [array.copy() for array in live]
    gradients, rows = [], []
    for lr, way in zip(lrs, maximize, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
        group["maximize"] = way
        gradients.append(draw_gradient(rng, (4099,), wild=True))
        if "step" in state:
            state["step"] += 1
        numbers = lab.numbers({**group, "lr": float(group["lr"])}, float(state.get("step", 0)))
        lab.apply(live, gradients[-1], numbers)
        row = rules.scalars(got, group, state)
        if isinstance(row, PendingScalars):
            # The device's own powers, as they would arrive; not those of this host's torch.
            assert len(row.tensors) == 2
            row = row.row(tuple(lab.power(got.late, beta, float(state["step"])) for beta in group["betas"]))
        rows.append(row)
    for a, b in itertools.pairwise(sorted({0, cut, 4099})):
        piece, grads = [x[a:b] for x in mine], [g[a:b] for g in gradients]
        kernels.run(got.kernel, got.flags, piece[0], piece[1:], grads, rows, tail=b == 4099)
    for array, expected in zip(mine, live, strict=True):
        assert np.array_equal(array.view(np.uint32), expected.view(np.uint32))


def test_each_candidate_names_a_kernel_that_there_is():
    for kind, names in ((ADAM, ("adam", "amsgrad")), (SGD, ("sgd", "momentum"))):
        for kernel, fused in itertools.product(names, (None, True)):
            every = candidates(Case(kind, kernel, None, fused))
            assert len(set(every)) == len(every)
            assert all(isinstance(c, Candidate) and c.kernel in kernels.FORMS for c in every)
            assert all((c.late is not None) == ("fused" in c.kernel) for c in every)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("kind", "options"), FLAVOURS, ids=str)
def test_every_form_computes_what_torch_means(kind, options, maximize):
    # Up to rounding, which is all that forms differ in: against torch's own optimizer on the CPU.
    rng = np.random.default_rng(1)
    start = torch.from_numpy(rng.normal(size=1003).astype(np.float32))
    lr = options.get("lr", 0.05)
    optimizer = stepped(kind, torch.nn.Parameter(start), maximize=maximize, **options | {"lr": lr})
    group = optimizer.param_groups[0]
    (p,) = group["params"]
    kernel = kernel_of(optimizer)
    names = STATES[kernel]

    def live():
        return [t.detach().numpy().copy() for t in (p, *(optimizer.state[p][name] for name in names))]

    before, gradients, rows = live(), [], {}
    every = candidates(Case(kind, kernel, group["foreach"], group["fused"]))
    for _ in range(3):
        gradients.append(rng.normal(size=1003).astype(np.float32))
        p.grad = torch.from_numpy(gradients[-1].copy())
        optimizer.step()
        for c in every:
            row = device_scalars.numbers(c.kernel, c.form, c.late, group, optimizer.state[p])
            if isinstance(row, PendingScalars):
                row = row.row(tuple(float(t) for t in row.tensors))
            rows.setdefault(c, []).append(row)
    for c in every:
        mine = [array.copy() for array in before]
        kernels.run(c.kernel, c.form, mine[0], mine[1:], gradients, rows[c], tail=True)
        for array, expected in zip(mine, live(), strict=True):
            assert np.allclose(array, expected, rtol=1e-4, atol=1e-6), c
        assert not np.allclose(mine[0], before[0], rtol=1e-4, atol=1e-6)
