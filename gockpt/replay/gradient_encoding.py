"""Gradients as they stand in the ring: as they are, or in 16 bits.

Encodings of one piece's gradient, which starts its own blocks of 1024; those that a device has made are the
same, but for the number of raw slots (:mod:`gockpt.kernels.gradient16_launch`):

- ``None``: float32, as the update consumed it.
- ``"fp16"``: the message of :mod:`gockpt.kernels.gradient16_format`, with exactly as many slots for raw
  blocks as there are blocks with an Inf or NaN.
- ``"bf16"``: the upper halves of float32, rounded to nearest even.

One that would not be smaller than the float32 it stands for is not used: the gradient then travels as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gockpt.kernels.fingerprint_numba import fingerprint
from gockpt.kernels.gradient16_format import BLOCK, RAW
from gockpt.kernels.gradient16_launch import layout, layout_of
from gockpt.kernels.gradient16_numba import narrow, quantise, widen
from gockpt.kernels.numba_compile import WHY_NOT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "Encoded",
    "decode",
    "empty",
    "encode",
    "glance",
    "incomplete",
    "seal",
    "seal_position",
    "sealed",
    "uncertainty",
    "usual_bytes",
    "warm",
]

_LOOK = 1 << 15
_KINDS = (None, "fp16", "bf16")


class Encoded(NamedTuple):
    """Where a gradient stands in the ring, and how.

    Attributes:
        offset: Its offset.
        nbytes: Its bytes.
        encoding: ``None``, ``"fp16"`` or ``"bf16"``.
    """

    offset: int
    nbytes: int
    encoding: str | None


def usual_bytes(encoding: str | None, count: int) -> int:
    """Return what a gradient of ``count`` values takes unless there is an Inf or NaN among them."""
    plain = 4 * count
    if encoding == "bf16":
        return 2 * count
    return min(plain, layout(count, 0).nbytes) if encoding == "fp16" else plain


def encode(
    encoding: str | None,
    values: np.ndarray,
    allocate: Callable[[int], int | None],
    view: Callable[[int, int], np.ndarray],
    free: Callable[[int], None],
) -> Encoded | None:
    """Put a gradient into the ring, in the smallest form that says all of it.

    Args:
        encoding: The one that is wanted.
        values: One-dimensional contiguous float32.
        allocate: Returns the offset of that many bytes, or ``None`` if there is no room.
        view: Returns the bytes that are there: offset, number.
        free: Gives an offset back.

    Returns:
        Where it stands; ``None`` if there is no room.
    """
    plain = values.nbytes
    if encoding == "bf16":
        offset = allocate(plain // 2)
        if offset is None:
            return None
        narrow(values, view(offset, plain // 2).view(np.uint16))
        return Encoded(offset, plain // 2, encoding)
    raw = 0
    # Once more if there are raw blocks, and as it is if these leave nothing to gain.
    while encoding == "fp16":
        message = layout(values.size, raw)
        if message.nbytes >= plain:
            break
        offset = allocate(message.nbytes)
        if offset is None:
            return None
        lost = quantise(values, message, view(offset, message.nbytes))
        if not lost:
            return Encoded(offset, message.nbytes, encoding)
        free(offset)
        raw += lost
    offset = allocate(plain)
    if offset is None:
        return None
    np.copyto(view(offset, plain).view(np.float32), values)
    return Encoded(offset, plain, None)


def decode(encoding: str | None, data: np.ndarray, count: int, first: int, out: np.ndarray) -> None:
    """Write values of an encoded gradient, from the ``first`` on, to ``out``: contiguous float32.

    Args:
        encoding: How it stands there.
        data: All of its bytes.
        count: How many values it has.
        first: Index of the first one wanted.
        out: Its length says how many are.
    """
    if encoding == "fp16":
        layout_of(data.size, count).read(data, 0, out, first)
    elif encoding == "bf16":
        widen(data.view(np.uint16)[first : first + out.size], out)
    else:
        out[:] = data.view(np.float32)[first : first + out.size]


def seal(piece: int, encoding: str | None, data: np.ndarray, number: int, scalars: Sequence[float]) -> int:
    """Return 64 bits that stand for a gradient as it was posted: by them replay knows that it has that one.

    Args:
        piece: Index of its piece.
        encoding: How it stands in the ring.
        data: All of its bytes.
        number: Which gradient of its piece, counted from 1.
        scalars: The update's numbers.
    """
    print_ = fingerprint(data, seal_position(number))
    return sealed(print_, piece, encoding, number, scalars)


def seal_position(number: int) -> int:
    """Return the position at which a gradient's bytes are fingerprinted for its seal, by whomever."""
    return number << 40


