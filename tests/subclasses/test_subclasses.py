"""Tensor subclasses with ``__tensor_flatten__`` are saved as their inner tensors, and restored from these."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import zarr
from torch import nn

import gockpt

pytestmark = pytest.mark.usefixtures("directories")
WINDOW = gockpt.Options(window=4, when_busy="wait")


def state_of(path, step):
    return json.loads(Path(path, f"step-{step:010}", "state.json").read_text())


def body(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 8))


def eight_states(zoo):
    model = body()
    return model, zoo.Adam8(model.parameters())


def one_table(zoo):
    model = body()
    return model, zoo.Adam8(model.parameters(), table=zoo.LEVELS.clone())


def nested_states(zoo):
    model = body()
    return model, zoo.Adam8(model.parameters(), make=zoo.Weight.of)


def some_states(zoo):
    model = body()
    make = lambda zeros: zoo.Eight.of(zeros) if zeros.dim() == 2 else zeros  # noqa: E731
    return model, zoo.Adam8(model.parameters(), make=make)


def trained_weights(zoo):
    model = body()
    for part in (model[0], model[2]):
        part.weight = nn.Parameter(zoo.Eight.of(part.weight.detach()))
    return model, zoo.Adam8(model.parameters())


def trained_by_adamw(zoo):
    """Its ordinary parameters are replayed, the quantised ones leave at the close."""
    model = body()
    model[0].weight = nn.Parameter(zoo.Weight.of(model[0].weight.detach()), requires_grad=False)
    model[0].bias.requires_grad_(False)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def frozen_weights(zoo):
    model = body()
    config = zoo.Config(True, zoo.Kwargs(-1, zoo.Mode.FAST))
    model.insert(0, nn.Linear(24, 24))
    weight = zoo.Weight.of(model[0].weight.detach(), shift=False, config=config)
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    model[0].bias.requires_grad_(False)
    return model, zoo.Adam8([p for p in model.parameters() if p.requires_grad])


def buffers(zoo):
    model = body()
    model.register_buffer("seen", zoo.Eight.of(torch.zeros(24)))
    model.register_forward_pre_hook(lambda m, args: m.seen.copy_(m.seen.value() + args[0].mean(0)))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def tied(zoo):
    model = nn.ModuleDict({"a": nn.Linear(24, 24), "b": nn.Linear(24, 24)})
    model["a"].weight = nn.Parameter(zoo.Eight.of(model["a"].weight.detach()))
    model["b"].weight = model["a"].weight
    model.forward = lambda x: model["b"](model["a"](x))
    return model, zoo.Adam8(model.parameters())


def outside(zoo):
    model = body()
    extra = nn.Parameter(zoo.Eight.of(torch.ones(24)))
    model.register_forward_pre_hook(lambda _, args: args[0] * extra.value())
    optimizer = zoo.Adam8([*model.parameters(), extra])
    extra.grad = torch.ones(24)
    return model, optimizer


KINDS = [
    eight_states,
    one_table,
    nested_states,
    some_states,
    trained_weights,
    trained_by_adamw,
    frozen_weights,
    buffers,
    tied,
    outside,
]


def train(model, optimizer, step):
    generator = torch.Generator().manual_seed(step)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator)
    with torch.no_grad():
        model(torch.randn(4, 24, generator=generator))
    optimizer.step()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.filterwarnings("ignore:.*")
def test_a_resumed_run_is_the_same_bit_for_bit(zoo, tmp_path, kind):
    model, optimizer = kind(zoo)
    seen = {}
    for step in range(1, 29):
        train(model, optimizer, step)
        if step <= 8:
            gockpt.save_overlapped(model, optimizer, tmp_path, step=step, every=4, options=WINDOW)
        seen[step] = zoo.snapshot(model, optimizer)
        if step == 8:
            gockpt.wait()
    assert gockpt.steps(tmp_path) == [4, 8]
    for step in (4, 8):
        assert gockpt.verify(tmp_path, step).ok
        for steps_before in (0, 2):  # into a fresh optimizer, and into one that has state
            other, its = kind(zoo)
            for number in range(steps_before):
                train(other, its, 100 + number)
            held = [p for group in its.param_groups for p in group["params"]]
            states = {p: dict(its.state[p]) for p in its.state}
            gockpt.load(tmp_path, other, its, step=step)
            assert zoo.snapshot(other, its) == seen[step]
            assert [p for group in its.param_groups for p in group["params"]] == held
            for p, before in states.items():
                assert all(its.state[p][key] is value for key, value in before.items()), "not in place"
    for step in range(9, 29):
        train(other, its, step)
        assert zoo.snapshot(other, its) == seen[step]


def test_ordinary_parameters_beside_them_are_still_replayed(zoo, tmp_path):
    model, optimizer = trained_by_adamw(zoo)
    model[2] = nn.Linear(48, 512)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    for step in range(1, 9):
        train(model, optimizer, step)
        save = gockpt.save_overlapped(model, optimizer, tmp_path, step=step, every=8, options=WINDOW)
    saved = save.result()
    assert saved.window == 4
    assert "2.weight" not in saved.late_parts


def test_what_is_on_disk_is_described_by_the_state_document(zoo, tmp_path):
    model, optimizer = frozen_weights(zoo)
    train(model, optimizer, 1)
    gockpt.save_overlapped(model, optimizer, tmp_path, step=1).result()
    saved = state_of(tmp_path, 1)["subclasses"]
    assert saved["model/0.weight"] == {
        "class": f"{zoo.Weight.__module__}.Weight",
        "context": {
            "block": [1, 24],
            "size": {"$torch.Size": [24, 24]},
            "device": {"$torch.device": "cpu"},
            "mode": {"$enum": [f"{zoo.Mode.__module__}.Mode", "EXACT"]},
            "config": {
                "$fields": f"{zoo.Config.__module__}.Config",
                "of": {
                    "emulate": True,
                    "kwargs": {
                        "$fields": f"{zoo.Kwargs.__module__}.Kwargs",
                        "of": {"axis": -1, "mode": {"$enum": [f"{zoo.Mode.__module__}.Mode", "FAST"]}},
                    },
                },
            },
            "dtype": {"$torch.dtype": "float32"},
        },
        "shape": [24, 24],
        "stride": [24, 1],
        "dtype": "float32",
        "inner": {
            "low": {
                "class": f"{zoo.Eight.__module__}.Eight",
                "context": [True, {"$torch.dtype": "float32"}],
                "shape": [24, 24],
                "stride": [24, 1],
                "dtype": "float32",
                "inner": {
                    name: {"$tensor": ["model", "0.weight", "low", name]}
                    for name in ("codes", "scale", "table")
                },
            }
        },
    }
    assert "optimizer/1.weight/exp_avg" in saved
    group = zarr.open_group(tmp_path / "step-0000000001", mode="r")
    assert (group["model/0.weight/low/codes"][...] == model[0].weight.low.codes.numpy()).all()
    with gockpt.open(tmp_path) as checkpoint:
        assert "model/0.weight/low/codes" in checkpoint
        assert "model/0.weight" not in checkpoint
        assert torch.equal(checkpoint["model/0.weight/low/codes"][...], model[0].weight.low.codes)
        with pytest.raises(
            gockpt.TensorNotFound, match="saved as its inner tensors: model/0.weight/low/codes, "
        ):
            checkpoint["model/0.weight"]


def test_tied_ones_are_saved_once_and_stand_under_each_name(zoo, tmp_path):
    model, optimizer = tied(zoo)
    train(model, optimizer, 1)
    gockpt.save_overlapped(model, optimizer, tmp_path, step=1).result()
    assert state_of(tmp_path, 1)["aliases"] == {"model/b.weight": "model/a.weight"}
    with gockpt.open(tmp_path) as checkpoint:
        assert torch.equal(checkpoint["model/b.weight/codes"][...], model["a"].weight.codes)
        with pytest.raises(gockpt.TensorNotFound, match="inner tensors: model/b.weight/codes"):
            checkpoint["model/b.weight"]


def test_an_array_inside_may_be_a_parameter_as_well(zoo, tmp_path):
    """It is stored under both names, or tied; either way both are restored."""
    for order in (("plain", "wrapped"), ("wrapped", "plain")):
        path = tmp_path / order[0]

        def make(value, order=order):
            plain = nn.Parameter(torch.full((1,), value))
            wrapped = zoo.Eight.of(torch.full((5,), value))
            wrapped.scale = plain.detach()
            model = nn.Module()
            for name in order:
                model.register_parameter(
                    name, plain if name == "plain" else nn.Parameter(wrapped, requires_grad=False)
                )
            return model

        model = make(3.0)
        gockpt.save_overlapped(model, None, path, step=1).result()
        other = make(1.0)
        gockpt.load(path, other)
        assert zoo.snapshot(other, None) == zoo.snapshot(model, None)
        assert other.plain.item() == 3.0


def test_a_mapping_of_them(zoo, tmp_path):
    tensors = {
        "a/b": zoo.Eight.of(torch.randn(6)),
        "c": torch.randn(2),
        "a": zoo.Weight.of(torch.randn(2, 3)),
    }
    gockpt.save_overlapped(tensors, None, tmp_path, step=1).result()
    other = {"a/b": zoo.Eight.of(torch.ones(6)), "c": torch.ones(2), "a": zoo.Weight.of(torch.ones(2, 3))}
    gockpt.load(tmp_path, other)
    assert zoo.snapshot(other, None) == zoo.snapshot(tensors, None)


class Renames(nn.Linear):
    """One with loading code of its own, which gets the subclass as torch would give it."""

    seen = ()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.seen = (*self.seen, type(state_dict[f"{prefix}weight"]).__name__)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Counts(nn.Linear):
    """One whose extra state is read when its weight is what was saved."""

    seen = ()

    def get_extra_state(self):
        return {"sum": float(self.weight.detach().value().sum())}

    def set_extra_state(self, state):
        self.seen = (*self.seen, state["sum"] == float(self.weight.detach().value().sum()))


@pytest.mark.parametrize("kind", [Renames, Counts])
def test_modules_with_loading_code_of_their_own(zoo, tmp_path, kind):
    def make():
        model = nn.Sequential(kind(3, 3), nn.Linear(3, 3))
        model[0].weight = nn.Parameter(zoo.Weight.of(model[0].weight.detach()), requires_grad=False)
        return model

    model = make()
    gockpt.save_overlapped(model, None, tmp_path, step=1).result()
    other = make()
    weight = other[0].weight
    gockpt.load(tmp_path, other)
    assert other[0].weight is weight
    assert zoo.snapshot(other, None)[0]["0.weight"][0] is zoo.Weight
    assert other[0].seen == (("Weight",) if kind is Renames else (True,))
    if kind is Counts:
        assert zoo.snapshot(other, None) == zoo.snapshot(model, None)


def test_what_fits_is_loaded_and_the_rest_left_alone(zoo, tmp_path):
    model, optimizer = trained_weights(zoo)
    train(model, optimizer, 1)
    gockpt.save_overlapped(model, optimizer, tmp_path, step=1).result()
    other, its = trained_weights(zoo)
    other[2].weight = nn.Parameter(other[2].weight.value().detach())
    before = zoo.bits(other[2].weight)
    its = zoo.Adam8(other.parameters())
    restored = gockpt.load(tmp_path, other, its, strict=False)
    assert [text.partition(":")[0] for text in restored.mismatched] == ["model/2.weight"]
    assert zoo.bits(other[2].weight) == before
    assert zoo.bits(other[0].weight) == zoo.bits(model[0].weight)
    assert other[2].weight not in its.state
    assert zoo.bits(its.state[other[0].weight]) == zoo.bits(optimizer.state[model[0].weight])


def test_names_that_would_meet_are_refused(zoo, tmp_path):
    tensors = {"a": zoo.Eight.of(torch.randn(6)), "a/codes": torch.randn(2)}
    with pytest.raises(gockpt.UnsupportedState, match="two arrays would have the name 'model/a/codes'"):
        gockpt.save_overlapped(tensors, None, tmp_path, step=1).result()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda zoo, w: w.value(), "saved a .*Weight, live an ordinary tensor: convert the model"),
        (lambda zoo, w: zoo.Eight.of(w.value()), "saved a .*Weight, live a .*Eight"),
        (
            lambda zoo, w: zoo.Weight.of(w.value(), config=w.context["config"]),
            "saved a .*Weight of low, live one of low, shift",
        ),
        (
            lambda zoo, w: zoo.Weight.of(w.value().double(), shift=False),
            r"saved float32 \(24, 24\), live float64",
        ),
        (
            lambda zoo, w: zoo.Weight.of(w.value()[:, :4], shift=False),
            r"saved float32 \(24, 24\), live .*\(24, 4\)",
        ),
        (lambda zoo, w: zoo.Weight.of(w.value(), shift=False), "saved a .*Weight with .*, live one with"),
    ],
)
def test_one_of_another_kind_does_not_fit_and_nothing_is_changed(zoo, tmp_path, change, says):
    model, _ = frozen_weights(zoo)
    gockpt.save_overlapped(model, None, tmp_path, step=1).result()
    other, _ = frozen_weights(zoo)
    other[0].weight = nn.Parameter(change(zoo, other[0].weight), requires_grad=False)
    before = zoo.snapshot(other, None)
    with pytest.raises(gockpt.StateMismatch, match=f"model/0.weight: .*{says}"):
        gockpt.load(tmp_path, other)
    assert zoo.snapshot(other, None) == before


def test_an_ordinary_array_does_not_fit_a_subclass(zoo, tmp_path):
    gockpt.save_overlapped(body(), None, tmp_path, step=1).result()
    other, _ = trained_weights(zoo)
    with pytest.raises(gockpt.StateMismatch, match="model/0.weight: saved an ordinary array, live a .*Eight"):
        gockpt.load(tmp_path, other)


def test_a_class_that_is_not_there_is_named_and_nothing_is_imported(zoo, tmp_path):
    model, optimizer = eight_states(zoo)
    train(model, optimizer, 1)
    gockpt.save_overlapped(model, optimizer, tmp_path, step=1).result()
    rename(zoo.Eight, "Nine")
    try:
        other, its = body(), zoo.Adam8(body().parameters())
        its = zoo.Adam8(other.parameters())
        before = zoo.snapshot(other, its)
        with pytest.raises(
            gockpt.StateMismatch, match=r"saved from a .*Eight, and no such class is imported"
        ):
            gockpt.load(tmp_path, other, its)
        assert zoo.snapshot(other, its) == before
    finally:
        rename(zoo.Eight, "Eight")
    gockpt.load(tmp_path, other, its)
    assert zoo.snapshot(other, its) == zoo.snapshot(model, optimizer)


def rename(kind, name):
    kind.__qualname__ = name


def test_a_state_that_can_not_be_made_again_is_refused_when_saved(zoo, tmp_path):
    class Forgetful(zoo.Eight):
        @classmethod
        def __tensor_unflatten__(cls, parts, context, size, stride):
            return cls(parts["codes"], parts["scale"], parts["table"], not context[0], context[1])

    class Silent(zoo.Eight):
        @classmethod
        def __tensor_unflatten__(cls, parts, context, size, stride):
            raise RuntimeError("not today")

    config = zoo.Config(True, None)
    for make, why in (
        (Forgetful.of, "makes a different tensor of its parts"),
        (Silent.of, "a load could not rebuild it.*not today"),
        (
            lambda zeros: zoo.Weight.of(zeros, config=config),
            "could not rebuild it.*which a checkpoint can't make",
        ),
    ):
        model = body()
        optimizer = zoo.Adam8(model.parameters())
        for p in model.parameters():
            optimizer.state[p]["exp_avg"] = make(torch.zeros(p.shape))
        with pytest.raises(gockpt.UnsupportedState, match=f"optimizer/0.weight/exp_avg .*{why}"):
            gockpt.save_overlapped(model, optimizer, tmp_path, step=1)


def test_states_of_another_kind_are_made_anew(zoo, tmp_path):
    """Whatever the live state is, it becomes what was saved, as with the optimizer's load_state_dict."""
    model, optimizer = eight_states(zoo)
    train(model, optimizer, 1)
    gockpt.save_overlapped(model, optimizer, tmp_path, step=1).result()
    other = body()
    its = zoo.Adam8(other.parameters(), make=lambda zeros: zeros)
    train(other, its, 2)
    gockpt.load(tmp_path, other, its)
    assert zoo.snapshot(other, its) == zoo.snapshot(model, optimizer)


