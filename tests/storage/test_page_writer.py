"""Whatever is handed in, in any order and from several threads, is in the file, and nothing else."""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gockpt.errors import WorkerError
from gockpt.storage.local import files, page_writer
from gockpt.storage.local.filesystem import Filesystem
from gockpt.storage.local.page_writer import PageWriter

PAGE = 4096


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(page_writer, "_BLOCK", 4 * PAGE)
    monkeypatch.setattr(page_writer, "_GATHER_BELOW", 2 * PAGE)
    monkeypatch.setattr(page_writer, "DIRECT_FROM", 3 * PAGE)


class Refusing(Filesystem):
    """Opens files for direct I/O, and then refuses it."""

    def pwrite(self, fd, data, offset):
        if os.readlink(f"/proc/self/fd/{fd}") and self.direct.get(fd):
            raise OSError(22, "Invalid argument")
        return super().pwrite(fd, data, offset)

    def __init__(self):
        self.direct = {}

    def open(self, name, flags, *, dir_fd=None):
        fd = super().open(name, flags & ~os.O_DIRECT, dir_fd=dir_fd)
        self.direct[fd] = bool(flags & os.O_DIRECT)
        return fd

    def direct_alignment(self, fd):
        return PAGE


def written(tmp_path, fs, content, cuts, order, *, packed_at, packed_end, threads):
    """Return what is in the file once the content was written in these pieces, in this order."""
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        (tmp_path / "file").unlink(missing_ok=True)
        fd = fs.open("file", files.NEW_FILE, dir_fd=directory)
        pages = PageWriter(fs, directory, "file", fd, packed_at=packed_at, packed_end=packed_end)
        ends = [*cuts[1:], content.nbytes]
        pieces = [(cuts[n], content[cuts[n] : ends[n]].data) for n in order]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda piece: pages.write_all(piece[0], [piece[1][:5], piece[1][5:]]), pieces))
        pages.flush()
        pages.close()
        fs.ftruncate(fd, content.nbytes)
        fs.close(fd)
    finally:
        os.close(directory)
    return (tmp_path / "file").read_bytes()


@pytest.mark.parametrize("refuses", [False, True], ids=["direct where it can be", "direct refused"])
@pytest.mark.parametrize("seed", range(60))
def test_every_byte_is_in_its_place(tmp_path, refuses, seed):
    chance = np.random.default_rng(seed)
    nbytes = int(chance.integers(1, 80 * PAGE))
    memory = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    memory[:] = chance.integers(1, 256, nbytes, np.uint8)
    cuts = sorted({0, *chance.integers(0, nbytes, chance.integers(0, 40)).tolist()})
    packed_at, packed_end = sorted(chance.choice([*cuts, nbytes], 2).tolist())
    found = written(
        tmp_path,
        Refusing() if refuses else Filesystem(),
        memory,
        cuts,
        chance.permutation(len(cuts)).tolist(),
        packed_at=packed_at,
        packed_end=packed_end,
        threads=1 + 2 * (seed % 2),
    )
    assert found == memory.tobytes()


def test_what_is_missing_in_the_packed_part_is_an_error(tmp_path):
    content = np.ones(10 * PAGE, np.uint8)
    with pytest.raises(WorkerError, match="never handed in"):
        written(
            *(tmp_path, Filesystem(), content, [0, PAGE, 2 * PAGE], [0, 2]),
            packed_at=0,
            packed_end=10 * PAGE,
            threads=1,
        )


def test_little_memory_is_taken_however_much_is_begun(tmp_path, monkeypatch):
    taken = []

    class Counted(mmap.mmap):
        def __new__(cls, *arguments):
            taken.append(arguments[1])
            return super().__new__(cls, *arguments)

    content = np.frombuffer(bytes(range(256)) * 16 * 200, np.uint8)
    monkeypatch.setattr(page_writer.mmap, "mmap", Counted)
    step = 2 * PAGE
    cuts = list(range(0, content.nbytes, step))
    order = [*range(0, len(cuts), 2), *range(1, len(cuts), 2)]  # half of every block, then the rest
    found = written(
        *(tmp_path, Filesystem(), content, cuts, order), packed_at=0, packed_end=content.nbytes, threads=1
    )
    assert found == content.tobytes()
    assert 0 < sum(taken) <= page_writer.most_gathered(content.nbytes) == 16 * PAGE
