"""The arena: whole pages, zeroed, shared, and kept out of forked children."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from gockpt.arena import Arena
from gockpt.errors import SaveError


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
