"""Train, save, load into fresh objects, go on: the loaded run takes the very same steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn, optim

import gockpt

DENSE = {
    "sgd": lambda p: optim.SGD(p, lr=0.05),
    "sgd-momentum-for": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.1, foreach=False),
    "sgd-nesterov": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd-fused": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "adam-amsgrad-for": lambda p: optim.Adam(p, lr=0.01, amsgrad=True, foreach=False),
    "adam-maximize-fused": lambda p: optim.Adam(p, lr=0.01, maximize=True, fused=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda p: optim.AdamW(p, lr=0.01, amsgrad=True, fused=True),
    "adamw-lr-tensor": lambda p: optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.05, lr_decay=0.1, initial_accumulator_value=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "nadam": lambda p: optim.NAdam(p, lr=0.01),
    "radam": lambda p: optim.RAdam(p, lr=0.01),
    "adamax": lambda p: optim.Adamax(p, lr=0.01),
    "adadelta": optim.Adadelta,
    "asgd": lambda p: optim.ASGD(p, lr=0.05, t0=1),
    "rprop": optim.Rprop,
    "adafactor": lambda p: optim.Adafactor(p, lr=0.05),
    "lbfgs": lambda p: optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4),
    "lbfgs-wolfe": lambda p: optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
}
MATRICES = {"muon": lambda p: optim.Muon(p, lr=0.01)}
SPARSE = {"sparse-adam": lambda p: optim.SparseAdam(p, lr=0.05)}


def dense_model(dtype=torch.float32):
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.BatchNorm1d(7), nn.Linear(7, 3)).to(dtype)


def matrix_model():
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False))


def sparse_model():
    return nn.Sequential(nn.Embedding(9, 4, sparse=True))


def train(model, optimizer, steps):
    first = next(model.parameters())
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        if isinstance(model[0], nn.Embedding):
            batch = torch.randint(9, (6,), generator=generator)
        else:
            batch = torch.randn(6, 5, generator=generator).to(first.dtype)

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = (model(batch) - 0.5).square().mean()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    return losses


CASES = [
    *((name, make, dense_model) for name, make in DENSE.items()),
    *((name, make, matrix_model) for name, make in MATRICES.items()),
    *((name, make, sparse_model) for name, make in SPARSE.items()),
    ("adamw-bf16", DENSE["adamw"], lambda: dense_model(torch.bfloat16)),
    ("adamw-double", DENSE["adamw"], lambda: dense_model(torch.float64)),
]


def test_every_optimizer_of_torch_is_here():
    here = {type(make([nn.Parameter(torch.zeros(2, 2))])).__name__ for _, make, _ in CASES}
    assert here == {name for name in optim.__all__ if name[0].isupper()} - {"Optimizer"}


@pytest.mark.parametrize(("make", "build"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_training_goes_on_as_if_never_interrupted(make, build, used, save, same):
    model = build()
    optimizer = make(model.parameters())
    train(model, optimizer, range(4))
    save("ckpts", model, optimizer, step=4)
    wanted_model, wanted_optimizer = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    losses = train(model, optimizer, range(4, 8))

    other = build()
    loaded = make(other.parameters())
    if used:  # its state is there already, and other
        train(other, loaded, range(20, 23))
    for group in loaded.param_groups:
        group["lr"] = torch.tensor(0.5) if isinstance(group["lr"], torch.Tensor) else 0.5
    restored = gockpt.load("ckpts", other, loaded)

    assert (restored.missing, restored.unexpected, restored.mismatched) == ((), (), ())
    assert (restored.options_new, restored.options_kept) == ((), ())
    same(dict(other.state_dict()), dict(wanted_model))
    same(loaded.state_dict(), wanted_optimizer)
    assert train(other, loaded, range(4, 8)) == losses
    same(dict(other.state_dict()), dict(model.state_dict()))
    same(loaded.state_dict(), optimizer.state_dict())


def test_before_the_first_step_there_is_no_state(save, same):
    model = dense_model()
    save("ckpts", model, optim.AdamW(model.parameters(), lr=0.01))
    other = dense_model()
    optimizer = optim.AdamW(other.parameters(), lr=0.2)
    train(other, optimizer, range(2))
    gockpt.load("ckpts", other, optimizer)
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_a_state_that_came_late_leaves_the_others_without(save):
    """A mixture of experts: only parameters that got a gradient have a state."""
    model = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    optimizer = optim.AdamW(model.parameters())
    model[1](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save("ckpts", model, optimizer)
    other = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    loaded = optim.AdamW(other.parameters())
    gockpt.load("ckpts", other, loaded)
    assert set(loaded.state) == set(other[1].parameters())


def test_a_learning_rate_in_a_tensor_stays_that_tensor(save):
    model = nn.Linear(2, 2)
    save("ckpts", model, optim.AdamW(model.parameters(), lr=torch.tensor(0.25), foreach=False))
    rate = torch.tensor(0.5)
    optimizer = optim.AdamW(model.parameters(), lr=rate, foreach=False)
    gockpt.load("ckpts", model, optimizer)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.25


@pytest.mark.parametrize(("saved", "kept"), [(0.25, True), (0.1, False)])
def test_a_number_goes_into_a_live_tensor_only_if_it_fits_exactly(saved, kept, save):
    model = nn.Linear(2, 2)
    save("ckpts", model, optim.AdamW(model.parameters(), lr=saved, foreach=False))
    rate = torch.tensor(0.5)
    optimizer = optim.AdamW(model.parameters(), lr=rate, foreach=False)
    gockpt.load("ckpts", model, optimizer)
    assert (optimizer.param_groups[0]["lr"] is rate) is kept
    assert float(optimizer.param_groups[0]["lr"]) == saved


def test_a_tensor_takes_the_place_of_a_live_number(save):
    model = nn.Linear(2, 2)
    save("ckpts", model, optim.AdamW(model.parameters(), lr=torch.tensor(0.25), foreach=False))
    optimizer = optim.AdamW(model.parameters(), lr=0.5, foreach=False)
    gockpt.load("ckpts", model, optimizer)
    assert torch.equal(optimizer.param_groups[0]["lr"], torch.tensor(0.25))


def test_state_tensors_keep_their_memory_when_they_fit(save):
    model = dense_model()
    optimizer = optim.AdamW(model.parameters())
    train(model, optimizer, range(2))
    save("ckpts", model, optimizer)
    before = {key: value.data_ptr() for key, value in optimizer.state[model[0].weight].items()}
    state = optimizer.state[model[0].weight]
    train(model, optimizer, range(2, 4))
    gockpt.load("ckpts", model, optimizer)
    assert optimizer.state[model[0].weight] is state
    assert {key: value.data_ptr() for key, value in state.items()} == before


def test_a_channels_last_parameter_gets_states_in_its_memory_order(save, same):
    def build():
        torch.manual_seed(0)
        model = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        return model, optim.AdamW(model.parameters(), fused=True, lr=0.1)

    def train_on(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            model(torch.full((1, 3, 5, 5), step / 7)).square().sum().backward()
            optimizer.step()

    model, optimizer = build()
    train_on(model, optimizer, range(1, 4))
    save("ckpts", model, optimizer)
    train_on(model, optimizer, range(4, 7))
    other, loaded = build()
    gockpt.load("ckpts", other, loaded)
    assert other.weight.is_contiguous(memory_format=torch.channels_last)
    assert loaded.state[other.weight]["exp_avg"].stride() == optimizer.state[model.weight]["exp_avg"].stride()
    train_on(other, loaded, range(4, 7))
    same(loaded.state_dict(), optimizer.state_dict())
    same(dict(other.state_dict()), dict(model.state_dict()))


class Growing(optim.Optimizer):
    """An optimizer with what the ones of torch don't have."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})
        self.seen = 0

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.seen += 1
        self.state["global"] = {"count": self.seen, "norms": [torch.tensor(float(self.seen))]}
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state[("odd", 1)] = state.get(("odd", 1), 0) + 1
                state["$cash"] = torch.full((2,), float(self.seen))
                state["slow"] = state.get("slow", param.detach().clone())
                state["also slow"] = state["slow"]
                param.sub_(param.grad, alpha=group["lr"] / self.seen)
        return loss

    def state_dict(self):
        return {**super().state_dict(), "seen": self.seen}

    def load_state_dict(self, state_dict):
        state_dict = dict(state_dict)
        self.seen = state_dict.pop("seen")
        super().load_state_dict(state_dict)


