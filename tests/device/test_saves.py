"""Saves of state on a device: a fake one, whose memory is the host's, and on which training runs at once."""

from __future__ import annotations

import threading

import pytest
import torch

import gockpt
from gockpt.core import arena_layout
from gockpt.core.array_spec import ArraySpec
from gockpt.saving.device_selection import CudaDevices

KB = 1024
FEW = 1 << 16
PLENTY = 1 << 26


class Run:
    """A loop whose every tick is kept as a deep copy, and whose stager is ready before it starts."""

    def __init__(self, *, build=None, ready=True, every=1, **options):
        torch.manual_seed(0)
        self.model, self.optimizers = (build or ordinary)()
        options = {"window": 1, "device_memory": FEW, "cpu_threads": 1, "nice": 0, **options}
        options = gockpt.Options(**{"when_busy": "wait", **options})
        self.saver = gockpt.Checkpointer(self.model, self.optimizers, "ckpts", every=every, options=options)
        self.step = 0
        self.moments = {}
        self.update()
        if ready:
            self.save().result(60)
            self.get_ready()

    def get_ready(self):
        """Wait until the stager, which is set up behind training, is ready."""
        assert self.saver._engine._tasks.submit([lambda: None]).done.wait(60)

    def update(self):
        for p in self.model.parameters():
            p.grad = torch.randn_like(p)
        for optimizer in self.optimizers:
            optimizer.step()

    def save(self):
        self.step += 1
        self.moments[self.step] = self.copied()
        self.last = self.saver.after_step(self.step)
        return self.last

    def copied(self):
        found = {f"model/{k}": v.clone() for k, v in self.model.state_dict().items()}
        names = {id(p): name for name, p in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for p, state in optimizer.state.items():
                found |= {f"optimizer/{names[id(p)]}/{k}": v.clone() for k, v in state.items()}
        return found

    def ticks(self, count):
        for _ in range(count):
            self.update()
            self.save()

    def check(self, *steps):
        for step in steps or gockpt.steps("ckpts"):
            assert gockpt.verify("ckpts", step).ok
            with gockpt.open("ckpts", step) as saved:
                for name, expected in self.moments[step].items():
                    found = saved[name][...]
                    assert found.dtype == expected.dtype
                    assert torch.equal(bits(found), bits(expected)), f"step {step}: {name}"


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def ordinary():
    model = torch.nn.Sequential(
        torch.nn.Linear(100, 300),
        torch.nn.BatchNorm1d(300),
        torch.nn.Linear(300, 128, bias=False).to(torch.bfloat16),
        torch.nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last),
        torch.nn.Linear(500, 90),
    )
    first, second = list(model[:3].parameters()), list(model[3:].parameters())
    return model, [
        torch.optim.AdamW(first, lr=0.01, foreach=False),
        torch.optim.SGD(second, lr=0.1, momentum=0.9),
    ]


@pytest.mark.parametrize("memory", [FEW, PLENTY], ids=["staging", "snapshot"])
@pytest.mark.parametrize("refuse", [None, 0], ids=["registered", "detour"])
def test_what_is_published_is_the_boundary(devices, memory, refuse):
    devices.settings = {"refuse": refuse}
    run = Run(device_memory=memory)
    run.ticks(3)
    variant = "staging, the copy engine, and a detour" if refuse == 0 else "staging and the copy engine"
    assert f"off the device: {variant}" in run.last.plan.explain()
    run.saver.close()
    assert gockpt.steps("ckpts") == [1, 2, 3, 4]
    run.check()
    device = devices.opened()
    state = sum(t.nbytes for t in run.moments[4].values())
    assert 2.5 * state < sum(device.copied) < 3 * state  # what is small is copied inside the call
    assert 0 < device.peak <= memory


def uneven():
    model = torch.nn.ParameterDict(
        {
            "narrow": torch.nn.Parameter(torch.randn(30_001, 3).to(torch.bfloat16)),
            "wide": torch.nn.Parameter(torch.randn(4_001, 5)),
        }
    )
    return model, [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)]


