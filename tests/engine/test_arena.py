"""The arena: whole pages, zeroed, shared, and kept out of forked children."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
from pathlib import Path

import numpy as np
import pytest

from gockpt.errors import SaveError
from gockpt.staging.arena import Arena


def mapping_of(arena):
    """Return the arena's entries in the kernel's list of this process's mappings."""
    text = Path("/proc/self/smaps").read_text()
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)
    found = []
    for block in filter(None, blocks):
        start, end = (int(part, 16) for part in block.split(" ", 1)[0].split("-"))
        if start < arena.address + arena.nbytes and arena.address < end:
            found.append(block)
    return found


@pytest.mark.parametrize(
    ("asked", "got"), [(0, 4096), (1, 4096), (4096, 4096), (4097, 8192), (1 << 20, 1 << 20)]
)
def test_an_arena_is_whole_zeroed_pages(asked, got):
    arena = Arena(asked)
    assert arena.nbytes == arena.data.nbytes == got
    assert arena.address % 4096 == 0
    assert arena.address == arena.data.ctypes.data
    assert not arena.data.any()


def test_views_share_the_memory():
    arena = Arena(8192)
    view = arena.view(4090, 12)
    view[:] = np.arange(12, dtype=np.uint8)
    assert arena.data[4090:4102].tolist() == list(range(12))
    assert view.nbytes == 12
    assert view.flags.writeable
    assert view.flags.c_contiguous


def test_prefault_changes_no_byte_and_takes_the_pages():
    arena = Arena((64 << 20) + 12288)  # more than one request to the system
    arena.view(5000, 4)[:] = 7
    arena.view(arena.nbytes - 1, 1)[:] = 9
    arena.prefault()
    assert arena.data[5000:5004].tolist() == [7] * 4
    assert arena.data[-1] == 9
    assert int(np.count_nonzero(arena.data)) == 5
    if not arena._advise(23, 0, 4096):  # a kernel before 5.14 takes pages when they are first touched
        return
    resident = sum(int(re.search(r"^Rss:\s+(\d+) kB", b, re.MULTILINE)[1]) for b in mapping_of(arena))
    assert resident * 1024 >= arena.nbytes


def test_the_mapping_is_shared_and_not_copied_into_children():
    arena = Arena(1 << 20)
    for block in mapping_of(arena):
        flags = re.search(r"^VmFlags:(.*)$", block, re.MULTILINE)[1].split()
        assert "sh" in flags
        assert "dc" in flags


def test_more_than_there_is_is_a_clear_error():
    with pytest.raises(SaveError, match=r"can't reserve \d+ bytes of host memory.*free memory"):
        Arena(1 << 62)


def descriptors():
    """Return what the open descriptors of this process lead to."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            found.append(str(link.readlink()))
    return found


def test_a_shared_arena_is_the_same_memory_to_whoever_attaches_it():
    arena = Arena(8192, shared=True)
    arena.data[5] = 7
    other = Arena.attach(os.dup(arena.fd), arena.nbytes)
    assert other.address != arena.address
    assert other.data[5] == 7
    other.data[8191] = 9
    assert arena.data[8191] == 9
    assert other.address % 4096 == 0
    assert re.search(r"^VmFlags:.* dc ", mapping_of(arena)[0], re.MULTILINE)  # not for children


def test_a_shared_arena_leaves_nothing_behind():
    arena = Arena(1 << 20, shared=True)
    other = Arena.attach(os.dup(arena.fd), arena.nbytes)
    view = arena.view(0, 10)
    assert len([d for d in descriptors() if "gockpt-arena" in d]) == 1
    status = os.dup(arena.fd)
    del arena
    view[:] = 3  # views keep it
    assert os.fstat(status).st_size == 1 << 20
    del view
    assert os.fstat(status).st_size == 0  # the memory is gone, although others still have mapped it
    os.close(status)
    del other
    assert not [d for d in descriptors() if "gockpt-arena" in d]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_no_shared_arena():
    arena = Arena(4096, shared=True)
    child = os.fork()
    if not child:
        try:
            held = [d for d in descriptors() if "gockpt-arena" in d]
            del arena
        except BaseException:  # noqa: BLE001 - told by the status
            os._exit(2)
        os._exit(bool(held))
    assert os.waitpid(child, 0)[1] == 0
    arena.data[:] = 1  # the child's end of it took nothing from the parent
    assert os.fstat(arena.fd).st_size == 4096


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("shared", [False, True])
def test_an_arena_that_a_forked_child_lets_go_of_takes_nothing_from_it(shared):
    """The child does not have its pages, and has something else at those addresses by then."""
    arena = Arena(1 << 20, shared=shared)
    child = os.fork()
    if not child:
        mapping = ctypes.CDLL(None).mmap
        mapping.restype = ctypes.c_void_p
        mapping.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long]
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        own = mapping(arena.address, arena.nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if own != arena.address:
            os._exit(3)
        del arena
        ctypes.memset(own, 1, 1 << 20)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_what_is_smaller_than_it_was_said_to_be_is_refused():
    arena = Arena(4096, shared=True)
    with pytest.raises(SaveError, match="smaller"):
        Arena.attach(os.dup(arena.fd), 8192)
    assert len([d for d in descriptors() if "gockpt-arena" in d]) == 1


def test_a_shared_arena_that_can_not_be_is_refused():
    with pytest.raises(SaveError, match="free memory"):
        Arena(1 << 62, shared=True)
    assert not [d for d in descriptors() if "gockpt-arena" in d]
