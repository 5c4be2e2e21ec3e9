"""Wrappers with state of their own around an optimizer: it is saved, and the resumed run is the same."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict

import pytest
import torch
from torch import nn, optim

import gockpt
from gockpt import StateMismatch, UnsupportedState


class Warm:
    """Counts the steps of a warm-up, and saves the optimizer inside its own form."""

    def __init__(self, optimizer):
        self.optimizer, self.n = optimizer, 0

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def step(self):
        self.n += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2 * min(self.n**-0.5, self.n * 10**-1.5)
        self.optimizer.step()

    def state_dict(self):
        return {"n": self.n, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.n = state["n"]
        self.optimizer.load_state_dict(state["optimizer"])


class Forwarding(Warm):
    """Hands everything else on, and holds the optimizer under a name of its own."""

    def __init__(self, optimizer):
        self.chosen, self.n = optimizer, 0

    def __getattr__(self, name):
        return getattr(self.__dict__["chosen"], name)

    @property
    def optimizer(self):
        return self.chosen


class Merged(Warm):
    """Its form is the optimizer's with a key more."""

    def state_dict(self):
        return {**self.optimizer.state_dict(), "n": self.n}

    def load_state_dict(self, state):
        state = dict(state)
        self.n = state.pop("n")
        self.optimizer.load_state_dict(state)


class Apart(Warm):
    """Its form has nothing of the optimizer's."""

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]


class Average(Warm):
    """Keeps a moving average of the weights."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.ema = [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]

    def step(self):
        super().step()
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        for mean, param in zip(self.ema, params, strict=True):
            mean.lerp_(param.detach(), 0.1)

    def state_dict(self):
        return {**super().state_dict(), "ema": self.ema}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.ema = state["ema"]


class Scaled(Warm):
    """Master copies, and a loss scale that grows."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.scale = 2.0
        self.halves, self.masters = [], []
        for group in optimizer.param_groups:
            self.halves += group["params"]
            group["params"] = [param.detach().double().requires_grad_() for param in group["params"]]
            self.masters += group["params"]

    def step(self):
        for half, master in zip(self.halves, self.masters, strict=True):
            master.grad = half.grad.double() / self.scale
        super().step()
        self.scale *= 1.25
        with torch.no_grad():
            for half, master in zip(self.halves, self.masters, strict=True):
                half.copy_(master)

    def state_dict(self):
        return {**super().state_dict(), "scale": self.scale, "masters": self.masters}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.scale = state["scale"]
        for mine, saved in zip(self.masters, state["masters"], strict=True):
            mine.data.copy_(saved.data)


class Accelerated(optim.Optimizer):
    """An optimizer for isinstance, which hands on all that it is."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)

    def step(self):
        self.optimizer.step()

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)


class Lookahead(optim.Optimizer):
    """Slow weights beside the fast optimizer's state, which it shares."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.fast_state = optimizer.state
        self.state = defaultdict(dict)
        self.defaults = {}
        for group in self.param_groups:
            group.setdefault("counter", 0)

    def step(self):
        self.optimizer.step()
        for group in self.param_groups:
            group["counter"] += 1
            for param in group["params"]:
                slow = self.state[param].setdefault("slow", param.detach().clone())
                if group["counter"] % 2 == 0:
                    slow.lerp_(param.detach(), 0.5)
                    param.data.copy_(slow)

    def state_dict(self):
        fast = self.optimizer.state_dict()
        params = [param for group in self.param_groups for param in group["params"]]
        slow = {at: self.state[param] for at, param in enumerate(params) if param in self.state}
        return {"fast_state": fast["state"], "slow_state": slow, "param_groups": fast["param_groups"]}

    def load_state_dict(self, state):
        groups = state["param_groups"]
        self.optimizer.load_state_dict({"state": state["fast_state"], "param_groups": groups})
        self.param_groups = self.optimizer.param_groups
        self.fast_state = self.optimizer.state
        params = [param for group in self.param_groups for param in group["params"]]
        self.state = defaultdict(dict, {params[at]: slow for at, slow in state["slow_state"].items()})


