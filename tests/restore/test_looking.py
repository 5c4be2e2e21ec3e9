"""What there is, without reading it."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

import gockpt
from gockpt.state.lineage import origin_of
from gockpt.storage.local.store import Store


def last_loaded_step(model):
    origin = origin_of(model)
    return None if origin is None else origin.step


def test_steps_ascend_and_the_latest_is_the_last_published(save):
    for step in (1000, 1500, 1100):
        save("ckpts", {"w": torch.full((1,), float(step))}, step=step)
    assert gockpt.steps("ckpts") == [1000, 1100, 1500]
    assert gockpt.latest("ckpts") == 1100
    live = {"w": torch.zeros(1)}
    assert gockpt.load("ckpts", live).step == 1100
    assert live["w"] == 1100
    assert gockpt.open("ckpts", step=1500)["model/w"][0] == 1500


def test_a_step_saved_again_is_the_newer_one(save):
    for value in (1.0, 2.0):
        save("ckpts", {"w": torch.tensor(value)}, step=4)
    assert gockpt.steps("ckpts") == [4]
    assert gockpt.open("ckpts", step=4)["model/w"][...] == 2


def test_where_nothing_is_there_are_no_steps(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        assert gockpt.steps(path) == []
        assert gockpt.latest(path) is None


def test_a_checkpoint_can_be_opened_by_its_own_directory(save):
    save("ckpts", {"w": torch.ones(1)}, step=4)
    assert gockpt.load("ckpts/step-0000000004", {"w": torch.zeros(1)}).step == 4
    assert gockpt.open(Path("ckpts/step-0000000004")).metadata.step == 4
    assert gockpt.steps("ckpts/step-0000000004") == [4]


def test_metadata(save):
    model = nn.BatchNorm1d(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save("ckpts", model, optimizer, step=12, optimizer_steps=7, extra={"b": 1, "a": 2})
    with gockpt.open("ckpts") as checkpoint:
        metadata = checkpoint.metadata
        assert repr(checkpoint) == "<Checkpoint step=12 tensors=5 at 'ckpts/step-0000000012'>"
    assert (metadata.step, metadata.optimizer_steps, metadata.seq) == (12, 7, 1)
    assert (metadata.exact, metadata.inexact) == (True, {})
    assert metadata.extras == ("b", "a")
    assert metadata.optimizers == ("torch.optim.sgd.SGD",)
    assert set(metadata.buffers) == {"model/running_mean", "model/running_var", "model/num_batches_tracked"}
    assert metadata.writer == {"gockpt": gockpt.__version__}
    assert metadata.created.startswith("20")


def test_what_is_not_exact_is_told(save):
    save("ckpts", nn.Linear(1, 1), change=lambda d: d.update(inexact={"model/weight": {"max": 0.5}}))
    assert gockpt.open("ckpts").metadata.inexact == {"model/weight": {"max": 0.5}}


def test_extras_are_read_one_by_one(save):
    save("ckpts", nn.Linear(1, 1), extra={"big": torch.ones(100_000), "small": {"x": [1, torch.ones(2)]}})
    with gockpt.open("ckpts") as checkpoint:
        assert list(checkpoint.extra) == ["big", "small"]
        assert len(checkpoint.extra) == 2
        assert repr(checkpoint.extra) == "<extras: big, small>"
        small = checkpoint.extra["small"]
        assert small["x"][0] == 1
        assert torch.equal(small["x"][1], torch.ones(2))
        assert checkpoint._stored.bytes_read == 8
        with pytest.raises(KeyError):
            checkpoint.extra["none"]


def test_the_step_last_loaded_into_a_model_is_known(save):
    model = nn.Linear(1, 1)
    assert last_loaded_step(model) is None
    save("ckpts", model, step=3)
    save("ckpts", model, step=8)
    gockpt.load("ckpts", model)
    assert last_loaded_step(model) == 8
    gockpt.load("ckpts", model, step=3)
    assert last_loaded_step(model) == 3
    assert last_loaded_step(torch.compile(model, backend="eager")) == 3, "the model inside a wrapper"
    assert last_loaded_step([nn.Linear(1, 1), model]) == 3
    assert last_loaded_step(nn.Linear(1, 1)) is None
    assert last_loaded_step(None) is None


def test_a_mapping_is_known_by_its_tensors(save):
    live = {"w": torch.zeros(3)}
    save("ckpts", live, step=6)
    gockpt.load("ckpts", live)
    assert last_loaded_step({"other name": live["w"]}) == 6
    assert last_loaded_step({"w": torch.zeros(3)}) is None


def test_a_failed_load_is_not_remembered(save):
    save("ckpts", nn.Linear(1, 1), step=3)
    model = nn.Linear(2, 1)
    with pytest.raises(gockpt.StateMismatch):
        gockpt.load("ckpts", model)
    assert last_loaded_step(model) is None


def test_a_loaded_model_can_be_freed(save):
    import weakref

    model = nn.Linear(1, 1)
    save("ckpts", model)
    gockpt.load("ckpts", model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


class Interrupting(nn.Linear):
    """A model during whose load the newest checkpoint is replaced, as by a run that goes on saving."""

    def __init__(self, *events):
        super().__init__(1, 1)
        self.events = list(events)

    def named_modules(self, *arguments, **named):
        if self.events:
            self.events.pop(0)()
        return super().named_modules(*arguments, **named)


def prune_all_but_the_newest():
    with Store("ckpts") as store:
        store.prune(1)


def test_a_checkpoint_that_is_pruned_while_it_is_loaded_gives_way_to_the_newer_one(save):
    first, second = nn.Linear(1, 1), nn.Linear(1, 1)
    save("ckpts", first, step=1, extra={"x": torch.ones(1)})

    def publish():
        save("ckpts", second, step=2)
        prune_all_but_the_newest()

    model = Interrupting(publish)
    assert gockpt.load("ckpts", model).step == 2
    assert torch.equal(model.weight, second.weight)


def test_a_wanted_step_that_is_pruned_while_it_is_loaded_is_told(save):
    save("ckpts", nn.Linear(1, 1), step=1, extra={"x": torch.ones(1)})

    def publish():
        save("ckpts", nn.Linear(1, 1), step=2)
        prune_all_but_the_newest()

    with pytest.raises(gockpt.CheckpointPruned, match="open a newer one"):
        gockpt.load("ckpts", Interrupting(publish), step=1)


def test_an_empty_tensor_has_nothing_to_read(save):
    save("ckpts", {"empty": torch.zeros(3, 0)}, extra={"empty": torch.zeros(0, 2)})
    restored = gockpt.load("ckpts", {"empty": torch.zeros(3, 0)})
    assert restored.extra["empty"].shape == (0, 2)
    with gockpt.open("ckpts") as checkpoint:
        assert checkpoint["model/empty"][1:].shape == (2, 0)
        assert checkpoint.extra["empty"].shape == (0, 2)


def test_opening_a_damaged_one_leaves_nothing_open(save):
    import os

    save("ckpts", nn.Linear(1, 1), change=lambda document: document.pop("rng"))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(gockpt.ManifestCorrupt, match="rng"):
        gockpt.open("ckpts")
    assert len(os.listdir("/proc/self/fd")) == len(before)
