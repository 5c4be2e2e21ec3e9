"""Direct reads return what ordinary ones return, whatever the system allows, refuses or cuts short."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.core.boxes import Box
from gockpt.errors import CheckpointCorrupt, ChunkCorrupt
from gockpt.storage.format.manifest import parse
from gockpt.storage.read.checkpoint import StoredCheckpoint, Wanted, manifest_bytes
from gockpt.storage.read.direct_io import DIRECT_FROM, DirectFile, ReadCalls
from gockpt.storage.read.local_location import LocalFiles
from gockpt.storage.read.safe_open import open_regular
from gockpt.storage.read.scratch import PIECE, Scratch

PAGE = mmap.PAGESIZE
MIB = 1 << 20
EXT4 = 0xEF53


class Strict(ReadCalls):
    """A file system that takes direct reads of any size, and none that isn't aligned; never a cached page.

    What lies behind the end of the file is filled with rubbish, as a device may do.
    """

    direct_from = 1

    def __init__(self, memory=512, step=512, limits=()):
        self.asked = (memory, step)
        self.limits = list(limits)
        self.direct = set()
        self.ranges = []

    def filesystem(self, fd):
        return EXT4

    def alignment(self, fd):
        return self.asked

    def cached_pages(self, fd, offset, nbytes):
        return 0

    def set_direct(self, fd, *, on):
        assert on is (fd not in self.direct)
        self.direct ^= {fd}

    def read(self, fd, view, offset):
        memory, step = self.asked
        assert fd in self.direct
        assert np.frombuffer(view, np.uint8).ctypes.data % memory == 0
        assert offset % step == view.nbytes % step == 0
        assert view.nbytes
        limit = self.limits.pop() * step if self.limits else view.nbytes
        got = os.preadv(fd, [view[:limit]], offset)
        np.frombuffer(view, np.uint8)[got:] = 0xEE
        self.ranges.append((offset, got))
        return got


class Small(Scratch):
    """A scratch of three pages beside what is taken, so that small reads take several steps."""

    def rest(self, nbytes):
        return super().rest(nbytes)[: 3 * PAGE]


@contextmanager
def opened(path, calls, threads=1):
    files = LocalFiles(os.open(path, os.O_RDONLY | os.O_DIRECTORY), calls=calls)
    manifest = parse(manifest_bytes(files, str(path)), where=str(path))
    with StoredCheckpoint(files, str(path), manifest, threads=threads) as stored:
        yield stored


def read_file(path, calls, wanted, *, scratch=None):
    """Return the bytes of each (offset, sizes of views, displacement in memory) of a file, and the count."""
    found, counts = [], []
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        with DirectFile(open_regular(fd, path.name), scratch or Scratch(), calls) as file:
            for offset, sizes, displaced in wanted:
                memory = np.frombuffer(mmap.mmap(-1, sum(sizes) + 2 * PAGE), np.uint8)
                views, at = [], displaced
                for size in sizes:
                    views.append(memory[at : at + size].data)
                    at += size
                counts.append(file.read_into(views, offset))
                assert not memory[:displaced].any()
                assert not memory[at:].any()
                found.append(memory[displaced:at].tobytes())
    finally:
        os.close(fd)
    return found, counts


@given(data=st.data())
def test_a_direct_read_equals_an_ordinary_one(data):
    size = data.draw(st.integers(1, 9 * PAGE), label="size")
    memory, step = data.draw(st.sampled_from([(4, 512), (512, 512), (512, 4096), (4096, 4096)]))
    limits = data.draw(st.lists(st.sampled_from([1, 1, 2, 9]), max_size=6), label="cut to")
    content = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    wanted = []
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, size - 1) | st.sampled_from([0, size // step * step % size]))
        stop = data.draw(st.integers(start + 1, size) | st.just(size))
        cuts = sorted(data.draw(st.lists(st.integers(start, stop), max_size=3)))
        sizes = np.diff([start, *cuts, stop]).tolist()
        wanted.append((start, sizes, data.draw(st.sampled_from([0, start % PAGE, 64, 513, 4095]))))
    with tempfile.TemporaryDirectory() as parent:
        path = Path(parent, "file")
        path.write_bytes(content)
        calls = Strict(memory, step, limits)
        found, counts = read_file(path, calls, wanted, scratch=Small())
    assert found == [content[start : start + sum(sizes)] for start, sizes, _ in wanted]
    assert calls.ranges
    assert not calls.direct
    assert sum(counts) >= sum(got for _, got in calls.ranges)


@given(data=st.data())
def test_every_box_equals_numpys_slice(write, data):
    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=3), label="shape"))
    shape = data.draw(st.sampled_from([shape, (40, 300)]), label="shape")
    dtype = data.draw(st.sampled_from(["uint8", "bfloat16", "float32", "complex128"]), label="dtype")
    rows = data.draw(st.integers(1, 20), label="chunk_rows")
    step = data.draw(st.sampled_from([512, 4096]), label="step")
    with ExitStack() as stack:
        parent = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        written = write(parent, {("a",): (shape, dtype)}, chunk_rows=rows)
        calls = Strict(512, step)
        stored = stack.enter_context(opened(written.path, calls))
        for _ in range(3):
            start = tuple(data.draw(st.integers(0, n)) for n in shape)
            extent = tuple(data.draw(st.integers(0, n - at)) for n, at in zip(shape, start, strict=True))
            where = tuple(slice(at, at + n) for at, n in zip(start, extent, strict=True))
            box = Box(start, extent)
            nbytes = box.numel * stored.arrays["a"].spec.itemsize
            displaced = data.draw(st.sampled_from([0, 1, 64]))
            out = np.zeros(nbytes + 64, np.uint8)[displaced : displaced + nbytes]
            for verify in (True, False):
                out[:] = 0xEE
                stored.read_into("a", box, out, verify=verify)
                assert out.tobytes() == written.values["a"][where].tobytes()
        assert bool(calls.ranges) == bool(stored.bytes_read)


@pytest.fixture
def large(write, tmp_path):
    """20 MiB in two chunks of 12 and 8 MiB, rows of 4 KiB; an odd one; and a small one."""
    arrays = {
        ("rows",): ((5120, 1024), "float32"),
        ("odd",): ((1025, 1031), "uint8"),
        ("small",): ((7,), "float32"),
        ("none",): ((0, 3), "float32"),
        ("scalar",): ((), "float64"),
    }
    return write(tmp_path, arrays, chunk_rows=3072)


def everything(stored, written):
    outs = {name: np.full(data.nbytes, 0xEE, np.uint8) for name, data in written.values.items()}
    got = stored.read_many([Wanted(name, None, out) for name, out in outs.items()])
    for name, data in written.values.items():
        assert outs[name].tobytes() == data.tobytes(), name
    return got


@pytest.mark.parametrize("threads", [1, 3])
def test_many_arrays_at_once(large, threads):
    calls = Strict()
    with opened(large.path, calls, threads) as stored:
        got = everything(stored, large)
        assert got == stored.bytes_read == sum(got for _, got in calls.ranges)
        assert got >= sum(data.nbytes for data in large.values.values())


def test_small_reads_and_cached_pages_are_ordinary_reads(large):
    class Counting(Strict):
        direct_from = DIRECT_FROM
        share = 1

        def cached_pages(self, fd, offset, nbytes):
            return nbytes // PAGE // self.share

    calls = Counting()
    out = np.empty(DIRECT_FROM, np.uint8)
    with opened(large.path, calls) as stored:
        everything(stored, large)
        assert not calls.ranges
        calls.share = 3
        stored.read_into("rows", Box((1, 0), (31, 1024)), out[: 31 * 4096], verify=False)
        assert not calls.ranges
        stored.read_into("rows", Box((1, 0), (32, 1024)), out, verify=False)
        assert calls.ranges == [(4096, DIRECT_FROM)]


def test_a_slice_costs_its_bytes_and_a_page_at_each_end(large):
    calls = Strict(4096, 4096)
    out = np.empty(100 * 1031, np.uint8)
    with opened(large.path, calls) as stored:
        got = stored.read_into("odd", Box((300, 0), (100, 1031)), out, verify=False)
        assert out.tobytes() == large.values["odd"][300:400].tobytes()
        assert out.nbytes < got <= out.nbytes + 2 * PAGE
        assert got == stored.bytes_read == sum(nbytes for _, nbytes in calls.ranges)


class Refusing(Strict):
    """Refuses one call, from its n-th time on."""

    def __init__(self, call, code, after=0):
        super().__init__()
        self.call, self.code, self.after = call, code, after
        self.refused = 0

    def _maybe(self, name):
        if name == self.call:
            self.after -= 1
            if self.after < 0:
                self.refused += 1
                raise OSError(self.code, os.strerror(self.code))

    def filesystem(self, fd):
        self._maybe("filesystem")
        return super().filesystem(fd)

    def alignment(self, fd):
        self._maybe("alignment")
        return super().alignment(fd)

    def set_direct(self, fd, *, on):
        self._maybe("set_direct" if on else "set_ordinary")
        super().set_direct(fd, on=on)

    def read(self, fd, view, offset):
        self._maybe("read")
        return super().read(fd, view, offset)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize(
    ("call", "code"),
    [
        ("filesystem", errno.ENOSYS),
        ("alignment", errno.EPERM),
        ("set_direct", errno.EINVAL),
        ("read", errno.EINVAL),
        ("read", errno.EOPNOTSUPP),
        ("read", errno.EIO),
        ("read", errno.ENOMEM),
    ],
)
def test_what_the_system_refuses_is_read_in_the_ordinary_way(large, call, code, after, threads):
    calls = Refusing(call, code, after)
    with opened(large.path, calls, threads) as stored:
        everything(stored, large)
    assert calls.refused
    assert not calls.direct


@pytest.mark.parametrize(
    ("kind", "alignment"),
    [(0x794C7630, (512, 512)), (EXT4, (0, 0)), (EXT4, (3, 512)), (EXT4, (512, 1 << 16))],
)
def test_other_file_systems_and_odd_alignments_are_left_alone(large, kind, alignment):
    calls = Strict(*alignment)
    calls.filesystem = lambda fd: kind
    with opened(large.path, calls) as stored:
        everything(stored, large)
    assert not calls.ranges


def test_where_the_kernel_does_not_count_pages_two_probes_decide(large):
    class Probed(Strict):
        at_hand = (True,)

        def cached_pages(self, fd, offset, nbytes):
            raise OSError(errno.EPERM, "Operation not permitted")

        def is_at_hand(self, fd, offset):
            self.probes = [*self.probes, offset]
            answer = self.at_hand[len(self.probes) % len(self.at_hand)]
            if answer is None:
                raise OSError(errno.EOPNOTSUPP, "Operation not supported")
            return answer

    out = np.empty(100 * 4096, np.uint8)
    for at_hand, probes, direct in [((True,), 2, False), ((False,), 1, True), ((None,), 1, False)]:
        calls = Probed()
        calls.at_hand, calls.probes = at_hand, []
        with opened(large.path, calls) as stored:
            stored.read_into("rows", Box((1, 0), (100, 1024)), out, verify=False)
        assert out.tobytes() == large.values["rows"][1:101].tobytes()
        assert calls.probes == [4096, 101 * 4096 - 1][:probes]
        assert bool(calls.ranges) is direct


def test_a_file_that_shrank_is_said_to_end_early(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * PAGE))
    for size in (PAGE + 7, PAGE, 0):
        for displaced in (0, 1):
            calls = Strict()
            os.truncate(path, size)
            with pytest.raises(CheckpointCorrupt, match=f"file ends at byte {size}"):
                read_file(path, calls, [(0, [2 * PAGE], displaced)])
            assert calls.ranges
            assert not calls.direct


def test_damage_is_found_and_named(large):
    path = large.path / "rows/c.1.0"
    data = bytearray(path.read_bytes())
    data[5 * MIB + 17] ^= 1
    path.write_bytes(data)
    with opened(large.path, Strict(), 3) as stored:
        with pytest.raises(ChunkCorrupt, match=r"rows: rows/c\.1\.0: the bytes from 5242880 on"):
            everything(stored, large)
        report = stored.verify()
        assert [(problem.path, problem.array) for problem in report.problems] == [("rows/c.1.0", "rows")]


def test_the_real_system(large):
    calls = ReadCalls()
    calls.direct_from = 1
    fd = os.open(large.path / "rows/c.0.0", os.O_RDONLY)
    try:
        kind = calls.filesystem(fd)
        memory, step = calls.alignment(fd)
        assert 0 <= memory <= step
        os.fsync(fd)
        assert calls.is_at_hand(fd, 0)
        for on in (True, False):
            calls.set_direct(fd, on=on)
            assert bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT) is on
    except OSError as error:
        pytest.skip(f"no direct I/O here, so nothing to try: {error}")
    finally:
        os.close(fd)
    assert kind
    for path in large.path.rglob("c*"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    with opened(large.path, calls, 3) as stored:
        everything(stored, large)


def test_memory_is_aligned_and_bounded():
    scratch = Scratch()
    assert scratch.take(0).nbytes == 0
    for nbytes, start in [(PIECE, 5), (1, 0), (2 * MIB, 4095), (3, 1 << 33)]:
        taken = scratch.take(nbytes, start)
        assert taken.nbytes == nbytes
        assert (taken.ctypes.data - start) % PAGE == 0
        rest = scratch.rest(1)
        assert rest.ctypes.data % PAGE == 0
        assert 3 * PAGE <= rest.nbytes <= PIECE + 8 * PAGE
        assert rest.ctypes.data >= taken.ctypes.data + nbytes
