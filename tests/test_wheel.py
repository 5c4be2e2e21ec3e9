"""What is built from the sources, and what is built from that: the wheel people install."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "gockpt", "kernels", "storage")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a ``wheel`` or ``sdist`` in a source tree, the way pip does, and return the file."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source tree: building leaves files behind."""
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, copy / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy2(path, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def expected() -> set[str]:
    """Return the files that the wheel must hold, as it names them."""
    found = {"gockpt/py.typed"}
    for folder in ("gockpt", "kernels", "storage"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            parts = path.relative_to(REPOSITORY).parts
            if parts[:2] not in {("gockpt", "kernels"), ("gockpt", "storage")}:
                found.add("/".join(parts if folder == "gockpt" else ("gockpt", *parts)))
    return found


def contents(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    """No ``kernels`` and no ``storage`` beside it: others look for packages of those names."""
    assert contents(wheel) == expected()


def test_the_wheel_of_the_sdist_is_the_same(source, wheel, tmp_path):
    sdist = build("sdist", source, tmp_path)
    with tarfile.open(sdist) as archive:
        # Python 3.11 has the argument from 3.11.4 on only.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert (unpacked / "LICENSE").read_text() == (REPOSITORY / "LICENSE").read_text()
    again = build("wheel", unpacked, tmp_path)
    assert contents(again) == contents(wheel)
    first, second = zipfile.ZipFile(wheel), zipfile.ZipFile(again)
    assert [name for name in contents(wheel) if first.read(name) != second.read(name)] == []


def test_the_wheel_imports_without_the_sources(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import gockpt, gockpt.kernels, gockpt.storage\n"
        "print(gockpt.__file__, gockpt.kernels.__file__, gockpt.storage.__file__)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert all(Path(name).is_relative_to(tmp_path) for name in done.stdout.split())


def test_the_wheel_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith("dist-info/METADATA"))
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Requires-Python: >=3.11\n" in metadata
    required = re.findall(r"^Requires-Dist: ([A-Za-z0-9_.-]+)[^;\n]*$", metadata, re.MULTILINE)
    needed = ["awscrt", "click", "msgspec", "numba", "numcodecs", "numpy", "rich", "torch", "zarr"]
    assert sorted(required) == needed
    (scripts,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith("entry_points.txt"))
    assert "[console_scripts]\ngockpt = gockpt.cli:main\n" in scripts
