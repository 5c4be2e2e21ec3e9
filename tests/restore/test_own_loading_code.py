"""Loading code of modules: when it runs, what it finds, and what is said when it refuses."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

import gockpt
from gockpt import ChunkCorrupt, StateMismatch, UnsupportedState


class Own(nn.Linear):
    """Has loading code of its own, and keeps the version it was told."""

    _version = 3

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.told = []
        self.before = lambda: None

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        self.told.append(metadata.get("version"))
        self.before()
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_the_order_is_extras_then_code_of_modules_then_memory_then_hooks_after(save, same):
    saved = nn.Sequential(nn.Linear(2, 2), Own(2, 2))
    optimizer = torch.optim.SGD(saved.parameters(), lr=0.5)
    save("ckpts", saved, optimizer, extra={"x": 1})
    live = nn.Sequential(nn.Linear(2, 2), Own(2, 2))
    other = torch.optim.SGD(live.parameters(), lr=0.1)
    events = []

    def note(what):
        loaded = torch.equal(live[0].weight, saved[0].weight)
        events.append((what, loaded, other.param_groups[0]["lr"]))

    live[1].before = lambda: note("code")
    live.register_load_state_dict_pre_hook(lambda *_: note("hook before"))
    live[1].register_load_state_dict_post_hook(lambda *_: note("hook after"))
    gockpt.load("ckpts", live, other, extra={"x": lambda _: note("extra")})
    assert events == [
        ("extra", False, 0.1),
        ("hook before", False, 0.1),
        ("code", False, 0.1),
        ("hook after", True, 0.1),
    ]
    same(dict(live.state_dict()), dict(saved.state_dict()))


def test_code_that_raises_leaves_other_modules_and_the_optimizer_as_they_were(save, same):
    def build():
        model = nn.Sequential(nn.Linear(2, 2), Own(2, 2), nn.Linear(2, 2))
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    save("ckpts", *build())
    model, optimizer = build()
    before = copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()))

    def refuse():
        raise ValueError("not today")

    model[1].before = refuse
    with pytest.raises(ValueError, match="not today") as caught:
        gockpt.load("ckpts", model, optimizer)
    same((dict(model.state_dict()), optimizer.state_dict()), before)
    (note,) = caught.value.__notes__
    assert f"loading code of modules had run, or begun to: 1 ({__name__}.Own)" in note
    assert "overwritten" not in note


def test_what_can_be_compared_is_compared_before_any_code_runs(save):
    save("ckpts", nn.Sequential(nn.Linear(2, 2), Own(2, 2)), extra={"x": 1})
    live = nn.Sequential(nn.Linear(3, 2), Own(2, 2))
    taken = []
    with pytest.raises(StateMismatch, match=r"nothing was changed.*0.weight"):
        gockpt.load("ckpts", live, extra={"x": taken.append})
    assert taken == live[1].told == []


def test_an_extra_that_was_not_saved_is_told_first_whatever_hooks_there_are(save):
    save("ckpts", nn.Linear(1, 1), extra={"x": 1})
    live = nn.Linear(1, 1)
    calls = []
    live.register_load_state_dict_post_hook(lambda *_: calls.append(1))
    with pytest.raises(StateMismatch, match="nothing was changed") as caught:
        gockpt.load("ckpts", live, extra={"x": calls.append, "y": calls.append})
    assert caught.value.missing == ("extra/y",)
    assert calls == []


@pytest.mark.parametrize("strict", [True, False])
def test_what_code_refuses_in_its_own_words_is_refused(strict, save):
    class Picky(nn.Linear):
        def _load_from_state_dict(self, *arguments):
            super()._load_from_state_dict(*arguments)
            arguments[-1].append("this weight is from another planet")

    save("ckpts", nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)))
    live = nn.Sequential(nn.Linear(1, 1), Picky(1, 1))
    before = live[0].weight.detach().clone()
    with pytest.raises(StateMismatch, match="from another planet") as caught:
        gockpt.load("ckpts", live, strict=strict)
    assert "nothing was changed" not in str(caught.value)
    assert "Picky" in caught.value.__notes__[0]
    assert torch.equal(live[0].weight, before)


def test_hooks_that_leave_names_missing_are_told_with_what_was_changed(save):
    save("ckpts", nn.ModuleDict({"a": nn.Linear(1, 1)}))
    live = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    live.register_load_state_dict_post_hook(lambda *_: None)
    with pytest.raises(StateMismatch) as caught:
        gockpt.load("ckpts", live)
    assert caught.value.missing == ("model/b.weight", "model/b.bias")
    assert "2 tensors had been overwritten (model/a.weight, model/a.bias)" in caught.value.__notes__[0]


def test_damage_found_by_code_of_a_module_is_told(save):
    save("ckpts", nn.Sequential(Own(2, 2), nn.Linear(2, 2)))
    chunk = Path("ckpts/step-0000000001/model/0.weight/c.0.0")
    chunk.write_bytes(bytes(len(chunk.read_bytes())))
    live = nn.Sequential(Own(2, 2), nn.Linear(2, 2))
    before = copy.deepcopy(live.state_dict())
    with pytest.raises(ChunkCorrupt) as caught:
        gockpt.load("ckpts", live)
    assert "Own" in caught.value.__notes__[0]
    assert str(before) == str(live.state_dict())


@pytest.mark.parametrize("wrap", [DataParallel, lambda m: torch.compile(m, backend="eager"), lambda m: m])
def test_versions_are_saved_under_natural_names(wrap, save):
    save("ckpts", nn.ModuleDict({"net": wrap(Own(1, 1))}))
    live = nn.ModuleDict({"net": Own(1, 1)})
    Own._version, version = 4, Own._version
    try:
        gockpt.load("ckpts", live)
    finally:
        Own._version = version
    assert live["net"].told == [3]


def test_a_checkpoint_of_before_there_was_metadata_counts_as_of_the_versions_that_are_here(save):
    """It was written by classes as they are, for all that is known, and loaded so before."""

    def drop(document):
        del document["metadata"]
        document["version"] = 1

    saved = nn.Sequential(Own(1, 1), nn.BatchNorm1d(1), nn.utils.spectral_norm(nn.Linear(2, 2)))
    save("ckpts", saved, change=drop)
    live = nn.Sequential(Own(1, 1), nn.BatchNorm1d(1), nn.utils.spectral_norm(nn.Linear(2, 2)))
    gockpt.load("ckpts", live)
    assert live[0].told == [3]
    assert torch.equal(live[2].weight_v, saved[2].weight_v)


def test_an_optimizer_over_lazy_parameters_takes_its_state(save, same):
    def build():
        model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = build()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    save("ckpts", model, optimizer)
    other, loaded = build()
    gockpt.load("ckpts", other, loaded)
    same(dict(other.state_dict()), dict(model.state_dict()))
    same(loaded.state_dict(), optimizer.state_dict())


def test_another_default_device_changes_nothing(save, same):
    saved = nn.Sequential(nn.Linear(2, 2), Own(2, 2))
    save("ckpts", saved, extra={"x": torch.ones(2)})
    live = nn.Sequential(nn.Linear(2, 2), Own(2, 2))
    with torch.device("meta"):
        restored = gockpt.load("ckpts", live)
        with gockpt.open("ckpts") as checkpoint:
            same(checkpoint["model/0.bias"][...], saved[0].bias.detach())
    same(dict(live.state_dict()), dict(saved.state_dict()))
    same(restored.extra["x"], torch.ones(2))


# -- what is refused when it is saved


class Demanding(nn.Module):
    def state_dict(self, format):  # noqa: A002 - as users name it
        return {}


class Listing(nn.Module):
    def state_dict(self):
        return [1]


class Numbered(nn.Module):
    def state_dict(self):
        return {3: torch.ones(1)}


class Bare(nn.Linear):
    """Works alone, but not inside another module; there, torch fails as well."""

    def state_dict(self):
        return dict(super().state_dict())


class TwoArguments(nn.Linear):
    def load_state_dict(self, state, kind):
        """Need more than anybody passes."""


class NoPrefix(nn.Linear):
    def _load_from_state_dict(self, state):
        """Take less than is passed."""


REFUSED = {
    "arguments": (Demanding, r"Demanding\.state_dict\(\) takes arguments"),
    "no mapping": (Listing, r"Listing\.state_dict\(\) returned a list"),
    "no text": (Numbered, r"Numbered\.state_dict\(\) has the key 3"),
    "below": (lambda: nn.Sequential(Bare(1, 1)), r"Bare\.state_dict\(\) can't be called inside a model"),
    "wrapped": (lambda: DataParallel(Bare(1, 1)), r"Bare\.state_dict\(\) can't be called inside a model"),
    "in a list": (lambda: [nn.Linear(1, 1), Demanding()], r"Demanding\.state_dict\(\)"),
    "load": (lambda: TwoArguments(1, 1), r"TwoArguments\.load_state_dict\(\) can't be called"),
    "load below": (
        lambda: nn.Sequential(NoPrefix(1, 1)),
        r"NoPrefix\._load_from_state_dict\(\) can't be called",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_could_never_be_loaded_is_refused_by_the_first_save(kind):
    make, message = REFUSED[kind]
    for _ in range(2):
        with pytest.raises(UnsupportedState, match=message):
            gockpt.save_overlapped(make(), None, "ckpts", step=1)
    assert gockpt.steps("ckpts") == []


def test_one_that_works_alone_is_saved_alone(save, same):
    saved, live = Bare(2, 2), Bare(2, 2)
    save("ckpts", saved)
    gockpt.load("ckpts", live)
    same(live.state_dict(), saved.state_dict())


def test_keys_that_nothing_takes_back_are_told_when_they_are_saved(save, caplog):
    class Scaled(nn.Linear):
        def _save_to_state_dict(self, out, prefix, keep_vars):
            super()._save_to_state_dict(out, prefix, keep_vars)
            out[prefix + "scale"] = torch.ones(1)

    model = nn.Sequential(nn.Sequential(Scaled(1, 1)), nn.utils.spectral_norm(nn.Linear(1, 1)), Own(1, 1))
    with caplog.at_level("WARNING", "gockpt"):
        save("ckpts", model)
        save("ckpts", model, step=2)
    (told,) = caplog.messages
    assert "(0.0.scale)" in told
    assert "no module of it loads" in told


class Trimmed(nn.Module):
    """Shows a part of itself, without ``keep_vars``."""

    def __init__(self):
        super().__init__()
        self.net, self.frozen = nn.Linear(24, 24), nn.Linear(24, 24).requires_grad_(requires_grad=False)

    def state_dict(self):
        return self.net.state_dict()

    def load_state_dict(self, state):
        return self.net.load_state_dict(state)


def test_windows_of_a_model_that_shows_no_live_tensors_are_exact(same):
    """Its live memory is told by its storage."""

    def build():
        model = Trimmed()
        return model, torch.optim.AdamW(model.net.parameters())

    model, optimizer = build()
    kept = {}
    options = gockpt.Options(window=4, when_busy="wait")
    for step in range(1, 9):
        optimizer.zero_grad()
        model.net(torch.randn(4, 24)).square().sum().backward()
        optimizer.step()
        kept[step] = copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()))
        save = gockpt.save_overlapped(model, optimizer, "ckpts", step=step, every=4, options=options)
    assert save.result().window == 4
    for step in gockpt.steps("ckpts"):
        other, loaded = build()
        gockpt.load("ckpts", other, loaded, step=step)
        same((dict(other.state_dict()), loaded.state_dict()), kept[step])
    assert "model/weight" in gockpt.open("ckpts")
