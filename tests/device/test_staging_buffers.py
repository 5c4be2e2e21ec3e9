"""Scratch memory that the device has no room for: copies do without it, and it is asked for again."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from gockpt.staging import staging_buffers
from gockpt.staging.device_budget import Room
from gockpt.staging.staging_buffers import StagingBuffers


def test_scratch_that_there_is_no_room_for_is_done_without_for_a_while(monkeypatch, caplog):
    clock, asked, full = [100.0], [], [True]

    def allocate(nbytes):
        asked.append(nbytes)
        if full[0]:
            raise torch.OutOfMemoryError("full")
        return bytearray(nbytes)

    monkeypatch.setattr(staging_buffers, "monotonic", lambda: clock[0])
    staging = StagingBuffers(
        SimpleNamespace(name="cuda:7", allocate=allocate), Room(64, 2, 4096), bounced=False
    )
    assert [staging.scratch(100) for _ in range(3)] == [None] * 3
    assert asked == [4096]
    assert caplog.text.count("cuda:7 has no room for 4096 bytes of snapshot") == 1
    full[0] = False
    assert staging.scratch(100) is None
    clock[0] += staging_buffers.RETRY_SECONDS
    memory, place = staging.scratch(100)
    assert (len(memory), place) == (4096, 0)
    assert staging.scratch(100) == (memory, 128)
