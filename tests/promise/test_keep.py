"""Retention in a run: the metric among the extras is known at the boundary, and after a restart."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

import gockpt


def build():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def run(model, opt, losses, keep, *, start=1, path="ckpts"):
    with gockpt.Checkpointer(model, opt, path, options=gockpt.Options(keep=keep, window=1)) as saver:
        for step, loss in enumerate(losses, start):
            opt.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
            opt.step()
            saver.after_step(step, {"val_loss": loss, "note": "x"}).result()


KEEP = gockpt.Keep(newest=2, every=4, best=1, metric="val_loss")


def test_milestones_and_the_best_stay_across_a_restart():
    model, opt = build()
    run(model, opt, [5.0, np.float32(1.5), 4.0, 6.0, 7.0], KEEP)
    assert gockpt.steps("ckpts") == [2, 4, 5]
    assert gockpt.open("ckpts", 2).metadata.attributes["gockpt"]["metrics"] == {"val_loss": 1.5}
    gockpt.load("ckpts", model, opt)
    run(model, opt, [8, 3.0], KEEP, start=6)
    assert gockpt.steps("ckpts") == [2, 4, 6, 7]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None, "0.1", True, torch.tensor(0.1)])
def test_what_is_no_number_is_told_once_and_never_the_best(loss, caplog):
    model, opt = build()
    with caplog.at_level(logging.WARNING, "gockpt"):
        run(model, opt, [2.0, loss, loss, 9.0, 9.5], gockpt.Keep(best=1, metric="val_loss"))
    assert gockpt.steps("ckpts") == [1, 4, 5]
    told = [record for record in caplog.records if "val_loss" in record.getMessage()]
    assert len(told) == 1
    assert "can't be among the best" in told[0].getMessage()


def test_a_resumed_run_replaces_the_branch_that_it_left():
    model, opt = build()
    run(model, opt, [1.0, 1.0, 1.0, 1.0], 4)
    model, opt = build()
    gockpt.load("ckpts", model, opt, step=2)
    run(model, opt, [1.0], 3, start=3)
    # Step 3 was published again; step 4 belongs to the branch that was left, and would be next to go.
    assert gockpt.steps("ckpts") == [1, 2, 3]
