"""The next writer dies, or the power goes, while it tidies up after the first: still nothing is lost."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil

import pytest

from gockpt.storage.format import step_names
from gockpt.storage.local.filesystem import CALLS
from gockpt.storage.local.store import Store

pytestmark = pytest.mark.usefixtures("layout")

SCENARIOS = ["first", "next", "again", "prune"]


def prepare(store, scenario, sample):
    """Save what stands there before."""
    if scenario != "first":
        sample.save(store, 1, marker=1)
    if scenario == "prune":
        sample.save(store, 2, marker=2)


def act(store, scenario, sample):
    if scenario == "prune":
        store.prune(1)
    else:
        sample.save(store, 1 if scenario == "again" else 5, marker=9)


def bury(store):
    """Do what the kernel does for a process that is gone."""
    if store is not None:
        store._place.lock.release()
        with contextlib.suppress(OSError):
            os.close(store._place.fd)


def newest(seen):
    return seen[-1].marker if seen else None


@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_death_while_tidying_up_after_the_dead(scenario, stride, small_sample, checker, faults, scratch):
    """At every call of the second writer's opening, for many points where the first one died."""
    template = scratch / "template"
    with Store(template, fs=faults.NoWait()) as store:
        prepare(store, scenario, small_sample)
    fs = faults.Recorder()
    shutil.copytree(template, scratch / "count")
    with Store(scratch / "count", fs=fs) as store:
        act(store, scenario, small_sample)
        total = len(fs.calls)
    # The last calls are where names change.
    tried = 0
    for first in sorted({*range(0, total, 4 * stride), *range(total - 6, total)}):
        left = scratch / f"left-{first}"
        shutil.copytree(template, left)
        fs, store = faults.KilledAt(first, after=True), None
        with contextlib.suppress(faults.Killed):
            store = Store(left, fs=fs)
            act(store, scenario, small_sample)
        assert fs.dead
        fs.bury(store)
        before = newest(checker.examine(checker.read(left)))
        for second in itertools.count(first % stride, stride):
            path = scratch / "path"
            shutil.copytree(left, path)
            fs, store = faults.KilledAt(second, after=bool(second % 2)), None
            with contextlib.suppress(faults.Killed):
                store = Store(path, fs=fs)
            over, fs.at = not fs.dead, -1
            fs.bury(store)
            seen = checker.examine(checker.read(path))
            assert newest(seen) == before, (first, second)
            assert not any(one.problems for one in seen)
            with Store(path, fs=faults.NoWait()) as store:
                seen = checker.examine(checker.read(path))
                assert newest(seen) == before, (first, second)
                assert not any(one.problems for one in seen)
                kinds = {step_names.parse(name).kind for name in os.listdir(path) if name[0] == "s"}
                assert kinds <= {"step", "old"}
                assert not [name for name in os.listdir(path) if name.startswith(".trash")]
            shutil.rmtree(path)
            tried += 1
            if over:
                break
    assert tried > 20


def mortal(power, faults):
    """Return the model of a disk, under a process that ends right after its ``at``-th call."""

    class Mortal(power.Loss):
        at, made, dead = -1, 0, False

    def wrap(name):
        real = getattr(power.Loss, name)

        def method(self, *arguments, **keywords):
            if self.dead:
                if name == "close":
                    return real(self, *arguments, **keywords)
                raise faults.Killed
            result = real(self, *arguments, **keywords)
            self.dead = self.made == self.at
            self.made += 1
            if self.dead:
                if name == "open":
                    real_close(self, result)
                raise faults.Killed
            return result

        return method

    real_close = power.Loss.close
    for name in CALLS:
        setattr(Mortal, name, wrap(name))
    return Mortal


@pytest.mark.parametrize("whole", [True, False], ids=["syncfs", "each file"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_power_loss_while_tidying_up_after_the_dead(
    scenario, whole, small_sample, checker, power, faults, scratch
):
    """Whatever the disk could hold when the first one died, no later loss may leave anything else."""
    kind = mortal(power, faults)

    def play(path, at):
        os.mkdir(path)
        model = kind(path, whole=whole)
        with Store(path, fs=model) as store:
            prepare(store, scenario, small_sample)
        model.made, model.at = 0, at
        store = None
        with contextlib.suppress(faults.Killed):
            store = Store(path, fs=model)
            act(store, scenario, small_sample)
        model.total = model.made
        bury(store)
        return model

    total = play(scratch / "count", -1).total
    assert total > 20
    for first in sorted({*range(0, total, 24), *range(total - 6, total)}):
        path = scratch / f"path-{first}"
        model = play(path, first)
        assert model.dead
        allowed = {newest(checker.examine(tree)) for tree in model.outcomes(3).values()}
        wrong = []

        def look(model, call, first=first, allowed=allowed, wrong=wrong):
            for loss, tree in model.outcomes(1).items():
                seen = checker.examine(tree)
                if any(one.problems for one in seen) or newest(seen) not in allowed:
                    wrong.append((first, call, loss, newest(seen), allowed))

        model.dead, model.at, model.look = False, -1, look
        with Store(path, fs=model) as store:
            model.look = None
            small_sample.save(store, 8, marker=77)
            allowed.clear()
            allowed.add(77)  # durable
            look(model, "save")
            store.prune(1)
            look(model, "prune")
        assert not wrong, wrong[:3]
