"""Bad input gets a clear error and loses nothing: older checkpoints load, the next save works."""

from __future__ import annotations

import errno
import functools
import os
import threading
from pathlib import Path

import pytest
import torch

import gockpt
from gockpt import opening
from gockpt.storage.local.filesystem import Filesystem
from gockpt.storage.local.store import Store

# -- arguments


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"step": -1}, "step=-1.*from 0 up"),
        ({"step": 1.5}, "step=1.5"),
        ({"step": True}, "step=True"),
        ({"step": "7"}, "step='7'"),
        ({"every": 0}, "every=0.*from 1 up"),
        ({"every": -4}, "every=-4"),
        ({"every": 2.0}, "every=2.0"),
        ({"every": "sometimes"}, "every='sometimes'"),
        ({"every": True}, "every=True"),
        ({"every": 2}, "window of 3 steps needs every >= 3"),
        ({"extra": [1]}, "extra is a list"),
        ({"extra": {"": 1}}, "extra has the name ''"),
        ({"extra": {3: 1}}, "extra has the name 3"),
        ({"extra": {"a/b": 1}}, "extra has the name 'a/b'"),
        ({"extra": {"x": object()}}, "extra/x"),
        ({"extra": {"x": {"deep": [1, threading.Lock()]}}}, r"extra/x\['deep'\]\[1\]"),
        ({"options": {"window": 3}}, "options is a dict"),
    ],
)
def test_a_bad_argument_is_refused_by_name(run, more, message):
    run.update()
    run.step = 8
    with pytest.raises(gockpt.UsageError, match=message):
        run.save(**more)
    run.check_nothing_lost()


@pytest.mark.parametrize(
    "model", [None, 3, [], [3], "model", {"a": 3}, {3: torch.zeros(2)}, torch.zeros(3)], ids=repr
)
def test_a_model_that_is_none(run, model):
    with pytest.raises(gockpt.UsageError, match="model"):
        gockpt.save_overlapped(model, run.optimizer, run.path, step=5)
    run.check_nothing_lost()


@pytest.mark.parametrize(
    "optimizer",
    [3, "adam", [None], [object()], torch.optim.AdamW],
    ids=["number", "text", "nothing in a list", "object in a list", "class"],
)
def test_an_optimizer_that_is_none(run, optimizer):
    with pytest.raises(gockpt.UsageError, match="optimizer"):
        gockpt.save_overlapped(run.model, optimizer, run.path, step=5)
    run.check_nothing_lost()


def test_model_and_optimizer_swapped(run):
    with pytest.raises(gockpt.UsageError, match="model is a .*AdamW"):
        gockpt.save_overlapped(run.optimizer, run.model, run.path, step=5)
    run.check_nothing_lost()


def test_a_tensor_that_has_no_exact_form(run):
    run.model.register_buffer("odd", torch.zeros(3, 3).to_sparse())
    run.update()
    with pytest.raises(gockpt.UnsupportedState, match="model/odd can't be saved.*sparse.*to_dense"):
        run.save(step=8)
    del run.model.odd
    run.check_nothing_lost()


def test_an_extra_that_raises(run):
    def broken():
        raise ZeroDivisionError("in the user's extra")

    with pytest.raises(ZeroDivisionError, match="user's extra"):
        run.go(4, extra={"x": broken})
    assert gockpt.steps(run.path) == [4]
    run.check_nothing_lost()


def test_too_little_host_memory_is_said_before_anything_moves(run):
    small = gockpt.Options(window=3, host_memory=1 << 16)
    with pytest.raises(gockpt.OptionsError, match=r"host_memory=65536.*raise host_memory"):
        run.go(4, options=small)
    assert gockpt.steps(run.path) == [4]
    run.check_nothing_lost()


# -- nothing to save yet, or nothing but a model


def test_before_the_optimizer_has_state(run, harness):
    model, optimizer = run.build()
    path = harness.directory()
    with harness.closing():
        moment = harness.take(0, model, optimizer)
        gockpt.save_overlapped(model, optimizer, path, step=0)
    assert set(moment.arrays) == {"model/a", "model/b"}
    harness.check_open(path, moment)
    harness.check_load(path, moment, *run.build())


