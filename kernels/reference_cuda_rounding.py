"""What the kernels for CUDA's formulas must compute, in plain NumPy: slow, short, and their measure.

Contract: one update in place, each result rounded where the form says (the forms are written down in
``gockpt.kernels.adam_cuda_rounding_numba`` and ``gockpt.kernels.sgd_cuda_rounding_numba``). Roots and
quotients are IEEE's. ``fma64`` rounds once, emulated in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gockpt.kernels.reference import fma

__all__ = ["adam", "fma64", "fused_adam", "sgd"]

_NAN = np.uint32(0x7FFFFFFF).view(np.float32)
_F, _D = np.float32, np.float64
_SPLIT = 134217729.0  # 2**27 + 1


def _product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``a * b`` rounded, and what was rounded off (Dekker)."""
    high = a * b
    a1, b1 = a * _SPLIT, b * _SPLIT
    a1, b1 = a1 - (a1 - a), b1 - (b1 - b)
    a2, b2 = a - a1, b - b1
    return high, ((a1 * b1 - high) + a1 * b2 + a2 * b1) + a2 * b2


def _sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``a + b`` rounded, and what was rounded off (Knuth)."""
    total = a + b
    rest = total - a
    return total, (a - (total - rest)) + (b - rest)


def fma64(a: Any, b: Any, c: Any) -> np.ndarray:
    """Return ``a * b + c`` of float64 values, rounded once.

    Exact while products stay within 2**±900, which those of float32 values by ordinary scalars do. The two
    low-order parts are added rounding to odd, so that only the last sum rounds (Boldo and Melquiond).
    """
    a, b, c = np.broadcast_arrays(_D(a), _D(b), _D(c))
    with np.errstate(all="ignore"):
        high, low = _product(a, b)
        t, t_low = _sum(c, low)
        v, v_low = _sum(high, t)
        z, z_low = _sum(t_low, v_low)
        even = (z.view(np.int64) & 1) == 0
        toward = np.where(z_low > 0, np.inf, -np.inf)
        odd = np.where((z_low != 0) & even & np.isfinite(z), np.nextafter(z, toward), z)
        whole = v + odd
        # A zero's sign, infinities and NaN are those of the plain expression.
        plain = a * b + c
        return np.asarray(np.where((whole == 0) | ~np.isfinite(whole), plain, whole), np.float64)


def _fused(a: Any, b: Any, c: Any, *, double: bool, fuse: bool) -> np.ndarray:
    """Return ``a * b + c`` with one rounding or two, in the given precision."""
    kind = _D if double else _F
    a, b, c = kind(a), kind(b), kind(c)
    if not fuse:
        return np.asarray(a * b + c)
    return fma64(a, b, c) if double else fma(a, b, c)


def _store(target: np.ndarray, values: Any) -> None:
    single = np.asarray(values, np.float32)
    target[:] = np.where(np.isnan(single), _NAN, single)


def adam(
    p: np.ndarray,
    states: list[np.ndarray],
    g: Any,
    scalars: tuple[float, ...],
    form: tuple[int, int, int],
) -> None:
    """One update of Adam or AdamW by separate operators."""
    sign, wd, decay, w, b2, c2, bc2s, eps, step = (_F(s) for s in scalars)
    square, divide, move = form
    m, v = states[:2]
    with np.errstate(all="ignore"):
        g = g * sign
        if wd != 0:
            g = fma(wd, p, g)
        weighs = abs(w) < 0.5
        new = fma(w, g - m, m) if weighs else fma(w - _F(1), g - m, g)
        _store(v, fma(c2 * g, g, v * b2) if square else fma(g * g, c2, v * b2))
        _store(m, new)
        _store(p, p * decay)
        if len(states) == 3:
            top = states[2]
            top[:] = np.where((top > v) | np.isnan(top), top, v)
            v = top
        d = (np.sqrt(v) * (_F(1) / bc2s) if divide else np.sqrt(v) / bc2s) + eps
        if move == 0:
            _store(p, fma(step, m / d, p))
        else:
            _store(p, p + ((step * m) / d if move == 1 else step * (m / d)))


def fused_adam(
    p: np.ndarray,
    states: list[np.ndarray],
    g: Any,
    scalars: tuple[float, ...],
    form: tuple[int, int, int, int],
) -> None:
    """One update of Adam or AdamW by the fused kernel."""
    double, fuse = bool(form[0]), bool(form[3])
    kind: Any = _D if double else _F
    sign = scalars[0]
    wd, decoupled, lr, b1, b2, bc1, bc2s, eps = (kind(s) for s in scalars[1:])
    m, v = states[:2]
    with np.errstate(all="ignore"):
        g = g * _F(sign)
        old = p.copy()
        if wd != 0:
            g = _F(_fused(old, wd, g, double=double, fuse=fuse))
        if decoupled != 0:
            p[:] = _fused(-(lr * decoupled), old, old, double=double, fuse=fuse)
        c1, c2 = kind(1) - b1, kind(1) - b2
        wide = kind(g)

        def by(a: Any, b: Any, c: Any) -> np.ndarray:
            return _fused(a, b, c, double=double, fuse=True)

        _store(m, (by(b1, m, by(-b1, g, g)), by(b1, m, c1 * wide), by(c1, g, b1 * kind(m)))[form[1]])
        q = g * g
        _store(
            v,
            (by(b2, v, by(-b2, q, q)), by(b2, v, (c2 * wide) * wide), by(c2 * wide, g, b2 * kind(v)))[
                form[2]
            ],
        )
        if len(states) == 3:
            top = states[2]
            top[:] = np.where(top < v, v, top)
            v = top
        step = _F(lr / kind(_F(bc1)))
        d = _F(kind(np.sqrt(v) / _F(bc2s)) + eps)
        _store(p, p - (step * m) / d)


def sgd(
    p: np.ndarray,
    states: list[np.ndarray],
    g: Any,
    scalars: tuple[float, ...],
    form: tuple[int, int, int],
) -> None:
    """One update of SGD, with a momentum buffer if ``states`` has one."""
    double, fuse = bool(form[0]), bool(form[2])
    kind: Any = _D if double else _F
    wd, momentum, keep, nesterov, step = (kind(s) for s in scalars[1:])
    with np.errstate(all="ignore"):
        g = g * _F(scalars[0])
        if wd != 0:
            g = _F(_fused(wd, p, g, double=double, fuse=fuse))
        if states:
            (buffer,) = states
            products = momentum * kind(buffer), keep * kind(g)
            new = (
                _fused(keep, g, products[0], double=double, fuse=True)
                if form[1]
                else _fused(momentum, buffer, products[1], double=double, fuse=True)
            )
            _store(buffer, new)
            g = _F(_fused(momentum, new, g, double=double, fuse=fuse)) if nesterov else _F(new)
        _store(p, _fused(step, g, p, double=double, fuse=fuse))
