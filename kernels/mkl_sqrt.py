"""The square root that torch's for-loop and foreach optimizers use: MKL's, which is not correctly rounded.

About one result in six differs by one ulp from the IEEE root, so exactness means calling the very
function torch calls. Nothing here knows torch: whoever does passes the address of ``vmsSqrt``.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gockpt.kernels.numba_compile import call_vml, serial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

    Limit = Callable[[int], int]

__all__ = ["address", "alone", "known", "library", "load", "sqrt_into", "use"]

MODE = 0x00140102
"""High accuracy, denormals kept, errors ignored: ``VML_HA | VML_FTZDAZ_OFF | VML_ERRMODE_IGNORE``."""

_address = 0
_limit: Limit | None = None
_library: str | None = None


def use(function: int | None, limit: Limit | None = None, library: str | None = None) -> None:
    """Register the root; ``None`` forgets it.

    Args:
        function: Address of ``vmsSqrt(int n, const float*, float*, int64 mode)``.
        limit: ``MKL_Set_Num_Threads_Local``: sets how many threads MKL uses for calls from this thread and
            returns what it was, 0 for no limit of its own.
        library: The file that both are from.
    """
    global _address, _limit, _library
    _address, _limit, _library = function or 0, limit, library


def load(path: str) -> bool:
    """Register the root of a shared library; whether it has one. It need not be loaded, nor its package."""
    try:
        mkl = ctypes.CDLL(path)
        root, limit = mkl.vmsSqrt, mkl.MKL_Set_Num_Threads_Local
    except (OSError, AttributeError):
        return False
    limit.argtypes, limit.restype = [ctypes.c_int], ctypes.c_int
    use(ctypes.cast(root, ctypes.c_void_p).value, limit, path)
    return True


def library() -> str | None:
    """Return the path that the root was loaded from: another process finds it there."""
    return _library


def known() -> tuple[int, Limit | None, str | None]:
    """Return what was given to :func:`use`."""
    return _address, _limit, _library


def address() -> int:
    """Return the root's address, or 0 when there is none."""
    return _address


@contextmanager
def alone() -> Iterator[None]:
    """Keep MKL on the calling thread: it would start OpenMP threads of its own for each call."""
    if _limit is None:
        yield
        return
    before = _limit(1)
    try:
        yield
    finally:
        _limit(before)


@serial
def sqrt_into(function: int, source: np.ndarray, target: np.ndarray) -> None:
    """Write the root of each ``source`` element into ``target``."""
    call_vml(function, source.size, source.ctypes.data, target.ctypes.data, MODE)
