"""The generators go on from where they were captured."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from gockpt.errors import ManifestCorrupt, StateMismatch
from gockpt.state import rng_state
from gockpt.state.value_decoder import decode
from gockpt.state.value_encoder import encode


@pytest.fixture(autouse=True)
def _generators():
    before, generator = rng_state.capture(), np.random.get_bit_generator()
    yield
    np.random.set_bit_generator(generator)
    rng_state.restore(before)


def draws():
    return [
        random.random(),
        random.gauss(0, 1),
        *np.random.standard_normal(3).tolist(),
        *torch.randn(3).tolist(),
        *torch.rand(20).tolist(),
    ]


def through(states):
    document, arrays = encode(states, prefix=("rng",))
    assert not arrays, "all of it stands in the document"
    return decode(json.loads(json.dumps(document, allow_nan=False)), arrays.__getitem__)


@pytest.mark.parametrize("drawn", range(3))
def test_draws_repeat(drawn):
    for _ in range(drawn):  # a second gaussian may be kept for the next call
        random.gauss(0, 1)
        np.random.randn()
    states = rng_state.capture()
    wanted = draws()
    draws()
    assert rng_state.restore(through(states)) == ()
    assert draws() == wanted


def test_pythons_state_as_version_1_has_it():
    states = {**rng_state.capture(), "python": random.getstate()}
    wanted = draws()
    rng_state.restore(through(states))
    assert draws() == wanted


def test_pythons_state_is_not_encoded_number_by_number():
    document, _ = encode(rng_state.capture()["python"], prefix=("rng",))
    assert len(json.dumps(document)) < 4 * 1.4 * 625


def test_capturing_changes_nothing():
    states = rng_state.capture()
    wanted = draws()
    rng_state.restore(states)
    rng_state.capture()
    assert draws() == wanted


def test_another_generator_of_numpy():
    np.random.set_bit_generator(np.random.PCG64(3))
    states = through(rng_state.capture())
    wanted = draws()
    rng_state.restore(states)
    assert draws() == wanted
    np.random.set_bit_generator(np.random.MT19937(3))
    with pytest.raises(StateMismatch, match="MT19937, but was PCG64") as caught:
        rng_state.check(states)
    assert caught.value.mismatched == ("rng/numpy: saved PCG64, live MT19937",)


def test_devices_that_are_not_there_are_named():
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    states = rng_state.capture()
    held = states["cuda"] + [b""] * (count + 1 - len(states["cuda"]))
    held[:count] = [rng_state._to_bytes(torch.cuda.get_rng_state(index)) for index in range(count)]
    assert rng_state.restore({**states, "cuda": held}) == (f"cuda:{count}",)


@pytest.mark.parametrize(
    "states",
    [3, {}, {"numpy": {}}, {"numpy": {"bit_generator": "MT19937"}, "torch": 3, "cuda": []}],
)
def test_what_is_no_state_is_refused(states):
    with pytest.raises(ManifestCorrupt, match="rng=False"):
        rng_state.check(states)


@pytest.mark.parametrize(
    "change",
    [{"torch": b"x"}, {"python": (3, (1, 2), None)}, {"numpy": {"bit_generator": "MT19937", "state": 1}}],
)
def test_a_state_of_the_wrong_size_is_refused(change):
    with pytest.raises(ManifestCorrupt, match="can't be set"):
        rng_state.restore({**rng_state.capture(), **change})
