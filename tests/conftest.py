"""What every test gets: Hypothesis profiles, few threads, and a directory of its own.

Nothing here imports torch: the storage tests also run where it isn't installed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.configuration import set_hypothesis_home_dir

# Read by torch and OpenMP when they are first imported, here or in a child process. Two threads
# exercise the parallel paths, and don't starve a small machine.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "2")

# Found examples are kept across runs, wherever a test's own directory is.
set_hypothesis_home_dir(Path(__file__).resolve().parent.parent / ".hypothesis")

# Examples here run optimizers and write files: no deadline, and slow generation is no failure.
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("dev", max_examples=20, **COMMON)
settings.register_profile("ci", max_examples=40, derandomize=True, **COMMON)
settings.register_profile("soak", max_examples=2000, **COMMON)
settings.register_profile("debug", max_examples=20, phases=[Phase.explicit, Phase.generate], **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own():
    """Run each test in an empty directory, so that default paths never meet between tests."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="gockpt-test-") as directory:
        os.chdir(directory)
        try:
            yield
        finally:
            _close_what_is_left()
            os.chdir(before)


@pytest.fixture(scope="module")
def directories():
    """Let saves write directories of files by default, for tests that look into them or damage them."""
    from gockpt.options import Options

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Options.__init__.__kwdefaults__, "layout", "directory")
        yield


def _close_what_is_left():
    """Close checkpointers that a test left open: the next test must not find them."""
    registry = sys.modules.get("gockpt.registry")
    for saver in [] if registry is None else registry.open_here():
        for end in (saver.abort, saver.close):
            with contextlib.suppress(Exception):
                end()
        registry.opened.discard(saver)
