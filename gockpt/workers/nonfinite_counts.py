"""Counting NaN and Inf in the final bytes of a save: in each chunk, just before it is written."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from gockpt.core.nonfinite import summary
from gockpt.kernels.nonfinite_numba import count

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from gockpt.core.array_spec import ArraySpec
    from gockpt.core.nonfinite import NonFinite

__all__ = ["Counter"]


class Counter:
    """What was counted so far in one checkpoint. Threads may look at different chunks at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, tuple[int, int]] = {}

    def look(self, spec: ArraySpec, data: np.ndarray) -> None:
        """Count in one chunk: the bytes of its real rows."""
        nan, inf = count(data, spec.dtype)
        if nan or inf:
            name = spec.public_name
            with self._lock:
                before = self._counts.get(name, (0, 0))
                self._counts[name] = (before[0] + nan, before[1] + inf)

    def found(self, state: Mapping[str, Any]) -> NonFinite:
        """Return what there is to say, given the state document."""
        with self._lock:
            return summary(self._counts, frozenset(state.get("buffers", ())))
