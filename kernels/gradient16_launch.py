"""Gradients in 16 bits, each on its own: what one takes, and the launches that write many of them at once.

Pure integer arithmetic, no device. An *encoded gradient* is one stretch of float32 values, in one of two
forms:

- ``"fp16"``: one message of :mod:`gockpt.kernels.gradient16_format` with a single tensor in it.
- ``"bf16"``: the upper halves of float32, rounded to nearest even.

Where the host writes a message it counts the raw blocks first. A device can't be asked for that number, so
that a message made there has one raw slot for each :data:`ROOMY` blocks. One that has more raw blocks than
slots says so in its counter, and is no gradient. What a form would not make smaller travels as it is.

Legend: S gradients of a launch, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from gockpt.kernels.gradient16_format import BLOCK, Gradient, Message, plan_message
from gockpt.kernels.launch_tables import BlockTable, cut

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ROOMY", "Form", "Place", "fitting", "form_of", "layout", "layout_of", "plan_each"]

ROOMY = 64
"""Blocks of a message for each raw slot: 3 % more bytes than without any."""


@dataclass(frozen=True, slots=True)
class Form:
    """How one gradient travels: ``encoding`` is ``None`` for as it is."""

    encoding: str | None
    nbytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """One gradient to be encoded.

    Attributes:
        address: Where its float32 values are.
        count: How many.
        offset: Byte of the buffer where it goes; a multiple of 16.
        nbytes: Bytes it takes there, as :func:`form_of` says.
    """

    address: int
    count: int
    offset: int
    nbytes: int


@lru_cache(maxsize=4096)
def layout(count: int, raw: int) -> Message:
    """Return the layout of the message of one gradient of ``count`` values, with ``raw`` slots."""
    return plan_message([Gradient(0, count, 4)], raw)


def layout_of(nbytes: int, count: int) -> Message:
    """Return the layout of a message of which the size is known."""
    return layout(count, (nbytes - layout(count, 0).nbytes) // (4 * BLOCK))


def form_of(encoding: str | None, count: int) -> Form:
    """Return how a gradient of ``count`` values leaves a device if ``encoding`` is asked for."""
    nbytes = 4 * count
    if encoding == "bf16":
        nbytes = 2 * count
    elif encoding == "fp16":
        nbytes = layout(count, -(-count // BLOCK) // ROOMY).nbytes
    return Form(encoding, nbytes) if nbytes < 4 * count else Form(None, 4 * count)


def fitting(nbytes: int) -> int:
    """Return how many values at least can be encoded in so many bytes, in either form; 0 for too few."""
    # A block takes 2 bytes for each value, 5 for code and slot, and its share of a raw slot.
    blocks = max(0, nbytes - 128) // (2 * BLOCK + 5 + 4 * BLOCK // ROOMY)
    return blocks * BLOCK if blocks else max(0, nbytes - 128) // 32 * 16


def plan_each(encoding: str, places: Sequence[Place], capacity: int) -> tuple[BlockTable, ...]:
    """Return the launches that encode gradients into a buffer, each at its place; the aligned ones first.

    A table's ``places`` are, for ``"bf16"``, int64[S, 2]: the byte where a gradient goes, and the number of
    its values. For ``"fp16"``, int64[S, 7]: the byte of the values, their number, the bytes of codes, slots,
    side area and counter, and the number of raw slots.

    Args:
        encoding: The form of all of them.
        places: What is encoded.
        capacity: Bytes of the buffer, whose own address is a multiple of 16.

    Raises:
        ValueError: If a gradient does not fit, two would meet, or a number is none that can be.
    """
    order = sorted(range(len(places)), key=lambda number: places[number].offset)
    rows, end = [], 0
    for place in (places[number] for number in order):
        least = 2 * place.count if encoding == "bf16" else layout(place.count, 0).nbytes
        if (
            place.count < 1
            or place.address < 0
            or place.address % 4
            or place.offset % 16
            or place.offset < end
            or place.nbytes < least
            or place.offset + place.nbytes > capacity
        ):
            msg = f"a gradient in {encoding} can't stand in a buffer of {capacity} bytes like this: {place}"
            raise ValueError(msg)
        end = place.offset + place.nbytes
        rows.append(_row(encoding, place))
    spans, table = np.array(order, np.int64), np.array(rows, np.int64).reshape(len(rows), -1)
    address = np.array([places[number].address for number in order], np.int64)
    found = []
    for width in (16, 4):
        chosen = np.flatnonzero((address % 16 == 0) == (width == 16))
        if chosen.size:
            part = np.ascontiguousarray(table[chosen])
            blocks = cut(part[:, 1], BLOCK)
            found.append(BlockTable(width, 4, spans[chosen], address[chosen], part, blocks))
    return tuple(found)


def _row(encoding: str, place: Place) -> tuple[int, ...]:
    if encoding == "bf16":
        return (place.offset, place.count)
    message = layout_of(place.nbytes, place.count)
    sections = (message.codes, message.slots, message.side, 0)
    starts = (place.offset + start for start in sections)
    return (place.offset + message.values, place.count, *starts, message.raw_slots)
