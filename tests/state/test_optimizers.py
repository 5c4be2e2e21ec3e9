"""Optimizers are found inside their wrappers, and what has code of its own is told from torch's default."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gockpt.errors import UsageError
from gockpt.state.optimizers import find_optimizers


def resolve_optimizers(given):
    return find_optimizers(given).optimizers


def sgd():
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


class Passing(torch.optim.Optimizer):
    """Only passes through, and is an optimizer for isinstance."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def state(self):
        return self.optimizer.state

    @property
    def param_groups(self):
        return self.optimizer.param_groups


class Slow(torch.optim.Optimizer):
    """Keeps a state of its own beside the wrapped one's."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base_optimizer = base
        self.param_groups = base.param_groups


class Holder:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def test_optimizers_are_found_inside_wrappers():
    one, two = sgd(), sgd()
    slow = Slow(one)
    assert resolve_optimizers(None) == []
    assert resolve_optimizers(one) == [one]
    assert resolve_optimizers((one, two)) == [one, two]
    assert resolve_optimizers([one, one]) == [one]
    assert resolve_optimizers(Passing(Passing(one))) == [one]
    assert resolve_optimizers(Holder(_optimizer=Passing(one))) == [one]
    assert resolve_optimizers(slow) == [one, slow]
    assert resolve_optimizers(Holder(optimizers=[one, two])) == [one, two]


def test_a_wrapper_that_holds_itself_ends():
    holder = Holder(param_groups=[], state={})
    holder.optimizer = holder
    assert resolve_optimizers(holder) == [holder]


@pytest.mark.parametrize(
    "bad", [3, Holder(), Holder(param_groups=[]), torch.optim.SGD, [sgd(), "x"], {"a": sgd()}]
)
def test_what_is_no_optimizer(bad):
    with pytest.raises(UsageError, match=r"without param_groups and state; pass .* or pass it in extra"):
        resolve_optimizers(bad)