def test_a_window_that_opens_before_the_optimizer_has_state(run, harness):
    model, optimizer = run.build()
    path = harness.directory()
    options = gockpt.Options(window=3)
    with harness.closing():
        gockpt.save_overlapped(model, optimizer, path, step=1, every=3, options=options)
        for step in (2, 3):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
            moment = harness.take(step, model, optimizer)
            handle = gockpt.save_overlapped(model, optimizer, path, step=step, every=3, options=options)
        assert handle.result(30).step == 3
    harness.check_open(path, moment)


@pytest.mark.parametrize("none", [None, []])
def test_a_model_without_optimizer(run, harness, none):
    path = harness.directory()
    with harness.closing():
        for step in (1, 2):
            with torch.no_grad():
                run.model.a.add_(1.0)
            moment = harness.take(step, run.model)
            gockpt.save_overlapped(run.model, none, path, step=step).result(30)
    harness.check_open(path, moment)
    harness.check_load(path, moment, run.build()[0])


def test_an_empty_model(harness):
    path = harness.directory()
    with harness.closing():
        gockpt.save_overlapped(torch.nn.ReLU(), None, path, step=3, extra={"a": 1})
    assert gockpt.load(path, torch.nn.ReLU()).extra == {"a": 1}
    assert gockpt.verify(path).ok


# -- paths


