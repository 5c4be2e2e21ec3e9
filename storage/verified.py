"""Which checkpoints this process has read as a whole and found right.

Promise: nothing is in here that :meth:`~gockpt.storage.reader.StoredCheckpoint.verify` didn't find without a
problem, in this very process. It is not written down: a disk that rots between two processes would make
such a note a lie.
"""

from __future__ import annotations

__all__ = ["is_known", "remember"]

_attempts: set[str] = set()


def remember(attempt: str, *, ok: bool) -> None:
    """Note how the verification of an attempt, which is unique to its writing, ended last."""
    (_attempts.add if ok else _attempts.discard)(attempt)


def is_known(attempt: str) -> bool:
    """Whether that writing was verified last with no problem."""
    return attempt in _attempts
