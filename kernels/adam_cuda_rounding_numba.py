"""Adam and AdamW in float32 as CUDA computes them, several updates in one pass: the Numba version.

Contract: bit for bit ``reference_cuda_rounding.adam`` and ``reference_cuda_rounding.fused_adam`` applied once
    per update, with
the same *form*. Legend: K updates (oldest first), n elements, T elements per tile.

On a device every element is alike: there is no tail rule. Denormals are kept. Each NaN that arithmetic gives
is CUDA's only one. Where a compiler may round in several places, a number of the form says in which.

``adam`` follows the for-loop and foreach operators, and takes the scalars of ``gockpt.kernels.adam_numba``.
Its form is (square, divide, move):

* square: 0 ``fma(g * g, 1 - beta2, v * beta2)``; 1 ``fma((1 - beta2) * g, g, v * beta2)``.
* divide: 0 divides the root by ``sqrt(1 - beta2**t)``; 1 multiplies it by the reciprocal.
* move: 0 ``fma(step, m / d, p)``; 1 ``p + (step * m) / d``; 2 ``p + step * (m / d)``.

``fused_adam`` follows the fused kernel. Columns of one update's scalars (float64): ``sign`` (-1 to
maximize), ``wd`` (coupled decay, 0 for none), ``decoupled`` decay (0 for none), ``lr``, ``beta1``,
``beta2``, ``1 - beta1**t``, ``sqrt(1 - beta2**t)``, ``eps``. Its form is (double, first, second, fuse):

* double: 1 for moments, decay and ``eps`` in float64, each result rounded to float32.
* first: 0 ``fma(b, m, fma(-b, g, g))``; 1 ``fma(b, m, (1 - b) * g)``; 2 ``fma(1 - b, g, b * m)``.
* second: 0 ``fma(b, v, fma(-b, q, q))`` with ``q = g * g`` in float32; 1 ``fma(b, v, (1 - b) * g * g)``;
  2 ``fma((1 - b) * g, g, b * v)``.
* fuse: 1 where a decay is one fused multiply-add, 0 where the product is rounded first.

Every loop runs from 0 over slices: Numba vectorises no other form.
"""

from __future__ import annotations

import numpy as np

from gockpt.kernels.numba_compile import as_float32, fma, fma64, serial

__all__ = ["COLUMNS", "FORMS", "adam", "fused_adam"]

COLUMNS = 9
FORMS = {"adam": (2, 2, 3), "fused_adam": (2, 3, 3, 2)}
"""How many values each number of a form has."""

TILE = 8192

_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
NAN = np.uint32(0x7FFFFFFF).view(np.float32)
"""The NaN that CUDA's arithmetic gives, whatever went in."""


@serial
def _moments(p: np.ndarray, m: np.ndarray, v: np.ndarray, g: np.ndarray, s: np.ndarray, square: int) -> None:
    """Decay and both moments as separate operators."""
    negate, coupled = s[0] < 0.0, s[1] != 0.0
    wd, decay, w = np.float32(s[1]), np.float32(s[2]), np.float32(s[3])
    b2, c2 = np.float32(s[4]), np.float32(s[5])
    heavy = abs(w) >= _HALF
    weight = np.float32(w - _ONE) if heavy else w
    first = square == 1
    for i in range(p.size):
        gi = -g[i] if negate else g[i]
        gi = fma(wd, p[i], gi) if coupled else gi
        mi = fma(weight, gi - m[i], gi if heavy else m[i])
        old = v[i] * b2
        vi = fma(c2 * gi, gi, old) if first else fma(gi * gi, c2, old)
        pi = p[i] * decay
        m[i] = mi if mi == mi else NAN  # noqa: PLR0124 - this is about NaN
        v[i] = vi if vi == vi else NAN  # noqa: PLR0124
        p[i] = pi if pi == pi else NAN  # noqa: PLR0124


@serial
def _raise(top: np.ndarray, v: np.ndarray) -> None:
    """``top = max(top, v)``; a NaN on either side stays."""
    for i in range(v.size):
        kept = top[i] > v[i] or top[i] != top[i]
        top[i] = top[i] if kept else v[i]


