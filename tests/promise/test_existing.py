"""Checkpoints of one run are never overwritten, replaced or removed by another; the same run goes on.

Another process is played by forgetting what this one has saved, once, and by a real one in the end.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gockpt
from gockpt import registry
from gockpt.state import lineage
from gockpt.storage.local.store import Store

URL = "file://{}/bucket"


def files_below(path):
    return {str(p.relative_to(path)): p.stat().st_mtime_ns for p in Path(path).rglob("*")}


def run_ids(path, *, superseded=False):
    return [entry.run for entry in gockpt.checkpoints(path, superseded=superseded)]


@pytest.fixture(params=["thread", "process"])
def worker(request):
    return request.param


@pytest.fixture
def another_process():
    """Play that another process begins."""

    def begin():
        for saver in list(registry.opened):
            saver.close()
        lineage._of_process.clear()

    yield begin
    begin()


class Trainer:
    """A model with an optimizer, and what is needed to save them."""

    def __init__(self, path="ckpts", **options):
        self.model = torch.nn.Linear(3, 3)
        self.opt = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.path = path
        self.options = gockpt.Options(window=1, **options)

    def load(self, path=None, **more):
        gockpt.load(path or self.path, self.model, self.opt, **more)
        return self

    def save(self, *steps):
        for step in steps:
            self.model(torch.ones(1, 3)).sum().backward()
            self.opt.step()
            gockpt.save_overlapped(self.model, self.opt, self.path, step=step, options=self.options).result(
                60
            )
        return self


# -- refused


def test_a_path_with_checkpoints_is_refused_before_anything_changes(another_process, worker):
    Trainer().save(1, 2)
    another_process()
    # What a killed writer left would be swept up by the next one.
    shutil.copy("ckpts/step-0000000001.zip", "ckpts/step-0000000003.partial-00ff00ff")
    before = files_below("ckpts")
    for call in (
        lambda options: gockpt.save_overlapped(torch.nn.Linear(2, 2), None, "ckpts", step=9, options=options),
        lambda options: gockpt.Checkpointer(torch.nn.Linear(2, 2), None, "ckpts", options=options),
    ):
        with pytest.raises(gockpt.UsageError) as caught:
            call(gockpt.Options(worker=worker, keep=2))
        for words in ("step 2", "gockpt.load(", "another path", "existing='continue'"):
            assert words in str(caught.value)
    assert files_below("ckpts") == before


def test_the_refusal_is_caught_as_any_error_of_the_loop(another_process):
    Trainer().save(1)
    another_process()
    with pytest.raises(gockpt.SaveError):
        Trainer().save(1)
    assert gockpt.steps("ckpts") == [1]


def test_a_model_loaded_from_elsewhere_is_refused(another_process):
    Trainer("base").save(1)
    another_process()
    Trainer("other").save(1)
    another_process()
    with pytest.raises(gockpt.UsageError, match="step 1"):
        Trainer("other").load("base").save(2)


def test_two_that_went_on_from_the_same_checkpoint_do_not_overwrite_each_other(another_process):
    """A sweep over learning rates, each from the same base, of which two are given the same path."""
    Trainer("base").save(1)
    another_process()
    Trainer("tuned").load("base").save(2, 3)
    another_process()
    with pytest.raises(gockpt.UsageError, match="step 3"):
        Trainer("tuned").load("base").save(2)
    another_process()
    Trainer("tuned").load("tuned").save(4)
    assert gockpt.steps("tuned") == [2, 3, 4]


def test_a_teacher_that_was_loaded_from_there_speaks_for_no_student(another_process):
    Trainer().save(1)
    another_process()
    Trainer().load()
    with pytest.raises(gockpt.UsageError):
        Trainer().save(1)


@pytest.mark.parametrize(
    ("layout", "name", "kind"),
    [("file", "step-0000000001.zip", "archive"), ("directory", "step-0000000001", "directory")],
)
def test_a_checkpoint_itself_is_no_path_to_save_into(layout, name, kind):
    Trainer(layout=layout).save(1)
    with pytest.raises(gockpt.UsageError, match=f"one checkpoint's own {kind}"):
        Trainer(f"ckpts/{name}").save(2)
    assert gockpt.verify("ckpts").ok


def test_who_saves_there_right_now_is_told_first(another_process):
    Trainer().save(1)
    another_process()
    code = "from gockpt.storage.local.store import Store; s = Store('ckpts'); print(flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(gockpt.PathBusy, match=f"process {other.pid} on"):
            Trainer().save(2)
        other.communicate("\n", timeout=60)
    with pytest.raises(gockpt.UsageError, match="step 1"):
        Trainer().save(2)


def test_what_is_published_between_the_look_and_the_lock_is_seen(another_process, monkeypatch):
    """Another process begins in the same empty path, publishes and ends in that moment."""
    other = Trainer("other")
    other.save(1)
    another_process()
    inner = Store.__init__

    def late(store, path, **more):
        if "follow" in more and not gockpt.steps("ckpts"):
            Path("ckpts").mkdir()
            shutil.copy("other/step-0000000001.zip", "ckpts")
        inner(store, path, **more)

    monkeypatch.setattr(Store, "__init__", late)
    with pytest.raises(gockpt.UsageError, match="step 1"):
        Trainer().save(2)
    assert gockpt.steps("ckpts") == [1]


# -- the same run goes on


def test_a_run_goes_on_after_a_load(another_process, worker):
    Trainer(worker=worker).save(1, 2)
    for step in (3, 4):
        another_process()
        Trainer(worker=worker, keep=2).load().save(step)
    assert gockpt.steps("ckpts") == [3, 4]
    assert len(set(run_ids("ckpts"))) == 1
    assert gockpt.open("ckpts").metadata.ancestors == ()


def test_a_run_that_went_back_abandons_what_it_had(another_process):
    Trainer().save(1, 2, 3)
    another_process()
    Trainer(keep=2).load(step=1).save(2, 5)
    assert gockpt.steps("ckpts") == [2, 5]


@pytest.mark.parametrize("copy", ["copied", "uploaded", "synced"])
def test_a_run_goes_on_in_its_old_path_from_a_copy(another_process, copy):
    url = URL.format(Path.cwd())
    first = Trainer(**({"remote": url} if copy == "synced" else {})).save(1, 2)
    gockpt.wait()
    if copy == "copied":
        shutil.copytree("ckpts", "copy")
    elif copy == "uploaded":
        gockpt.upload("ckpts", url)
    del first
    another_process()
    Trainer(keep=2).load("copy" if copy == "copied" else url).save(3)
    assert gockpt.steps("ckpts") == [2, 3]
    assert len(set(run_ids("ckpts"))) == 1


def test_a_run_that_moved_goes_on_in_its_old_path(another_process):
    Trainer("a").save(1)
    another_process()
    Trainer("b").load("a").save(2)
    another_process()
    Trainer("a").load("b").save(3)
    assert gockpt.steps("a") == [1, 3]
    held = gockpt.open("a").metadata
    assert [run for run, _ in held.ancestors] == run_ids("a")[:1]
    # What was published there after it left is not its own.
    another_process()
    Trainer("a").load("a", step=1).save(2)
    another_process()
    with pytest.raises(gockpt.UsageError):
        Trainer("a").load("b").save(4)


def test_one_model_in_two_paths_is_one_run(another_process):
    trainer = Trainer("a").save(1)
    trainer.path = "final"
    trainer.save(2)
    another_process()
    Trainer("a").load("final").save(3)
    assert gockpt.steps("a") == [1, 3]


def test_one_process_goes_on_with_another_model(another_process):
    """As the cell of a notebook does that is run again."""
    for _ in range(3):
        Trainer(keep=2).save(1, 2, 3)
        gockpt.wait()
    assert gockpt.steps("ckpts") == [2, 3]
    assert len(set(run_ids("ckpts"))) == 1


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_is_another_process():
    trainer = Trainer().save(1)
    gockpt.wait()
    trainer.model = None
    for saver in list(registry.opened):
        saver.close()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        try:
            Trainer().save(2)
        except gockpt.GockptError as error:
            os.write(write, type(error).__name__.encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert pipe.read() == "ExistingCheckpoints"


# -- beside another run


def test_beside_another_run_nothing_of_it_is_removed_or_replaced(another_process, worker, caplog):
    Trainer().save(1, 2, 3)
    (theirs,) = set(run_ids("ckpts"))
    another_process()
    with caplog.at_level(logging.WARNING, "gockpt"):
        mine = Trainer(existing="continue", keep=2, worker=worker).save(10, 11, 12, 13)
    assert "holds 3 checkpoints of other runs" in caplog.text
    assert gockpt.steps("ckpts") == [1, 2, 3, 12, 13]
    with pytest.raises(gockpt.StorageError, match="a checkpoint of another run .* never replaced"):
        mine.save(2)
    with pytest.raises(gockpt.StorageError):  # told once more, by the next call
        gockpt.wait()
    assert run_ids("ckpts", superseded=True)[:3] == [theirs] * 3
    assert gockpt.verify("ckpts", 2).ok
    mine.save(14)
    assert gockpt.steps("ckpts") == [1, 2, 3, 13, 14]


def test_keep_removes_other_runs_if_it_says_so(another_process):
    Trainer().save(1, 2, 3)
    another_process()
    Trainer(existing="continue", keep=gockpt.Keep(newest=2, other_runs=True)).save(10, 11)
    assert gockpt.steps("ckpts") == [10, 11]


def test_prune_leaves_other_runs_alone(another_process):
    Trainer().save(1, 2, 3)
    another_process()
    Trainer(existing="continue").save(10, 11, 12)
    another_process()
    for dry_run in (True, False):
        done = gockpt.prune("ckpts", 2, dry_run=dry_run)
        assert ([entry.step for entry in done.removed], done.other_runs) == ([10], 3)
    done = gockpt.prune("ckpts", gockpt.Keep(newest=2, other_runs=True))
    assert (gockpt.steps("ckpts"), done.other_runs) == ([11, 12], 0)


def test_a_run_that_began_beside_another_goes_on(another_process):
    Trainer().save(1, 2)
    another_process()
    Trainer(existing="continue").save(10, 11)
    another_process()
    Trainer(keep=2).load().save(12)
    assert gockpt.steps("ckpts") == [1, 2, 11, 12]
    # The other one does as well, by a load of its own.
    another_process()
    Trainer(keep=2).load(step=2).save(3)
    assert gockpt.steps("ckpts") == [2, 3, 11, 12]


# -- what an older gockpt wrote


def written_before(monkeypatch, *steps):
    """Save as a gockpt did that wrote no ancestors and gave each process an id of its own."""
    with monkeypatch.context() as patch:
        patch.setattr("gockpt.storage.local.transaction.Lineage.label", lambda _, contents: contents)
        for step in steps:
            Trainer(existing="continue").save(step)


def test_a_load_suffices_for_what_an_older_gockpt_wrote(another_process, monkeypatch):
    for step in (1, 2, 3):
        written_before(monkeypatch, step)
        another_process()
    assert len(set(run_ids("ckpts"))) == 3
    with pytest.raises(gockpt.UsageError, match="step 3"):
        Trainer().save(4)
    assert gockpt.open("ckpts").metadata.ancestors is None
    Trainer(keep=2).load().save(4)
    assert gockpt.steps("ckpts") == [3, 4]
    another_process()
    Trainer(keep=2).load().save(5)
    assert gockpt.steps("ckpts") == [4, 5]


def test_prune_counts_all_that_an_older_gockpt_wrote(another_process, monkeypatch):
    for step in (1, 2, 3):
        written_before(monkeypatch, step)
        another_process()
    gockpt.prune("ckpts", 1)
    assert gockpt.steps("ckpts") == [3]


# -- object stores


def test_a_remote_with_another_runs_checkpoints_is_refused(another_process, caplog):
    url = URL.format(Path.cwd())
    Trainer("a", remote=url).save(1, 2)
    gockpt.wait()
    another_process()
    before = files_below("bucket")
    with pytest.raises(gockpt.UsageError, match=r"step 2.*remote=") as caught:
        Trainer("b", remote=url).save(1)
    assert "gockpt.load('file://" in str(caught.value)
    assert not Path("b").exists()
    assert files_below("bucket") == before
    with caplog.at_level(logging.WARNING, "gockpt"):
        Trainer("b", remote=url, existing="continue").save(5)
        gockpt.wait()
    assert "holds checkpoints of other runs" in caplog.text
    assert gockpt.steps(url) == [1, 2, 5]


def test_a_remote_that_is_another_runs_checkpoint_is_refused(another_process):
    Trainer("a", layout="directory").save(1)
    url = gockpt.upload("a", URL.format(Path.cwd())).url
    another_process()
    before = files_below("bucket")
    with pytest.raises(gockpt.UsageError, match=r"step 1.*remote="):
        Trainer("b", remote=url).save(1)
    Trainer("b").save(1)
    with pytest.raises(gockpt.UsageError, match=r"another run.*step 1"):
        gockpt.upload("b", url)
    assert files_below("bucket") == before


def test_a_new_machine_goes_on_from_the_object_store(another_process):
    url = URL.format(Path.cwd())
    Trainer("a", remote=url).save(1, 2)
    gockpt.wait()
    another_process()
    shutil.rmtree("a")
    Trainer("a", remote=url).load(url).save(3)
    gockpt.wait()
    assert (gockpt.steps("a"), gockpt.steps(url)[-1]) == ([3], 3)
    assert len(set(run_ids(url))) == 1


def test_another_runs_newest_is_not_uploaded(another_process):
    url = URL.format(Path.cwd())
    Trainer().save(1, 2)
    another_process()
    Trainer(existing="continue", remote=url).save(7)
    gockpt.wait()
    assert gockpt.steps(url) == [7]


def test_two_runs_are_not_uploaded_to_one_place(another_process):
    url = URL.format(Path.cwd())
    Trainer("a").save(1, 2)
    another_process()
    Trainer("b").save(1)
    gockpt.upload("a", url)
    with pytest.raises(gockpt.UsageError, match=r"another run.*step 2"):
        gockpt.upload("b", url)
    another_process()
    Trainer("c").load("a").save(3)
    gockpt.upload("a", url, step=1)
    assert gockpt.steps(url) == [1, 2]


# -- two real processes

PROGRAM = """
import sys, torch, gockpt
model = torch.nn.Linear(3, 3)
if "load" in sys.argv:
    gockpt.load("ckpts", model)
try:
    gockpt.save_overlapped(model, None, "ckpts", step=int(sys.argv[1])).result(60)
except gockpt.UsageError as error:
    print(error)
"""


def test_two_processes():
    said = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, check=True, text=True
        ).stdout
        for arguments in (["1"], ["2"], ["3", "load"])
    ]
    assert [bool(text) for text in said] == [False, True, False]
    assert gockpt.steps("ckpts") == [1, 3]
    shown = subprocess.run(
        [sys.executable, "-m", "gockpt.cli", "show", "ckpts"], capture_output=True, check=True, text=True
    ).stdout
    (run,) = set(run_ids("ckpts"))
    assert f"run             {run}\n" in shown
    document = json.loads(
        subprocess.run(
            [sys.executable, "-m", "gockpt.cli", "show", "ckpts", "--json"],
            capture_output=True,
            check=True,
            text=True,
        ).stdout
    )
    assert (document["run"], document["ancestors"]) == (run, [])
