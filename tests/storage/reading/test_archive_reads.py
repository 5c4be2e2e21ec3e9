"""Reading out of archives: neighbours are read together, and large reads go past the page cache."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.core.boxes import Box
from gockpt.errors import ChunkCorrupt
from gockpt.storage.format.manifest import parse
from gockpt.storage.local import packing
from gockpt.storage.local.syscalls import EXT4
from gockpt.storage.read.archive_files import ArchiveFiles
from gockpt.storage.read.checkpoint import StoredCheckpoint, Wanted, manifest_bytes
from gockpt.storage.read.direct_io import ReadCalls
from gockpt.storage.read.find import open_checkpoint
from gockpt.storage.read.local_location import LocalArchive
from gockpt.storage.read.read_join import join_neighbours


def pack(source, target):
    with open_checkpoint(source) as stored:
        packing.pack(stored, str(target))
    return target


MANY = {("model", f"layer.{n:03}"): ((n % 7, n % 3 + 1), "float32") for n in range(150)} | {
    ("model", "large"): ((700, 300), "float32"),
    ("model", "cut"): ((90, 4), "int64"),
}


@pytest.fixture(scope="module")
def both(write, tmp_path_factory):
    """The same arrays in a directory and in an archive."""
    written = write(tmp_path_factory.mktemp("both"), MANY, chunk_rows=40)
    archive = pack(written.path, written.path.parent / "a.zip")
    with open_checkpoint(written.path) as plain, open_checkpoint(archive) as joined:
        yield plain, joined


def boxes(shape):
    """Boxes in an array of a shape."""
    parts = [st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted) for n in shape]
    return st.tuples(*parts).map(lambda ends: Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends)))


wanted = st.lists(
    st.sampled_from(sorted(MANY)).flatmap(
        lambda name: st.tuples(st.just("/".join(name)), st.none() | boxes(MANY[name][0]))
    ),
    max_size=30,
)


@given(wanted, st.booleans(), st.booleans())
def test_what_is_read_together_equals_what_is_read_from_files(both, names, everything, verify):
    names = [(name, None) for name in both[0].arrays] if everything else names
    found = []
    for stored in both:
        outs = []
        for name, box in names:
            spec = stored.arrays[name].spec
            nbytes = (spec.numel if box is None else box.numel) * spec.itemsize
            outs.append(np.full(nbytes, 0xAA, np.uint8))
        begun = []
        got = stored.read_many(
            [Wanted(name, box, out) for (name, box), out in zip(names, outs, strict=True)],
            verify=verify,
            begun=begun.append,
        )
        assert set(begun) == {n for n, out in enumerate(outs) if out.nbytes}
        assert got >= sum(out.nbytes for out in outs) or len(set(names)) < len(names)
        found.append([out.tobytes() for out in outs])
    assert found[0] == found[1]


def test_many_small_arrays_take_few_reads(both, monkeypatch):
    counts, real = [], os.preadv
    for stored in both:
        outs = [Wanted(name, None, np.empty(a.spec.nbytes, np.uint8)) for name, a in stored.arrays.items()]
        stored.block_checksums("model/large")
        with monkeypatch.context() as patched:
            patched.setattr(
                os, "preadv", lambda fd, views, at, who=stored: counts.append(who) or real(fd, views, at)
            )
            stored.read_many(outs)
    assert counts.count(both[0]) > 100
    assert counts.count(both[1]) < 25  # large ones by themselves


@pytest.mark.parametrize("threads", [1, 4])
def test_of_what_is_read_together_the_damaged_is_named(write, tmp_path, threads):
    written = write(tmp_path, MANY)
    archive = pack(written.path, tmp_path / "a.zip")
    data = bytearray(archive.read_bytes())
    with open_checkpoint(archive, threads=threads) as stored:
        at = stored.arrays["model/layer.041"].entry.at[0]
        data[at + 5] ^= 8
        archive.write_bytes(data)
        outs = [Wanted(name, None, np.empty(a.spec.nbytes, np.uint8)) for name, a in stored.arrays.items()]
        with pytest.raises(
            ChunkCorrupt, match=r"^model/layer\.041: model/layer\.041/c\.0\.0: the bytes from 0 on"
        ):
            stored.read_many(outs)
        stored.read_many(outs, verify=False)


@given(
    st.lists(st.none() | st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=20),
    st.integers(0, 50),
    st.integers(1, 200),
    st.integers(1, 5),
)
def test_every_part_is_in_one_group(places, max_gap, most_nbytes, most_parts):
    groups = join_neighbours(places, max_gap=max_gap, most_nbytes=most_nbytes, most_parts=most_parts)
    assert sorted(itertools.chain(*groups)) == list(range(len(places)))
    assert [min(group) for group in groups] == sorted(min(group) for group in groups)
    for group in groups:
        members = [places[index] for index in group]
        assert len(group) <= most_parts
        if len(group) > 1:
            assert sum(members[-1]) - members[0][0] <= most_nbytes
            for before, after in itertools.pairwise(members):
                assert 0 <= after[0] - sum(before) <= max_gap


class Cold(ReadCalls):
    """Calls of a file system where nothing is in the page cache; reads are ordinary ones, and noted."""

    direct_from = 20_000

    def __init__(self):
        self.direct = set()
        self.read_directly = []

    def filesystem(self, fd):
        return EXT4

    def alignment(self, fd):
        return 512, 512

    def cached_pages(self, fd, offset, nbytes):
        return 0

    def set_direct(self, fd, *, on):
        (self.direct.add if on else self.direct.remove)(fd)

    def read(self, fd, view, offset):
        assert fd in self.direct
        assert offset % 512 == view.nbytes % 512 == 0
        self.read_directly.append(view.nbytes)
        return os.preadv(fd, [view], offset)


@pytest.mark.parametrize("threads", [1, 4])
def test_large_reads_go_past_the_page_cache_by_descriptors_of_their_own(write, tmp_path, threads):
    written = write(tmp_path, {("a",): ((300, 100), "float32"), ("b",): ((9, 9), "int8")}, chunk_rows=200)
    archive = pack(written.path, tmp_path / "a.zip")
    calls, before = Cold(), set(os.listdir("/proc/self/fd"))
    fd, parent = os.open(archive, os.O_RDONLY), os.open(tmp_path, os.O_RDONLY)
    files = ArchiveFiles(LocalArchive(fd, parent, str(archive), calls=calls))
    held = parse(manifest_bytes(files, "x"), where="x")
    with StoredCheckpoint(files, str(archive), held, threads=threads) as stored:
        for _ in range(3):
            outs = {name: np.empty(array.spec.nbytes, np.uint8) for name, array in stored.arrays.items()}
            stored.read_many([Wanted(name, None, out) for name, out in outs.items()])
            for name, out in outs.items():
                assert out.tobytes() == written.values[name].tobytes()
        assert sum(calls.read_directly) >= 3 * 100_000
        assert not calls.direct
        assert stored.verify().ok
    assert set(os.listdir("/proc/self/fd")) == before
