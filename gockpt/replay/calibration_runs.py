"""Trial updates of a device's optimizers, on arrays copied from the host and back.

A :class:`Lab` only returns the device's results; :mod:`gockpt.replay.calibration_cuda` compares them with
formulas. In tests another one simulates a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch

from gockpt.replay.calibration import STATES, make, without_hooks
from gockpt.replay.device_scalars import POWERS, power

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    import numpy as np

    from gockpt.replay.calibration import Case

__all__ = ["CudaLab", "Lab", "Seen", "lab_for"]


@dataclass(frozen=True, slots=True)
class Seen:
    """Results of one update.

    Attributes:
        arrays: For each parameter itself and its states, in the kernel's order.
        gradients: The values of ``.grad`` afterwards.
        powers: ``beta1**t`` and ``beta2**t`` of the counter after the update, for each of ``POWERS``; empty
            where the counter is not on the device.
    """

    arrays: list[list[np.ndarray]]
    gradients: list[np.ndarray]
    powers: dict[str, tuple[float, ...]]


class Lab(Protocol):
    """One device to try an optimizer on."""

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""

    @property
    def key(self) -> Hashable:
        """Everything that the results depend on, except the kind of optimizer. Comparable and printable."""

    def refusal(self) -> str | None:
        """Return why no update can be tried now, or ``None``."""

    def update(
        self,
        case: Case,
        options: dict[str, Any],
        step: float,
        before: Sequence[Sequence[np.ndarray]],
        gradients: Sequence[np.ndarray],
    ) -> Seen:
        """Let the real optimizer take one step.

        Args:
            case: Which optimizer.
            options: Group options to set, beside the case's.
            step: What the counter says before the update, for optimizers that count.
            before: For each parameter the parameter and its states, in the kernel's order.
            gradients: One for each parameter.
        """


class CudaLab:
    """A CUDA device, or a ROCm one. See :class:`Lab`.

    Works on a stream of its own with a few megabytes: what training has queued goes on, and is not waited
    for. Uses no random numbers; users' hooks don't see its steps.
    """

    def __init__(self, device: torch.device) -> None:
        """Use ``device``, with an index."""
        self._device = device
        name = torch.cuda.get_device_name(device)
        capability = torch.cuda.get_device_capability(device)
        runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        self._key = (f"torch {torch.__version__}", runtime, name, capability)
        self._stream: torch.cuda.Stream | None = None

    @property
    def device(self) -> torch.device:
        """The device."""
        return self._device

    @property
    def key(self) -> Hashable:
        """Versions, and what the device is."""
        return self._key

    def refusal(self) -> str | None:
        """Return a reason while a graph is being captured."""
        with torch.cuda.device(self._device):
            if torch.cuda.is_current_stream_capturing():
                return "a CUDA graph is being captured"
        return None

    def update(
        self,
        case: Case,
        options: dict[str, Any],
        step: float,
        before: Sequence[Sequence[np.ndarray]],
        gradients: Sequence[np.ndarray],
    ) -> Seen:
        """Step on the device, and bring everything back."""
        if self._stream is None:
            stream: torch.cuda.Stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._stream = stream
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream), torch.no_grad():
            return step_on(self._device, case, options, step, before, gradients)


def step_on(
    device: torch.device,
    case: Case,
    options: dict[str, Any],
    step: float,
    before: Sequence[Sequence[np.ndarray]],
    gradients: Sequence[np.ndarray],
) -> Seen:
    """Let torch's own optimizer take one step on ``device``; see :meth:`Lab.update`."""

    def there(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.copy()).to(device)

    names = STATES[case.kernel]
    tensors = [there(arrays[0]) for arrays in before]
    optimizer = make(case, tensors)
    update = without_hooks(case.optimizer)
    for tensor in tensors:  # the first step makes the states, which are then filled
        tensor.grad = torch.zeros_like(tensor)
    update(optimizer)
    group = optimizer.param_groups[0]
    group.update(options)
    states = [optimizer.state[tensor] for tensor in tensors]
    for tensor, state, arrays, gradient in zip(tensors, states, before, gradients, strict=True):
        for target, array in zip((tensor, *(state[name] for name in names)), arrays, strict=True):
            target.copy_(there(array))
        if "step" in state:
            state["step"].fill_(step)
        tensor.grad = there(gradient)
    update(optimizer)
    powers = {}
    if "betas" in group and group["fused"]:
        counter = states[0]["step"]
        powers = {
            form: tuple(float(power(form, float(beta), counter)) for beta in group["betas"])
            for form in POWERS
        }
    return Seen(
        [
            [t.cpu().numpy() for t in (tensor, *(state[name] for name in names))]
            for tensor, state in zip(tensors, states, strict=True)
        ],
        [_gradient(tensor, gradient) for tensor, gradient in zip(tensors, gradients, strict=True)],
        powers,
    )


def _gradient(tensor: torch.Tensor, given: np.ndarray) -> np.ndarray:
    # A gradient that is gone counts as changed.
    return given[:0] if tensor.grad is None else tensor.grad.cpu().numpy()


@lru_cache(maxsize=64)
def lab_for(device: torch.device) -> Lab | None:
    """Return the lab of ``device``; ``None`` for a device that isn't a CUDA one."""
    return CudaLab(device) if device.type == "cuda" and torch.cuda.is_available() else None
