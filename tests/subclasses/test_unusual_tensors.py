"""Tensors that are no ordinary ones are saved exactly, or refused at the first call with name and way out."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor

import gockpt
from gockpt.state.tensors import refusal


def quiet(make, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes and what is deprecated say so
        return make(*args, **kwargs)


def ragged(layout):
    return quiet(torch.nested.nested_tensor, [torch.ones(2), torch.ones(3)], layout=layout)


def masked():
    return quiet(torch.masked.masked_tensor, torch.ones(2), torch.tensor([True, False]))


def fake():
    with FakeTensorMode():
        return torch.ones(2)


# Whatever is done with these says that they are prototypes.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ComplexHalf"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors"),
]


class Opaque(torch.Tensor):
    """A wrapper that nothing can be known about."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (2,))

    __torch_dispatch__ = classmethod(lambda cls, func, types, args=(), kwargs=None: args[0])


class Broken(Opaque):
    """One that can't be taken apart."""

    def __tensor_flatten__(self):
        raise RuntimeError("not today")

    @staticmethod
    def __tensor_unflatten__(*args):
        raise AssertionError


class Hollow(Broken):
    """One without inner tensors."""

    def __tensor_flatten__(self):
        return [], None


class Full(Broken):
    """One with a context that has no exact form."""

    def __init__(self):
        self.inner = torch.ones(2)

    def __tensor_flatten__(self):
        return ["inner"], {"helper": object()}


class Deep(Full):
    """One with an inner tensor that is not saved."""

    def __init__(self):
        self.inner = torch.ones(2).to_sparse()


class Listed(Full):
    """One whose inner tensor is no tensor."""

    def __init__(self):
        self.inner = [torch.ones(2)]


class Hidden(Full):
    """One with a tensor in its context."""

    def __tensor_flatten__(self):
        return ["inner"], {"more": torch.ones(2)}


class Marked(torch.Tensor):
    """One that dispatches as ordinary tensors do."""


REFUSED = {
    "nested": (lambda: ragged(torch.strided), "nested .ragged. tensor; keep its values and lengths"),
    "jagged": (lambda: ragged(torch.jagged), "nested .ragged. tensor; keep its values and lengths"),
    "coo": (lambda: torch.eye(2).to_sparse(), "to_dense"),
    "csr": (lambda: quiet(torch.eye(2).to_sparse_csr), "to_dense"),
    "mkldnn": (lambda: torch.ones(2, 2).to_mkldnn(), "to_dense"),
    "quantised": (lambda: quiet(torch.quantize_per_tensor, torch.ones(2), 0.1, 0, torch.qint8), "int_repr"),
    "per channel": (
        lambda: quiet(
            torch.quantize_per_channel, torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.quint8
        ),
        "int_repr",
    ),
    "fake": (fake, "has no data: make the model outside of that mode"),
    "meta": (lambda: torch.ones(2, device="meta"), "meta device"),
    "masked": (masked, "get_data"),
    "functional": (lambda: torch._to_functional_tensor(torch.ones(2)), "save outside of it"),
    "zeros": (lambda: torch._efficientzerotensor((2,)), "clone"),
    "complex32": (lambda: quiet(torch.ones(2, dtype=torch.complex32).clone), "convert it"),
    "bits": (lambda: torch.ones(2, dtype=torch.uint8).view(torch.bits8), "convert it"),
    "opaque": (Opaque, "has no __tensor_flatten__"),
    "broken": (Broken, "not today"),
    "hollow": (Hollow, "names the inner tensors"),
    "full": (Full, "its context holds a builtins.object"),
    "deep": (Deep, "of its inner tensor 'inner', its layout is torch.sparse_coo"),
    "listed": (Listed, "its inner tensor 'inner' is a builtins.list"),
    "hidden": (Hidden, "its context holds tensors"),
}
LAZY = {
    "lazy": (lambda: nn.UninitializedParameter(requires_grad=False), "run one forward"),
    "lazy buffer": (nn.UninitializedBuffer, "run one forward"),
}
SAVED = {
    "complex": lambda: torch.view_as_complex(torch.randn(3, 2)),
    "no elements": lambda: torch.empty(0, 3),
    "hollow dimension": lambda: torch.empty(2, 0, 3),
    "0-d": lambda: torch.tensor(3.0),
    "expanded": lambda: torch.randn(1, 3).expand(4, 3),
    "strided": lambda: torch.randn(4, 6)[::2, ::3],
    "float8": lambda: torch.randn(3).to(torch.float8_e5m2),
    "of a class": lambda: torch.randn(3).as_subclass(Marked),
}
# Views whose bits are not what they say: as extras, they are resolved.
VIEWS = {
    "conjugated": lambda: torch.view_as_complex(torch.randn(3, 2)).conj(),
    "negated": lambda: torch.view_as_complex(torch.randn(3, 2)).conj().imag,
}