def sealed(print_: int, piece: int, encoding: str | None, number: int, scalars: Sequence[float]) -> int:
    """Return the seal of a gradient of which the bytes' fingerprint is known; see :func:`seal`."""
    whose = np.array([piece, _KINDS.index(encoding)], np.int64).view(np.uint8)
    numbers = np.asarray(scalars, np.float64).view(np.uint8)
    return print_ ^ fingerprint(np.concatenate([whose, numbers]), seal_position(number))


def incomplete(encoding: str | None, data: np.ndarray, count: int) -> bool:
    """Whether a gradient that was encoded on a device lacks blocks with an Inf or NaN: it is none then."""
    return encoding == "fp16" and layout_of(data.size, count).incomplete(data) > 0


def empty(encoding: str | None, data: np.ndarray, count: int) -> bool:
    """Whether all values of an encoded gradient are 0: then it is exact."""
    if encoding is None:
        return not data.view(np.float32).any()
    halves = data.view(np.uint16)
    if encoding == "fp16":
        message = layout_of(data.size, count)
        if (data[message.codes : message.codes + message.blocks] == RAW).any():
            return False
        halves = data[message.values : message.values + 2 * count].view(np.uint16)
    # Piece by piece: most gradients say so at once, and none needs much memory.
    parts = range(0, halves.size, _LOOK)
    return not any((halves[first : first + _LOOK] << np.uint16(1)).any() for first in parts)


def glance(encoding: str | None, data: np.ndarray, count: int, step: int) -> np.ndarray:
    """Return every ``step``-th value of an encoded gradient, float32: how large it is there.

    Of a block with an Inf or NaN it is 0.
    """
    at = np.arange(0, count, step)
    if encoding is None:
        return data.view(np.float32)[at]
    if encoding == "bf16":
        found = np.empty(at.size, np.float32)
        widen(data.view(np.uint16)[at], found)
        return found
    message = layout_of(data.size, count)
    codes = data[message.codes : message.codes + message.blocks][at // BLOCK].astype(np.int32)
    halves = data[message.values : message.values + 2 * count].view(np.float16)[at]
    return np.ldexp(halves.astype(np.float32), -np.minimum(141 - codes, 126))


def uncertainty(
    encoding: str | None, data: np.ndarray, count: int, at: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """Return by how much rounding may have moved the decoded ``values`` of the elements ``at``; float32.

    Half of the distance between neighbours, at the most. 0 where a value stands as it was.
    """
    sizes = np.where(np.isfinite(values), np.abs(values), 0).astype(np.float64)
    if encoding == "fp16":
        message = layout_of(data.size, count)
        codes = data[message.codes : message.codes + message.blocks][at // BLOCK].astype(np.int32)
        least = np.ldexp(1.0, np.maximum(codes, 15) - 166)
        found = np.where(codes == RAW, 0.0, np.maximum(sizes * 2.0**-11, least))
    elif encoding == "bf16":
        found = np.maximum(sizes * 2.0**-8, 2.0**-134)
    else:
        found = np.zeros_like(sizes)
    return np.where(np.isfinite(values), found, 0).astype(np.float32)


def warm(encoding: str | None) -> None:
    """Have what writes and reads an encoding compiled, or loaded from the disk, before it is needed."""
    if encoding is not None and not WHY_NOT:
        values, memory = np.zeros(2 * BLOCK, np.float32), np.zeros(12 * BLOCK, np.uint8)
        done = encode(encoding, values, lambda _: 0, lambda _, n: memory[:n], lambda _: None)
        if done is not None:
            decode(encoding, memory[: done.nbytes], values.size, 0, values)
