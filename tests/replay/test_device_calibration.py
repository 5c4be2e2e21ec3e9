"""A device's formulas are found by trying them, on a laboratory that stands in for the device."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gockpt.replay import calibration_cuda
from gockpt.replay.calibration import Case
from gockpt.replay.calibration_cuda import Candidate, Found, calibrate, candidates, diagnose, finding_for
from gockpt.replay.calibration_runs import lab_for, step_on

ADAM, ADAMW, SGD = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD
CASES = [
    Case(ADAMW, "adam", foreach=None, fused=None),
    Case(ADAM, "amsgrad", foreach=False, fused=None),
    Case(ADAMW, "adam", foreach=None, fused=True),
    Case(ADAM, "amsgrad", foreach=None, fused=True),
    Case(SGD, "sgd", foreach=None, fused=True),
    Case(SGD, "momentum", foreach=True, fused=None),
]


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    monkeypatch.setattr(calibration_cuda, "_findings", {})


def name(value):
    return f"{value.kernel}-{value}" if isinstance(value, Case) else None


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_formula_that_a_device_follows_is_found_among_all(simulated_lab, case):
    every = candidates(case)
    for truth in [every[0], *every[1 :: max(1, len(every) // 6)]]:
        assert calibrate(case, simulated_lab(truth), every) == Found(truth, overwrites_gradient=False)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_no_other_formula_passes_for_it(simulated_lab, case):
    every = candidates(case)
    for truth in (every[0], every[1], every[-1]):
        others = [candidate for candidate in every if candidate != truth]
        found = calibrate(case, simulated_lab(truth), others)
        assert isinstance(found, str), found
        assert "no kernel equals" in found
        assert "on cpu (simulated)" in found


@pytest.mark.parametrize("array", [0, 1, 2])
@pytest.mark.parametrize("update", [1, 7, 10])
def test_one_wrong_bit_is_rejected(simulated_lab, update, array):
    def spoil(number, after):
        if number == update:
            after[-2][array].view(np.uint32)[4098] ^= 1

    case = CASES[2]
    lab = simulated_lab(candidates(case)[0], change=spoil)
    assert isinstance(finding_for(case, lab), str)


def test_powers_from_elsewhere_are_rejected(simulated_lab):
    # The formula is right, but beta**t is off by one in the last place, and only for large t.
    case = CASES[2]
    truth = candidates(case)[0]
    assert truth.late == "single"
    lab = simulated_lab(truth)

    def update(case, options, step, *args):
        seen = simulated_lab.update(lab, case, options, step, *args)
        if step >= 3000:
            nearby = (np.nextafter(np.float32(power), np.float32(2)) for power in seen.powers["single"])
            seen.powers["single"] = tuple(float(power) for power in nearby)
        return seen

    assert isinstance(calibrate(case, lab, [truth]), Found)
    lab.update = update
    assert isinstance(calibrate(case, lab, [truth]), str)


def test_nan_of_other_bits_count_as_equal_and_are_counted(simulated_lab):
    def other_nan(_, after):
        for arrays in after:
            for array in arrays:
                array.view(np.uint32)[np.isnan(array)] = 0xFFC00000

    case = CASES[0]
    truth = candidates(case)[0]
    assert isinstance(calibrate(case, simulated_lab(truth, change=other_nan), [truth]), Found)
    (difference,) = diagnose(case, simulated_lab(truth, change=other_nan), [truth])
    assert (difference.elements, difference.ulps) == ([0, 0, 0], [0, 0, 0])
    assert difference.nans > 0

    def none(_, after):
        for arrays in after:
            arrays[0][np.isnan(arrays[0])] = 0

    assert isinstance(calibrate(case, simulated_lab(truth, change=none), [truth]), str)


def test_a_diagnosis_says_which_array_is_off_and_how_far(simulated_lab):
    case = CASES[0]
    truth = candidates(case)[0]
    other = Candidate(truth.kernel, (1, 0, 0), None)  # the second moment is rounded elsewhere
    right, wrong = diagnose(case, simulated_lab(truth), [truth, other])
    assert (right.elements, right.ulps, right.nans) == ([0, 0, 0], [0, 0, 0], 0)
    p, first, second = wrong.elements
    assert (first, p > 0, second > 1000) == (0, True, True)
    assert wrong.ulps[2] > 0


def test_each_kind_of_device_and_optimizer_is_measured_once(simulated_lab):
    case, other = CASES[0], CASES[4]
    lab = simulated_lab(candidates(case)[0])
    found = finding_for(case, lab)
    assert isinstance(found, Found)
    updates = lab.updates
    assert finding_for(case, lab) == found
    twin = simulated_lab(lab.truth)
    assert finding_for(case, twin) == found
    assert (lab.updates, twin.updates) == (updates, 0)
    elsewhere = simulated_lab(candidates(case)[1], key="another")
    assert finding_for(case, elsewhere) == Found(candidates(case)[1], overwrites_gradient=False)
    assert isinstance(finding_for(other, simulated_lab(candidates(other)[0])), Found)


def test_what_is_refused_now_is_tried_later(simulated_lab):
    case = CASES[0]
    lab = simulated_lab(candidates(case)[0])
    lab.reason = "a graph is being captured"
    assert "can't be tried out: a graph is being captured" in finding_for(case, lab)
    assert lab.updates == 0
    lab.reason = None
    assert isinstance(finding_for(case, lab), Found)


def test_without_memory_it_is_tried_later(simulated_lab):
    case = CASES[0]
    lab = simulated_lab(candidates(case)[0])

    def full(*_):
        raise torch.OutOfMemoryError("nothing left")

    lab.update = full
    assert "nothing left" in finding_for(case, lab)
    del lab.update
    assert isinstance(finding_for(case, lab), Found)


def test_what_raises_is_a_reason_and_remembered(simulated_lab):
    case = CASES[0]
    lab = simulated_lab(candidates(case)[0])

    def broken(*_):
        raise ValueError("no such thing")

    lab.update = broken
    reason = finding_for(case, lab)
    assert "can't be run on probe tensors: no such thing" in reason
    del lab.update
    assert finding_for(case, lab) == reason
    assert lab.updates == 0


def test_changed_gradients_are_noticed(simulated_lab):
    case = Case(SGD, "momentum", foreach=True, fused=None)
    truth = candidates(case)[0]
    lab = simulated_lab(truth)
    lab.overwrites = True
    assert calibrate(case, lab, [truth]) == Found(truth, overwrites_gradient=True)

    def always(*args):
        seen = simulated_lab.update(lab, *args)
        seen.gradients[0][...] += 1
        return seen

    lab.update = always
    assert "changes the gradients" in calibrate(case, lab, [truth])


class OnCpu:
    """torch's own optimizers on this host's CPU, as if it were a device."""

    device = torch.device("cpu")
    key = ("torch", "on the CPU")

    def refusal(self):
        return None

    def update(self, *args):
        return step_on(self.device, *args)


def test_a_real_optimizer_is_run_and_recognised():
    # On the CPU for-loop and foreach SGD happen to follow the formulas that they have on CUDA.
    for foreach in (False, True):
        case = Case(SGD, "momentum", foreach=foreach, fused=None)
        truth = Candidate("cuda_momentum", (0, 1, 1), None)
        assert finding_for(case, OnCpu()) == Found(truth, overwrites_gradient=foreach)
    assert finding_for(Case(SGD, "sgd", foreach=None, fused=None), OnCpu()) == Found(
        Candidate("cuda_sgd", (0, 1, 1), None), overwrites_gradient=False
    )
    # Others don't: Adam's moments are rounded in other places.
    for case in CASES[:4]:
        assert "no kernel equals" in finding_for(case, OnCpu())


def test_what_is_given_is_where_the_update_begins():
    case = CASES[2]
    options = {"betas": (0.9, 0.999), "lr": 0.5, "weight_decay": 0.25, "eps": 1e-8}
    before = [[np.full(3, value, np.float32) for value in (2.0, 0.5, 0.25)]]
    zero = np.zeros(3, np.float32)
    seen = step_on(torch.device("cpu"), case, options, 41.0, before, [zero])
    ((p, first, second),) = seen.arrays
    assert seen.powers["double"] == pytest.approx((0.9**42, 0.999**42), rel=1e-12)
    assert (first[0], second[0]) == pytest.approx((0.45, 0.24975))
    root = 0.24975**0.5 / (1 - 0.999**42) ** 0.5
    assert p.tolist() == pytest.approx([2 * (1 - 0.5 * 0.25) - 0.5 / (1 - 0.9**42) * 0.45 / root] * 3)
    assert before[0][0].tolist() == [2.0] * 3  # what was given is left alone


def test_the_users_world_is_left_alone():
    calls = []
    hooks = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("post")),
    ]
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    torch.set_default_dtype(torch.float64)
    try:
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                for case in (Case(SGD, "momentum", foreach=None, fused=None), CASES[2]):
                    calibration_cuda._findings.clear()
                    finding_for(case, OnCpu())
                assert torch.is_grad_enabled() is grad
        with torch.device("meta"), torch.inference_mode():
            calibration_cuda._findings.clear()
            found = finding_for(Case(SGD, "momentum", foreach=None, fused=None), OnCpu())
            assert isinstance(found, Found), found
    finally:
        torch.set_default_dtype(torch.float32)
        for hook in hooks:
            hook.remove()
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert not calls


def test_there_is_no_laboratory_for_other_devices():
    assert lab_for(torch.device("cpu")) is None
    assert lab_for(torch.device("meta")) is None
