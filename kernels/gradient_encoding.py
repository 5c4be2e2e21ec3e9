"""Encodings of gradients in the ring: raw float32, or 16 bits.

Encodings of one piece's gradient, which starts its own blocks of 1024; those that a device has made are the
same, but for the number of raw slots (:mod:`gockpt.kernels.gradient16_launch`):

- ``None``: float32, as the update consumed it.
- ``"fp16"``: the message of :mod:`gockpt.kernels.gradient16_format`, with exactly as many slots for raw
  blocks as there are blocks with an Inf or NaN.
- ``"bf16"``: the upper halves of float32, rounded to nearest even.

An encoding that would not be smaller than the float32 values is not used: the gradient then stays float32.
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
    """Place and encoding of a gradient in the ring.

    Attributes:
        offset: Its offset.
        nbytes: Its bytes.
        encoding: ``None``, ``"fp16"`` or ``"bf16"``.
    """

    offset: int
    nbytes: int
    encoding: str | None


def usual_bytes(encoding: str | None, count: int) -> int:
    """Return the bytes of a gradient of ``count`` values without Inf and NaN."""
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
    """Put a gradient into the ring, encoded if that is smaller.

    Args:
        encoding: The wanted encoding.
        values: One-dimensional contiguous float32.
        allocate: Returns the offset of that many bytes, or ``None`` if there is no room.
        view: Returns the bytes at an offset: offset, number.
        free: Frees an offset.

    Returns:
        Its place; ``None`` if there is no room.
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
        encoding: Its encoding.
        data: All of its bytes.
        count: Its number of values.
        first: Index of the first wanted value.
        out: The target; its length is the number of wanted values.
    """
    if encoding == "fp16":
        layout_of(data.size, count).read(data, 0, out, first)
    elif encoding == "bf16":
        widen(data.view(np.uint16)[first : first + out.size], out)
    else:
        out[:] = data.view(np.float32)[first : first + out.size]


def seal(piece: int, encoding: str | None, data: np.ndarray, number: int, scalars: Sequence[float]) -> int:
    """Return 64 bits that identify a gradient as posted, by which replay checks that it got the same one.

    Args:
        piece: Index of its piece.
        encoding: Its encoding in the ring.
        data: All of its bytes.
        number: Its number among its piece's gradients, from 1.
        scalars: The update's scalars.
    """
    print_ = fingerprint(data, seal_position(number))
    return sealed(print_, piece, encoding, number, scalars)


def seal_position(number: int) -> int:
    """Return the position at which a gradient's bytes are fingerprinted for its seal, by whomever."""
    return number << 40


def sealed(print_: int, piece: int, encoding: str | None, number: int, scalars: Sequence[float]) -> int:
    """Return the seal of a gradient, given its bytes' fingerprint; see :func:`seal`."""
    whose = np.array([piece, _KINDS.index(encoding)], np.int64).view(np.uint8)
    numbers = np.asarray(scalars, np.float64).view(np.uint8)
    return print_ ^ fingerprint(np.concatenate([whose, numbers]), seal_position(number))


def incomplete(encoding: str | None, data: np.ndarray, count: int) -> bool:
    """Whether a gradient encoded on a device lacks blocks with an Inf or NaN, so that it is unusable."""
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
    # Part by part: most gradients are decided by the first, and little memory is needed.
    parts = range(0, halves.size, _LOOK)
    return not any((halves[first : first + _LOOK] << np.uint16(1)).any() for first in parts)


def glance(encoding: str | None, data: np.ndarray, count: int, step: int) -> np.ndarray:
    """Return every ``step``-th value of an encoded gradient, as float32, to find where it is large.

    Values of blocks with an Inf or NaN are 0.
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
    """Return the greatest rounding error of the decoded ``values`` of the elements ``at``, as float32.

    At most half of the distance between neighbours. 0 for a value that was stored raw.
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
    """Compile the code of an encoding, or load it from the disk, before it is needed."""
    if encoding is not None and not WHY_NOT:
        values, memory = np.zeros(2 * BLOCK, np.float32), np.zeros(12 * BLOCK, np.uint8)
        done = encode(encoding, values, lambda _: 0, lambda _, n: memory[:n], lambda _: None)
        if done is not None:
            decode(encoding, memory[: done.nbytes], values.size, 0, values)