class Sharp(optim.Optimizer):
    """SAM: a state of its own, the base's param groups, and torch's own ``state_dict``."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base_optimizer = base
        base.param_groups = self.param_groups

    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["old"] = param.detach().clone()
        self.base_optimizer.step()

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.base_optimizer.param_groups = self.param_groups


class Sharing(optim.Optimizer):
    """A subclass that shares all that torch saves with the optimizer in it, and has constants."""

    def __init__(self, base):
        self.base_optimizer = base
        self.defaults = {"rho": 0.05}
        self.eps = 1e-12
        self.param_groups = base.param_groups

    state = property(lambda self: self.base_optimizer.state)

    def step(self):
        self.base_optimizer.step()


class Registered(optim.Optimizer):
    """The same by attributes, with a hook of its own on loading."""

    def __init__(self, base):
        super().__init__([torch.zeros(1)], {})
        self.base_optimizer, self.n = base, 0
        self.param_groups, self.state = base.param_groups, base.state
        self.register_state_dict_post_hook(lambda opt, form: {**form, "n": opt.n})
        self.register_load_state_dict_pre_hook(lambda opt, form: setattr(opt, "n", form["n"]))

    def step(self):
        self.n += 1
        self.base_optimizer.step()


class Relinking(Sharing):
    """Overrides only the loading."""

    loads = 0

    def state_dict(self):
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state):
        self.loads += 1
        self.base_optimizer.load_state_dict(state)
        self.param_groups = self.base_optimizer.param_groups


KINDS = {
    "sharing": Sharing,
    "registered": Registered,
    "relinking": Relinking,
    "warm": Warm,
    "forwarding": Forwarding,
    "merged": Merged,
    "apart": Apart,
    "average": Average,
    "scaled": Scaled,
    "accelerated": Accelerated,
    "lookahead": Lookahead,
    "sharp": Sharp,
    "wrapper-in-wrapper": lambda optimizer: Warm(Accelerated(Average(optimizer))),
    "both-count": lambda optimizer: Warm(Apart(optimizer)),
    "around-lookahead": lambda optimizer: Warm(Lookahead(optimizer)),
    "four-deep": lambda optimizer: Warm(Apart(Average(Forwarding(optimizer)))),
    "around-sharp": lambda optimizer: Apart(Sharp(optimizer)),
}


def build(wrap, inner=optim.Adam):
    torch.manual_seed(0)
    model = nn.Linear(40, 30)
    return model, wrap(inner(model.parameters(), lr=0.01))


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def counts(optimizer):
    found = []
    while optimizer is not None:
        found.append((type(optimizer).__name__, vars(optimizer).get("n"), vars(optimizer).get("scale")))
        optimizer = next(
            (
                vars(optimizer)[name]
                for name in ("optimizer", "chosen", "base_optimizer")
                if name in vars(optimizer)
            ),
            None,
        )
    return found


def counted(params, lr):
    """Return an optimizer whose hooks must run once for each load."""
    optimizer = optim.Adam(params, lr=lr)
    optimizer.loads = 0
    optimizer.register_load_state_dict_post_hook(lambda opt: setattr(opt, "loads", opt.loads + 1))
    return optimizer


@pytest.mark.parametrize("wrap", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("inner", [optim.Adam, counted], ids=["adam", "hooked"])
def test_the_resumed_run_takes_the_same_steps(wrap, inner, same, tmp_path):
    model, optimizer = build(wrap, inner)
    options = gockpt.Options(window=3, when_busy="wait")
    for step in range(1, 4):
        train(model, optimizer, [step])
        gockpt.save_overlapped(model, optimizer, tmp_path / "c", step=step, every=3, options=options)
    gockpt.wait()
    kept = copy.deepcopy(dict(model.state_dict())), counts(optimizer)
    train(model, optimizer, range(4, 8))
    for used in (False, True):
        other, loaded = build(wrap, inner)
        if used:
            train(other, loaded, range(20, 23))
        restored = gockpt.load(tmp_path / "c", other, loaded)
        assert (restored.missing, restored.unexpected) == ((), ())
        same((dict(other.state_dict()), counts(loaded)), kept)
        innermost = loaded
        while not isinstance(innermost, optim.Adam):
            innermost = next(
                vars(innermost)[name]
                for name in ("optimizer", "chosen", "base_optimizer")
                if name in vars(innermost)
            )
        assert getattr(innermost, "loads", 1) == 1, "torch would have run its hooks once"
        assert vars(loaded).get("loads", 1) == 1
        if "param_groups" in vars(loaded):
            assert innermost.param_groups is loaded.param_groups
        if "state" in vars(loaded) and isinstance(loaded, Registered):
            assert innermost.state is loaded.state
        train(other, loaded, range(4, 8))
        same(dict(other.state_dict()), dict(model.state_dict()))
        same(counts(loaded), counts(optimizer))


def test_the_state_inside_is_not_stored_twice(tmp_path):
    model, optimizer = build(lambda inner: Warm(Lookahead(inner)))
    train(model, optimizer, range(2))
    gockpt.save_overlapped(model, optimizer, tmp_path / "c", step=1).result()
    with gockpt.open(tmp_path / "c") as checkpoint:
        stored = [name for name in checkpoint if checkpoint[name].shape == (30, 40)]
    assert sorted(stored) == [
        "model/weight",
        "optimizer/weight/exp_avg",
        "optimizer/weight/exp_avg_sq",
        "optimizer/weight~1/slow",
    ]


def test_the_wrapped_optimizer_is_replayed_as_ever(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(300, 300)
    optimizer = Warm(optim.Adam(model.parameters()))
    options = gockpt.Options(window=3, when_busy="wait")
    for step in range(1, 7):
        train(model, optimizer, [step])
        handle = gockpt.save_overlapped(model, optimizer, tmp_path / "c", step=step, every=6, options=options)
    assert "weight" not in handle.result().late_parts


def test_a_wrapper_that_adds_nothing_may_be_absent_on_either_side(save, same):
    model, wrapped = build(Accelerated)
    train(model, wrapped, range(2))
    save("ckpts", model, wrapped)
    other, bare = build(lambda inner: inner)
    gockpt.load("ckpts", other, bare)
    same(bare.state_dict(), wrapped.state_dict())
    save("ckpts", other, bare)
    third, again = build(Accelerated)
    gockpt.load("ckpts", third, again)
    same(again.state_dict(), bare.state_dict())


def test_one_that_adds_something_may_not(save, caplog):
    model, wrapped = build(Warm)
    train(model, wrapped, range(2))
    save("ckpts", model, wrapped)
    other, bare = build(lambda inner: inner)
    with pytest.raises(StateMismatch, match="only in the checkpoint: optimizer wrapper Warm"):
        gockpt.load("ckpts", other, bare)
    assert gockpt.load("ckpts", other, bare, strict=False).unexpected == ("optimizer wrapper Warm",)
    save("ckpts", other, bare)
    with pytest.raises(StateMismatch, match="missing in the checkpoint: optimizer wrapper Warm"):
        gockpt.load("ckpts", model, wrapped)
    save("ckpts", other, bare, change=lambda document: document.pop("wrappers"))
    with caplog.at_level(logging.WARNING, logger="gockpt"):
        gockpt.load("ckpts", model, wrapped)
    assert "test_wrapped_optimizers.Warm: the checkpoint is of a version that did not save it" in caplog.text


def test_a_wrapper_that_refuses_leaves_the_model_as_it_was(save, same):
    class Late(Warm):
        def load_state_dict(self, state):
            super().load_state_dict(state)
            msg = "too late"
            raise ValueError(msg)

    model, wrapped = build(Late)
    train(model, wrapped, range(2))
    save("ckpts", model, wrapped)
    other, loaded = build(Late)
    before = copy.deepcopy(dict(other.state_dict()))
    with pytest.raises(ValueError, match="too late") as caught:
        gockpt.load("ckpts", other, loaded)
    assert "Late.load_state_dict()" in caught.value.__notes__[0]
    same(dict(other.state_dict()), before)
    assert vars(loaded.optimizer).get("load_state_dict") is None


class Silent:
    """Counts and has no way to say so."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.count = 0

    def step(self):
        self.count += 1
        self.optimizer.step()


