"""Calibration believes nothing: wrong formulas are thrown out, and the user's world is left alone."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gockpt.kernels import mkl_sqrt
from gockpt.kernels import replay as kernels
from gockpt.replay import calibration
from gockpt.replay.calibration import CANDIDATES, Case, Finding, calibrate

ADAMW, SGD = torch.optim.AdamW, torch.optim.SGD


@pytest.fixture(autouse=True)
def _root():
    calibration.register_root()


def wrong(case: Case) -> list[tuple[int, int]]:
    """All candidates but the one that calibration accepts."""
    found = calibration.finding_for(case)
    assert isinstance(found, Finding), found
    return [flags for flags in CANDIDATES[case.kernel] if flags != found.flags]


@pytest.mark.parametrize(
    "case",
    [
        Case(ADAMW, "adam", foreach=None, fused=True),
        Case(ADAMW, "amsgrad", foreach=None, fused=True),
        Case(ADAMW, "adam", foreach=False, fused=None),
        Case(ADAMW, "adam", foreach=True, fused=None),
        Case(SGD, "momentum", foreach=None, fused=True),
        Case(SGD, "momentum", foreach=None, fused=None),
    ],
    ids=str,
)
def test_every_other_candidate_is_rejected(case):
    assert "no kernel equals" in calibrate(case, wrong(case))


@pytest.mark.parametrize("victim", ["p", "state"])
@pytest.mark.parametrize("kernel", ["adam", "momentum"])
def test_one_wrong_bit_is_rejected(monkeypatch, kernel, victim):
    right = kernels.run

    def almost(name, flags, p, states, grads, scalars, *, tail):
        right(name, flags, p, states, grads, scalars, tail=tail)
        if p.size == 4099 and scalars[0][0] < 0:  # only the updates that maximize
            (p if victim == "p" else states[-1]).view(np.uint32)[4098] ^= 1

    case = Case(ADAMW if kernel == "adam" else SGD, kernel, foreach=None, fused=True)
    accepted = calibration.finding_for(case)
    monkeypatch.setattr(kernels, "run", almost)
    assert isinstance(calibrate(case, [accepted.flags]), str)


def test_without_mkl_nothing_that_needs_it_is_believed():
    known = mkl_sqrt.known()
    mkl_sqrt.use(None)
    try:
        found = calibrate(Case(ADAMW, "adam", foreach=False, fused=None), [(0, 1)])
    finally:
        mkl_sqrt.use(*known)
    assert isinstance(found, str)


def test_the_users_world_is_left_alone():
    calls = []
    hooks = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("post")),
    ]
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    try:
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                for case in (
                    Case(ADAMW, "adam", foreach=None, fused=True),
                    Case(SGD, "momentum", foreach=None, fused=None),
                ):
                    assert isinstance(calibrate(case, CANDIDATES[case.kernel]), Finding)
                assert torch.is_grad_enabled() is grad
    finally:
        for hook in hooks:
            hook.remove()
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert not calls


def test_it_works_under_other_defaults():
    case = Case(ADAMW, "adam", foreach=None, fused=None)
    expected = calibrate(case, CANDIDATES["adam"])
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode():
            assert calibrate(case, CANDIDATES["adam"]) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_each_kind_is_measured_once(monkeypatch):
    monkeypatch.setattr(calibration, "_findings", {})
    asked = []

    def count(case, candidates):
        asked.append(case)
        return Finding(candidates[0], overwrites_gradient=False)

    monkeypatch.setattr(calibration, "calibrate", count)
    cases = [Case(ADAMW, "adam", foreach=None, fused=f) for f in (None, True)]
    for case in cases * 3:
        calibration.finding_for(case)
    assert asked == cases


def test_on_another_instruction_set_it_is_right_or_refused():
    # Torch's portable build rounds elsewhere (no fused multiply-add): nothing may claim to equal it.
    script = """
        import torch
        from gockpt.replay.calibration import OPTIMIZERS, STATES, Case, Finding, calibrate, finding_for
        from gockpt.kernels import replay

        print(torch.backends.cpu.get_cpu_capability())
        for kind in OPTIMIZERS:
            for kernel in ("sgd", "momentum") if kind is torch.optim.SGD else ("adam", "amsgrad"):
                for fused in (False, True):
                    print(isinstance(finding_for(Case(kind, kernel, None, fused)), Finding))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    active, *found = done.stdout.split()
    assert (active, found) == ("DEFAULT", ["False"] * 12)


def test_replay_starts_no_threads_of_its_own():
    # MKL would, for long vectors; a child forked later from such a process hangs.
    script = """
        import os
        import numpy as np, torch
        from gockpt.replay.rules import prepare
        from gockpt.kernels.replay import run

        prepare()
        tasks = len(os.listdir("/proc/self/task"))
        arrays = [np.ones(1 << 20, np.float32) for _ in range(4)]
        row = (1, 0, 1, .1, .9, .1, 1, 1e-8, -1)
        run("adam", (0, 1), arrays[0], arrays[1:3], arrays[3:], [row], tail=True)
        print(len(os.listdir("/proc/self/task")) - tasks)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == "0\n"


ALONE = """
import os, threading
import numpy as np
import torch
from gockpt.kernels import replay as kernels
from gockpt.replay import rules

# From this call on, MKL starts threads even for short vectors.
torch.set_num_threads(2)
p = torch.nn.Parameter(torch.randn(100_000))
optimizer = torch.optim.AdamW([p], foreach=False)
p.grad = torch.randn_like(p)
optimizer.step()
group, state = optimizer.param_groups[0], optimizer.state[p]
rule = rules.rule_for(optimizer, group, p, state)
assert rule.flags == (0, 1), rule
row = rules.scalars(rule, group, state)
arrays = [t.detach().numpy().copy() for t in (p, state["exp_avg"], state["exp_avg_sq"], p.grad)]

def threads():
    return {int(name) for name in os.listdir("/proc/self/task")}

def work():
    before = threads()
    kernels.run(rule.kernel, rule.flags, arrays[0], arrays[1:3], arrays[3:], [row], tail=True)
    print(len(threads() - before))

for _ in range(2):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
"""


def test_replay_with_mkls_root_starts_no_threads():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["0", "0"], "")
