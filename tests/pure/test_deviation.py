"""What attributes say of a deviation is taken if it makes sense: attributes are anybody's."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.core.exactness import Deviation, deviation_of

sizes = st.floats(0, 1e290)
deviations = st.builds(
    Deviation,
    grad_dtype=st.sampled_from(["fp16", "bf16"]),
    tensors=st.integers(0, 1 << 40),
    max_abs=sizes,
    of_movement=st.none() | sizes,
    of_values=st.none() | sizes,
    sampled=st.integers(0, 1 << 40),
    elements=st.integers(0, 1 << 40),
)


def attributes(**changes):
    one = Deviation("fp16", 3, 1e-5, 2e-4, None, 64, 1000)
    return {"gockpt": {"step": 1, "deviation": {**asdict(one), **changes}}}


@given(deviations)
def test_it_comes_back_through_json(deviation):
    document = json.loads(json.dumps({"gockpt": {"deviation": asdict(deviation)}, "other": 1}))
    assert deviation_of(document) == deviation


def test_what_a_later_version_adds_is_passed_over():
    assert deviation_of(attributes(more=1)) == deviation_of(attributes()) is not None


@pytest.mark.parametrize(
    "found",
    [
        None,
        [],
        {},
        {"gockpt": 1},
        {"gockpt": {}},
        {"gockpt": {"deviation": None}},
        {"gockpt": {"deviation": {"max_abs": 1.0}}},
        *(attributes(tensors=value) for value in (-1, 1.0, True, None, 1 << 70)),
        *(attributes(max_abs=value) for value in (None, "1", -1.0, float("nan"), float("inf"), True)),
        *(attributes(of_movement=value) for value in ("1", -1e-9, [], 10**400)),
        attributes(grad_dtype=None),
        attributes(grad_dtype="\x1b[31mfp16"),
    ],
)
def test_what_makes_no_sense_is_nothing(found):
    assert deviation_of(found) is None


def test_it_reads_as_a_sentence():
    text = str(Deviation("fp16", 3, 1.234e-5, 2e-4, 1e-6, 64, 1000))
    assert text == (
        "gradients in fp16; 3 tensors off, by up to 1.2e-05, 0.0002 of the window's movement "
        "at the 64 of 1000 elements that were compared"
    )
