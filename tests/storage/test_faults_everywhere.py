"""Every call that a writer makes, from its first look at the path to its last close, fails once.

Which calls there are is not written down here: a first run counts them, and all that the seam knows must be
among them. So a new call can't be forgotten.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace

import pytest

from gockpt.errors import GockptError, StorageError
from gockpt.storage.format import step_names
from gockpt.storage.local import owner
from gockpt.storage.local.filesystem import CALLS
from gockpt.storage.local.store import Store
from gockpt.storage.read import find

# ENOENT is not among them: it is no refusal but an answer. The tests below make it true instead.
CODES = (
    *(errno.ENOSPC, errno.EIO, errno.EINTR, errno.EMFILE),
    *(errno.EROFS, errno.ESTALE, errno.EACCES, errno.EDQUOT),
)
FINAL = {"pwrite", "ftruncate", "syncfs", "mkdir", "exchange", "rename_new", "direct_alignment"}
"""What may never fail unnoticed, wherever it is called."""
ARRAYS = (
    (("model", "large"), (1500,), "float32", 1500),  # is reserved first
    (("model", "w"), (5, 3), "bfloat16", 4),
    (("scale",), (), "float64", 1),
)
ONLY_IN_DIRECTORIES = {"mkdir", "syncfs", "syncfs_reports_errors"}
pytestmark = pytest.mark.usefixtures("layout")
DEAD = replace(owner.myself(), boot="another boot")


@pytest.fixture(scope="module")
def few(sampling):
    return sampling.make(ARRAYS)


@pytest.fixture(autouse=True)
def _makes_every_call_for_small_things(monkeypatch):
    monkeypatch.setattr("gockpt.storage.local.transaction._HEARTBEAT_SECONDS", 0.0)
    monkeypatch.setattr("gockpt.storage.local.chunk_writer._RESERVE_FROM", 4096)
    monkeypatch.setattr("gockpt.storage.local.chunk_writer.DIRECT_FROM", 4096)
    monkeypatch.setattr("gockpt.storage.local.partial_archive._RESERVE_FROM", 4096)
    monkeypatch.setattr("gockpt.storage.local.page_writer.DIRECT_FROM", 4096)
    monkeypatch.setattr("gockpt.storage.local.page_writer._GATHER_BELOW", 4096)


@pytest.fixture
def template(few, faults, scratch):
    """A path with a checkpoint, and with what a writer that died left: a partial, and trash."""
    path = scratch / "template"
    with Store(path, fs=faults.NoWait()) as store:
        few.save(store, 1, marker=1)
    attempt = "00ff" * 8
    (path / step_names.of_partial(3, attempt) / "model").mkdir(parents=True)
    (path / step_names.of_owner(attempt)).write_bytes(owner.encode(DEAD))
    (path / step_names.of_trash("11ff" * 8) / "model").mkdir(parents=True)
    (path / step_names.of_trash("11ff" * 8) / "file").write_text("x")
    return path


class Life:
    """One writer's whole life; ``newest`` is the marker of the last save that it was told is durable.

    Attributes:
        doing: What is being tried.
        errors: What went wrong, by what was being done.
        seen: The checkpoints that were there right after that.
        then: What ``newest`` was at that moment.
    """

    def __init__(self, path, sample, fs, checker=None):
        self.path, self.sample, self.fs, self.checker = path, sample, fs, checker
        self.newest, self.doing = 1, ""
        self.errors, self.seen, self.then = {}, [], 1

    def live(self):
        try:
            self.doing = "open"
            store = Store(self.path, fs=self.fs)
        except GockptError as error:
            self.errors["open"] = error
            return
        with store:
            for doing, act in (
                ("next", lambda: self.sample.save(store, 2, marker=2)),
                ("again", lambda: self.sample.save(store, 1, marker=3)),
                ("abort", lambda: self.give_up(store)),
                ("prune", lambda: store.prune(1)),
                ("last", lambda: self.sample.save(store, 5, marker=4)),
            ):
                self.doing = doing
                try:
                    act()
                except GockptError as error:
                    self.errors[doing] = error
                    self.seen = self.checker.examine(self.checker.read(self.path))
                    self.then = self.newest
                else:
                    self.newest = {"next": 2, "again": 3, "last": 4}.get(doing, self.newest)

    def give_up(self, store):
        with self.sample.begin(store, 8, 8) as transaction:
            self.sample.write(transaction, 8)


class Whole:
    """Mixed into a file system of the tests: it is one that has ``syncfs`` and direct I/O."""

    def open(self, name, flags, *, dir_fd=None):
        return super().open(name, flags & ~os.O_DIRECT, dir_fd=dir_fd)

    def direct_alignment(self, fd):
        super().direct_alignment(fd)
        return 4096

    def syncfs_reports_errors(self, fd):
        super().syncfs_reports_errors(fd)
        return True


def count(template, few, faults, scratch):
    """Return the names of all calls of a life in which nothing fails."""

    class Recorder(Whole, faults.Recorder):
        pass

    shutil.copytree(template, scratch / "count")
    fs = Recorder()
    life = Life(scratch / "count", few, fs)
    life.live()
    assert (life.newest, life.errors) == (4, {})
    return fs.names


def check(path, life, few, checker, faults):
    """Look at what a life with one failure left behind, and go on after it."""
    seen = checker.examine(checker.read(path))
    assert not any(one.problems for one in seen)
    assert seen[-1].marker == life.newest
    with Store(path, fs=faults.NoWait()) as store:
        few.save(store, 6, marker=66)
        left = sorted(os.listdir(path))
    assert all(name == step_names.LOCK_FILE or name.startswith("step-") for name in left), left
    assert not [name for name in left if ".partial-" in name]
    with find.open_checkpoint(path) as newest:
        assert newest.state() == {"marker": 66}


@pytest.mark.parametrize(
    "offset", [0, *(pytest.param(n, marks=pytest.mark.soak) for n in range(1, len(CODES)))]
)
def test_each_call_of_a_writers_life_fails_once(offset, layout, template, few, checker, faults, scratch):
    class Failing(Whole, faults.FailingAt):
        pass

    calls = Counter(count(template, few, faults, scratch))
    assert set(CALLS) - set(calls) == (ONLY_IN_DIRECTORIES if layout == "file" else set())
    codes = itertools.cycle(CODES[offset:] + CODES[:offset])
    outcomes, late = Counter(), Counter()
    for call in CALLS:
        for number in range(calls[call]):
            code = next(codes)
            path = scratch / "path"
            shutil.copytree(template, path)
            descriptors = len(os.listdir("/proc/self/fd"))
            fs = Failing(number, code, only=call)
            life = Life(path, few, fs, checker)
            life.live()
            where = (call, number, errno.errorcode[code], life.errors)
            assert fs.hit == call, where
            assert len(os.listdir("/proc/self/fd")) == descriptors, where
            assert len(life.errors) <= 1, where  # one failure, one error: the store goes on
            doing = None
            for doing, error in life.errors.items():
                assert isinstance(error, StorageError), where
                assert str(path) in str(error), where
                assert os.strerror(code) in str(error), where
                assert errno.errorcode[code] in str(error), where
                assert error.__cause__.errno == code, where
                outcomes[doing] += 1
            if call in FINAL and (call, code) != ("pwrite", errno.EINTR):  # that one is asked again
                assert life.errors, where
            # A path that could not even be opened is as it was; else all later saves came through.
            assert life.newest == (1 if "open" in life.errors else 3 if "last" in life.errors else 4), where
            if life.seen:
                assert not any(one.problems for one in life.seen), where
                if life.seen[-1].marker != life.then:
                    # Published, but not known to be durable: its last sync failed.
                    expected = {"next": 2, "again": 3, "last": 4}[doing]
                    assert (call, life.seen[-1].marker) == ("fsync", expected), where
                    late[doing] += 1
            if doing == "last":
                life.newest = life.seen[-1].marker
            check(path, life, few, checker, faults)
            shutil.rmtree(path)
    assert set(outcomes) == {"open", "next", "again", "abort", "prune", "last"}
    assert outcomes["next"] > (20 if layout == "file" else 40)
    assert late == {"next": 1, "again": 1, "last": 1}


@pytest.mark.parametrize("behaviour", ["one byte less", "half", "nothing", "all but ENOSPC"])
def test_each_write_is_cut_short_once(behaviour, layout, template, few, checker, faults, scratch):
    class Short(Whole, faults.Interposer):
        count, at, hit = 0, -1, False

        def around(self, name, call, arguments, dir_fd):
            if name != "pwrite":
                return call()
            self.count += 1
            fd, data, offset = arguments
            size = {"one byte less": len(data) - 1, "half": len(data) // 2}.get(behaviour, 0)
            if self.count - 1 == self.at:
                self.hit = True
                if behaviour == "all but ENOSPC":
                    os.pwrite(fd, memoryview(data)[: len(data) // 2], offset)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                # Direct I/O must stay aligned: what is left of it goes through the cache.
                return os.pwrite(fd, memoryview(data)[: size // 4096 * 4096 or size], offset) if size else 0
            return call()

    writes = Counter(count(template, few, faults, scratch))["pwrite"]
    assert writes > (8 if layout == "file" else 20)
    for number in range(writes):
        path = scratch / "path"
        shutil.copytree(template, path)
        fs = Short()
        fs.at = number
        life = Life(path, few, fs, checker)
        life.live()
        assert fs.hit
        failed = [doing for doing in life.errors if doing != "open"]
        assert len(failed) <= 1
        if behaviour in ("one byte less", "half"):
            assert not life.errors
        else:
            assert all(str(path) in str(error) for error in life.errors.values())
            assert len(life.errors) == 1
        check(path, life, few, checker, faults)
        shutil.rmtree(path)


@pytest.mark.parametrize("victim", ["partial", "path"])
def test_a_checkpoint_vanishes_before_each_call(victim, layout, few, checker, faults, scratch):
    """Somebody removes the partial, or the whole path, while it is written: an error, or all is there."""

    class Vanishing(Whole, faults.Interposer):
        count, at, path = 0, -1, None

        def around(self, name, call, arguments, dir_fd):
            if self.count == self.at:
                for found in [self.path] if victim == "path" else list(self.path.glob("*.partial-*")):
                    (shutil.rmtree if found.is_dir() else os.unlink)(found)
            self.count += 1
            return call()

    failed = 0
    for number in itertools.count():
        path = scratch / f"path-{number}"
        with Store(path, fs=faults.NoWait()) as store:
            few.save(store, 1, marker=1)
        descriptors = len(os.listdir("/proc/self/fd"))
        fs = Vanishing()
        fs.path = path
        with Store(path, fs=fs) as store:
            fs.count, fs.at = 0, number
            try:
                few.save(store, 2, marker=2)
                error = None
            except StorageError as caught:
                error = caught
            over = fs.count <= number
            fs.at = -1
            seen = [one.marker for one in checker.examine(checker.read(path))] if path.exists() else []
            if error is None:
                # All the same: it was published before, and what was removed is removed.
                assert seen == [1, 2] or victim == "path"
            else:
                failed += 1
                assert str(path) in str(error)
                assert seen == ([1] if victim == "partial" else [])
            if victim == "partial":
                few.save(store, 3, marker=3)
        assert len(os.listdir("/proc/self/fd")) == descriptors
        with Store(path, fs=faults.NoWait()) as store:
            few.save(store, 4, marker=4)
        with find.open_checkpoint(path) as newest:
            assert newest.state() == {"marker": 4}
            assert newest.verify().ok
        assert not [name for name in os.listdir(path) if "partial" in name or "trash" in name]
        if over:
            break
    assert failed > (15 if layout == "file" else 40)


def test_signals_all_the_time_change_nothing(few, checker, scratch):
    """The kernel interrupts calls in the middle: each goes on."""
    ticks = 0

    def tick(number, frame):
        nonlocal ticks
        ticks += 1

    before = signal.signal(signal.SIGALRM, tick)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
        with Store(scratch / "path") as store:
            for step in range(10):
                few.save(store, step, marker=step)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ticks > 10
    seen = checker.examine(checker.read(scratch / "path"))
    assert [one.marker for one in seen] == list(range(10))
    assert not any(one.problems for one in seen)
