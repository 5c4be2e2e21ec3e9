"""What is read equals what was written, for every dtype, shape and box, and no byte too many is read."""

from __future__ import annotations

import os
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.core.boxes import Box
from gockpt.errors import ChunkCorrupt, GockptError, TensorNotFound, UsageError
from gockpt.storage.read import checkpoint as stored
from gockpt.storage.read import read_execute
from gockpt.storage.read.find import open_checkpoint
from gockpt.storage.read.scratch import Scratch


def read(checkpoint, name, box=None, **options):
    spec = checkpoint.arrays[name].spec
    numel = spec.numel if box is None else box.numel
    out = np.full(numel * spec.itemsize, 0xEE, np.uint8)
    return out, checkpoint.read_into(name, box, out, **options)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_every_dtype_and_shape_comes_back(write, every_dtype, tmp_path, verify, chunk_rows):
    written = write(tmp_path, every_dtype, chunk_rows=chunk_rows)
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.arrays) == list(written.values)
        for name, data in written.values.items():
            out, got = read(checkpoint, name, verify=verify)
            assert out.tobytes() == data.tobytes(), name
            assert got == data.nbytes
            assert checkpoint.arrays[name].layout.spec is checkpoint.arrays[name].spec
            assert sum(s.nbytes for s in checkpoint.arrays[name].layout.slots) == data.nbytes
        assert checkpoint.bytes_read == sum(data.nbytes for data in written.values.values())


@given(data=st.data())
def test_every_box_equals_numpys_slice(write, data):
    shape = tuple(data.draw(st.lists(st.integers(1, 6), max_size=4), label="shape"))
    dtype = data.draw(st.sampled_from(["uint8", "bfloat16", "float32", "complex128"]), label="dtype")
    rows = data.draw(st.integers(1, 6), label="chunk_rows")
    with ExitStack() as stack:
        parent = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        written = write(parent, {("a",): (shape, dtype)}, chunk_rows=rows)
        checkpoint = stack.enter_context(open_checkpoint(written.path))
        for _ in range(3):
            start = tuple(data.draw(st.integers(0, n)) for n in shape)
            extent = tuple(data.draw(st.integers(0, n - at)) for n, at in zip(shape, start, strict=True))
            where = tuple(slice(at, at + n) for at, n in zip(start, extent, strict=True))
            for verify in (True, False):
                out, _ = read(checkpoint, "a", Box(start, extent), verify=verify)
                assert out.tobytes() == written.values["a"][where].tobytes()


MIB = 1 << 20


@pytest.fixture
def large(write, tmp_path):
    """20 MiB in two chunks of 12 and 8 MiB, rows of 4 KiB; and columns 1 MiB apart."""
    arrays = {("rows",): ((5120, 1024), "float32"), ("wide",): ((12, MIB), "uint8")}
    return write(tmp_path, arrays, chunk_rows=3072)


def test_rows_cost_their_own_bytes_or_their_blocks(large):
    with open_checkpoint(large.path) as checkpoint:
        box = Box((300, 0), (10, 1024))
        expected = large.values["rows"][300:310].tobytes()
        assert read(checkpoint, "rows", box, verify=False)[1] == 10 * 4096
        out, got = read(checkpoint, "rows", box)
        assert (out.tobytes(), got) == (expected, MIB)  # rows 256...511 are one block
        out, got = read(checkpoint, "rows", Box((250, 0), (10, 1024)))
        assert (out.tobytes(), got) == (large.values["rows"][250:260].tobytes(), 2 * MIB)
        out, got = read(checkpoint, "rows", Box((3070, 0), (4, 1024)))  # across the two chunks
        assert (out.tobytes(), got) == (large.values["rows"][3070:3074].tobytes(), 2 * MIB)


