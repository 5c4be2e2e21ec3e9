"""A training state that version 1 of the format wrote is loaded bit for bit, whatever wrote it since."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gockpt

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture
def training(monkeypatch):
    monkeypatch.syspath_prepend(GOLDEN)
    import training

    yield training
    for name in ("training", "content"):
        del sys.modules[name]


def test_the_golden_training_state(training, same, tmp_path):
    model, optimizer = training.build()
    shutil.copytree(GOLDEN / "v1-training", tmp_path / "step-0000000012")
    loaded = gockpt.load(tmp_path, model, optimizer)
    drawn = random.random(), np.random.random(), torch.rand(3)
    assert loaded.step == 12
    expected, expected_optimizer = training.build()
    training.fill(expected, expected_optimizer)
    found = training.tensors(model, optimizer)
    wanted = training.tensors(expected, expected_optimizer)
    assert list(found) == list(wanted)
    same(found, wanted)
    assert model.head.weight is model.embed.weight
    same(optimizer.state_dict()["param_groups"], expected_optimizer.state_dict()["param_groups"])
    extras, wanted = dict(loaded.extra), training.extras()
    one, other = extras.pop("array"), wanted.pop("array")
    assert type(one) is type(other)
    assert (one.dtype, one.tolist()) == (other.dtype, other.tolist())
    same(extras, wanted)
    training.seed()
    same(drawn, (random.random(), np.random.random(), torch.rand(3)))
    assert gockpt.verify(tmp_path).ok
