"""What does not fit is found before anything changes; ``strict=False`` loads the rest and reports."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gockpt
from gockpt import StateMismatch


def build(width=3):
    torch.manual_seed(width)
    model = nn.Sequential(nn.Linear(2, width), nn.Linear(width, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def stepped(model, optimizer):
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    return model, optimizer


def snapshot(model, optimizer):
    return [p.detach().clone() for p in model.parameters()], repr(optimizer.state_dict())


def unchanged(before, model, optimizer):
    tensors, text = before
    assert all(torch.equal(a, b) for a, b in zip(tensors, model.parameters(), strict=True))
    assert repr(optimizer.state_dict()) == text


def test_another_shape_changes_nothing(save):
    save("ckpts", *stepped(*build(3)))
    model, optimizer = stepped(*build(4))
    before = snapshot(model, optimizer)
    rng = torch.get_rng_state()
    with pytest.raises(StateMismatch) as caught:
        gockpt.load("ckpts", model, optimizer, extra={})
    assert caught.value.mismatched[0] == "model/0.weight: saved float32 (3, 2), live float32 (4, 2)"
    assert len(caught.value.mismatched) == 3
    assert "nothing was changed" in str(caught.value)
    assert "strict=False" in str(caught.value)
    unchanged(before, model, optimizer)
    assert torch.equal(rng, torch.get_rng_state())


def test_not_strict_loads_what_has_the_shape_with_its_state(save):
    saved, saved_optimizer = stepped(*build(3))
    save("ckpts", saved, saved_optimizer)
    model, optimizer = stepped(*build(4))
    before, _ = snapshot(model, optimizer)
    restored = gockpt.load("ckpts", model, optimizer, strict=False)
    assert len(restored.mismatched) == 3
    assert torch.equal(model[1].bias, saved[1].bias)
    assert torch.equal(
        optimizer.state[model[1].bias]["exp_avg"], saved_optimizer.state[saved[1].bias]["exp_avg"]
    )
    for index, param in enumerate(list(model.parameters())[:3]):
        assert torch.equal(param, before[index])
        assert optimizer.state[param]["exp_avg"].shape == param.shape


@pytest.mark.parametrize("strict", [True, False])
def test_another_dtype_is_never_cast(strict, save):
    save("ckpts", nn.Linear(2, 2))
    model = nn.Linear(2, 2).double()
    before = model.weight.detach().clone()
    if strict:
        with pytest.raises(
            StateMismatch, match=r"model/weight: saved float32 \(2, 2\), live float64 \(2, 2\)"
        ):
            gockpt.load("ckpts", model)
    else:
        with pytest.raises(StateMismatch, match="no entry of the model fits .* even with strict=False, and"):
            gockpt.load("ckpts", model, strict=False)
    assert torch.equal(model.weight, before)


def test_missing_and_unexpected_names(save):
    save("ckpts", {"a": torch.ones(2), "b": torch.ones(2)})
    live = {"b": torch.zeros(2), "c": torch.zeros(2)}
    with pytest.raises(StateMismatch) as caught:
        gockpt.load("ckpts", live)
    assert (caught.value.missing, caught.value.unexpected) == (("model/c",), ("model/a",))
    assert not live["b"].any()
    restored = gockpt.load("ckpts", live, strict=False)
    assert (restored.missing, restored.unexpected) == (("model/c",), ("model/a",))
    assert live["b"].all()
    assert not live["c"].any()


@pytest.mark.parametrize("give", [lambda model: model, lambda model: dict(model.state_dict())])
def test_not_strict_with_nothing_that_fits_is_an_error(give, save):
    """Such as a prefix that only one side has: it would train on from nothing."""
    save("ckpts", *stepped(*build()))
    model, _ = build()
    held = nn.ModuleDict({"net": model})
    before = model[0].weight.detach().clone()
    with pytest.raises(StateMismatch, match="a prefix that the other lacks") as caught:
        gockpt.load("ckpts", give(held), strict=False)
    assert "model/net.0.weight" in caught.value.missing
    assert "model/0.weight" in caught.value.unexpected
    assert torch.equal(model[0].weight, before)
    empty = gockpt.load("ckpts", None, strict=False)
    assert empty.step == 1


def test_long_lists_of_names_are_counted(save):
    save("ckpts", {f"t{i}": torch.ones(1) for i in range(30)})
    with pytest.raises(StateMismatch, match="30 only in the checkpoint: .*model/t7 and 22 more"):
        gockpt.load("ckpts", {})


def test_an_optimizer_that_was_not_saved_is_missing(save):
    model, optimizer = stepped(*build())
    save("ckpts", model)
    with pytest.raises(StateMismatch) as caught:
        gockpt.load("ckpts", model, optimizer)
    assert caught.value.missing == ("optimizer 0 (AdamW)",)
    before = snapshot(model, optimizer)
    assert gockpt.load("ckpts", model, optimizer, strict=False).missing == ("optimizer 0 (AdamW)",)
    unchanged(before, model, optimizer)


def test_one_optimizer_of_two_is_unexpected(save):
    model, _ = build()
    one, two = (torch.optim.SGD(part.parameters(), lr=0.1) for part in model)
    save("ckpts", model, [one, two])
    with pytest.raises(StateMismatch) as caught:
        gockpt.load("ckpts", model, one)
    assert caught.value.unexpected == ("optimizer 1 (SGD)",)


def test_an_optimizer_of_another_class_takes_nothing(save):
    model, optimizer = stepped(*build())
    save("ckpts", model, optimizer)
    other = torch.optim.Adam(model.parameters(), lr=0.7)
    with pytest.raises(StateMismatch, match=r"saved torch.optim.adamw.AdamW, live torch.optim.adam.Adam\b"):
        gockpt.load("ckpts", model, other)
    gockpt.load("ckpts", model, other, strict=False)
    assert other.param_groups[0]["lr"] == 0.7
    assert not other.state


def test_a_class_that_moved_to_another_module_is_the_same(save):
    model, optimizer = build()

    class AdamW(torch.optim.AdamW):
        pass

    save("ckpts", model, AdamW(model.parameters(), lr=0.3))
    gockpt.load("ckpts", model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.3


def groups(model, *indices, lr=0.1):
    params = list(model.parameters())
    return torch.optim.SGD([{"params": [params[i] for i in part]} for part in indices], lr=lr)


def test_groups_are_found_by_their_parameters(save):
    model, _ = build()
    optimizer = groups(model, (0, 1), (2, 3))
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.3, 0.4
    save("ckpts", model, optimizer)
    other = groups(model, (2, 3), (0, 1))
    gockpt.load("ckpts", model, other)
    assert [group["lr"] for group in other.param_groups] == [0.4, 0.3]


@pytest.mark.parametrize("parts", [((0, 1, 2), (3,)), ((0, 1, 2, 3),), ((1, 0), (2, 3))])
def test_other_groups_do_not_fit(parts, save):
    model, _ = build()
    save("ckpts", model, groups(model, (0, 1), (2, 3), lr=0.5))
    with pytest.raises(StateMismatch, match="same parameters, in other groups or in another order"):
        gockpt.load("ckpts", model, groups(model, *parts))
    other = groups(model, *parts)
    restored = gockpt.load("ckpts", model, other, strict=False)
    assert len(restored.mismatched) == 1
    found = [group["lr"] for group in other.param_groups]
    assert found == [0.5 if part in {(0, 1), (2, 3)} else 0.1 for part in parts]


def test_a_parameter_that_is_only_on_one_side_is_named(save):
    model, _ = build()
    save("ckpts", model, groups(model, (0, 1)))
    with pytest.raises(StateMismatch, match="only here: 1.weight; only in the checkpoint: 0.bias"):
        gockpt.load("ckpts", model, groups(model, (0, 2)))


def test_a_group_that_was_added_since_is_named(save):
    model, _ = build()
    save("ckpts", model, groups(model, (0, 1), lr=0.5))
    optimizer = groups(model, (0, 1), (2, 3))
    with pytest.raises(StateMismatch, match="only here: 1.weight, 1.bias. What now"):
        gockpt.load("ckpts", model, optimizer)
    restored = gockpt.load("ckpts", model, optimizer, strict=False)
    assert restored.mismatched == ("param groups of optimizer 0: only here: 1.weight, 1.bias",)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]


def test_options_that_only_one_side_knows_are_reported(save):
    model, optimizer = build()
    optimizer.param_groups[0]["initial_lr"] = 0.9
    save("ckpts", model, optimizer)
    model, other = build()
    other.param_groups[0]["mine"] = "kept"
    restored = gockpt.load("ckpts", model, other)
    assert restored.options_new == ("optimizer 0, group 0: initial_lr",)
    assert restored.options_kept == ("optimizer 0, group 0: mine",)
    assert other.param_groups[0]["initial_lr"] == 0.9
    assert other.param_groups[0]["mine"] == "kept"


def test_group_dicts_stay_the_same_objects(save):
    model, optimizer = build()
    save("ckpts", model, optimizer)
    group = optimizer.param_groups[0]
    group["lr"] = 9.0
    gockpt.load("ckpts", model, optimizer)
    assert optimizer.param_groups[0] is group
    assert group["lr"] == 0.1


def test_without_the_model_parameters_have_no_names(save, caplog):
    model, optimizer = build()
    save("ckpts", model, optimizer)
    with pytest.raises(StateMismatch, match="pass the model as well"):
        gockpt.load("ckpts", None, optimizer)


def test_a_parameter_outside_the_model_comes_back_with_the_optimizer(save):
    def with_temperature():
        model, _ = build()
        temperature = nn.Parameter(torch.randn(()))
        optimizer = torch.optim.AdamW([{"params": model.parameters()}, {"params": [temperature]}])
        return model, optimizer, temperature

    model, optimizer, temperature = with_temperature()
    temperature.grad = torch.ones(())
    stepped(model, optimizer)
    save("ckpts", model, optimizer)
    assert torch.equal(gockpt.open("ckpts")["optimizer/group1.param0/param"][...], temperature)
    other, loaded, cold = with_temperature()
    gockpt.load("ckpts", other, loaded)
    assert torch.equal(cold, temperature)
    assert torch.equal(loaded.state[cold]["exp_avg"], optimizer.state[temperature]["exp_avg"])


def test_a_parameter_outside_the_model_of_another_shape_is_a_mismatch(save):
    model, _ = build()
    extra = nn.Parameter(torch.zeros(9))
    save("ckpts", model, torch.optim.SGD([extra], lr=0.1))
    with pytest.raises(
        StateMismatch, match=r"optimizer/group0.param0/param: saved float32 \(9,\), live float32 \(8,\)"
    ):
        gockpt.load("ckpts", model, torch.optim.SGD([nn.Parameter(torch.zeros(8))], lr=0.1))


def test_a_parameter_that_left_the_model_is_missing_with_its_optimizer(save):
    """Its name fits, but the checkpoint holds it in the model."""
    model = {"a": torch.ones(1), "group0.param0": torch.ones(1)}
    save("ckpts", model, torch.optim.SGD([model["group0.param0"]], lr=0.1))
    outside = torch.zeros(1)
    with pytest.raises(StateMismatch) as caught:
        gockpt.load("ckpts", {"a": torch.ones(1)}, torch.optim.SGD([outside], lr=0.1))
    assert caught.value.missing == ("optimizer/group0.param0/param",)
    assert caught.value.unexpected == ("model/group0.param0",)


def test_two_optimizers_that_hold_the_same_parameters(save):
    def two():
        model, one = build()
        return model, [one, torch.optim.AdamW(model.parameters(), lr=0.3)]

    model, optimizers = two()
    for rate, optimizer in enumerate(optimizers):
        stepped(model, optimizer)
        optimizer.param_groups[0]["lr"] = rate
    save("ckpts", model, optimizers)
    other, loaded = two()
    gockpt.load("ckpts", other, loaded)
    for one, mine in zip(loaded, optimizers, strict=True):
        assert one.param_groups[0]["lr"] == mine.param_groups[0]["lr"]
        assert torch.equal(one.state[other[0].weight]["exp_avg"], mine.state[model[0].weight]["exp_avg"])
