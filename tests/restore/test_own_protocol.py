"""Optimizers with saving or loading code of their own: a load does what their ``load_state_dict`` does."""

from __future__ import annotations

import copy
import dataclasses
import enum
import logging

import pytest
import torch
from torch import nn, optim

import gockpt
from gockpt import StateMismatch, UnsupportedState
from gockpt.state.optimizers import has_own_protocol


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


class Phase(enum.Enum):
    WARM = 1
    HOT = 2


@dataclasses.dataclass
class Window:
    """A helper object that an optimizer keeps per parameter."""

    seen: int
    last: torch.Tensor


class Objects(optim.SGD):
    """State is helper objects and enums; ``state_dict()`` gives them a plain form."""

    def step(self, closure=None):
        super().step(closure)
        for param in self.param_groups[0]["params"]:
            window = self.state[param].setdefault("window", Window(0, torch.zeros_like(param)))
            window.seen += 1
            window.last.lerp_(param.detach(), 0.5)
            self.state[param]["phase"] = Phase.HOT if window.seen > 1 else Phase.WARM

    def state_dict(self):
        form = super().state_dict()
        form["state"] = {
            key: {**state, "window": vars(state["window"]), "phase": state["phase"].value}
            for key, state in form["state"].items()
        }
        return form

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["window"] = Window(**state["window"])
            state["phase"] = Phase(state["phase"])


class Phases(optim.SGD):
    """Enums among states and options, and no ``state_dict()`` of its own."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.param_groups[0]["kinds"] = {Phase.WARM: (Phase.HOT, 1)}

    def step(self, closure=None):
        super().step(closure)
        for param in self.param_groups[0]["params"]:
            self.state[param]["phase"] = Phase.HOT if "phase" in self.state[param] else Phase.WARM


class TensorsAsKeys(optim.SGD):
    """A graph between parameters, keyed by them."""

    def step(self, closure=None):
        super().step(closure)
        params = self.param_groups[0]["params"]
        self.graph = {param: [other for other in params if other is not param] for param in params}

    def state_dict(self):
        params = {id(param): index for index, param in enumerate(self.param_groups[0]["params"])}
        graph = {
            params[id(param)]: [params[id(other)] for other in others] for param, others in self.graph.items()
        }
        return {**super().state_dict(), "graph": graph}

    def load_state_dict(self, state_dict):
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "graph"})
        params = self.param_groups[0]["params"]
        self.graph = {
            params[key]: [params[other] for other in others] for key, others in state_dict["graph"].items()
        }


class Setting(optim.Adam):
    """Builds what is not saved when torch hands over the state."""

    def __setstate__(self, state):
        super().__setstate__(state)
        self.rebuilt = sum(float(each["step"]) for each in self.state.values())


class Compressed(optim.Adam):
    """What is saved is not what is held: the form has state in another dtype and layout."""

    def state_dict(self):
        form = super().state_dict()
        form["state"] = {
            key: {name: value.double() * 2 if name == "exp_avg" else value for name, value in state.items()}
            for key, state in form["state"].items()
        }
        return form

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["exp_avg"] = state["exp_avg"] / 2


class Flat(optim.Optimizer):
    """A form that is laid out in no way of torch's."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.momentum = [torch.zeros_like(param) for param in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self):
        for param, momentum in zip(self.param_groups[0]["params"], self.momentum, strict=True):
            momentum.mul_(0.9).add_(param.grad)
            param.sub_(momentum, alpha=self.param_groups[0]["lr"])

    def state_dict(self):
        return {"momentum": self.momentum, "lr": self.param_groups[0]["lr"]}

    def load_state_dict(self, state_dict):
        for mine, saved in zip(self.momentum, state_dict["momentum"], strict=True):
            mine.copy_(saved)
        self.param_groups[0]["lr"] = state_dict["lr"]


class Drops(optim.Adam):
    """Leaves a buffer out of what is saved, and makes it anew."""

    def step(self, closure=None):
        super().step(closure)
        for state in self.state.values():
            state["scratch"] = torch.full((3,), 7.0)

    def state_dict(self):
        form = super().state_dict()
        form["state"] = {
            key: {name: value for name, value in state.items() if name != "scratch"}
            for key, state in form["state"].items()
        }
        return form


