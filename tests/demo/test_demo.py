"""The demo does what it says, and notices when anything is not as promised."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from signal import SIGKILL

import pytest
import torch
import zarr
from zarr.storage import ZipStore

import gockpt


def test_it_succeeds_and_every_claim_holds(tiny_demo):
    assert tiny_demo.status == 0, tiny_demo.printed
    claims = {claim["name"]: claim["holds"] for claim in tiny_demo.summary["claims"]}
    assert claims == dict.fromkeys(
        ["saves", "undisturbed", "killed", "resumed", "losses", "state", "verified", "slice"], True
    )
    assert tiny_demo.summary["ok"]


def test_the_losses_after_the_resume_are_those_of_the_uninterrupted_run(tiny_demo):
    runs = tiny_demo.summary["runs"]
    reference, killed, resumed = (runs[name]["losses"] for name in ("reference", "killed", "resumed"))
    assert list(reference) == [str(step) for step in range(1, 61)]
    assert killed == {str(step): reference[str(step)] for step in range(1, 39)}
    assert resumed == {str(step): reference[str(step)] for step in range(21, 61)}
    losses = [float.fromhex(loss) for loss in reference.values()]
    assert losses[-1] < losses[0]
    assert all(math.isfinite(loss) for loss in losses)
    assert len(set(losses)) == len(losses)


def test_it_was_killed_inside_a_window_and_lost_only_that_save(tiny_demo):
    killed = tiny_demo.summary["runs"]["killed"]
    held = killed["events"]["holding"]
    assert killed["status"] == -SIGKILL
    assert (held["step"], held["due"], held["phase"]) == (38, 40, "open")
    assert 0 < held["done"] < held["total"]
    assert "step-0000000020.zip" in tiny_demo.summary["left_behind"]
    assert "step-0000000040.zip" not in tiny_demo.summary["left_behind"]
    assert tiny_demo.summary["runs"]["resumed"]["events"]["resumed"] == {
        "event": "resumed",
        "step": 20,
        "missing": [],
        "unexpected": [],
    }


def test_every_save_has_its_line(tiny_demo):
    runs = tiny_demo.summary["runs"]
    saves = runs["killed"]["saves"] + runs["resumed"]["saves"]
    assert [save["step"] for save in saves] == [20, 40, 60]
    lines = [line for line in tiny_demo.printed.splitlines() if "saved step" in line]
    assert len(lines) == 3
    for save, line in zip(saves, lines, strict=True):
        assert save["exact"]
        assert (save["window"], save["attempts"]) == (4, 1)
        assert save["exposed_seconds"] > 0
        assert save["hidden_seconds"] > 0
        for words in (
            f"step  {save['step']}",
            f"{save['nbytes'] / 1e6:.1f} MB",
            "4 steps",
            "exact to the bit",
        ):
            assert words in line


def test_what_is_left_on_disk_can_be_read_in_both_ways(tiny_demo):
    path = tiny_demo.directory / "checkpoints"
    assert gockpt.steps(path) == [20, 40, 60]
    with gockpt.open(path) as checkpoint:
        ours = checkpoint["optimizer/blocks.0.down.weight/exp_avg"][3:5]
        assert torch.equal(checkpoint["model/head.weight"][...], checkpoint["model/token.weight"][...])
        group = zarr.open_group(ZipStore(checkpoint.metadata.path), mode="r")
    theirs = torch.from_numpy(group["optimizer/blocks.0.down.weight/exp_avg"][3:5])
    assert torch.equal(ours, theirs)
    assert ours.abs().sum() > 0


def _runs(tiny_demo, demo_modules):
    """Return the settings and the three runs as the demo itself held them."""
    stored = tiny_demo.summary["settings"]
    settings = demo_modules["runs"].Settings(
        **{**stored, "checkpoints": Path(stored["checkpoints"]), "rows": tuple(stored["rows"])}
    )
    runs = {}
    for name, run in copy.deepcopy(tiny_demo.summary["runs"]).items():
        losses = {int(step): loss for step, loss in run["losses"].items()}
        runs[name] = demo_modules["runs"].Run(**{**run, "losses": losses})
    return settings, runs


def _next_up(text: str) -> str:
    return math.nextafter(float.fromhex(text), math.inf).hex()


def _break_loss(runs):
    runs["resumed"].losses[60] = _next_up(runs["resumed"].losses[60])


def _break_undisturbed(runs):
    runs["killed"].losses[38] = _next_up(runs["killed"].losses[38])


def _drop_loss(runs):
    del runs["resumed"].losses[41]


def _not_exact(runs):
    runs["killed"].saves[0]["exact"] = False


def _shorter_window(runs):
    runs["resumed"].saves[1]["window"] = 3


def _survived(runs):
    runs["killed"].status = 0


def _older(runs):
    runs["resumed"].events["resumed"]["step"] = 0


def _other_end(runs):
    runs["resumed"].events["final"]["digest"] = "0" * 64


def _other_slice(runs):
    runs["reference"].events["final"]["part"] = "00"


@pytest.mark.parametrize(
    ("damage", "claim"),
    [
        (_break_loss, "losses"),
        (_drop_loss, "losses"),
        (_break_undisturbed, "undisturbed"),
        (_not_exact, "saves"),
        (_shorter_window, "saves"),
        (_survived, "killed"),
        (_older, "resumed"),
        (_other_end, "state"),
        (_other_slice, "slice"),
    ],
)
def test_one_thing_not_as_promised_breaks_that_claim_alone_and_the_exit_status(
    tiny_demo, demo_modules, monkeypatch, capsys, damage, claim
):
    settings, runs = _runs(tiny_demo, demo_modules)
    damage(runs)
    order = iter(runs[name] for name in ("reference", "killed", "resumed"))
    monkeypatch.setattr(demo_modules["demo"], "train", lambda *_, **__: next(order))
    monkeypatch.setattr(demo_modules["demo"], "prepared", lambda _: settings.checkpoints.parent)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--size", "tiny"])
    assert demo_modules["demo"].main() == 1
    assert "NOT SO" in capsys.readouterr().out
    claims = demo_modules["claims"].claims(settings, runs["reference"], runs["killed"], runs["resumed"])
    assert [c.name for c in claims if not c.holds] == [claim]


def test_a_process_that_fails_is_told_in_plain_words(demo_modules, monkeypatch, capsys):
    monkeypatch.setattr(demo_modules["demo"], "train", lambda *_, **__: demo_modules["runs"].Run(status=1))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--size", "tiny"])
    assert demo_modules["demo"].main() == 1
    printed = capsys.readouterr().out
    assert printed.count("NOT SO") == 8
    assert "ended with status 1" in printed
    assert "CheckpointNotFound" in printed


def test_it_empties_no_directory_but_its_own(bench):
    Path("precious").mkdir()
    Path("precious/file").write_text("kept")
    done = subprocess.run(
        [sys.executable, str(bench / "demo.py"), "--size", "tiny", "--dir", "precious"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "--dir" in done.stderr
    assert Path("precious/file").read_text() == "kept"


def test_the_loader_resumes_in_mid_epoch_and_refuses_another_text(monkeypatch, bench):
    monkeypatch.syspath_prepend(str(bench))
    from corpus import Loader, standard_library

    text = standard_library(400_000)
    loader = Loader(text, context=64, batch=8, seed=3)
    for _ in range(1000):
        loader.next()
    state = loader.state_dict()
    assert state["epoch"] > 0
    expected = [loader.next() for _ in range(200)]
    other = Loader(text, context=64, batch=8, seed=3)
    other.load_state_dict(state)
    for batch in expected:
        got = other.next()
        assert torch.equal(got.inputs, batch.inputs)
        assert torch.equal(got.targets[:, :-1], got.inputs[:, 1:])
    shorter = Loader(standard_library(300_000), context=64, batch=8, seed=3)
    with pytest.raises(ValueError, match="corpus"):
        shorter.load_state_dict(state)