def test_columns_cost_their_span_or_their_runs(large):
    with open_checkpoint(large.path) as checkpoint:
        box = Box((2, 100), (6, 1000))
        expected = large.values["wide"][2:8, 100:1100].tobytes()
        out, got = read(checkpoint, "wide", box, verify=False)
        assert (out.tobytes(), got) == (expected, 6000)
        out, got = read(checkpoint, "wide", box)
        assert (out.tobytes(), got) == (expected, 6 * MIB)
        out, got = read(checkpoint, "rows", Box((0, 512), (5120, 512)), verify=False)
        assert out.tobytes() == large.values["rows"][:, 512:].tobytes()
        assert got == 5120 * 4096 - 2 * 2048  # each chunk's span, from its first wanted byte to its last
        out, _ = read(checkpoint, "rows", Box((0, 1023), (5120, 1)))
        assert out.tobytes() == large.values["rows"][:, 1023:].tobytes()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("box", [None, Box((0, 3), (5120, 1000)), Box((1, 0), (5119, 1024))])
def test_threads_give_the_same_answer(large, threads, box):
    with open_checkpoint(large.path, threads=threads) as checkpoint:
        out, _ = read(checkpoint, "rows", box)
        where = (
            (...,)
            if box is None
            else tuple(slice(a, a + n) for a, n in zip(box.start, box.shape, strict=True))
        )
        assert out.tobytes() == large.values["rows"][where].tobytes()
        assert not [t for t in threading.enumerate() if t.name.startswith("gockpt-read")]


def test_many_callers_at_once(large):
    with open_checkpoint(large.path, threads=2) as checkpoint:
        outs = [None] * 6

        def work(i):
            outs[i] = read(checkpoint, "rows")[0]

        callers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert all(out.tobytes() == large.values["rows"].tobytes() for out in outs)
        assert checkpoint.bytes_read == 6 * large.values["rows"].nbytes


def test_the_target_need_not_be_aligned(large):
    with open_checkpoint(large.path) as checkpoint:
        for box in (Box((0, 0), (2, 1024)), Box((0, 1), (2, 7))):
            nbytes = box.numel * 4
            room = np.zeros(nbytes + 3, np.uint8)
            checkpoint.read_into("rows", box, room[3:])
            assert (
                room[3:].tobytes()
                == large.values["rows"][0:2, box.start[1] : box.start[1] + box.shape[1]].tobytes()
            )


@pytest.mark.parametrize("threads", [1, 3])
def test_a_flipped_byte_is_found_where_it_is_read_and_only_there(large, threads):
    path = large.path / "rows/c.1.0"
    data = bytearray(path.read_bytes())
    data[5 * MIB + 17] ^= 1
    path.write_bytes(data)
    with open_checkpoint(large.path, threads=threads) as checkpoint:
        with pytest.raises(ChunkCorrupt, match=r"rows: rows/c\.1\.0: the bytes from 5242880 on"):
            read(checkpoint, "rows")
        with pytest.raises(ChunkCorrupt, match=r"rows/c\.1\.0"):
            read(checkpoint, "rows", Box((3072 + 5 * 256 + 255, 1023), (1, 1)))
        read(checkpoint, "rows", Box((0, 0), (3072 + 5 * 256, 1024)))
        read(checkpoint, "rows", verify=False)


@pytest.mark.parametrize("verify", [True, False])
def test_chunks_that_are_missing_short_or_long_are_corruption(large, verify):
    path = large.path / "wide/c.0.0"
    with open_checkpoint(large.path) as checkpoint:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(ChunkCorrupt, match=r"wide/c\.0\.0 has 12582915 bytes instead of 12582916"):
            read(checkpoint, "wide", verify=verify)
        os.truncate(path, path.stat().st_size + 2)
        with pytest.raises(ChunkCorrupt, match="bytes instead of"):
            read(checkpoint, "wide", verify=verify)
        path.unlink()
        with pytest.raises(ChunkCorrupt, match=r"wide: wide/c\.0\.0 is missing"):
            read(checkpoint, "wide", Box((0, 0), (1, 1)), verify=verify)


