"""zarr-python, zarrs and tensorstore open what was written, and see the very bits."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import ZipStore

from gockpt.core.array_spec import DTYPES, ArraySpec
from gockpt.storage.format import zarr_metadata
from gockpt.storage.local.store import Store

CORE = [dtype.name for dtype in DTYPES.values() if dtype.core]
EXTENSIONS = [dtype.name for dtype in DTYPES.values() if not dtype.core]
# (shape, rows of a chunk): whole, cut evenly, cut with a rest, cut far from even, 0-d, empty, hollow.
SHAPES = [
    ((7,), 7),
    ((6, 5), 2),
    ((7, 33), 3),
    ((50, 3), 26),
    ((), 1),
    ((0, 4), 1),
    ((3, 0, 2), 3),
    ((4, 2, 3), 1),
]
ODD_NAMES = [
    ("model", "zarr.json"),
    ("model", "c"),
    ("model", "c.0"),
    ("model", "__x"),
    ("model", "a/b"),
    ("model", "a b%2F~"),
    ("model", "größe"),
    ("model", ""),
    ("model", ".."),
    ("model", "D"),
    ("model", "d"),
    ("model", "x" * 300),
]


def numpy_dtype(name):
    return np.dtype(getattr(ml_dtypes, name)) if name in EXTENSIONS else np.dtype(name)


def array_name(dtype, shape):
    return ("model", f"{dtype}-{'x'.join(map(str, shape))}")


@pytest.fixture(scope="module")
def all_sample(sampling):
    """Return a sample of every dtype in every shape."""
    return sampling.make(
        (array_name(dtype, shape), shape, dtype, rows) for dtype in DTYPES for shape, rows in SHAPES
    )


@pytest.fixture(scope="module")
def core_sample(sampling):
    return sampling.make(
        [(array_name(dtype, shape), shape, dtype, rows) for dtype in CORE for shape, rows in SHAPES]
        + [(name, (5, 2), "float32", 3) for name in ODD_NAMES]
    )


def saved(sample, path):
    with Store(path) as store:
        return sample.save(store, 3, marker=1).path


@pytest.fixture(scope="module")
def core(core_sample, tmp_path_factory):
    return saved(core_sample, tmp_path_factory.mktemp("core"))


@pytest.fixture(scope="module")
def everything(all_sample, tmp_path_factory):
    return saved(all_sample, tmp_path_factory.mktemp("all"))


def expected(sample, layout):
    """Return the array's true bytes."""
    return sample.content(layout, 1).tobytes()


def manifest_paths(checkpoint):
    with open(os.path.join(checkpoint, "gockpt.json")) as file:
        document = json.loads(file.readline())
    return {tuple(array["name"]): array["path"] for array in document["arrays"]}


@pytest.mark.parametrize("dtype", CORE)
@pytest.mark.parametrize(("shape", "rows"), SHAPES)
def test_documents_say_what_zarr_python_would_say(tmp_path, dtype, shape, rows):
    chunk = (rows, *(max(1, n) for n in shape[1:])) if shape else ()
    zarr.create_array(
        tmp_path / "a",
        shape=shape,
        chunks=chunk,
        dtype=dtype,
        chunk_key_encoding={"name": "default", "separator": "."},
        filters=None,
        compressors=[Crc32cCodec()],
        fill_value=DTYPES[dtype].fill_value if dtype[0] != "c" else 0,
        dimension_names=[f"dim_{position}:{size}" for position, size in enumerate(shape)],
    )
    theirs = json.loads((tmp_path / "a" / "zarr.json").read_text())
    ours = zarr_metadata.array_document(ArraySpec(("a",), shape, dtype), chunk)
    assert ours == theirs
    assert json.loads(zarr_metadata.dump(ours)) == theirs


def test_consolidated_metadata_is_what_zarr_python_would_consolidate(core, tmp_path):
    with open(os.path.join(core, "zarr.json")) as file:
        ours = json.load(file)
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", core, copy], check=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of files it doesn't know, and of consolidation itself
        zarr.consolidate_metadata(zarr.storage.LocalStore(copy))
    theirs = json.loads((copy / "zarr.json").read_text())
    assert ours == theirs
    assert list(ours["consolidated_metadata"]["metadata"]) == sorted(
        ours["consolidated_metadata"]["metadata"]
    )