def test_the_memory_order_of_inner_tensors_is_kept(zoo, tmp_path):
    model, optimizer = eight_states(zoo)
    train(model, optimizer, 1)
    state = optimizer.state[model[0].weight]["exp_avg"]
    state.codes = state.codes.t().contiguous().t()
    gockpt.save_overlapped(model, optimizer, tmp_path, step=1).result()
    for steps in (0, 1):
        other, its = eight_states(zoo)
        for _ in range(steps):
            train(other, its, 5)
        gockpt.load(tmp_path, other, its)
        assert its.state[other[0].weight]["exp_avg"].codes.stride() == (1, 48) == state.codes.stride()
        assert zoo.snapshot(other, its) == zoo.snapshot(model, optimizer)


def test_memory_that_is_shared_here_and_was_not_there(zoo, tmp_path):
    model, optimizer = eight_states(zoo)
    train(model, optimizer, 1)
    for state in optimizer.state.values():
        state["exp_avg_sq"].table.mul_(2)
    gockpt.save_overlapped(model, optimizer, tmp_path, step=1).result()
    other, its = one_table(zoo)
    train(other, its, 1)
    gockpt.load(tmp_path, other, its)
    assert zoo.snapshot(other, its) == zoo.snapshot(model, optimizer)


def test_of_several_classes_of_one_name_that_of_the_module_counts(zoo, tmp_path):
    model, optimizer = eight_states(zoo)
    train(model, optimizer, 1)
    gockpt.save_overlapped(model, optimizer, tmp_path, step=1).result()
    namesake = type("Eight", (zoo.Eight,), {"__module__": zoo.Eight.__module__, "__qualname__": "Eight"})
    other, its = eight_states(zoo)
    gockpt.load(tmp_path, other, its)
    assert zoo.snapshot(other, its) == zoo.snapshot(model, optimizer)
    namesake.__qualname__ = "Namesake"


