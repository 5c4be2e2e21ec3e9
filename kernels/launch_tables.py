"""Which program of a device kernel works on which bytes: tables, worked out once from plain numbers.

Pure integer arithmetic, no device. A *span* is one stretch of device memory. Spans are grouped by how they
can be read (one launch per group), and cut into blocks of equal size. A program finds its work by two
loads: its block's ``(span, number)``, then that span's address and place. Only addresses change
from step to step, so only they are sent again (:func:`rebound`).

Legend: S spans of a group, B blocks. All byte counts and offsets are int64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "WORDS",
    "BlockTable",
    "Piece",
    "Span",
    "cut",
    "plan_fingerprints",
    "plan_pack",
    "rebound",
]

WORDS = 2048
"""Words that one block holds. To be fingerprinted, a word has 8 bytes; to be packed, it has 4, or fewer where
addresses or offsets force it."""

_CLASSES = (16, 8, 4, 2, 1)


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes to be packed: ``nbytes`` at ``address``, going to ``offset`` of the buffer."""

    address: int
    nbytes: int
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes to be fingerprinted.

    Attributes:
        address: Where they are.
        nbytes: How many.
        position: Position of the first one: a multiple of 8, see ``fingerprint_numba``.
    """

    address: int
    nbytes: int
    position: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class BlockTable:
    """One launch.

    Attributes:
        width: Every address (and offset) is a multiple of this many bytes: 16, 8, 4, 2 or 1.
        word: Bytes per word.
        spans: int64[S]: each span's index in the list that was planned. Empty spans are in no table.
        addresses: int64[S].
        places: int64[S, 2]: where a span goes, and its length, both in bytes; when fingerprinting, the
            number of its first word, and its length in bytes. When quantising,
            int64[S, 3]: where its values go, how many there are, and where its codes go. When encoding,
            see ``gradient16_launch.plan_each``.
        blocks: int32[B, 2]: a span of this table, and the number of the block within it.
    """

    width: int
    word: int
    spans: np.ndarray
    addresses: np.ndarray
    places: np.ndarray
    blocks: np.ndarray


def plan_pack(spans: Sequence[Span], capacity: int) -> tuple[BlockTable, ...]:
    """Return the launches that copy spans into a buffer, or out of it; the widest accesses first.

    Args:
        spans: What is copied.
        capacity: Bytes of the buffer. Its own address is a multiple of 16.

    Raises:
        ValueError: If a number is negative, a span does not fit into the buffer, or two would meet there.
    """
    table = np.array([(s.address, s.nbytes, s.offset) for s in spans], np.int64).reshape(-1, 3)
    address, nbytes, offset = table.T
    bad = np.flatnonzero((table < 0).any(axis=1) | (nbytes > capacity) | (offset > capacity - nbytes))
    if bad.size:
        msg = f"span {bad[0]} does not fit into a buffer of {capacity} bytes: {spans[bad[0]]}"
        raise ValueError(msg)
    order = np.argsort(offset, kind="stable")
    order = order[nbytes[order] > 0]
    meets = np.flatnonzero(offset[order][:-1] + nbytes[order][:-1] > offset[order][1:])
    if meets.size:
        first, second = order[meets[0]], order[meets[0] + 1]
        msg = f"spans {first} and {second} would overlap in the buffer: {spans[first]}, {spans[second]}"
        raise ValueError(msg)
    width = _alignment(address | offset)
    found = []
    for kind in _CLASSES:
        chosen = np.flatnonzero((width == kind) & (nbytes > 0))
        if chosen.size:
            places = np.stack([offset[chosen], nbytes[chosen]], axis=1)
            word = min(kind, 4)
            blocks = cut(nbytes[chosen], WORDS * word)
            found.append(BlockTable(kind, word, chosen, address[chosen], places, blocks))
    return tuple(found)


def plan_fingerprints(pieces: Sequence[Piece]) -> tuple[BlockTable, ...]:
    """Return the launches that fingerprint stretches of memory; the widest accesses first.

    Raises:
        ValueError: If a position is not at a word, or a number is negative or beyond 2**63.
    """
    for number, piece in enumerate(pieces):
        if (
            min(piece.address, piece.nbytes, piece.position) < 0
            or piece.position % 8
            or piece.position + piece.nbytes >= 1 << 63
        ):
            msg = f"stretch {number} does not begin at a multiple of 8 bytes, or not below 2**63: {piece}"
            raise ValueError(msg)
    table = np.array([(p.address, p.nbytes, p.position // 8) for p in pieces], np.int64).reshape(-1, 3)
    address, nbytes, first = table.T
    width = _alignment(address)
    found = []
    for kind in _CLASSES:
        chosen = np.flatnonzero((width == kind) & (nbytes > 0))
        if chosen.size:
            places = np.stack([first[chosen], nbytes[chosen]], axis=1)
            blocks = cut(nbytes[chosen], 8 * WORDS)
            found.append(BlockTable(kind, 8, chosen, address[chosen], places, blocks))
    return tuple(found)


def rebound(table: BlockTable, addresses: Sequence[int]) -> BlockTable:
    """Return the same launch over memory that has moved.

    Args:
        table: What was planned.
        addresses: One for each item of the list that was planned, in its order.

    Raises:
        ValueError: If an address is not as aligned as the one it replaces: plan again.
    """
    moved = np.array(addresses, np.int64)[table.spans]
    bad = np.flatnonzero(moved % table.width)
    if bad.size:
        msg = (
            f"address {moved[bad[0]]} of span {table.spans[bad[0]]} is not a multiple of {table.width}, "
            "as the one that was planned for: plan again"
        )
        raise ValueError(msg)
    return replace(table, addresses=moved)


def _alignment(numbers: np.ndarray) -> np.ndarray:
    """Return the largest power of two up to 16 that divides each number."""
    found: np.ndarray = np.gcd(numbers, 16)
    return found


def cut(lengths: np.ndarray, size: int) -> np.ndarray:
    """Return int32[B, 2]: every block of every span, in order."""
    counts = -(-lengths // size)
    span = np.repeat(np.arange(counts.size), counts)
    ends = np.cumsum(counts)
    number = np.arange(span.size) - np.repeat(ends - counts, counts)
    if span.size >= 1 << 30:
        msg = f"{span.size} blocks are more than one launch counts (2**30): pack fewer tensors at a time"
        raise ValueError(msg)
    return np.ascontiguousarray(np.stack([span, number], axis=1).astype(np.int32))
