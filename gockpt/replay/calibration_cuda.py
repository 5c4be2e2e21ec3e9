"""Calibration on a CUDA device: finds the replay kernel that equals the device's optimizers.

A formula is used for a device only after a trial on it: once per process and kind of device and optimizer,
the real one takes a few steps there on probes, and every candidate formula is compared bit for bit, on the
parameters and all states. The probes have zeros, denormals, infinities and NaN, and some where terms cancel,
so that only rounding errors remain: these separate formulas that hardly differ otherwise.

Two NaN count as equal whatever their bits: kernels return CUDA's, other vendors have others. If a run's NaN
differ, the verification at the closing tick finds that.
"""

from __future__ import annotations

import itertools
import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gockpt.kernels import replay as kernels
from gockpt.replay.calibration import overwriting, probe
from gockpt.replay.device_scalars import filled, row

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from gockpt.replay.calibration import Case
    from gockpt.replay.calibration_runs import Lab, Seen

__all__ = ["Candidate", "Difference", "Found", "calibrate", "candidates", "diagnose", "finding_for"]

SHAPES = ((), (1,), (7,), (16,), (5, 11), (1000,), (4099,), (65543,))
"""Aligned and not, and one that is split between blocks. The delicate probe comes after these."""

SECTION = 2048
"""Elements of one kind of cancellation."""

STEPS = (1, 2, 3, 10, 99, 5, 3000, 20, 600, 12345)
"""Counters before the updates; one for each."""

BETAS = (
    *((0.9, 0.999), (0.9, 0.999), (0.4, 0.99), (0.4, 0.99), (0.5, 0.9999)),
    *((0.5, 0.9), (0.95, 0.9999), (0.95, 0.98), (0.9, 0.999), (0.8, 0.99999)),
)
"""Likewise: powers that are still far from zero, so that their last bits count."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Candidate formula for a device's update.

    Attributes:
        kernel: A kernel of ``gockpt.kernels.replay``.
        form: Its form.
        late: Where the powers of beta come from: one of ``device_numbers.POWERS``, or ``None`` for the host.
    """

    kernel: str
    form: tuple[int, ...]
    late: str | None


@dataclass(frozen=True, slots=True)
class Found:
    """Result of calibration for one kind of optimizer on one kind of device.

    Attributes:
        candidate: The candidate that equals it.
        overwrites_gradient: Whether the step changed ``.grad`` for nesterov without decay or maximize.
    """

    candidate: Candidate
    overwrites_gradient: bool


@dataclass(slots=True)
class Difference:
    """Difference between a candidate and a device, over all probes.

    Attributes:
        candidate: The candidate.
        elements: Number of elements that differ, of each array: the parameter, then the states.
        ulps: Greatest difference in units in the last place, of elements finite in both.
        nans: Number of NaN with other bits; these don't count as different.
    """

    candidate: Candidate
    elements: list[int] = field(default_factory=list)
    ulps: list[int] = field(default_factory=list)
    nans: int = 0


_findings: dict[tuple[Case, Hashable], Found | str] = {}
_lock = threading.Lock()


def _after_fork() -> None:
    """In a forked child: another thread of the parent may have held the lock."""
    global _lock  # noqa: PLW0603 - every use reads it from the module
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def candidates(case: Case) -> list[Candidate]:
    """Return the candidates for an optimizer on a device, the likeliest first."""
    if case.kernel in ("sgd", "momentum"):
        name = f"cuda_{case.kernel}"
        forms = _forms(name, ((0, 1, 1), (1, 1, 1)))
        # Without a buffer, its form changes nothing.
        return [Candidate(name, form, None) for form in forms if case.kernel == "momentum" or form[1] == 1]
    if not case.fused:
        name = f"cuda_{case.kernel}"
        return [Candidate(name, form, None) for form in _forms(name, ((0, 0, 0), (0, 1, 0)))]
    name = f"cuda_fused_{case.kernel}"
    # As torch 2.13 has it; in float64 as older ones have it; and in between.
    forms = _forms(name, ((0, 0, 0, 1), (1, 1, 1, 1), (1, 0, 0, 1)))
    return [
        Candidate(name, form, late)
        for form in forms
        for late in (("double",) if form[0] else ("single", "single from a tensor"))
    ]