def test_several_classes_of_one_name_that_no_module_holds_are_refused(zoo, tmp_path):
    def local():
        class Local(zoo.Eight):
            pass

        return Local

    kind = local()
    model = body()
    optimizer = zoo.Adam8(model.parameters(), make=kind.of)
    train(model, optimizer, 1)
    gockpt.save_overlapped(model, optimizer, tmp_path, step=1).result()
    other = body()
    its = zoo.Adam8(other.parameters(), make=kind.of)
    gockpt.load(tmp_path, other, its)
    assert zoo.snapshot(other, its) == zoo.snapshot(model, optimizer)
    second = local()
    its = zoo.Adam8(other.parameters(), make=kind.of)
    with pytest.raises(gockpt.StateMismatch, match="2 classes have that name"):
        gockpt.load(tmp_path, other, its)
    train(other, its, 3)
    gockpt.load(tmp_path, other, its)  # the live states say which one
    assert zoo.snapshot(other, its) == zoo.snapshot(model, optimizer)
    assert second is not kind


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.update(context={"$enum": ["os", []]}),
        lambda s: s.update(context={"$torch.Size": ["x"]}),
        lambda s: s.update(context={"$tuple": 3}),
        lambda s: s.update(context={"$tensor": ["model", "0.weight"]}),
        lambda s: s.update(context={"$what": 3}),
        lambda s: s.update(context=7),
        lambda s: s.update(**{"class": "os.system"}),
        lambda s: s.update(**{"class": "torch.Tensor"}),
        lambda s: s.update(shape=[1 << 40, 3]),
        lambda s: s.update(shape=[-1]),
        lambda s: s.update(stride=["x"]),
        lambda s: s.update(dtype="nonsense"),
        lambda s: s.update(dtype=3),
        lambda s: s.update(inner={}),
        lambda s: s.update(inner={"codes": {"$tensor": ["nowhere"]}}),
        lambda s: s.update(inner={"codes": 3}),
        lambda s: s["inner"].pop("scale"),
        lambda s: s.pop("class"),
        lambda s: s.pop("context"),
    ],
)
def test_a_damaged_description_raises_and_changes_nothing(zoo, tmp_path, monkeypatch, damage):
    model, optimizer = eight_states(zoo)
    train(model, optimizer, 1)
    gockpt.save_overlapped(model, optimizer, tmp_path, step=1).result()
    document = state_of(tmp_path, 1)
    damage(document["subclasses"]["optimizer/0.weight/exp_avg"])
    monkeypatch.setattr("gockpt.storage.read.checkpoint.StoredCheckpoint.state", lambda _: document)
    other, its = eight_states(zoo)
    before = zoo.snapshot(other, its)
    with pytest.raises((gockpt.StateMismatch, gockpt.CheckpointCorrupt)):
        gockpt.load(tmp_path, other, its)
    assert zoo.snapshot(other, its) == before


def test_a_checkpoint_without_any_has_no_such_key(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="gockpt"):
        gockpt.save_overlapped(body(), None, tmp_path, step=1).result()
    assert "subclasses" not in state_of(tmp_path, 1)
    assert not caplog.records
