"""What a rehearsal of pruning says is what pruning does; a metric that nobody has removes nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gockpt
from gockpt.cli.run import run
from gockpt.storage.format.checksum import crc32c

pytestmark = pytest.mark.usefixtures("directories")


def fill(path, steps, numbers=()):
    """Save some steps into a path; the first ones have these numbers as their loss."""
    losses = dict(enumerate(numbers))
    with gockpt.Checkpointer({"w": torch.ones(2)}, None, path) as saver:
        for count, step in enumerate(steps):
            extra = {"loss": losses[count]} if losses.get(count) is not None else {}
            saver.after_step(step, extra).result()


def rewrite(path, change):
    """Change the manifest of a checkpoint and give it the right checksum."""
    manifest = Path(path, "gockpt.json")
    document = json.loads(manifest.read_bytes().splitlines()[0])
    change(document)
    line = json.dumps(document).encode() + b"\n"
    manifest.write_bytes(line + b'{"crc32c": "%08x"}\n' % crc32c(line))


HARMS = {
    "cut off": lambda path: os.truncate(f"{path}/gockpt.json", 20),
    "gone": lambda path: os.unlink(f"{path}/gockpt.json"),
    "foreign": lambda path: rewrite(path, lambda document: document.update(arrays=7)),
    "later": lambda path: rewrite(path, lambda document: document.update(format=99)),
    "a number twice": lambda path: rewrite(path, lambda document: document.update(seq=1)),
    "a link": lambda path: (os.rename(path, f"{path}.aside"), os.symlink(f"{path}.aside", path)),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Six checkpoints, two of them of one step."""
    path = tmp_path_factory.mktemp("whole") / "ckpts"
    fill(path, (10, 20, 30, 20, 40, 50), (3.0, None, 1.0, 5.0, 4.0))
    return path


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.sampled_from([10, 20, 30, 40, 50]), st.sampled_from(sorted(HARMS)), max_size=3),
    st.integers(1, 4),
    st.none() | st.sampled_from([10, 20]),
    st.integers(0, 2),
)
def test_the_rehearsal_is_right(tmp_path_factory, whole, harms, newest, every, best):
    path = tmp_path_factory.mktemp("copy") / "ckpts"
    shutil.copytree(whole, path)
    for step, harm in harms.items():
        HARMS[harm](f"{path}/step-{step:010d}")
    keep = gockpt.Keep(newest=newest, every=every, best=best, metric="loss" if best else None)
    results = []
    for dry_run in (True, False):
        try:
            done = gockpt.prune(path, keep, dry_run=dry_run)
        except gockpt.GockptError as error:
            results.append((type(error), str(error)))
        else:
            results.append((done.removed, done.kept))
            there = [entry.path for entry in gockpt.checkpoints(path, superseded=True)]
            expected = [*done.removed, *done.kept] if dry_run else done.kept
            assert sorted(there) == sorted(entry.path for entry in expected)
    assert results[0] == results[1]


@pytest.mark.parametrize("rehearsed", [(), ("--dry-run",)])
def test_a_metric_that_no_checkpoint_has_is_refused(rehearsed, capsys):
    fill("ckpts", (1, 2, 3, 4), (0.4, 0.3))
    code = run(["prune", "ckpts", "--keep", "1", "--best", "1", "--metric", "lost", *rehearsed])
    err = capsys.readouterr().err
    assert (code, err.count("\n")) == (2, 1)
    assert "metric='lost'" in err
    assert "'loss'" in err
    assert gockpt.steps("ckpts") == [1, 2, 3, 4]


def test_where_there_are_no_numbers_the_refusal_says_so():
    fill("ckpts", (1, 2, 3))
    with pytest.raises(gockpt.UsageError, match="they have no numbers at all"):
        gockpt.prune("ckpts", gockpt.Keep(newest=1, best=1, metric="loss"))
    assert gockpt.steps("ckpts") == [1, 2, 3]


def test_only_the_newest_stays_only_if_it_is_whole_also_in_a_rehearsal():
    fill("ckpts", (1, 2))
    os.truncate("ckpts/step-0000000002/model/w/c.0", 1)
    with pytest.raises(gockpt.CheckpointCorrupt, match="Nothing was removed"):
        gockpt.prune("ckpts", 1, dry_run=True)
