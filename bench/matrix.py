"""Run the tests of the promise with other versions of Python, torch, NumPy, Numba and Zarr than are pinned.

Each cell gets an environment of its own below ``.matrix/``. A torch that would bring several gigabytes of
CUDA libraries over the network is left out and listed with the reason, as is a Python that isn't installed.
Writes what happened as JSON and as a table; the exit status is 1 if a test failed.

    python bench/matrix.py [--only NAME] [--tests "tests/promise -x"] [--large] [--list]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENTS = REPOSITORY / ".matrix"
RESULTS = REPOSITORY / "bench" / "results"

PROMISE = (
    "tests/promise/test_equality.py tests/promise/test_resume.py tests/promise/test_structure.py "
    "tests/promise/test_quantised_saves.py tests/promise/test_worker_process.py "
    "tests/promise/test_nonfinite.py tests/restore/test_round_trip.py "
    "tests/restore/test_every_optimizer.py tests/restore/test_golden_training.py "
    "tests/replay/test_calibration.py tests/replay/test_replay_equals_torch.py"
)
WITHOUT_TORCH = "tests/storage tests/pure tests/kernels/test_reference.py tests/kernels/test_fingerprint.py"

NEEDS = ("numpy", "numba", "zarr", "numcodecs", "awscrt", "msgspec", "click", "rich")
TESTS = (
    *("ml_dtypes", "hypothesis", "pytest", "pytest-cov", "pytest-randomly", "pytest-timeout"),
    *("tensorstore", "zarrs", "obstore", "xarray", "safetensors", "moto", "boto3", "flask", "flask-cors"),
)
SHOWN = ("torch", "numpy", "numba", "zarr", "numcodecs", "awscrt")


@dataclass(frozen=True)
class Cell:
    """One combination. ``versions`` replace pins; what such a version needs is left to pip."""

    name: str
    python: str
    versions: dict[str, str] = field(default_factory=dict)
    tests: str = PROMISE
    torch: bool = True


CELLS = (
    Cell("pinned", "3.11"),
    *(
        Cell(f"torch {version}", "3.11", {"torch": version})
        for version in ("2.10.0", "2.11.0", "2.12.1", "2.14.1", "2.15.0")
    ),
    Cell("oldest numba", "3.11", {"numba": "0.61.2", "llvmlite": "0.44.0", "numpy": "2.2.6"}),
    Cell("oldest numpy", "3.11", {"numba": "0.60.0", "llvmlite": "0.43.0", "numpy": "1.26.4"}),
    Cell(
        "oldest zarr",
        "3.11",
        {"zarr": "3.1.4", "numcodecs": "0.16.1", "awscrt": "0.31.0", "msgspec": "0.19.0"},
    ),
    *(Cell(f"Python {version}", version) for version in ("3.12", "3.13", "3.14")),
    *(
        Cell(f"Python {version}, without torch", version, tests=WITHOUT_TORCH, torch=False)
        for version in ("3.12", "3.13", "3.14")
    ),
)


@dataclass
class Outcome:
    """What became of a cell: ``installed`` versions and counts of tests, or why it was not run."""

    cell: Cell
    not_run: str = ""
    installed: dict[str, str] = field(default_factory=dict)
    passed: int = 0
    failed: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def interpreter(version: str) -> str | None:
    """Return an interpreter of that version, or ``None``."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    kept = (str(path / "bin" / "python") for path in sorted(root.glob(f"versions/{version}.*")))
    for found in (shutil.which(f"python{version}"), *kept, sys.executable):
        if found is None:
            continue
        asked = [found, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return found
    return None


def pip(python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pip in an environment."""
    command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def last_error(done: subprocess.CompletedProcess[str]) -> str:
    """Return what pip says at its end."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return (lines or ["?"])[-1][:160]


def site(python: str) -> Path:
    """Return where an environment's packages are."""
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    return Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())


def refused(python: str, version: str, *, large: bool) -> str:
    """Return why a torch is not to be installed, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        asked = ("install", "--dry-run", "--no-deps", "--ignore-installed", "--only-binary", ":all:")
        done = pip(python, *asked, "--report", str(report), f"torch=={version}")
        if done.returncode:
            return f"no build of torch {version} for this Python can be had: {last_error(done)}"
        (found,) = json.loads(report.read_text())["install"]
    libraries = [name for name in found["metadata"].get("requires_dist", ()) if name.startswith("nvidia")]
    if libraries and not large and not found["download_info"]["url"].startswith("file:"):
        return f"torch {version} is only to be had as a build for CUDA, several gigabytes with its libraries"
    return ""


def constraints(cell: Cell, folder: Path) -> Path:
    """Write the pins that stand beside a cell's own versions."""
    lines = [
        line
        for line in (REPOSITORY / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#") and re.split(r"[=;]", line)[0] not in cell.versions
    ]
    if "torch" in cell.versions:  # its libraries and triton go with it
        lines = [line for line in lines if not line.startswith(("triton", "sympy", "networkx", "setuptools"))]
    path = folder / "constraints.txt"
    own = [f"{name}=={version}" for name, version in cell.versions.items()]
    path.write_text("\n".join([*lines, *own]))
    return path


def prepare(cell: Cell, *, large: bool) -> tuple[str, str]:
    """Return the environment's interpreter, or why there is none."""
    base = interpreter(cell.python)
    if base is None:
        return "", f"Python {cell.python} is not installed here"
    folder = ENVIRONMENTS / re.sub(r"\W+", "-", cell.name)
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([base, "-m", "venv", str(folder)], check=True)
    if (folder / "ready").exists():
        return str(python), ""
    pinned = CELLS[0]
    if cell is not pinned and cell.torch and cell.python == pinned.python and "torch" not in cell.versions:
        # It holds its own versions only, which come before those of the pinned cell.
        shared, why = prepare(pinned, large=large)
        if why:
            return "", why
        (site(str(python)) / "pinned.pth").write_text(f"{site(shared)}\n")
        own = [f"{name}=={version}" for name, version in cell.versions.items()]
        done = pip(str(python), "install", "-q", "--no-compile", "--no-deps", "--ignore-installed", *own)
        if done.returncode:
            return "", f"does not install: {last_error(done)}"
        (folder / "ready").touch()
        return str(python), ""
    pins = re.search(r"^torch==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    version = cell.versions.get("torch", pins[1] if pins else "")
    if cell.torch and (why := refused(str(python), version, large=large)):
        return "", why
    wanted = [*NEEDS, *TESTS, *(["torch", "triton"] if cell.torch else [])]
    done = pip(str(python), "install", "-q", "--no-compile", "-c", str(constraints(cell, folder)), *wanted)
    if done.returncode:
        return "", f"does not install: {last_error(done)}"
    (folder / "ready").touch()
    return str(python), ""


def run(cell: Cell, *, tests: str | None, large: bool) -> Outcome:
    """Install and try one cell."""
    outcome = Outcome(cell)
    python, outcome.not_run = prepare(cell, large=large)
    if outcome.not_run:
        return outcome
    ask = (
        "import importlib.metadata as m, json\nfound = {}\n"
        f"for name in {SHOWN}:\n try: found[name] = m.version(name)\n except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    outcome.installed = json.loads(done.stdout)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HYPOTHESIS_PROFILE": "ci"}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(tests or cell.tests).split()]
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    outcome.seconds = round(time.monotonic() - began, 1)
    counts = dict(re.findall(r"(\d+) (passed|failed|error)", done.stdout.rpartition("\n=")[2] or done.stdout))
    found = {word: int(number) for number, word in counts.items()}
    outcome.passed, outcome.failed = found.get("passed", 0), found.get("failed", 0) + found.get("error", 0)
    outcome.failures = re.findall(r"^(?:FAILED|ERROR) (.*)$", done.stdout, re.MULTILINE)[:20]
    if done.returncode and not outcome.failures:
        outcome.failed = max(1, outcome.failed)
        outcome.failures = [(done.stdout + done.stderr)[-400:]]
    return outcome


def table(outcomes: list[Outcome]) -> str:
    """Return what happened as Markdown."""
    lines = ["| Cell | Python | " + " | ".join(SHOWN) + " | Tests |", "|" + "---|" * (len(SHOWN) + 3)]
    for one in outcomes:
        versions = " | ".join(one.installed.get(name, "") for name in SHOWN)
        result = f"not run: {one.not_run}" if one.not_run else f"{one.passed} passed, {one.failed} failed"
        lines.append(f"| {one.cell.name} | {one.cell.python} | {versions} | {result} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--only", action="append", help="a cell's name; may be given several times")
    options.add_argument("--tests", help="what pytest runs, instead of each cell's own tests")
    options.add_argument("--large", action="store_true", help="download builds for CUDA as well")
    options.add_argument("--list", action="store_true", help="name the cells")
    chosen = options.parse_args()
    cells = [cell for cell in CELLS if not chosen.only or cell.name in chosen.only]
    if chosen.list or not cells:
        print("\n".join(cell.name for cell in CELLS))
        return 0 if chosen.list else 2
    outcomes = []
    for cell in cells:
        outcome = run(cell, tests=chosen.tests, large=chosen.large)
        outcomes.append(outcome)
        print(table([outcome]).splitlines()[-1], flush=True)
        print(*(f"    {line}" for line in outcome.failures), sep="\n", flush=True)
    stem = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-matrix"
    stem.with_suffix(".json").write_text(json.dumps([asdict(one) for one in outcomes], indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(outcomes))
    print(f"written: {stem}.json and .md")
    return 1 if any(one.failed for one in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