def as_parameter(value):
    model = nn.Linear(2, 2)
    model.register_parameter(
        "odd", value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    )
    return model, None, None, "model/odd"


def as_buffer(value):
    model = nn.Linear(2, 2)
    model.register_buffer("odd", value)
    return model, None, None, "model/odd"


def as_entry(value):
    return {"odd": value, "plain": torch.ones(2)}, None, None, "model/odd"


def as_state(value):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["odd"] = value
    return model, optimizer, None, "optimizer/weight/odd"


def as_nested_state(value):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["deep"] = [{"odd": value}]
    return model, optimizer, None, "optimizer/weight/deep"


def as_extra(value):
    return nn.Linear(2, 2), None, {"odd": value}, "extra/odd"


def as_parameter_outside(value):
    model = nn.Linear(2, 2)
    outside = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [outside]})
    return model, optimizer, None, "optimizer/group1.param0/param"


PLACES = [as_parameter, as_buffer, as_entry, as_state, as_nested_state, as_extra]


@pytest.mark.parametrize("place", [*PLACES, as_parameter_outside], ids=lambda place: place.__name__)
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_naming_the_entry_and_the_way_out(tmp_path, kind, place):
    make, way_out = REFUSED[kind]
    refuse(tmp_path, place(make()), way_out, anywhere=place in (as_extra, as_nested_state))


@pytest.mark.parametrize(
    ("kind", "place"),
    [("lazy", as_parameter), ("lazy buffer", as_buffer), *(("lazy buffer", place) for place in PLACES[2:])],
)
def test_what_is_not_initialised_is_refused(tmp_path, kind, place):
    make, way_out = LAZY[kind]
    refuse(tmp_path, place(make()), way_out)


@pytest.mark.parametrize("place", PLACES[:4], ids=lambda place: place.__name__)
@pytest.mark.parametrize("kind", VIEWS)
def test_views_that_stand_for_other_bits_are_refused(tmp_path, kind, place):
    refuse(tmp_path, place(VIEWS[kind]()), "resolve_conj")


def refuse(path, what, way_out, *, anywhere=False):
    model, optimizer, extra, name = what
    message = f"{name}.*({way_out}{'|__tensor_flatten__|pass' if anywhere else ''})"
    with pytest.raises(gockpt.UnsupportedState, match=message):
        gockpt.save_overlapped(model, optimizer, path, step=1, extra=extra)
    assert gockpt.steps(path) == []
    with contextlib.suppress(gockpt.SaveError):
        gockpt.wait()
    assert not [each for each in Path(path).iterdir() if each.name.startswith("step")]


@pytest.mark.parametrize(
    ("kind", "place"),
    [*itertools.product(SAVED, PLACES), *itertools.product(VIEWS, (as_nested_state, as_extra))],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_saved_exactly(tmp_path, kind, place):
    torch.manual_seed(1)
    value = (SAVED | VIEWS)[kind]()
    model, optimizer, extra, _ = place(value)
    gockpt.save_overlapped(model, optimizer, tmp_path, step=1, extra=extra).result()
    other, its, extra, _ = place((SAVED | VIEWS)[kind]())
    restored = gockpt.load(tmp_path, other, its)
    found = {
        as_parameter: lambda: other.odd,
        as_buffer: lambda: other.odd,
        as_entry: lambda: other["odd"],
        as_state: lambda: its.state[other.weight]["odd"],
        as_nested_state: lambda: its.state[other.weight]["deep"][0]["odd"],
        as_extra: lambda: restored.extra["odd"],
    }[place]()
    assert (found.dtype, found.shape) == (value.dtype, value.shape)
    assert bits(found) == bits(value)


def bits(tensor):
    plain = tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def test_inside_a_transform(tmp_path):
    seen = []

    def inside(x):
        seen.append(refusal(x))
        return x

    torch.func.vmap(inside)(torch.ones(2, 3))
    torch.func.grad(lambda x: inside(x).sum())(torch.ones(2))
    assert len(seen) == 2
    assert all("torch.func" in why and "save outside of it" in why for why in seen)


def test_a_tensor_that_is_spread_over_processes():
    """Its class is enough to know."""
    spread = torch.Tensor._make_wrapper_subclass(DTensor, (2,))
    assert "pass its local part" in refusal(spread)
