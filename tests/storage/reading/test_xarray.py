"""xarray opens the groups of a checkpoint, and sees the very bits."""

from __future__ import annotations

import mmap
import warnings

import numpy as np
import pytest
import xarray

from gockpt.core.array_spec import DTYPES, ArraySpec
from gockpt.storage.format import zarr_metadata
from gockpt.storage.format.chunk_grid import chunked_layout
from gockpt.storage.format.zarr_dtypes import register_zarr
from gockpt.storage.local.store import Store
from gockpt.storage.read.find import open_checkpoint

CORE = {
    # Of one length in one place and of another in another, square, alike, 0-d, without elements.
    ("model", "0.weight"): ((6, 4), "float32"),
    ("model", "0.bias"): ((6,), "float32"),
    ("model", "1.weight"): ((4, 6), "float32"),
    ("model", "1.square"): ((4, 4), "float64"),
    ("model", "cube"): ((4, 4, 4), "int64"),
    ("model", "count"): ((), "int64"),
    ("model", "empty"): ((0, 3), "uint8"),
    ("model", "mask"): ((6,), "bool"),
    ("model", "phase"): ((4,), "complex64"),
    ("model", "dim_0:6"): ((6, 2), "float32"),  # what looks like a dimension is none
    ("model", "dim_0"): ((6, 2), "float32"),
    ("optimizer", "0.weight", "exp_avg"): ((6, 4), "float32"),
    ("optimizer", "0.weight", "step"): ((), "float32"),
}
EXTENSIONS = {
    ("model", f"{name}.weight"): ((3, 2), name) for name, dtype in DTYPES.items() if not dtype.core
} | {("model", "bias"): ((3,), "float32")}


def publish(path, arrays):
    """Save random bits, zeros among them, in chunks of 4 rows; returns the path and the bits by name."""
    layouts, values, rng = [], {}, np.random.default_rng(3)
    for name, (shape, dtype) in arrays.items():
        spec = ArraySpec(name, shape, dtype)
        data = rng.integers(0, 256, (*shape, spec.itemsize), dtype=np.uint8)
        data = data & 1 if dtype == "bool" else data
        data[:1] = 0
        values[name] = data
        rows = (min(4, shape[0] or 1), *(size or 1 for size in shape[1:])) if shape else ()
        layouts.append(chunked_layout(spec, rows))
    with (
        Store(path) as store,
        store.begin(1, layouts, state={}, attributes={}, exact=True) as transaction,
    ):
        for layout in layouts:
            flat = values[layout.spec.name].reshape(-1)
            at = 0
            for slot in layout.slots:
                arena = mmap.mmap(-1, slot.capacity)
                arena[: slot.nbytes] = flat[at : at + slot.nbytes].tobytes()
                transaction.write_chunk(layout, slot, memoryview(arena))
                at += slot.nbytes
        return transaction.commit().path, values


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("core"), CORE)


OPENERS = {
    "open_zarr": lambda path, group: xarray.open_zarr(path, group=group, chunks=None),
    "open_dataset": lambda path, group: xarray.open_dataset(path, engine="zarr", group=group),
    "unconsolidated": lambda path, group: xarray.open_zarr(
        path, group=group, chunks=None, consolidated=False
    ),
    "open_datatree": lambda path, group: xarray.open_datatree(path, engine="zarr")[group].to_dataset(),
}


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("group", ["model", "optimizer/0.weight"])
def test_xarray_opens_a_group(core, opener, group):
    path, values = core
    dataset = OPENERS[opener](path, group)
    expected = {"/".join(name[1 + group.count("/") :]): data for name, data in values.items()
                if "/".join(name).startswith(group)}  # fmt: skip
    # "dim_0:6" is escaped, as in every path.
    assert set(dataset.data_vars) == {name.replace(":", "~3a") for name in expected}
    assert not dataset.coords
    for name, data in expected.items():
        found = dataset[name.replace(":", "~3a")]
        assert found.to_numpy().tobytes() == data.tobytes(), name
        assert found.shape == data.shape[:-1]
        assert len(set(found.dims)) == found.ndim


def test_arrays_of_one_shape_combine(core):
    path, _ = core
    model, state = OPENERS["open_zarr"](path, "model"), OPENERS["open_zarr"](path, "optimizer/0.weight")
    assert (model["0.weight"] + state["exp_avg"]).shape == (6, 4)
    assert (model["0.weight"] + model["0.bias"]).shape == (6, 4)
    assert model["1.square"].T.dims == ("dim_1:4", "dim_0:4")


def test_xarray_reads_extension_types_once_they_are_registered(tmp_path):
    register_zarr()
    path, values = publish(tmp_path, EXTENSIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr-python: the types have no specification yet
        dataset = xarray.open_zarr(path, group="model", chunks=None, consolidated=False)
        for name, data in values.items():
            assert dataset[name[1]].to_numpy().tobytes() == data.tobytes()


@pytest.mark.parametrize("names", [None, "absent"])
def test_a_checkpoint_whose_dimensions_have_no_names_is_whole(tmp_path, monkeypatch, names):
    """Such as those that were written before dimensions had names."""
    array_document = zarr_metadata.array_document

    def without(*args):
        document = array_document(*args)
        document.pop("dimension_names", None)
        return document if names == "absent" else {**document, "dimension_names": None}

    with monkeypatch.context() as patch:
        patch.setattr(zarr_metadata, "array_document", without)
        path, _ = publish(tmp_path, CORE)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.verify().ok


def test_other_names_than_those_of_the_format_are_damage(tmp_path, monkeypatch):
    array_document = zarr_metadata.array_document
    with monkeypatch.context() as patch:
        patch.setattr(
            zarr_metadata,
            "array_document",
            lambda *args: {**array_document(*args), "dimension_names": ["x"] * len(args[0].shape)},
        )
        path, _ = publish(tmp_path, CORE)
    with open_checkpoint(path) as checkpoint:
        report = checkpoint.verify()
    assert not report.ok
    assert "dimension_names" in str(report.problems)
