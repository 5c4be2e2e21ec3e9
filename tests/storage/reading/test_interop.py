"""What the store publishes opens in zarr-python, zarrs and tensorstore, and gives equal bits."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr

from gockpt.core.array_spec import DTYPES, ArraySpec
from gockpt.core.boxes import Box
from gockpt.storage.format.chunk_grid import chunked_layout
from gockpt.storage.format.zarr_dtypes import register_zarr
from gockpt.storage.local.compression import Compression
from gockpt.storage.local.store import Store
from gockpt.storage.read.find import list_checkpoints, open_checkpoint

CORE = [name for name, dtype in DTYPES.items() if dtype.core]
EXTENSIONS = [name for name, dtype in DTYPES.items() if not dtype.core]
PIPELINES = {
    "zarr": "zarr.core.codec_pipeline.BatchedCodecPipeline",
    "zarrs": "zarrs.ZarrsCodecPipeline",
}
SHAPES = {
    "rows": ((7, 3), (3, 3)),  # the last chunk has one row of three
    "whole": ((5, 2, 2), (5, 2, 2)),
    "line": ((10,), (4,)),
    "scalar": ((), ()),
    "empty": ((0, 3), (1, 3)),
    "hollow": ((2, 0), (2, 1)),
}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    """Make zarr-python know what it doesn't know by itself; the tests without run in their own process."""
    register_zarr()


def publish(path, dtypes, *, step=12, codec=None):
    """Save random bits of every dtype in every shape through the store; returns them by public name."""
    compression = Compression(codec, threads=1, smallest=1)
    layouts, values = [], {}
    rng = np.random.default_rng(3)
    for dtype in dtypes:
        for kind, (shape, chunk) in SHAPES.items():
            spec = ArraySpec(("model", f"{dtype}.{kind}"), shape, dtype)
            data = rng.integers(0, 256, (*shape, spec.itemsize), dtype=np.uint8)
            values[spec.public_name] = data & 1 if dtype == "bool" else data
            layouts.append(chunked_layout(spec, chunk))
    with (
        Store(path, compression=compression) as store,
        store.begin(step, layouts, state={"n": 1}, attributes={"step": step}, exact=True) as transaction,
    ):
        for layout in layouts:
            flat = values[layout.spec.public_name].reshape(-1)
            at = 0
            for slot in layout.slots:
                arena = mmap.mmap(-1, slot.capacity)
                arena[: slot.nbytes] = flat[at : at + slot.nbytes].tobytes()
                transaction.write_chunk(layout, slot, memoryview(arena))
                at += slot.nbytes
        published = transaction.commit()
    return published, values


def numpy_dtype(name):
    return np.dtype(getattr(ml_dtypes, name) if name in EXTENSIONS else name)


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("core"), CORE)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("everything"), DTYPES)


@pytest.fixture
def damaged(tmp_path):
    """The path of a checkpoint with one flipped bit in the first chunk of ``model/float32.rows``."""
    published, _ = publish(tmp_path, ["float32"])
    path = Path(published.path, "model/float32.rows/c.0.0")
    data = bytearray(path.read_bytes())
    data[5] ^= 8
    path.write_bytes(data)
    return published.path


@pytest.fixture(scope="module")
def zstd(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("zstd"), DTYPES, codec="zstd")


@pytest.fixture(scope="module")
def blosc(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("blosc"), DTYPES, codec="blosc")


@pytest.fixture(params=["core", "everything", "zstd", "blosc"])
def saved(request):
    return request.getfixturevalue(request.param)


def same(array, data, dtype):
    assert array.dtype == numpy_dtype(dtype)
    assert array.shape == data.shape[:-1]
    assert array.tobytes() == data.tobytes()


def by_name(values):
    for name, data in values.items():
        yield name, name.removeprefix("model/").split(".")[0], data


