"""A call on another stream than the update: it waits for the update, on the device."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import gockpt
from gockpt.saving.device_selection import CudaDevices

ONE, TWO = torch.device("cuda", 0), torch.device("cuda", 1)


def params(*devices):
    return [SimpleNamespace(device=device) for device in devices]


class Optimizer:
    def __init__(self, *devices):
        self.param_groups = [{"params": params(*devices)}, {"params": params(torch.device("cpu"))}]


@pytest.fixture
def cuda(monkeypatch):
    """Stand in for ``torch.cuda``: what is queued where, in order."""
    queued, current = [], {ONE: "default", TWO: "default"}

    class Event:
        def record(self, stream):
            self.at = stream.name
            queued.append(("record", stream.name))

    @dataclass(frozen=True)
    class Stream:
        name: str
        device: torch.device

        def wait_event(self, event):
            queued.append(("wait", self.name, event.at))

    started = [True]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started[0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: Stream(f"{current[d]} of {d}", d))
    return SimpleNamespace(queued=queued, current=current, started=started)


def test_the_streams_of_a_call_wait_for_those_of_the_updates(cuda):
    devices, first, second = CudaDevices(), Optimizer(ONE, ONE), Optimizer(TWO, ONE)
    cuda.current.update({ONE: "side", TWO: "other"})
    devices.updated(first)
    devices.updated(first)
    cuda.current[ONE] = "third"
    devices.updated(second)
    cuda.current.update({ONE: "default", TWO: "default"})
    del cuda.queued[:]
    devices.wait_for_updates()
    assert sorted(cuda.queued) == [
        ("wait", "default of cuda:0", "side of cuda:0"),
        ("wait", "default of cuda:0", "third of cuda:0"),
        ("wait", "default of cuda:1", "other of cuda:1"),
    ]
    del cuda.queued[:]
    devices.wait_for_updates()
    assert cuda.queued == []


def test_one_optimizer_that_updates_on_two_streams_is_waited_for_on_both(cuda):
    devices, optimizer = CudaDevices(), Optimizer(ONE)
    for cuda.current[ONE] in ("side", "third", "default"):
        devices.updated(optimizer)
    del cuda.queued[:]
    devices.wait_for_updates()
    assert sorted(at for _, _, at in cuda.queued) == [
        f"{name} of cuda:0" for name in ("default", "side", "third")
    ]


def test_nothing_starts_cuda(cuda):
    cuda.started[0] = False
    devices = CudaDevices()
    devices.updated(Optimizer(ONE))
    devices.wait_for_updates()
    assert cuda.queued == []


@pytest.mark.parametrize("every", [None, 1, 3])
def test_each_call_waits_before_it_looks_at_the_state(devices, every):
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = gockpt.Options(window=1, when_busy="wait")
    with gockpt.Checkpointer(model, optimizer, "ckpts", every=every, options=options) as saver:
        for step in range(1, 5):
            model(torch.ones(3)).sum().backward()
            optimizer.step()
            looked = len(devices.waited)
            saver.after_step(step)
            assert devices.waited[looked:] == [step]
    assert devices.updates == [optimizer] * 4


@pytest.mark.gpu
def test_an_update_on_a_side_stream_is_saved_by_a_call_on_the_default_one():
    model = torch.nn.Linear(512, 512, device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for step in (1, 2, 3):
        with torch.cuda.stream(side):
            optimizer.zero_grad()
            model(torch.ones(8, 512, device="cuda")).square().sum().backward()
            torch.cuda._sleep(100_000_000)
            optimizer.step()
        gockpt.save_overlapped(model, optimizer, "ckpts", step=step)
        gockpt.wait()
        torch.cuda.synchronize()
        with gockpt.open("ckpts", step) as saved:
            for name, value in model.state_dict().items():
                assert torch.equal(saved[f"model/{name}"][...], value.cpu()), (step, name)
