from __future__ import annotations

import os
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.storage.format import checksum


def plain(data: bytes) -> int:
    """The definition, bit by bit."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


@given(st.binary(max_size=300))
def test_equals_the_definition(data):
    assert checksum.crc32c(data) == plain(data)


def test_equals_the_published_value():
    assert checksum.crc32c(b"123456789") == 0xE3069283
    assert checksum.crc32c(b"") == 0


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)])
def test_takes_any_buffer(kind):
    assert checksum.crc32c(kind(b"some bytes")) == plain(b"some bytes")


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_continues_and_combines(first, second):
    whole = plain(first + second)
    assert checksum.crc32c(second, checksum.crc32c(first)) == whole
    assert checksum.combine(checksum.crc32c(first), checksum.crc32c(second), len(second)) == whole


@given(st.binary(max_size=100), st.integers(0, 5000))
def test_zeros_equal_zeros(first, count):
    assert checksum.crc32c_zeros(count, checksum.crc32c(first)) == checksum.crc32c(first + bytes(count))


def test_zeros_of_many_gigabytes():
    half = checksum.crc32c_zeros(3 << 40)
    assert checksum.combine(half, half, 3 << 40) == checksum.crc32c_zeros(6 << 40)


@pytest.mark.parametrize(
    "nbytes", [0, 1, checksum.BLOCK - 1, checksum.BLOCK, checksum.BLOCK + 1, 3 * checksum.BLOCK + 5]
)
def test_blocks_chain_to_the_whole(nbytes):
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    blocks = checksum.crc32c_blocks(data.data)
    assert len(blocks) == checksum.block_count(nbytes)
    assert blocks.dtype == "<u4"
    assert checksum.chain(blocks, nbytes) == checksum.crc32c(data)
    for number, block in enumerate(blocks):
        assert block == checksum.crc32c(data[number * checksum.BLOCK : (number + 1) * checksum.BLOCK])


def test_hashing_lets_other_threads_run():
    data = np.zeros(32 << 20, np.uint8).data
    ticks, stop, started = 0, threading.Event(), threading.Event()

    def tick():
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            started.set()
            os.sched_yield()

    before = sys.getswitchinterval()
    thread = threading.Thread(target=tick)
    thread.start()
    started.wait()
    try:
        # No thread is asked to hand over any more: the other one runs only where hashing lets it.
        sys.setswitchinterval(1000)
        seen = ticks
        for _ in range(200):
            checksum.crc32c(data)
            if ticks > seen + 10:
                break
    finally:
        sys.setswitchinterval(before)
        stop.set()
        thread.join()
    assert ticks > seen + 10