@serial
def _raise_fused(top: np.ndarray, v: np.ndarray) -> None:
    """``_raise`` in the fused kernel: a NaN in ``v`` is passed over."""
    for i in range(v.size):
        top[i] = v[i] if top[i] < v[i] else top[i]  # noqa: FURB136 - not max(): this is about NaN


@serial
def _denominator(v: np.ndarray, bc2s: float, eps: float, divide: int, into: np.ndarray) -> None:
    """``sqrt(v) / bc2s + eps``."""
    divisor, small = np.float32(bc2s), np.float32(eps)
    if divide == 1:
        factor = np.float32(_ONE / divisor)
        for i in range(v.size):
            into[i] = np.sqrt(v[i]) * factor + small
    else:
        for i in range(v.size):
            into[i] = np.sqrt(v[i]) / divisor + small


@serial
def _move(p: np.ndarray, m: np.ndarray, d: np.ndarray, by: float, form: int) -> None:
    """Move the parameters by the first moment over the denominator."""
    step = np.float32(by)
    if form == 0:
        for i in range(p.size):
            pi = fma(step, m[i] / d[i], p[i])
            p[i] = pi if pi == pi else NAN  # noqa: PLR0124
    elif form == 1:
        for i in range(p.size):
            pi = p[i] + (step * m[i]) / d[i]
            p[i] = pi if pi == pi else NAN  # noqa: PLR0124
    else:
        for i in range(p.size):
            pi = p[i] + step * (m[i] / d[i])
            p[i] = pi if pi == pi else NAN  # noqa: PLR0124


@serial
def adam(
    p: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    top: np.ndarray,
    grads: np.ndarray,
    scalars: np.ndarray,
    square: int,
    divide: int,
    move: int,
) -> None:
    """Apply K updates in place, as for-loop and foreach do.

    ``top`` is the running maximum of ``v`` (AMSGrad) or empty. ``grads`` holds K addresses of n float32,
    ``scalars`` K rows of float64.
    """
    n = p.size
    scratch = np.empty(min(n, TILE), np.float32)
    for low in range(0, n, TILE):
        high = min(low + TILE, n)
        pt, mt, vt, d = p[low:high], m[low:high], v[low:high], scratch[: high - low]
        for k in range(grads.size):
            s = scalars[k]
            _moments(pt, mt, vt, as_float32(grads[k] + 4 * low, high - low), s, square)
            squares = vt
            if top.size != 0:
                squares = top[low:high]
                _raise(squares, vt)
            _denominator(squares, s[6], s[7], divide, d)
            _move(pt, mt, d, s[8], move)


@serial
def _single(
    p: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    g: np.ndarray,
    s: np.ndarray,
    first: int,
    second: int,
    fuse: int,
) -> None:
    """The fused kernel's decay and moments in float32."""
    negate, coupled, decoupled, fused = s[0] < 0.0, s[1] != 0.0, s[2] != 0.0, fuse == 1
    wd, b1, b2 = np.float32(s[1]), np.float32(s[4]), np.float32(s[5])
    lw = np.float32(np.float32(s[3]) * np.float32(s[2]))
    c1, c2 = np.float32(_ONE - b1), np.float32(_ONE - b2)
    for i in range(p.size):
        gi = -g[i] if negate else g[i]
        pi = p[i]
        if coupled:
            gi = fma(pi, wd, gi) if fused else gi + pi * wd
        if decoupled:
            pi = fma(-lw, pi, pi) if fused else pi - lw * pi
        if first == 0:
            mi = fma(b1, m[i], fma(-b1, gi, gi))
        elif first == 1:
            mi = fma(b1, m[i], c1 * gi)
        else:
            mi = fma(c1, gi, b1 * m[i])
        if second == 0:
            vi = fma(b2, v[i], fma(-b2, gi * gi, gi * gi))
        elif second == 1:
            vi = fma(b2, v[i], (c2 * gi) * gi)
        else:
            vi = fma(c2 * gi, gi, b2 * v[i])
        m[i] = mi if mi == mi else NAN  # noqa: PLR0124
        v[i] = vi if vi == vi else NAN  # noqa: PLR0124
        p[i] = pi


