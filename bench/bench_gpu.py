"""How fast the device kernels are, against copies of the same bytes on the same device in the same run.

- pack: scattered float32 tensors of very different sizes into one buffer; bytes read and written per
  second, as a ratio of one device-to-device copy of as many bytes;
- quantise: the same tensors to float16 with a scale per block, likewise;
- fingerprint: the same tensors, bytes read per second;
- to the host: packed into a staging buffer and copied into a registered arena, or packed straight into that
  arena by the kernel, against one copy of as many bytes from the device into the same arena.

What each kernel wrote is compared before it is timed. Needs a CUDA device; `make gpu` runs the tests that
need one first. Rounds alternate between all of them; every sample is in the JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from harness import device_facts, machine_facts, settings_of, table, write_json

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    wanted = parsed()
    if not torch.cuda.is_available():
        print(f"bench_gpu: no CUDA device that torch {torch.__version__} can use", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    facts = {**machine_facts(tempfile.gettempdir()), **device_facts(device.index)}
    samples, nbytes = measured(device, wanted)
    rows = summary(samples, nbytes)
    print(table(["", "median ms", "GB/s", "of the copy"], [cells(row) for row in rows]))
    name = f"{datetime.now(UTC):%Y-%m-%d}-gpu-{facts['device'].lower().replace(' ', '-')}.json"
    target = wanted.json or RESULTS / name
    result = {"bench": "gpu", "machine": facts, "settings": settings_of(wanted)}
    write_json(target, {**result, "bytes": nbytes, "milliseconds": samples, "summary": rows})
    if wanted.json != "-":
        print(f"written: {target}")
    return 0


def measured(
    device: torch.device, wanted: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return the milliseconds of every round of everything, and the bytes that each moves."""
    from gockpt.kernels import reference
    from gockpt.kernels.fingerprint_numba import fingerprint
    from gockpt.staging.arena import Arena
    from gockpt.staging.cuda import PORTABLE_AND_MAPPED
    from gockpt.staging.pack_launch import Fingerprints, Packing, Quantising

    torch.manual_seed(0)
    random = np.random.default_rng(0)
    share = random.lognormal(0, 2, wanted.tensors)
    counts = np.maximum(1, share / share.sum() * wanted.megabytes * 250_000).astype(int).tolist()
    tensors = {f"t{i}": torch.randn(count, device=device) for i, count in enumerate(counts)}
    rooms = [-(-4 * count // 16) * 16 for count in counts]
    offsets = [int(end) - room for end, room in zip(np.cumsum(rooms), rooms, strict=True)]
    data, total = 4 * sum(counts), sum(rooms)
    programs = {"max_programs": wanted.programs}

    packing = Packing(tensors, offsets, total, device)
    prints = Fingerprints(tensors, [0] * len(tensors), device)
    quantising = Quantising(tensors, 0, device)
    staging = torch.zeros(total, dtype=torch.uint8, device=device)
    other = torch.zeros(total, dtype=torch.uint8, device=device)
    message = torch.zeros(quantising.message.nbytes, dtype=torch.uint8, device=device)
    arena = Arena(total)
    code = torch.cuda.cudart().cudaHostRegister(arena.address, arena.nbytes, PORTABLE_AND_MAPPED)
    if int(code) != 0:
        msg = f"can't register {arena.nbytes} bytes of host memory: CUDA error {int(code)}"
        raise SystemExit(msg)
    host = torch.from_numpy(arena.data)[:total]

    def to_the_host() -> None:
        packing.pack(staging, **programs)
        host.copy_(staging, non_blocking=True)

    runs: dict[str, Callable[[], object]] = {
        "copy on the device": lambda: other.copy_(staging),
        "pack": lambda: packing.pack(staging, **programs),
        "quantise": lambda: quantising.launch(message, **programs),
        "fingerprint": lambda: prints.launch(**programs),
        "copy to the host": lambda: host.copy_(staging, non_blocking=True),
        "pack, copy to the host": to_the_host,
        "pack straight to the host": lambda: packing.pack(host, **programs),
    }

    def check_arena(way: str) -> None:
        arena.data[:] = 0
        runs[way]()
        torch.cuda.synchronize()
        for number, (name, tensor) in enumerate(tensors.items()):
            content = tensor.cpu().numpy().view(np.uint8)
            if not np.array_equal(arena.view(offsets[number], content.nbytes), content):
                msg = f"{way} made something else of {name}: nothing is timed"
                raise SystemExit(msg)

    try:
        for way in ("pack, copy to the host", "pack straight to the host"):
            check_arena(way)
        for run in runs.values():
            run()
        torch.cuda.synchronize()
        values, written = prints.values(), message.cpu().numpy()
        for number, (name, tensor) in enumerate(tensors.items()):
            content = tensor.cpu().numpy()
            out = np.empty(content.size, np.float32)
            quantising.message.read(written, number, out)
            back = reference.dequantise(*reference.quantise(content))
            if not np.array_equal(out, back) or values[name] != fingerprint(content.view(np.uint8)):
                msg = f"what the kernels made of {name} is wrong: nothing is timed"
                raise SystemExit(msg)
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(wanted.rounds):
            for name, run in runs.items():
                samples[name].append(timed(run, wanted.repeats))
    finally:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaHostUnregister(arena.address)
    return samples, {
        "copy on the device": 2 * total,
        "pack": 2 * data,
        "quantise": data + quantising.message.nbytes,
        "fingerprint": data,
        "copy to the host": total,
        "pack, copy to the host": total,
        "pack straight to the host": total,
    }


def timed(run: Callable[[], object], repeats: int) -> float:
    """Return milliseconds per call on the device, launches included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def summary(samples: dict[str, list[float]], nbytes: dict[str, int]) -> list[dict[str, Any]]:
    """Return one row for each, its bandwidth compared round by round with the copy that it stands beside."""
    rates = {
        name: [nbytes[name] / milliseconds / 1e6 for milliseconds in taken] for name, taken in samples.items()
    }
    rows = []
    for name, rate in rates.items():
        beside = rates["copy to the host" if "host" in name else "copy on the device"]
        rows.append(
            {
                "name": name,
                "milliseconds": statistics.median(samples[name]),
                "gigabytes_per_second": statistics.median(rate),
                "of_the_copy": statistics.median(a / b for a, b in zip(rate, beside, strict=True)),
            }
        )
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row as text."""
    return [
        row["name"],
        f"{row['milliseconds']:.3f}",
        f"{row['gigabytes_per_second']:.1f}",
        f"{row['of_the_copy']:.3f}",
    ]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tensors", type=int, default=1000, help="how many (default: %(default)s)")
    parser.add_argument("--megabytes", type=int, help="of all of them (default: 1000; quick: 10)")
    parser.add_argument(
        "--programs", type=int, default=1024, help="of a launch at most (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, help="default: 15; quick: 2")
    parser.add_argument("--repeats", type=int, default=5, help="calls per sample (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="'-' is standard output (default: in bench/results)")
    parser.add_argument("--quick", action="store_true", help="little data: shows that it runs")
    wanted = parser.parse_args()
    wanted.megabytes = wanted.megabytes or (10 if wanted.quick else 1000)
    wanted.rounds = wanted.rounds or (2 if wanted.quick else 15)
    return wanted


if __name__ == "__main__":
    sys.exit(main())
