"""bfloat16 and float8 in zarr-python: every bit pattern, every fill value, and no harm without ml_dtypes."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zarr
from packaging.version import Version
from zarr.dtype import data_type_registry, parse_dtype

from gockpt.core.array_spec import DTYPES
from gockpt.storage.format import zarr_dtypes
from gockpt.storage.format.zarr_dtypes import register_zarr

EXTENSIONS = [name for name, dtype in DTYPES.items() if not dtype.core]


@pytest.fixture(autouse=True)
def _registered():
    register_zarr()


def native(name):
    return np.dtype(getattr(ml_dtypes, name))


@pytest.mark.parametrize("name", EXTENSIONS)
def test_every_bit_pattern_goes_through_zarr(name, tmp_path):
    bits = np.arange(256 ** DTYPES[name].itemsize, dtype=f"u{DTYPES[name].itemsize}")
    values = bits.view(native(name)).reshape(16, -1)
    array = zarr.create_array(
        tmp_path / "a",
        shape=values.shape,
        chunks=(5, values.shape[1]),
        dtype=values.dtype,
        config={"write_empty_chunks": True},  # else values are compared with the fill value, and NaNs warn
    )
    array[...] = values
    again = zarr.open_array(tmp_path / "a", mode="r")
    assert again.dtype == native(name)
    assert again[...].tobytes() == values.tobytes()


@pytest.mark.parametrize("name", EXTENSIONS)
def test_every_value_survives_as_a_fill_value(name):
    dtype = parse_dtype(name, zarr_format=3)
    size = DTYPES[name].itemsize
    assert dtype.item_size == size
    assert dtype.to_native_dtype() == native(name)
    for bits in range(256**size):
        scalar = np.array(bits, f"u{size}").view(native(name))[()]
        text = dtype.to_json_scalar(scalar, zarr_format=3)
        assert (
            np.asarray(dtype.from_json_scalar(text, zarr_format=3)).tobytes() == np.asarray(scalar).tobytes()
        )
    assert np.asarray(dtype.default_scalar()).tobytes() == bytes(size)
    assert dtype.to_json_scalar(dtype.from_json_scalar("NaN", zarr_format=3), zarr_format=3) == "NaN"
    assert float(dtype.from_json_scalar(1, zarr_format=3)) == 1.0


@pytest.mark.parametrize("name", EXTENSIONS)
def test_what_it_is_not_is_refused(name):
    dtype = parse_dtype(name, zarr_format=3)
    for wrong in ("one", None, [0.0], True):
        with pytest.raises(TypeError, match=name):
            dtype.from_json_scalar(wrong, zarr_format=3)
    with pytest.raises(TypeError, match=name):
        dtype.cast_scalar("one")
    with pytest.raises(TypeError, match="Zarr v2"):
        dtype.from_json_scalar(0.0, zarr_format=2)
    with pytest.raises(ValueError, match="use Zarr v3"):
        dtype.to_json(2)
    with pytest.raises(ValueError, match=name):
        type(dtype).from_native_dtype(np.dtype("float32"))
    for form in (2, 3):
        with pytest.raises(ValueError, match=name):
            type(dtype).from_json("float32", zarr_format=form)
    assert parse_dtype(np.dtype("float32"), zarr_format=3).to_json(3) == "float32"


def test_registering_again_changes_nothing_and_replaces_nobody():
    before = dict(data_type_registry.contents)
    register_zarr()
    assert data_type_registry.contents == before
    ours = data_type_registry.contents["bfloat16"]
    data_type_registry.register("bfloat16", data_type_registry.contents["float16"])
    try:
        register_zarr()
        assert data_type_registry.contents["bfloat16"] is data_type_registry.contents["float16"]
    finally:
        data_type_registry.register("bfloat16", ours)


def entry_points():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    return project["entry-points"]["zarr.data_type"]


def test_the_entry_points_lead_to_these_classes():
    points = entry_points()
    assert sorted(points) == sorted(EXTENSIONS)
    for name, value in points.items():
        cls = importlib.metadata.EntryPoint(name, value, "zarr.data_type").load()
        assert cls._zarr_v3_name == name
        assert getattr(zarr_dtypes, cls.__name__) is cls


def test_newer_zarr_python_needs_no_registering(tmp_path):
    zarr.create_array(tmp_path / "b", shape=(2,), dtype=native("bfloat16"))[...] = 1
    done = run(
        "import importlib.metadata as m, json\n"
        "points = [m.EntryPoint(n, v, 'zarr.data_type') for n, v in json.loads(sys.argv[2]).items()]\n"
        "m.entry_points = lambda **_: m.EntryPoints(points)\n"
        "import zarr\n"
        "print(zarr.open_array(sys.argv[1] + '/b')[...].astype('float32').tolist())\n",
        str(tmp_path),
        json.dumps(entry_points()),
    )
    if Version(zarr.__version__) >= Version("3.4.1"):
        assert (done.returncode, done.stdout) == (0, "[1.0, 1.0]\n"), done.stderr
    else:  # it collects entry points and never loads them, hence register_zarr()
        assert "No Zarr data type found that matches 'bfloat16'" in done.stderr


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", "import sys\n" + code, *arguments], capture_output=True, text=True, check=False
    )


def test_without_ml_dtypes_everything_else_still_works(tmp_path):
    array = zarr.create_array(tmp_path / "b", shape=(2,), dtype=native("bfloat16"))
    array[...] = 1
    zarr.create_array(tmp_path / "f", shape=(2,), dtype="float32")[...] = 1
    code = (
        "sys.modules['ml_dtypes'] = None\n"
        "import zarr\n"
        "from gockpt.storage.format.zarr_dtypes import register_zarr\n"
        "register_zarr()\n"
        "assert zarr.open_array(sys.argv[1] + '/f')[...].tolist() == [1.0, 1.0]\n"
        "try:\n"
        "    zarr.open_array(sys.argv[1] + '/b')[...]\n"
        "except ImportError as error:\n"
        "    assert 'pip install ml_dtypes' in str(error)\n"
        "else:\n"
        "    raise SystemExit('no error')\n"
    )
    done = run(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
