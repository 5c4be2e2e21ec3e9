"""SGD in float32 as CUDA computes it, several updates in one pass: the Numba version.

Contract: bit for bit ``reference_cuda_rounding.sgd`` applied once per update, with the same *form*. Legend: K
    updates
(oldest first), n elements, T elements per tile. The scalars are those of ``gockpt.kernels.sgd_numba``, in
float64.

On a device every element is alike: there is no tail rule. Denormals are kept. Each NaN that arithmetic gives
is CUDA's only one. The form is (double, buffer, fuse):

* double: 1 for arithmetic in float64, as the fused kernel's, each result rounded to float32; but the
  look-ahead of nesterov takes the momentum as it was before it was rounded.
* buffer: 0 ``fma(momentum, buffer, (1 - dampening) * g)``; 1 ``fma(1 - dampening, g, momentum * buffer)``.
* fuse: 1 where decay, look-ahead and move are fused multiply-adds, 0 where the product is rounded first.
"""

from __future__ import annotations

import numpy as np

from gockpt.kernels.adam_cuda_rounding_numba import NAN
from gockpt.kernels.numba_compile import as_float32, fma, fma64, serial

__all__ = ["COLUMNS", "FORM", "sgd"]

COLUMNS = 6
FORM = (2, 2, 2)
"""How many values each number of the form has."""

TILE = 8192


@serial
def _single(p: np.ndarray, buffer: np.ndarray, g: np.ndarray, s: np.ndarray, form: int, fuse: int) -> None:
    """One update of one tile in float32."""
    negate, coupled, nesterov, fused = s[0] < 0.0, s[1] != 0.0, s[4] != 0.0, fuse == 1
    wd, momentum, keep, step = np.float32(s[1]), np.float32(s[2]), np.float32(s[3]), np.float32(s[5])
    remembers = buffer.size != 0
    for i in range(p.size):
        gi = -g[i] if negate else g[i]
        if coupled:
            gi = fma(wd, p[i], gi) if fused else gi + wd * p[i]
        if remembers:
            bi = fma(momentum, buffer[i], keep * gi) if form == 0 else fma(keep, gi, momentum * buffer[i])
            buffer[i] = bi if bi == bi else NAN  # noqa: PLR0124 - this is about NaN
            ahead = fma(momentum, bi, gi) if fused else gi + momentum * bi
            gi = ahead if nesterov else bi
        pi = fma(step, gi, p[i]) if fused else p[i] + step * gi
        p[i] = pi if pi == pi else NAN  # noqa: PLR0124


@serial
def _double(p: np.ndarray, buffer: np.ndarray, g: np.ndarray, s: np.ndarray, form: int, fuse: int) -> None:
    """One update of one tile in float64."""
    negate, coupled, nesterov, fused = s[0] < 0.0, s[1] != 0.0, s[4] != 0.0, fuse == 1
    wd, momentum, keep, step = s[1], s[2], s[3], s[5]
    remembers = buffer.size != 0
    for i in range(p.size):
        gi = -g[i] if negate else g[i]
        wide = np.float64(p[i])
        if coupled:
            gi = np.float32(fma64(wd, wide, np.float64(gi)) if fused else np.float64(gi) + wd * wide)
        if remembers:
            gd, bd = np.float64(gi), np.float64(buffer[i])
            bd = fma64(momentum, bd, keep * gd) if form == 0 else fma64(keep, gd, momentum * bd)
            bi = np.float32(bd)
            buffer[i] = bi if bi == bi else NAN  # noqa: PLR0124
            ahead = np.float32(fma64(momentum, bd, gd) if fused else gd + momentum * bd)
            gi = ahead if nesterov else bi
        gd = np.float64(gi)
        pi = np.float32(fma64(step, gd, wide) if fused else wide + step * gd)
        p[i] = pi if pi == pi else NAN  # noqa: PLR0124


@serial
def sgd(
    p: np.ndarray,
    buffer: np.ndarray,
    grads: np.ndarray,
    scalars: np.ndarray,
    double: int,
    form: int,
    fuse: int,
) -> None:
    """Apply K updates in place.

    ``buffer`` is the momentum or empty. ``grads`` holds K addresses of n float32, ``scalars`` K rows of
    float64.
    """
    n = p.size
    for low in range(0, n, TILE):
        high = min(low + TILE, n)
        bt = buffer[low:high] if buffer.size != 0 else buffer
        for k in range(grads.size):
            g = as_float32(grads[k] + 4 * low, high - low)
            if double == 1:
                _double(p[low:high], bt, g, scalars[k], form, fuse)
            else:
                _single(p[low:high], bt, g, scalars[k], form, fuse)
