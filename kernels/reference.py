"""What the kernels must compute, in plain NumPy: slow, short, and the measure of every fast path.

Contract: ``fingerprint`` is the definition written down in ``gockpt.kernels.fingerprint_numba``; ``adam`` and
``sgd`` are the element-wise formulas of torch's CPU optimizers in float32 with an IEEE square root, each
rounding where torch rounds. ``fma`` rounds once, emulated exactly in float64. ``quantise`` and
``dequantise`` are the format written down in ``gockpt.kernels.gradient16_format``, for one tensor.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["adam", "dequantise", "fingerprint", "fma", "mixed", "quantise", "sgd"]

_LOW = np.uint64(0xFFFFFFFF)


def fingerprint(data: np.ndarray, position: int = 0) -> int:
    """Return the fingerprint of a one-dimensional uint8 view at a position that is a multiple of 8."""
    padding = -data.size % 8
    words = np.frombuffer(data.tobytes() + bytes(padding), "<u8")
    numbers = np.arange(words.size, dtype=np.uint64) + np.uint64(position // 8)
    if padding:
        numbers[-1] += np.uint64(padding << 61)
    return int(np.sum(mixed(words, numbers), dtype=np.uint64))


def mixed(words: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return what each uint64 word adds to a fingerprint, by its number."""
    key = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x: np.ndarray = words ^ key
    x ^= (x & _LOW) * np.uint64(0xCC9E2D52)
    x ^= x >> np.uint64(32)
    x ^= (x & _LOW) * np.uint64(0x85EBCA6A)
    x += key
    x ^= x >> np.uint64(32)
    x ^= (x & _LOW) * np.uint64(0xC2B2AE36)
    return x


def fma(a: Any, b: Any, c: Any) -> np.ndarray:
    """Return ``a * b + c`` of float32 values, rounded once.

    The product is exact in float64. The sum is rounded to odd there (its error is known exactly), which
    makes the second rounding, to float32, the only one that counts.
    """
    with np.errstate(all="ignore"):
        product = np.float64(a) * np.float64(b)
        addend = np.broadcast_to(np.float64(c), np.shape(product)).copy()
        total = product + addend
        rest = total - product
        error = (product - (total - rest)) + (addend - rest)
        even = (total.view(np.int64) & 1) == 0
        inexact = np.isfinite(total) & np.isfinite(error) & (error != 0) & even
        toward = np.where(error > 0, np.inf, -np.inf)
        return np.where(inexact, np.nextafter(total, toward), total).astype(np.float32)


def adam(
    p: np.ndarray, states: list[np.ndarray], g: np.ndarray, scalars: tuple[float, ...], *, tail: int
) -> None:
    """One Adam or AdamW update in place. ``tail``: how many last elements follow the scalar-tail rule."""
    sign, wd, decay, w, b2, c2, bc2s, eps, step = (np.float32(s) for s in scalars)
    m, v = states[:2]
    with np.errstate(all="ignore"):
        g = g * sign
        if wd != 0:
            g = fma(wd, p, g)
        p *= decay
        m[:] = fma(w, g - m, m) if abs(w) < 0.5 else fma(w - np.float32(1), g - m, g)
        body = fma(c2 * g, g, v * b2)
        body[v.size - tail :] = fma(v, b2, (c2 * g) * g)[v.size - tail :]
        v[:] = body
        if len(states) == 3:
            v = np.maximum(states[2], v, out=states[2])
        p += (step * m) / (np.sqrt(v) / bc2s + eps)


def sgd(
    p: np.ndarray, states: list[np.ndarray], g: np.ndarray, scalars: tuple[float, ...], *, tail: int
) -> None:
    """One SGD update in place, with a momentum buffer if ``states`` has one."""
    sign, wd, momentum, keep, nesterov, step = (np.float32(s) for s in scalars)
    with np.errstate(all="ignore"):
        g = g * sign
        if wd != 0:
            g = fma(wd, p, g)
        if states:
            (buffer,) = states
            body = fma(keep, g, buffer * momentum)
            body[p.size - tail :] = fma(buffer, momentum, g * keep)[p.size - tail :]
            buffer[:] = body
            g = fma(momentum, buffer, g) if nesterov else buffer
        p[:] = fma(step, g, p)


def quantise(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (codes, halves, raw) of one tensor's float32 values.

    ``codes`` is uint8, one for each block of 1024; ``halves`` uint16, one for each value; ``raw`` uint32
    of shape (raw blocks, 1024), in the order of the blocks, padded with zeros.
    """
    padded = np.zeros(-(-values.size // 1024) * 1024, np.float32)
    padded[: values.size] = values
    blocks = padded.reshape(-1, 1024)
    bits = blocks.view(np.uint32)
    codes = ((bits >> np.uint32(23)) & np.uint32(255)).max(axis=1).astype(np.uint8)
    powers = np.minimum(141 - codes.astype(np.int32), 126)
    with np.errstate(all="ignore"):
        halves = (blocks * np.ldexp(np.float32(1), powers)[:, None]).astype(np.float16).view(np.uint16)
    halves[codes == 255] = 0
    return codes, halves.reshape(-1)[: values.size], bits[codes == 255]


def dequantise(codes: np.ndarray, halves: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """Return the float32 values that :func:`quantise` wrote as (codes, halves, raw)."""
    padded = np.zeros(codes.size * 1024, np.uint16)
    padded[: halves.size] = halves
    powers = np.minimum(141 - codes.astype(np.int32), 126)
    with np.errstate(all="ignore"):
        scales = np.ldexp(np.float32(1), -powers)[:, None]
        values = padded.view(np.float16).astype(np.float32).reshape(-1, 1024) * scales
    values.view(np.uint32)[codes == 255] = raw
    return values.reshape(-1)[: halves.size]
