"""What may go: never what a rule names, never the newest, never the last that is known to be whole."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.core.retention import Publication, abandoned, expendable, superseded
from gockpt.options import Keep

FINITE = st.sampled_from([None, True, False])
METRICS = st.none() | st.floats() | st.integers(-3, 3)


@st.composite
def histories(draw):
    """Any publications: steps go back, repeat and jump."""
    steps = draw(st.lists(st.integers(0, 12), max_size=14))
    gaps = draw(st.lists(st.integers(1, 3), min_size=len(steps), max_size=len(steps)))
    found, seq = [], 0
    for step, gap in zip(steps, gaps, strict=True):
        seq += gap
        found.append(Publication(seq, step, draw(METRICS), draw(st.booleans()), draw(FINITE)))
    return draw(st.permutations(found))


@st.composite
def rules(draw):
    """Any rules."""
    best = draw(st.integers(0, 3))
    return Keep(
        newest=draw(st.integers(1, 5)),
        every=draw(st.none() | st.integers(1, 6)),
        best=best,
        metric="loss" if best else None,
        mode=draw(st.sampled_from(["min", "max"])),
    )


@given(histories(), rules())
def test_what_stays_is_what_the_rules_name_and_no_more(history, keep):
    """Said again from the rules' words, the long way round."""
    gone = expendable(history, keep)
    stay = [one for one in history if one.seq not in gone]
    counted = [one for one in history if not any(o.step == one.step and o.seq > one.seq for o in history)]
    left = [one for one in counted if any(o.step < one.step and o.seq > one.seq for o in counted)]
    line = sorted((one for one in counted if one not in left), key=lambda one: -one.seq)
    line += sorted(left, key=lambda one: -one.seq)
    real = [one for one in counted if one.metric is not None and math.isfinite(one.metric)]
    named = set(line[: keep.newest])
    named |= {one for one in counted if keep.every and one.step % keep.every == 0}
    for one in real:
        better = [
            o
            for o in real
            if (o.metric < one.metric if keep.mode == "min" else o.metric > one.metric)
            or (o.metric == one.metric and o.seq > one.seq)
        ]
        if len(better) < keep.best:
            named.add(one)
    if keep.best and not real:
        named |= set(counted)
    whole = [one for one in history if one.verified]
    if whole:
        named.add(max(whole, key=lambda one: one.seq))
    good = [one for one in history if one.finite is not False]
    if good:
        named.add(max(good, key=lambda one: one.seq))
    assert set(stay) == named


@given(histories(), rules())
def test_the_newest_and_the_last_whole_one_never_go(history, keep):
    gone = expendable(history, keep)
    if history:
        assert max(one.seq for one in history) not in gone
    whole = [one for one in history if one.verified]
    assert not whole or any(one.seq not in gone for one in whole)
    assert len(history) - len(gone) >= min(keep.newest, len({one.step for one in history}))


@given(histories(), rules())
def test_a_second_look_takes_nothing_more(history, keep):
    gone = expendable(history, keep)
    assert expendable([one for one in history if one.seq not in gone], keep) == frozenset()


def seqs(steps, keep, **metrics):
    values = metrics.get("metric", [None] * len(steps))
    found = [
        Publication(n, step, value) for n, (step, value) in enumerate(zip(steps, values, strict=True), 1)
    ]
    gone = expendable(found, keep)
    return [one.step for one in found if one.seq not in gone]


@pytest.mark.parametrize("known", [True, None])
def test_the_newest_that_is_not_known_to_have_nan_stays(known):
    found = [Publication(n, 10 * n, finite=known if n < 4 else False) for n in range(1, 8)]
    assert expendable(found, Keep(newest=2)) == {1, 2, 4, 5}
    assert expendable(found[:4], Keep(newest=1)) == {1, 2}
    assert expendable(found[3:], Keep(newest=2)) == {4, 5}  # as there is none, two of them are no worse


def test_an_abandoned_branch_goes_first_once_its_successor_is_there():
    assert seqs([1000, 1250, 1500], Keep(newest=2)) == [1250, 1500]
    assert seqs([1000, 1250, 1500, 1100], Keep(newest=2)) == [1000, 1100]
    assert seqs([1000, 1250, 1500, 1100, 1200], Keep(newest=2)) == [1100, 1200]
    assert seqs([1000, 1250, 1500, 1100, 1600], Keep(newest=3)) == [1000, 1100, 1600]


def test_the_predecessor_stays_even_when_all_before_was_abandoned():
    assert seqs([500, 1000, 10], Keep(newest=2)) == [1000, 10]


def test_milestones_and_the_best_stay_beside_the_newest():
    keep = Keep(newest=2, every=300, best=1, metric="loss")
    assert seqs([100, 200, 300, 400, 500, 600, 700], keep, metric=[3, 1, 2, 5, 4, 7, 6]) == [
        200,
        300,
        600,
        700,
    ]
    keep = Keep(newest=1, best=2, metric="loss", mode="max")
    assert seqs([1, 2, 3, 4], keep, metric=[0.5, 0.9, 0.7, 0.1]) == [2, 3, 4]


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_no_number_is_never_the_best(bad):
    for mode in ("min", "max"):
        keep = Keep(newest=1, best=1, metric="loss", mode=mode)
        assert seqs([1, 2, 3], keep, metric=[bad, 5.0, bad]) == [2, 3]


def test_superseded_and_abandoned_are_told_apart():
    found = [Publication(1, 5), Publication(2, 9), Publication(3, 5), Publication(4, 7)]
    assert superseded(found) == {1}
    assert abandoned(found) == {2}
