"""Warnings that are logged once per process."""

from __future__ import annotations

import logging

__all__ = ["warn_once"]

_log = logging.getLogger("gockpt")
_said: set[tuple[str, ...]] = set()


def warn_once(key: tuple[str, ...], message: str, *arguments: object) -> None:
    """Log a warning, unless one with this key was logged before."""
    if key not in _said:
        _said.add(key)
        _log.warning(message, *arguments)
