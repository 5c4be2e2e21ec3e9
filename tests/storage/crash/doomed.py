"""Writers that the kernel kills, through strace: ``doomed.py PATH WHEN PLAN LOG``.

For each line ``NAME SCENARIO CALL NUMBER`` of the file PLAN a forked child saves into ``PATH/NAME``. strace
counts each child's calls anew and kills it on entry to its WHEN-th call of a kind. So that this is the
NUMBER-th of the save, the child first makes WHEN - NUMBER calls of that kind, which fail. For 0 it lives.
Prints ``NAME PID STATUS`` for each. One thread only: strace counts by thread.

strace is attached to a process that does nothing but fork: an interpreter that starts would be killed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
from dataclasses import replace

from gockpt.core.arena_layout import ArrayLayout
from gockpt.core.array_spec import ArraySpec
from gockpt.storage.format.chunk_grid import chunked_layout
from gockpt.storage.local.filesystem import Filesystem
from gockpt.storage.local.store import Store

# One chunk that is reserved and goes past the page cache, where that is possible; a last chunk in two writes.
ARRAYS = ((("model", "w"), (300_000,), 300_000), (("model", "b"), (2100,), 2048), (("s",), (), 1))

libc = ctypes.CDLL(None)
PR_SET_PTRACER = 0x59616D61
WASTE = {
    "mkdirat": lambda: libc.mkdirat(-1, b"x", 0),
    "openat": lambda: libc.openat(-1, b"x", 0),
    "pwrite64": lambda: libc.pwrite(-1, b"x", ctypes.c_size_t(1), ctypes.c_int64(0)),
    "fallocate": lambda: libc.fallocate(-1, 0, ctypes.c_int64(0), ctypes.c_int64(1)),
    "ftruncate": lambda: libc.ftruncate(-1, ctypes.c_int64(0)),
    "fsync": lambda: libc.fsync(-1),
    "syncfs": lambda: libc.syncfs(-1),
    "renameat": lambda: libc.renameat(-1, b"x", -1, b"y"),
    "renameat2": lambda: libc.renameat2(-1, b"x", -1, b"y", 1),
    "unlinkat": lambda: libc.unlinkat(-1, b"x", 0),
    "close": lambda: libc.close(-1),
}


class Chosen(Filesystem):
    """Takes the way of ext4, xfs and btrfs on any file system, or the way of all others."""

    def __init__(self, scenario):
        self.whole = scenario != "first"

    def syncfs_reports_errors(self, fd):
        return self.whole


def layouts():
    found, base = [], 0
    for name, shape, rows in ARRAYS:
        layout = chunked_layout(ArraySpec(name, shape, "float32"), (rows,) if shape else ())
        slots = tuple(replace(slot, offset=slot.offset + base) for slot in layout.slots)
        base += sum(slot.capacity for slot in slots)
        found.append(ArrayLayout(layout.spec, layout.chunk_shape, slots))
    return found, base


def save(store, step, marker):
    found, nbytes = layouts()
    arena = mmap.mmap(-1, nbytes)
    arena.write(bytes([marker]) * nbytes)
    data = memoryview(arena)
    with store.begin(step, found, state={"marker": marker}, attributes={}, exact=True) as transaction:
        for layout in found:
            for slot in layout.slots:
                transaction.write_chunk(layout, slot, data[slot.offset : slot.offset + slot.capacity])
        transaction.commit()


def act(path, scenario):
    with Store(path, fs=Chosen(scenario)) as store:
        if scenario == "prune":
            store.prune(1)
        else:
            save(store, 1 if scenario == "again" else 5, 9)


def prepare(path, scenario):
    with Store(path) as store:
        if scenario != "first":
            save(store, 1, 1)
        if scenario == "prune":
            save(store, 2, 2)


def fork_all(root, when, lines):
    """Fork a child for each line, one after the other; makes none of the counted calls itself."""
    for name, scenario, call, number in lines:
        child = os.fork()
        if child == 0:
            for _ in range(when - int(number) if int(number) else 0):
                WASTE[call]()
            act(os.path.join(root, name), scenario)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        os.write(1, f"{name} {child} {os.waitstatus_to_exitcode(status)}\n".encode())


def main():
    root, when, plan, log = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
    with open(plan, encoding="ascii") as file:
        lines = [line.split() for line in file]
    for name, scenario, _, _ in lines:
        prepare(os.path.join(root, name), scenario)
    assert threading.active_count() == 1
    gate = os.pipe()
    middle = os.fork()
    if middle == 0:
        libc.prctl(PR_SET_PTRACER, ctypes.c_ulong(-1))  # strace is no ancestor
        os.read(gate[0], 1)
        fork_all(root, when, lines)
        os._exit(0)
    calls = ",".join(WASTE)
    # No --seccomp-bpf: with it nothing is injected.
    inject = f"inject={calls}:signal=KILL:when={when}"
    strace = subprocess.Popen(
        ["strace", "-f", "-qq", "-o", log, "-e", f"trace={calls}", "-e", inject, "-p", str(middle)]
    )
    while is_untraced(middle):
        assert strace.poll() is None, "strace can't attach"
    os.write(gate[1], b"x")
    _, status = os.waitpid(middle, 0)
    strace.wait()
    sys.exit(os.waitstatus_to_exitcode(status))


def is_untraced(pid):
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
        return "TracerPid:\t0\n" in file.read()


if __name__ == "__main__":
    main()