def test_a_path_that_is_a_file(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(gockpt.StorageError, match="file") as caught:
            gockpt.save_overlapped(run.model, run.optimizer, path, step=5)
        assert str(tmp_path / "file") in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"
    run.check_nothing_lost()


def test_a_path_that_cannot_be_written(run):
    with pytest.raises(gockpt.StorageError, match="/proc/gockpt-checkpoints.*;"):
        gockpt.save_overlapped(run.model, run.optimizer, "/proc/gockpt-checkpoints", step=5)
    run.check_nothing_lost()


def test_the_directory_vanishes(run):
    """Removed under a running save: an error, and a new directory works again."""
    import shutil

    run.update()
    shutil.rmtree(run.path)
    run.step = 8
    with pytest.raises(gockpt.StorageError, match="removed or moved away|can't"):
        run.save().result(30)


class Faulty(Filesystem):
    """A disk on which chosen calls fail once it is ``broken``."""

    def __init__(self, calls, code):
        self.calls, self.code, self.broken = calls, code, False

    def __getattribute__(self, name):
        if name in object.__getattribute__(self, "calls") and self.broken:
            raise OSError(self.code, os.strerror(self.code))
        return object.__getattribute__(self, name)


@pytest.mark.parametrize(
    ("calls", "code", "way_out"),
    [
        (("pwrite", "fallocate"), errno.ENOSPC, "free space"),
        (("fsync", "syncfs"), errno.EIO, "check it"),
        (("pwrite",), errno.EDQUOT, "quota"),
        (("rename_new", "exchange"), errno.EROFS, "read-only"),
        (("open",), errno.EMFILE, "too many open files"),
    ],
    ids=["full", "failing", "quota", "read-only", "descriptors"],
)
@pytest.mark.parametrize("window", [1, 3])
def test_a_disk_that_refuses(run, monkeypatch, calls, code, way_out, window):
    """The save is lost and says so twice; the run goes on, older ones stay, and later saves work."""
    gockpt.wait()
    disk = Faulty(calls, code)
    monkeypatch.setattr(opening, "Store", functools.partial(Store, fs=disk))
    options = gockpt.Options(window=window, cpu_threads=2)
    run.go(4, options=options).result(30)
    assert gockpt.steps(run.path) == [4, 8]
    disk.broken = True
    handle = run.go(4, options=options)
    with pytest.raises(gockpt.StorageError, match=way_out) as caught:
        handle.result(30)
    assert run.path in str(caught.value)
    assert os.strerror(code) in str(caught.value)
    assert isinstance(handle.exception(1), gockpt.StorageError)
    run.update()
    with pytest.raises(gockpt.StorageError, match=way_out):
        run.save(options=options)
    disk.broken = False
    assert gockpt.steps(run.path) == [4, 8]
    assert gockpt.verify(run.path, 8).ok
    for _ in range(3):
        handle = run.go(1, options=options)
    assert handle.result(30).step == 16
    gockpt.wait()
    assert [p.name for p in Path(run.path).iterdir() if "partial" in p.name] == []
    run.check_nothing_lost()


def test_a_background_error_is_raised_once_by_wait(run, monkeypatch):
    disk = Faulty(("pwrite",), errno.ENOSPC)
    gockpt.wait()
    monkeypatch.setattr(opening, "Store", functools.partial(Store, fs=disk))
    options = gockpt.Options(window=1)
    run.go(4, options=options).result(30)
    disk.broken = True
    handle = run.go(4, options=options)
    with pytest.raises(gockpt.StorageError):
        gockpt.wait()
    gockpt.wait()
    with pytest.raises(gockpt.StorageError):
        handle.result(1)
    disk.broken = False
    run.check_nothing_lost()


# -- looking for what is not there


def test_an_unknown_step(run):
    for ask in (gockpt.open, gockpt.verify):
        with pytest.raises(gockpt.CheckpointNotFound, match=r"7.*4"):
            ask(run.path, 7)
    with pytest.raises(gockpt.CheckpointNotFound, match=r"7.*4"):
        gockpt.load(run.path, run.model, run.optimizer, step=7)
    with pytest.raises(gockpt.UsageError, match="step=-1"):
        gockpt.open(run.path, -1)
    run.check_nothing_lost()


def test_a_directory_that_is_no_checkpoint(run, tmp_path):
    (tmp_path / "step-0000000004").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    for ask in (gockpt.open, gockpt.verify, lambda p: gockpt.load(p, run.model)):
        with pytest.raises(gockpt.NotFoundError, match=str(tmp_path)):
            ask(tmp_path)
        with pytest.raises(gockpt.NotFoundError):
            ask(tmp_path / "step-0000000004")
        with pytest.raises(gockpt.NotFoundError):
            ask(tmp_path / "notes.txt")
        with pytest.raises(gockpt.NotFoundError):
            ask(tmp_path / "nowhere")
    assert gockpt.latest(tmp_path) is None
    assert gockpt.steps(tmp_path / "nowhere") == []
    with pytest.raises(gockpt.TensorNotFound, match="did you mean 'model/a'"):
        gockpt.open(run.path)["a"]
    run.check_nothing_lost()


def test_saving_beside_files_of_others_leaves_them(run, harness, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-0000000001").mkdir()
    (tmp_path / "step-0000000001" / "mine").write_text("too")
    gockpt.save_overlapped(run.model, run.optimizer, tmp_path, step=2).result(30)
    with pytest.raises(gockpt.StorageError, match="step-0000000001"):
        gockpt.save_overlapped(run.model, run.optimizer, tmp_path, step=1).result(30)
    with pytest.raises(gockpt.StorageError, match="step-0000000001"):
        gockpt.wait()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "step-0000000001" / "mine").read_text() == "too"
    assert gockpt.steps(tmp_path) == [2]


def test_loading_into_another_model(run, harness):
    other = harness.Tensors({"a": torch.randn(1499), "c": torch.randn(3)})
    before = harness.take(0, other)
    with pytest.raises(gockpt.StateMismatch, match="nothing was changed") as caught:
        gockpt.load(run.path, other)
    assert caught.value.missing == ("model/c",)
    assert caught.value.unexpected == ("model/b",)
    assert "1499" in caught.value.mismatched[0]
    harness.same(harness.take(0, other).model, before.model)
    with pytest.raises(gockpt.StateMismatch, match="no entry of the model fits"):
        gockpt.load(run.path, other, strict=False)
    harness.same(harness.take(0, other).model, before.model)
    run.check_nothing_lost()
