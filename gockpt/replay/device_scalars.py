"""Scalars of an update on a device, for the kernels that follow a device's formulas.

For-loop and foreach compute theirs from Python floats, as on the CPU. The fused kernels compute the powers of
beta by the device's own ``pow``, from a step counter on the device, which can't be read without waiting. So
the known scalars go into a row with gaps, and the powers are copied from the device as small tensors that
fill them.
"""

from __future__ import annotations

from functools import partial
from math import nan
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gockpt.replay import calibration
from gockpt.replay.pending_scalars import PendingScalars

if TYPE_CHECKING:
    from collections.abc import Sequence

    Row = tuple[float, ...]

__all__ = ["POWERS", "filled", "numbers", "numbers_of", "power", "row"]

POWERS = ("single", "single from a tensor", "double")
"""Ways in which a fused kernel may compute a power of beta: float32 of a scalar or a tensor, or float64."""

_LR, _BC1, _BC2S = 3, 6, 7
_STEP = 5


def power(form: str, beta: float, steps: torch.Tensor) -> torch.Tensor:
    """Return ``beta**steps`` as the device computes it. Queued; nothing is waited for."""
    with torch.no_grad():
        if form == "double":
            return torch.pow(beta, steps.double())
        if form == "single":
            return torch.pow(beta, steps)
        return torch.pow(torch.full_like(steps, beta), steps)


def row(kernel: str, form: tuple[int, ...], group: dict[str, Any], state: dict[str, Any]) -> Row:
    """Return an update's scalars as far as the host knows them; NaN for those that only the device has."""
    if kernel in ("cuda_adam", "cuda_amsgrad"):
        return calibration.row("adam", group, state)
    sign = -1.0 if group["maximize"] else 1.0
    wd, lr = float(group["weight_decay"]), _here(group["lr"])
    if kernel in ("cuda_sgd", "cuda_momentum"):
        momentum, nesterov = float(group["momentum"]), float(bool(group["nesterov"]))
        # For an integer 0: Python's -0 is 0, but fused code negates a double.
        step = -lr if group["fused"] else float(-group["lr"])
        keep = 1 - float(group["dampening"])
        if group["fused"] and not form[0]:  # the fused kernel of float32 subtracts in float32
            keep = float(np.float32(1) - np.float32(group["dampening"]))
        return (sign, wd, momentum, keep, nesterov, step)
    beta1, beta2 = (float(beta) for beta in group["betas"])
    coupled, decoupled = (0.0, wd) if group["decoupled_weight_decay"] else (wd, 0.0)
    return (sign, coupled, decoupled, lr, beta1, beta2, nan, nan, float(group["eps"]))


def filled(kernel: str, form: tuple[int, ...], known: Row, powers: Sequence[float], lr: float | None) -> Row:
    """Return the kernel's scalars, with the values that have arrived from the device.

    Args:
        kernel: The kernel.
        form: Its form, as calibration found it.
        known: The result of :func:`row`.
        powers: ``beta1**t`` and ``beta2**t`` for a fused Adam; else nothing.
        lr: The learning rate, if it is on the device; else ``None``.
    """
    numbers = list(known)
    if lr is not None and kernel in ("cuda_sgd", "cuda_momentum"):
        numbers[_STEP] = -lr
    elif lr is not None:
        numbers[_LR] = lr
    if powers:
        kind: Any = np.float64 if form[0] else np.float32
        with np.errstate(all="ignore"):
            first, second = (kind(1) - kind(value) for value in powers)
            numbers[_BC1], numbers[_BC2S] = float(np.float32(first)), float(np.float32(np.sqrt(second)))
    return tuple(numbers)


def numbers(
    kernel: str, form: tuple[int, ...], late: str | None, group: dict[str, Any], state: dict[str, Any]
) -> Row | PendingScalars:
    """Return the scalars of the update that has just been queued, for one parameter."""
    return numbers_of(kernel, form, late, group, [state])[0]


def numbers_of(
    kernel: str,
    form: tuple[int, ...],
    late: str | None,
    group: dict[str, Any],
    states: Sequence[dict[str, Any]],
) -> list[Row] | list[PendingScalars]:
    """Do as :func:`numbers` for several parameters of one group: three launches instead of two for each."""
    rate = group["lr"] if isinstance(group["lr"], torch.Tensor) and group["lr"].device.type != "cpu" else None
    if late is None and rate is None:
        return [row(kernel, form, group, state) for state in states]
    found = []
    columns: list[torch.Tensor] = []
    if late is not None:
        counters = [state["step"].detach().reshape(1) for state in states]
        steps = counters[0] if len(counters) == 1 else torch.cat(counters)
        columns = [power(late, float(beta), steps) for beta in group["betas"]]
    for i, state in enumerate(states):
        tensors = tuple(column[i] for column in columns)
        if rate is not None:
            tensors = (*tensors, rate.detach().reshape(()))
        known = row(kernel, form, group, state)
        found.append(PendingScalars(tensors, partial(_settled, kernel, form, known, rate is not None)))
    return found


def _settled(kernel: str, form: tuple[int, ...], known: Row, with_rate: bool, values: Row) -> Row | None:  # noqa: FBT001
    """Return the kernel's scalars from the arrived values."""
    powers, lr = (values[:-1], values[-1]) if with_rate else (values, None)
    return filled(kernel, form, known, powers, lr)


def _here(lr: Any) -> float:
    """Return a learning rate that can be read without waiting, else NaN."""
    return nan if isinstance(lr, torch.Tensor) and lr.device.type != "cpu" else float(lr)
