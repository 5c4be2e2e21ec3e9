"""``import gockpt`` starts nothing and loads nothing heavy; storage needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
STORAGE = sorted(
    ".".join(("gockpt", *path.relative_to(REPOSITORY).with_suffix("").parts)).removesuffix(".__init__")
    for path in (REPOSITORY / "storage").rglob("*.py")
)
HEAVY = ("torch", "numba", "triton", "zarr", "numpy", "awscrt", "llvmlite", "msgspec")


def run(script: str) -> dict:
    """Run a script in a fresh interpreter, outside the repository, and return the JSON it prints."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_starts_and_loads_nothing():
    seen = run(
        "import json, os, signal, sys, threading\n"
        "environment, handler = dict(os.environ), signal.getsignal(signal.SIGINT)\n"
        "import gockpt\n"
        "print(json.dumps({\n"
        "  'threads': len(os.listdir('/proc/self/task')),\n"
        "  'python_threads': threading.active_count(),\n"
        "  'modules': sorted(sys.modules),\n"
        "  'environment': environment == dict(os.environ),\n"
        "  'handler': handler is signal.getsignal(signal.SIGINT),\n"
        "  'files': os.listdir('.'),\n"
        "}))"
    )
    assert seen["threads"] == seen["python_threads"] == 1
    assert not set(HEAVY) & set(seen["modules"])
    assert [m for m in seen["modules"] if m.split(".")[0] == "gockpt"] == ["gockpt"]
    assert seen["environment"]
    assert seen["handler"]
    assert seen["files"] == []


def test_errors_and_options_load_nothing_heavy():
    seen = run(
        "import json, sys, gockpt\n"
        "gockpt.Options, gockpt.GockptError\n"
        "print(json.dumps({'modules': sorted(sys.modules)}))"
    )
    assert not set(HEAVY) & set(seen["modules"])


@pytest.mark.parametrize("module", STORAGE)
def test_storage_works_without_torch(module):
    seen = run(
        "import json, sys, threading, importlib\n"
        "sys.modules['torch'] = None\n"  # any import of it raises ImportError
        f"importlib.import_module({module!r})\n"
        "print(json.dumps({'threads': threading.active_count(), 'modules': sorted(sys.modules)}))"
    )
    assert module in seen["modules"]
    assert seen["threads"] == 1
    assert not {"gockpt.checkpointer", "gockpt.saving", "gockpt.loading.load"} & set(seen["modules"])
