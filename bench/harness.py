"""What every bench shares: facts about the machine, tables, and one form of JSON for results."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "cores",
    "device_facts",
    "filesystem_of",
    "machine_facts",
    "megabytes",
    "peak_bytes",
    "reset_peak",
    "settings_of",
    "table",
    "write_json",
]

PACKAGES = ("gockpt", "torch", "numpy", "numba", "zarr", "awscrt")


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def machine_facts(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a reader of a measurement must know about where it was taken.

    Args:
        directory: Where the bench writes; its file system is named.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": cores(),
        "memory_bytes": 1024 * int((_field("/proc/meminfo", "MemTotal") or "0 kB").split()[0]),
        "load_before": os.getloadavg()[0],
        "kernel": platform.release(),
        "filesystem": filesystem_of(directory),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def device_facts(index: int) -> dict[str, Any]:
    """Return what a reader must know about a CUDA device."""
    import torch
    import triton

    properties = torch.cuda.get_device_properties(index)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={index}"]
    try:
        driver = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = None
    return {
        "device": properties.name,
        "device_memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "driver": driver,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def settings_of(wanted: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return what was asked for, without the paths, which mean nothing elsewhere."""
    paths = ("dir", "directory", "json", "inside")
    return {**{name: value for name, value in vars(wanted).items() if name not in paths}, **more}


def _version(package: str) -> str | None:
    """Return a package's version; ``None`` if it isn't installed (gockpt itself, run from its sources)."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return what was measured: the commit, with a plus sign if the work tree differs from it."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout else "")


def _field(path: str, name: str) -> str | None:
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None


def filesystem_of(directory: str | os.PathLike[str]) -> str:
    """Return the type of the file system that a directory lies on, such as ``ext4``."""
    wanted = Path(directory).resolve()
    found, depth = "unknown", -1
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        mount = Path(before.split()[4].encode().decode("unicode_escape"))
        # Of two mounts on one point the later one is seen.
        if wanted.is_relative_to(mount) and len(mount.parts) >= depth:
            found, depth = after.split()[0], len(mount.parts)
    return found


def peak_bytes() -> int:
    """Return the most memory that this process had resident since the last :func:`reset_peak`."""
    return 1024 * int((_field("/proc/self/status", "VmHWM") or "0 kB").split()[0])


def reset_peak() -> None:
    """Make the memory resident now the peak."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a plain text table: the first column to the left, the others to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(header))]
    lines = [
        "  ".join(cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def megabytes(nbytes: float) -> str:
    """Return bytes in millions, for people."""
    return f"{nbytes / 1e6:.1f} MB"


def write_json(path: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Write a result where ``--json`` says; ``-`` is the standard output."""
    text = json.dumps(result, indent=1) + "\n"
    if os.fspath(path) == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text, encoding="utf-8")
