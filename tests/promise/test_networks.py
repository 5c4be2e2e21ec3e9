"""Real networks and loops: buffers, tied weights, mixed precision, every optimizer that torch has."""

from __future__ import annotations

import threading
from time import sleep

import pytest
import torch
from torch import nn

import gockpt
from gockpt.staging import host_stager

EVERY, WINDOW = 5, 4
RUN = 2 * EVERY + 1


def run(harness, build, update, **options):
    with harness.closing(), harness.counting() as replayed:
        loop = harness.Loop(build, update, every=EVERY, **{"window": WINDOW, **options})
        saved = loop.run(RUN).finish()
    assert [(s.step, s.attempts) for s in saved] == [(EVERY, 1), (2 * EVERY, 1)]
    return saved, replayed


class Convolutions(nn.Module):
    """BatchNorm buffers, a channels_last weight, an unused parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 8, 3).to(memory_format=torch.channels_last)
        self.unused = nn.Parameter(torch.randn(50))
        self.frozen = nn.Parameter(torch.randn(50), requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x):
        self.calls += 1
        self.scratch.add_(1.0)
        return self.second(torch.relu(self.norm(self.first(x))))


@pytest.mark.parametrize("implementation", [{"foreach": False}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("verify", ["full", "close"])
def test_convolutions_with_batchnorm(harness, implementation, verify):
    def build():
        model = Convolutions()
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, **implementation)

    def update(model, optimizer, step):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()

    saved, replayed = run(harness, build, update, verify=verify)
    assert saved[1].window == WINDOW
    assert replayed["updates"] > 0


def test_buffers_change_in_the_forward_right_after_the_closing_tick(harness):
    """Buffers are due before the next forward, for which there is no hook: copied inside the tick."""

    def build():
        model = nn.Sequential(nn.BatchNorm1d(70_000, affine=False))
        return model, None

    def update(model, optimizer, step):
        model(torch.randn(2, 70_000))

    with harness.closing():
        loop = harness.Loop(build, update)
        for _ in range(4):
            loop.tick()
            loop.model(torch.randn(2, 70_000))
        saved = loop.finish()
    assert [s.step for s in saved] == [1, 2, 3, 4]
    assert all(s.attempts == 1 for s in saved)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 32)
        self.body = nn.Linear(32, 32)
        self.head = nn.Linear(32, 60, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.relu(self.body(self.embed(x))))


def test_tied_weights_are_stored_once_and_found_under_both_names(harness):
    def build():
        model = Tied()
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def update(model, optimizer, step):
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            model(torch.randint(0, 60, (40,))), torch.randint(0, 60, (40,))
        ).backward()
        optimizer.step()

    saved, _ = run(harness, build, update)
    assert not saved[1].late_parts
    assert saved[1].nbytes < 1.2 * 4 * 3 * (60 * 32 + 33 * 32) + 30_000


def test_an_embedding_that_renormalises_in_forward(harness, monkeypatch):
    """max_norm rewrites the weight in forward, after the tick and before the step.

    A copy behind the closing tick would lose that race, all the more over a slow link.
    """
    original = host_stager.copy_fingerprints

    def copy_fingerprints(*args):
        if threading.current_thread() is not threading.main_thread():
            sleep(0.01)
        return original(*args)

    monkeypatch.setattr(host_stager, "copy_fingerprints", copy_fingerprints)

    def build():
        model = nn.Sequential(nn.Embedding(200, 16, max_norm=0.5), nn.Linear(16, 1))
        return model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)

    def update(model, optimizer, step):
        optimizer.zero_grad()
        model(torch.randint(0, 200, (64,))).square().mean().backward()
        optimizer.step()

    with harness.closing():
        loop = harness.Loop(build, update, every=EVERY, window=WINDOW)
        saved = loop.run(RUN).finish()
    assert [s.step for s in saved] == [5, 10]


DTYPES = [torch.bfloat16, torch.float16, torch.float64, torch.float32]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("implementation", [{"foreach": False}, {"foreach": True}])
def test_parameters_of_many_dtypes(harness, kind, implementation):
    def build():
        model = harness.Tensors({f"p_{str(d)[6:]}": torch.randn(700).to(d) for d in DTYPES})
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return model, kind(model.parameters(), lr=0.01, **options, **implementation)

    def update(model, optimizer, step):
        for p in model.parameters():
            p.grad = torch.randn(p.shape).to(p.dtype)
        optimizer.step()

    saved, replayed = run(harness, build, update)
    assert replayed["updates"] > 0
    assert set(saved[1].late_parts) == {"p_bfloat16", "p_float16", "p_float64"}


def test_a_model_with_every_dtype_that_is_stored(harness):
    """Buffers of integers, booleans, complex numbers and eight-bit floats."""
    names = (
        "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 bfloat16 float64 complex64 complex128"
    )
    eights = "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"

    def build():
        model = harness.Tensors({"p": torch.randn(500)})
        for name in (names + " " + eights).split():
            dtype = getattr(torch, name)
            raw = torch.randint(0, 2 if name == "bool" else 256, (24 * dtype.itemsize,), dtype=torch.uint8)
            model.register_buffer(f"b_{name}", raw.view(dtype).view(4, 6))
        return model, torch.optim.AdamW(model.parameters())

    def update(model, optimizer, step):
        model.p.grad = torch.randn(500)
        optimizer.step()
        model.b_int64.add_(1)

    run(harness, build, update)


OTHERS = {
    "Adadelta": {}, "Adagrad": {"lr_decay": 0.01}, "Adamax": {}, "ASGD": {}, "NAdam": {}, "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True}, "Rprop": {}, "Adafactor": {}, "Muon": {},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_optimizers_that_are_not_replayed_leave_at_the_close(harness, name):
    def build():
        model = nn.Sequential(nn.Linear(30, 40, bias=False), nn.Linear(40, 20, bias=False))
        return model, getattr(torch.optim, name)(model.parameters(), lr=0.01, **OTHERS[name])

    def update(model, optimizer, step):
        optimizer.zero_grad()
        model(torch.randn(8, 30)).square().mean().backward()
        optimizer.step()

    saved, replayed = run(harness, build, update)
    assert replayed["updates"] == 0
    assert all(s.window == 1 for s in saved)


def test_lbfgs_with_its_closure(harness):
    def build():
        model = nn.Linear(20, 10)
        return model, torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, history_size=3)

    def update(model, optimizer, step):
        x = torch.randn(8, 20)

        def closure():
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    with harness.closing():
        loop = harness.Loop(build, update, every=EVERY, window=WINDOW)
        loop.run(RUN)
        gockpt.wait()
        saved = [h.result(30) for h in loop.handles]
        assert [(s.step, s.attempts) for s in saved] == [(5, 1), (10, 1)]
        for result in saved:
            # Its state holds lists of tensors, which have no name of their own in state_dict().
            harness.check_load(loop.path, loop.moments[result.step], *build())


def test_sparse_gradients(harness):
    def build():
        model = nn.Embedding(100, 8, sparse=True)
        return model, torch.optim.SparseAdam(model.parameters(), lr=0.01)

    def update(model, optimizer, step):
        optimizer.zero_grad()
        model(torch.randint(0, 100, (16,))).square().sum().backward()
        optimizer.step()

    run(harness, build, update)


def test_sparse_gradients_with_sgd(harness):
    """A supported optimizer, but a gradient that is not: found when it comes."""

    def build():
        model = nn.Embedding(100, 8, sparse=True)
        return model, torch.optim.SGD(model.parameters(), lr=0.01)

    def update(model, optimizer, step):
        optimizer.zero_grad()
        model(torch.randint(0, 100, (16,))).square().sum().backward()
        optimizer.step()

    saved, replayed = run(harness, build, update)
    assert replayed["updates"] == 0
    assert saved[0].late_parts


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("implementation", [{"foreach": False}, {"fused": True}])
def test_gradient_scaling_with_skipped_steps(harness, implementation, unscale):
    """GradScaler: fused steps unscale inside, skip inside; others are not even called."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    def build():
        model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 20))
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, **implementation)

    def update(model, optimizer, step):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(8, 30)).square().mean()).backward()
        if step in (3, 5, 8):
            next(model.parameters()).grad[0, 0] = float("inf")
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    with harness.closing(), harness.counting() as replayed:
        loop = harness.Loop(build, update, every=EVERY, window=WINDOW, extra={"scaler": scaler})
        loop.run(RUN)
        saved = loop.finish()
    assert [(s.step, s.attempts) for s in saved] == [(5, 1), (10, 1)]
    assert saved[1].window == WINDOW
    assert not saved[1].late_parts
    assert replayed["updates"] > 0


