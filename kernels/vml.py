"""The square root that torch's for-loop and foreach optimizers use: MKL's, which is not correctly rounded.

About one result in six differs by one ulp from the IEEE root, so exactness means calling the very
function torch calls. Nothing here knows torch: whoever does passes the address of ``vmsSqrt``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gockpt.kernels.native import call_vml, serial

if TYPE_CHECKING:
    import numpy as np

__all__ = ["address", "sqrt_into", "use"]

MODE = 0x00140102
"""High accuracy, denormals kept, errors ignored: ``VML_HA | VML_FTZDAZ_OFF | VML_ERRMODE_IGNORE``."""

PIECE = 4096
"""Elements per call. MKL starts OpenMP threads for long vectors (seen from 12000 on); never for these."""

_address = 0


def use(function: int | None) -> None:
    """Set the address of ``vmsSqrt(int n, const float*, float*, int64 mode)``; ``None`` forgets it."""
    global _address  # noqa: PLW0603 - one process has one MKL
    _address = function or 0


def address() -> int:
    """Return the address given to :func:`use`, or 0 when there is none."""
    return _address


@serial
def sqrt_into(function: int, source: np.ndarray, target: np.ndarray) -> None:
    """Write the root of each ``source`` element into ``target``, piece by piece, on this thread alone."""
    for first in range(0, source.size, PIECE):
        count = min(PIECE, source.size - first)
        call_vml(function, count, source[first:].ctypes.data, target[first:].ctypes.data, MODE)
