"""Optimizers that are wrapped, patched, hooked, subclassed or stepped oddly: seen or not, always exact."""

from __future__ import annotations

import types

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import gockpt

EVERY, WINDOW = 5, 4
RUN = 2 * EVERY + 1


def model_of(harness):
    return harness.Tensors({"a": torch.randn(1500), "b": torch.randn(40, 41)})


def gradients(model, scale=1.0):
    for p in model.parameters():
        p.grad = torch.randn_like(p) * scale


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05)


@pytest.fixture
def run(harness):
    """Run a loop whose optimizer is prepared by ``prepare`` and stepped by ``step``."""

    def go(*, make=adamw, prepare=None, step=None, late=False, ticks=RUN, fresh=None, **options):
        prepared = []

        def build():
            model = model_of(harness)
            return model, (fresh or make)(model) if prepared else make(model)

        def update(model, optimizer, number):
            gradients(model)
            (step or (lambda _, o, __: o.step()))(model, optimizer, number)

        with harness.closing():
            loop = harness.Loop(build, update, every=EVERY, window=WINDOW, **options)
            if prepare is not None and not late:
                prepare(loop.model, loop.optimizer)
            for _ in range(ticks):
                loop.tick()
                if prepare is not None and late and loop.step == 1:
                    prepare(loop.model, loop.optimizer)
            prepared.append(True)
            return loop.finish()

    return go


def check(saved, *, replayed=None, attempts=1):
    """Nothing was lost; with ``attempts`` above 1 a save may have had to move to a later step."""
    assert len(saved) == 2
    for result, due in zip(saved, (EVERY, 2 * EVERY), strict=True):
        assert result.attempts <= attempts
        assert (result.step == due) == (result.attempts == 1)
        assert due <= result.step <= due + EVERY
    if replayed is not None:
        for result in saved:
            assert (result.window == WINDOW and not result.late_parts) == replayed


# -- other hooks beside ours, registered before and after


def clamp(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.data.clamp_(-0.5, 0.5)


def scale_gradients(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad.mul_(0.5)


def other_rate(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        group["lr"] *= 0.9


def drop_gradients(optimizer, args, kwargs):
    optimizer.zero_grad()


def zero_gradients(optimizer, args, kwargs):
    optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("late", [False, True], ids=["before ours", "after ours"])
@pytest.mark.parametrize("hook", [clamp, scale_gradients, other_rate])
def test_a_pre_hook_that_changes_what_the_step_sees(run, hook, late):
    saved = run(prepare=lambda m, o: o.register_step_pre_hook(hook), late=late)
    check(saved)
    if hook is not clamp:
        check(saved, replayed=True)  # gradients and rates are taken as the step consumed them


@pytest.mark.parametrize("late", [False, True], ids=["before ours", "after ours"])
@pytest.mark.parametrize("hook", [clamp, scale_gradients, other_rate, drop_gradients, zero_gradients])
def test_a_post_hook_that_changes_what_the_step_left(run, hook, late):
    saved = run(prepare=lambda m, o: o.register_step_post_hook(hook), late=late)
    check(saved)
    if hook in (drop_gradients, zero_gradients, scale_gradients):
        check(saved, replayed=True)  # ours comes first


@pytest.mark.parametrize("hook", [clamp, drop_gradients])
def test_global_hooks(run, hook):
    handle = register_optimizer_step_post_hook(hook)
    try:
        check(run())
    finally:
        handle.remove()


# -- steps that the hooks don't see, or see twice


def test_step_replaced_on_the_instance(run):
    def own_step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad, alpha=0.01)

    def prepare(model, optimizer):
        optimizer.step = types.MethodType(own_step, optimizer)

    # Nothing holds such an update back while a copy is under way: then it is taken again, at once.
    check(run(prepare=prepare), attempts=2)
    check(run(prepare=prepare, late=True), attempts=2)


def test_step_replaced_inside_the_window(run):
    """The window began with replay in mind; from its second tick on nobody tells of updates."""

    def step(model, optimizer, number):
        if number in (4, 9):
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=0.01)
        else:
            optimizer.step()

    check(run(step=step), replayed=False)


def test_step_wrapped_to_do_more_afterwards(run):
    def prepare(model, optimizer):
        real = optimizer.step

        def step(*args, **kwargs):
            result = real(*args, **kwargs)
            clamp(optimizer, (), {})
            return result

        optimizer.step = step

    check(run(prepare=prepare))
    check(run(prepare=prepare, late=True))


class Clamping(torch.optim.AdamW):
    def step(self, closure=None):
        result = super().step(closure)
        clamp(self, (), {})
        return result


class Renamed(torch.optim.AdamW):
    pass


def test_a_subclass_that_does_more_after_the_step(run):
    check(run(make=lambda m: Clamping(m.parameters(), lr=0.05)))


def test_a_subclass_that_changes_nothing(run):
    check(run(make=lambda m: Renamed(m.parameters(), lr=0.05)))


def test_several_steps_between_two_ticks_and_none(run):
    """A tick may stand for any number of updates; each of them is replayed."""
    counts = {1: 1, 2: 3, 3: 0, 4: 2, 5: 0, 6: 1, 7: 0, 8: 0, 9: 4}

    def step(model, optimizer, number):
        for _ in range(counts.get(number, 1)):
            gradients(model)
            optimizer.step()

    check(run(step=step), replayed=True)


def test_the_gradient_is_replaced_between_backward_and_step(run):
    def step(model, optimizer, number):
        for p in model.parameters():
            p.grad = p.grad.clone() * 2
        optimizer.step()

    check(run(step=step), replayed=True)


def test_the_gradient_is_overwritten_right_after_the_step(run):
    def step(model, optimizer, number):
        optimizer.step()
        for p in model.parameters():
            p.grad.fill_(float("nan"))

    check(run(step=step), replayed=True)


def test_expanded_and_transposed_gradients(run):
    """Autograd gives such gradients for sums and transposed products."""

    def step(model, optimizer, number):
        model.a.grad = torch.randn(1).expand(1500)
        model.b.grad = torch.randn(41, 40).t()
        optimizer.step()

    check(run(step=step))


def test_a_closure_gives_the_gradients(run):
    def step(model, optimizer, number):
        optimizer.zero_grad()

        def closure():
            gradients(model)
            return torch.tensor(1.0)

        optimizer.step(closure)

    check(run(step=step), replayed=True)


def test_a_closure_with_foreach_nesterov(run):
    """torch writes into .grad there, and what the closure made is nowhere to be seen."""

    def step(model, optimizer, number):
        def closure():
            gradients(model)
            return torch.tensor(1.0)

        optimizer.step(closure)

    check(run(
        make=lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True, foreach=True),
        step=step,
    ), attempts=2)  # fmt: skip


