"""Trying what the documentation says: tables of rows, and a training loop that knows what it should find."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gockpt
from gockpt import errors, opening, registry
from gockpt.storage.local.store import Store

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "guarantees.md"
WINDOW = gockpt.Options(window=4, when_busy="wait")
ONE = gockpt.Options(window=1, when_busy="wait")


class Run:
    """A training loop, with a synchronous copy of each tick to compare with."""

    def __init__(self, *, optimizer=True, width=24, kind=torch.optim.AdamW):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(24, width), torch.nn.Linear(width, 24))
        self.opt = kind(self.model.parameters(), lr=1e-3) if optimizer else None
        self.step = 0
        self.seen = {}
        self.save = None

    def train(self):
        self.model.zero_grad()
        self.model(torch.randn(4, 24)).square().mean().backward()
        if self.opt is not None:
            self.opt.step()
        self.step += 1

    def tick(self, every=1, options=None, extra=None):
        options = options or gockpt.Options(window=1, when_busy="wait")
        self.seen[self.step] = copy.deepcopy((self.model.state_dict(), self.opt and self.opt.state_dict()))
        self.save = gockpt.save_overlapped(
            self.model, self.opt, "ckpts", step=self.step, every=every, options=options, extra=extra
        )
        return self.save

    def window(self, upto=8, between=None, options=None):
        """Train and tick; windows of 4 end on the steps 4 and 8, ``between`` comes before tick 6."""
        options = options or gockpt.Options(window=4, when_busy="wait")
        while self.step < upto:
            self.train()
            if between is not None and self.step == 6:
                between()
            self.tick(every=4, options=options)
        return self

    def saved(self, **how):
        """Train one step and save it."""
        self.train()
        self.tick(**how).result()
        return self

    def check(self, step=None):
        """Fail unless the newest checkpoint is this step's, bit for bit."""
        gockpt.wait()
        step = self.step if step is None else step
        held = gockpt.open("ckpts")
        assert (held.metadata.step, held.metadata.exact) == (step, True)
        model, opt = self.seen[step]
        assert all(torch.equal(held[f"model/{name}"][...], value) for name, value in model.items())
        names = {id(param): name for name, param in self.model.named_parameters()}
        order = [names[id(p)] for group in self.opt.param_groups for p in group["params"]] if opt else []
        for index, state in (opt["state"] if opt else {}).items():
            for key, value in state.items():
                assert torch.equal(held[f"optimizer/{order[index]}/{key}"][...], value)
        return self.save.result()


def rows_below(heading):
    """Return the outcome by first cell, of every row of the table below a heading."""
    text = PAGE.read_text().partition(f"\n### {heading}\n")[2].partition("\n#")[0]
    cells = [line[2:].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {first: outcome for first, outcome, *_ in cells if first != "What happens"}


def judge(outcome, trial, lab):
    """Fail unless the outcome names the error that the trial raises, or none if it raises none."""
    named = set(re.findall(r"`(\w+)`", outcome)) & set(errors.__all__)
    raised = set()
    try:
        trial(lab)
    except gockpt.GockptError as error:
        raised = {type(error).__name__}
    assert named == raised, outcome


@pytest.fixture
def table():
    return SimpleNamespace(rows_below=rows_below, judge=judge)


@pytest.fixture
def lab(monkeypatch):
    """What trials use: training loops, and ``inject(fs)``, which puts a file system under later stores."""

    def inject(fs):
        monkeypatch.setattr(opening, "Store", functools.partial(Store, fs=fs))

    yield SimpleNamespace(Run=Run, inject=inject, WINDOW=WINDOW, ONE=ONE)
    for saver in list(registry.opened):
        saver.abort("the test is over")
        try:
            saver.close()
        except gockpt.SaveError:
            assert saver.closed