def test_swapped_chunks_are_found(write, tmp_path):
    written = write(tmp_path, {("a",): ((8, 4), "float32")}, chunk_rows=2)
    one, two = written.path / "a/c.0.0", written.path / "a/c.1.0"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with open_checkpoint(written.path) as checkpoint, pytest.raises(ChunkCorrupt, match=r"a/c\.0\.0"):
        read(checkpoint, "a")


def test_a_damaged_sidecar_is_said_to_be_damaged_itself(large):
    path = large.path / "blocks.crc32c"
    data = bytearray(path.read_bytes())
    data[9] ^= 4
    path.write_bytes(data)
    with open_checkpoint(large.path) as checkpoint:
        with pytest.raises(GockptError, match=r"blocks\.crc32c is damaged"):
            read(checkpoint, "wide")
        read(checkpoint, "wide", verify=False)


def test_wrong_calls_are_refused_by_name(large):
    with open_checkpoint(large.path) as checkpoint:
        with pytest.raises(TensorNotFound, match="no tensor 'row' in the checkpoint of step 7"):
            checkpoint.read_into("row", None, np.empty(0, np.uint8))
        for box in (Box((0,), (1,)), Box((5120, 0), (1, 1)), Box((0, 1000), (1, 25))):
            with pytest.raises(UsageError, match="does not lie inside 'rows'"):
                read(checkpoint, "rows", box)
        box = Box((0, 0), (1, 2))
        read_only = np.empty(8, np.uint8)
        read_only.flags.writeable = False
        wrong = [
            np.empty(7, np.uint8),
            np.empty(8, np.int8),
            np.empty((2, 4), np.uint8),
            np.empty(16, np.uint8)[::2],
        ]
        for out in (*wrong, read_only):
            with pytest.raises(UsageError, match=r"needs a writable, contiguous uint8 array of shape \(8,\)"):
                checkpoint.read_into("rows", box, out)
    checkpoint.close()
    with pytest.raises(UsageError, match="is closed"):
        read(checkpoint, "rows", Box((0, 0), (1, 1)))
    with pytest.raises(UsageError, match="is closed"):
        checkpoint.state()


def test_bounce_memory_is_bounded(large, monkeypatch):
    sizes = []
    real = Scratch.take
    monkeypatch.setattr(Scratch, "take", lambda self, n, *at: sizes.append(n) or real(self, n, *at))
    with open_checkpoint(large.path) as checkpoint:
        read(checkpoint, "rows", Box((0, 1), (5120, 1000)))
        assert max(sizes) <= read_execute.PIECE
        sizes.clear()
        read(checkpoint, "rows", Box((1, 0), (5118, 1024)))
        assert max(sizes) < 2 * MIB  # only the ends of whole rows


def test_after_an_error_the_other_threads_stop(large, monkeypatch):
    second, calls = threading.Event(), []

    def fail_second(*_):
        calls.append(threading.current_thread())
        if len(calls) == 2:
            second.set()
            raise ChunkCorrupt("the second")
        assert second.wait(10)
        calls[1].join(10)
        return 0

    monkeypatch.setattr(read_execute, "_read", fail_second)
    with (
        open_checkpoint(large.path, threads=2) as checkpoint,
        pytest.raises(ChunkCorrupt, match="the second"),
    ):
        read(checkpoint, "rows")
    assert len(calls) == 2


def test_no_descriptor_is_left_open(large):
    before = set(os.listdir("/proc/self/fd"))
    with open_checkpoint(large.path) as checkpoint:
        read(checkpoint, "rows")
        (large.path / "wide/c.0.0").unlink()
        with pytest.raises(ChunkCorrupt):
            read(checkpoint, "wide")
    assert set(os.listdir("/proc/self/fd")) == before
    assert stored.MAX_GAP < read_execute.PIECE