@serial
def _double(
    p: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    g: np.ndarray,
    s: np.ndarray,
    first: int,
    second: int,
    fuse: int,
) -> None:
    """The fused kernel's decay and moments in float64, rounded to float32 one by one."""
    negate, coupled, decoupled, fused = s[0] < 0.0, s[1] != 0.0, s[2] != 0.0, fuse == 1
    wd, lw, b1, b2 = s[1], s[3] * s[2], s[4], s[5]
    c1, c2 = 1.0 - b1, 1.0 - b2
    for i in range(p.size):
        gi = -g[i] if negate else g[i]
        pi = p[i]
        wide = np.float64(pi)
        if coupled:
            gi = np.float32(fma64(wide, wd, np.float64(gi)) if fused else np.float64(gi) + wide * wd)
        if decoupled:
            pi = np.float32(fma64(-lw, wide, wide) if fused else wide - lw * wide)
        gd, md, vd = np.float64(gi), np.float64(m[i]), np.float64(v[i])
        if first == 0:
            mi = np.float32(fma64(b1, md, fma64(-b1, gd, gd)))
        elif first == 1:
            mi = np.float32(fma64(b1, md, c1 * gd))
        else:
            mi = np.float32(fma64(c1, gd, b1 * md))
        if second == 0:
            q = np.float64(np.float32(gi * gi))
            vi = np.float32(fma64(b2, vd, fma64(-b2, q, q)))
        elif second == 1:
            vi = np.float32(fma64(b2, vd, (c2 * gd) * gd))
        else:
            vi = np.float32(fma64(c2 * gd, gd, b2 * vd))
        m[i] = mi if mi == mi else NAN  # noqa: PLR0124
        v[i] = vi if vi == vi else NAN  # noqa: PLR0124
        p[i] = pi


@serial
def _descend(p: np.ndarray, m: np.ndarray, v: np.ndarray, s: np.ndarray) -> None:
    """The fused kernel's second half in float32."""
    step, bc2s, eps = np.float32(np.float32(s[3]) / np.float32(s[6])), np.float32(s[7]), np.float32(s[8])
    for i in range(p.size):
        pi = p[i] - (step * m[i]) / (np.sqrt(v[i]) / bc2s + eps)
        p[i] = pi if pi == pi else NAN  # noqa: PLR0124


@serial
def _descend_double(p: np.ndarray, m: np.ndarray, v: np.ndarray, s: np.ndarray) -> None:
    """``_descend`` where ``lr`` and ``eps`` are float64: two sums and a quotient are rounded from there."""
    bc1, bc2s, eps = np.float32(s[6]), np.float32(s[7]), s[8]
    step = np.float32(s[3] / np.float64(bc1))
    for i in range(p.size):
        d = np.float32(np.float64(np.float32(np.sqrt(v[i]) / bc2s)) + eps)
        pi = p[i] - (step * m[i]) / d
        p[i] = pi if pi == pi else NAN  # noqa: PLR0124


@serial
def fused_adam(
    p: np.ndarray,
    m: np.ndarray,
    v: np.ndarray,
    top: np.ndarray,
    grads: np.ndarray,
    scalars: np.ndarray,
    double: int,
    first: int,
    second: int,
    fuse: int,
) -> None:
    """Apply K updates in place, as the fused kernel does; the arguments are those of ``adam``."""
    n = p.size
    for low in range(0, n, TILE):
        high = min(low + TILE, n)
        pt, mt, vt = p[low:high], m[low:high], v[low:high]
        for k in range(grads.size):
            g = as_float32(grads[k] + 4 * low, high - low)
            s = scalars[k]
            if double == 1:
                _double(pt, mt, vt, g, s, first, second, fuse)
            else:
                _single(pt, mt, vt, g, s, first, second, fuse)
            squares = vt
            if top.size != 0:
                squares = top[low:high]
                _raise_fused(squares, vt)
            if double == 1:
                _descend_double(pt, mt, squares, s)
            else:
                _descend(pt, mt, squares, s)
