"""Checkpoints saved into archives are loaded, looked into and uploaded like those in directories."""

from __future__ import annotations

import os
from pathlib import Path

import obstore
import pytest
import torch
from obstore.store import MemoryStore

import gockpt

FILE, DIRECTORY = (gockpt.Options(layout=layout) for layout in ("file", "directory"))
NAMES = [f"ckpts/step-{step:010}.zip" for step in (1, 2, 3)]


def trained(steps=1):
    """A model and its optimizer after some updates; the weights follow from the number of them."""
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(200, 100), torch.nn.Linear(100, 3).bfloat16())
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        sum(p.float().square().sum() for p in model.parameters()).backward()
        optimizer.step()
    return model, optimizer


@pytest.fixture
def run(request):
    """Let all saves be of one model, so that they belong to one run."""
    model, optimizer = trained(1)
    with gockpt.Checkpointer(model, optimizer, "ckpts", options=FILE) as saver:
        for step in (1, 2, 3):
            torch.nn.init.constant_(model[0].bias, step)
            saver.after_step(step, {"n": step}).result()
    return model, optimizer


def flip(path, at=None):
    data = bytearray(Path(path).read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    Path(path).write_bytes(data)


@pytest.mark.parametrize("compression", [None, "zstd", "blosc"])
def test_what_is_loaded_is_what_was_saved(same, compression):
    model, optimizer = trained(2)
    options = gockpt.Options(layout="file", compression=compression)
    saved = gockpt.save_overlapped(
        model, optimizer, "ckpts", step=7, extra={"n": [1]}, options=options
    ).result()
    assert saved.path.name == "step-0000000007.zip"
    for where in ("ckpts", saved.path):
        other, other_optimizer = trained(0)
        restored = gockpt.load(where, other, other_optimizer)
        assert (restored.step, restored.extra["n"]) == (7, [1])
        same(other.state_dict(), model.state_dict())
        same(other_optimizer.state_dict(), optimizer.state_dict())
        with gockpt.open(where) as checkpoint:
            assert torch.equal(checkpoint["model/0.weight"][3:50:7, 1], model[0].weight[3:50:7, 1])
            assert checkpoint.metadata.path.endswith("step-0000000007.zip")
        assert gockpt.verify(where).ok
        assert gockpt.steps(where) == [7]
        assert gockpt.latest(where) == 7


def test_a_run_in_archives_is_one_run(run):
    assert gockpt.steps("ckpts") == [1, 2, 3]
    assert [entry.path for entry in gockpt.checkpoints("ckpts")] == NAMES
    dry = gockpt.prune("ckpts", 1, dry_run=True)
    assert [entry.step for entry in dry.removed] == [1, 2]
    report = gockpt.diff("ckpts", "ckpts", 1, 2)
    assert [one.name for one in report.changed] == ["model/0.bias"]


def test_the_newest_that_is_whole_is_loaded(run):
    model, optimizer = run
    with gockpt.open("ckpts", 3) as checkpoint:
        checkpoint["model/0.weight"]
    flip(NAMES[2], 5000)
    assert not gockpt.verify("ckpts").ok
    restored = gockpt.load("ckpts", model, optimizer, on_damage="previous")
    assert (restored.step, [one.path for one in restored.passed_over]) == (2, [NAMES[2]])
    assert model[0].bias[0].item() == 2
    os.truncate(NAMES[1], 9000)
    restored = gockpt.load("ckpts", model, optimizer, on_damage="previous")
    assert restored.step == 1


def test_an_upload_of_an_archive_is_one_object_and_that_of_a_directory_its_files(run):
    gockpt.unpack("ckpts", "unpacked", 2)
    files = [path for path in Path("unpacked").rglob("*") if path.is_file()]
    originals = [{"": Path(NAMES[1])}, {f"/{path.relative_to('unpacked')}": path for path in files}]
    for where, original in zip((NAMES[1], "unpacked"), originals, strict=True):
        store = MemoryStore()
        done = gockpt.upload(where, store)
        name = f"step-{done.step:010d}-{done.seq}-{done.attempt}{'.zip' if '' in original else ''}"
        found = [meta["path"] for batch in obstore.list(store) for meta in batch]
        assert {path: bytes(obstore.get(store, path).bytes()) for path in found} == {
            name + path: file.read_bytes() for path, file in original.items()
        }
        with gockpt.open(store) as checkpoint:
            assert checkpoint.metadata.step == 2
        assert gockpt.verify(store).ok


def test_a_packed_training_state_is_the_same():
    model, optimizer = trained(2)
    gockpt.save_overlapped(model, optimizer, "made", step=7, options=DIRECTORY).result()
    gockpt.pack("made", "a.zip")
    report = gockpt.diff("a.zip", "made")
    assert report.equal
