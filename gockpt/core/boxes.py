"""Boxes: axis-aligned regions of an array, as used by partial and resharded reads.

Pure integer geometry: no tensors, no ranks, no mesh.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Box", "Overlap", "overlap"]


@dataclass(frozen=True, slots=True)
class Box:
    """A region: its start and its shape."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.start) != len(self.shape):
            msg = f"start {self.start} and shape {self.shape} differ in rank"
            raise ValueError(msg)
        if any(n < 0 for n in (*self.start, *self.shape)):
            msg = f"start and shape of a box must not be negative: {self.start}, {self.shape}"
            raise ValueError(msg)

    @property
    def numel(self) -> int:
        """Number of elements; 1 for rank 0."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Overlap:
    """The region two boxes share: its shape, and its start inside each of them."""

    shape: tuple[int, ...]
    in_saved: tuple[int, ...]
    in_wanted: tuple[int, ...]


def overlap(saved: Box, wanted: Box) -> Overlap | None:
    """Return the region two boxes share, in each box's own coordinates.

    Resharding is this function applied to every (saved, wanted) pair.

    Returns:
        The shared shape and its start inside each box, or ``None`` if the boxes only touch or are
        apart. Never an empty overlap.

    Raises:
        ValueError: If the boxes differ in rank.

    Examples:
        >>> overlap(Box((0, 0), (4, 8)), Box((2, 0), (4, 8)))
        Overlap(shape=(2, 8), in_saved=(2, 0), in_wanted=(0, 0))
    """
    if len(saved.start) != len(wanted.start):
        msg = f"boxes differ in rank: {saved} and {wanted}"
        raise ValueError(msg)
    low = tuple(max(a, b) for a, b in zip(saved.start, wanted.start, strict=True))
    high = tuple(
        min(a + n, b + m)
        for a, n, b, m in zip(saved.start, saved.shape, wanted.start, wanted.shape, strict=True)
    )
    shape = tuple(h - lo for lo, h in zip(low, high, strict=True))
    if any(n <= 0 for n in shape):
        return None
    return Overlap(
        shape,
        tuple(lo - a for lo, a in zip(low, saved.start, strict=True)),
        tuple(lo - b for lo, b in zip(low, wanted.start, strict=True)),
    )
