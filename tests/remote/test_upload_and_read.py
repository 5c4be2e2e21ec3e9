"""What was uploaded reads back bit for bit, from a real S3 server, a directory and memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import MemoryStore

import gockpt
import gockpt.core.arena_layout
from gockpt.state.tensors import DTYPE_OF
from gockpt.storage.object_store.client import Objects
from gockpt.storage.read.find import list_checkpoints, open_checkpoint

pytestmark = pytest.mark.usefixtures("layout")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def equal(checkpoint: gockpt.Checkpoint, held: dict[str, torch.Tensor]) -> bool:
    return set(checkpoint) == {f"model/{name}" for name in held} and all(
        bits(checkpoint[f"model/{name}"][...]) == bits(tensor) for name, tensor in held.items()
    )


def test_a_round_trip_keeps_every_bit(save, url, tmp_path, suffix):
    held = save(tmp_path / "ckpts", 7)
    done = gockpt.upload(tmp_path / "ckpts", url)
    assert (done.step, done.sent) == (7, done.nbytes)
    assert done.url == f"{url}/step-0000000007-1-{done.attempt}{suffix}"
    assert gockpt.steps(url) == [7]
    assert gockpt.latest(url) == 7
    for where in (url, url + "/", done.url):
        with gockpt.open(where) as checkpoint:
            assert equal(checkpoint, held)
            assert checkpoint.metadata.path == done.url
    report = gockpt.verify(url)
    assert report.ok
    assert report.path == done.url


def test_a_store_does_as_well_as_its_url(save, url, bucket, quick, tmp_path, suffix):
    held = save(tmp_path / "ckpts", 7)
    done = gockpt.upload(tmp_path / "ckpts", quick(bucket))
    assert done.url == f"{url}/step-0000000007-1-{done.attempt}{suffix}"
    with gockpt.open(quick(bucket)) as checkpoint:
        assert equal(checkpoint, held)
        assert checkpoint.metadata.path == done.url


def test_every_dtype_round_trips(save, url, tmp_path):
    every = {}
    for number, dtype in enumerate(DTYPE_OF.values()):
        raw = torch.randint(0, 256, (6, 4 * dtype.itemsize), dtype=torch.uint8)
        every[f"d{number}"] = (raw & 1).bool() if dtype == torch.bool else raw.view(dtype)
    held = save(tmp_path, 1, **every)
    gockpt.upload(tmp_path, url)
    with gockpt.open(url) as checkpoint:
        assert equal(checkpoint, held)
        assert {lazy.dtype for lazy in checkpoint.values()} == set(DTYPE_OF.values())


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_other_stores_do_as_well(scheme, save, watched, tmp_path):
    held = save(tmp_path / "ckpts", 3)
    where = f"file://{tmp_path}/there" if scheme == "file" else watched()
    first, second = (gockpt.upload(tmp_path / "ckpts", where) for _ in range(2))
    assert (first.sent, second.sent) == (first.nbytes, 0)
    with gockpt.open(where) as checkpoint:
        assert equal(checkpoint, held)
    assert gockpt.verify(where).ok


def test_load_fills_a_model_from_a_url(url, tmp_path):
    model = torch.nn.Linear(8, 4)
    opt = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 8)).sum().backward()
    opt.step()
    gockpt.save_overlapped(model, opt, tmp_path, step=12, extra={"note": [1, 2.5]}).result()
    gockpt.upload(tmp_path, url)
    other = torch.nn.Linear(8, 4)
    restored = gockpt.load(url, other, torch.optim.AdamW(other.parameters()))
    assert (restored.step, restored.extra) == (12, {"note": [1, 2.5]})
    assert torch.equal(other.weight, model.weight)


def test_a_slice_reads_its_blocks_and_no_more(save, watched, tmp_path, monkeypatch):
    monkeypatch.setattr(gockpt.core.arena_layout, "WHOLE_LIMIT", 96_000_000)
    rows = torch.arange(4 << 20, dtype=torch.float32).reshape(4096, 1024)  # 16 MiB, blocks of 256 rows
    save(tmp_path, 1, rows=rows)
    store = watched()
    gockpt.upload(tmp_path, store)
    stored = open_checkpoint(store)
    array = gockpt.Checkpoint(stored)["model/rows"]
    array[:1]  # reads the central directory of an archive, and the block checksums
    before, read = store.read_bytes, stored.bytes_read
    assert torch.equal(array[300:310], rows[300:310])
    assert stored.bytes_read - read == 1 << 20  # rows 256 to 511: one block
    assert store.read_bytes - before == 1 << 20


def test_newest_is_the_one_published_last(save, url, tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 3)
    for step in (5, 3):
        gockpt.upload(tmp_path, url, step)
    assert gockpt.steps(url) == [3, 5]
    assert gockpt.latest(url) == 3
    assert gockpt.open(url).metadata.step == 3
    assert gockpt.open(url, 5).metadata.step == 5
    with pytest.raises(gockpt.CheckpointNotFound, match=r"no checkpoint of step 4 in .*there are 3, 5"):
        gockpt.open(url, 4)


def test_the_newest_is_found_by_one_manifest(save, watched, tmp_path):
    store = watched()
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
        gockpt.upload(tmp_path, store)
    for find in (gockpt.latest, lambda there: gockpt.open(there).metadata.step):
        seen = []
        store.before = lambda kind, path, seen=seen: seen.append((kind, path))
        assert find(store) == 4
        read = {path.split("/")[0] for kind, path in seen if kind == "read"}
        assert [path.split("-")[2] for path in read] == ["4"]
    store.before = lambda kind, path: None


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Return one checkpoint by its directory and in a store."""
    path = tmp_path_factory.mktemp("both")
    state = {"a": torch.arange(700_000, dtype=torch.float32).reshape(700, 1000)}
    with gockpt.Checkpointer(state, None, path) as saver:
        saver.after_step(1)
    objects = Objects(MemoryStore(), "memory://both")
    gockpt.upload(path, objects)
    return gockpt.open(path)["model/a"], gockpt.open(objects)["model/a"]


