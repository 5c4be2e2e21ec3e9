"""What is published equals a synchronous deep copy of its tick, bit for bit: optimizers, windows, shapes.

Gradients are made by hand here, so that shapes, memory orders and values can be anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

IMPLEMENTATIONS = ({"foreach": False}, {"foreach": True}, {"fused": True})
SHAPES = ((), (1,), (7,), (3, 5), (257,), (16, 33), (2, 3, 4, 5), (0, 4), (1031,))


@dataclass(frozen=True)
class Case:
    """One loop."""

    kind: type
    options: dict
    groups: tuple[dict, ...]
    shapes: tuple
    layouts: tuple[str, ...]
    set_to_none: bool
    absent: float
    clip: bool
    micro: int
    schedule: str | None
    window: int
    slack: int
    verify: str
    seed: int


@st.composite
def adam(draw):
    kind = draw(st.sampled_from([torch.optim.Adam, torch.optim.AdamW]))
    options = {
        "amsgrad": draw(st.booleans()),
        "maximize": draw(st.booleans()),
        "betas": draw(st.sampled_from([(0.9, 0.999), (0.4, 0.95), (0.0, 0.5)])),
        "eps": draw(st.sampled_from([1e-8, 1e-3, 0.0])),
    }
    return kind, options


@st.composite
def sgd(draw):
    momentum = draw(st.sampled_from([0.0, 0.9]))
    nesterov = bool(momentum) and draw(st.booleans())
    dampening = 0.0 if nesterov else draw(st.sampled_from([0.0, 0.3]))
    options = {
        "momentum": momentum, "nesterov": nesterov, "dampening": dampening, "maximize": draw(st.booleans())
    }  # fmt: skip
    return torch.optim.SGD, options


@st.composite
def cases(draw):
    kind, options = draw(adam() | sgd())
    options |= draw(st.sampled_from(IMPLEMENTATIONS))
    groups = draw(
        st.lists(
            st.fixed_dictionaries(
                {"lr": st.sampled_from([1e-1, 3e-3, 0.0]), "weight_decay": st.sampled_from([0.0, 0.1])}
            ),
            min_size=1,
            max_size=3,
        )
    )
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=len(groups), max_size=6))
    layouts = draw(
        st.lists(
            st.sampled_from(["plain"] * 3 + ["transposed", "holes", "offset"]),
            min_size=len(shapes),
            max_size=len(shapes),
        )
    )
    absent = draw(st.sampled_from([0.0, 0.0, 0.3]))
    if kind is torch.optim.SGD and options.get("fused"):
        absent = 0.0  # torch's own step raises where some have no momentum buffer yet
    return Case(
        kind=kind,
        options=options,
        groups=tuple(groups),
        shapes=tuple(shapes),
        layouts=tuple(layouts),
        set_to_none=draw(st.booleans()),
        absent=absent,
        clip=draw(st.booleans()),
        micro=draw(st.integers(1, 3)),
        schedule=draw(st.sampled_from([None, "step", "cycle"])),
        window=draw(st.integers(1, 16)),
        slack=draw(st.integers(0, 2)),
        verify=draw(st.sampled_from(["full", "full", "close"])),
        seed=draw(st.integers(0, 99)),
    )


def laid_out(shape, layout, generator):
    values = torch.randn(shape, generator=generator)
    if layout == "transposed" and values.dim() >= 2:
        order = [*range(1, values.dim()), 0]
        return torch.randn([shape[i] for i in order], generator=generator).permute(
            [values.dim() - 1, *range(values.dim() - 1)]
        )
    if layout == "holes" and values.dim() >= 1:
        wide = torch.randn((*shape[:-1], 2 * shape[-1]), generator=generator)
        return wide[..., ::2]
    if layout == "offset":
        flat = torch.randn(values.numel() + 3, generator=generator)
        return flat[3:].view(shape)
    return values


def builder(case, harness):
    generator = torch.Generator().manual_seed(case.seed)

    def build():
        tensors = {
            f"p{i}": laid_out(shape, layout, generator)
            for i, (shape, layout) in enumerate(zip(case.shapes, case.layouts, strict=True))
        }
        model = harness.Tensors(tensors)
        parameters = list(model.parameters())
        count = len(case.groups)
        groups = [{"params": parameters[i::count], **group} for i, group in enumerate(case.groups)]
        return model, case.kind(groups, **case.options)

    return build


def updater(case, model, optimizer):
    generator = torch.Generator().manual_seed(case.seed + 1)
    scheduler = None
    if case.schedule == "step":
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)
    if case.schedule == "cycle":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.1, total_steps=200, cycle_momentum=bool(case.options.get("momentum", 1))
        )

    def update(model, optimizer, step):
        for _ in range(case.micro):
            for parameter in model.parameters():
                if torch.rand((), generator=generator) < case.absent:
                    continue
                gradient = torch.empty_like(parameter, requires_grad=False)
                gradient.copy_(torch.randn(parameter.shape, generator=generator))
                if parameter.grad is None:
                    parameter.grad = gradient
                else:
                    parameter.grad += gradient
        if case.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad(set_to_none=case.set_to_none)

    return update


@given(cases())
def test_every_due_step_is_published_as_it_was(harness, case):
    every = case.window + case.slack
    with harness.closing(), harness.counting() as replayed:
        loop = harness.Loop(builder(case, harness), None, every=every, window=case.window, verify=case.verify)
        loop.update = updater(case, loop.model, loop.optimizer)
        saved = loop.run(2 * every + 1).finish()
    due = [n for n in range(1, 2 * every + 2) if n % every == 0]
    steps = [s.step for s in saved]
    # Without slack the last tick opens the next window, which wait() then closes there.
    assert steps == due or (case.slack == 0 and steps == [*due, 2 * every + 1])
    assert all(s.attempts == 1 and s.exact for s in saved)
    # A plain dense parameter that always has a gradient really is replayed, once it has its states.
    plain = [
        f"p{i}"
        for i, (shape, layout) in enumerate(zip(case.shapes, case.layouts, strict=True))
        if layout in ("plain", "offset") and 0 not in shape
    ]
    beta1 = case.options.get("betas", (1.0,))[0] if case.schedule != "cycle" else 1.0
    if case.window > 1 and case.absent == 0 and beta1 > 0 and plain:
        assert saved[1].window == case.window
        assert not set(saved[1].late_parts) & set(plain), saved[1].late_parts
        assert replayed["updates"] > 0


@given(cases(), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_now_and_then_this_state_is_saved(harness, case, gaps):
    """The call comes whenever it likes; whatever the state is then is what is published."""
    with harness.closing(), harness.counting() as replayed:
        loop = harness.Loop(builder(case, harness), None)
        loop.update = updater(case, loop.model, loop.optimizer)
        for gap in gaps:
            for _ in range(gap - 1):
                loop.tick(save=False)
            loop.tick()
        loop.tick(save=False)  # an update while the last copy may still be under way
        saved = loop.finish()
    expected = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    assert [s.step for s in saved] == expected
    assert all(s.attempts == 1 and s.window == 1 for s in saved)
    assert replayed["updates"] == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=["for-loop", "foreach", "fused"])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("window", [2, 3, 8, 16])
def test_windows_are_replayed_for_every_supported_optimizer(harness, kind, implementation, window):
    """Nothing leaves at the close but the last part: replay is what makes these equal."""
    options = {"lr": 0.05, "weight_decay": 0.01, **implementation}
    if kind is torch.optim.SGD:
        options["momentum"] = 0.9

    def build():
        model = harness.Tensors({"a": torch.randn(65, 67), "b": torch.randn(4099), "c": torch.randn(30)})
        return model, kind(model.parameters(), **options)

    def update(model, optimizer, step):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    with harness.closing(), harness.counting() as replayed:
        loop = harness.Loop(build, update, every=window, window=window)
        saved = loop.run(3 * window).finish()
    assert [(s.step, s.window, s.attempts) for s in saved] == [(k * window, window, 1) for k in (1, 2, 3)]
    assert saved[1].late_parts == saved[2].late_parts == {}
    # Every part but the last is replayed at least once, the first part in each step of the window.
    assert replayed["updates"] > 2 * sum(p.numel() for p in loop.model.parameters()) * 0.3
    assert replayed["kernels"] == ({"momentum"} if kind is torch.optim.SGD else {"adam"})


@pytest.mark.parametrize("limit", [400, 3000])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=["for-loop", "foreach", "fused"])
def test_arrays_of_many_chunks(harness, monkeypatch, limit, implementation):
    """The chunk rule's limits made small: pieces are cut inside chunks, whatever their row length."""
    monkeypatch.setattr("gockpt.core.arena_layout.WHOLE_LIMIT", limit)
    monkeypatch.setattr("gockpt.core.arena_layout.CHUNK_TARGET", limit * 2 // 3)

    def build():
        model = harness.Tensors(
            {
                "odd": torch.randn(90, 7),
                "even": torch.randn(64, 32),
                "flat": torch.randn(5000),
                "turned": torch.randn(40, 30).t(),
            }
        )
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, **implementation)

    def update(model, optimizer, step):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    with harness.closing(), harness.counting() as replayed:
        loop = harness.Loop(build, update, every=5, window=4)
        saved = loop.run(11).finish()
    assert [(s.step, s.attempts) for s in saved] == [(5, 1), (10, 1)]
    assert replayed["updates"] > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0, 1e-42])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=["for-loop", "foreach", "fused"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_special_values_are_replayed_or_leave_at_the_close(harness, kind, implementation, value):
    """NaN and infinite gradients poison parameters; the copy of a poisoned state is as exact."""

    def build():
        model = harness.Tensors({"a": torch.randn(1000), "b": torch.full((600,), value)})
        return model, kind(model.parameters(), lr=0.1, **implementation)

    def update(model, optimizer, step):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
            parameter.grad[::7] = value
            parameter.grad[::11] = 0.0
        optimizer.step()

    with harness.closing():
        loop = harness.Loop(build, update, every=4, window=4)
        saved = loop.run(9).finish()
    assert saved[0].step == 4
    assert saved[-1].attempts <= 2