class OneWay(Silent):
    """Can be saved, and not be loaded."""

    def state_dict(self):
        return {"count": self.count}


class Named:
    """Has nothing that could be state."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.name, self.enabled, self.log = "clip", True, print

    def step(self):
        self.optimizer.step()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Silent, r"Silent wraps an optimizer and has attributes that may be state \(count\)"),
        (OneWay, r"OneWay has its own state_dict\(\), but no load_state_dict\(\)"),
        (lambda inner: Warm(Silent(inner)), "Silent wraps"),
    ],
)
def test_what_could_not_come_back_is_refused_at_the_first_save(kind, why, tmp_path):
    model, wrapped = build(kind)
    with pytest.raises(UnsupportedState, match=why):
        gockpt.save_overlapped(model, wrapped, tmp_path / "c", step=1)


class Showing(Named):
    """Its ``state_dict()`` is that of the optimizer inside."""

    def state_dict(self):
        return self.optimizer.state_dict()


@pytest.mark.parametrize("kind", [Named, Showing])
def test_a_wrapper_without_state_needs_no_methods(kind, save, same):
    model, wrapped = build(kind)
    train(model, wrapped, range(2))
    save("ckpts", model, wrapped)
    other, loaded = build(kind)
    gockpt.load("ckpts", other, loaded)
    same(loaded.optimizer.state_dict(), wrapped.optimizer.state_dict())
