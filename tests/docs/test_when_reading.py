"""The table "... while loading and reading" in docs/guarantees.md is true: every row is tried here.

A trial is a function under the name of its row. It returns when all came out exact, and raises what a user
would see otherwise; the row must name that error.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import zarr
from torch.testing._internal.two_tensor import TwoTensor

import gockpt
from gockpt.storage.format.checksum import crc32c
from gockpt.storage.object_store.client import Objects

pytestmark = pytest.mark.usefixtures("directories")
TRIALS = {}


def when(row):
    """Register the trial of a row."""
    return lambda trial: TRIALS.setdefault(row, trial)


def refused(run, *, model=None, optimizer=None, **arguments):
    """Load the saved run into other objects, which must stay as they were; raise what that raised."""
    before = copy.deepcopy((model.state_dict() if model else None, optimizer and optimizer.state_dict()))
    with pytest.raises(gockpt.GockptError) as caught:
        gockpt.load("ckpts", model, optimizer, **arguments)
    after = (model.state_dict() if model else None, optimizer and optimizer.state_dict())
    assert str(before) == str(after)
    assert model is None or gockpt.load("ckpts", model, optimizer, strict=False).step == run.step
    raise caught.value


@when("There is no such path, or nothing complete in it")
def _nothing_there(lab):
    for path in ("nowhere", "empty"):
        assert (gockpt.steps(path), gockpt.latest(path)) == ([], None)
        with pytest.raises(gockpt.CheckpointNotFound) as caught:
            gockpt.open(path)
        Path("empty").mkdir(exist_ok=True)
    raise caught.value


@when("There is no such step")
def _no_such_step(lab):
    run = lab.Run().saved()
    with pytest.raises(gockpt.CheckpointNotFound, match="there are 1"):
        gockpt.open("ckpts", step=7)
    gockpt.load("ckpts", run.model, run.opt, step=7)


@when("The path to read from is a file")
def _read_a_file(lab):
    Path("ckpts").write_text("mine")
    gockpt.open("ckpts")


@when("The directory holds other things, or a Zarr group of somebody else")
def _other_things(lab):
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    with pytest.raises(gockpt.NotACheckpoint, match=r"letter\.txt"):
        gockpt.open("mine")
    zarr.create_group(store="group")
    gockpt.open("group")


@when("Shapes or dtypes differ")
def _other_shapes(lab):
    run = lab.Run().saved()
    with pytest.raises(gockpt.StateMismatch, match="live bfloat16"):
        gockpt.load("ckpts", lab.Run().model.bfloat16())
    refused(run, model=lab.Run(width=25).model)


@when("The model has names that the checkpoint lacks, or the other way round")
def _other_names(lab):
    run = lab.Run().saved()
    fewer = lab.Run().model[:1]
    with pytest.raises(gockpt.StateMismatch) as caught:
        gockpt.load("ckpts", fewer)
    assert caught.value.unexpected == ("model/1.weight", "model/1.bias")
    refused(run, model=lab.Run().model.append(torch.nn.Linear(3, 3)))


@when("The optimizer is of another class, or has other groups")
def _other_optimizer(lab):
    run = lab.Run().saved()
    other = lab.Run()
    groups = [{"params": layer.parameters()} for layer in other.model]
    with pytest.raises(gockpt.StateMismatch, match="other groups"):
        gockpt.load("ckpts", other.model, torch.optim.AdamW(groups))
    other = lab.Run(kind=torch.optim.SGD)
    refused(run, model=other.model, optimizer=other.opt)


@when("A weight was saved as another tensor subclass than the live one is, or as none")
def _other_subclass(lab):
    model = torch.nn.Linear(4, 4)
    gockpt.save_overlapped(model, None, "ckpts", step=1).result()
    model.weight = torch.nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4)))
    with pytest.raises(
        gockpt.StateMismatch, match="model/weight: saved an ordinary array, live a .*TwoTensor"
    ):
        gockpt.load("ckpts", model)
    assert torch.equal(model.weight.a, torch.ones(4, 4))
    gockpt.save_overlapped(model, None, "others", step=1).result()
    gockpt.load("others", torch.nn.Linear(4, 4))


@when("An optimizer state was saved as a tensor subclass whose class is not imported")
def _unknown_subclass(lab):
    def make():
        model = torch.nn.Linear(2, 2)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    class Mine(TwoTensor):
        __tensor_unflatten__ = staticmethod(lambda inner, *_: Mine(inner["a"], inner["b"]))

    model, optimizer = make()
    optimizer.state[model.weight]["momentum_buffer"] = Mine(torch.ones(2, 2), torch.ones(2, 2))
    gockpt.save_overlapped(model, optimizer, "ckpts", step=1).result()
    Mine.__qualname__ = "Other"
    gockpt.load("ckpts", *make())


@when("An optimizer is loaded without its model")
def _optimizer_alone(lab):
    run = lab.Run().saved()
    refused(run, optimizer=run.opt)


@when("Nothing of the model fits, with `strict=False`")
def _nothing_fits(lab):
    lab.Run().saved()
    model = torch.nn.ModuleDict({"net": lab.Run().model})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(gockpt.StateMismatch, match="prefix") as caught:
        gockpt.load("ckpts", model, strict=False)
    assert str(before) == str(model.state_dict())
    raise caught.value


class Summed(torch.nn.Linear):
    """Derives a sum after each load; may refuse, or be unable to be loaded."""

    refuses = False

    def __init__(self):
        super().__init__(3, 3)
        self.register_load_state_dict_post_hook(lambda module, _: module.refresh())
        self.refresh()

    def refresh(self):
        if self.refuses:
            raise RuntimeError("not today")
        self.sum = self.weight.detach().sum()


@when("A module has loading code of its own: hooks, versions, `_load_from_state_dict`, extra state")
def _own_loading(lab):
    saved, live = Summed(), Summed()
    gockpt.save_overlapped(saved, None, "ckpts", step=1).result()
    gockpt.load("ckpts", live)
    assert torch.equal(live.sum, saved.weight.detach().sum())


@when("A module saves a key that nothing takes back")
def _leftover(lab):
    model = torch.nn.Linear(1, 1)
    model.register_state_dict_post_hook(lambda m, state, prefix, _: state.update({prefix + "note": "hi"}))
    gockpt.save_overlapped(model, None, "ckpts", step=1).result()
    gockpt.load("ckpts", torch.nn.Linear(1, 1))


@when("An extra refuses its state")
def _refusing_extra(lab):
    lab.Run().saved(extra={"x": 1})
    other = lab.Run()
    before = str((other.model.state_dict(), other.opt.state_dict()))
    with pytest.raises(ZeroDivisionError) as caught:
        gockpt.load("ckpts", other.model, other.opt, extra={"x": lambda value: value / 0})
    assert "the model and the optimizers are as they were" in caught.value.__notes__[0]
    assert before == str((other.model.state_dict(), other.opt.state_dict()))


@when("Loading code of a module raises midway")
def _raising_module(lab):
    gockpt.save_overlapped(Summed(), None, "ckpts", step=1).result()
    live = Summed()
    live.refuses = True
    with pytest.raises(RuntimeError, match="not today") as caught:
        gockpt.load("ckpts", live)
    assert "2 tensors had been overwritten (model/weight, model/bias)" in caught.value.__notes__[0]
    assert "Summed" in caught.value.__notes__[0]


@when("The checkpoint has extras or optimizers that were not asked for")
def _not_asked_for(lab):
    run = lab.Run().saved(extra={"sched": {"rate": 1}})
    with mock.patch.object(logging.getLogger("gockpt"), "warning") as warning:
        gockpt.load("ckpts", run.model)
    (told,) = [call.args[0] % call.args[1:] for call in warning.call_args_list]
    assert "'sched'" in told
    assert "AdamW" in told


@when("A model is loaded without an optimizer")
def _model_alone(lab):
    run = lab.Run().saved()
    torch.rand(1)
    before = torch.get_rng_state()
    gockpt.load("ckpts", run.model)
    assert torch.equal(torch.get_rng_state(), before)
    gockpt.load("ckpts", run.model, rng=True)
    assert not torch.equal(torch.get_rng_state(), before)


@when("The load stands inside `inference_mode` or `no_grad`")
def _inside_inference(lab):
    lab.Run().saved()
    for mode in (torch.inference_mode, torch.no_grad):
        other = lab.Run()
        with mode():
            gockpt.load("ckpts", other.model, other.opt)
        assert all(p.requires_grad and not p.is_inference() for p in other.model.parameters())
        states = [value for state in other.opt.state.values() for value in state.values()]
        assert states
        assert not any(value.is_inference() for value in states)
        other.train()


@when("An extra is asked for that was not saved")
def _no_such_extra(lab):
    run = lab.Run().saved()
    refused(run, model=run.model, extra={"sched": print})


def damage(path):
    """Flip one bit."""
    data = bytearray(Path(path).read_bytes())
    data[7] ^= 1
    Path(path).write_bytes(data)


class Warm:
    """A warm-up that counts its steps."""

    def __init__(self, optimizer, refuses=False):
        self.optimizer, self.count, self.refuses = optimizer, 0, refuses

    def step(self):
        self.count += 1
        self.optimizer.step()

    def state_dict(self):
        return {"count": self.count, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.count = state["count"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.refuses:
            msg = "no"
            raise KeyError(msg)


def warm(lab, **how):
    run = lab.Run()
    run.opt = Warm(run.opt, **how)
    return run


@when(
    "An optimizer, or a wrapper around it, has saving or loading code of its own: hooks, overrides, counters"
)
def _own_loading(lab):
    run = warm(lab).saved()
    other = warm(lab)
    gockpt.load("ckpts", other.model, other.opt)
    assert str(other.opt.state_dict()) == str(run.opt.state_dict())


@when("The `load_state_dict` of an optimizer raises")
def _own_loading_raises(lab):
    warm(lab).saved()
    other = warm(lab, refuses=True)
    before = copy.deepcopy(other.model.state_dict())
    with pytest.raises(KeyError) as caught:
        gockpt.load("ckpts", other.model, other.opt)
    assert "Warm.load_state_dict()" in caught.value.__notes__[0]
    assert all(map(torch.equal, other.model.state_dict().values(), before.values()))


@when("A wrapper around an optimizer was saved, and is not there now")
def _wrapper_gone(lab):
    run = warm(lab).saved()
    other = lab.Run()
    refused(run, model=other.model, optimizer=other.opt)


@when("Optimizer state was saved in another memory order than the live one's")
def _memory_order(lab):
    run = lab.Run()
    run.train()
    state = run.opt.state[run.model[0].weight]
    state["exp_avg"] = state["exp_avg"].t().contiguous().t()
    run.saved()
    other = lab.Run()
    other.train()
    gockpt.load("ckpts", other.model, other.opt)
    assert other.opt.state[other.model[0].weight]["exp_avg"].stride() == state["exp_avg"].stride() == (1, 24)
    assert other.model[0].weight.is_contiguous()


@when("Other programs left files in a checkpoint")
def _files_of_others(lab):
    run = lab.Run().saved().saved()
    Path("ckpts/step-0000000002/.DS_Store").touch()
    Path("ckpts/step-0000000002/model/.ipynb_checkpoints").mkdir()
    assert gockpt.load("ckpts", run.model, run.opt, on_damage="previous").step == 2
    report = gockpt.verify("ckpts")
    assert (report.ok, report.foreign) == (True, (".DS_Store", "model/.ipynb_checkpoints"))


@when("A chunk is damaged or missing")
def _chunk_damaged(lab):
    run = lab.Run().saved().saved()
    chunk = Path("ckpts/step-0000000002/model/0.weight/c.0.0")
    damage(chunk)
    assert [problem.array for problem in gockpt.verify("ckpts").problems] == ["model/0.weight"]
    with pytest.raises(gockpt.ChunkCorrupt) as caught:
        gockpt.load("ckpts", run.model, run.opt)
    assert "model/0.weight" in caught.value.__notes__[0]
    assert "another step (1)" in caught.value.__notes__[0]
    assert gockpt.load("ckpts", run.model, run.opt, step=1).step == 1
    chunk.unlink()
    gockpt.open("ckpts")["model/0.weight"][...]


@when("A chunk that was compressed is damaged")
def _compressed_chunk_damaged(lab):
    run = lab.Run(width=64)
    for _ in range(2):
        run.saved(options=gockpt.Options(window=1, compression="zstd"))
    damage("ckpts/step-0000000002/model/0.weight/c.0.0")
    assert [problem.array for problem in gockpt.verify("ckpts").problems] == ["model/0.weight"]
    assert gockpt.load("ckpts", run.model, run.opt, step=1).step == 1
    with mock.patch("gockpt.storage.read.decode.decode", side_effect=AssertionError):
        gockpt.open("ckpts")["model/0.weight"][0, 0]


@when('The same, with `on_damage="previous"`')
def _chunk_damaged_previous(lab):
    run = lab.Run().saved().saved()
    damage("ckpts/step-0000000002/model/0.weight/c.0.0")
    restored = gockpt.load("ckpts", run.model, run.opt, on_damage="previous")
    assert (restored.step, [one.step for one in restored.passed_over]) == (1, [2])


def _with_nan(lab):
    """Two steps, of which the second has a NaN."""
    run = lab.Run().saved()
    run.model[0].weight.data[0, 0] = torch.nan
    return run.saved()


@when("With `finite=True`, the newest has NaN or Inf in parameters or optimizer state")
def _newest_not_finite(lab):
    run = _with_nan(lab)
    restored = gockpt.load("ckpts", run.model, run.opt, finite=True)
    assert (restored.step, [one.step for one in restored.passed_over]) == (1, [2])


@when("With `finite=True`, the step asked for has some, or every checkpoint")
def _step_not_finite(lab):
    run = _with_nan(lab)
    gockpt.load("ckpts", run.model, run.opt, finite=True, step=2)


@when("The newest manifest is damaged")
def _manifest_damaged(lab):
    run = lab.Run().saved().saved()
    damage("ckpts/step-0000000002/gockpt.json")
    assert gockpt.load("ckpts", run.model, run.opt).step == 1
    assert not gockpt.verify("ckpts", 2).ok


@when("A step is asked for whose manifest is damaged")
def _that_manifest_damaged(lab):
    lab.Run().saved().saved()
    damage("ckpts/step-0000000002/gockpt.json")
    gockpt.open("ckpts", step=2)


@when("The newest checkpoint is of a later version of the format")
def _later_version(lab):
    options = gockpt.Options(window=1, when_busy="wait", layout="directory")
    run = lab.Run().saved(options=options).saved(options=options)
    path = Path("ckpts/step-0000000002/gockpt.json")
    line = path.read_bytes().splitlines(keepends=True)[0].replace(b'"version":1', b'"version":9')
    path.write_bytes(line + b'{"crc32c": "%08x"}\n' % crc32c(line))
    assert gockpt.load("ckpts", run.model, run.opt, step=1).step == 1
    gockpt.load("ckpts", run.model, run.opt)


@when("A checkpoint in one file is damaged between its entries: in headers or padding")
def _between_entries(lab):
    run = lab.Run().saved()
    gockpt.pack("ckpts", "a.zip")
    data = bytearray(Path("a.zip").read_bytes())
    data[10] ^= 1  # the time in the first local header
    Path("a.zip").write_bytes(data)
    (problem,) = gockpt.verify("a.zip").problems
    assert "local header" in problem.what
    assert gockpt.load("a.zip", run.model, run.opt).step == 1
    run.check()


@when("A checkpoint in one file is deleted while it is being read")
def _unlinked(lab):
    run = lab.Run().saved()
    gockpt.pack("ckpts", "a.zip")
    held = gockpt.open("a.zip")
    os.remove("a.zip")
    assert torch.equal(held["model/0.weight"][...], run.model[0].weight)


@when("A checkpoint is deleted while it is being read")
def _pruned(lab):
    lab.Run().saved()
    held = gockpt.open("ckpts")
    shutil.rmtree("ckpts/step-0000000001")
    held["model/0.weight"][...]


@when("A tensor's name is misspelt")
def _misspelt(lab):
    lab.Run().saved()
    with pytest.raises(gockpt.TensorNotFound, match="did you mean 'model/0.weight'") as caught:
        gockpt.open("ckpts")["model/0.weigth"]
    raise caught.value


def uploaded(lab):
    """Return the URL of an uploaded checkpoint, and the directory that stands for the store."""
    lab.Run().saved()
    url = gockpt.upload("ckpts", f"file://{Path.cwd()}/there").url
    return url, Path(url.removeprefix("file://"))


@when("An object of an uploaded checkpoint is missing or damaged")
def _object_damaged(lab):
    url, place = uploaded(lab)
    held = gockpt.open(url)
    damage(place / "model/0.weight/c.0.0")
    (place / "model/1.weight/c.0.0").unlink()
    with pytest.raises(gockpt.ChunkCorrupt, match="missing"):
        held["model/1.weight"][...]
    held["model/0.weight"][...]


@when("An uploaded checkpoint is deleted, manifest first, while it is being read")
def _object_pruned(lab):
    url, place = uploaded(lab)
    held = gockpt.open(url)
    shutil.rmtree(place)
    held["model/0.weight"][...]


@when("The object store can't be reached, or refuses")
def _no_store(lab):
    url, _ = uploaded(lab)
    with mock.patch.object(Objects, "stat", side_effect=gockpt.RemoteError("403")):
        gockpt.open(url)


@when("A URL is read without obstore")
def _no_obstore(lab):
    with mock.patch.dict(sys.modules, {"obstore": None}):
        gockpt.open("s3://bucket/run")


@pytest.mark.parametrize("row", TRIALS)
def test_a_row_is_true(row, table, lab):
    table.judge(table.rows_below("... while loading and reading")[row], TRIALS[row], lab)


def test_every_row_is_tried(table):
    assert table.rows_below("... while loading and reading").keys() == TRIALS.keys()
