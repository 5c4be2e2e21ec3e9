"""Which checkpoints this process has read as a whole and found right.

Promise: nothing is in here that :meth:`~gockpt.storage.read.checkpoint.StoredCheckpoint.verify` didn't find
without a problem, in this very process. It is not written down: a disk that rots between two processes would
make such a note a lie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["is_known", "known", "learn", "remember"]

_attempts: set[str] = set()


def remember(attempt: str, *, ok: bool) -> None:
    """Note how the verification of an attempt, which is unique to its writing, ended last."""
    (_attempts.add if ok else _attempts.discard)(attempt)


def known() -> tuple[str, ...]:
    """Return all of them: for a process that works for this one."""
    return tuple(_attempts)


def learn(attempts: Iterable[str]) -> None:
    """Know just what the process that this one works for knows."""
    _attempts.clear()
    _attempts.update(attempts)


def is_known(attempt: str) -> bool:
    """Whether that writing was verified last with no problem."""
    return attempt in _attempts
