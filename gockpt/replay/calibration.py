"""Calibration on the CPU: finds the replay kernel that equals an optimizer of the installed torch.

Every formula is only a candidate. Once per process and kind of optimizer the real ``step`` runs on probe
tensors of awkward sizes, with zeros, denormals and overflowing gradients and with options that change at
every update; a candidate is accepted if the parameters and all states are bit-equal after each of them.
"""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gockpt.kernels import mkl_sqrt
from gockpt.kernels import replay as kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "OPTIMIZERS",
    "STATES",
    "Case",
    "Finding",
    "calibrate",
    "counts_for_scheduler",
    "finding_for",
    "is_torchs_own",
    "make",
    "overwriting",
    "probe",
    "register_root",
    "row",
    "without_hooks",
]

OPTIMIZERS: tuple[type[torch.optim.Optimizer], ...] = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)

SHAPES = ((), (1,), (7,), (15,), (16,), (23,), (31,), (39,), (5, 11), (1000,), (4099,), (65543,))
"""Around and between vector widths, and one that torch splits between threads."""

UPDATES = 9
"""The first makes the states; the others are compared."""

STATES: dict[str, tuple[str, ...]] = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "amsgrad": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "sgd": (),
    "momentum": ("momentum_buffer",),
}
"""Kernel -> the elementwise states it updates, in its order, by torch's names."""

CANDIDATES: dict[str, tuple[tuple[int, int], ...]] = {
    "adam": ((0, 1), (8, 0), (0, 0), (16, 0), (4, 0)),
    "amsgrad": ((0, 1), (8, 0), (0, 0), (16, 0), (4, 0)),
    "sgd": ((0, 0),),
    "momentum": ((0, 0), (8, 0), (16, 0), (4, 0)),
}
"""Flags to try for each kernel: (vector width whose scalar tail rounds differently, MKL's square root)."""


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of optimizer to calibrate.

    Attributes:
        optimizer: One of :data:`OPTIMIZERS`.
        kernel: A key of :data:`STATES`: which states it keeps.
        foreach: The group's option as it stands; ``None`` lets torch choose.
        fused: Likewise.
    """

    optimizer: type[torch.optim.Optimizer]
    kernel: str
    foreach: bool | None
    fused: bool | None

    def __str__(self) -> str:
        return f"{self.optimizer.__name__}(foreach={self.foreach}, fused={self.fused})"


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of calibration for one kind of optimizer.

    Attributes:
        flags: The flags with which the kernel equals torch.
        overwrites_gradient: Whether the step changed ``.grad`` for nesterov without decay or maximize.
    """

    flags: tuple[int, int]
    overwrites_gradient: bool


_findings: dict[tuple[Case, str], Finding | str] = {}
_lock = threading.Lock()


def _after_fork() -> None:
    """In a forked child: another thread of the parent may have held the lock."""
    global _lock  # noqa: PLW0603 - every use reads it from the module
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def finding_for(case: Case) -> Finding | str:
    """Return the finding for an optimizer on this host, or why no kernel equals it. Made once per process.

    Takes a few hundredths of a second when the kernels are compiled. Never raises: an optimizer that can't be
    run on probes is not replayed.
    """
    key = (case, torch.backends.cpu.get_cpu_capability())
    if kernels.WHY_NOT:
        return f"kernels are not compiled: {kernels.WHY_NOT}"
    with _lock:
        if key not in _findings:
            register_root()
            try:
                _findings[key] = calibrate(case, CANDIDATES[case.kernel])
            except Exception as error:  # noqa: BLE001 - whatever it is, the tensors leave at the close
                _findings[key] = f"{case} can't be run on probe tensors: {error}"
        return _findings[key]


def register_root() -> None:
    """Tell the kernels where MKL's square root is, if this torch has one."""
    if mkl_sqrt.address():
        return
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        if mkl_sqrt.load(str(library)):
            return


def is_torchs_own(step: Callable[..., Any]) -> bool:
    """Whether ``step`` and everything it wraps was written in torch's own optimizer files."""
    home = torch.optim.__file__.removesuffix("__init__.py")
    layer: Any = step
    while layer is not None:
        code = getattr(layer, "__code__", None)
        if code is None or not code.co_filename.startswith(home):
            return False
        layer = getattr(layer, "__wrapped__", None)
    return True


def counts_for_scheduler(step: Any, kind: type[torch.optim.Optimizer]) -> bool:
    """Whether an instance's ``step`` is the counter that torch's learning-rate schedulers put there."""
    code = getattr(step, "__code__", None)
    home = torch.optim.lr_scheduler.__file__
    return code is not None and code.co_filename == home and getattr(step, "__wrapped__", None) is kind.step


def row(kernel: str, group: dict[str, Any], state: dict[str, Any]) -> tuple[float, ...]:
    """Return one update's scalars for ``kernel``, as torch derives them from the group's options.

    In Python floats (float64), like torch; the kernel rounds each to float32 once, like torch.
    ``state["step"]`` already counts the update.
    """
    sign = -1.0 if group["maximize"] else 1.0
    lr, wd = group["lr"], float(group["weight_decay"])
    if kernel in ("sgd", "momentum"):
        momentum, nesterov = float(group["momentum"]), float(bool(group["nesterov"]))
        # For an integer 0: Python's -0 is 0, but fused code negates a double.
        step = -float(lr) if group["fused"] else float(-lr)
        return (sign, wd, momentum, 1 - float(group["dampening"]), nesterov, step)
    beta1, beta2 = (float(beta) for beta in group["betas"])
    step = float(state["step"])
    first, second = 1 - beta1**step, 1 - beta2**step
    root = math.sqrt(second) if group["fused"] else second**0.5
    decay, coupled = (1 - lr * wd, 0.0) if group["decoupled_weight_decay"] else (1.0, wd)
    return (sign, coupled, decay, 1 - beta1, beta2, 1 - beta2, root, float(group["eps"]), -(lr / first))


