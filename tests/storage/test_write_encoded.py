"""Encoded chunks on their way to the file: whole pages, exact length, the rest of a refused direct write."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from gockpt.core.array_spec import ArraySpec
from gockpt.errors import StorageError
from gockpt.storage.format.checksum import BLOCK, crc32c
from gockpt.storage.format.chunk_grid import chunked_layout
from gockpt.storage.local import chunk_writer
from gockpt.storage.local.compression import Compression
from gockpt.storage.local.filesystem import Filesystem
from gockpt.storage.local.store import Store

LENGTHS = [1, 4091, 4092, 4093, 4095, 4096, 8192, 300_000, BLOCK, BLOCK + 4096, BLOCK + 9000]


def write(path, data, *, fs=None, direct=True):
    fd = os.open(path, os.O_RDONLY)
    try:
        written = chunk_writer.write_encoded(fs or Filesystem(), fd, "c", data=data, direct=direct)
        os.close(written.fd)
    finally:
        os.close(fd)
    return written, (path / "c").read_bytes()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("nbytes", LENGTHS)
def test_the_file_is_the_encoded_chunk_and_its_checksum(tmp_path, nbytes, direct):
    data = np.random.default_rng(nbytes).bytes(nbytes)
    written, found = write(tmp_path, data, direct=direct)
    assert found == data + crc32c(data).to_bytes(4, "little")
    assert written.nbytes == nbytes + 4
    assert written.blocks.tolist() == [crc32c(data[at : at + BLOCK]) for at in range(0, nbytes, BLOCK)]


@pytest.mark.parametrize("nbytes", LENGTHS)
def test_only_whole_pages_are_written_and_zeros_behind_the_checksum(tmp_path, faults, nbytes):
    class Seen(faults.Interposer):
        def __init__(self):
            super().__init__()
            self.pages = {}

        def around(self, name, call, arguments, dir_fd):
            if name == "pwrite":
                _, data, offset = arguments
                assert len(data) % 4096 == offset % 4096 == 0
                self.pages[offset] = bytes(data)
            return call()

    fs = Seen()
    data = np.random.default_rng(nbytes).bytes(nbytes)
    write(tmp_path, data, fs=fs)
    whole = b"".join(fs.pages[offset] for offset in sorted(fs.pages))
    assert whole == (data + crc32c(data).to_bytes(4, "little")).ljust(len(whole), b"\0")
    assert len(whole) - nbytes - 4 < 4096


@pytest.mark.parametrize("refused", [1, 2])
def test_a_refused_direct_write_is_made_through_the_page_cache(tmp_path, faults, refused):
    class Refusing(faults.Interposer):
        writes = 0

        def around(self, name, call, arguments, dir_fd):
            if name == "pwrite":
                self.writes += 1
                if self.writes == refused:
                    call()  # it may have written a part
                    raise OSError(errno.EINVAL, "Invalid argument")
            return call()

    data = np.random.default_rng(0).bytes(700_001)
    written, found = write(tmp_path, data, fs=Refusing())
    assert found == data + crc32c(data).to_bytes(4, "little")
    assert (written.direct, written.refused) == (False, True)


@pytest.mark.parametrize("call", ["open", "pwrite", "ftruncate"])
def test_a_failed_write_ends_the_save_and_gives_the_memory_back(tmp_path, faults, call):
    layout = chunked_layout(ArraySpec(("model", "w"), (5000,), "float32"), (5000,))
    (slot,) = layout.slots
    compression = Compression("zstd", threads=1)

    class Full(faults.Interposer):
        armed = False

        def around(self, name, call_it, arguments, dir_fd):
            if self.armed and name == call:
                raise OSError(errno.ENOSPC, "No space left on device")
            return call_it()

    fs = Full()
    with Store(tmp_path, fs=fs, compression=compression) as store:
        with store.begin(1, [layout], state={}, attributes={}, exact=True) as transaction:
            fs.armed = True
            with pytest.raises(StorageError, match="No space"):
                transaction.write_chunk(layout, slot, memoryview(bytearray(slot.capacity)))
            fs.armed = False
        with store.begin(
            2, [layout], state={}, attributes={}, exact=True
        ) as transaction:  # the one turn there is has come back
            transaction.write_chunk(layout, slot, memoryview(bytearray(slot.capacity)))
            transaction.commit()
    assert compression._held == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("step")) == [
        "step-0000000002"
    ]
