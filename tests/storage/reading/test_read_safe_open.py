"""Only regular files inside the directory are ever opened, by either way of opening."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from gockpt.errors import CheckpointCorrupt
from gockpt.storage.read import safe_open
from gockpt.storage.read.local_location import LocalFiles
from gockpt.storage.read.location import read_small
from gockpt.storage.read.safe_open import open_below, open_directory, open_regular


@pytest.fixture(params=["openat2", "step by step"])
def way(request, monkeypatch):
    """Open by one system call, and as on a kernel that has no such call."""
    if request.param == "step by step":
        monkeypatch.setattr(safe_open, "open_at_once", lambda *_: None)
    return request.param


@pytest.fixture
def root(way, tmp_path):
    """A descriptor of a directory with a/b/file of five bytes, and secrets beside it."""
    del way
    (tmp_path / "top/a/b").mkdir(parents=True)
    (tmp_path / "top/a/b/file").write_bytes(b"hello")
    (tmp_path / "secret").write_bytes(b"secret")
    fd = open_directory(tmp_path / "top")
    yield fd
    os.close(fd)


def opened():
    return set(os.listdir("/proc/self/fd"))


def test_reads_a_file(root):
    before = opened()
    assert read_small(LocalFiles(root), "a/b/file", limit=5) == b"hello"
    with open_regular(root, "a/b/file", nbytes=5) as file:
        assert file.nbytes == 5
        one, two = bytearray(2), bytearray(2)
        assert file.read_into([memoryview(one), memoryview(b"")[:0], memoryview(two)], 1) == 4
        assert one + two == b"ello"
    assert opened() == before


@pytest.mark.parametrize(
    "path", ["../secret", "a/../../secret", "/etc/passwd", "a//b", "", ".", "a/b/file\0x", "a/./b"]
)
def test_paths_that_are_not_plain_are_refused(root, path):
    with pytest.raises(CheckpointCorrupt, match="not a plain path"):
        open_below(root, path)


def test_links_are_refused_wherever_they_stand(root, tmp_path):
    top = tmp_path / "top"
    (top / "link").symlink_to(tmp_path / "secret")
    (top / "inside").symlink_to(top / "a")
    (top / "loop").symlink_to("loop")
    before = opened()
    for path in ("link", "inside/b/file", "loop"):
        with pytest.raises(CheckpointCorrupt, match="link|something else"):
            open_regular(root, path)
    with pytest.raises(CheckpointCorrupt, match="link|something else"):
        open_below(root, "inside", is_directory=True)
    assert opened() == before


def test_what_is_no_regular_file_is_refused_without_hanging(root, tmp_path):
    os.mkfifo(tmp_path / "top/fifo")
    (tmp_path / "top/directory").mkdir()
    before = opened()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "top/sock"))  # the absolute path may be too long for one
        for path in ("fifo", "directory", "sock"):
            with pytest.raises(CheckpointCorrupt, match="not a regular file"):
                open_regular(root, path)
    assert opened() == before


def test_a_file_in_the_place_of_a_directory_is_refused(root):
    with pytest.raises(CheckpointCorrupt, match="something else"):
        open_regular(root, "a/b/file/zarr.json")


def test_sizes_are_compared_before_anything_is_allocated(root, tmp_path):
    with pytest.raises(CheckpointCorrupt, match="has 5 bytes instead of 6"):
        open_regular(root, "a/b/file", nbytes=6)
    with (tmp_path / "top/huge").open("wb") as file:
        file.truncate(8 << 40)
    with pytest.raises(CheckpointCorrupt, match="more than 64 can't be right"):
        read_small(LocalFiles(root), "huge", limit=64)


def test_what_is_missing_or_forbidden_is_said_by_the_system(root):
    with pytest.raises(FileNotFoundError) as caught:
        open_regular(root, "a/nothing")
    assert "a/nothing" in str(caught.value) or "nothing" in str(caught.value)
    with pytest.raises(CheckpointCorrupt, match="too long"):
        open_regular(root, "a/" + "x" * 300)


def test_a_file_that_shrank_is_said_to_end_early(root, tmp_path):
    with open_regular(root, "a/b/file") as file:
        (tmp_path / "top/a/b/file").write_bytes(b"he")
        with pytest.raises(CheckpointCorrupt, match="ends at byte 2"):
            file.read_into([memoryview(bytearray(5))], 0)


def test_short_reads_go_on_where_they_stopped(root, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:2]], at))
    data = bytearray(5)
    with open_regular(root, "a/b/file") as file:
        assert file.read_into([memoryview(data)[:3], memoryview(data)[3:]], 0) == 5
    assert data == b"hello"


def test_unreadable_media_is_corruption_and_other_errors_are_not(root, monkeypatch):
    def fail(code):
        def preadv(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "preadv", preadv)

    with open_regular(root, "a/b/file") as file:
        fail(errno.EIO)
        with pytest.raises(CheckpointCorrupt, match="can't read byte 0"):
            file.read_into([memoryview(bytearray(5))], 0)
        fail(errno.ENOMEM)
        with pytest.raises(OSError, match="memory"):
            file.read_into([memoryview(bytearray(5))], 0)


def test_the_kernel_without_openat2_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x")
    fd = open_directory(tmp_path)
    try:
        monkeypatch.setattr(safe_open, "_SYS_OPENAT2", 100_000)  # no such call: ENOSYS
        assert safe_open.open_at_once(fd, "file", os.O_RDONLY) is None
        assert read_small(LocalFiles(fd), "file", limit=1) == b"x"
    finally:
        os.close(fd)
