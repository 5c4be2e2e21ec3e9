"""With ``on_damage="previous"`` the newest that verifies is loaded, and nothing else is ever touched."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import gockpt
from gockpt import CheckpointCorrupt, CheckpointNotFound, StateMismatch, UsageError
from gockpt.storage.read import read_execute
from gockpt.storage.read.checkpoint import StoredCheckpoint


def flip(path):
    data = bytearray(Path(path).read_bytes())
    data[len(data) // 2] ^= 1
    Path(path).write_bytes(data)


@pytest.fixture
def three(save):
    """Three checkpoints, published in the order 30, 10, 20, each with its step in the weights."""
    model = nn.Linear(3, 2)
    for step in (30, 10, 20):
        nn.init.constant_(model.weight, step)
        save("ckpts", model, step=step)
    return model


def loaded(model, **arguments):
    restored = gockpt.load("ckpts", model, on_damage="previous", **arguments)
    assert model.weight[0, 0].item() == restored.step
    return restored.step, [one.step for one in restored.passed_over]


def test_without_damage_it_is_the_newest_and_nothing_is_said(three, caplog):
    with caplog.at_level(logging.WARNING):
        assert loaded(three) == (20, [])
    assert not caplog.records


def test_files_of_other_programs_are_no_damage(three, caplog):
    """Such as a file browser's, or one that NFS leaves while it is still open somewhere."""
    for name in (".DS_Store", ".nfs01", "Thumbs.db", "model/._weight", "model/weight/c.0.0~"):
        Path(f"ckpts/step-0000000020/{name}").write_bytes(b"mine")
    Path("ckpts/step-0000000020/.ipynb_checkpoints").mkdir()
    Path("ckpts/.DS_Store").touch()
    with caplog.at_level(logging.WARNING):
        assert loaded(three) == (20, [])
    assert not caplog.records
    assert gockpt.latest("ckpts") == 20
    report = gockpt.verify("ckpts")
    assert (report.ok, len(report.foreign)) == (True, 6)
    assert gockpt.prune("ckpts", keep=1).kept[0].step == 20
    assert os.listdir("ckpts/step-0000000020").count(".DS_Store") == 1


@pytest.mark.parametrize(
    "file",
    [
        "model/weight/c.0.0",
        "model/bias/c.0",
        "model/weight/zarr.json",
        "zarr.json",
        "state.json",
        "blocks.crc32c",
    ],
)
@pytest.mark.parametrize("harm", [flip, os.unlink], ids=["flipped", "missing"])
def test_damage_anywhere_leads_to_the_publication_before(file, harm, three, caplog):
    harm(f"ckpts/step-0000000020/{file}")
    with caplog.at_level(logging.WARNING, "gockpt"):
        assert loaded(three) == (10, [20])
    assert file in caplog.text
    assert "loaded step 10; passed over: step 20" in caplog.text


def test_the_result_says_what_is_wrong_with_each(three):
    flip("ckpts/step-0000000020/model/weight/c.0.0")
    shutil.rmtree("ckpts/step-0000000010/model")
    restored = gockpt.load("ckpts", three, on_damage="previous")
    assert restored.step == 30
    assert [one.step for one in restored.passed_over] == [20, 10]
    assert restored.passed_over[0].path == "ckpts/step-0000000020"
    assert "model/weight/c.0.0" in restored.passed_over[0].why
    assert "more" in restored.passed_over[1].why


def test_a_damaged_manifest_is_named_as_well(three):
    flip("ckpts/step-0000000020/gockpt.json")
    flip("ckpts/step-0000000010/model/bias/c.0")
    assert loaded(three) == (30, [20, 10])


def test_a_replaced_one_of_the_same_step_is_better_than_none(three, save):
    nn.init.constant_(three.weight, 5)
    save("again", three, step=5)
    nn.init.constant_(three.weight, 6)
    save("again", three, step=5)
    flip("again/step-0000000005/model/weight/c.0.0")
    restored = gockpt.load("again", three, on_damage="previous")
    assert (restored.step, three.weight[0, 0].item()) == (5, 5)
    assert restored.passed_over[0].path == "again/step-0000000005"


