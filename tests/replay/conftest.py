"""A small training loop without a model, and what its updates must be replayed to."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from gockpt.kernels import reference_cuda_rounding
from gockpt.kernels import replay as kernels
from gockpt.replay import calibration, device_scalars
from gockpt.replay import rules as replay
from gockpt.replay.calibration_runs import Seen

IMPLEMENTATIONS = {
    "default": {},
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def gradient(
    rng: np.random.Generator, shape: tuple[int, ...], *, wild: bool = False, scale: float = 1e-3
) -> np.ndarray:
    """Log-normal values of both signs, zeros and denormals; if wild, overflowing ones as well."""
    values = np.exp(rng.normal(size=shape) * 2) * rng.choice((-scale, scale), size=shape)
    lot = rng.integers(0, 50, shape)
    for i, special in enumerate((0.0, -0.0, 1e-41, 1e25) if wild else (0.0, -0.0, 1e-41)):
        values = np.where(lot == i, special, values)
    return np.asarray(values, np.float32)


@dataclass
class Run:
    """A real optimizer that is stepped, and a recording of what replay needs.

    Attributes:
        optimizer: The real one, over one parameter per shape.
        start: Parameter and states, flat, when :meth:`start_recording` was called; by parameter.
        gradients: What each recorded update consumed, flat; by parameter.
        rows: Each recorded update's scalars; by parameter.
    """

    optimizer: torch.optim.Optimizer
    rules: list[Any] = field(default_factory=list)
    start: list[list[np.ndarray]] = field(default_factory=list)
    gradients: list[list[np.ndarray]] = field(default_factory=list)
    rows: list[list[tuple[float, ...]]] = field(default_factory=list)

    @property
    def group(self) -> dict[str, Any]:
        """The first group."""
        return self.optimizer.param_groups[0]

    @property
    def owned(self) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """Every parameter with its group, in the optimizer's order."""
        return [(group, p) for group in self.optimizer.param_groups for p in group["params"]]

    def arrays(self, i: int) -> list[np.ndarray]:
        """The live parameter and its states in the rule's order, flat."""
        _, p = self.owned[i]
        tensors = (p.detach(), *(self.optimizer.state[p][name] for name in self.rules[i].states))
        return [t.numpy().reshape(-1) for t in tensors]

    def start_recording(self) -> None:
        self.rules = [
            replay.rule_for(self.optimizer, group, p, self.optimizer.state[p]) for group, p in self.owned
        ]
        for rule in self.rules:
            assert isinstance(rule, replay.Rule), rule
        self.start = [[a.copy() for a in self.arrays(i)] for i in range(len(self.owned))]
        self.gradients = [[] for _ in self.owned]
        self.rows = [[] for _ in self.owned]

    def step(self, gradients: list[np.ndarray]) -> None:
        for (_, p), g in zip(self.owned, gradients, strict=True):
            p.grad = torch.from_numpy(g.copy())
        self.optimizer.step()
        for i, (rule, (group, p)) in enumerate(zip(self.rules, self.owned, strict=False)):
            consumed = gradients[i] if rule.gradient_at == "pre" else p.grad.numpy()
            self.gradients[i].append(consumed.reshape(-1).copy())
            row = replay.scalars(rule, group, self.optimizer.state[p])
            assert row is not None
            self.rows[i].append(row)

    def check(self, i: int = 0, *, cuts: tuple[int, ...] = (), nan_bits: bool = True) -> None:
        """Replay parameter ``i`` in one pass, in pieces cut at ``cuts``, and compare all bits."""
        rule, live = self.rules[i], self.arrays(i)
        mine = [a.copy() for a in self.start[i]]
        n = mine[0].size
        edges = sorted({0, n, *(c for c in cuts if 0 < c < n)})
        for a, b in itertools.pairwise(edges):
            p, *states = (x[a:b] for x in mine)
            grads = [g[a:b] for g in self.gradients[i]]
            kernels.run(rule.kernel, rule.flags, p, states, grads, self.rows[i], tail=b == n)
        for name, got, expected in zip(("p", *rule.states), mine, live, strict=True):
            same = got.view(np.uint32) == expected.view(np.uint32)
            if not nan_bits:
                same |= np.isnan(got) & np.isnan(expected)
            bad = np.flatnonzero(~same)
            assert not bad.size, f"{name} of {n}: {bad.size} differ, first at {bad[:5]}"