def hooked(params):
    optimizer = optim.AdamW(params, lr=0.01)
    optimizer.seen, optimizer.told = 0, []
    optimizer.register_state_dict_pre_hook(lambda opt: setattr(opt, "asked", True))
    optimizer.register_state_dict_post_hook(lambda opt, form: {**form, "seen": opt.seen})
    optimizer.register_state_dict_post_hook(lambda _, form: form.update(twice=form["seen"] * 2))
    optimizer.register_load_state_dict_pre_hook(lambda opt, form: setattr(opt, "seen", form["seen"]))
    optimizer.register_load_state_dict_pre_hook(lambda opt, form: opt.told.append(("before", form["twice"])))
    optimizer.register_load_state_dict_post_hook(lambda opt: opt.told.append(("after", len(opt.state))))
    real = optimizer.step

    def step(closure=None):
        optimizer.seen += 1
        return real(closure)

    optimizer.step = step
    return optimizer


def zeroing(params):
    """A hook that changes what is loaded: its result counts, not what was saved."""
    optimizer = optim.AdamW(params, lr=0.01)

    def forget(opt):
        for state in opt.state.values():
            state["exp_avg"].zero_()

    optimizer.register_load_state_dict_post_hook(forget)
    return optimizer


def renaming(params):
    """A hook that maps an old layout of the state to a new one."""
    optimizer = optim.SGD(params, lr=0.1, momentum=0.9)

    def rename(_, form):
        state = {key: {"momentum_buffer": each["momentum_buffer"] * 2} for key, each in form["state"].items()}
        return {**form, "state": state}

    optimizer.register_load_state_dict_pre_hook(rename)
    return optimizer


def packing(params):
    """Hooks that save the momentum in another form, of an optimizer that could be replayed."""
    optimizer = optim.Adam(params, lr=0.01)

    def changed(form, change):
        state = {key: {**each, "exp_avg": change(each["exp_avg"])} for key, each in form["state"].items()}
        return {**form, "state": state}

    optimizer.register_state_dict_post_hook(lambda _, form: changed(form, lambda value: value.double() * 2))
    optimizer.register_load_state_dict_pre_hook(lambda _, form: changed(form, lambda value: value / 2))
    return optimizer


KINDS = {
    "hooks": hooked,
    "save-hook-changes": packing,
    "post-hook-changes": zeroing,
    "pre-hook-maps": renaming,
    "objects": lambda params: Objects(params, lr=0.1, momentum=0.9),
    "tensors-as-keys": lambda params: TensorsAsKeys(params, lr=0.1, momentum=0.9),
    "setstate": Setting,
    "compressed": Compressed,
    "flat": lambda params: Flat(list(params)),
    "drops": Drops,
}


def attributes(model, optimizer):
    """Return all that an optimizer holds, by the names of its parameters and not by the objects."""
    names = {id(param): name for name, param in model.named_parameters()}

    def plain(value):
        if isinstance(value, nn.Parameter):
            return names[id(value)]
        if isinstance(value, dict):
            return {plain(key): plain(item) for key, item in value.items()}
        if dataclasses.is_dataclass(value):
            return plain(vars(value))
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    kept = {name: value for name, value in vars(optimizer).items() if "_hooks" not in name and name != "step"}
    return {name: value for name, value in plain(kept).items() if not callable(value) and name != "asked"}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("window", [1, 3])
def test_a_load_is_what_load_state_dict_is(make, window, same, tmp_path):
    def build():
        torch.manual_seed(0)
        model = nn.Linear(40, 30)
        return model, make(model.parameters())

    model, optimizer = build()
    for step in range(1, 4):
        train(model, optimizer, [step])
        options = gockpt.Options(window=window, when_busy="wait")
        gockpt.save_overlapped(model, optimizer, tmp_path / "c", step=step, every=3, options=options)
    gockpt.wait()
    assert has_own_protocol(optimizer)

    reference, expected = build()
    reference.load_state_dict(model.state_dict())
    expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for used in (False, True):
        other, loaded = build()
        if used:
            train(other, loaded, range(20, 22))
            if hasattr(loaded, "told"):
                loaded.told.clear()
        gockpt.load(tmp_path / "c", other, loaded)
        same(dict(other.state_dict()), dict(model.state_dict()))
        same(attributes(other, loaded), attributes(reference, expected))
    train(reference, expected, range(4, 8))
    train(other, loaded, range(4, 8))
    same(dict(other.state_dict()), dict(reference.state_dict()))


def test_all_of_torch_is_default():
    param = nn.Parameter(torch.zeros(2, 2))
    for name in optim.__all__:
        kind = getattr(optim, name)
        if isinstance(kind, type) and kind is not optim.Optimizer:
            extra = {"lr": 0.1} if name == "SGD" else {}
            optimizer = kind([param], **extra)
            assert not has_own_protocol(optimizer), name
            optim.lr_scheduler.StepLR(optimizer, 1)
            assert not has_own_protocol(optimizer), name


