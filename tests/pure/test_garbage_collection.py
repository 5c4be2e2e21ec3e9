"""The collector is paused while somebody is inside, and is afterwards as it was before."""

from __future__ import annotations

import gc
import os
import threading

import pytest

from gockpt.garbage_collection import collection_paused


@pytest.fixture(params=[True, False], ids=["enabled", "disabled"])
def before(request):
    was = gc.isenabled()
    (gc.enable if request.param else gc.disable)()
    yield request.param
    (gc.enable if was else gc.disable)()


def test_it_is_as_it_was_before(before):
    with collection_paused():
        assert not gc.isenabled()
        with collection_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled() is before


def test_an_error_ends_it(before):
    with pytest.raises(ZeroDivisionError), collection_paused():
        raise ZeroDivisionError
    assert gc.isenabled() is before


def test_the_last_of_several_threads_ends_it(before):
    gate, inside = threading.Event(), threading.Event()

    def other():
        with collection_paused():
            inside.set()
            gate.wait(60)

    thread = threading.Thread(target=other)
    with collection_paused():
        thread.start()
        assert inside.wait(60)
    assert not gc.isenabled()
    gate.set()
    thread.join(60)
    assert gc.isenabled() is before


def test_a_forked_child_collects_though_another_thread_of_its_parent_was_inside(before):
    with collection_paused():
        child = os.fork()
        if child == 0:
            os._exit(gc.isenabled() is not before)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
