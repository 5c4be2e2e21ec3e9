"""Neighbouring parts of one file that are read together. Pure: no file is touched here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["join_neighbours"]


def join_neighbours(
    parts: Sequence[tuple[int, int] | None], *, max_gap: int, most_nbytes: int, most_parts: int
) -> list[list[int]]:
    """Return groups of parts to read at once, each in file order and without overlaps.

    Every part is in one group. Groups come in the order of their first member.

    Args:
        parts: Where each part begins in the file, and its length; ``None`` for one to be read alone.
        max_gap: Largest gap between two parts of a group.
        most_nbytes: Most bytes from the begin of a group to its end, unless it has one part.
        most_parts: Most parts of a group.

    Examples:
        >>> parts = [(64, 10), None, (0, 60), (900, 10)]
        >>> join_neighbours(parts, max_gap=64, most_nbytes=1000, most_parts=8)
        [[2, 0], [1], [3]]
    """
    groups = [[index] for index, part in enumerate(parts) if part is None]
    placed = sorted((*part, index) for index, part in enumerate(parts) if part is not None)
    begin = end = -1
    for start, nbytes, index in placed:
        stop = start + nbytes
        fits = end >= 0 and 0 <= start - end <= max_gap and stop - begin <= most_nbytes
        if fits and len(groups[-1]) < most_parts:
            groups[-1].append(index)
        else:
            groups.append([index])
            begin = start
        end = stop
    return sorted(groups, key=min)