def test_our_reader_agrees_with_the_store(saved):
    published, values = saved
    with open_checkpoint(published.path) as checkpoint:
        assert (checkpoint.step, checkpoint.seq, checkpoint.exact) == (12, published.seq, True)
        assert checkpoint.state() == {"n": 1}
        assert checkpoint.manifest.attempt == published.attempt
        assert list(checkpoint.arrays) == list(values)
        for name, data in values.items():
            out = np.empty(data.nbytes, np.uint8)
            checkpoint.read_into(name, None, out)
            assert out.tobytes() == data.tobytes()
        out = np.empty(2 * 2 * 8, np.uint8)
        checkpoint.read_into("model/int64.rows", Box((2, 1), (2, 2)), out)
        assert out.tobytes() == values["model/int64.rows"][2:4, 1:].tobytes()
        report = checkpoint.verify()
        assert report.problems == ()
    (entry,) = list_checkpoints(published.path.rpartition("/")[0])
    assert (entry.path, entry.attempt) == (published.path, published.attempt)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_zarr_python_and_zarrs_give_equal_bits(saved, pipeline):
    published, values = saved
    with zarr.config.set({"codec_pipeline.path": PIPELINES[pipeline]}), warnings.catch_warnings():
        # zarrs says so and lets zarr-python decode what it doesn't know, which is float8 only.
        warnings.filterwarnings(
            "ignore", "Array is unsupported by ZarrsCodecPipeline: .*float8|.*data_type=fl"
        )
        group = zarr.open_group(published.path, mode="r")
        assert group.attrs["step"] == 12
        for name, dtype, data in by_name(values):
            array = group[name]
            same(np.asarray(array[...]), data, dtype)
            if array.ndim and data.size:
                assert np.asarray(array[1:3]).tobytes() == data[1:3].tobytes()


def test_zarr_python_lists_every_array(saved):
    published, values = saved
    group = zarr.open_group(published.path, mode="r")
    assert {f"model/{name}" for name, _ in group["model"].arrays()} == set(values)
    consolidated = group.metadata.consolidated_metadata is not None
    assert consolidated == all(dtype in CORE for _, dtype, _ in by_name(values))


def test_tensorstore_gives_equal_bits(saved):
    published, values = saved
    for name, dtype, data in by_name(values):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{published.path}/{name}"}}
        store = tensorstore.open(spec, open=True, read=True).result()
        same(store.read().result(), data, dtype)


def run_plain(code, *arguments):
    """Run Python without gockpt's data types registered, nor any entry points."""
    head = "import sys, importlib.metadata as m\nm.entry_points = lambda **_: m.EntryPoints()\n"
    done = subprocess.run(
        [sys.executable, "-c", head + code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_plug_in_everything_but_the_extensions_is_read(everything):
    published, values = everything
    code = (
        "import zarr, json\n"
        "group = zarr.open_group(sys.argv[1], mode='r')\n"
        "assert group.metadata.consolidated_metadata is None\n"
        "print(json.dumps({name: group[name][...].tobytes().hex() for name in json.loads(sys.argv[2])}))\n"
        "try:\n"
        "    group['model/bfloat16.rows']\n"
        "except ValueError as error:\n"
        "    assert 'bfloat16' in str(error)\n"
        "else:\n"
        "    raise SystemExit('this zarr-python knows bfloat16 by itself')\n"
    )
    names = [name for name, dtype, _ in by_name(values) if dtype in CORE]
    read = json.loads(run_plain(code, published.path, json.dumps(names)))
    assert read == {name: values[name].tobytes().hex() for name in names}


@pytest.mark.parametrize(
    ("kind", "compressors"),
    [
        ("everything", []),
        ("zstd", [zarr.codecs.ZstdCodec(level=1)]),
        ("blosc", [zarr.codecs.BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=1)]),
    ],
)
def test_the_documents_are_the_ones_zarr_python_would_write(request, tmp_path, kind, compressors):
    published, values = request.getfixturevalue(kind)
    for name, dtype, data in by_name(values):
        if compressors and (not data.size or (kind == "blosc" and data.shape[-1] > 1)):
            continue  # stays raw; or has another type size
        ours = json.loads(Path(published.path, name, "zarr.json").read_bytes())
        zarr.create_array(
            tmp_path / name,
            shape=ours["shape"],
            chunks=ours["chunk_grid"]["configuration"]["chunk_shape"],
            dtype=numpy_dtype(dtype),
            compressors=[*compressors, zarr.codecs.Crc32cCodec()],
            chunk_key_encoding={"name": "default", "separator": "."},
            fill_value=np.zeros((), numpy_dtype(dtype))[()],  # zero bytes: not every type has a zero
            dimension_names=ours.get("dimension_names"),
        )
        assert ours == json.loads((tmp_path / name / "zarr.json").read_bytes())


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_zarr_python_and_zarrs_notice_a_flipped_bit(damaged, pipeline):
    with zarr.config.set({"codec_pipeline.path": PIPELINES[pipeline]}):
        array = zarr.open_group(damaged, mode="r")["model/float32.rows"]
        with pytest.raises((ValueError, RuntimeError), match="(?i)crc|checksum"):
            array[0:3]  # one whole chunk: of a part of one, zarrs doesn't compare the checksum


def test_tensorstore_notices_a_flipped_bit(damaged):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{damaged}/model/float32.rows"}}
    store = tensorstore.open(spec, open=True, read=True).result()
    with pytest.raises(ValueError, match="Digest mismatch"):
        store[1:2].read().result()