def test_when_none_is_whole_nothing_is_changed_and_each_is_named(three):
    for step in (10, 20, 30):
        flip(f"ckpts/step-{step:010d}/model/weight/c.0.0")
    nn.init.constant_(three.weight, 7)
    with pytest.raises(CheckpointCorrupt, match="nothing was changed") as caught:
        gockpt.load("ckpts", three, on_damage="previous")
    assert all(f"step {step} " in str(caught.value) for step in (10, 20, 30))
    assert three.weight.unique().tolist() == [7]


def test_a_model_that_does_not_fit_is_no_damage(three):
    with pytest.raises(StateMismatch, match="step 20"):
        gockpt.load("ckpts", nn.Linear(4, 4), on_damage="previous")


def test_one_that_is_pruned_meanwhile_gives_way(three, monkeypatch):
    from gockpt.storage.read.checkpoint import StoredCheckpoint

    real, left = StoredCheckpoint.verify, ["ckpts/step-0000000020"]

    def verify(self):
        if left:
            shutil.rmtree(left.pop())
        return real(self)

    monkeypatch.setattr(StoredCheckpoint, "verify", verify)
    assert loaded(three) == (10, [])


def test_one_checkpoints_own_directory(three):
    assert gockpt.load("ckpts/step-0000000010", three, on_damage="previous").step == 10
    flip("ckpts/step-0000000010/model/weight/c.0.0")
    with pytest.raises(CheckpointCorrupt):
        gockpt.load("ckpts/step-0000000010", three, on_damage="previous")


@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_nothing_there_is_told_as_ever(path):
    os.mkdir("empty")
    with pytest.raises(CheckpointNotFound):
        gockpt.load(path, nn.Linear(1, 1), on_damage="previous")


@pytest.mark.parametrize("arguments", [{"on_damage": "ignore"}, {"on_damage": "previous", "step": 3}])
def test_what_makes_no_sense_is_refused(arguments, three):
    before = torch.clone(three.weight.detach())
    with pytest.raises(UsageError, match="on_damage="):
        gockpt.load("ckpts", three, **arguments)
    assert torch.equal(before, three.weight)


def test_what_is_pruned_while_it_overwrites_is_an_error_that_says_so(save, monkeypatch):
    """The next one might not cover all that the pruned one has overwritten."""
    small, large = nn.Linear(8, 8), nn.Linear(16, 16)
    save("ckpts", small, step=1)
    save("ckpts", large, step=2)
    read = read_execute._read

    def pruned(*arguments):
        monkeypatch.setattr(read_execute, "_read", read)
        got = read(*arguments)
        shutil.rmtree("ckpts/step-0000000002")
        return got

    monkeypatch.setattr(read_execute, "_read", pruned)
    with pytest.raises(gockpt.CheckpointPruned) as caught:
        gockpt.load("ckpts", nn.Linear(16, 16), strict=False)
    assert "overwritten" in "".join(caught.value.__notes__)


def test_one_that_is_pruned_while_another_is_verified(three, monkeypatch):
    """Then a newer one may be there: the search begins again."""
    flip("ckpts/step-0000000020/model/weight/c.0.0")
    verify = StoredCheckpoint.verify

    def pruned(stored):
        monkeypatch.setattr(StoredCheckpoint, "verify", verify)
        shutil.rmtree("ckpts/step-0000000010")
        return verify(stored)

    monkeypatch.setattr(StoredCheckpoint, "verify", pruned)
    assert loaded(three) == (30, [20])


def test_a_path_is_told_where_the_manifest_is_bad(three):
    flip("ckpts/step-0000000020/gockpt.json")
    restored = gockpt.load("ckpts", three, on_damage="previous")
    assert [one.path for one in restored.passed_over] == ["ckpts/step-0000000020"]
