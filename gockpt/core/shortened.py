"""Lists of names in messages: the first few, and the number of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["shortened"]


def shortened(items: Sequence[str], most: int, *, total: int | None = None) -> str:
    """Return the first ``most`` items, joined by commas, and the number of the others.

    Args:
        items: The items, or only the first of them.
        most: How many are listed.
        total: The number of all items, if there are more than in ``items``.

    Examples:
        >>> shortened(["a", "b", "c", "d"], 2)
        'a, b and 2 more'
        >>> shortened(["a", "b"], 2)
        'a, b'
    """
    listed = items[:most]
    left = (len(items) if total is None else total) - len(listed)
    return ", ".join(listed) + (f" and {left} more" if left > 0 else "")