def finding_for(case: Case, lab: Lab) -> Found | str:
    """Return the finding for an optimizer on the lab's device, or why no candidate equals it.

    Measured once per process and kind of device. Never raises: an optimizer that can't be run on probes is
    not replayed. Not to be called in a hook: it runs the optimizer.
    """
    key = (case, lab.key)
    if kernels.WHY_NOT:
        return f"kernels are not compiled: {kernels.WHY_NOT}"
    try:
        with _lock:
            if key in _findings:
                return _findings[key]
            reason = lab.refusal()
            if reason:
                return f"{case} can't be tried out: {reason}"
            found = _findings[key] = calibrate(case, lab, candidates(case))
            return found
    except torch.OutOfMemoryError as error:  # next time there may be room
        return f"{case} can't be tried out: {error}"
    except Exception as error:  # noqa: BLE001 - whatever it is, the tensors leave at the close
        with _lock:
            return _findings.setdefault(key, f"{case} can't be run on probe tensors: {error}")


def calibrate(case: Case, lab: Lab, among: Sequence[Candidate]) -> Found | str:
    """Run the real optimizer on probes and return which of the candidates equals it throughout."""
    left = list(among)
    overwrites = False
    for trial in _trials(case, lab):
        changed = trial.changed_gradients()
        if changed and not overwriting(trial.group):
            return f"{case} changes the gradients it is given"
        overwrites |= changed
        left = [candidate for candidate in left if trial.equals(candidate)]
        if not left:
            break
    if not left:
        return f"no kernel equals {case} on {lab.device} ({', '.join(map(str, _flat(lab.key)))})"
    return Found(left[0], overwrites)


def diagnose(case: Case, lab: Lab, among: Sequence[Candidate]) -> list[Difference]:
    """Return each candidate's difference from the device, for the search of the right one."""
    found = [Difference(candidate) for candidate in among]
    for trial in _trials(case, lab):
        for difference in found:
            trial.measure(difference)
    return found


@dataclass(frozen=True, slots=True)
class _Trial:
    """One update on the device, with its inputs."""

    group: dict[str, Any]
    step: float
    before: list[list[np.ndarray]]
    gradients: list[np.ndarray]
    seen: Seen

    def changed_gradients(self) -> bool:
        pairs = zip(self.gradients, self.seen.gradients, strict=True)
        return any(given.shape != now.shape or not _same(given, now).all() for given, now in pairs)

    def equals(self, candidate: Candidate) -> bool:
        return all(_same(mine, theirs).all() for _, mine, theirs in self._pairs(candidate))

    def measure(self, difference: Difference) -> None:
        for index, mine, theirs in self._pairs(difference.candidate):
            if index == len(difference.elements):
                difference.elements.append(0)
                difference.ulps.append(0)
            difference.elements[index] += int((~_same(mine, theirs)).sum())
            difference.ulps[index] = max(difference.ulps[index], _ulps(mine, theirs))
            bits = mine.view(np.uint32) != theirs.view(np.uint32)
            difference.nans += int((bits & np.isnan(mine) & np.isnan(theirs)).sum())

    def _pairs(self, candidate: Candidate) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Go through the arrays as the candidate has them and as the device has them."""
        numbers = row(candidate.kernel, candidate.form, self.group, {"step": self.step + 1})
        if candidate.late is not None:
            powers = self.seen.powers[candidate.late]
            numbers = filled(candidate.kernel, candidate.form, numbers, powers, None)
        for arrays, gradient, after in zip(self.before, self.gradients, self.seen.arrays, strict=True):
            mine = [array.reshape(-1).copy() for array in arrays]
            g = gradient.reshape(-1)
            kernels.run(candidate.kernel, candidate.form, mine[0], mine[1:], [g], [numbers], tail=True)
            for index, (array, theirs) in enumerate(zip(mine, after, strict=True)):
                yield index, array, theirs.reshape(-1)


def _trials(case: Case, lab: Lab) -> Iterator[_Trial]:
    """Let the device take its updates, one by one."""
    generator = np.random.default_rng(20)
    for update, step in enumerate(STEPS):
        options = _options(case, update)
        group = {"foreach": case.foreach, "fused": case.fused, **options}
        before = [_arrays(case.kernel, generator, shape) for shape in SHAPES]
        gradients = [probe(generator, shape, scale=1e-3) for shape in SHAPES]
        delicate, gradient = _delicate(case.kernel, generator, options)
        before.append(delicate)
        gradients.append(gradient)
        if update == len(STEPS) - 1:
            for array in (*before[-2], gradients[-2]):
                at = generator.integers(0, array.size, (3, 40))
                for places, special in zip(at, (np.inf, -np.inf, np.nan), strict=True):
                    array[places] = special
        seen = lab.update(case, options, step, before, gradients)
        yield _Trial(group, step, before, gradients, seen)


def _options(case: Case, update: int) -> dict[str, Any]:
    """Return one update's options; over the updates, all that change the formula occur."""
    options: dict[str, Any] = {
        "lr": 1e-3 * (1 + 0.3 * update),
        "weight_decay": (0, 0.1, 0.013)[update % 3],
        "maximize": update in (3, 4),
    }
    if case.kernel in ("adam", "amsgrad"):
        options["betas"] = BETAS[update]
        options["eps"] = (1e-8, 1e-6)[update % 2]
        options["decoupled_weight_decay"] = update % 2 == 0
        if update == 8:  # all that is left of a parameter is what was rounded off
            options |= {"lr": 0.7, "weight_decay": 1 / 0.7}
    elif case.kernel == "momentum":
        options["momentum"] = (0.9, 0.7)[update % 2]
        options["nesterov"] = update > 4
        options["dampening"] = 0.0 if update > 4 else (0.3, 0.9)[update % 2]
    else:
        options |= {"momentum": 0, "nesterov": False, "dampening": 0}
    return options