def calibrate(case: Case, candidates: Sequence[tuple[int, int]]) -> Finding | str:
    """Run the real optimizer on probes and return which of the candidate flags equals it throughout.

    Touches no global state: probes come from a generator of their own, hooks are not run, and torch's
    step restores autograd's mode itself.
    """
    generator = np.random.default_rng(20)
    tensors = [torch.from_numpy(probe(generator, shape, scale=0.05)) for shape in SHAPES]
    optimizer = make(case, tensors)
    group, step = optimizer.param_groups[0], without_hooks(case.optimizer)
    left = [_Copies(case.kernel, flags) for flags in candidates if mkl_sqrt.address() or not flags[1]]
    overwrites = False
    for update in range(UPDATES):
        _change_options(group, case.kernel, update)
        gradients = [probe(generator, shape, scale=1e-3) for shape in SHAPES]
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = torch.from_numpy(gradient.copy())
        step(optimizer)
        changed = any(
            tensor.grad is None or not _same(tensor.grad.numpy(), gradient)
            for tensor, gradient in zip(tensors, gradients, strict=True)
        )
        if changed and not overwriting(group):
            return f"{case} changes the gradients it is given"
        overwrites |= changed
        live = [_arrays(case.kernel, tensor, optimizer.state[tensor]) for tensor in tensors]
        if update == 0:
            for copies in left:
                copies.take(live)
            continue
        scalars = row(case.kernel, group, optimizer.state[tensors[0]])
        left = [copies for copies in left if copies.follow(live, gradients, scalars)]
    if not left:
        capability = torch.backends.cpu.get_cpu_capability()
        return f"no kernel equals {case} of torch {torch.__version__} ({capability}) on this host"
    return Finding(left[0].flags, overwrites)


def overwriting(group: dict[str, Any]) -> bool:
    """Whether these options let foreach SGD add its look-ahead into ``.grad`` itself, for want of a copy."""
    return bool(group.get("nesterov")) and group["weight_decay"] == 0 and not group["maximize"]


class _Copies:
    """One candidate's own parameters and states, replayed beside the real ones."""

    def __init__(self, kernel: str, flags: tuple[int, int]) -> None:
        self.kernel = kernel
        self.flags = flags
        self.arrays: list[list[np.ndarray]] = []

    def take(self, live: list[list[np.ndarray]]) -> None:
        """Start from the optimizer's current values."""
        self.arrays = [[array.copy() for array in arrays] for arrays in live]

    def follow(
        self, live: list[list[np.ndarray]], gradients: list[np.ndarray], scalars: tuple[float, ...]
    ) -> bool:
        """Replay one update; return whether everything equals the optimizer's current values."""
        for (p, *states), real, gradient in zip(self.arrays, live, gradients, strict=True):
            flat = gradient.reshape(-1)
            kernels.run(self.kernel, self.flags, p, states, [flat], [scalars], tail=True)
            if not all(_same(mine, theirs) for mine, theirs in zip((p, *states), real, strict=True)):
                return False
        return True


def _arrays(kernel: str, tensor: torch.Tensor, state: dict[str, Any]) -> list[np.ndarray]:
    """Return flat views of a parameter and its states, in the kernel's order."""
    return [t.numpy().reshape(-1) for t in (tensor, *(state[name] for name in STATES[kernel]))]


def make(case: Case, tensors: list[torch.Tensor]) -> torch.optim.Optimizer:
    """Build a real optimizer over the probes."""
    build: Callable[..., torch.optim.Optimizer] = case.optimizer
    options: dict[str, Any] = {"lr": 1e-3, "foreach": case.foreach, "fused": case.fused}
    if case.kernel == "momentum":
        options["momentum"] = 0.9
    if case.kernel == "amsgrad":
        options["amsgrad"] = True
    return build(tensors, **options)


def without_hooks(kind: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """Return torch's ``step`` below the layer that runs hooks: users' global hooks must not see probes."""
    step: Callable[..., Any] = kind.step
    hooked = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__
    while step.__code__ is hooked:
        step = step.__wrapped__  # type: ignore[attr-defined]
    return step


def _change_options(group: dict[str, Any], kernel: str, update: int) -> None:
    """Give every update other numbers and switches; over the updates, all that change the formula occur."""
    group["lr"] = 1e-3 * (1 + 0.3 * update)
    group["weight_decay"] = (0, 0.1, 0.01)[update % 3]
    group["maximize"] = update in (3, 4)
    if kernel in ("adam", "amsgrad"):
        group["betas"] = ((0.9, 0.999), (0.4, 0.99), (0.5, 0.9))[update // 2 % 3]
        group["eps"] = (1e-8, 1e-6)[update % 2]
    elif kernel == "momentum":
        group["momentum"] = (0.9, 0.5)[update % 2]
        group["nesterov"] = update > 4
        group["dampening"] = 0.0 if group["nesterov"] else (0.0, 0.3)[update % 2]


def probe(generator: np.random.Generator, shape: tuple[int, ...], *, scale: float) -> np.ndarray:
    """Return log-normal values of both signs with zeros, denormals and values whose squares overflow."""
    values = np.exp(generator.normal(size=shape) * 3) * generator.choice((-scale, scale), size=shape)
    lot = generator.random(shape)
    for i, special in enumerate((0.0, -0.0, 1e-41, -1e-39, 1e25)):
        values = np.where((lot >= i * 0.01) & (lot < (i + 1) * 0.01), special, values)
    return np.asarray(values, np.float32)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.array_equal(a.view(np.uint32), b.view(np.uint32)))
