"""Schedulers, loaders, plain values and random numbers come back as of the boundary."""

from __future__ import annotations

import copy
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn, optim

import gockpt
from gockpt import StateMismatch, UnsupportedState, UsageError

SCHEDULERS = {
    "step": lambda o: optim.lr_scheduler.StepLR(o, 2),
    "multistep": lambda o: optim.lr_scheduler.MultiStepLR(o, [2, 5, 5]),
    "onecycle": lambda o: optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=30),
    "cyclic": lambda o: optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    "restarts": lambda o: optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "lambda": lambda o: optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "sequential": lambda o: optim.lr_scheduler.SequentialLR(
        o, [optim.lr_scheduler.LinearLR(o), optim.lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "chained": lambda o: optim.lr_scheduler.ChainedScheduler(
        [optim.lr_scheduler.ConstantLR(o), optim.lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "plateau": lambda o: optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_goes_on_from_where_it_was(make, save):
    def build():
        model = nn.Linear(3, 2)
        optimizer = optim.AdamW(model.parameters(), lr=0.05)
        return model, optimizer, make(optimizer)

    def train(model, optimizer, scheduler, steps):
        rates = []
        for step in range(steps):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
            plateau = isinstance(scheduler, optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([float(step)] if plateau else []))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    model, optimizer, scheduler = build()
    train(model, optimizer, scheduler, 4)
    save("ckpts", model, optimizer, extra={"sched": scheduler})
    rates = train(model, optimizer, scheduler, 4)
    other, loaded, restored = build()
    gockpt.load("ckpts", other, loaded, extra={"sched": restored})
    assert train(other, loaded, restored, 4) == rates
    assert torch.equal(other.weight, model.weight)


def test_plain_values_functions_and_objects(save):
    model = nn.Linear(2, 2)
    cursor = {"epoch": 3, "order": [3, 1, 2], "seen": Counter("aab")}
    average = nn.Linear(2, 2)
    generator = torch.Generator().manual_seed(5)
    save(
        "ckpts",
        model,
        extra={"best": 0.125, "cursor": lambda: cursor, "ema": average, "shuffle": generator.get_state},
    )
    wanted = torch.randperm(50, generator=generator)

    other, fresh, taken = nn.Linear(2, 2), torch.Generator(), []
    restored = gockpt.load(
        "ckpts", model, extra={"cursor": taken.append, "ema": other, "shuffle": fresh.set_state}
    )
    assert taken == [cursor]
    assert torch.equal(torch.randperm(50, generator=fresh), wanted)
    assert torch.equal(other.weight, average.weight)
    assert list(restored.extra) == ["best", "cursor", "ema", "shuffle"]
    assert restored.extra["best"] == 0.125
    assert restored.extra["cursor"] == cursor
    assert restored.extra["ema"]._metadata == average.state_dict()._metadata


def test_the_values_in_the_result_are_not_the_objects_own(save):
    class Keeper:
        def load_state_dict(self, state):
            state["list"].append(9)

    save("ckpts", nn.Linear(1, 1), extra={"keeper": {"list": [1]}})
    restored = gockpt.load("ckpts", nn.Linear(1, 1), extra={"keeper": Keeper()})
    assert restored.extra["keeper"] == {"list": [1]}


def test_an_extra_that_was_not_saved(save):
    model = nn.Linear(1, 1)
    save("ckpts", model, extra={"here": 1})
    with pytest.raises(StateMismatch) as caught:
        gockpt.load("ckpts", model, extra={"there": print})
    assert caught.value.missing == ("extra/there",)
    assert gockpt.load("ckpts", model, extra={"there": print}, strict=False).missing == ("extra/there",)


@pytest.mark.parametrize("extra", [{"x": 3}, [1]])
def test_what_can_not_be_restored_in_place_is_refused(extra, save):
    save("ckpts", nn.Linear(1, 1), extra={"x": 3})
    with pytest.raises(UsageError, match=r"\.extra\['x'\]|pass a mapping"):
        gockpt.load("ckpts", nn.Linear(1, 1), extra=extra)


def test_an_extra_without_exact_form_is_named(save):
    with pytest.raises(UnsupportedState, match=r"extra/loader\['fn'\] is a builtins.function"):
        save("ckpts", nn.Linear(1, 1), extra={"loader": {"fn": lambda: 0}})


def test_an_extra_that_refuses_leaves_model_and_optimizer_as_they_were(save, same):
    class Refusing:
        def load_state_dict(self, state):
            raise RuntimeError("not today")

    def build(seed):
        torch.manual_seed(seed)
        model = nn.Linear(2, 2)
        optimizer = optim.AdamW(model.parameters(), lr=0.1 * seed)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return model, optimizer

    save("ckpts", *build(1), extra={"x": {}, "y": 1})
    model, optimizer = build(2)
    before = copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()))
    numbers = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="not today") as caught:
        gockpt.load("ckpts", model, optimizer, extra={"y": [].append, "x": Refusing()})
    same((dict(model.state_dict()), optimizer.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), numbers)
    (note,) = caught.value.__notes__
    assert "the model and the optimizers are as they were" in note
    assert "y, x" in note


def test_what_was_not_asked_for_is_told_once_and_by_name(save, caplog):
    model = nn.Linear(2, 2)
    save("ckpts", model, optim.SGD(model.parameters(), lr=0.1), extra={"sched": {"a": 1}, "loader": 2})
    with caplog.at_level("WARNING", "gockpt"):
        gockpt.load("ckpts", model, extra={"loader": print})
    (told,) = caplog.messages
    assert "not restored" in told
    assert "extra 'sched'" in told
    assert "optimizer 0 (SGD)" in told
    assert "loader" not in told
    caplog.clear()
    with caplog.at_level("WARNING", "gockpt"):
        gockpt.load(
            "ckpts",
            model,
            optim.SGD(model.parameters(), lr=0.1),
            extra={"loader": print, "sched": print},
        )
    assert not caplog.messages


def draws():
    return (
        random.random(),
        np.random.rand(3).tolist(),
        torch.rand(3).tolist(),
        random.gauss(0, 1),
        np.random.randn(),
    )


@pytest.mark.parametrize("with_optimizer", [True, False])
def test_by_default_random_numbers_go_on_with_an_optimizer(with_optimizer, save):
    """A model alone is loaded to be looked at, or into a run of its own."""

    def build():
        model = nn.Linear(1, 1)
        return model, optim.SGD(model.parameters(), lr=0.1)

    model, optimizer = build()
    save("ckpts", model, optimizer)
    wanted = draws()
    here = torch.get_rng_state()
    gockpt.load("ckpts", model, optimizer if with_optimizer else None)
    assert torch.equal(here, torch.get_rng_state()) is not with_optimizer
    assert (draws() == wanted) is with_optimizer


@pytest.mark.parametrize("rng", [True, False])
def test_random_numbers_go_on_from_the_boundary(rng, save):
    draws()
    model = nn.Linear(1, 1)
    save("ckpts", model)
    wanted = draws()
    nn.Linear(5, 5)
    before = torch.get_rng_state()
    restored = gockpt.load("ckpts", model, rng=rng)
    assert restored.rng_absent == ()
    assert (draws() == wanted) is rng
    assert rng or not torch.equal(before, torch.get_rng_state())


def test_random_numbers_drawn_by_an_extra_while_loading_do_not_count(save):
    save("ckpts", nn.Linear(1, 1), extra={"x": 1})
    wanted = draws()
    gockpt.load("ckpts", nn.Linear(1, 1), extra={"x": lambda _: draws()}, rng=True)
    assert draws() == wanted


def test_random_states_of_devices_that_are_not_here_are_reported(save):
    def more_devices(document):
        document["rng"]["cuda"] = [{"$bytes": "AAAA"}] * (torch.cuda.device_count() + 2)

    save("ckpts", nn.Linear(1, 1), change=more_devices)
    restored = gockpt.load("ckpts", nn.Linear(1, 1), rng=torch.cuda.device_count() == 0)
    assert restored.rng_absent == (("cuda:0", "cuda:1") if torch.cuda.device_count() == 0 else ())


def test_another_kind_of_numpy_generator_is_found_out_first(save):
    save("ckpts", {"w": torch.ones(1)})
    before = np.random.get_bit_generator()
    live = {"w": torch.zeros(1)}
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        with pytest.raises(StateMismatch, match="set_bit_generator"):
            gockpt.load("ckpts", live, rng=True)
        assert not live["w"].any()
    finally:
        np.random.set_bit_generator(before)