def _arrays(kernel: str, generator: np.random.Generator, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Return a parameter and its states."""
    p = probe(generator, shape, scale=0.05)
    if kernel == "sgd":
        return [p]
    first = probe(generator, shape, scale=1e-3)
    if kernel == "momentum":
        return [p, first]
    squares = [np.asarray(np.abs(probe(generator, shape, scale=1e-6))) for _ in range(2)]
    return [p, first, *squares[: 2 if kernel == "amsgrad" else 1]]


def _delicate(
    kernel: str, generator: np.random.Generator, options: dict[str, Any]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Return a parameter with states and its gradient where terms of an update cancel, section by section."""
    wd, sign = float(options["weight_decay"]), -1.0 if options["maximize"] else 1.0

    def some(scale: float) -> np.ndarray:
        values: np.ndarray = generator.normal(size=SECTION) * scale
        return values.astype(np.float32).astype(np.float64)

    none = np.zeros(SECTION)
    sections: list[tuple[np.ndarray, ...]]
    if kernel in ("adam", "amsgrad"):
        b1, b2 = options["betas"]
        m, g, p = some(1e-3), some(1e-3), some(0.05)
        against = 0.0 if options["decoupled_weight_decay"] else wd
        sections = [
            # (p, m, v, top, g): the first moment vanishes; the decayed gradient; the second; all but decay.
            (none, m, some(1e-8) ** 2, none, -sign * m * b1 / (1 - b1)),
            (p, none, none, none, -sign * against * p),
            (none, m, -(1 - b2) / b2 * g * g, none, g),
            (p, none, none, none, none),
        ]
        count = {"adam": 3, "amsgrad": 4}[kernel]
    else:
        momentum, keep = float(options["momentum"]), 1 - float(options["dampening"])
        buffer, g, p = some(1e-3), some(1e-3), some(0.05)
        new = momentum * buffer + keep * g if momentum else g
        ahead = g + momentum * new if options["nesterov"] else new
        sections = [
            # (p, buffer, g): the momentum vanishes; the decayed gradient; the look-ahead; the parameter.
            (none, buffer, -sign * buffer * momentum / keep),
            (p, none, -sign * wd * p),
            (none, (-g / momentum - keep * g) / momentum if momentum else none, sign * g),
            (options["lr"] * ahead, buffer, sign * g),
        ]
        count = {"sgd": 1, "momentum": 2}[kernel]
    arrays = [np.concatenate(parts).astype(np.float32) for parts in zip(*sections, strict=True)]
    return arrays[:count], arrays[-1]


def _forms(kernel: str, first: tuple[tuple[int, ...], ...]) -> list[tuple[int, ...]]:
    """Return all forms of a kernel, some of them first."""
    every = itertools.product(*map(range, kernels.FORMS[kernel]))
    return [*first, *(form for form in every if form not in first)]


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    equal: np.ndarray = (a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))
    return equal


def _ulps(a: np.ndarray, b: np.ndarray) -> int:
    """Return the largest distance between finite values, counted in float32 numbers."""
    finite = np.isfinite(a) & np.isfinite(b)
    if not finite.any():
        return 0
    places = []
    for values in (a[finite], b[finite]):
        bits = values.view(np.int32).astype(np.int64)
        places.append(np.where(bits < 0, -(bits & 0x7FFFFFFF), bits))
    return int(np.abs(places[0] - places[1]).max())


def _flat(key: Hashable) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else (key,)
