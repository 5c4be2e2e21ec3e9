"""The training state in the golden checkpoint ``v1-training``."""

from __future__ import annotations

import datetime as dt
import random
from collections import Counter, OrderedDict, deque
from pathlib import PurePosixPath

import numpy as np
import torch
from content import bits
from torch import nn


class Network(nn.Module):
    """Two tied weights, a norm with buffers, and a parameter in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.narrow = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))


def build():
    """Return a network and an optimizer that has taken a step."""
    model = Network()
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.narrow], "lr": 0.5},
            {"params": [*model.embed.parameters(), *model.norm.parameters()]},
        ],
        lr=0.125,
        amsgrad=True,
    )
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return model, optimizer


def tensors(model, optimizer):
    """Return every tensor of both by a name."""
    named = dict(model.state_dict())
    for name, param in model.named_parameters():
        named |= {f"{name}:{key}": value for key, value in optimizer.state[param].items()}
    return named


def content(name, tensor):
    """Return what a tensor is to hold: finite numbers, so that equality says all."""
    data = bits(name, "uint8", tensor.numel()).astype(np.float64) - 77
    return torch.from_numpy(data).reshape(tensor.shape).to(tensor.dtype)


def fill(model, optimizer):
    """Give every tensor its content."""
    with torch.no_grad():
        for name, tensor in tensors(model, optimizer).items():
            tensor.copy_(content("weight" if name in ("embed.weight", "head.weight") else name, tensor))


def seed():
    """Put the random generators where the checkpoint has them."""
    random.seed(11)
    np.random.seed(12)
    torch.manual_seed(13)


def extras():
    """Return extras of every kind."""
    return {
        "epoch": 3,
        "plain": [None, True, 1, -2.5, "text ä", {"key": [1, 2]}],
        "floats": [float("inf"), float("-inf"), float("nan"), -0.0, 5e-324],
        "large": 2**70,
        "complex": 1 - 2j,
        "tuple": (1, (2,)),
        "set": {3},
        "frozenset": frozenset({"a"}),
        "deque": deque([1, 2], maxlen=3),
        "ordered": OrderedDict(b=1, a=2),
        "counter": Counter("aab"),
        "keys": {1: "one", (2, 3): "two"},
        "bytes": b"\x00\xff",
        "range": range(1, 9, 2),
        "date": dt.date(2026, 1, 2),
        "path": PurePosixPath("a/b"),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "tensor": torch.arange(6, dtype=torch.int32).reshape(2, 3),
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "array": np.arange(4, dtype=np.uint16),
        "number": np.float32(0.1),
        "many": list(range(5000)),
    }
