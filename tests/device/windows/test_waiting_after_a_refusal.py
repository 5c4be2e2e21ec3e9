"""A device refuses, and then comes ``wait()`` or ``close()`` instead of another tick.

What is needed again is copied where training stands, if the fingerprints of the last tick show that it still
is what it was then. If they don't, or nobody can say, nothing is published.
"""

from __future__ import annotations

import pytest
import torch

import gockpt

ENDS = ("wait", "close")
CALLS = ("pack", "copy", "prints", "record", "wait", "synchronize")


def refuse(device, name, numbers):
    """Let some calls of a name fail, counted from the next one."""
    first = device.calls.get(name, -1) + 1
    device.fail = {name: {first + number for number in numbers}}


def parameter(run):
    run.model.a.data[17] += 1


def state(run):
    run.optimizers[0].state[run.model.b]["exp_avg"][-1, -1] *= -1


def small(run):
    run.model.small.data[0] = 5


def buffer(run):
    run.model.seen[3] = -0.0


def replaced(run):
    run.model.a.data = run.model.a.data * 2


def save_in_windows_of(runs, window, ticks, **options):
    """Return a run that is ``ticks`` ticks into its second save, or has just closed it."""
    return runs.Run(window=window, every=1 if window == 1 else 6, **options).ticks(ticks)


@pytest.fixture(params=[(1, 0), (4, 3), (4, 4), (4, 5)], ids=["at once", "opened", "inside", "last part"])
def place(request):
    """Return a window, and how many ticks of it there are before the one after which nothing ticks."""
    return request.param


@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("name", CALLS)
def test_what_is_needed_again_is_copied_where_training_stands(devices, runs, waits, place, name, number):
    window, ticks = place
    run = save_in_windows_of(runs, window, ticks)
    refuse(devices.opened(), name, {number})
    run.tick()
    getattr(run.saver, ENDS[number > 0])()
    assert run.handles[-1].result(60).step == run.step
    run.finish()
    waits.clear()  # what the device has begun is awaited when it refuses, once


@pytest.mark.parametrize("memory", [1 << 16, 1 << 26], ids=["staging", "snapshot"])
@pytest.mark.parametrize("number", range(5))
def test_a_copy_that_is_refused_behind_the_call_is_made_again(devices, runs, memory, number):
    """Nothing is refused inside the call: the stager's thread finds out when all was sent."""
    run = save_in_windows_of(runs, 1, 1, device_memory=memory)
    run.saver.wait()
    devices.gate.clear()
    run.tick()
    refuse(devices.opened(), "synchronize", {number})
    devices.gate.set()
    run.saver.wait()
    handle = run.handles[-1]
    assert handle.result(60).step == run.step
    assert handle.attempts in (1, 2)
    run.finish()


@pytest.mark.parametrize(
    ("change", "end"),
    [(parameter, "wait"), (state, "close"), (small, "wait"), (buffer, "close"), (replaced, "wait")],
)
def test_what_was_changed_since_is_not_published(devices, runs, waits, place, change, end):
    window, ticks = place
    run = save_in_windows_of(runs, window, ticks)
    devices.gate.clear()
    run.tick()
    refuse(devices.opened(), "synchronize", {0})
    change(run)
    devices.gate.set()
    # What stands now is no boundary; unless all of that had been copied inside the call.
    before = gockpt.steps("ckpts")
    try:
        getattr(run.saver, end)()
    except gockpt.SaveAborted as error:
        assert "can't be closed here: parameters may have changed after the last call" in str(error)  # noqa: PT017
        assert gockpt.steps("ckpts") == before
        run.handles.pop()
    else:
        assert window == 1
        assert run.handles[-1].result(60).attempts == 1
    run.finish()
    waits.clear()


@pytest.mark.parametrize("place", [(1, 1), (4, 4)])
def test_an_update_since_is_not_published(devices, runs, waits, place):
    window, ticks = place
    run = save_in_windows_of(runs, window, ticks)
    run.let_arrive()
    refuse(devices.opened(), "copy", {0})
    run.tick()
    run.let_arrive()
    run.update()
    with pytest.raises(gockpt.SaveAborted, match="the optimizer stepped"):
        run.saver.wait()
    run.handles.pop()
    run.finish()
    waits.clear()


def test_a_device_that_does_not_even_say_what_it_saw(devices, runs, waits, place):
    """Whether anything has changed can't be known then, so nothing is published."""
    window, ticks = place
    run = save_in_windows_of(runs, window, ticks)
    run.let_arrive()
    before = gockpt.steps("ckpts")
    devices.gate.clear()
    run.tick()
    device = devices.opened()
    refuse(device, "synchronize", range(1000))
    devices.gate.set()
    with pytest.raises(gockpt.SaveError, match="the fake device refused"):
        run.saver.wait()
    device.fail = {}
    assert gockpt.steps("ckpts") == before
    run.handles.pop()
    run.finish()
    waits.clear()
    devices.made.clear()  # it did not answer, so its memory is left alone


@pytest.mark.parametrize("ticks", [3, 4])
def test_a_boundary_that_the_device_did_not_look_at_is_not_called_changed(devices, runs, waits, ticks):
    run = save_in_windows_of(runs, 4, ticks)
    run.let_arrive()
    before = gockpt.steps("ckpts")
    device = devices.opened()
    refuse(device, "prints", range(1000))
    run.tick()
    with pytest.raises(gockpt.SaveError, match="the fake device refused"):
        run.saver.wait()
    device.fail = {}
    assert gockpt.steps("ckpts") == before
    run.handles.pop()
    run.finish()
    waits.clear()


def test_training_goes_on_after_it(devices, runs, waits):
    run = save_in_windows_of(runs, 4, 4)
    refuse(devices.opened(), "copy", {0})
    run.tick()
    run.saver.wait()
    assert run.handles[-1].result(60).step == 11
    run.ticks(9)
    assert [s.step for s in run.finish()] == [6, 11, 12, 18]
    waits.clear()


def test_a_tensor_that_requires_gradients_is_as_good(devices, runs):
    """What is copied at once is detached, whoever tracks gradients."""
    run = save_in_windows_of(runs, 1, 1)
    refuse(devices.opened(), "prints", {0})
    with torch.enable_grad():
        run.tick()
        run.saver.wait()
    assert run.handles[-1].result(60).step == run.step
    run.finish()