def test_accumulation_clipping_and_autocast(harness):
    def build():
        model = nn.Sequential(nn.Linear(30, 40), nn.LayerNorm(40), nn.Linear(40, 20))
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)

    def update(model, optimizer, step):
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(torch.randn(8, 30)).square().mean()
            (loss / 4).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    saved, _ = run(harness, build, update)
    assert not saved[1].late_parts


def test_gradients_as_views_of_one_flat_buffer(harness):
    """As DDP's gradient_as_bucket_view: memory that is overwritten although grads are set to None."""

    def build():
        model = harness.Tensors({"a": torch.randn(500), "b": torch.randn(20, 30)})
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    flat = torch.zeros(1100)

    def update(model, optimizer, step):
        flat.copy_(torch.randn(1100))
        model.a.grad, model.b.grad = flat[:500], flat[500:].view(20, 30)
        optimizer.step()
        optimizer.zero_grad()
        flat.fill_(float("nan"))

    saved, _ = run(harness, build, update)
    assert not saved[1].late_parts


def test_parameters_as_views_of_one_flat_buffer(harness):
    def build():
        flat = torch.randn(1103)
        model = harness.Tensors({"a": flat[3:503], "b": flat[503:].view(20, 30)})
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def update(model, optimizer, step):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()

    saved, _ = run(harness, build, update)
    assert not saved[1].late_parts


