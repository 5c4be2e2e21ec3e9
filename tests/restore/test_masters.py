"""Parameters that an optimizer trains outside the model: saved with it, and the resumed run is the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gockpt


def half(*, norms_in_float32=True):
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6))
    for layer in model:
        if not (norms_in_float32 and isinstance(layer, nn.LayerNorm)):
            layer.bfloat16()
    return model


def copies(model, dtype=torch.float32):
    return [param.detach().clone().to(dtype).requires_grad_() for param in model.parameters()]


class Masters:
    """Master copies of each parameter, in one group."""

    def __init__(self, model=None, dtype=torch.float32, kind=torch.optim.AdamW):
        self.model = model or half()
        self.masters = copies(self.model, dtype)
        self.opt = kind(self.masters, lr=0.1)

    def train(self, step):
        generator = torch.Generator().manual_seed(step)
        for param, master in zip(self.model.parameters(), self.masters, strict=True):
            master.grad = torch.randn(param.shape, generator=generator).to(master.dtype)
        self.opt.step()
        self.opt.zero_grad()
        with torch.no_grad():
            for param, master in zip(self.model.parameters(), self.masters, strict=True):
                param.copy_(master)


class Half(Masters):
    """All of the model is in bfloat16."""

    def __init__(self):
        super().__init__(half(norms_in_float32=False))


class SameDtype(Masters):
    """Detached clones of the model's own dtype."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))


class WithoutState(Masters):
    """The optimizer keeps no state that would show that it trains these."""

    def __init__(self):
        super().__init__(kind=torch.optim.SGD)


class Flat(Masters):
    """One flat master copy of everything."""

    def __init__(self):
        self.model = half()
        self.flat = nn.Parameter(torch.cat([part.detach().flatten() for part in copies(self.model)]))
        self.opt = torch.optim.Adam([self.flat], lr=0.1)
        sizes = [param.numel() for param in self.model.parameters()]
        self.masters = self.flat.detach().split(sizes)

    def train(self, step):
        self.flat.grad = torch.randn(self.flat.shape, generator=torch.Generator().manual_seed(step))
        self.opt.step()
        with torch.no_grad():
            for param, part in zip(self.model.parameters(), self.masters, strict=True):
                param.copy_(part.view_as(param))


class Adapters(Masters):
    """Low-rank adapters that no module holds, for a model that still says requires_grad."""

    def __init__(self):
        self.model = nn.Linear(6, 6)
        self.masters = [torch.randn(6, 6, requires_grad=True), torch.randn(6, requires_grad=True)]
        groups = [{"params": [self.masters[0]]}, {"params": [self.masters[1]], "lr": 0.2}]
        self.opt = torch.optim.AdamW(groups, lr=0.1)


@pytest.mark.parametrize("kind", [Masters, Half, SameDtype, WithoutState, Flat, Adapters])
@pytest.mark.parametrize("window", [1, 3])
def test_a_resumed_run_takes_the_same_twenty_steps(kind, window, same, tmp_path):
    run = kind()
    for step in range(1, 4):
        run.train(step)
        options = gockpt.Options(window=window, when_busy="wait")
        gockpt.save_overlapped(run.model, run.opt, tmp_path / "c", step=step, every=3, options=options)
    gockpt.wait()
    kept = copy.deepcopy((run.masters, run.opt.state_dict()))
    other = kind()
    other.train(99)
    gockpt.load(tmp_path / "c", other.model, other.opt)
    same((other.masters, other.opt.state_dict()), kept)
    for step in range(4, 24):
        run.train(step)
        other.train(step)
    same(dict(other.model.state_dict()), dict(run.model.state_dict()))
    same(other.masters, run.masters)


def test_masters_are_arrays_under_a_name_of_their_own(tmp_path):
    run = Masters()
    gockpt.save_overlapped(run.model, run.opt, tmp_path / "c", step=1).result()
    with gockpt.open(tmp_path / "c") as checkpoint:
        assert checkpoint["optimizer/group0.param0/param"].dtype == torch.float32
        assert checkpoint["model/0.weight"].dtype == torch.bfloat16