@pytest.mark.parametrize(
    ("memory", "window"),
    [(None, 1), (None, 2), (FEW, 1), (PLENTY, 1)],
    ids=["host", "host, a window", "staging", "snapshot"],
)
def test_chunks_that_begin_inside_a_word_of_a_fingerprint_are_saved(request, monkeypatch, memory, window):
    monkeypatch.setattr(arena_layout, "WHOLE_LIMIT", 70_000)
    monkeypatch.setattr(arena_layout, "CHUNK_TARGET", 70_001)
    if memory is not None:
        request.getfixturevalue("devices")
    run = Run(build=uneven, ready=memory is not None, device_memory=memory, window=window, every=window)
    run.ticks(2 * window)
    run.saver.close()
    chunks = {
        array.spec.name[-1]: [slot.row * array.spec.nbytes // array.spec.shape[0] % 8 for slot in array.slots]
        for array in arena_layout.lay_out(
            [ArraySpec(("narrow",), (30_001, 3), "bfloat16"), ArraySpec(("wide",), (4_001, 5), "float32")]
        ).arrays
    }
    assert any(chunks["narrow"])
    assert any(chunks["wide"])
    assert len(gockpt.steps("ckpts")) >= 2
    run.check()


@pytest.mark.parametrize("memory", [FEW, PLENTY], ids=["staging", "snapshot"])
def test_without_every_all_has_arrived_when_the_call_returns(devices, memory):
    """So nothing that changes right after it is in the save, which keeps its step."""
    run = Run(device_memory=memory, every=None)
    for _ in range(4):
        run.update()
        save = run.save()
        assert save.captured.done()
        with torch.no_grad():
            for p in run.model.parameters():
                p.data.mul_(2)
            for optimizer in run.optimizers:
                for state in optimizer.state.values():
                    for value in state.values():
                        value.data.add_(1)
        assert (save.result(60).step, save.attempts) == (run.step, 1)
    run.saver.close()
    assert gockpt.steps("ckpts") == [1, 2, 3, 4, 5]
    run.check()


@pytest.mark.parametrize("memory", [FEW, PLENTY], ids=["staging", "snapshot"])
def test_updates_go_on_while_state_is_on_its_way(devices, memory):
    run = Run(device_memory=memory, when_busy="skip")
    devices.gate.clear()
    run.update()
    save = run.save()
    for _ in range(4):  # the next ones are skipped
        run.update()
        assert run.save() is save
    assert not save.captured.done()
    captured = threading.Event()
    save.captured.add_done_callback(lambda _: captured.set())
    devices.gate.set()
    assert captured.wait(60)  # without another call
    assert save.result(60).step == 2
    run.ticks(1)
    run.saver.close()
    assert gockpt.steps("ckpts") == [1, 2, 7]
    run.check()


def test_a_change_behind_the_optimizers_back_is_not_published(devices):
    run = Run()
    devices.gate.clear()
    run.update()
    save = run.save()
    with torch.no_grad():
        for p in run.model.parameters():
            p.mul_(2)  # no hook sees that, and most has not left
    devices.gate.set()
    run.update()
    run.save()
    run.saver.wait()
    assert save.step == 3
    assert save.attempts == 2
    assert "changed before it was copied" in " ".join(save.events)
    run.ticks(2)
    run.saver.close()
    assert gockpt.steps("ckpts") == [1, 3, 4, 5]
    run.check()


@pytest.mark.parametrize("name", ["pack", "copy", "prints", "record", "wait", "allocate", "synchronize"])
@pytest.mark.parametrize("number", [0, 2])
def test_a_device_that_refuses_costs_no_more_than_a_step(devices, name, number, caplog):
    devices.settings = {"fail": {name: {number}}}
    run = Run()
    run.ticks(3)
    run.saver.close()
    failed = devices.opened().calls.get(name, -1) >= number
    assert failed
    assert caplog.text.count("state is copied inside the call from now on") == 1
    if number == 0:
        assert "off the device" not in run.last.plan.explain()
    assert set(gockpt.steps("ckpts")) >= {1, 3, 4}
    run.check()


def test_a_device_that_can_not_be_opened_is_left_alone(devices, monkeypatch, caplog):
    def broken(device):
        msg = "no driver"
        raise RuntimeError(msg)

    monkeypatch.setattr(devices, "open", broken)
    run = Run()
    run.ticks(2)
    run.saver.close()
    assert "off the device" not in run.last.plan.explain()
    assert "state on cpu is copied inside the call: RuntimeError: no driver" in caplog.text
    run.check()


def test_without_device_memory_no_device_is_asked(devices):
    run = Run(device_memory=None)
    run.ticks(2)
    run.saver.close()
    assert devices.made == []
    run.check()


def test_a_bound_of_host_memory_leaves_no_room_for_the_detour(devices):
    devices.settings = {"refuse": 0}
    run = Run(host_memory=1 << 26)
    run.ticks(2)
    run.saver.close()
    assert "off the device" not in run.last.plan.explain()
    assert devices.opened().copied == []
    run.check()


def test_a_state_that_grows_gets_another_stager(devices, caplog):
    run = Run()
    run.ticks(2)
    run.model.append(torch.nn.Linear(400, 400))
    run.optimizers[0].add_param_group({"params": run.model[-1].parameters()})
    run.ticks(1)
    run.get_ready()
    run.ticks(3)
    assert "off the device" in run.last.plan.explain()
    run.saver.close()
    first, second = devices.made
    assert first.copied
    assert second.copied
    assert "copied inside the call" not in caplog.text
    run.check()


@pytest.mark.parametrize("end", ["wait", "close", "abort"])
def test_a_save_ends_at_once_when_asked_to(devices, end):
    run = Run(device_memory=FEW)
    run.update()
    save = run.save()
    getattr(run.saver, end)()
    assert save.result(60).step == 2
    run.check()


def test_a_model_that_is_dropped_with_state_on_its_way_is_saved(devices):
    run = Run(device_memory=PLENTY)
    devices.gate.clear()
    run.update()
    save = run.save()
    devices.gate.set()
    saver, run.saver, run.model, run.optimizers = run.saver, None, None, None
    assert save.result(60).step == 2
    saver.close()
    run.check()


def test_cpu_state_has_no_cuda_device():
    assert CudaDevices().find([torch.zeros(3)]) is None
