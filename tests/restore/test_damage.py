"""A damaged checkpoint is refused with what happened and what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import gockpt
from gockpt import (
    CheckpointCorrupt,
    CheckpointNotFound,
    ChunkCorrupt,
    ManifestCorrupt,
    NotACheckpoint,
    UsageError,
)


def flip(path, at=0):
    data = bytearray(Path(path).read_bytes())
    data[at] ^= 1
    Path(path).write_bytes(data)


def build():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return model, optimizer


def test_a_damaged_tensor_says_what_was_overwritten_and_which_steps_there_are(save):
    model, optimizer = build()
    save("ckpts", model, optimizer, step=5)
    save("ckpts", model, optimizer, step=9)
    flip("ckpts/step-0000000009/model/1.weight/c.0.0")
    other, loaded = build()
    with pytest.raises(ChunkCorrupt) as caught:
        gockpt.load("ckpts", other, loaded)
    (note,) = caught.value.__notes__
    assert "3 tensors had been overwritten (model/0.weight, model/0.bias, model/1.weight), of 4" in note
    assert "load another step (5)" in note
    gockpt.load("ckpts", other, loaded, step=5)
    assert torch.equal(other[1].weight, model[1].weight)


def test_without_another_step_there_is_none_to_load(save):
    model, optimizer = build()
    save("ckpts", model, optimizer)
    flip("ckpts/step-0000000001/optimizer/0.weight/step/c")
    with pytest.raises(ChunkCorrupt) as caught:
        gockpt.load("ckpts", model, optimizer)
    assert "5 tensors had been overwritten" in caught.value.__notes__[0]
    assert "no other step is there to load" in caught.value.__notes__[0]


def test_a_damaged_first_tensor_of_extras_changes_nothing(save):
    model, _ = build()
    save("ckpts", model, extra={"x": torch.ones(3)})
    flip("ckpts/step-0000000001/extra/x/c.0")
    other, _ = build()
    before = [param.detach().clone() for param in other.parameters()]
    with pytest.raises(ChunkCorrupt) as caught:
        gockpt.load("ckpts", other)
    assert 'nothing was changed. What now: load another step, or pass on_damage="previous"' in str(
        caught.value.__notes__
    )
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


@pytest.mark.parametrize("name", ["state.json", "blocks.crc32c"])
def test_a_damaged_document_is_refused(name, save):
    model, _ = build()
    save("ckpts", model)
    flip(f"ckpts/step-0000000001/{name}", 20 if name == "state.json" else 0)
    with pytest.raises(CheckpointCorrupt, match=name):
        gockpt.load("ckpts", model)


def test_a_missing_chunk_is_damage(save):
    model, _ = build()
    save("ckpts", model)
    os.unlink("ckpts/step-0000000001/model/0.weight/c.0.0")
    with pytest.raises(ChunkCorrupt, match=r"model/0\.weight"):
        gockpt.load("ckpts", model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=3), "upgrade gockpt"),
        (lambda d: d.update(version="1"), "its version is '1'"),
        (lambda d: d.update(step=True), "expected int"),
        (lambda d: d.pop("optimizers"), "optimizers"),
        (lambda d: d["aliases"].update({"model/x": "model/nowhere"}), "the alias 'model/x'"),
        (lambda d: d["aliases"].update({"model/0.bias": "model/0.weight"}), "the alias 'model/0.bias'"),
        (lambda d: d["extra"].update(x={"$tensor": "name"}), "not in a known form"),
        (lambda d: d["extra"].update(x={"$later": 1}), "newer gockpt"),
        (lambda d: d["extra"].update(x={"$tensor": ["gone"]}), "refers to an array 'gone'"),
        (lambda d: d.update(rng={"numpy": 3}), "random states"),
        (lambda d: d["optimizers"][0]["groups"].append({}), "params"),
        (
            lambda d: d["optimizers"][0]["states"]["0.weight"].update(exp_avg={"$tensor": ["gone"]}),
            "refers to an array 'gone'",
        ),
    ],
)
def test_a_document_that_makes_no_sense_is_refused_before_anything_changes(change, message, save):
    model, optimizer = build()
    save("ckpts", model, optimizer, change=change)
    other, loaded = build()
    before = [param.detach().clone() for param in other.parameters()]
    with pytest.raises(ManifestCorrupt, match=message):
        gockpt.load("ckpts", other, loaded)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_there_has_to_be_a_checkpoint(save):
    model, _ = build()
    with pytest.raises(CheckpointNotFound, match="no such directory"):
        gockpt.load("nowhere", model)
    save("ckpts", model, step=7)
    with pytest.raises(CheckpointNotFound, match=r"no checkpoint of step 8.*there are 7"):
        gockpt.load("ckpts", model, step=8)
    Path("file").write_text("x")
    with pytest.raises(NotACheckpoint, match="not a directory"):
        gockpt.load("file", model)
    os.mkdir("other")
    Path("other/notes").write_text("x")
    with pytest.raises(NotACheckpoint, match="holds no checkpoints"):
        gockpt.load("other", model)


@pytest.mark.parametrize("step", [-1, 1.0, True, "newest"])
def test_a_step_is_a_whole_number(step, save):
    save("ckpts", build()[0])
    with pytest.raises(UsageError, match="expected a whole number"):
        gockpt.load("ckpts", build()[0], step=step)


@pytest.mark.parametrize("model", [3, [nn.Linear(1, 1), "x"], {"x": 3}, {1: torch.ones(1)}])
def test_a_model_is_a_module_or_modules_or_tensors_by_name(model, save):
    save("ckpts", build()[0])
    with pytest.raises(UsageError, match="pass"):
        gockpt.load("ckpts", model)


def test_verify_reports_and_does_not_raise(save):
    model, optimizer = build()
    save("ckpts", model, optimizer, step=1)
    save("ckpts", model, optimizer, step=2)
    assert gockpt.verify("ckpts").ok
    flip("ckpts/step-0000000002/model/0.weight/c.0.0")
    report = gockpt.verify("ckpts")
    assert (report.ok, report.step, len(report.problems)) == (False, 2, 1)
    assert report.problems[0].array == "model/0.weight"
    assert gockpt.verify("ckpts", step=1).ok


def test_verify_reports_a_damaged_manifest(save):
    save("ckpts", build()[0], step=4)
    flip("ckpts/step-0000000004/gockpt.json", 10)
    report = gockpt.verify("ckpts", step=4)
    assert (report.ok, report.step) == (False, 4)
    assert report.problems[0].path == "gockpt.json"


def test_verify_reports_a_document_that_makes_no_sense(save):
    save("ckpts", build()[0], change=lambda d: d.pop("rng"))
    report = gockpt.verify("ckpts")
    assert [problem.path for problem in report.problems] == ["state.json"]


def test_verify_of_nothing_has_nothing_to_report():
    with pytest.raises(CheckpointNotFound):
        gockpt.verify("nowhere")
