"""Compiled kernels on the disk: found again, and never a reason to fail."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent

SCRIPT = """
    import logging, resource, signal, sys, tempfile
    said = []
    class Collect(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())
    logging.getLogger("gockpt").addHandler(Collect())
    {before}
    import numpy as np
    from gockpt.kernels import fingerprint_numba as f, gradient16_numba as quantise, reference
    data = np.arange(4096, dtype=np.uint8)
    assert f.fingerprint(data, 56) == reference.fingerprint(data, 56)  # it calls other kernels
    out = np.empty(2, np.float32)
    quantise.widen(np.array([0x3F80, 0x4000], np.uint16), out)
    assert out.tolist() == [1, 2]
    kernels = f._fingerprint, quantise._widen
    counts = [sum(sum(kind.values()) for kind in (k.stats.cache_hits,)) for k in kernels]
    print(counts, said)
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package where nothing can be kept beside the sources, as in a read-only image."""
    kernels = tmp_path / "site" / "gockpt" / "kernels"
    kernels.mkdir(parents=True)
    for file in (REPOSITORY / "kernels").glob("*.py"):
        (kernels / file.name).symlink_to(file)
    for file in (REPOSITORY / "gockpt").glob("*.py"):
        (kernels.parent / file.name).symlink_to(file)
    (kernels / "__pycache__").write_text("no directory")
    return tmp_path / "site"


def run(package: Path, before: str = "pass", **environment: str) -> tuple[list[int], list[str]]:
    """Run kernels in a fresh process; return how many were found on the disk, and what was logged."""
    base = {"PATH": os.environ["PATH"], "PYTHONPATH": str(package), "HOME": "/dev/null/nowhere"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(SCRIPT).format(before=before)],
        env=base | environment,
        cwd=package,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found, _, said = done.stdout.partition("] ")
    return eval(found + "]"), eval(said)


NO_TEMPORARY = "tempfile.tempdir = '/nonexistent'"


@pytest.mark.parametrize(
    "before",
    [
        NO_TEMPORARY,
        # Every write fails, as on a full disk or one that turned read-only in the middle.
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))",
    ],
    ids=["no place", "full disk"],
)
def test_without_a_place_kernels_are_compiled_and_that_is_said_once(package, tmp_path, before):
    (tmp_path / "tmp").mkdir()
    hits, said = run(package, before, TMPDIR=str(tmp_path / "tmp"))
    assert hits == [0, 0]
    assert [line for line in said if "can't be kept on the disk" in line] == said[-1:]
    assert "NUMBA_CACHE_DIR" in said[-1]
    assert list(tmp_path.rglob("*.kernel*")) == []


def test_without_a_home_they_are_kept_where_only_this_user_can_read(package, tmp_path):
    (tmp_path / "tmp").mkdir()
    hits, said = run(package, "import os; os.umask(0o777)", TMPDIR=str(tmp_path / "tmp"))
    (place,) = (tmp_path / "tmp").glob("gockpt-kernels-*")
    assert (hits, place.stat().st_mode & 0o777) == ([0, 0], 0o700)
    assert [str(place) in line for line in said] == [True]


def test_the_next_process_finds_them_and_says_nothing(package, tmp_path):
    assert run(package, NUMBA_CACHE_DIR=str(tmp_path / "c")) == ([0, 0], [])
    assert run(package, NUMBA_CACHE_DIR=str(tmp_path / "c")) == ([1, 1], [])
    # Where they are found they need not be kept.
    before = f"{NO_TEMPORARY}; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))"
    assert run(package, before, NUMBA_CACHE_DIR=str(tmp_path / "c")) == ([1, 1], [])


@pytest.mark.parametrize("kind", ["open to others", "a link", "a file"])
def test_a_place_that_others_could_write_to_is_not_used(package, tmp_path, kind):
    (tmp_path / "tmp").mkdir()
    place = tmp_path / "tmp" / f"gockpt-kernels-{os.geteuid()}"
    if kind == "open to others":
        place.mkdir()
        place.chmod(0o777)
    elif kind == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.write_bytes(b"")
    hits, said = run(package, TMPDIR=str(tmp_path / "tmp"))
    assert hits == [0, 0]
    assert ["can't be kept" in line for line in said] == [True]
    assert list(tmp_path.rglob("*.kernel*")) == []


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1  # in the machine code: loading it would succeed
    file.write_bytes(data)


DAMAGE = (
    flip,
    lambda file: file.write_bytes(file.read_bytes()[:100]),
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(bytes(file.stat().st_size)),
)


def test_damaged_files_are_compiled_again(package, tmp_path):
    places = {"NUMBA_CACHE_DIR": str(tmp_path / "c")}
    run(package, **places)
    files = sorted((tmp_path / "c").rglob("*.kernel"))  # those that are loaded, and the inner ones
    assert files[1].name.startswith("fingerprint_numba._fingerprint-")
    assert files[-1].name.startswith("gradient16_numba._widen-")
    for file, damage in zip(files, (*DAMAGE[:4], flip), strict=True):
        damage(file)
    hits, said = run(package, **places)
    assert hits == [0, 0]
    assert ["is damaged" in line for line in said] == [True]
    assert run(package, **places) == ([1, 1], [])


def test_a_change_of_any_source_makes_all_of_them_stale(package, tmp_path):
    """Also of a file whose functions are only called: they are part of what was compiled."""
    places = {"NUMBA_CACHE_DIR": str(tmp_path / "c")}
    run(package, **places)
    before = set((tmp_path / "c").rglob("*.kernel"))
    native = package / "gockpt" / "kernels" / "numba_intrinsics.py"
    text = native.read_text()
    native.unlink()
    native.write_text(text + "\n# another version\n")
    assert run(package, **places) == ([0, 0], [])
    after = set((tmp_path / "c").rglob("*.kernel"))
    assert len(after) == len(before)
    assert not after & before


@pytest.mark.parametrize("odd", ["/dev/null/x", "relative/x", "\udcff\udcfe"])
def test_an_odd_place_that_the_user_names_is_no_error(package, tmp_path, odd):
    (tmp_path / "tmp").mkdir()
    hits, said = run(package, NUMBA_CACHE_DIR=odd, TMPDIR=str(tmp_path / "tmp"))
    assert hits == [0, 0]
    assert len(said) <= 1


@pytest.mark.parametrize("how", ["NUMBA_DISABLE_JIT", "no Numba"])
def test_where_nothing_is_compiled_fingerprints_are_numpys_and_other_kernels_refuse(package, how):
    script = """
        import sys
        if {gone}:
            sys.modules["numba"] = None
        import numpy as np
        from gockpt.kernels import fingerprint_numba as f, gradient16_numba as quantise, reference, replay
        for size in (1, 65_536, 70_000, 70_001):
            data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
            for position in (0, 24, (1 << 35) - 40, 1 << 62):
                assert f.fingerprint(data, position) == reference.fingerprint(data, position)
            copy = np.empty_like(data)
            assert f.copy_fingerprint(data, copy, 72) == reference.fingerprint(data, 72)
            assert (copy == data).all()
            assert f.fingerprint(data[:0]) == 0
        ones = [np.ones(64, np.float32) for _ in range(4)]
        refused = []
        for call in (
            lambda: replay.run("adam", (8, 0), ones[0], ones[1:3], ones[3:], [(1.0,) * 9], tail=True),
            lambda: quantise.narrow(ones[0], np.zeros(64, np.uint16)),
        ):
            try:
                call()
            except RuntimeError as error:
                refused.append(str(error))
        print(all((array == 1).all() for array in ones), refused)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script).format(gone=how == "no Numba")],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(package), "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True ["), done.stdout
    assert done.stdout.count(" is not compiled: ") == 2
    assert ("Numba can't be imported" if how == "no Numba" else how) in done.stdout
    assert done.stderr.count("kernels are not compiled") == 1