def test_an_optimizer_in_a_wrapper(run, harness):
    """Delegating wrappers (Accelerate, Lightning) hold the real one inside."""

    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            self.optimizer.step()

    with harness.closing():
        model = model_of(harness)
        inner = adamw(model)
        wrapper = Wrapper(inner)
        path = harness.directory()
        options = gockpt.Options(window=WINDOW)
        for number in range(1, EVERY + 1):
            gradients(model)
            wrapper.step()
            handle = gockpt.save_overlapped(model, wrapper, path, step=number, every=EVERY, options=options)
        moment = harness.take(EVERY, model, inner)
        result = handle.result(30)
    assert result.window == WINDOW
    assert not result.late_parts
    harness.check_open(path, moment)


def test_one_optimizer_per_parameter_stepped_inside_backward(harness):
    """Optimizer-in-backward: hooks run on autograd's threads, gradients are gone after each."""

    def build():
        model = torch.nn.Sequential(torch.nn.Linear(40, 50), torch.nn.ReLU(), torch.nn.Linear(50, 30))
        optimizers = [torch.optim.AdamW([p], lr=0.01) for p in model.parameters()]
        return model, optimizers

    def update(model, optimizers, number):
        if number == 1:
            for p, optimizer in zip(model.parameters(), optimizers, strict=True):

                def step(parameter, optimizer=optimizer):
                    optimizer.step()
                    optimizer.zero_grad()

                p.register_post_accumulate_grad_hook(step)
        model(torch.randn(8, 40)).square().mean().backward()

    with harness.closing(), harness.counting() as replayed:
        loop = harness.Loop(build, update, every=EVERY, window=WINDOW)
        saved = loop.run(RUN).finish()
    check(saved)
    assert replayed["updates"] > 0


def test_two_optimizers_on_one_parameter(harness):
    def build():
        model = model_of(harness)
        return model, [adamw(model), torch.optim.SGD([model.a], lr=0.01, momentum=0.5)]

    def update(model, optimizers, number):
        for optimizer in optimizers:
            gradients(model)
            optimizer.step()

    with harness.closing():
        loop = harness.Loop(build, update, every=EVERY, window=WINDOW)
        gockpt_handles = loop.run(RUN).handles
        gockpt.wait()
        for handle in gockpt_handles:
            moment = loop.moments[handle.result(30).step]
            assert gockpt.verify(loop.path, moment.step).ok
            with gockpt.open(loop.path, moment.step) as found:
                for name in ("model/a", "model/b", "optimizer/b/exp_avg"):
                    harness.same(found[name][...], moment.arrays[name], name)
            harness.check_load(loop.path, moment, *build())


def test_adversarial_training_with_two_optimizers(harness):
    """A GAN: the discriminator steps more often than the generator, each has its own optimizer."""

    def build():
        generator, critic = torch.nn.Linear(20, 60), torch.nn.Linear(60, 10)
        return [generator, critic], [
            torch.optim.Adam(generator.parameters(), lr=1e-2, betas=(0.5, 0.9)),
            torch.optim.SGD(critic.parameters(), lr=1e-2, momentum=0.9, nesterov=True),
        ]

    def update(models, optimizers, number):
        generator, critic = models
        for turn in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = critic(generator(torch.randn(4, 20))).mean()
            (loss if turn else -loss).backward()
            optimizers[bool(turn)].step()
            with torch.no_grad():
                for p in critic.parameters():
                    p.clamp_(-0.05, 0.05)

    with harness.closing():
        loop = harness.Loop(build, update, every=EVERY, window=WINDOW)
        saved = loop.run(RUN).finish()
    check(saved)
    assert saved[1].window == WINDOW


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Dynamo")  # the compiler's own
def test_compiled_step(run):
    """A compiled step rounds as it likes and runs no hooks: nothing of it is replayed, the copy is exact."""

    def prepare(model, optimizer):
        optimizer.step = torch.compile(optimizer.step, backend="eager")

    check(run(prepare=prepare), attempts=2)
