"""Saving inside one call: all of the state is copied and proven before the call returns.

Nothing is left on its way, so no later change can reach the save, and its step never moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gockpt.core.save_state import State
from gockpt.deferred_signals import let_through

if TYPE_CHECKING:
    from collections.abc import Callable

    from gockpt.saving.boundary import Boundary
    from gockpt.saving.last_tick import Addition
    from gockpt.saving.lock import Lock
    from gockpt.saving.session import Save
    from gockpt.state.live_state import LiveState

__all__ = ["save_inside_call", "wait_until_free"]

POLL = 0.1
"""Seconds between two checks for signals."""


def save_inside_call(
    save: Save, collect: Callable[[], LiveState], boundary: Boundary, *, addition: Addition | None = None
) -> None:
    """Capture the state now; what another thread changed meanwhile is captured again, for the same step.

    The save is captured afterwards, or has failed. ``addition``: extras, random states and options, where
    they were remembered at ``boundary``.
    """
    save.close(collect(), boundary, addition=addition)
    save.settle()
    while save.state is State.VOID:
        save.retarget(collect(), boundary, remembered=True)
        save.settle()


def wait_until_free(save: Save, lock: Lock) -> None:
    """Return when no save is being copied or written; only while holding the lock once."""
    save.settle()
    while save.state is State.CAPTURED:
        lock.wait(POLL)
        let_through()
