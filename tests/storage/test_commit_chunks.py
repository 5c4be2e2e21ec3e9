"""What is written for one chunk, byte for byte, whatever the file system makes of it."""

from __future__ import annotations

import errno
import mmap
import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.core.array_spec import ArraySpec
from gockpt.storage.format.checksum import crc32c
from gockpt.storage.format.chunk_grid import chunked_layout
from gockpt.storage.local import chunk_writer, files
from gockpt.storage.local.filesystem import Filesystem


def page_aligned(nbytes, *, off=0):
    """Return writable memory that starts ``off`` bytes behind a page."""
    data = np.frombuffer(mmap.mmap(-1, nbytes + 4096), np.uint8)[off : off + nbytes]
    data[:] = 0xAA
    return data


def expected_file(content, layout):
    padded = content + bytes(layout.chunk_nbytes - len(content))
    return padded + crc32c(padded).to_bytes(4, "little")


def write_one(directory, layout, slot, *, off=0, direct=True, fs=None):
    """Write one chunk with random rows; returns (its rows, the file's bytes, what was returned)."""
    buffer = page_aligned(slot.capacity, off=off)
    content = np.random.default_rng(slot.nbytes).integers(0, 256, slot.nbytes, np.uint8)
    buffer[: slot.nbytes] = content
    fd = os.open(directory, os.O_RDONLY)
    try:
        written = chunk_writer.write_chunk(
            fs or Filesystem(), fd, "chunk", layout=layout, slot=slot, buffer=buffer.data, direct=direct
        )
        os.close(written.fd)
    finally:
        os.close(fd)
    path = os.path.join(directory, "chunk")
    with open(path, "rb") as file:
        data = file.read()
    os.unlink(path)
    return content.tobytes(), data, written


@given(
    rows=st.integers(1, 3000),
    row=st.integers(1, 7),
    chunk_rows=st.integers(1, 3000),
    dtype=st.sampled_from(["uint8", "bfloat16", "float32", "complex128"]),
    off=st.sampled_from([0, 64, 512]),
)
def test_a_file_is_rows_zeros_and_checksum(rows, row, chunk_rows, dtype, off):
    chunk = (min(chunk_rows, rows), row)
    layout = chunked_layout(ArraySpec(("a",), (rows, row), dtype), chunk)
    for slot in {layout.slots[0], layout.slots[-1]}:
        content, data, written = write_one(".", layout, slot, off=off)
        assert data == expected_file(content, layout)
        assert written.nbytes == slot.nbytes + 4
        assert written.blocks.tolist() == [
            crc32c(content[i : i + (1 << 20)]) for i in range(0, len(content), 1 << 20)
        ]


# Every place that the checksum of a padded chunk can have relative to the pages of the rows.
@pytest.mark.parametrize("rows", [1, 4000, 4091, 4092, 4093, 4096, 4097, 8188, 8192])
@pytest.mark.parametrize("whole", [4092, 4093, 4095, 4096, 8187, 8188, 8190, 8192, 8193, 12288, 300000])
def test_the_checksum_may_stand_anywhere(rows, whole, tmp_path):
    rows = min(rows, whole)
    layout = chunked_layout(ArraySpec(("a",), (whole + rows,), "uint8"), (whole,))
    content, data, _ = write_one(tmp_path, layout, layout.slots[-1])
    assert data == expected_file(content, layout)


@pytest.mark.parametrize("rows", [1 << 20, (1 << 20) + 5, 3 << 18])
def test_large_chunks_are_written_directly_in_one_call(rows, tmp_path, faults):
    layout = chunked_layout(ArraySpec(("a",), (rows,), "uint8"), (rows,))
    fs = faults.Recorder()
    content, data, written = write_one(tmp_path, layout, layout.slots[0], fs=fs)
    assert data == expected_file(content, layout)
    assert fs.names.count("pwrite") == 1
    assert written.direct
    assert not written.refused


def test_nothing_behind_the_rows_reaches_the_disk(tmp_path, faults):
    """Not even for a moment: a crash could leave it there."""

    class Written(faults.Interposer):
        data = b""

        def around(self, name, call, arguments, dir_fd):
            if name == "pwrite":
                self.data += bytes(arguments[1])
            return call()

    fs = Written()
    layout = chunked_layout(ArraySpec(("a",), (20000,), "uint8"), (15000,))
    for slot in layout.slots:
        zeros = replace(slot, nbytes=slot.nbytes)
        buffer = page_aligned(slot.capacity)
        buffer[: slot.nbytes] = 0
        fd = os.open(tmp_path, os.O_RDONLY)
        written = chunk_writer.write_chunk(
            fs, fd, f"c{slot.chunk}", layout=layout, slot=zeros, buffer=buffer.data, direct=True
        )
        os.close(written.fd)
        os.close(fd)
    assert 0xAA not in fs.data
    assert len(fs.data) >= 20000


