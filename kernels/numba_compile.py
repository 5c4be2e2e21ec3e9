"""How kernels are compiled, and what happens where they can't be.

Contract: :data:`WHY_NOT` is empty, or the reason why nothing is compiled in this process: Numba can't be
imported, or ``NUMBA_DISABLE_JIT`` is set. A kernel then raises :class:`RuntimeError` instead of running as
Python, whose integers and NumPy's scalars don't wrap around as the kernels' do. Callers that have a NumPy
counterpart take that.
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

from gockpt.once import warn_once

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    import numpy as np


def _load() -> tuple[Any, str]:
    """Return the module of intrinsics, if there is one, and why nothing is compiled."""
    try:
        from numba import config

        from gockpt.kernels import numba_intrinsics
    except Exception as error:  # noqa: BLE001 - a NumPy that this Numba does not know raises AttributeError, too
        return None, f"Numba can't be imported: {type(error).__name__}: {error}"
    return numba_intrinsics, "NUMBA_DISABLE_JIT is set" if config.DISABLE_JIT else ""


_machine, WHY_NOT = _load()
if WHY_NOT:
    warn_once(
        "nothing is compiled",
        "kernels are not compiled (%s): saves are as exact, but no optimizer update is replayed, so all of "
        "the state leaves at one step, and checking it takes longer",
        WHY_NOT,
    )

__all__ = [
    "WHY_NOT",
    "address_of",
    "as_float32",
    "as_uint8",
    "call_vml",
    "fma",
    "fma64",
    "load_uint64",
    "serial",
    "store_uint64",
]

as_float32: Any = getattr(_machine, "as_float32", None)
as_uint8: Any = getattr(_machine, "as_uint8", None)
call_vml: Any = getattr(_machine, "call_vml", None)
fma: Any = getattr(_machine, "fma", None)
fma64: Any = getattr(_machine, "fma64", None)
load_uint64: Any = getattr(_machine, "load_uint64", None)
store_uint64: Any = getattr(_machine, "store_uint64", None)


def address_of(array: np.ndarray) -> int:
    """Return where the array's first element is in memory. The caller keeps the array alive."""
    address: int = array.__array_interface__["data"][0]
    return address


def serial(function: Callable[..., Any]) -> Any:
    """Compile ``function`` as a serial kernel, at its first call.

    Where nothing is compiled, the kernel raises :class:`RuntimeError` when it is called.
    """
    return _refusing(function) if WHY_NOT else _machine.compiled(function)


def _refusing(function: Callable[..., Any]) -> Callable[..., NoReturn]:
    @wraps(function)
    def refuse(*_: Any) -> NoReturn:
        msg = f"the kernel {function.__qualname__} is not compiled: {WHY_NOT}"
        raise RuntimeError(msg)

    return refuse
