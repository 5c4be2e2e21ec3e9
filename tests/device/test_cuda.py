"""The stager of a CUDA device: the same promises as on the fake one. Runs with `make gpu`."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

import gockpt
from gockpt.errors import SaveError
from gockpt.kernels.gradient16_launch import form_of, layout_of
from gockpt.kernels.gradient16_numba import narrow, quantise
from gockpt.replay import rules
from gockpt.replay.calibration_runs import lab_for
from gockpt.staging.arena import Arena
from gockpt.staging.device_budget import Room
from gockpt.staging.device_stager import DeviceStager
from gockpt.staging.stager import CopyRequest, Source, Urgency

pytestmark = pytest.mark.gpu

MB = 1 << 20
SIZES = [1, 7, 4096, 999_999, 3 * MB + 5, 20]
DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.complex64, torch.float8_e4m3fn]
VARIANTS = pytest.mark.parametrize("variant", ["staging", "direct", "detour"])


@pytest.fixture
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from gockpt.staging.cuda import CudaDevice

    return CudaDevice(torch.device("cuda", torch.cuda.current_device()))


@pytest.fixture
def made_stager(cuda):
    """Return what makes a stager and its arena; all of them are closed in the end."""
    made = []

    def make(variant="staging", *, room=None, nbytes=64 * MB, thread=False):
        if variant == "detour":

            def refuse(memory):
                msg = f"{memory.nbytes} bytes are refused, as a test asks for"
                raise RuntimeError(msg)

            cuda.register = refuse
        arena = Arena(nbytes)
        arena.data[:] = 9
        made.append(
            DeviceStager(
                cuda,
                [arena],
                room or Room(MB, 3, 0),
                direct=variant == "direct",
                thread=thread,
                copy_bytes=MB // 2,
                piece_bytes=16 * MB,
            )
        )
        return made[-1], arena

    yield make
    torch.cuda.synchronize()
    for one in made:
        one.close()


def tensors_of(sizes=SIZES, dtypes=DTYPES):
    random = torch.Generator(device="cuda").manual_seed(1)
    raw = [
        torch.randint(0, 256, (n * d.itemsize,), dtype=torch.uint8, device="cuda", generator=random)
        for n, d in zip(sizes, dtypes, strict=True)
    ]
    return [r.view(d) for r, d in zip(raw, dtypes, strict=True)]


def requests_of(tensors, owner="opt"):
    found, end = [], 0
    for tensor in tensors:
        found.append(CopyRequest(Source(tensor, 0, tensor.nbytes, 0), 0, end, owner))
        end += -(-tensor.nbytes // 64) * 64
    return found


def bytes_of(tensor):
    return tensor.view(torch.uint8).cpu().numpy()


def bits_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def overwrite(tensors):
    for tensor in tensors:
        tensor.view(torch.uint8).fill_(0)


def check(arena, requests, before):
    for request, content in zip(requests, before, strict=True):
        assert np.array_equal(arena.view(request.offset, request.source.nbytes), content)


@VARIANTS
@pytest.mark.parametrize("urgency", list(Urgency), ids=lambda urgency: urgency.name)
def test_what_arrives_is_the_boundary(made_stager, variant, urgency):
    stager, arena = made_stager(variant, room=Room(MB, 3, 5 * MB))
    tensors = tensors_of()
    for _ in range(3):
        for tensor in tensors:
            tensor.view(torch.uint8).random_(0, 256)
        before = [bytes_of(t) for t in tensors]
        requests = requests_of(tensors)
        sent = stager.copy(requests, urgency)
        if urgency in (Urgency.STATE, Urgency.SNAPSHOT):
            stager.guard({"opt"})
        overwrite(tensors)
        stager.finish(sent)
        assert sent.proven
        check(arena, requests, before)
        assert (arena.data[requests[-1].offset + requests[-1].source.nbytes :] == 9).all()


@VARIANTS
def test_work_that_is_queued_before_the_boundary_is_in_it(made_stager, variant):
    stager, arena = made_stager(variant)
    a = torch.randn(4096, 4096, device="cuda")
    tensor = torch.zeros(4096, 64, device="cuda")
    torch.cuda.synchronize()
    for _ in range(20):
        a = a @ a
        a = a / a.abs().max()
    tensor.copy_(a[:, :64])
    sent = stager.copy(requests_of([tensor]), Urgency.STATE)
    stager.guard({"opt"})
    after = tensor.clone()
    tensor.zero_()
    stager.finish(sent)
    assert sent.proven
    assert np.array_equal(arena.view(0, after.nbytes), bytes_of(after.reshape(-1)))


def test_a_change_that_nobody_guards_is_seen(made_stager):
    stager, _ = made_stager()
    tensors = tensors_of()
    sent = stager.copy(requests_of(tensors), Urgency.STATE)
    overwrite(tensors[3:4])  # nothing leaves before finish(): there is no thread
    stager.finish()
    assert [request.source.memory.numel() for request in sent.lost] == [SIZES[3]]


@pytest.mark.parametrize("variant", ["staging", "direct"])
def test_send_and_guard_do_not_wait_for_the_device(made_stager, variant):
    stager, arena = made_stager(variant)
    tensors = tensors_of()
    stager.finish(stager.copy(requests_of(tensors), Urgency.STATE))  # compiles the kernels
    before = [bytes_of(t) for t in tensors]
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    asleep = torch.cuda.Event()
    asleep.record()
    requests = requests_of(tensors)
    sent = stager.copy(requests, Urgency.STATE)
    stager.guard({"opt"})
    overwrite(tensors)
    assert not asleep.query()
    stager.finish(sent)
    assert sent.proven
    check(arena, requests, before)


def test_the_arena_is_registered_and_let_go(made_stager):
    stager, arena = made_stager()
    assert torch.from_numpy(arena.view(20 * MB, MB)).is_pinned()
    assert stager.variant == "staging and the copy engine"
    stager.close()
    assert not torch.from_numpy(arena.view(20 * MB, MB)).is_pinned()


def test_a_refused_registration_does_not_fail_the_next_launch(cuda):
    arena = Arena(MB)
    cuda.register(arena.data)
    try:
        with pytest.raises(RuntimeError, match="cudaHostRegister of 1048576 bytes failed with CUDA error"):
            cuda.register(arena.data)
        assert torch.ones(3, device="cuda").sum().item() == 3
    finally:
        cuda.unregister(arena.data)


@VARIANTS
def test_device_memory_stays_within_its_room(made_stager, variant):
    room = Room(MB, 3, 8 * MB)
    stager, _ = made_stager(variant, room=room)
    tensors = tensors_of([5 * MB, 4 * MB], [torch.float32, torch.bfloat16])
    requests = requests_of(tensors)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for urgency in (Urgency.STATE, Urgency.SNAPSHOT, Urgency.GRADIENT):
        sent = stager.copy(requests, urgency)
        stager.guard(None)
        stager.finish(sent)
        del sent
    tables = 2 * sum(t.nbytes for t in tensors) // 1000 + 64 * 1024
    assert torch.cuda.max_memory_allocated() - before <= room.nbytes + tables
    stager.close()
    assert torch.cuda.memory_allocated() == before


def test_a_thread_receives_what_lands(made_stager):
    stager, arena = made_stager(thread=True)
    tensors, told = tensors_of(), threading.Event()
    before = [bytes_of(t) for t in tensors]
    requests = requests_of(tensors)
    sent = stager.copy(requests, Urgency.STATE, on_done=told.set)
    stager.guard({"opt"})
    overwrite(tensors)
    assert told.wait(60)
    assert sent.proven
    check(arena, requests, before)


def test_inside_a_graph_nothing_is_queued(made_stager):
    stager, arena = made_stager()
    tensors = tensors_of()
    before = [bytes_of(t) for t in tensors]
    requests = requests_of(tensors)
    sent = stager.copy(requests, Urgency.STATE)
    x = torch.zeros(3, device="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
        stager.guard({"opt"})
        with pytest.raises(SaveError, match="a graph is being captured"):
            stager.copy(requests, Urgency.GRADIENT)
    assert stager.graphed
    stager.finish(sent)
    graph.replay()
    assert x.sum().item() == 3
    assert sent.proven
    check(arena, requests, before)


def test_dense_tensors_leave_in_storage_order(made_stager):
    stager, arena = made_stager()
    tensor = torch.randn(2, 3, 40, 50, device="cuda").to(memory_format=torch.channels_last)
    sent = stager.copy(requests_of([tensor]), Urgency.STATE)
    stager.finish(sent)
    assert sent.proven
    flat = tensor.permute(0, 2, 3, 1).reshape(-1)
    assert np.array_equal(arena.view(0, flat.nbytes), bytes_of(flat))


def test_stages_are_seen_in_profiles(made_stager):
    stager, _ = made_stager()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sent = stager.copy(requests_of(tensors_of()), Urgency.STATE)
        stager.guard(None)
        stager.finish(sent)
    seen = {event.key for event in profile.key_averages()}
    assert {f"gockpt {name}" for name in ("boundary", "guard", "pack", "copy", "arrival")} <= seen


@pytest.mark.parametrize("memory", [1 << 16, 1 << 28], ids=["staging", "snapshot"])
def test_saves_of_a_model_on_a_device_are_the_boundary(cuda, memory):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(1000, 3000),
        torch.nn.BatchNorm1d(3000),
        torch.nn.Linear(3000, 500).to(torch.bfloat16),
        torch.nn.Conv2d(64, 64, 3).to(memory_format=torch.channels_last),
    ).to("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    names = {id(p): name for name, p in model.named_parameters()}
    options = gockpt.Options(device_memory=memory, when_busy="wait", window=1)
    moments = {}
    with gockpt.Checkpointer(model, optimizer, "ckpts", options=options) as saver:
        for step in range(1, 7):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
            moments[step] = {f"model/{k}": v.cpu() for k, v in model.state_dict().items()}
            for p, state in optimizer.state.items():
                moments[step] |= {f"optimizer/{names[id(p)]}/{k}": v.cpu() for k, v in state.items()}
            save = saver.after_step(step)
            if step == 1:  # the stager is set up behind it
                assert saver._engine._tasks.submit([lambda: None]).done.wait(60)
        assert "off the device: staging and the copy engine" in save.plan.explain()
    assert gockpt.steps("ckpts") == list(range(1, 7))
    for step, moment in moments.items():
        assert gockpt.verify("ckpts", step).ok
        with gockpt.open("ckpts", step) as saved:
            for name, expected in moment.items():
                found = saved[name][...]
                assert found.dtype == expected.dtype
                same = (
                    found.reshape(-1).view(torch.uint8),
                    expected.contiguous().reshape(-1).view(torch.uint8),
                )
                assert torch.equal(*same), f"step {step}: {name}"


OPTIMIZERS = {
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, foreach=False),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01),
    "fused": lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.01),
}


class Training:
    """A model on the device, trained in windows, with a copy of every tick."""

    def __init__(self, kind, window, *, memory=1 << 22, every=8, **options):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(1000, 300), torch.nn.BatchNorm1d(300), torch.nn.Linear(300, 1000)
        ).to("cuda")
        self.optimizer = OPTIMIZERS[kind](self.model.parameters())
        options = gockpt.Options(device_memory=memory, when_busy="wait", window=window, **options)
        self.saver = gockpt.Checkpointer(self.model, self.optimizer, "ckpts", every=every, options=options)
        self.every, self.step, self.moments, self.handles = every, 0, {}, []

    def update(self):
        self.optimizer.zero_grad()
        self.model(torch.randn(64, 1000, device="cuda")).square().mean().backward()
        self.optimizer.step()

    def replayable(self):
        """Whether a formula of this optimizer is known on this device."""
        group, p = self.optimizer.param_groups[0], self.model[0].weight
        state, lab = self.optimizer.state[p], lab_for(p.device)
        return isinstance(rules.rule_for(self.optimizer, group, p, state, lab), rules.Rule)

    def moment(self):
        names = {id(p): name for name, p in self.model.named_parameters()}
        found = {f"model/{k}": v.cpu() for k, v in self.model.state_dict().items()}
        for p, state in self.optimizer.state.items():
            found |= {
                f"optimizer/{names[id(p)]}/{k}": v.cpu() for k, v in state.items() if torch.is_tensor(v)
            }
        return found

    def tick(self):
        self.step += 1
        self.moments[self.step] = self.moment()
        handle = self.saver.after_step(self.step)
        if handle is not None and handle not in self.handles:
            self.handles.append(handle)

    def run(self, ticks, *, settle=False):
        for _ in range(ticks):
            self.update()
            self.tick()
            if settle:  # what is made behind training is there for the next tick
                assert self.saver._engine._tasks.submit([lambda: None]).done.wait(60)
        return self

    def finish(self):
        self.saver.close()
        for step in gockpt.steps("ckpts"):
            assert gockpt.verify("ckpts", step).ok
            with gockpt.open("ckpts", step) as saved:
                for name, expected in self.moments[step].items():
                    found = saved[name][...].contiguous().reshape(-1).view(torch.uint8)
                    assert torch.equal(found, expected.contiguous().reshape(-1).view(torch.uint8)), name
        return [handle.result(60) for handle in self.handles]


@pytest.mark.parametrize("worker", ["thread", "process"])
@pytest.mark.parametrize("window", [2, 4])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_windows_off_a_device_end_at_the_boundary(cuda, kind, window, worker):
    training = Training(kind, window, worker=worker).run(8, settle=True)
    expected = window if training.replayable() else 1
    saved = training.run(16).finish()
    assert [(s.window, s.attempts) for s in saved[1:]] == [(expected, 1), (expected, 1)]
    assert not any(s.late_parts for s in saved[1:]) or expected == 1


def test_steps_that_a_scaler_skips_on_a_device(cuda):
    training = Training("fused", 4).run(8, settle=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=3)

    def update():
        training.optimizer.zero_grad()
        loss = training.model(torch.randn(64, 1000, device="cuda")).square().mean()
        if training.step % 3 == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(training.optimizer)
        scaler.update()

    training.update = update
    saved = training.run(16).finish()
    assert [s.attempts for s in saved] == [1, 1, 1]


def test_hooks_of_a_window_do_not_wait_for_the_device(cuda):
    training = Training("adamw", 4).run(16, settle=True)
    training.run(5)  # a window is open
    training.optimizer.zero_grad()
    training.model(torch.randn(64, 1000, device="cuda")).square().mean().backward()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    asleep = torch.cuda.Event()
    asleep.record()
    training.optimizer.step()
    assert not asleep.query()
    training.tick()
    training.run(2).finish()


def test_an_update_that_runs_as_a_graph_is_exact(cuda):
    training = Training("adamw", 4).run(8, settle=True)
    training.saver.wait()
    for group in training.optimizer.param_groups:
        group["capturable"] = True
    for state in training.optimizer.state.values():
        state["step"] = state["step"].to("cuda")
    static = torch.randn(64, 1000, device="cuda")
    training.optimizer.zero_grad()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        training.model(static).square().mean().backward()
        training.optimizer.step()
        with pytest.raises(gockpt.UsageError, match="a CUDA graph is being captured"):
            training.saver.after_step(9)

    training.update = graph.replay
    training.run(17)
    training.saver.wait()
    training.finish()


@pytest.mark.parametrize("encoding", ["fp16", "bf16"])
def test_gradients_are_encoded_on_the_way(made_stager, encoding):
    """What arrives is what the host would have written; what is queued later does not touch it."""
    stager, arena = made_stager(room=Room(MB, 3, 0))
    for _ in range(3):
        tensors = [torch.randn(n, device="cuda") for n in (400_000, 70_000, 5_000, 1_024)]
        odd = torch.randn(9_001, device="cuda")[1:]  # at no multiple of 16 bytes
        tensors[1][5] = float("inf")
        requests, end = [], 0
        for number, tensor in enumerate([*tensors, odd]):
            form = form_of(encoding, tensor.numel())
            source = Source(tensor, 0, tensor.nbytes, (number + 1) << 40)
            requests.append(CopyRequest(source, 0, end, None, form))
            end += -(-form.nbytes // 64) * 64
        before = [tensor.cpu().numpy() for tensor in [*tensors, odd]]
        sent = stager.copy(requests, Urgency.GRADIENT)
        overwrite([*tensors, odd])
        stager.finish(sent)
        assert sent.proven
        for request, values in zip(requests, before, strict=True):
            found = arena.view(request.offset, request.nbytes)
            if encoding == "bf16":
                expected = np.empty(values.size, np.uint16)
                narrow(values, expected)
                assert np.array_equal(found.view(np.uint16), expected)
                continue
            message = layout_of(request.nbytes, values.size)
            expected = np.zeros(request.nbytes, np.uint8)
            quantise(values, message, expected)
            assert message.incomplete(found) == message.incomplete(expected) == 0
            for low, size in (
                (message.codes, message.blocks),
                (message.slots, 4 * message.blocks),
                (message.values, 2 * values.size),
            ):
                assert np.array_equal(found[low : low + size], expected[low : low + size])


@pytest.mark.parametrize("encoding", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_windows_with_gradients_in_16_bits_are_near_and_say_so(cuda, kind, encoding):
    training = Training(kind, 4, grad_dtype=encoding).run(8, settle=True)
    replayed = training.replayable()
    training.run(16).saver.close()
    saved = [handle.result(60) for handle in training.handles][1:]
    assert [s.attempts for s in saved] == [1, 1]
    assert all(s.exact is not replayed for s in saved)
    for one in saved:
        with gockpt.open("ckpts", one.step) as found:
            for name, expected in training.moments[one.step].items():
                got = found[name][...]
                if name in found.metadata.inexact:
                    assert (got - expected).abs().max() <= 100 * one.deviation.max_abs
                else:
                    assert torch.equal(bits_of(got), bits_of(expected))