@pytest.mark.parametrize("off", [0, 64])
@pytest.mark.parametrize("refusal", ["open", "open leaves a file", "write", "second write", "never"])
@pytest.mark.parametrize("edge", [False, True])
def test_direct_io_is_given_up_where_it_is_refused(refusal, off, edge, tmp_path, faults):
    class Refusing(faults.Interposer):
        writes = 0

        def around(self, name, call, arguments, dir_fd):
            invalid = OSError(errno.EINVAL, "Invalid argument")
            if name == "open" and arguments[1] & os.O_DIRECT:
                if refusal == "open leaves a file":
                    os.close(call())
                if refusal.startswith("open"):
                    raise invalid
                self.direct = result = call()
                return result
            if name == "pwrite" and arguments[0] == getattr(self, "direct", None):
                self.writes += 1
                if (refusal, self.writes) in (("write", 1), ("second write", 2)):
                    call()  # it may have written a part
                    raise invalid
            if name == "close" and arguments[0] == getattr(self, "direct", None):
                self.direct = None
            return call()

    layout = chunked_layout(ArraySpec(("a",), (900_000,), "uint8"), (500_000,))
    slot = layout.slots[-1] if edge else layout.slots[0]
    content, data, written = write_one(tmp_path, layout, slot, off=off, fs=Refusing())
    assert data == expected_file(content, layout)
    refused = refusal != "never" and (edge or refusal != "second write")
    assert written.refused == refused
    assert written.direct == (not refused)


@pytest.mark.parametrize(("alignment", "direct"), [(0, False), (512, True), (4096, True), (65536, False)])
def test_the_kernel_says_how_direct_io_must_be_aligned(alignment, direct, tmp_path, faults):
    class Said(faults.Recorder):
        def direct_alignment(self, fd):
            return alignment

    layout = chunked_layout(ArraySpec(("a",), (500_001,), "uint8"), (500_001,))
    content, data, written = write_one(tmp_path, layout, layout.slots[0], fs=Said())
    assert data == expected_file(content, layout)
    assert (written.direct, written.refused) == (direct, not direct)


def test_unaligned_memory_is_written_directly_by_pieces(tmp_path, faults, monkeypatch):
    monkeypatch.setattr(chunk_writer, "_BOUNCE", 128 << 10)
    layout = chunked_layout(ArraySpec(("a",), (500_001,), "uint8"), (500_001,))
    fs = faults.Recorder()
    content, data, written = write_one(tmp_path, layout, layout.slots[0], off=64, fs=fs)
    assert data == expected_file(content, layout)
    assert written.direct
    assert fs.names.count("pwrite") == 4


def test_other_errors_at_a_direct_open_are_errors(tmp_path, faults):
    layout = chunked_layout(ArraySpec(("a",), (500_000,), "uint8"), (500_000,))
    fs = faults.FailingAt(0, errno.EACCES, only="open")
    with pytest.raises(PermissionError):
        write_one(tmp_path, layout, layout.slots[0], fs=fs)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_reservation_will_do(code, tmp_path, faults):
    layout = chunked_layout(ArraySpec(("a",), (2_000_000,), "uint8"), (2_000_000,))
    content, data, _ = write_one(
        tmp_path, layout, layout.slots[0], fs=faults.FailingAt(0, code, only="fallocate")
    )
    assert data == expected_file(content, layout)


def test_a_reservation_without_space_fails_before_anything_is_written(tmp_path, faults):
    class Full(faults.Recorder):
        def fallocate(self, fd, nbytes):
            raise OSError(errno.ENOSPC, "No space left on device")

    fs = Full()
    layout = chunked_layout(ArraySpec(("a",), (2_000_000,), "uint8"), (2_000_000,))
    with pytest.raises(OSError, match="No space"):
        write_one(tmp_path, layout, layout.slots[0], fs=fs)
    assert "pwrite" not in fs.names


def test_the_buffer_must_be_the_slot(tmp_path):
    layout = chunked_layout(ArraySpec(("a",), (5,), "uint8"), (5,))
    with pytest.raises(ValueError, match="4096 bytes, its slot 8192"):
        chunk_writer.write_chunk(
            Filesystem(),
            -1,
            "x",
            layout=layout,
            slot=replace(layout.slots[0], capacity=8192),
            buffer=memoryview(bytearray(4096)),
            direct=False,
        )


def test_writing_is_cut_into_pieces_the_system_takes(faults):
    class Counting(faults.Interposer):
        def __init__(self):
            self.pieces = []

        def pwrite(self, fd, data, offset):
            self.pieces.append((offset, data.nbytes))
            return data.nbytes

    fs = Counting()
    files.write_all(fs, -1, memoryview(np.broadcast_to(np.uint8(0), (2 << 30) + 5)), 100)
    assert fs.pieces == [(100, 1 << 30), (100 + (1 << 30), 1 << 30), (100 + (2 << 30), 5)]


@given(st.binary(min_size=1, max_size=50), st.lists(st.integers(0, 5), max_size=80), st.integers(0, 9))
def test_short_and_interrupted_writes_are_continued(data, sizes, offset):
    class Reluctant(Filesystem):
        def __init__(self):
            self.file = bytearray(offset + len(data))
            self.sizes = list(sizes)

        def pwrite(self, fd, piece, at):
            size = self.sizes.pop() if self.sizes else len(piece)
            if size == 0:
                raise InterruptedError
            size = min(size, len(piece))
            self.file[at : at + size] = piece[:size]
            return size

    fs = Reluctant()
    files.write_all(fs, -1, memoryview(data), offset)
    assert fs.file == bytes(offset) + data


def test_a_write_of_nothing_is_an_error():
    class Stuck(Filesystem):
        def pwrite(self, fd, piece, at):
            return 0

    with pytest.raises(OSError, match="wrote nothing"):
        files.write_all(Stuck(), -1, memoryview(b"data"), 0)
