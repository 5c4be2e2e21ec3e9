"""The newest that verifies, where one step was uploaded twice: the very one that was listed is opened."""

from __future__ import annotations

import pytest

import gockpt
from gockpt.storage.read.find import open_checkpoint

pytestmark = pytest.mark.usefixtures("layout")


@pytest.mark.parametrize("as_store", [True, False])
@pytest.mark.parametrize("damage", ["chunk", "manifest"])
def test_of_two_uploads_of_one_step_the_whole_one_is_loaded(
    save, url, bucket, quick, s3, tmp_path, as_store, damage, layout
):
    where = quick(bucket) if as_store else url
    held = save(tmp_path, 7, marker=1)
    gockpt.upload(tmp_path, where)
    save(tmp_path, 7, marker=2)
    newer = gockpt.upload(tmp_path, where)
    key, at = newer.url.rstrip("/").rpartition("/")[2], 10
    if layout == "directory":
        key += {"chunk": "/model/tall/c.1.0", "manifest": "/gockpt.json"}[damage]
    body = bytearray(s3.get_object(Bucket=bucket, Key=f"runs/one/{key}")["Body"].read())
    if layout == "file":
        with open_checkpoint(newer.url) as stored:
            chunk = next(entry for entry in stored.manifest.arrays if entry.path == "model/tall").at[1]
        at += chunk if damage == "chunk" else body.rindex(b"gockpt.json{") + len("gockpt.json")
    body[at] ^= 4
    s3.put_object(Bucket=bucket, Key=f"runs/one/{key}", Body=bytes(body))
    target = {name: tensor.clone().zero_() for name, tensor in held.items()}
    restored = gockpt.load(where, target, on_damage="previous")
    assert restored.step == 7
    assert all(target[name].equal(tensor) for name, tensor in held.items())
    assert [one.path.rpartition("/")[2] for one in restored.passed_over] == [key.partition("/")[0]]


def test_one_that_is_a_checkpoint_itself(save, url, tmp_path):
    held = save(tmp_path, 7)
    done = gockpt.upload(tmp_path, url)
    target = {name: tensor.clone().zero_() for name, tensor in held.items()}
    assert gockpt.load(done.url, target, on_damage="previous").step == 7
