"""The kernels are what they claim at the machine's level: vectors, serial, without the GIL."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from numba import njit

from gockpt.kernels import adam_numba, fingerprint_numba, sgd_numba
from gockpt.kernels.numba_intrinsics import JIT

WIDE = {
    "x86_64": {
        "root": r"vsqrtps\t.*%[yz]mm",
        "fma": r"vfn?m(add|sub)\d+ps\t.*%[yz]mm",
        "product": r"vpmuludq\t.*%[yz]mm",
    },
    "aarch64": {"root": r"fsqrt\tv\d+\.4s", "fma": r"fml[as]\tv\d+\.4s", "product": r"umull2?\tv\d+\.2d"},
}[platform.machine()]

FLOATS = np.zeros(64, np.float32)
WORDS, COPY = np.zeros(64, np.uint64), np.zeros(64, np.uint64)


@pytest.mark.parametrize(
    ("loop", "arguments", "instructions"),
    [
        (adam_numba._update, (*[FLOATS] * 4, FLOATS), ("root", "fma")),
        (adam_numba._moments, (*[FLOATS] * 4, FLOATS), ("fma",)),
        (adam_numba._descend, (*[FLOATS] * 3, FLOATS), ("root",)),
        (sgd_numba._plain, (*[FLOATS] * 2, FLOATS), ("fma",)),
        (sgd_numba._momentum, (*[FLOATS] * 3, FLOATS), ("fma",)),
        (fingerprint_numba._sum_words, (WORDS.ctypes.data, WORDS.size, 0), ("product",)),
        (fingerprint_numba._copy_words, (WORDS.ctypes.data, COPY.ctypes.data, COPY.size, 0), ("product",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_loops_run_on_wide_vectors(loop, arguments, instructions):
    fresh = njit(**JIT)(loop.py_func)  # the code of a cached kernel can't be read
    with np.errstate(all="ignore"):
        fresh(*(a.copy() if isinstance(a, np.ndarray) else a for a in arguments))
    (code,) = fresh.inspect_asm().values()
    for name in instructions:
        assert re.search(WIDE[name], code), f"no wide {name}"


def test_the_gil_is_released():
    # With an endless switch interval nobody is ever asked to hand over the GIL: the other thread
    # advances only if a kernel lets go of it by itself.
    data = np.zeros(1 << 24, np.uint8)
    fingerprint_numba.fingerprint(data)
    ticks, stop, started = [0], threading.Event(), threading.Event()

    def tick():
        started.set()
        while not stop.is_set():
            ticks[0] += 1
            os.sched_yield()

    ticker = threading.Thread(target=tick)
    before = sys.getswitchinterval()
    ticker.start()
    started.wait()
    sys.setswitchinterval(1000)
    try:
        advanced = False
        for _ in range(500):
            seen = ticks[0]
            fingerprint_numba._fingerprint(0, data.ctypes.data, data.size, 0)
            advanced = ticks[0] > seen
            if advanced:
                break
    finally:
        sys.setswitchinterval(before)
        stop.set()
        ticker.join()
    assert advanced


def run_python(script: str, **environment: str) -> str:
    """Run a script in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_child_forked_in_the_middle_of_a_kernel_can_run_kernels():
    out = run_python(
        """
        import os, threading
        import numpy as np
        from gockpt.kernels.fingerprint_numba import fingerprint
        from gockpt.kernels.replay import run

        n, tasks = 1 << 16, len(os.listdir("/proc/self/task"))
        def update():
            arrays = [np.ones(n, np.float32) for _ in range(4)]
            row = (1, 0, 1, .1, .9, .1, 1, 1e-8, -1)
            run("adam", (8, 0), arrays[0], arrays[1:3], arrays[3:], [row], tail=True)
            return fingerprint(arrays[0].view(np.uint8))

        expected, started = update(), len(os.listdir("/proc/self/task")) - tasks
        stop, running = threading.Event(), threading.Event()
        def work():
            while not stop.is_set():
                update()
                running.set()
        thread = threading.Thread(target=work)
        thread.start()
        running.wait()
        codes = []
        for _ in range(5):
            child = os.fork()
            if not child:
                os._exit(0 if update() == expected else 1)
            codes.append(os.waitpid(child, 0)[1])
        stop.set()
        thread.join()
        print(codes, started)
        """
    )
    assert out == "[0, 0, 0, 0, 0] 0\n"  # and no kernel started a thread of its own
