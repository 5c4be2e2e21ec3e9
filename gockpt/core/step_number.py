"""Step of a training run, as callers pass it: a whole number from 0 up."""

from __future__ import annotations

import operator
from typing import Any

from gockpt.errors import UsageError

__all__ = ["checked_step"]


def checked_step(step: Any) -> int | None:
    """Return the step as Python's own number; ``None`` if there is none.

    Whole numbers of NumPy and torch count as such; ``True`` and ``3.0`` do not.

    Raises:
        UsageError: If it is not a whole number from 0 up.
    """
    if step is None:
        return None
    if hasattr(step, "__index__") and not isinstance(step, bool) and 0 <= operator.index(step) < 1 << 62:
        return operator.index(step)
    msg = f"step={step!r}: expected a whole number from 0 up, or None"
    raise UsageError(msg)
