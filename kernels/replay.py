"""Replay optimizer updates on CPU memory: one entry for all kernels.

Contract: :func:`run` leaves in ``p`` and ``states`` the bits that K single updates would, whatever the
number of pieces the tensor was cut into, and never writes to a gradient.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np

from gockpt.kernels import adam_cuda_rounding_numba, mkl_sqrt, sgd_cuda_rounding_numba
from gockpt.kernels import adam_numba as adam_file
from gockpt.kernels import sgd_numba as sgd_file
from gockpt.kernels.numba_compile import WHY_NOT, address_of

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ALIGNMENT", "FORMS", "SHAPES", "WHY_NOT", "run"]

ALIGNMENT = 16
"""Pieces of one tensor start at multiples of this many elements."""

_FLOAT32 = np.dtype(np.float32)
_NONE = np.empty(0, np.float32)

SHAPES = {
    "adam": (2, adam_file.COLUMNS),
    "amsgrad": (3, adam_file.COLUMNS),
    "sgd": (0, sgd_file.COLUMNS),
    "momentum": (1, sgd_file.COLUMNS),
    "cuda_adam": (2, adam_cuda_rounding_numba.COLUMNS),
    "cuda_amsgrad": (3, adam_cuda_rounding_numba.COLUMNS),
    "cuda_fused_adam": (2, adam_cuda_rounding_numba.COLUMNS),
    "cuda_fused_amsgrad": (3, adam_cuda_rounding_numba.COLUMNS),
    "cuda_sgd": (0, sgd_cuda_rounding_numba.COLUMNS),
    "cuda_momentum": (1, sgd_cuda_rounding_numba.COLUMNS),
}
"""Kernel name -> how many states it takes and how many scalars each update has."""

FORMS = {
    "cuda_adam": adam_cuda_rounding_numba.FORMS["adam"],
    "cuda_amsgrad": adam_cuda_rounding_numba.FORMS["adam"],
    "cuda_fused_adam": adam_cuda_rounding_numba.FORMS["fused_adam"],
    "cuda_fused_amsgrad": adam_cuda_rounding_numba.FORMS["fused_adam"],
    "cuda_sgd": sgd_cuda_rounding_numba.FORM,
    "cuda_momentum": sgd_cuda_rounding_numba.FORM,
}
"""Kernel of a device's formulas -> how many values each number of its form has."""


def run(
    kernel: str,
    flags: tuple[int, ...],
    p: np.ndarray,
    states: Sequence[np.ndarray],
    grads: Sequence[np.ndarray],
    scalars: Sequence[tuple[float, ...]],
    *,
    tail: bool,
) -> None:
    """Apply ``len(grads)`` updates to one piece of one tensor, in place, in one pass over memory.

    Releases the GIL and starts no thread: call it from several threads on different pieces.

    Args:
        kernel: A key of :data:`SHAPES`. Those that begin with ``cuda_`` follow a device's formulas.
        flags: ``(vector, root)``: fused code's vector width, whose scalar tail rounds differently, or 0
            for code without such a tail; 1 for MKL's square root, 0 for the IEEE one. For a device's
            formulas, the form that is written down in ``adam_cuda_rounding_numba`` and
            ``sgd_cuda_rounding_numba``.
        p: Contiguous one-dimensional float32 view of the parameter's piece, in storage order.
        states: The elementwise states' pieces in the rule's order, of the same form.
        grads: One gradient piece per update, oldest first. Never written.
        scalars: One row per update, as ``gockpt.replay.rules.scalars`` gave it.
        tail: Whether the piece's end is the tensor's end.

    Raises:
        ValueError: If the arguments do not fit together; nothing was changed.
        RuntimeError: If MKL's root is asked for and was never registered in this process, or if kernels are
            not compiled here (:data:`WHY_NOT`).
    """
    count, columns = _check(kernel, p, states, grads, scalars)
    if kernel in FORMS:
        _run_cuda(kernel, flags, p, states, grads, scalars)
        return
    vector, root = flags
    if not grads or not p.size:
        return
    last = p.size % vector if vector else 0
    if last and not tail:
        msg = f"a piece inside a tensor must hold a multiple of {ALIGNMENT} elements, got {p.size}"
        raise ValueError(msg)
    addresses = np.array([address_of(g) for g in grads], np.int64)
    with np.errstate(over="ignore"):
        table = np.array(scalars, np.float64).reshape(len(grads), columns).astype(np.float32)
    if kernel in ("adam", "amsgrad"):
        function = mkl_sqrt.address() if root else 0
        if root and not function:
            msg = "this process does not know MKL's square root: call gockpt.replay.rules.prepare() first"
            raise RuntimeError(msg)
        top = states[2] if count == 3 else _NONE
        with mkl_sqrt.alone() if root else nullcontext():
            adam_file.adam(p, states[0], states[1], top, addresses, table, last, function)
    else:
        sgd_file.sgd(p, states[0] if count else _NONE, addresses, table, last)


def _run_cuda(
    kernel: str,
    form: tuple[int, ...],
    p: np.ndarray,
    states: Sequence[np.ndarray],
    grads: Sequence[np.ndarray],
    scalars: Sequence[tuple[float, ...]],
) -> None:
    """Do as :func:`run`, by a device's formulas."""
    values = FORMS[kernel]
    if len(form) != len(values) or any(not 0 <= f < n for f, n in zip(form, values, strict=True)):
        msg = f"{kernel} has no form {form}: its numbers are below {values}"
        raise ValueError(msg)
    if not grads or not p.size:
        return
    addresses = np.array([address_of(g) for g in grads], np.int64)
    table = np.array(scalars, np.float64)
    if kernel in ("cuda_sgd", "cuda_momentum"):
        sgd_cuda_rounding_numba.sgd(p, states[0] if states else _NONE, addresses, table, *form)
        return
    top = states[2] if len(states) == 3 else _NONE
    update = (
        adam_cuda_rounding_numba.fused_adam
        if kernel.startswith("cuda_fused")
        else adam_cuda_rounding_numba.adam
    )
    update(p, states[0], states[1], top, addresses, table, *form)


def _check(
    kernel: str,
    p: np.ndarray,
    states: Sequence[np.ndarray],
    grads: Sequence[np.ndarray],
    scalars: Sequence[tuple[float, ...]],
) -> tuple[int, int]:
    """Return the kernel's number of states and of scalars, or raise."""
    if kernel not in SHAPES:
        msg = f"no kernel named {kernel!r}; there are {', '.join(SHAPES)}"
        raise ValueError(msg)
    count, columns = SHAPES[kernel]
    if len(states) != count or len(scalars) != len(grads) or any(len(row) != columns for row in scalars):
        msg = (
            f"{kernel} takes {count} states and {columns} scalars for each gradient, got {len(states)} "
            f"states, {len(grads)} gradients and scalars of lengths {[len(row) for row in scalars]}"
        )
        raise ValueError(msg)
    for array in (p, *states, *grads):
        if array.dtype != _FLOAT32 or array.ndim != 1 or not array.flags.c_contiguous or array.size != p.size:
            msg = (
                f"expected contiguous one-dimensional float32 views of {p.size} elements, "
                f"got {array.dtype} of shape {array.shape}"
            )
            raise ValueError(msg)
    if not all(array.flags.writeable for array in (p, *states)):
        msg = "p and the states are updated in place and must be writable"
        raise ValueError(msg)
    return count, columns
