"""The checkpoints in ``tests/golden``: written once, read for ever; and broken ones, each with its error."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from gockpt import errors
from gockpt.storage.read.find import open_checkpoint

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.name.startswith(("v1-", "v3-", "broken-")))
# What each good one holds besides its arrays; the arrays' bits follow from their names.
STATE = {"text": "ä\n", "numbers": [1, -2.5, 2**53 - 1], "nothing": None, "deep": {"er": [[]]}}
SHAPES = {"v1-dtypes": 30, "v1-chunks": 6, "v1-small": 2, "v1-zstd": 22, "v1-blosc": 22}
SHAPES |= {f"v3-{kind}.zip": SHAPES[f"v1-{kind}"] for kind in ("dtypes", "chunks", "small", "blosc")}
SHAPES["v3-large.zip"] = 3


def content():
    spec = importlib.util.spec_from_file_location("golden_content", GOLDEN / "content.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(checkpoint):
    """Read all that a full load reads; returns every array's bytes."""
    checkpoint.state()
    values = {}
    for name, array in checkpoint.arrays.items():
        values[name] = np.empty(array.spec.nbytes, np.uint8)
        checkpoint.read_into(name, None, values[name])
    return values


def test_all_that_is_there_is_tried():
    assert [name for name in NAMES if name.startswith("broken-")] == sorted(EXPECTED)
    assert {name for name in NAMES if not name.startswith("broken-")} == {*SHAPES, "v1-training"}


@pytest.mark.parametrize("name", SHAPES)
def test_a_good_one_is_read_bit_for_bit(name):
    bits = content().bits
    with open_checkpoint(GOLDEN / name) as checkpoint:
        assert checkpoint.verify().problems == ()
        assert (checkpoint.step, checkpoint.seq, checkpoint.exact) == (12, 1, True)
        assert checkpoint.manifest.attributes == {"golden": name}
        assert checkpoint.state() == STATE
        values = load(checkpoint)
        assert len(values) == SHAPES[name]
        for array, found in values.items():
            spec = checkpoint.arrays[array].spec
            assert found.tobytes() == bits(array, spec.dtype, spec.nbytes).tobytes(), array


@pytest.mark.parametrize("name", EXPECTED)
def test_a_broken_one_is_refused_as_expected(name):
    expected = EXPECTED[name]
    if "open" in expected:
        kind, words = expected["open"]
        with pytest.raises(getattr(errors, kind)) as caught:
            open_checkpoint(GOLDEN / name)
        assert words in str(caught.value)
        assert type(caught.value) is getattr(errors, kind)
        return
    with open_checkpoint(GOLDEN / name) as checkpoint:
        if "load" in expected:
            kind, words = expected["load"]
            with pytest.raises(getattr(errors, kind)) as caught:
                load(checkpoint)
            assert words in str(caught.value)
            assert type(caught.value) is getattr(errors, kind)
        else:  # in what no load reads: every value is right
            bits = content().bits
            for array, found in load(checkpoint).items():
                assert found.tobytes() == bits(array, "float32", found.nbytes).tobytes()
        report = checkpoint.verify()
        assert list(report.foreign) == expected.get("foreign", [])
        found = [(problem.path, problem.array, problem.what) for problem in report.problems]
        assert len(found) == len(expected["verify"]), found
        for problem, (path, array, words) in zip(found, expected["verify"], strict=True):
            assert problem[:2] == (path, array)
            assert problem[2].startswith(words)
