"""Gradients to 16 bits on the host: the Numba version.

Contract: :func:`quantise` writes the message of one tensor that :mod:`gockpt.kernels.gradient16_format`
describes, equal to ``reference.quantise`` in every bit, raw blocks in the order of the blocks. :func:`narrow`
rounds float32 to bfloat16 as torch does, to nearest even, except that a NaN keeps its sign and upper payload;
:func:`widen` is exact. All release the GIL and start no thread.
"""

from __future__ import annotations

import numpy as np

from gockpt.kernels.gradient16_format import BLOCK, RAW, Message
from gockpt.kernels.numba_compile import serial

__all__ = ["narrow", "quantise", "widen"]

_MAGNITUDE, _SIGN, _NORMAL = np.uint32(0x7FFFFFFF), np.uint32(0x8000), np.uint32(0x38800000)
_BIAS, _HALF, _ROUND = np.uint32(0x38000000), np.uint32(0x3F000000), np.uint32(0x0FFF)
_INFINITY, _QUIET, _ROUND_16 = np.uint32(0x7F800000), np.uint32(0x40), np.uint32(0x7FFF)
_1, _13, _16, _23 = np.uint32(1), np.uint32(13), np.uint32(16), np.uint32(23)


@serial
def _round(
    values: np.ndarray,
    scale: np.float32,
    scaled: np.ndarray,
    scaled_bits: np.ndarray,
    raised: np.ndarray,
    raised_bits: np.ndarray,
    halves: np.ndarray,
) -> None:
    """One block of finite float32, times ``scale``, to float16. Each pair of arrays is one memory.

    In [0.5, 1) float32 counts in steps of 2**-24, as subnormal float16 do: adding 0.5 rounds to them.
    """
    for i in range(values.size):
        y = values[i] * scale
        scaled[i] = y
        raised[i] = abs(y) + np.float32(0.5)
    for i in range(values.size):
        bits = scaled_bits[i]
        magnitude = bits & _MAGNITUDE
        odd = (magnitude >> _13) & _1
        normal = (magnitude - _BIAS + _ROUND + odd) >> _13
        small = raised_bits[i] - _HALF
        halves[i] = ((bits >> _16) & _SIGN) | (small if magnitude < _NORMAL else normal)


@serial
def _largest(bits: np.ndarray) -> np.uint32:
    """Return the largest magnitude of a block, as bits. From 0 over a slice: no other form is vectorised."""
    largest = np.uint32(0)
    for i in range(bits.size):
        magnitude = bits[i] & _MAGNITUDE
        largest = magnitude if magnitude > largest else largest  # noqa: FURB136 - one type throughout
    return largest


@serial
def _quantise(
    values: np.ndarray,
    bits: np.ndarray,
    codes: np.ndarray,
    slots: np.ndarray,
    halves: np.ndarray,
    side: np.ndarray,
    scale_bits: np.ndarray,
    scale: np.ndarray,
) -> int:
    """Return how many raw blocks there are; those that find no slot have slot -1."""
    scaled = np.empty(BLOCK, np.float32)
    raised = np.empty(BLOCK, np.float32)
    scaled_bits, raised_bits = scaled.view(np.uint32), raised.view(np.uint32)
    raw = 0
    for block in range(codes.size):
        first = block * BLOCK
        last = min(first + BLOCK, values.size)
        code = _largest(bits[first:last]) >> _23
        codes[block] = code
        slots[block] = -1
        if code == RAW:
            for i in range(first, last):
                halves[i] = 0
            if (raw + 1) * BLOCK <= side.size:
                slots[block] = raw
                for i in range(BLOCK):
                    side[raw * BLOCK + i] = bits[first + i] if first + i < last else 0
            raw += 1
            continue
        power = min(141 - int(code), 126)
        scale_bits[0] = np.uint32(127 + power) << _23
        _round(values[first:last], scale[0], scaled, scaled_bits, raised, raised_bits, halves[first:last])
    return raw


def quantise(values: np.ndarray, message: Message, data: np.ndarray) -> int:
    """Write the message of one tensor.

    Args:
        values: Contiguous one-dimensional float32.
        message: Its layout, planned for one tensor of that many values.
        data: Where to: one-dimensional contiguous uint8 view, at a multiple of 4 bytes.

    Returns:
        How many raw blocks found no slot. Unless 0, the message is incomplete and must not be read.

    Raises:
        ValueError: If layout, values and memory do not fit together; nothing was written.
    """
    count = values.size
    if message.counts != (count,) or data.size < message.nbytes or values.dtype != np.float32:
        msg = (
            f"a message of {message.counts} values in {message.nbytes} bytes can't take {count} of "
            f"{values.dtype} in {data.size}"
        )
        raise ValueError(msg)
    scale_bits = np.zeros(1, np.uint32)
    raw = _quantise(
        values,
        values.view(np.uint32),
        data[message.codes : message.codes + message.blocks],
        data[message.slots : message.slots + 4 * message.blocks].view(np.int32),
        data[message.values : message.values + 2 * count].view(np.uint16),
        data[message.side : message.nbytes].view(np.uint32),
        scale_bits,
        scale_bits.view(np.float32),
    )
    counter = data[:16].view(np.int32)
    counter[:] = 0
    counter[0] = raw
    return message.incomplete(data)


@serial
def _narrow(bits: np.ndarray, out: np.ndarray) -> None:
    for i in range(bits.size):
        u = bits[i]
        upper = u >> _16
        rounded = (u + _ROUND_16 + (upper & _1)) >> _16
        out[i] = (upper | _QUIET) if (u & _MAGNITUDE) > _INFINITY else rounded


@serial
def _widen(halves: np.ndarray, bits: np.ndarray) -> None:
    for i in range(halves.size):
        bits[i] = np.uint32(halves[i]) << _16


def narrow(values: np.ndarray, out: np.ndarray) -> None:
    """Write float32 ``values`` as the bits of bfloat16 to ``out`` (uint16), rounded to nearest even."""
    if values.size != out.size:
        msg = f"{values.size} values do not fit {out.size} places"
        raise ValueError(msg)
    _narrow(values.view(np.uint32), out)


def widen(halves: np.ndarray, out: np.ndarray) -> None:
    """Write the float32 that the bfloat16 bits ``halves`` (uint16) stand for to ``out``."""
    if halves.size != out.size:
        msg = f"{halves.size} values do not fit {out.size} places"
        raise ValueError(msg)
    _widen(halves, out.view(np.uint32))
