"""Arrays that zarr-python, zarrs and tensorstore write in our layout are read here, bit for bit.

They write the arrays; a manifest is then computed over their files as they are. Every check of the reader
applies: so these libraries and gockpt mean the same by each document and each byte of a chunk.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr

from gockpt.core.array_spec import DTYPES, ArraySpec
from gockpt.core.boxes import Box
from gockpt.errors import ChunkCorrupt
from gockpt.storage.format import array_paths, strict_json, zarr_metadata
from gockpt.storage.format.checksum import BLOCK, crc32c
from gockpt.storage.format.chunk_grid import chunk_key
from gockpt.storage.format.manifest import Manifest, encode
from gockpt.storage.format.manifest_entries import ArrayEntry, FileEntry
from gockpt.storage.format.zarr_dtypes import register_zarr
from gockpt.storage.read.find import open_checkpoint

SHAPES = {
    "rows": ((7, 3), (3, 3)),
    "whole": ((5, 2, 2), (5, 2, 2)),
    "line": ((10,), (4,)),
    "scalar": ((), ()),
    "empty": ((0, 3), (1, 3)),
    "hollow": ((2, 0), (2, 1)),
}
PIPELINES = {
    "zarr": "zarr.core.codec_pipeline.BatchedCodecPipeline",
    "zarrs": "zarrs.ZarrsCodecPipeline",
}
WRITERS = [*PIPELINES, "tensorstore"]


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register_zarr()


def numpy_dtype(name):
    return np.dtype(getattr(ml_dtypes, name) if not DTYPES[name].core else name)


def write_zarr(path, data, chunk, *, empty_chunks=True):
    array = zarr.create_array(
        path,
        shape=data.shape,
        chunks=chunk,
        dtype=data.dtype,
        compressors=[zarr.codecs.Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},
        fill_value=np.zeros(data.dtype.itemsize, np.uint8).view(data.dtype)[0],
        # Otherwise chunks of zeros are left out, and would be missing here.
        config={"write_empty_chunks": empty_chunks},
    )
    if data.size:
        array[...] = data


def write_tensorstore(path, data, chunk, *, empty_chunks=True):
    name = data.dtype.name
    little = {} if data.dtype.itemsize == 1 else {"configuration": {"endian": "little"}}
    store = tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(path)},
            "metadata": {
                "shape": data.shape,
                "data_type": name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
                "fill_value": zarr_metadata.array_document(ArraySpec(("x",), (1,), name), (1,))["fill_value"],
                "codecs": [{"name": "bytes"} | little, {"name": "crc32c"}],
            },
            "store_data_equal_to_fill_value": empty_chunks,
        },
        create=True,
    ).result()
    if data.size:
        store.write(data).result()


def write_array(writer, path, data, chunk, **more):
    if writer == "tensorstore":
        write_tensorstore(path, data, chunk, **more)
        return
    with zarr.config.set({"codec_pipeline.path": PIPELINES[writer]}), warnings.catch_warnings():
        # zarrs lets zarr-python encode what it doesn't know.
        warnings.filterwarnings("ignore", "Array is unsupported by ZarrsCodecPipeline")
        write_zarr(path, data, chunk, **more)


def entry_of(root, path, name):
    data = (root / path).read_bytes()
    return FileEntry(name or path, len(data), crc32c(data))


def adopt(root, arrays):
    """Make a checkpoint of a directory with arrays, ``{name: (shape, dtype, chunk)}``, as they are."""
    paths = array_paths.escape_all(arrays)
    entries, blocks = [], bytearray()
    for name, (shape, dtype, chunk) in arrays.items():
        spec = ArraySpec(name, shape, dtype)
        meta = entry_of(root, f"{paths[name]}/zarr.json", None)
        entries.append(ArrayEntry(spec, paths[name], tuple(chunk), meta))
        left, whole = spec.nbytes, math.prod(chunk) * spec.itemsize
        for number in range(entries[-1].chunks):
            file = root / paths[name] / chunk_key(number, len(chunk))
            real = file.read_bytes()[: min(left, whole)] if file.exists() else bytes(min(left, whole))
            left -= len(real)
            for at in range(0, len(real), BLOCK):
                blocks += crc32c(real[at : at + BLOCK]).to_bytes(4, "little")
    texts = {path: (root / path / "zarr.json").read_bytes() for path in paths.values()}
    groups = sorted(
        {"/".join(path.split("/")[:n]) for path in paths.values() for n in range(1, path.count("/") + 1)}
    )
    files = {f"{group}/zarr.json": zarr_metadata.dump(zarr_metadata.group_document()) for group in groups}
    metadata = zarr_metadata.consolidated(
        groups=groups, arrays=texts, dtypes=[dtype for _, dtype, _ in arrays.values()]
    )
    files["zarr.json"] = zarr_metadata.root({"by": "others"}, metadata)
    files["state.json"] = strict_json.dumps({"a": 1}, what="state.json")
    files["blocks.crc32c"] = bytes(blocks)
    for path, data in files.items():
        (root / path).write_bytes(data)
    manifest = Manifest(
        step=7,
        seq=1,
        attempt="0" * 32,
        run="0" * 32,
        parent=None,
        exact=True,
        created="2026-01-01T00:00:00+00:00",
        writer={"others": "1"},
        attributes={"by": "others"},
        arrays=tuple(entries),
        files=tuple(entry_of(root, path, path) for path in files),
    )
    (root / "gockpt.json").write_bytes(encode(manifest))


@pytest.mark.parametrize("writer", WRITERS)
def test_every_dtype_and_layout_that_others_write_is_read_here(writer, tmp_path):
    root = tmp_path / "step-0000000007"
    rng = np.random.default_rng(5)
    arrays, values = {}, {}
    for dtype in DTYPES:
        if (writer, dtype) == ("tensorstore", "float8_e8m0fnu"):
            continue  # it writes the type's smallest value, our fill value, as 0.0
        for kind, (shape, chunk) in SHAPES.items():
            name = ("model", f"{dtype}.{kind}")
            bits = rng.integers(0, 256, (*shape, DTYPES[dtype].itemsize), np.uint8)
            bits = bits & 1 if dtype == "bool" else bits
            if bits.size:
                bits[(0,) * bits.ndim] |= 1  # zarrs leaves out whatever chunk is all zeros
            values["/".join(name)] = bits
            data = np.frombuffer(bits.tobytes(), numpy_dtype(dtype)).reshape(shape)
            arrays[name] = (shape, dtype, chunk)
            write_array(writer, root / "/".join(name), data, chunk)
    adopt(root, arrays)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.verify().problems == ()
        assert checkpoint.state() == {"a": 1}
        assert list(checkpoint.arrays) == list(values)
        for name, bits in values.items():
            out = np.empty(bits.nbytes, np.uint8)
            checkpoint.read_into(name, None, out)
            assert out.tobytes() == bits.tobytes(), name
            if len(bits.shape) == 3 and bits.size:  # a slice, too
                out = np.empty(bits[2:6, 1:].nbytes, np.uint8)
                checkpoint.read_into(name, Box((2, 1), (4, 2)), out)
                assert out.tobytes() == bits[2:6, 1:].tobytes(), name


@pytest.mark.parametrize("writer", WRITERS)
def test_a_chunk_of_zeros_that_others_leave_out_is_missing_here(writer, tmp_path):
    """To them it is all zeros; here it might as well be lost, and that is an error that names the array."""
    root = tmp_path / "step-0000000007"
    data = np.zeros((6, 2), np.float32)
    data[:2] = 1
    write_array(writer, root / "w", data, (2, 2), empty_chunks=False)
    assert sorted(path.name for path in (root / "w").iterdir()) == ["c.0.0", "zarr.json"]
    adopt(root, {("w",): ((6, 2), "float32", (2, 2))})
    with open_checkpoint(tmp_path) as checkpoint:
        assert [(problem.path, problem.what) for problem in checkpoint.verify().problems] == [
            ("w/c.1.0", "missing"),
            ("w/c.2.0", "missing"),
        ]
        with pytest.raises(ChunkCorrupt, match=r"^w: w/c\.1\.0 is missing"):
            checkpoint.read_into("w", None, np.empty(48, np.uint8))


@pytest.mark.parametrize("writer", WRITERS)
def test_what_others_change_in_our_checkpoint_is_found(writer, write, tmp_path):
    """An array of ours, opened for writing and changed: valid to them, and not what was saved."""
    written = write(tmp_path, {("w",): ((4, 2), "float32")}, chunk_rows=2)
    path = written.path / "w"
    if writer == "tensorstore":
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
        tensorstore.open(spec, open=True).result()[0, 0].write(np.float32(5)).result()
    else:
        with zarr.config.set({"codec_pipeline.path": PIPELINES[writer]}):
            zarr.open_array(path, mode="r+")[0, 0] = 5
    with open_checkpoint(tmp_path) as checkpoint:
        assert [problem.path for problem in checkpoint.verify().problems] == ["w/c.0.0"]
        with pytest.raises(ChunkCorrupt, match="^w: "):
            checkpoint.read_into("w", None, np.empty(32, np.uint8))
    assert zarr.open_array(path, mode="r")[0, 0] == 5
    assert Path(path, "c.0.0").stat().st_size == 20
