"""One run of the demo, on a toy, for every test about it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from types import ModuleType

BENCH = Path(__file__).resolve().parents[2] / "bench"


@dataclass(frozen=True, slots=True)
class DemoRun:
    status: int
    printed: str
    summary: dict
    directory: Path


@pytest.fixture(scope="session")
def bench() -> Path:
    return BENCH


@pytest.fixture(scope="session")
def tiny_demo(tmp_path_factory) -> DemoRun:
    """Return what ``python bench/demo.py --size tiny`` did."""
    directory = tmp_path_factory.mktemp("demo")
    summary = directory / "summary.json"
    command = [sys.executable, str(BENCH / "demo.py"), "--size", "tiny", "--json", str(summary)]
    done = subprocess.run(
        [*command, "--dir", str(directory / "work")], check=False, capture_output=True, text=True
    )
    assert summary.exists(), done.stdout + done.stderr
    return DemoRun(done.returncode, done.stdout, json.loads(summary.read_text()), directory / "work")


@pytest.fixture
def demo_modules(monkeypatch) -> dict[str, ModuleType]:
    """Return the demo's own modules, imported as its scripts import them."""
    monkeypatch.syspath_prepend(str(BENCH))
    import demo
    import demo_claims
    import demo_runs

    return {"demo": demo, "claims": demo_claims, "runs": demo_runs}
