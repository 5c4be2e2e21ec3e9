"""Boundary of one tick: its step and its time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Boundary"]


@dataclass(frozen=True, slots=True)
class Boundary:
    """One tick.

    Attributes:
        step: The user's step.
        updates: Optimizer updates seen so far.
        extra: The user's extras.
        began: When the call began, in ``perf_counter`` seconds.
    """

    step: int
    updates: int
    extra: Mapping[str, Any] | None
    began: float