def test_an_optimizer_with_a_mind_of_its_own(save, same):
    model = dense_model(torch.bfloat16)
    optimizer = Growing(model.parameters())
    train(model, optimizer, range(3))
    save("ckpts", model, optimizer)
    wanted = copy.deepcopy(dict(optimizer.state["global"]))
    losses = train(model, optimizer, range(3, 6))
    other = dense_model(torch.bfloat16)
    loaded = Growing(other.parameters())
    gockpt.load("ckpts", other, loaded)
    assert loaded.seen == 3
    same(loaded.state["global"], wanted)
    state = loaded.state[other[0].weight]
    assert list(state) == [("odd", 1), "$cash", "slow", "also slow"]
    assert state["$cash"].dtype == torch.float32, "load_state_dict alone would have cast it"
    assert state["slow"].data_ptr() == state["also slow"].data_ptr(), "one tensor before, one tensor now"
    assert train(other, loaded, range(3, 6)) == losses


def test_a_state_that_the_checkpoint_does_not_have_is_gone(save):
    model = nn.Linear(2, 2)
    plain = optim.AdamW(model.parameters())
    rich = optim.AdamW(model.parameters(), amsgrad=True)
    for optimizer in (plain, rich):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    save("ckpts", model, plain)
    gockpt.load("ckpts", model, rich)
    assert list(rich.state[model.weight]) == ["step", "exp_avg", "exp_avg_sq"]
    assert rich.param_groups[0]["amsgrad"] is False