@pytest.fixture(scope="session")  # stateless: safe to share between examples
def make():
    """Return the builder of a stepped optimizer: ``make(kind, implementation, shapes, **options)``."""

    def build(
        kind: str,
        implementation: str,
        shapes: list[tuple[int, ...]],
        *,
        seed: int = 0,
        steps: int = 1,
        **options,
    ) -> Run:
        rng = np.random.default_rng(seed)
        params = [torch.nn.Parameter(torch.from_numpy(gradient(rng, shape, scale=0.05))) for shape in shapes]
        run = Run(getattr(torch.optim, kind)(params, lr=1e-3, **IMPLEMENTATIONS[implementation], **options))
        for _ in range(steps):
            run.step([gradient(rng, shape) for shape in shapes])
        return run

    return build


@pytest.fixture(scope="session")  # stateless: safe to share between examples
def draw_gradient():
    return gradient


class SimulatedLab:
    """A device that is not there: it follows one formula, in plain NumPy, and has a ``pow`` of its own.

    Its tensors stand on the CPU.
    """

    device = torch.device("cpu")

    def __init__(self, truth, key="simulated", change=None):
        """Follow ``truth``; ``change`` may spoil what an update did."""
        self.truth = truth
        self.key = key
        self.change = change
        self.updates = 0
        self.reason = None
        self.overwrites = False

    def refusal(self):
        return self.reason

    def power(self, form, beta, step):
        """No power is the host's, and no two ways give the same."""
        if form == "double":
            return float(np.nextafter(beta**step, 0.0))
        single = np.nextafter(np.float32(beta) ** np.float32(step), np.float32(0))
        return float(single if form == "single" else np.nextafter(single, np.float32(0)))

    def numbers(self, group, step):
        truth = self.truth
        known = device_scalars.row(truth.kernel, truth.form, group, {"step": step})
        if truth.kernel == "cuda_momentum" and group["fused"] and not truth.form[0]:
            known = (*known[:3], float(np.float32(1) - np.float32(group["dampening"])), *known[4:])
        if truth.late is None:
            return known
        powers = [self.power(truth.late, beta, step) for beta in group["betas"]]
        return device_scalars.filled(truth.kernel, truth.form, known, powers, None)

    def apply(self, arrays, gradient, numbers):
        """Update the flat arrays, the parameter first."""
        kernel = self.truth.kernel
        formula = reference_cuda_rounding.adam
        if kernel in ("cuda_sgd", "cuda_momentum"):
            formula = reference_cuda_rounding.sgd
        elif kernel.startswith("cuda_fused"):
            formula = reference_cuda_rounding.fused_adam
        formula(arrays[0], arrays[1:], gradient, numbers, self.truth.form)

    def update(self, case, options, step, before, gradients):
        self.updates += 1
        group = {"foreach": case.foreach, "fused": case.fused, **options}
        numbers = self.numbers(group, step + 1)
        after = []
        for arrays, gradient in zip(before, gradients, strict=True):
            mine = [array.reshape(-1).copy() for array in arrays]
            self.apply(mine, gradient.reshape(-1), numbers)
            after.append(mine)
        if self.change is not None:
            self.change(self.updates, after)
        powers = {
            form: tuple(self.power(form, beta, step + 1) for beta in options.get("betas", ()))
            for form in device_scalars.POWERS
        }
        left = [g.copy() for g in gradients]
        if self.overwrites and calibration.overwriting(group):
            left = [g + np.float32(1) for g in gradients]
        return Seen(after, left, powers)


@pytest.fixture(scope="session")  # a class
def simulated_lab():
    return SimulatedLab
