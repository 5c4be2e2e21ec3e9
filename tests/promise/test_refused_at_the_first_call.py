"""What can't be saved is refused at the first call, with an error that ``except SaveError`` catches."""

from __future__ import annotations

import argparse
import threading

import pytest
import torch

import gockpt


class Stateful:
    """An object with ``state_dict()``."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state


def itself():
    found = []
    found.append(found)
    return found


EXTRAS = {
    "an object": {"odd": argparse.Namespace(lr=1)},
    "inside": {"odd": {"a": [1, (2, {"b": object()})]}},
    "of a state_dict": {"odd": Stateful({"lock": threading.Lock()})},
    "of a function": {"odd": object},
    "a function in a state_dict": {"odd": Stateful({"lr_lambda": lambda step: step})},
    "a sparse tensor": {"odd": torch.eye(3).to_sparse()},
    "a meta tensor": {"odd": torch.zeros(3, device="meta")},
    "itself": {"odd": itself()},
    "a name with a slash": {"odd/one": 1},
    "a name that is no text": {("odd",): 1},
}

MODELS = {
    "a sparse buffer": lambda model, _: model.register_buffer("odd", torch.eye(3).to_sparse()),
    "a meta parameter": lambda model, _: setattr(
        model, "odd", torch.nn.Parameter(torch.zeros(3, device="meta"))
    ),
    "an odd option": lambda _, optimizer: optimizer.param_groups[0].update(odd=object()),
    "odd state": lambda model, optimizer: optimizer.state[model.weight].update(odd=object()),
}


def build():
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    update(model, optimizer)
    return model, optimizer


def update(model, optimizer):
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()


def check(model, optimizer, extra, every, match="odd"):
    """The guard catches it at the first call; training and later saves go on."""
    with pytest.raises(gockpt.SaveError, match=match) as caught:
        gockpt.save_overlapped(model, optimizer, "ckpts", step=1, every=every, extra=extra)
    assert isinstance(caught.value, gockpt.UsageError)
    with pytest.raises(gockpt.SaveError):  # again, by each call, as long as it is so
        gockpt.save_overlapped(model, optimizer, "ckpts", step=2, every=every, extra=extra)


@pytest.mark.parametrize("every", [None, 1, 100, "auto"])
@pytest.mark.parametrize("extra", EXTRAS.values(), ids=EXTRAS)
def test_an_extra(extra, every):
    model, optimizer = build()
    check(model, optimizer, extra, every)
    gockpt.save_overlapped(model, optimizer, "ckpts", step=100, every=every, extra={})
    gockpt.wait()
    assert gockpt.steps("ckpts") == [100]


@pytest.mark.parametrize("every", [None, 1, 100, "auto"])
@pytest.mark.parametrize("spoil", MODELS.values(), ids=MODELS)
def test_model_and_optimizer(spoil, every):
    model, optimizer = build()
    spoil(model, optimizer)
    check(model, optimizer, {}, every)
    gockpt.wait()
    assert gockpt.steps("ckpts") == []


@pytest.mark.parametrize("every", [1, 100])
def test_what_does_not_fit_into_host_memory(every):
    model, optimizer = build()
    options = gockpt.Options(host_memory=1 << 20)
    with pytest.raises(gockpt.StateTooLarge, match="copies of extras") as caught:
        gockpt.save_overlapped(
            model, optimizer, "ckpts", step=1, every=every, options=options, extra={"t": torch.zeros(1 << 18)}
        )
    assert isinstance(caught.value, gockpt.SaveError)
    assert isinstance(caught.value, gockpt.OptionsError)


def test_the_extras_of_a_checkpointer():
    model, optimizer = build()
    with gockpt.Checkpointer(model, optimizer, "ckpts", every=100, extra={"odd": object()}) as saver:
        with pytest.raises(gockpt.SaveError, match="odd"):
            saver.after_step(1)
        saver.after_step(2, {"fine": 1})
        assert saver.after_step(100).result(30).step == 100


def test_an_extra_that_becomes_impossible_later():
    """The call that notices says so; the run and its saves go on."""
    model, optimizer = build()
    mine = {"value": 1}
    raised = []
    for step in range(1, 13):
        update(model, optimizer)
        mine["value"] = object() if step == 8 else step
        try:
            gockpt.save_overlapped(
                model, optimizer, "ckpts", step=step, every=4, extra={"mine": mine},
                options=gockpt.Options(when_busy="wait", window=1),
            )  # fmt: skip
        except gockpt.SaveError:
            raised.append(step)
    gockpt.wait()
    assert raised == [8]
    assert gockpt.steps("ckpts") == [4, 12]
    assert gockpt.open("ckpts").extra["mine"] == {"value": 12}


def test_trying_out_asks_once_and_keeps_nothing():
    model, optimizer = build()
    asked = []
    for step in range(1, 6):
        gockpt.save_overlapped(
            model, optimizer, "ckpts", step=step, every=100, extra={"n": lambda: asked.append(1)}
        )
    assert len(asked) == 1
    gockpt.wait()
    assert gockpt.steps("ckpts") == []
