"""How fast memory is fingerprinted on one thread, beside reading it, copying it and its CRC-32C, in one run.

Every round times each way once, in turn, so that what the machine does besides hits all of them alike. The
buffers are larger than any cache. The fingerprint does not know dtypes, so its speed is the same for all.
Speeds are those of the best round, since whatever else runs only ever takes time away.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from harness import machine_facts, settings_of, table, write_json

from gockpt.kernels import reference
from gockpt.kernels.fingerprint_numba import copy_fingerprint, fingerprint
from gockpt.storage.format.checksum import crc32c

if TYPE_CHECKING:
    from collections.abc import Callable

    Arms = dict[str, Callable[[], object]]

CHECKED = 1 << 16


def main() -> int:
    wanted = parsed()
    facts = machine_facts(tempfile.gettempdir())
    samples = measure(arms(wanted.bytes), wanted.rounds)
    if wanted.json != "-":
        show(samples, wanted.bytes)
    if wanted.json:
        settings = settings_of(wanted)
        write_json(
            wanted.json,
            {"bench": "fingerprint", "machine": facts, "settings": settings, "seconds": samples},
        )
    return 0


def arms(nbytes: int) -> Arms:
    """Return what is timed, by name. Stops if a fingerprint is wrong: no speed of something wrong."""
    data = np.random.default_rng(0).integers(0, 256, nbytes + 8, np.uint8)
    here, there = data[:nbytes], data[1 : 1 + nbytes]
    target = np.zeros(nbytes, np.uint8)
    for part in (here[:CHECKED], there[:CHECKED]):
        if {fingerprint(part), copy_fingerprint(part, target[: part.size])} != {reference.fingerprint(part)}:
            msg = "the fingerprint is not what the reference says: no speeds are shown"
            raise SystemExit(msg)
    return {
        "read (NumPy's sum of 8-byte words)": partial(np.sum, here.view(np.uint64)),
        "copy (NumPy)": partial(np.copyto, target, here),
        "crc32c": partial(crc32c, here),
        "fingerprint": partial(fingerprint, here),
        "fingerprint, at an odd address": partial(fingerprint, there),
        "copy and fingerprint": partial(copy_fingerprint, here, target),
        "copy and fingerprint, from an odd address": partial(copy_fingerprint, there, target),
    }


def measure(ways: Arms, rounds: int) -> dict[str, list[float]]:
    """Time each way once in every round, and once before to warm up."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for number in range(rounds):
        names = list(ways)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            ways[name]()
            samples[name].append(time.perf_counter() - began)
    return samples


def show(samples: dict[str, list[float]], nbytes: int) -> None:
    rows = [[name, f"{nbytes / min(seconds) / 1e9:.1f}"] for name, seconds in samples.items()]
    print(table([f"{nbytes / 1e6:.0f} MB, one thread", "best GB/s"], rows))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bytes", type=int, help="default: 256 MiB; quick: 1 MiB")
    parser.add_argument("--rounds", type=int, help="default: 15; quick: 3")
    parser.add_argument("--dir", help="taken as every bench takes it; nothing is written there")
    parser.add_argument("--json", metavar="FILE", help="write all samples; '-' is standard output")
    parser.add_argument("--quick", action="store_true", help="a toy in seconds: shows that it runs, no more")
    wanted = parser.parse_args()
    wanted.bytes = wanted.bytes or (1 << 20 if wanted.quick else 1 << 28)
    wanted.rounds = wanted.rounds or (3 if wanted.quick else 15)
    return wanted


if __name__ == "__main__":
    sys.exit(main())