def test_hooks_that_came_after_the_save_find_what_torch_would_have_saved(save, same):
    model = nn.Linear(4, 3)
    plain = optim.Adam(model.parameters())
    train(model, plain, range(2))
    save("ckpts", model, plain)
    other = nn.Linear(4, 3)
    loaded = optim.Adam(other.parameters())
    found = []
    loaded.register_load_state_dict_pre_hook(lambda _, form: found.append(form))
    gockpt.load("ckpts", other, loaded)
    same(found[0], plain.state_dict())
    same(loaded.state_dict(), plain.state_dict())


def test_without_its_hooks_what_they_added_is_left_out_and_said(save, same, caplog):
    model = nn.Linear(4, 3)
    optimizer = hooked(model.parameters())
    train(model, optimizer, range(2))
    save("ckpts", model, optimizer)
    plain = optim.AdamW(model.parameters())
    train(model, plain, range(1))
    held = plain.state[model.weight]["exp_avg"]
    with caplog.at_level(logging.WARNING, logger="gockpt"):
        gockpt.load("ckpts", model, plain)
    same(plain.state_dict()["state"], optimizer.state_dict()["state"])
    assert plain.state[model.weight]["exp_avg"] is held, "in place"
    assert "not restored: seen, twice in the state_dict() of torch.optim.adamw.AdamW" in caplog.text


def test_param_groups_in_another_order_are_matched_by_name(save, same):
    def build(*names):
        model = nn.Linear(3, 3)
        groups = [{"params": [getattr(model, name)], "lr": 0.1 * len(name)} for name in names]
        return model, hooked(groups)

    model, optimizer = build("weight", "bias")
    train(model, optimizer, range(2))
    save("ckpts", model, optimizer)
    other, loaded = build("bias", "weight")
    gockpt.load("ckpts", other, loaded)
    assert [group["lr"] for group in loaded.param_groups] == [0.4, 0.6000000000000001]
    same(loaded.state[other.bias], optimizer.state[model.bias])
    same(loaded.state[other.weight], optimizer.state[model.weight])


def test_state_in_float32_stays_so_where_torch_would_only_cast_it(save, same):
    class Precise(optim.SGD):
        def state_dict(self):
            return {**super().state_dict(), "note": 1}

        def step(self, closure=None):
            for param in self.param_groups[0]["params"]:
                state = self.state[param]
                state["sum"] = state.get("sum", torch.zeros(param.shape)) + param.grad.float() / 3

    def build():
        model = nn.Linear(3, 3).bfloat16()
        return model, Precise(model.parameters(), lr=0.1)

    model, optimizer = build()
    train(model, optimizer, range(3))
    save("ckpts", model, optimizer)
    other, loaded = build()
    gockpt.load("ckpts", other, loaded)
    assert loaded.state[other.weight]["sum"].dtype == torch.float32
    same(loaded.state_dict(), optimizer.state_dict())


def test_one_tensor_in_two_places_is_one_tensor_again(save):
    model = nn.Linear(2, 2)
    optimizer = Drops(model.parameters())
    train(model, optimizer, range(1))
    shared = torch.ones(3)
    optimizer.param_groups[0]["pair"] = [shared, {"again": shared}]
    save("ckpts", model, optimizer)
    other = nn.Linear(2, 2)
    loaded = Drops(other.parameters())
    gockpt.load("ckpts", other, loaded)
    first, second = loaded.param_groups[0]["pair"]
    assert first is second["again"]


class Refusing(optim.SGD):
    """Changes its groups, then refuses."""

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        msg = "not with me"
        raise RuntimeError(msg)


def test_what_refuses_leaves_the_model_as_it_was_and_a_note_says_what_ran(save, same):
    model = nn.Linear(2, 2)
    optimizer = Refusing(model.parameters(), lr=0.1)
    save("ckpts", model, optimizer)
    other = nn.Linear(2, 2)
    before = copy.deepcopy(dict(other.state_dict()))
    with pytest.raises(RuntimeError, match="not with me") as caught:
        gockpt.load("ckpts", other, Refusing(other.parameters(), lr=0.5))
    (note,) = caught.value.__notes__
    assert "Refusing.load_state_dict()" in note
    same(dict(other.state_dict()), before)


