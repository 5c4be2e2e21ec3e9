"""Uploads that are cut short, repeated, or made by two at once: whole or not at all, and nothing twice."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

import gockpt
from gockpt.errors import RemoteError
from gockpt.storage.object_store import upload as upload_module

pytestmark = pytest.mark.usefixtures("directories")
REPOSITORY = Path(__file__).resolve().parent.parent.parent


class Interrupted(BaseException):
    pass


def fail_at(kind, nth, error):
    """Return a hook that raises at the n-th call of a kind, once."""
    left = [nth]
    lock = threading.Lock()

    def before(called, path):
        if called == kind:
            with lock:
                left[0] -= 1
                if left[0] == 0:
                    raise error

    return before


@pytest.mark.parametrize("error", [Interrupted(), RemoteError("500")])
@pytest.mark.parametrize(("kind", "nth"), [("tree", 1), ("put", 1), ("put", 5), ("put", 12), ("create", 1)])
def test_a_cut_is_gone_on_with_and_nothing_is_sent_twice(kind, nth, error, save, watched, tmp_path):
    save(tmp_path, 7)
    store = watched()
    store.before = fail_at(kind, nth, error)
    with pytest.raises(type(error)):
        gockpt.upload(tmp_path, store)
    assert gockpt.steps(store) == []
    cut = list(store.written)
    assert not any(path.endswith("gockpt.json") for path in cut)
    store.before = lambda kind, path: None
    done = gockpt.upload(tmp_path, store)
    assert len(store.written) == len(set(store.written))
    assert store.written[-1].endswith("/gockpt.json")
    assert (done.sent < done.nbytes) == bool(cut)
    assert gockpt.verify(store).ok


def test_the_manifest_is_put_when_all_else_is_there(save, watched, tmp_path):
    save(tmp_path, 7)
    store = watched()
    gockpt.upload(tmp_path, store)
    files = [p for p in (tmp_path / "step-0000000007").rglob("*") if p.is_file()]
    assert len(store.written) == len(files)
    assert store.written[-1].endswith("/gockpt.json")


def test_what_differs_in_the_store_is_sent_again(save, url, bucket, s3, tmp_path, watched):
    save(tmp_path, 7)
    store = watched(url)
    store.before = fail_at("create", 1, Interrupted())
    with pytest.raises(Interrupted):
        gockpt.upload(tmp_path, store)
    keys = [item["Key"] for item in s3.list_objects_v2(Bucket=bucket)["Contents"]]
    same_size, other_size, gone = [key for key in keys if "/model/tall/c." in key]
    body = bytearray(s3.get_object(Bucket=bucket, Key=same_size)["Body"].read())
    body[100] ^= 1
    s3.put_object(Bucket=bucket, Key=same_size, Body=bytes(body))  # without the noted checksum
    s3.put_object(Bucket=bucket, Key=other_size, Body=b"short")
    s3.delete_object(Bucket=bucket, Key=gone)
    store.written.clear()
    store.before = lambda kind, path: None
    gockpt.upload(tmp_path, store)
    assert {f"runs/one/{path}" for path in store.written[:-1]} == {same_size, other_size, gone}
    assert gockpt.verify(url).ok


def test_a_killed_process_leaves_no_checkpoint_and_the_next_one_goes_on(
    save, url, bucket, s3, tmp_path, killed
):
    save(tmp_path, 7)
    killed("gockpt.upload(*sys.argv[1:])", tmp_path, url, nth=9)
    before = {item["Key"]: item["LastModified"] for item in s3.list_objects_v2(Bucket=bucket)["Contents"]}
    assert before
    assert gockpt.steps(url) == []
    result = gockpt.upload(tmp_path, url)
    assert 0 < result.sent < result.nbytes
    assert gockpt.verify(url).ok


@pytest.mark.parametrize("large", [False, True])
def test_an_error_while_reading_is_raised_as_it_is_and_makes_no_object(
    large, save, url, bucket, s3, tmp_path, monkeypatch
):
    if large:  # goes in parts
        monkeypatch.setattr(gockpt.core.arena_layout, "WHOLE_LIMIT", 96_000_000)
        save(tmp_path, 7, rows=torch.zeros(5 << 20))
        at = 18 << 20
    else:
        save(tmp_path, 7)
        at = 5
    chunk = max((tmp_path / "step-0000000007").rglob("c.0*"), key=lambda file: file.stat().st_size)
    with chunk.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff")
    with pytest.raises(gockpt.ChunkCorrupt, match=r"differ from the checksum of their block.*not uploaded"):
        gockpt.upload(tmp_path, url)
    keys = [item["Key"] for item in s3.list_objects_v2(Bucket=bucket).get("Contents", [])]
    assert not any(key.endswith((chunk.name, "gockpt.json")) and chunk.parent.name in key for key in keys)
    assert gockpt.steps(url) == []


@pytest.mark.parametrize("what", ["padding", "checksum", "document", "missing", "longer"])
def test_what_is_damaged_on_disk_is_not_published(what, save, watched, tmp_path):
    save(tmp_path, 7)
    root = tmp_path / "step-0000000007"
    last = max((root / "model/tall").glob("c.*"))
    size = last.stat().st_size
    if what == "document":
        (root / "state.json").write_bytes((root / "state.json").read_bytes().replace(b"7", b"8"))
    elif what == "missing":
        last.unlink()
    elif what == "longer":
        last.write_bytes(last.read_bytes() + b"\0")
    else:
        with last.open("r+b") as file:
            file.seek(size - 6 if what == "padding" else size - 2)
            file.write(b"\xee")
    store = watched()
    with pytest.raises(gockpt.CheckpointCorrupt):
        gockpt.upload(tmp_path, store)
    assert gockpt.steps(store) == []


def test_two_uploaders_of_one_checkpoint_both_succeed(save, url, watched, tmp_path):
    save(tmp_path, 7)
    meet = threading.Barrier(2, timeout=60)
    stores = [watched(url), watched(url)]

    def before(kind, path):
        if kind in ("tree", "create"):
            meet.wait()

    results = []
    for store in stores:
        store.before = before
    threads = [
        threading.Thread(target=lambda s=s: results.append(gockpt.upload(tmp_path, s))) for s in stores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0].url == results[1].url
    assert gockpt.steps(url) == [7]
    assert gockpt.verify(url).ok


def test_two_attempts_of_one_step_never_share_an_object(save, url, watched, tmp_path):
    save(tmp_path, 7, 1)
    store = watched(url)
    store.before = fail_at("create", 1, Interrupted())
    with pytest.raises(Interrupted):
        gockpt.upload(tmp_path, store)
    first = set(store.written)
    held = save(tmp_path, 7, 2)
    store.before = lambda kind, path: None
    done = gockpt.upload(tmp_path, store)
    assert done.sent == done.nbytes
    assert not first & {path for path in store.written if path.startswith(done.url.rsplit("/", 1)[1])}
    assert torch.equal(gockpt.open(url)["model/tall"][...], held["tall"])


def test_another_path_under_the_same_url_is_refused(save, watched, tmp_path):
    for name in ("one", "two"):
        save(tmp_path / name, 7)
    store = watched()
    gockpt.upload(tmp_path / "one", store)
    with pytest.raises(gockpt.UsageError, match="URL of its own for each run"):
        gockpt.upload(tmp_path / "two", store)
    assert gockpt.verify(store).ok


def test_another_manifest_in_its_place_is_refused(save, url, bucket, s3, tmp_path):
    save(tmp_path, 7)
    done = gockpt.upload(tmp_path, url)
    key = done.url.removeprefix(f"s3://{bucket}/") + "/gockpt.json"
    s3.put_object(Bucket=bucket, Key=key, Body=b"something else")
    with pytest.raises(RemoteError, match=r"another gockpt\.json"):
        gockpt.upload(tmp_path, url)
    assert s3.get_object(Bucket=bucket, Key=key)["Body"].read() == b"something else"


def test_a_checkpoint_removed_while_it_is_uploaded(save, watched, tmp_path):
    save(tmp_path, 7)
    store = watched()

    def before(kind, path):
        if kind == "tree":
            os.rename(tmp_path / "step-0000000007", tmp_path / ".trash-0123456789abcdef")
            for file in (tmp_path / ".trash-0123456789abcdef").rglob("c.*"):
                file.unlink()

    store.before = before
    with pytest.raises(gockpt.CheckpointPruned, match="removed before it was uploaded"):
        gockpt.upload(tmp_path, store)
    assert gockpt.steps(store) == []


def test_parts_are_bounded(save, watched, tmp_path, monkeypatch):
    monkeypatch.setattr(gockpt.core.arena_layout, "WHOLE_LIMIT", 96_000_000)
    rows = torch.arange(6 << 20, dtype=torch.float32)
    save(tmp_path, 7, rows=rows)
    seen = []
    store = watched()
    put = type(store).put

    def spy(self, path, data, **more):
        content = data()
        if not isinstance(content, bytes):
            seen.extend(len(piece) for piece in content)
        put(self, path, data, **more)

    monkeypatch.setattr(type(store), "put", spy)
    gockpt.upload(tmp_path, store)
    assert sum(seen) == rows.nbytes + 4
    assert max(seen) == upload_module.PART
    assert torch.equal(gockpt.open(store)["model/rows"][...], rows)
