"""What follows a piece off a device, where threads meet: nothing that was sent is ever forgotten."""

from __future__ import annotations

from types import SimpleNamespace

from gockpt.core.descriptors import Stretch
from gockpt.saving.update_order import UpdateOrder
from gockpt.staging.gradient_ring import Ring


class Flips:
    """Becomes true right behind the first look, as if another thread had ended it then."""

    def __init__(self):
        self.looks = 0

    def is_set(self):
        self.looks += 1
        return self.looks > 1


def sent(done, lost=()):
    return SimpleNamespace(
        done=done, lost=lost, error=None, nbytes=4, began=0.0, ended=1.0, sample=(4, 1.0), proven=not lost
    )


def piece(name, offset):
    return SimpleNamespace(stretches=[Stretch((name,), offset, 0, 1, 4)])


def test_what_ends_between_two_looks_is_received_by_the_next_one():
    following = UpdateOrder(Ring(0, 0), None, None)
    ended = SimpleNamespace(is_set=lambda: True)
    ending = sent(Flips(), lost=[SimpleNamespace(offset=64)])
    following._open = []
    following.rest([piece("model", 64)], ending)
    assert following.lost == []
    ending.done.looks = 0
    following.rest([piece("buffers", 0)], sent(ended))
    assert not following.ended
    following.receive()
    assert following.ended
    assert following.lost == [("model",)]
