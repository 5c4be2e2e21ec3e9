"""Adam and AdamW in float32, several updates in one pass: the Numba version.

Contract: bit for bit ``reference.adam`` applied once per update; with MKL's root instead of the IEEE one
where its address is given. Legend: K updates (oldest first), n elements, T elements per tile.

Columns of one update's scalars (float32): ``sign`` (-1 to maximize), ``wd`` (coupled decay, 0 for none),
``decay`` (factor of the decoupled decay, 1 for none), ``1 - beta1``, ``beta2``, ``1 - beta2``,
``sqrt(1 - beta2**t)``, ``eps``, ``-lr / (1 - beta1**t)``.

Every loop runs from 0 over slices: Numba vectorises no other form.
"""

from __future__ import annotations

import numpy as np

from gockpt.kernels.mkl_sqrt import sqrt_into
from gockpt.kernels.numba_compile import as_float32, fma, serial

__all__ = ["COLUMNS", "adam"]

COLUMNS = 9
TILE = 8192
"""Elements per tile: p, m, v, a gradient and a scratch row together stay in the second-level cache."""

_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
ALL_ONES = np.uint32(0xFFFFFFFF).view(np.float32)


@serial
def _update(p: np.ndarray, m: np.ndarray, v: np.ndarray, g: np.ndarray, s: np.ndarray) -> None:
    """One whole update of one tile, with the IEEE root."""
    sign, wd, decay, w, b2, c2, bc2s, eps, step = s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8]
    negate = sign < _ZERO
    coupled = wd != _ZERO
    heavy = abs(w) >= _HALF
    weight = np.float32(w - _ONE) if heavy else w
    for i in range(p.size):
        gi = -g[i] if negate else g[i]
        gi = fma(wd, p[i], gi) if coupled else gi
        mi = fma(weight, gi - m[i], gi if heavy else m[i])
        vi = fma(c2 * gi, gi, v[i] * b2)
        m[i] = mi
        v[i] = vi
        move = (step * mi) / (np.sqrt(vi) / bc2s + eps)
        p[i] = p[i] * decay + move if move == move else move  # noqa: PLR0124 - of two NaNs, torch keeps this


@serial
def _moments(p: np.ndarray, m: np.ndarray, v: np.ndarray, g: np.ndarray, s: np.ndarray) -> None:
    """The first half of an update: weight decay and both moments."""
    sign, wd, decay, w, b2, c2 = s[0], s[1], s[2], s[3], s[4], s[5]
    negate = sign < _ZERO
    coupled = wd != _ZERO
    heavy = abs(w) >= _HALF
    weight = np.float32(w - _ONE) if heavy else w
    for i in range(p.size):
        gi = -g[i] if negate else g[i]
        gi = fma(wd, p[i], gi) if coupled else gi
        m[i] = fma(weight, gi - m[i], gi if heavy else m[i])
        v[i] = fma(c2 * gi, gi, v[i] * b2)
        p[i] = p[i] * decay


@serial
def _moments_tail(p: np.ndarray, m: np.ndarray, v: np.ndarray, g: np.ndarray, s: np.ndarray) -> None:
    """``_moments`` as fused code does it behind the last whole vector: v is rounded in another place."""
    sign, wd, decay, w, b2, c2 = s[0], s[1], s[2], s[3], s[4], s[5]
    negate = sign < _ZERO
    for i in range(p.size):
        gi = -g[i] if negate else g[i]
        if wd != _ZERO:
            gi = fma(wd, p[i], gi)
        m[i] = fma(w, gi - m[i], m[i]) if abs(w) < _HALF else fma(np.float32(w - _ONE), gi - m[i], gi)
        v[i] = fma(v[i], b2, (c2 * gi) * gi)
        p[i] = p[i] * decay


@serial
def _raise(top: np.ndarray, v: np.ndarray) -> None:
    """``top = max(top, v)``; a NaN on either side gives the NaN of all ones, as torch's vectors do."""
    for i in range(v.size):
        larger = max(top[i], v[i])
        top[i] = larger if v[i] == v[i] and top[i] == top[i] else ALL_ONES


@serial
def _raise_tail(top: np.ndarray, v: np.ndarray) -> None:
    """``_raise`` behind the last whole vector: there a NaN in ``v`` is passed over."""
    for i in range(v.size):
        top[i] = v[i] if top[i] < v[i] else top[i]  # noqa: FURB136 - not max(): this is about NaN


@serial
def _descend(p: np.ndarray, m: np.ndarray, v: np.ndarray, s: np.ndarray) -> None:
    """The second half of an update: move the parameters, with the IEEE root of ``v``."""
    bc2s, eps, step = s[6], s[7], s[8]
    for i in range(p.size):
        p[i] = p[i] + (step * m[i]) / (np.sqrt(v[i]) / bc2s + eps)


@serial
def _descend_by(p: np.ndarray, m: np.ndarray, root: np.ndarray, s: np.ndarray) -> None:
    """``_descend`` with a root that was taken before."""
    bc2s, eps, step = s[6], s[7], s[8]
    for i in range(p.size):
        p[i] = p[i] + (step * m[i]) / (root[i] / bc2s + eps)


@serial
def adam(
    p: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    top: np.ndarray,
    grads: np.ndarray,
    scalars: np.ndarray,
    tail: int,
    vml: int,
) -> None:
    """Apply K updates in place.

    ``top`` is the running maximum of ``v`` (AMSGrad) or empty. ``grads`` holds K addresses of n float32,
    ``scalars`` K rows. The last ``tail`` elements follow the scalar-tail rule. ``vml`` is the address of
    MKL's root, or 0 for the IEEE root.
    """
    n = p.size
    body = n - tail
    scratch = np.empty(TILE if vml != 0 else 0, np.float32)
    for first in range(0, body, TILE):
        last = min(first + TILE, body)
        pt, mt, vt = p[first:last], m[first:last], v[first:last]
        for k in range(grads.size):
            g = as_float32(grads[k] + 4 * first, last - first)
            s = scalars[k]
            if vml == 0 and top.size == 0:
                _update(pt, mt, vt, g, s)
                continue
            _moments(pt, mt, vt, g, s)
            squares = vt
            if top.size != 0:
                squares = top[first:last]
                _raise(squares, vt)
            if vml == 0:
                _descend(pt, mt, squares, s)
            else:
                root = scratch[: last - first]
                sqrt_into(vml, squares, root)
                _descend_by(pt, mt, root, s)
    if tail != 0:
        pt, mt, vt = p[body:], m[body:], v[body:]
        for k in range(grads.size):
            s = scalars[k]
            _moments_tail(pt, mt, vt, as_float32(grads[k] + 4 * body, tail), s)
            squares = vt
            if top.size != 0:
                squares = top[body:]
                _raise_tail(squares, vt)
            _descend(pt, mt, squares, s)