def test_a_state_that_is_no_mapping(save):
    model = nn.Linear(2, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight] = torch.full((3,), 2.0)
    optimizer.state[model.bias] = [1, "x"]
    save("ckpts", model, optimizer)
    other = nn.Linear(2, 2)
    loaded = optim.SGD(other.parameters(), lr=0.1)
    gockpt.load("ckpts", other, loaded)
    assert loaded.state[other.weight].tolist() == [2.0] * 3
    assert loaded.state[other.bias] == [1, "x"]


def test_state_under_other_keys_is_replaced(save):
    model = nn.Linear(2, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optimizer.state["shared"] = {"count": 3}
    save("ckpts", model, optimizer)
    optimizer.state["shared"] = {"count": 9}
    optimizer.state["late"] = 1
    gockpt.load("ckpts", model, optimizer)
    assert dict(optimizer.state) == {"shared": {"count": 3}}


def test_names_given_to_parameters_are_the_saved_ones_as_after_load_state_dict(save):
    model = nn.Linear(2, 2)
    save("ckpts", model, optim.SGD(model.named_parameters(), lr=0.5))
    optimizer = optim.SGD([(f"mine.{name}", param) for name, param in model.named_parameters()], lr=0.1)
    restored = gockpt.load("ckpts", model, optimizer)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert (restored.options_new, restored.options_kept) == ((), ())
    save("ckpts", model, optim.SGD(model.parameters(), lr=0.25))
    restored = gockpt.load("ckpts", model, optimizer)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"], "without saved ones they stay"
    assert (restored.options_new, restored.options_kept) == ((), ())


@pytest.mark.parametrize(("saved", "live"), [(torch.ones(2), torch.tensor(0.0)), ("text", torch.tensor(0.0))])
def test_an_option_that_a_live_tensor_can_not_hold_takes_its_place(saved, live, save):
    model = nn.Linear(2, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["option"] = saved
    save("ckpts", model, optimizer)
    optimizer.param_groups[0]["option"] = live
    gockpt.load("ckpts", model, optimizer)
    loaded = optimizer.param_groups[0]["option"]
    assert loaded is not live
    assert loaded == saved if isinstance(saved, str) else torch.equal(loaded, saved)
