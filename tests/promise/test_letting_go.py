"""Letting go of paths and models: ``gockpt.close``, cells that are run again, a new path for each save."""

from __future__ import annotations

import functools
import gc
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

import gockpt
from gockpt import registry
from gockpt.reachable import in_use


def build(size=8):
    model = torch.nn.Linear(size, size)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def update(model, optimizer):
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


WINDOW = gockpt.Options(window=4, when_busy="wait")


def loop(kept, path, upto, first=1, **how):
    how.setdefault("options", gockpt.Options(when_busy="wait"))
    for step in range(first, upto + 1):
        update(*kept)
        save = gockpt.save_overlapped(*kept, path, step=step, **how)
    return save


def may_be_saved_into_by_others(path):
    code = "import sys; from gockpt.storage.local.store import Store; Store(sys.argv[1]).close()"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=False, text=True)
    assert "PathBusy" in done.stderr or not done.returncode, done.stderr
    return not done.returncode


@pytest.fixture(autouse=True)
def _closed():
    yield
    gockpt.close()
    assert not registry.opened


# -- gockpt.close


@pytest.mark.parametrize("what", ["path", "Path", "~", "model", "wrapped", "all"])
def test_close_lets_others_save(what, monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    kept = build()
    loop(kept, "ckpts", 3).result()
    assert not may_be_saved_into_by_others("ckpts")
    given = {
        "path": "ckpts",
        "Path": Path("ckpts"),
        "~": "~/ckpts",
        "model": kept[0],
        "wrapped": torch.nn.parallel.DataParallel(kept[0]),
        "all": None,
    }[what]
    gockpt.close(given)
    gockpt.close(given)
    assert may_be_saved_into_by_others("ckpts")
    assert not [path for _, path in registry.by_call if path == os.path.realpath("ckpts")]
    loop(kept, "ckpts", 5, first=4).result()  # the same run goes on
    assert gockpt.steps("ckpts") == [1, 2, 3, 4, 5]


def test_close_publishes_what_was_captured_and_gives_an_open_window_up(caplog):
    kept = build(64)
    captured = loop(kept, "ckpts", 1)
    gockpt.close("ckpts")
    assert (captured.done(), gockpt.steps("ckpts")) == (True, [1])
    given_up = loop(kept, "ckpts", 6, first=2, every=4, options=WINDOW)
    assert given_up.progress().phase == "open"
    with caplog.at_level(logging.WARNING, "gockpt"):
        gockpt.close("ckpts")
    assert "was given up: gockpt.close() was called" in caplog.text
    assert isinstance(given_up.exception(), gockpt.SaveAborted)
    assert 8 not in gockpt.steps("ckpts")
    assert may_be_saved_into_by_others("ckpts")


def test_close_leaves_other_paths_models_and_checkpointers_alone():
    one, other = build(), build()
    loop(one, "a", 1).result()
    loop(other, "b", 1).result()
    third = build()
    with gockpt.Checkpointer(*third, "c") as saver:
        gockpt.close("b")
        gockpt.close("nowhere")
        gockpt.close(build()[0])
        assert sorted(saver.path[-1] for saver in registry.opened) == ["a", "c"]
        gockpt.close()
        assert not saver.closed


def test_close_of_a_mapping():
    tensors = {"a": torch.zeros(3)}
    gockpt.save_overlapped(tensors, None, "ckpts", step=1).result()
    gockpt.close({"other": torch.zeros(3)})
    assert registry.opened
    gockpt.close(dict(tensors))
    assert not registry.opened


@pytest.mark.parametrize("wrong", [3, [3], b"x", "", object()], ids=lambda wrong: type(wrong).__name__)
def test_close_of_what_is_neither(wrong):
    with pytest.raises(gockpt.UsageError):
        gockpt.close(wrong)


def test_close_raises_what_failed_and_releases_all_the_same():
    one, other = build(), build()
    loop(one, "a", 1).result()
    loop(other, "b", 1).result()
    os.rename("a", "moved")
    failed = loop(one, "a", 2, first=2)
    assert isinstance(failed.exception(), gockpt.StorageError)
    with pytest.raises(gockpt.StorageError):
        gockpt.close()
    assert not registry.opened
    loop(one, "a", 3, first=3).result()
    assert gockpt.steps("a") == [3]


# -- a cell that is run again


def test_a_model_that_a_traceback_keeps_alive_does_not_bar_the_next(monkeypatch, caplog):
    def cell(interrupted_at):
        kept = build()
        save = None
        for step in range(1, 40):
            update(*kept)
            save = gockpt.save_overlapped(*kept, "ckpts", step=step, every=4, options=WINDOW)
            if step == interrupted_at:
                raise KeyboardInterrupt
        return save

    for interrupted_at in (7, 8, 9, 4, 4):
        with pytest.raises(KeyboardInterrupt) as caught:
            cell(interrupted_at)
        monkeypatch.setattr(sys, "last_traceback", caught.value.__traceback__, raising=False)
        monkeypatch.setattr(sys, "last_value", caught.value, raising=False)
        del caught
    with caplog.at_level(logging.WARNING, "gockpt"):
        cell(0)
    assert "which still lives" in caplog.text
    gockpt.wait()
    monkeypatch.undo()
    assert gockpt.steps("ckpts")[-1] == 39
    assert gockpt.verify("ckpts").ok


def test_models_that_are_kept_do_not_bar_the_next(caplog):
    """As the output history of a notebook keeps them."""
    out = []
    for _ in range(3):
        out.append(build())
        loop(out[-1], "ckpts", 5)
    gockpt.wait()
    assert gockpt.latest("ckpts") == 5
    update(*out[0])
    with pytest.raises(gockpt.PathBusy, match=r"as one list of models; or gockpt\.close\(\) the path"):
        gockpt.save_overlapped(*out[0], "ckpts", step=6)
    gockpt.close("ckpts")
    loop(out[0], "ckpts", 7, first=7).result()
    assert gockpt.latest("ckpts") == 7


@pytest.mark.parametrize("every", [1, 2, 10])
def test_two_models_that_are_saved_alternately_are_refused(every):
    one, other = build(), build()

    def alternate():
        for step in range(1, 4):
            for kept in (one, other):
                update(*kept)
                gockpt.save_overlapped(*kept, "ckpts", step=step, every=every)

    with pytest.raises(gockpt.PathBusy, match="two models would replace"):
        alternate()
    gockpt.wait()


def test_two_checkpointers_used_alternately_are_refused():
    one, other = build(), build()
    first = gockpt.Checkpointer(*one, "ckpts")
    first.after_step(1)
    second = gockpt.Checkpointer(*other, "ckpts")
    assert first.closed
    second.after_step(2)
    with pytest.raises(gockpt.PathBusy, match="two models would replace"):
        first.after_step(2)
    second.close()
    with pytest.raises(gockpt.UsageError, match="closed; make a new one"):
        first.after_step(3)
    assert gockpt.steps("ckpts") == [1, 2]


def test_another_thread_that_saves_is_not_cut_off():
    started, go = threading.Event(), threading.Event()
    kept = build()

    def train():
        loop(kept, "ckpts", 1).result()
        started.set()
        go.wait(30)
        loop(kept, "ckpts", 2, first=2).result()

    thread = threading.Thread(target=train)
    thread.start()
    started.wait(30)
    with pytest.raises(gockpt.PathBusy, match="by another thread"):
        loop(build(), "ckpts", 5, first=5)
    go.set()
    thread.join()
    assert gockpt.steps("ckpts") == [1, 2]


# -- who uses a model


class Holder:
    def __init__(self, thing):
        self.thing = thing


def test_what_running_code_leads_to_is_in_use():
    model = torch.nn.Linear(2, 2)
    weak = weakref.ref(model)

    def get():
        return [weak()]

    assert in_use(get)
    holder = Holder([{"deep": (model,)}])
    del model
    assert in_use(get)
    called = functools.partial(print, holder.thing)
    del holder
    assert in_use(get)
    del called
    assert weak() is None


def test_what_a_modules_variable_leads_to_is_in_use():
    module = sys.modules[__name__]
    module.some_name = [torch.nn.Linear(2, 2)]
    weak = weakref.ref(module.some_name[0])
    assert in_use(lambda: [weak()])
    module.Out = {3: module.some_name}
    del module.some_name
    assert not in_use(lambda: [weak()])  # a notebook's history
    del module.Out
    assert weak() is None


def test_what_only_a_traceback_or_a_cycle_leads_to_is_not():
    def fail():
        model = torch.nn.Linear(2, 2)
        holder = Holder(model)
        holder.itself = holder
        made.append(weakref.ref(model))
        raise ZeroDivisionError

    made = []
    try:
        fail()
    except ZeroDivisionError as error:
        traceback = error.__traceback__.tb_next
    assert made[0]() is not None
    assert not in_use(lambda: [made[0]()])
    del traceback


# -- a new path for each save


def measured():
    gc.collect()
    return (
        threading.active_count(),
        len(os.listdir("/proc/self/fd")),
        len(registry.opened),
        sum(type(one).__name__ in ("Checkpointer", "Engine", "Arena", "Store") for one in gc.get_objects()),
    )


@pytest.mark.parametrize("of", ["module", "list", "mapping"])
def test_a_new_path_for_each_save_leaks_nothing(of):
    model, optimizer = build(64)
    given = {"module": model, "list": [model], "mapping": dict(model.named_parameters())}[of]
    optimizer = None if of == "mapping" else optimizer
    before = None
    for step in range(1, 51):
        gockpt.save_overlapped(given, optimizer, f"run/epoch-{step}", step=step).result()
        if step == 10:
            before = measured()
            hooks = len(getattr(optimizer, "_optimizer_step_post_hooks", ()))
    most = [count + 1 for count in before[:2]]  # of threads and descriptors
    deadline = time.monotonic() + 60  # threads that were told to end do so when they next run
    while any(now > bound for now, bound in zip(measured(), most, strict=False)):
        assert time.monotonic() < deadline, (measured(), before)
        time.sleep(0.01)
    assert measured()[2:] == before[2:]
    assert len(getattr(optimizer, "_optimizer_step_post_hooks", ())) == hooks
    assert all(gockpt.latest(f"run/epoch-{step}") == step for step in range(1, 51))
    assert may_be_saved_into_by_others("run/epoch-10")


def test_two_paths_that_are_come_back_to_stay_open():
    kept = build()
    for _ in range(4):
        update(*kept)
        for path in ("often", "best"):
            gockpt.save_overlapped(*kept, path).result()
    assert gockpt.steps("often") == gockpt.steps("best") == [1, 2, 3, 4]  # calls are counted on
    assert len(registry.opened) == 2


def test_two_paths_with_intervals_stay_open():
    kept = build()
    for step in range(1, 9):
        update(*kept)
        gockpt.save_overlapped(*kept, "often", step=step, every=4, options=WINDOW)
        gockpt.save_overlapped(*kept, "seldom", step=step, every=8, options=WINDOW)
    assert len(registry.opened) == 2
    gockpt.wait()
    assert gockpt.steps("seldom") == [8]


def test_what_failed_in_a_path_that_was_left_is_raised_by_the_next_call():
    kept = build()
    gockpt.save_overlapped(*kept, "a", step=1).result()
    os.makedirs("b/step-0000000002")
    failed = gockpt.save_overlapped(*kept, "b", step=2)
    assert isinstance(failed.exception(), gockpt.StorageError)
    with pytest.raises(gockpt.StorageError):
        gockpt.save_overlapped(*kept, "c", step=3)
    gockpt.wait()
    assert gockpt.steps("c") == [3]
