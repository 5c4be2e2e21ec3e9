"""Windows off a device whose own formulas are followed: found by trying its optimizer, as a save does it."""

from __future__ import annotations

import pytest
import torch

from gockpt.replay import calibration_cuda
from gockpt.replay import rules as replay
from gockpt.replay.calibration_runs import step_on
from gockpt.saving import write_items

EVERY = 6


class OnCpu:
    """torch's own optimizers on this host's CPU, as if it were a device.

    SGD follows the formulas there that it has on CUDA, but for the fused one's; Adam does not.
    """

    device = torch.device("cpu")
    key = ("torch", "on the CPU")

    def refusal(self):
        return None

    def update(self, *args):
        return step_on(self.device, *args)


@pytest.fixture
def rules(monkeypatch):
    """Let cuts ask the laboratory; return what they got."""
    monkeypatch.setattr(calibration_cuda, "_findings", {})
    monkeypatch.setattr(write_items, "lab_for", lambda device: OnCpu())
    real, got = replay.rule_for, []

    def rule_for(*args):
        got.append(real(*args))
        return got[-1]

    monkeypatch.setattr(replay, "rule_for", rule_for)
    return got


@pytest.mark.parametrize("worker", ["thread", "process"])
@pytest.mark.parametrize(
    ("kind", "kernel"), [("sgd", "cuda_sgd"), ("momentum", "cuda_momentum"), ("overwriting", "cuda_momentum")]
)
def test_a_devices_own_formulas_are_followed(devices, runs, rules, kind, kernel, worker):
    run = runs.Run(kind, worker=worker).ticks(2 * EVERY)
    saved = run.finish()
    assert [(s.window, s.attempts, set(s.late_parts)) for s in saved[1:]] == 2 * [(4, 1, {"odd"})]
    assert {rule.kernel for rule in rules if isinstance(rule, replay.Rule)} == {kernel}


def test_where_no_formula_fits_all_leaves_at_the_close(devices, runs, rules):
    saved = runs.Run("adam").ticks(2 * EVERY).finish()
    assert [(s.window, s.attempts) for s in saved[1:]] == 2 * [(1, 1)]
    assert any("no kernel equals Adam" in rule for rule in rules)
    assert not any(isinstance(rule, replay.Rule) for rule in rules)
