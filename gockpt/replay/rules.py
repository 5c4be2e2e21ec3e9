"""Replay rules: the choice of the kernel for each parameter, verified on this host or device first.

A :class:`Rule` is returned only for torch's own Adam, AdamW and SGD on ordinary float32 tensors, and only
after the real optimizer has run on probe tensors and a kernel has matched it bit for bit: on this host for
tensors on the CPU (:mod:`gockpt.replay.calibration`), on the very kind of device for others
(:mod:`gockpt.replay.calibration_cuda`). Everything else gets a reason, and is copied at the closing tick.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gockpt.kernels.replay import FORMS
from gockpt.replay import calibration, calibration_cuda, device_scalars

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from gockpt.replay.calibration_runs import Lab
    from gockpt.replay.pending_scalars import PendingScalars

__all__ = ["Rule", "gradient_reason", "prepare", "rule_for", "scalars", "scalars_of"]

_NUMBERS = ("lr", "weight_decay", "eps", "momentum", "dampening")
_SWITCHES = ("foreach", "fused", "amsgrad", "capturable", "differentiable", "decoupled_weight_decay")
_CPU = torch.device("cpu")
_TINY = sys.float_info.min
_NO_BETA = 2.0**-25
"""Up to here ``1 - beta1`` is 1 in float32; torch's vector and scalar code then give zeros other signs."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Rule by which one parameter is replayed. Picklable; holds no tensor.

    Attributes:
        kernel: Name of the kernel in ``gockpt.kernels.replay``.
        flags: The kernel's flags, as calibration found them on this host.
        states: Names of the elementwise states, in the kernel's order.
        gradient_at: ``"post"``: the gradient is in ``.grad`` at the post-hook. ``"pre"``: the step
            overwrites it (foreach SGD with nesterov), so it must be taken at the pre-hook; a step that
            was given a closure can't be replayed then.
        guard: The group options that chose the kernel; if one changes, the rule no longer holds.
        late: Scalars of an update that only the device has, see :mod:`gockpt.replay.device_scalars`.
        overwrites: On a device: whether the step overwrites ``.grad`` under options that allow it.
    """

    kernel: str
    flags: tuple[int, ...]
    states: tuple[str, ...]
    gradient_at: str
    guard: tuple[Any, ...] = ()
    late: str | None = None
    overwrites: bool = False

    @property
    def follows_device(self) -> bool:
        """Whether its formulas are a device's."""
        return self.kernel in FORMS


def prepare() -> None:
    """Make the kernels callable in this process. A worker that runs rules made elsewhere calls it once."""
    calibration.register_root()


def rule_for(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    param: Tensor,
    state: dict[str, Any],
    lab: Lab | None = None,
) -> Rule | str:
    """Return the rule of ``param``, or the reason why it has to be copied at the closing tick.

    The first call for a kind of optimizer calibrates (a fraction of a second; more when kernels have to
    be compiled); later ones look the result up. Random number generators, hooks and autograd's mode are
    left alone. Not to be called in a hook, since it may run the optimizer on probes.

    Args:
        optimizer: The optimizer whose ``step`` updates ``param``.
        group: The parameter group ``param`` is in, as it is now.
        param: The parameter.
        state: ``optimizer.state[param]``, as it is now.
        lab: The lab of the parameter's device; ``None`` for the CPU's formulas.
    """
    if lab is not None:
        return _rule_on(lab, optimizer, group, param, state)
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


def _rule_on(
    lab: Lab,
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    param: Tensor,
    state: dict[str, Any],
) -> Rule | str:
    """Do as :func:`rule_for` for a parameter on the lab's device."""
    reason = (
        _optimizer_reason(optimizer)
        or _options_reason(group, lab.device)
        or _tensor_reason("the parameter", param, lab.device)
        or _group_reason(group, lab.device)
        or _process_reason()
    )
    if reason:
        return reason
    kernel = _kernel(group)
    names = calibration.STATES[kernel]
    counter = lab.device if group["fused"] else _CPU
    reason = _state_reason(
        param, state, names, counted="betas" in group, device=lab.device, counter_on=counter
    )
    if reason:
        return reason
    case = calibration.Case(type(optimizer), kernel, group.get("foreach"), group.get("fused"))
    found = calibration_cuda.finding_for(case, lab)
    if isinstance(found, str):
        return found
    at = "pre" if found.overwrites_gradient and calibration.overwriting(group) else "post"
    candidate = found.candidate
    return Rule(
        candidate.kernel, candidate.form, names, at, _guard(group), candidate.late, found.overwrites_gradient
    )


def scalars(
    rule: Rule, group: dict[str, Any], state: dict[str, Any]
) -> tuple[float, ...] | PendingScalars | None:
    """Return the scalars of the update that just ran, for the kernel; read at the post-hook.

    ``state["step"]`` has already advanced there. If some of them are still on a device, pending scalars are
    returned instead, without waiting. ``None`` if the group's options have changed so that ``rule`` does not
    describe this update: the parameter is then copied at the closing tick.
    """
    if rule.follows_device:
        return _scalars_on_device(rule, group, state)
    if _guard(group) != rule.guard or _options_reason(group):
        return None
    if rule.gradient_at == "post" and group["foreach"] and calibration.overwriting(group):
        return None
    return calibration.row(rule.kernel, group, state)


