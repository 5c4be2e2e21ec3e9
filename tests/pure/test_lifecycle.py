"""The lifecycle table: nothing illegal happens, and nothing is published that was not proven."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.core.save_state import TABLE, Command, Event, State, advance
from gockpt.errors import WorkerError

ILLEGAL = [pair for pair in itertools.product(State, Event) if pair not in TABLE]


@pytest.mark.parametrize(("state", "event"), list(TABLE))
def test_a_legal_event_leads_where_the_table_says(state, event):
    assert advance(state, event) is TABLE[state, event]


@pytest.mark.parametrize(("state", "event"), ILLEGAL)
def test_an_illegal_event_raises_and_changes_nothing(state, event):
    before = dict(TABLE)
    with pytest.raises(WorkerError, match=f"{state.value} can't take the event {event.name}"):
        advance(state, event)
    assert before == TABLE


def reachable(start: State) -> set[State]:
    seen = {start}
    while True:
        more = {t.state for (state, _), t in TABLE.items() if state in seen} | seen
        if more == seen:
            return seen
        seen = more


@pytest.mark.parametrize("state", list(State))
def test_every_state_is_reachable_and_leads_back_to_idle(state):
    assert state in reachable(State.IDLE)
    assert State.IDLE in reachable(state)


@pytest.mark.parametrize("state", [s for s in State if s is not State.IDLE])
def test_whatever_is_under_way_can_fail(state):
    """A background error is never without an answer."""
    transition = advance(state, Event.FAILED)
    assert transition.state is State.IDLE
    assert transition.commands == (Command.DISCARD, Command.FAIL)


@pytest.mark.parametrize("state", [State.OPEN, State.BROKEN, State.CLOSING, State.VOID])
def test_what_is_not_captured_can_be_given_up(state):
    assert advance(state, Event.ABORTED).commands == (Command.DISCARD, Command.FAIL)


def test_a_window_can_be_spoiled_and_is_still_open_to_users():
    """It only leads on to the closing tick, which copies all."""
    assert advance(State.OPEN, Event.SPOILED).state is State.BROKEN
    assert State.BROKEN.phase == State.OPEN.phase == "open"
    for event in (Event.SPOILED, Event.TICKED):
        transition = advance(State.BROKEN, event)
        assert (transition.state, transition.commands) == (State.BROKEN, ())
    assert advance(State.BROKEN, Event.DUE) == advance(State.OPEN, Event.DUE)
    assert [state for state in State if (state, Event.SPOILED) in TABLE] == [State.OPEN, State.BROKEN]


@pytest.mark.parametrize("state", list(State))
def test_what_needs_a_tick_leads_on_by_one(state):
    assert state.needs_tick == (state is not State.IDLE and (state, Event.DUE) in TABLE)


def test_every_event_and_every_command_is_used():
    assert {event for _, event in TABLE} == set(Event)
    assert {command for t in TABLE.values() for command in t.commands} == set(Command)


@given(st.lists(st.sampled_from(Event), max_size=40))
def test_only_what_arrived_is_published_and_a_save_ends_exactly_once(events):
    """Walk any sequence of events, illegal ones left out, and keep a save's own books."""
    state = State.IDLE
    proven = False
    ends = 0
    for event in events:
        if (state, event) not in TABLE:
            continue
        before = state
        transition = advance(state, event)
        state = transition.state
        if before is State.IDLE:
            proven, ends = False, 0
        if Command.HAND_OVER in transition.commands:
            assert event is Event.ARRIVED
            proven = True
        if Command.DISCARD in transition.commands:
            proven = False
        ended = {Command.RESOLVE, Command.FAIL} & set(transition.commands)
        ends += len(ended)
        assert bool(ended) == (state is State.IDLE)
        if Command.RESOLVE in transition.commands:
            assert proven
        if Command.QUARANTINE in transition.commands:
            assert state is State.VOID
    assert ends <= 1
