"""Record of the checkpoints that this process has read as a whole and verified.

Promise: it holds only checkpoints for which :meth:`~gockpt.storage.read.checkpoint.StoredCheckpoint.verify`
found no problem in this very process. It is not stored: a disk may decay between two processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["is_known", "known", "learn", "remember"]

_attempts: set[str] = set()


def remember(attempt: str, *, ok: bool) -> None:
    """Record the result of the last verification of an attempt."""
    (_attempts.add if ok else _attempts.discard)(attempt)


def known() -> tuple[str, ...]:
    """Return all of them, for a worker process."""
    return tuple(_attempts)


def learn(attempts: Iterable[str]) -> None:
    """Replace the record by that of the trainer's process."""
    _attempts.clear()
    _attempts.update(attempts)


def is_known(attempt: str) -> bool:
    """Whether the last verification of an attempt found no problem."""
    return attempt in _attempts
