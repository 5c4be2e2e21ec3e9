"""Other tools open what was uploaded, at its URL, and see the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from zarr.storage import ObjectStore

import gockpt
from gockpt.storage import register_zarr

pytestmark = pytest.mark.usefixtures("directories")


@pytest.fixture
def there(save, url, tmp_path):
    held = save(tmp_path, 7)
    return gockpt.upload(tmp_path, url), held


def test_zarr_reads_the_group(there, quick, bucket):
    done, held = there
    register_zarr()
    prefix = done.url.removeprefix(f"s3://{bucket}/")
    group = zarr.open_group(ObjectStore(quick(bucket, prefix=prefix), read_only=True), mode="r")
    assert group.attrs["gockpt"]["step"] == 7
    for name in ("tall", "scale", "none"):
        assert np.array_equal(group[f"model/{name}"][...], held[name].numpy())
    assert np.array_equal(group["model/tall"][33:70, 5], held["tall"][33:70, 5].numpy())
    bits = np.asarray(group["model/w"][...]).view(np.uint16)
    assert np.array_equal(bits, held["w"].view(torch.uint16).numpy())


def test_tensorstore_reads_an_array(there, endpoint, bucket):
    done, held = there
    spec = {
        "driver": "zarr3",
        "kvstore": {
            "driver": "s3",
            "bucket": bucket,
            "path": done.url.removeprefix(f"s3://{bucket}/") + "/model/tall/",
            "endpoint": endpoint,
            "aws_region": "us-east-1",
        },
    }
    array = tensorstore.open(spec, read=True).result()
    assert np.array_equal(array[30:80].read().result(), held["tall"][30:80].numpy())


def test_tensorstore_reads_an_array_of_an_archive(save, url, endpoint, bucket, tmp_path):
    held = save(tmp_path / "directory", 7)
    gockpt.pack(tmp_path / "directory/step-0000000007", tmp_path / "packed.zip")
    done = gockpt.upload(tmp_path / "packed.zip", url)
    assert done.url.endswith(".zip")
    base = {
        "driver": "s3",
        "bucket": bucket,
        "path": done.url.removeprefix(f"s3://{bucket}/"),
        "endpoint": endpoint,
        "aws_region": "us-east-1",
    }
    spec = {"driver": "zarr3", "kvstore": {"driver": "zip", "base": base, "path": "model/tall/"}}
    array = tensorstore.open(spec, read=True).result()
    assert np.array_equal(array[30:80].read().result(), held["tall"][30:80].numpy())