def test_zarr_python_opens_all_core_dtypes(core, core_sample):
    group = zarr.open_group(core, mode="r")
    assert group.attrs.asdict() == {"title": "sample"}
    paths = manifest_paths(core)
    arrays = {name for name, member in group.members(max_depth=None) if isinstance(member, zarr.Array)}
    assert arrays == set(paths.values())
    for layout in core_sample.layouts:
        array = group[paths[layout.spec.name]]
        assert array.shape == layout.spec.shape
        assert array.dtype == layout.spec.dtype
        assert np.asarray(array[...]).tobytes() == expected(core_sample, layout)


@pytest.mark.parametrize(("count", "is_there"), [(1000, True), (1001, False)])
def test_many_arrays_are_not_consolidated(count, is_there, tmp_path, sampling):
    """zarr-python would build all of them to open one."""
    many = sampling.make([(("model", f"w{number}"), (2,), "float32", 2) for number in range(count)])
    with Store(tmp_path, layout="file") as store:
        path = many.save(store, 1, 1).path
    with ZipStore(path, mode="r") as archive:
        group = zarr.open_group(archive, mode="r")
        assert (group.metadata.consolidated_metadata is not None) == is_there
        assert group["model/w7"].shape == (2,)


def test_zarr_python_opens_without_consolidated_metadata(everything, all_sample):
    with open(os.path.join(everything, "zarr.json")) as file:
        assert "consolidated_metadata" not in json.load(file)
    group = zarr.open_group(everything, mode="r")
    for layout in all_sample.layouts:
        if layout.spec.dtype in CORE:
            array = group[manifest_paths(everything)[layout.spec.name]]
            assert np.asarray(array[...]).tobytes() == expected(all_sample, layout)


@pytest.mark.parametrize("which", ["core", "everything"])
def test_tensorstore_opens_every_array(which, core, everything, core_sample, all_sample):
    checkpoint, sample = {"core": (core, core_sample), "everything": (everything, all_sample)}[which]
    opened = 0
    for name, path in manifest_paths(checkpoint).items():
        layout = next(layout for layout in sample.layouts if layout.spec.name == name)
        if layout.spec.dtype.endswith("fnuz"):
            continue  # tensorstore knows them in other formats only
        kvstore = {"driver": "file", "path": os.path.join(checkpoint, path) + "/"}
        array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
        assert array.shape == layout.spec.shape
        assert array.dtype.name == layout.spec.dtype
        data = array.read().result()
        assert data.dtype == numpy_dtype(layout.spec.dtype)
        assert data.tobytes() == expected(sample, layout)
        opened += 1
    assert opened > 90


def test_zarrs_opens_all_core_dtypes(core, core_sample, tmp_path):
    """Run in a process of its own: choosing the pipeline changes zarr's global configuration."""
    script = """if True:
        import sys, zarr, zarrs, numpy as np
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
        group = zarr.open_group(sys.argv[1], mode="r")
        np.savez(sys.argv[2], **{
            name: np.asarray(member[...]).reshape(-1).view(np.uint8)
            for name, member in group.members(max_depth=None) if isinstance(member, zarr.Array)
        })
    """
    result = tmp_path / "result.npz"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, core, result], check=True)
    paths = manifest_paths(core)
    with np.load(result) as read:
        assert len(read.files) == len(paths)
        for layout in core_sample.layouts:
            assert read[paths[layout.spec.name]].tobytes() == expected(core_sample, layout)


@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
def test_other_readers_notice_a_flipped_bit(core, reader, tmp_path, core_sample):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", core, copy], check=True)
    path = copy / "model" / "float32-7x33" / "c.2.0"  # the last chunk: padded
    data = bytearray(path.read_bytes())
    data[5] ^= 16
    path.write_bytes(data)
    read = {"zarr": read_by_zarr, "tensorstore": read_by_tensorstore}[reader]
    with pytest.raises(ValueError, match="(?i)checksum|crc32c|digest"):
        read(path.parent)


def read_by_zarr(path):
    return zarr.open_array(path, mode="r")[...]


def read_by_tensorstore(path):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    return tensorstore.open(spec, read=True).result().read().result()


def test_padding_is_sparse(tmp_path, sampling):
    sample = sampling.make([(("model", "x"), ((1 << 20) + 1,), "float32", 1 << 20)])
    path = saved(sample, tmp_path)
    status = os.stat(os.path.join(path, "model", "x", "c.1"))
    assert status.st_size == (4 << 20) + 4
    assert status.st_blocks * 512 <= 64 << 10
    assert math.prod(zarr.open_array(os.path.join(path, "model", "x"), mode="r").shape) == (1 << 20) + 1
