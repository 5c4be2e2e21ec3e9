"""Tensor subclasses as libraries define them, and an optimizer whose state is one."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch.utils._pytree import tree_map

LEVELS = torch.linspace(-1, 1, 256)


class Wrapper(torch.Tensor):
    """A tensor that is made of others: computes with the values that they stand for."""

    NAMES = ()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("detach", "alias"):
            return args[0].like()
        if name == "copy_" and isinstance(args[0], Wrapper):
            args[0].assign(value_of(args[1]))
            return args[0]
        return func(*tree_map(value_of, args), **tree_map(value_of, kwargs or {}))

    def like(self):
        names, context = self.__tensor_flatten__()
        parts = {name: getattr(self, name) for name in names}
        return type(self).__tensor_unflatten__(parts, context, self.shape, self.stride())

    def __repr__(self):
        return f"{type(self).__name__}{tuple(self.shape)}"


def value_of(tensor):
    return tensor.value() if isinstance(tensor, Wrapper) else tensor


class Eight(Wrapper):
    """8 bits per element, a scale, and a table: as 8-bit optimizers keep their state."""

    @staticmethod
    def __new__(cls, codes, scale, table, signed, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes, scale, table, signed, dtype):
        self.codes, self.scale, self.table, self.signed = codes, scale, table, signed

    @classmethod
    def of(cls, value, table=None, signed=True):
        made = cls(
            torch.zeros(value.shape, dtype=torch.uint8),
            torch.ones(1),
            LEVELS.clone() if table is None else table,
            signed,
            value.dtype,
        )
        made.assign(value)
        return made

    def __tensor_flatten__(self):
        return ["codes", "scale", "table"], [self.signed, self.dtype]

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size, stride):
        return cls(parts["codes"], parts["scale"], parts["table"], *context)

    def value(self):
        return (self.table[self.codes.long()] * self.scale).to(self.dtype)

    def assign(self, value):
        self.scale.fill_(max(float(value.abs().max()), 1e-12))
        self.codes.copy_(((value / self.scale + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))


class Mode(enum.Enum):
    """As in contexts of quantised weights."""

    FAST = "fast"
    EXACT = "exact"


@dataclass
class Kwargs:
    """As in contexts of quantised weights."""

    axis: int
    mode: Mode


class Config(NamedTuple):
    """As in contexts of quantised weights."""

    emulate: bool
    kwargs: Kwargs | None


class Weight(Wrapper):
    """A weight with a rich context, an optional part, and a subclass inside."""

    @staticmethod
    def __new__(cls, low, shift, context):
        return torch.Tensor._make_wrapper_subclass(cls, low.shape, dtype=low.dtype, device=low.device)

    def __init__(self, low, shift, context):
        self.low, self.shift, self.context = low, shift, context

    @classmethod
    def of(cls, value, shift=True, config=None):
        context = {
            "block": [1, value.shape[-1]],
            "size": value.shape,
            "device": value.device,
            "mode": Mode.EXACT,
            "config": config,
            "dtype": value.dtype,
        }
        made = cls(Eight.of(value), torch.zeros(1) if shift else None, context)
        made.assign(value)
        return made

    def __tensor_flatten__(self):
        return ["low", "shift"] if self.shift is not None else ["low"], self.context

    @staticmethod
    def __tensor_unflatten__(parts, context, size, stride):
        return Weight(parts["low"], parts.get("shift"), context)

    def value(self):
        return self.low.value() + (0 if self.shift is None else self.shift)

    def assign(self, value):
        if self.shift is not None:
            self.shift.fill_(float(value.mean()))
            value = value - self.shift
        self.low.assign(value)


class Adam8(torch.optim.Optimizer):
    """Adam whose moments are subclasses, made by ``make``, with one table for all of them if ``table``."""

    def __init__(self, params, lr=1e-2, make=Eight.of, table=None):
        super().__init__(params, {"lr": lr})
        self.make, self.table = make, table

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    for name in ("exp_avg", "exp_avg_sq"):
                        zeros = torch.zeros(p.shape)
                        state[name] = self.make(zeros) if self.table is None else Eight.of(zeros, self.table)
                state["step"] += 1
                for name, seen, beta in (("exp_avg", p.grad, 0.9), ("exp_avg_sq", p.grad**2, 0.99)):
                    state[name].copy_(value_of(state[name]).lerp(seen, 1 - beta))
                p.copy_(
                    value_of(p)
                    - group["lr"]
                    * value_of(state["exp_avg"])
                    / (value_of(state["exp_avg_sq"]).abs().sqrt() + 1e-4)
                )


def bits(value):
    """Return what a tensor is, all the way in, as plain values that can be compared."""
    if isinstance(value, Wrapper):
        names, context = value.__tensor_flatten__()
        return (type(value), repr(context), *((name, bits(getattr(value, name))) for name in names))
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return value.dtype, tuple(value.shape), data
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items()}
    return [bits(part) for part in value] if isinstance(value, (list, tuple)) else value


def snapshot(model, optimizer):
    parts = model if isinstance(model, dict) else model.state_dict()
    state = {} if optimizer is None else optimizer.state_dict()["state"]
    return bits(dict(parts)), bits(state)


@pytest.fixture
def zoo():
    return SimpleNamespace(
        Wrapper=Wrapper,
        Eight=Eight,
        Weight=Weight,
        Adam8=Adam8,
        Mode=Mode,
        Kwargs=Kwargs,
        Config=Config,
        LEVELS=LEVELS,
        bits=bits,
        snapshot=snapshot,
    )
