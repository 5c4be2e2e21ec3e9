"""The life of one save, as a table: events in, commands out, no I/O.

The engine reports what happened and carries out what the table answers. An event that the table
does not allow raises and changes nothing. The diagram in the documentation is drawn from this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from gockpt.errors import WorkerError

__all__ = ["TABLE", "Command", "Event", "State", "Transition", "advance"]


class State(Enum):
    """State of a save."""

    IDLE = "idle"
    OPEN = "open"
    BROKEN = "broken"
    CLOSING = "closing"
    CAPTURED = "captured"
    VOID = "void"

    @property
    def phase(self) -> str:
        """Name of the state for users: to them, a window is open until its closing tick."""
        return State.OPEN.value if self is State.BROKEN else self.value

    @property
    def needs_tick(self) -> bool:
        """Whether only a tick leads on from here."""
        return self in (State.OPEN, State.BROKEN, State.VOID)


class Event(Enum):
    """Event reported by the engine."""

    OPENED = "a window starts"
    TICKED = "a tick inside the window"
    SPOILED = "what was copied early can't be used"
    DUE = "the closing tick"
    ARRIVED = "every copy is proven"
    TORN = "a copy was overtaken by a change"
    MISMATCHED = "a replay differs from the live state"
    PUBLISHED = "the checkpoint is durable"
    FAILED = "an error in the background"
    ABORTED = "the window was given up"


class Command(Enum):
    """Action for the engine."""

    SEND_PART = "send the next part"
    SEND_REST = "send all that is left"
    HAND_OVER = "hand the captured state to the worker"
    QUARANTINE = "distrust what failed"
    DISCARD = "drop the attempt's captured bytes"
    RESOLVE = "resolve the handle"
    FAIL = "fail the handle"


@dataclass(frozen=True, slots=True)
class Transition:
    """The state an event leads to, and the commands it asks for, in order."""

    state: State
    commands: tuple[Command, ...] = ()


_S, _E, _C = State, Event, Command
_LOST = Transition(_S.IDLE, (_C.DISCARD, _C.FAIL))

TABLE: dict[tuple[State, Event], Transition] = {
    (_S.IDLE, _E.OPENED): Transition(_S.OPEN, (_C.SEND_PART,)),
    (_S.IDLE, _E.DUE): Transition(_S.CLOSING, (_C.SEND_REST,)),
    (_S.OPEN, _E.TICKED): Transition(_S.OPEN, (_C.SEND_PART,)),
    (_S.OPEN, _E.SPOILED): Transition(_S.BROKEN),
    (_S.OPEN, _E.DUE): Transition(_S.CLOSING, (_C.SEND_REST,)),
    (_S.OPEN, _E.ABORTED): _LOST,
    (_S.OPEN, _E.FAILED): _LOST,
    (_S.BROKEN, _E.SPOILED): Transition(_S.BROKEN),
    (_S.BROKEN, _E.TICKED): Transition(_S.BROKEN),
    (_S.BROKEN, _E.DUE): Transition(_S.CLOSING, (_C.SEND_REST,)),
    (_S.BROKEN, _E.ABORTED): _LOST,
    (_S.BROKEN, _E.FAILED): _LOST,
    (_S.CLOSING, _E.ARRIVED): Transition(_S.CAPTURED, (_C.HAND_OVER,)),
    (_S.CLOSING, _E.TORN): Transition(_S.VOID, (_C.QUARANTINE, _C.DISCARD)),
    (_S.CLOSING, _E.FAILED): _LOST,
    (_S.CLOSING, _E.ABORTED): _LOST,
    (_S.CAPTURED, _E.PUBLISHED): Transition(_S.IDLE, (_C.RESOLVE,)),
    (_S.CAPTURED, _E.MISMATCHED): Transition(_S.VOID, (_C.QUARANTINE, _C.DISCARD)),
    (_S.CAPTURED, _E.FAILED): _LOST,
    (_S.VOID, _E.DUE): Transition(_S.CLOSING, (_C.SEND_REST,)),
    (_S.VOID, _E.FAILED): _LOST,
    (_S.VOID, _E.ABORTED): _LOST,
}
"""Every legal (state, event) pair. A void save is retargeted: its next tick is its closing tick."""


def advance(state: State, event: Event) -> Transition:
    """Return the transition of ``event`` in ``state``.

    Raises:
        WorkerError: If the table does not allow the event in that state.
    """
    try:
        return TABLE[state, event]
    except KeyError:
        msg = f"a save that is {state.value} can't take the event {event.name}; please report this"
        raise WorkerError(msg) from None