def test_a_mapping_of_tensors(harness):
    def build():
        tensors = {"w": torch.randn(600, requires_grad=True), "mean": torch.zeros(600)}
        return tensors, torch.optim.AdamW([tensors["w"]], lr=0.1)

    def update(tensors, optimizer, step):
        tensors["w"].grad = torch.randn(600)
        optimizer.step()
        tensors["mean"].lerp_(tensors["w"].detach(), 0.1)

    saved, _ = run(harness, build, update)
    assert saved[1].window == WINDOW


def test_lists_of_models_with_one_optimizer(harness):
    def build():
        models = [nn.Linear(20, 30), nn.Linear(30, 20)]
        return models, torch.optim.AdamW([p for m in models for p in m.parameters()], lr=0.1)

    def update(models, optimizer, step):
        optimizer.zero_grad()
        models[1](models[0](torch.randn(4, 20))).square().mean().backward()
        optimizer.step()

    saved, _ = run(harness, build, update)
    assert not saved[1].late_parts


def test_an_averaged_model_beside_the_trained_one(harness):
    """torch's own EMA: a second module, updated after each step, saved with the first."""

    def build():
        model = nn.Linear(40, 30)
        averaged = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        return [model, averaged], torch.optim.AdamW(model.parameters(), lr=0.1)

    def update(models, optimizer, step):
        optimizer.zero_grad()
        models[0](torch.randn(4, 40)).square().mean().backward()
        optimizer.step()
        models[1].update_parameters(models[0])

    run(harness, build, update)


def test_stride_of_the_steps(harness):
    """The step counts samples or micro-batches: due is when a multiple of every was passed."""

    def build():
        model = harness.Tensors({"a": torch.randn(900)})
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def update(model, optimizer, step):
        model.a.grad = torch.randn(900)
        optimizer.step()

    with harness.closing():
        loop = harness.Loop(build, update, every=500, stride=64, window=4)
        saved = loop.run(24).finish()
    assert [s.step for s in saved] == [512, 1024, 1536]
    assert [s.window for s in saved] == [4, 4, 4]


def test_the_automatic_window_and_interval(harness):
    def build():
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def update(model, optimizer, step):
        optimizer.zero_grad()
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()

    with harness.closing():
        for every in (7, "auto"):
            loop = harness.Loop(build, update, every=every, window="auto", when_busy="skip")
            saved = loop.run(40).finish()
            assert saved
            assert all(s.exact and s.attempts == 1 for s in saved)