def test_loading_code_finds_the_model_loaded(save):
    """As with torch, where ``model.load_state_dict`` comes first: masters may be made of its weights."""

    class Refreshing(optim.SGD):
        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            self.masters = [param.detach().double() for param in self.param_groups[0]["params"]]

    model = nn.Linear(2, 2)
    save("ckpts", model, Refreshing(model.parameters(), lr=0.1))
    other = nn.Linear(2, 2)
    loaded = Refreshing(other.parameters(), lr=0.1)
    gockpt.load("ckpts", other, loaded)
    assert torch.equal(loaded.masters[0], model.weight.detach().double())


def test_what_does_not_fit_is_refused_before_its_code_runs(save):
    model = nn.Linear(2, 2)
    save("ckpts", model, hooked([model.weight]))
    loaded = hooked(model.parameters())
    with pytest.raises(StateMismatch, match="param groups of optimizer 0"):
        gockpt.load("ckpts", model, loaded)
    gockpt.load("ckpts", model, loaded, strict=False)
    assert loaded.told == []


@pytest.mark.parametrize("value", [Window(1, torch.ones(1)), object(), {torch.ones(1): 2}])
def test_what_has_no_plain_form_is_refused_by_name(value, tmp_path):
    model = nn.Linear(2, 2)
    default = optim.SGD(model.parameters(), lr=0.1)
    default.state[model.weight]["odd"] = value
    with pytest.raises(UnsupportedState, match="optimizer/weight/odd"):
        gockpt.save_overlapped(model, default, tmp_path / "a", step=1)
    own = hooked(model.parameters())
    own.state[model.weight]["odd"] = value
    with pytest.raises(UnsupportedState, match=r"the result of torch.optim.adamw.AdamW.state_dict\(\).*odd"):
        gockpt.save_overlapped(model, own, tmp_path / "b", step=1)


def test_state_in_a_tensor_subclass_is_fed_as_what_it_was(save):
    from torch.testing._internal.two_tensor import TwoTensor

    def build():
        model = nn.Linear(2, 2)
        optimizer = hooked(model.parameters())
        train(model, optimizer, range(1))
        optimizer.state[model.weight]["pair"] = TwoTensor(torch.rand(3), torch.rand(3))
        return model, optimizer

    model, optimizer = build()
    wanted = optimizer.state[model.weight]["pair"]
    save("ckpts", model, optimizer)
    for other, loaded in (build(), (model, optimizer)):
        gockpt.load("ckpts", other, loaded)
        pair = loaded.state[other.weight]["pair"]
        assert isinstance(pair, TwoTensor)
        assert torch.equal(pair.a, wanted.a)
        assert torch.equal(pair.b, wanted.b)


def test_members_of_enums_among_states_and_options_are_kept(tmp_path):
    model = nn.Linear(3, 2)
    opt = Phases(model.parameters(), lr=0.1)
    train(model, opt, [1])
    opt.state[model.weight]["phase"] = Phase.HOT
    gockpt.save_overlapped(model, opt, tmp_path, step=1).result()
    fresh = nn.Linear(3, 2)
    other = Phases(fresh.parameters(), lr=0.1)
    del other.param_groups[0]["kinds"]
    gockpt.load(tmp_path, fresh, other)
    assert other.state[fresh.weight]["phase"] is Phase.HOT
    assert other.state[fresh.bias]["phase"] is Phase.WARM
    assert other.param_groups[0]["kinds"] == {Phase.WARM: (Phase.HOT, 1)}


def test_an_enum_that_is_not_there_is_named_and_nothing_changes(tmp_path):
    model = nn.Linear(3, 2)
    opt = Phases(model.parameters(), lr=0.1)
    train(model, opt, [1])
    gockpt.save_overlapped(model, opt, tmp_path, step=1).result()
    fresh = nn.Linear(3, 2)
    before = copy.deepcopy(fresh.state_dict())
    Phase.__qualname__ = "Renamed"
    try:
        with pytest.raises(StateMismatch, match=r"Phase\.(WARM|HOT), .* import its module"):
            gockpt.load(tmp_path, fresh, Phases(fresh.parameters(), lr=0.1))
    finally:
        Phase.__qualname__ = "Phase"
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())
    assert gockpt.verify(tmp_path).ok


def test_a_combination_of_flags_is_refused_by_name(tmp_path):
    class Bits(enum.Flag):
        A = 1
        B = 2

    model = nn.Linear(3, 2)
    opt = optim.SGD(model.parameters(), lr=0.1)
    opt.param_groups[0]["bits"] = Bits.A | Bits.B
    with pytest.raises(UnsupportedState, match=r"bits.*Bits"):
        gockpt.save_overlapped(model, opt, tmp_path, step=1)
