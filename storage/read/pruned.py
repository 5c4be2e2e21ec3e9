"""Tell a checkpoint that was pruned under its reader from one that lost a file."""

from __future__ import annotations

import os

from gockpt.storage.format import step_names
from gockpt.storage.read.safe_open import GONE

__all__ = ["is_gone"]


def is_gone(directory: int) -> bool:
    """Return whether an open directory was removed, or set aside to be removed.

    That is so when its parent lists it under no name any more, or under the name of trash.
    """
    status = os.fstat(directory)
    if status.st_nlink == 0:
        return True
    try:
        parent = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:
        return error.errno in GONE
    try:
        return not any(_is(status, parent, name) for name in os.listdir(parent))
    except PermissionError:
        return False  # it can't be told; then what is missing counts as damage
    finally:
        os.close(parent)


def _is(status: os.stat_result, parent: int, name: str) -> bool:
    """Return whether a name in the parent, other than one of trash, stands for that directory."""
    known = step_names.parse(name)
    if known is not None and known.kind == "trash":
        return False
    try:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(status, found)
