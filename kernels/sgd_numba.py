"""SGD in float32, several updates in one pass: the Numba version.

Contract: bit for bit ``reference.sgd`` applied once per update. Legend: K updates (oldest first), n
elements, T elements per tile.

Columns of one update's scalars (float32): ``sign`` (-1 to maximize), ``wd`` (0 for none), ``momentum``,
``1 - dampening``, ``nesterov`` (0 or 1), ``-lr``.
"""

from __future__ import annotations

import numpy as np

from gockpt.kernels.numba_compile import as_float32, fma, serial

__all__ = ["COLUMNS", "sgd"]

COLUMNS = 6
TILE = 8192

_ZERO = np.float32(0)


@serial
def _plain(p: np.ndarray, g: np.ndarray, s: np.ndarray) -> None:
    """One update of one tile without momentum."""
    sign, wd, step = s[0], s[1], s[5]
    negate = sign < _ZERO
    coupled = wd != _ZERO
    for i in range(p.size):
        gi = -g[i] if negate else g[i]
        gi = fma(wd, p[i], gi) if coupled else gi
        p[i] = fma(step, gi, p[i])


@serial
def _momentum(p: np.ndarray, buffer: np.ndarray, g: np.ndarray, s: np.ndarray) -> None:
    """One update of one tile with momentum."""
    sign, wd, momentum, keep, step = s[0], s[1], s[2], s[3], s[5]
    negate = sign < _ZERO
    coupled = wd != _ZERO
    nesterov = s[4] != _ZERO
    for i in range(p.size):
        gi = -g[i] if negate else g[i]
        gi = fma(wd, p[i], gi) if coupled else gi
        bi = fma(keep, gi, buffer[i] * momentum)
        buffer[i] = bi
        move = fma(momentum, bi, gi) if nesterov else bi
        p[i] = fma(step, move, p[i])


@serial
def _momentum_tail(p: np.ndarray, buffer: np.ndarray, g: np.ndarray, s: np.ndarray) -> None:
    """``_momentum`` as fused code does it behind the last whole vector: the buffer rounds elsewhere."""
    sign, wd, momentum, keep, step = s[0], s[1], s[2], s[3], s[5]
    negate = sign < _ZERO
    for i in range(p.size):
        gi = -g[i] if negate else g[i]
        if wd != _ZERO:
            gi = fma(wd, p[i], gi)
        bi = fma(buffer[i], momentum, gi * keep)
        buffer[i] = bi
        move = fma(momentum, bi, gi) if s[4] != _ZERO else bi
        p[i] = fma(step, move, p[i])


@serial
def sgd(p: np.ndarray, buffer: np.ndarray, grads: np.ndarray, scalars: np.ndarray, tail: int) -> None:
    """Apply K updates in place.

    ``buffer`` is the momentum or empty. ``grads`` holds K addresses of n float32, ``scalars`` K rows. The
    last ``tail`` elements follow the scalar-tail rule.
    """
    n = p.size
    body = n - tail
    for first in range(0, body, TILE):
        last = min(first + TILE, body)
        for k in range(grads.size):
            g = as_float32(grads[k] + 4 * first, last - first)
            if buffer.size == 0:
                _plain(p[first:last], g, scalars[k])
            else:
                _momentum(p[first:last], buffer[first:last], g, scalars[k])
    if tail != 0:
        for k in range(grads.size):
            g = as_float32(grads[k] + 4 * body, tail)
            if buffer.size == 0:
                _plain(p[body:], g, scalars[k])
            else:
                _momentum_tail(p[body:], buffer[body:], g, scalars[k])
