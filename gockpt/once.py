"""Warnings that a process logs once, however often their cause occurs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["leave_to_trainer", "warn_once"]

_log = logging.getLogger("gockpt")
_logged: set[Hashable] = set()
_silent = False


def warn_once(cause: Hashable, message: str, *arguments: object) -> None:
    """Log ``message`` at WARNING, unless one of the same ``cause`` was logged before in this process."""
    if not _silent and cause not in _logged:
        _logged.add(cause)
        _log.warning(message, *arguments)


def leave_to_trainer() -> None:
    """Log none of them from here on: a worker process finds the same causes as its trainer."""
    global _silent  # noqa: PLW0603 - of this process, as what it has logged
    _silent = True
