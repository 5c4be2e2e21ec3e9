"""A state document changed at random, and sealed again: an error of gockpt's own, and nothing is changed."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import gockpt
from gockpt import CheckpointCorrupt, StateMismatch
from gockpt.storage.format.checksum import crc32c

pytestmark = pytest.mark.usefixtures("directories")

FORMS = [
    *("$tensor", "$ndarray", "$tuple", "$set", "$frozenset", "$torch.Size", "$deque", "$list", "$dict"),
    *("$OrderedDict", "$Counter", "$defaultdict", "$int", "$float", "$complex", "$str", "$bytes"),
    *("$bytearray", "$numpy", "$range", "$slice", "$numpy.dtype", "$torch.dtype", "$torch.device"),
    *("$Path", "$PurePath", "$date", "$datetime", "$timedelta", "$unknown", "$"),
]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**30, -0.0, 1.5, 1e308]),
    st.sampled_from(
        ["", "nan", "0x1", "0x" + "f" * 5000, "..", "a/b", "\ud800", "model/w", "int", "eval", "os.system"]
    ),
    st.sampled_from(
        ["float32", "O", "object", "cuda:99", "meta", "builtins.eval", "2026-01-01", "AAAA", "=="]
    ),
    st.just([]),
    st.just({}),
    st.just([[]] * 30),
    st.just(["model", "0.weight"]),
    st.just(["nowhere"]),
    st.integers(-3, 10**9).map(lambda n: {"$range": [0, n, 1]}),
)
VALUES = st.recursive(
    VALUES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(st.sampled_from(FORMS), inner).map(lambda pair: {pair[0]: pair[1]}),
        st.tuples(
            st.sampled_from(FORMS), inner, st.sampled_from(["maxlen", "factory", "value", "bytes"]), inner
        ).map(lambda four: {four[0]: four[1], four[2]: four[3]}),
    ),
    max_leaves=4,
)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["replace", "replace", "replace", "delete", "double", "add", "borrow"]),
        st.integers(0, 1 << 20),
        VALUES,
    ),
    min_size=1,
    max_size=3,
)


def places(document, path=()):
    found = [path] if path else []
    if isinstance(document, (dict, list)):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            found += places(value, (*path, key))
    return found


def change(document, changes):
    for kind, where, value in changes:
        there = [path for path in places(document) if "rng" not in path or len(path) < 3]
        if not there:
            break
        *path, last = there[where % len(there)]
        holder = document
        for key in path:
            holder = holder[key]
        if kind == "replace":
            holder[last] = copy.deepcopy(value)
        elif kind == "delete":
            del holder[last]
        elif kind == "double" and isinstance(holder, list):
            holder.insert(last, copy.deepcopy(holder[last]))
        elif kind == "add" and isinstance(holder, dict):
            holder[FORMS[where % len(FORMS)]] = copy.deepcopy(value)
        elif kind == "borrow":
            source = document
            for key in there[(where * 7 + 3) % len(there)]:
                source = source[key]
            holder[last] = copy.deepcopy(source)
    return document


def build():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return model, optimizer


def tensors(model, optimizer):
    state = [value for one in optimizer.state.values() for value in one.values()]
    return [tensor.clone() for tensor in (*model.state_dict().values(), *state)]


@pytest.fixture(scope="module", autouse=True, params=["short", pytest.param("long", marks=pytest.mark.soak)])
def _length():
    """Run it a second time under ``make soak``, whose Hypothesis profile tries many more."""


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "ckpts"
    model, optimizer = build()
    extra = {
        "epoch": 1,
        "plain": [1, (2.5, {"a": None})],
        "tensor": torch.ones(2),
        "keys": {1: {2}, (3,): b"x"},
    }
    gockpt.save_overlapped(model, optimizer, path, step=1, extra=extra).result()
    return path


def seal(path, state):
    """Write a state document, and a manifest that vouches for it."""
    (path / "state.json").write_bytes(state)
    document = json.loads((path / "gockpt.json").read_bytes().splitlines()[0])
    for entry in document["files"]:
        if entry["path"] == "state.json":
            entry.update(size=len(state), crc32c=f"{crc32c(state):08x}")
    line = json.dumps(document).encode() + b"\n"
    (path / "gockpt.json").write_bytes(line + b'{"crc32c": "%08x"}\n' % crc32c(line))


@given(changes=CHANGES)
@settings(suppress_health_check=list(HealthCheck))
def test_a_state_document_changed_at_random(original, changes):
    path = original.parent / "copy"
    shutil.copytree(original, path)
    try:
        step = path / "step-0000000001"
        document = change(json.loads((step / "state.json").read_bytes()), changes)
        seal(step, json.dumps(document).encode())
        model, optimizer = build()
        before = tensors(model, optimizer)
        groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
        generator = torch.get_rng_state()
        try:
            gockpt.load(path, model, optimizer)
        except (CheckpointCorrupt, StateMismatch) as error:
            message = str(error)
        else:
            message = None
        if message is not None:
            assert message
            assert all(map(torch.equal, before, tensors(model, optimizer)))
            assert groups == optimizer.state_dict()["param_groups"]
            assert torch.equal(generator, torch.get_rng_state())
        try:
            with gockpt.open(path) as opened:
                dict(opened.extra)
        except (CheckpointCorrupt, StateMismatch):
            pass
    finally:
        shutil.rmtree(path)
    assert sorted(entry.name for entry in Path(original.parent).iterdir()) == ["ckpts"]
