"""What attributes say of NaN and Inf: summed up, named in part, and taken if it makes sense."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.core.nonfinite import NonFinite, attributes_with, nonfinite_of, summary

names = st.sampled_from(["model/", "optimizer/", "extra/"]).flatmap(
    lambda head: st.text("ab/.", max_size=4).map(lambda tail: head + tail)
)
counts = st.tuples(st.integers(0, 9), st.integers(0, 9))


@given(st.dictionaries(names, counts, max_size=14), st.sets(names, max_size=5))
def test_it_adds_up_and_comes_back_through_json(found, buffers):
    one = summary(found, buffers)
    assert (one.nan, one.inf) == tuple(sum(pair[i] for pair in found.values()) for i in (0, 1))
    assert one.state == sum(
        sum(pair)
        for name, pair in found.items()
        if name.startswith("optimizer/") or (name.startswith("model/") and name not in buffers)
    )
    assert one.finite == (one.state == 0)
    assert one.arrays == sum(any(pair) for pair in found.values())
    assert len(one.first) == min(one.arrays, 8)
    assert all(found[name] == pair for name, pair in one.first.items())
    document = json.loads(json.dumps(attributes_with({"gockpt": {"step": 1}, "other": 2}, one)))
    assert nonfinite_of(document) == one
    assert (document["gockpt"]["step"], document["other"]) == (1, 2)


def test_parameters_and_optimizer_state_are_named_first():
    found = {"extra/a": (1, 0), "model/mask": (0, 4), "model/w": (2, 0), "optimizer/w/m": (0, 1)}
    one = summary(found, {"model/mask"})
    assert list(one.first) == ["model/w", "optimizer/w/m", "extra/a", "model/mask"]
    assert str(one) == (
        "3 NaN and 5 Inf: model/w (2 NaN, 0 Inf), optimizer/w/m (0 NaN, 1 Inf), extra/a (1 NaN, 0 Inf) "
        "and 1 more"
    )
    assert "none of them in parameters" in str(summary({"model/mask": (0, 4)}, {"model/mask"}))
    assert str(NonFinite()) == "none"


@pytest.mark.parametrize(
    "said",
    [
        None, 7, [], {}, {"nan": 1},
        *(
            {"nan": 0, "inf": 0, "state": 0, "arrays": 0, "first": {}} | change
            for change in (
                {"nan": -1}, {"inf": 1.0}, {"state": True}, {"arrays": None}, {"nan": 1 << 62},
                {"first": []}, {"first": {"a": 1}}, {"first": {"a": [1]}}, {"first": {"a": [1, -1]}},
            )
        ),
    ],
)  # fmt: skip
def test_what_makes_no_sense_says_nothing(said):
    assert nonfinite_of({"gockpt": {"nonfinite": said}}) is None
    assert nonfinite_of({"gockpt": said}) is None
    assert nonfinite_of(said) is None