@given(data=st.data())
def test_a_slice_of_the_copy_is_the_slice_of_the_original(both, data):
    ends = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in (700, 1000)]
    index = tuple(slice(*pair) for pair in ends)
    local, remote = both
    assert torch.equal(remote[index], local[index])


def test_a_step_saved_again_supersedes_the_first(save, url, tmp_path):
    for marker in (1, 2):
        held = save(tmp_path, 5, marker)
        gockpt.upload(tmp_path, url)
    assert gockpt.steps(url) == [5]
    with gockpt.open(url, 5) as checkpoint:
        assert equal(checkpoint, held)
    entries = list_checkpoints(url, superseded=True)
    assert [entry.superseded for entry in entries] == [True, False]


def test_nothing_there(url, bucket, s3, tmp_path):
    assert gockpt.steps(url) == []
    assert gockpt.latest(url) is None
    with pytest.raises(gockpt.CheckpointNotFound, match=f"no complete checkpoint in '{url}'"):
        gockpt.open(url)
    s3.put_object(Bucket=bucket, Key="runs/one/readme.txt", Body=b"hello")
    with pytest.raises(gockpt.NotACheckpoint, match=r"readme\.txt"):
        gockpt.open(url)
    assert gockpt.steps(f"file://{tmp_path}/nowhere") == []
    with pytest.raises(gockpt.CheckpointNotFound, match="no such directory"):
        gockpt.open(f"file://{tmp_path}/nowhere")


@pytest.mark.parametrize("codec", ["zstd", "blosc"])
def test_compressed_chunks_travel_as_they_are(codec, url, tmp_path, s3, bucket, small_chunks, suffix):
    held = {"rows": torch.arange(100 * 64, dtype=torch.float32).reshape(100, 64), "none": torch.empty(0, 4)}
    options = gockpt.Options(compression=codec)
    with gockpt.Checkpointer(held, None, tmp_path, options=options) as saver:
        saver.after_step(7)
    done = gockpt.upload(tmp_path, url)
    with gockpt.open(url) as checkpoint:
        assert equal(checkpoint, held)
        assert torch.equal(checkpoint["model/rows"][40:60, 3], held["rows"][40:60, 3])
    assert gockpt.verify(url).ok
    assert gockpt.upload(tmp_path, url).sent == 0
    local = tmp_path / f"step-0000000007{suffix}"
    for file in (local, *local.rglob("*")):
        if file.is_file():
            below = "" if file == local else f"/{file.relative_to(local)}"
            key = f"{done.url.removeprefix(f's3://{bucket}/')}{below}"
            assert s3.get_object(Bucket=bucket, Key=key)["Body"].read() == file.read_bytes()
