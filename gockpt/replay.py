"""Which parameters the kernels can replay, proven on this host before it is believed.

A :class:`Rule` is given out only for torch's own Adam, AdamW and SGD on ordinary float32 CPU tensors, and
only after the real optimizer has run on probe tensors here and a kernel has matched it bit for bit
(:mod:`gockpt.calibration`). For everything else there is a reason, and the tensor leaves at the close.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gockpt import calibration

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Rule", "gradient_reason", "prepare", "rule_for", "scalars"]

_NUMBERS = ("lr", "weight_decay", "eps", "momentum", "dampening")
_SWITCHES = ("foreach", "fused", "amsgrad", "capturable", "differentiable", "decoupled_weight_decay")
_TINY = sys.float_info.min
_NO_BETA = 2.0**-25
"""Up to here ``1 - beta1`` is 1 in float32; torch's vector and scalar code then give zeros other signs."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How one parameter is replayed. Picklable; holds no tensor.

    Attributes:
        kernel: Name of the kernel in ``gockpt.kernels.replay``.
        flags: The kernel's flags, as calibration found them on this host.
        states: Names of the elementwise states, in the kernel's order.
        gradient_at: ``"post"``: the gradient stands in ``.grad`` at the post-hook. ``"pre"``: the step
            overwrites it (foreach SGD with nesterov), so it must be taken at the pre-hook; a step that
            was given a closure can't be replayed then.
        guard: The group options that chose the kernel; when one changes, the rule no longer holds.
    """

    kernel: str
    flags: tuple[int, ...]
    states: tuple[str, ...]
    gradient_at: str
    guard: tuple[Any, ...] = ()


def prepare() -> None:
    """Make the kernels callable in this process. A worker that runs rules made elsewhere calls it once."""
    calibration.register_root()


def rule_for(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], param: Tensor, state: dict[str, Any]
) -> Rule | str:
    """Return how ``param`` is replayed, or the reason why it has to leave at the close.

    The first call for a kind of optimizer calibrates (a fraction of a second; more when kernels have to
    be compiled); later ones look the result up. Random number generators, hooks and autograd's mode are
    left alone.

    Args:
        optimizer: The optimizer whose ``step`` updates ``param``.
        group: The parameter group ``param`` is in, as it is now.
        param: The parameter.
        state: ``optimizer.state[param]``, as it is now.
    """
    reason = (
        _optimizer_reason(optimizer)
        or _options_reason(group)
        or _tensor_reason("the parameter", param)
        or _process_reason()
    )
    if reason:
        return reason
    kernel = _kernel(group)
    names = calibration.STATES[kernel]
    reason = _state_reason(param, state, names, counted="betas" in group)
    if reason:
        return reason
    finding = calibration.finding_for(
        calibration.Case(type(optimizer), kernel, group.get("foreach"), group.get("fused"))
    )
    if isinstance(finding, str):
        return finding
    at = "pre" if finding.overwrites_gradient and calibration.overwriting(group) else "post"
    return Rule(kernel, finding.flags, names, at, _guard(group))


def scalars(rule: Rule, group: dict[str, Any], state: dict[str, Any]) -> tuple[float, ...] | None:
    """Return the numbers of the update that just ran, for the kernel; read at the post-hook.

    ``state["step"]`` has already advanced there. ``None`` when the group's options have changed so that
    ``rule`` does not describe this update: the parameter then leaves at the close.
    """
    if _guard(group) != rule.guard or _options_reason(group):
        return None
    if rule.gradient_at == "post" and group["foreach"] and calibration.overwriting(group):
        return None
    return calibration.row(rule.kernel, group, state)


def gradient_reason(param: Tensor) -> str | None:
    """Return why ``param.grad``, as it is now, can't be replayed; ``None`` when it can."""
    if param.grad is None:
        return "the parameter has no gradient"
    if param.grad.shape != param.shape:
        return f"the gradient's shape {tuple(param.grad.shape)} is not the parameter's {tuple(param.shape)}"
    return _tensor_reason("the gradient", param.grad)


def _kernel(group: dict[str, Any]) -> str:
    if "betas" in group:
        return "amsgrad" if group["amsgrad"] else "adam"
    return "momentum" if group["momentum"] != 0 else "sgd"


def _guard(group: dict[str, Any]) -> tuple[Any, ...]:
    """Return what must stay as it is for a rule to stay true."""
    return (*(group.get(name) for name in _SWITCHES), group.get("momentum", 0) != 0)


def _optimizer_reason(optimizer: torch.optim.Optimizer) -> str | None:
    kind = type(optimizer)
    if kind not in calibration.OPTIMIZERS:
        return f"{kind.__module__}.{kind.__qualname__} is not one of torch's Adam, AdamW and SGD"
    if not calibration.is_torchs_own(kind.step):
        return f"{kind.__name__}.step was replaced on the class"
    patch = optimizer.__dict__.get("step")
    if patch is not None and not calibration.counts_for_scheduler(patch, kind):
        return "step was replaced on the optimizer"
    return None


def _options_reason(group: dict[str, Any]) -> str | None:
    for name in _NUMBERS:
        if name in group and not isinstance(group[name], (int, float)):
            return f"{name} is a {type(group[name]).__name__}, not a Python number"
    if not all(isinstance(beta, (int, float)) for beta in group.get("betas", ())):
        return "betas are not Python numbers"
    if group.get("betas", (1.0,))[0] <= _NO_BETA:
        return (
            "beta1 is (nearly) 0: the signs of zeros then depend on how torch cuts the tensor between threads"
        )
    for name in ("capturable", "differentiable"):
        if group.get(name):
            return f"{name}=True follows other formulas"
    return None


def _tensor_reason(what: str, tensor: Tensor) -> str | None:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"{what} is a {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype != torch.float32:
        return f"{what} is {tensor.dtype} on {tensor.device} ({tensor.layout}), not dense float32 on the CPU"
    if not tensor.is_contiguous() or tensor.is_neg():
        return f"{what} does not lie in memory in row-major order (strides {tensor.stride()})"
    return None


def _state_reason(
    param: Tensor, state: dict[str, Any], names: tuple[str, ...], *, counted: bool
) -> str | None:
    expected = {*names, "step"} if counted else {*names}
    for name in expected:
        value = state.get(name)
        if not isinstance(value, torch.Tensor):
            return f"the optimizer has no {name} for it yet"
        if name == "step":
            if value.numel() != 1 or value.device.type != "cpu":
                return f"step is not one number on the CPU but {tuple(value.shape)} on {value.device}"
            continue
        if value.shape != param.shape:
            return f"{name} has shape {tuple(value.shape)}, the parameter {tuple(param.shape)}"
        reason = _tensor_reason(name, value)
        if reason:
            return reason
    for name, value in state.items():
        if name not in expected and isinstance(value, torch.Tensor):
            return f"the state {name} is not one that these options use"
    return None


def _process_reason() -> str | None:
    """Return why this thread computes unlike the worker's; calibration here would not speak for it."""
    if _TINY * 0.5 == 0.0:
        return "torch.set_flush_denormal(True) is on in this thread"
    return None
