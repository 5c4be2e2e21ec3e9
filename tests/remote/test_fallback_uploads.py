"""The newest that verifies, where one step was uploaded twice: the very one that was listed is opened."""

from __future__ import annotations

import pytest

import gockpt


@pytest.mark.parametrize("as_store", [True, False])
@pytest.mark.parametrize("damage", ["chunk", "manifest"])
def test_of_two_uploads_of_one_step_the_whole_one_is_loaded(
    save, url, bucket, quick, s3, tmp_path, as_store, damage
):
    where = quick(bucket) if as_store else url
    held = save(tmp_path, 7, marker=1)
    gockpt.upload(tmp_path, where)
    save(tmp_path, 7, marker=2)
    newer = gockpt.upload(tmp_path, where)
    file = {"chunk": "model/tall/c.1.0", "manifest": "gockpt.json"}[damage]
    key = f"{newer.url.rstrip('/').rpartition('/')[2]}/{file}"
    body = bytearray(s3.get_object(Bucket=bucket, Key=f"runs/one/{key}")["Body"].read())
    body[10] ^= 4
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