def scalars_of(
    rule: Rule, group: dict[str, Any], states: Sequence[dict[str, Any]]
) -> list[tuple[float, ...] | PendingScalars | None]:
    """Do as :func:`scalars` for several parameters of one group with the same rule, in fewer launches."""
    counters = [state.get("step") for state in states]
    alike = {
        (counter.device, counter.dtype) if isinstance(counter, torch.Tensor) else None for counter in counters
    }
    changed = any(_changed(rule, group, state) for state in states) if rule.late is not None else True
    if changed or len(states) < 2 or len(alike) > 1 or None in alike:
        return [scalars(rule, group, state) for state in states]
    return list(device_scalars.numbers_of(rule.kernel, rule.flags, rule.late, group, states))


def _scalars_on_device(
    rule: Rule, group: dict[str, Any], state: dict[str, Any]
) -> tuple[float, ...] | PendingScalars | None:
    if _changed(rule, group, state):
        return None
    return device_scalars.numbers(rule.kernel, rule.flags, rule.late, group, state)


def _changed(rule: Rule, group: dict[str, Any], state: dict[str, Any]) -> bool:
    """Whether the group's options are such that a rule of a device does not describe the update."""
    counter = state.get("step")
    device = counter.device if rule.late is not None and isinstance(counter, torch.Tensor) else None
    if isinstance(group["lr"], torch.Tensor) and group["lr"].device.type != "cpu":
        device = group["lr"].device
    if _guard(group) != rule.guard or _options_reason(group, device or _CPU):
        return True
    return rule.gradient_at == "post" and rule.overwrites and calibration.overwriting(group)


def gradient_reason(param: Tensor) -> str | None:
    """Return why ``param.grad``, as it is now, can't be replayed; ``None`` when it can."""
    if param.grad is None:
        return "the parameter has no gradient"
    if param.grad.shape != param.shape:
        return f"the gradient's shape {tuple(param.grad.shape)} is not the parameter's {tuple(param.shape)}"
    return _tensor_reason("the gradient", param.grad, param.device)


def _kernel(group: dict[str, Any]) -> str:
    if "betas" in group:
        return "amsgrad" if group["amsgrad"] else "adam"
    return "momentum" if group["momentum"] != 0 else "sgd"


def _guard(group: dict[str, Any]) -> tuple[Any, ...]:
    """Return the options that must not change while a rule holds."""
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


def _options_reason(group: dict[str, Any], device: torch.device | None = None) -> str | None:
    """Return why these options are not replayed; ``device`` is the one whose formulas are followed."""
    for name in _NUMBERS:
        if name == "lr" and device is not None and group["fused"] and _is_rate(group["lr"], device):
            continue
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


def _is_rate(lr: Any, device: torch.device) -> bool:
    """Whether a fused step on ``device`` takes it for its learning rate."""
    if not isinstance(lr, torch.Tensor) or lr.numel() != 1:
        return False
    return lr.device.type == "cpu" or (lr.device == device and lr.dtype == torch.float32)


def _group_reason(group: dict[str, Any], device: torch.device) -> str | None:
    """Return why torch may treat this parameter otherwise because of others in its group.

    Where it is left to torch, it takes foreach only if it can take it for all of them.
    """
    if group.get("foreach") is None and group.get("fused") is None:
        for other in group["params"]:
            if type(other) not in (torch.Tensor, torch.nn.Parameter) or other.device != device:
                return f"its parameter group holds a {type(other).__name__} on {other.device}, too"
    return None


def _tensor_reason(what: str, tensor: Tensor, device: torch.device = _CPU) -> str | None:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"{what} is a {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.device != device or tensor.dtype != torch.float32:
        where = "the CPU" if device.type == "cpu" else device
        return f"{what} is {tensor.dtype} on {tensor.device} ({tensor.layout}), not dense float32 on {where}"
    if not tensor.is_contiguous() or tensor.is_neg():
        return f"{what} does not lie in memory in row-major order (strides {tensor.stride()})"
    return None


def _state_reason(
    param: Tensor,
    state: dict[str, Any],
    names: tuple[str, ...],
    *,
    counted: bool,
    device: torch.device = _CPU,
    counter_on: torch.device = _CPU,
) -> str | None:
    expected = {*names, "step"} if counted else {*names}
    for name in expected:
        value = state.get(name)
        if not isinstance(value, torch.Tensor):
            return f"the optimizer has no {name} for it yet"
        if name == "step":
            if value.numel() != 1 or value.device != counter_on:
                where = "the CPU" if counter_on.type == "cpu" else counter_on
                return f"step is not one number on {where} but {tuple(value.shape)} on {value.device}"
            continue
        if value.shape != param.shape:
            return f"{name} has shape {tuple(value.shape)}, the parameter {tuple(param.shape)}"
        reason = _tensor_reason(name, value, device)
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
