"""An archive is uploaded as one object: byte for byte, whole or not at all, and over nobody else's."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from obstore.store import MemoryStore

import gockpt
from gockpt.cli.run import run as run_cli
from gockpt.errors import RemoteError
from gockpt.storage.object_store.client import Objects, TakenError
from gockpt.storage.object_store.made_ahead import made_ahead
from gockpt.storage.read.find import open_checkpoint

ROWS = 5 << 20  # 20 MiB of float32: three parts


class Interrupted(BaseException):
    pass


@pytest.fixture
def save_large(save, monkeypatch):
    """Save a checkpoint that goes in parts."""

    def do(path, step=7):
        monkeypatch.setattr(gockpt.core.arena_layout, "WHOLE_LIMIT", 96_000_000)
        return save(path, step, rows=torch.arange(ROWS, dtype=torch.float32))

    return do


@pytest.fixture(params=["small", "large"])
def saved(request, save, save_large, tmp_path):
    """Return a path with one checkpoint: one that goes in one request, or in parts."""
    (save if request.param == "small" else save_large)(tmp_path / "ckpts", 7)
    return tmp_path / "ckpts"


def keys(s3, bucket):
    return [item["Key"] for item in s3.list_objects_v2(Bucket=bucket).get("Contents", [])]


def test_it_is_one_object_with_the_bytes_of_the_file(saved, url, bucket, s3):
    done = gockpt.upload(saved, url)
    data = (saved / "step-0000000007.zip").read_bytes()
    assert keys(s3, bucket) == [f"runs/one/step-0000000007-1-{done.attempt}.zip"]
    assert s3.get_object(Bucket=bucket, Key=keys(s3, bucket)[0])["Body"].read() == data
    assert (done.sent, done.nbytes) == (len(data), len(data))
    assert done.url == f"s3://{bucket}/{keys(s3, bucket)[0]}"
    for where in (url, done.url):
        assert gockpt.verify(where).ok
        assert gockpt.latest(where) == 7


def test_what_is_there_is_not_sent_again(saved, url, watched):
    gockpt.upload(saved, url)
    store = watched(url)
    done = gockpt.upload(saved, store)
    assert (done.sent, store.written) == (0, [])
    assert done.nbytes == (saved / "step-0000000007.zip").stat().st_size


@pytest.mark.parametrize("error", [Interrupted(), RemoteError("500")])
@pytest.mark.parametrize("kind", ["stat", "children", "write"])
def test_a_cut_leaves_nothing_and_the_next_call_begins_again(kind, error, saved, watched):
    store = watched()

    def before(called, path):
        if called == kind or (kind == "write" and called in ("put", "create")):
            raise error

    store.before = before
    with pytest.raises(type(error)):
        gockpt.upload(saved, store)
    store.before = lambda kind, path: None
    assert store.tree("") == {}
    done = gockpt.upload(saved, store)
    assert done.sent == done.nbytes
    assert gockpt.verify(store).ok


IN_THE_MIDDLE = """
from gockpt.storage.object_store import upload
regrouped = upload._regrouped
def cut(pieces, nbytes):
    for number, piece in enumerate(regrouped(pieces, nbytes)):
        if number == 2:
            import time; time.sleep(1)  # the first part has arrived by then
            os.kill(os.getpid(), signal.SIGKILL)
        yield piece
upload._regrouped = cut
gockpt.upload(*sys.argv[1:])
"""


def test_what_a_killed_process_leaves_is_no_checkpoint(save_large, url, bucket, s3, tmp_path, killed):
    save_large(tmp_path)
    killed(IN_THE_MIDDLE, tmp_path, url, nth=99)
    assert keys(s3, bucket) == []
    assert len(s3.list_multipart_uploads(Bucket=bucket)["Uploads"]) == 1
    assert gockpt.steps(url) == []
    done = gockpt.upload(tmp_path, url)
    assert done.sent == done.nbytes
    assert gockpt.verify(url).ok


def test_an_error_while_it_is_read_aborts_the_parts(save_large, url, bucket, s3, tmp_path):
    save_large(tmp_path)
    with (tmp_path / "step-0000000007.zip").open("r+b") as file:
        file.seek(18 << 20)
        file.write(b"\xff")
    with pytest.raises(gockpt.ChunkCorrupt, match=r"differ from the checksum of their block.*not uploaded"):
        gockpt.upload(tmp_path, url)
    assert keys(s3, bucket) == []
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=bucket)


def test_no_flipped_bit_is_uploaded(save, tmp_path):
    """Headers, padding, chunks, documents, manifest, central directory and end records alike."""
    save(tmp_path, 7)
    file = tmp_path / "step-0000000007.zip"
    whole = file.read_bytes()
    with open_checkpoint(file) as stored:
        starts = [at for entry, start in stored.files.entries() for at in (entry.header_at, start)]
    places = {at + more for at in starts for more in (0, 12, 31)} | set(range(0, len(whole), 997))
    places |= set(range(len(whole) - 190, len(whole)))
    for at in sorted(places):
        damaged = bytearray(whole)
        damaged[at] ^= 16
        file.write_bytes(damaged)
        store = Objects(MemoryStore(), "memory://test")
        with pytest.raises((gockpt.CheckpointCorrupt, gockpt.NotACheckpoint)):
            gockpt.upload(tmp_path, store)
        assert store.tree("") == {}, at


def test_two_uploaders_of_one_checkpoint_both_succeed(saved, url, watched):
    stores, meet = [watched(url), watched(url)], threading.Barrier(2, timeout=60)

    def before(kind, path):
        if kind in ("put", "create"):
            meet.wait()

    for store in stores:
        store.before = before
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda store: gockpt.upload(saved, store), stores)
    assert first.url == second.url
    assert gockpt.steps(url) == [7]
    assert gockpt.verify(url).ok


def test_one_that_comes_second_completes_nothing(saved, url, watched, bucket, s3):
    """Somebody else's upload of the attempt is completed while ours is sent."""
    store = watched(url)

    def before(kind, path):
        if kind in ("put", "create"):
            gockpt.upload(saved, url)

    store.before = before
    assert gockpt.upload(saved, store).sent == 0
    assert gockpt.verify(url).ok
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=bucket)


@pytest.mark.parametrize("late", [False, True])
def test_another_object_of_that_name_is_never_replaced(late, saved, url, watched, bucket, s3):
    done = gockpt.upload(saved, watched())
    key = f"runs/one/{done.url.rpartition('/')[2]}"
    store = watched(url)

    def put(kind="put", path=""):
        if kind in ("put", "create"):
            s3.put_object(Bucket=bucket, Key=key, Body=b"something else")

    if late:
        store.before = put
    else:
        put()
    with pytest.raises(RemoteError, match=r"is no archive of this checkpoint.*remove it"):
        gockpt.upload(saved, store)
    assert s3.get_object(Bucket=bucket, Key=key)["Body"].read() == b"something else"


def test_another_checkpoint_of_that_name_is_never_replaced(save, bucket, s3, url, watched, tmp_path):
    keys_of = []
    for name in ("one", "two"):
        save(tmp_path / name, 7)
        keys_of.append(gockpt.upload(tmp_path / name, watched()).url.rpartition("/")[2])
    body = (tmp_path / "two/step-0000000007.zip").read_bytes()
    s3.put_object(Bucket=bucket, Key=f"runs/one/{keys_of[0]}", Body=body)
    assert gockpt.steps(url) == []  # it is not what its name says
    with pytest.raises(RemoteError, match=r"has another gockpt\.json than this checkpoint"):
        gockpt.upload(tmp_path / "one", url)


@pytest.mark.parametrize("forms", [("file", "file"), ("file", "directory"), ("directory", "file")])
def test_another_checkpoint_of_that_number_is_refused(forms, watched, tmp_path):
    store, state = watched(), {"w": torch.ones(5)}
    for name, layout in zip("ab", forms, strict=True):
        options = gockpt.Options(layout=layout)
        with gockpt.Checkpointer(state, None, tmp_path / name, options=options) as saver:
            saver.after_step(7)
    gockpt.upload(tmp_path / "a", store)
    before = store.tree("")
    with pytest.raises(gockpt.UsageError, match="a URL of its own|URL of its own for each run"):
        gockpt.upload(tmp_path / "b", store)
    assert store.tree("") == before


def test_one_that_vanishes_while_it_is_uploaded(save, url, watched, bucket, s3, tmp_path, monkeypatch):
    save(tmp_path, 7)
    store, create = watched(url), Objects.create
    store.before = lambda kind, path: kind == "create" and gockpt.upload(tmp_path, url)

    def then_deleted(self, path, data):
        try:
            create(self, path, data)
        except TakenError:
            s3.delete_object(Bucket=bucket, Key=f"runs/one/{path}")
            raise

    monkeypatch.setattr(Objects, "create", then_deleted)
    with pytest.raises(RemoteError, match="was there, and was removed meanwhile; try again"):
        gockpt.upload(tmp_path, store)
    store.before = lambda kind, path: None
    assert gockpt.upload(tmp_path, store).sent
    assert gockpt.verify(url).ok


def test_ctrl_c_returns_at_once_and_nothing_is_completed(save_large, url, watched, bucket, s3, tmp_path):
    save_large(tmp_path)
    store, returned = watched(url), threading.Event()
    caller = threading.get_ident()

    def before(kind, path):
        if kind == "put":
            signal.pthread_kill(caller, signal.SIGINT)
            assert returned.wait(60)

    store.before = before
    with pytest.raises(KeyboardInterrupt):
        gockpt.upload(tmp_path, store)
    returned.set()
    for thread in threading.enumerate():
        if thread.name.startswith("gockpt-upload"):
            thread.join(60)
            assert not thread.is_alive()
    assert keys(s3, bucket) == []
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=bucket)


@pytest.mark.parametrize("what", ["flipped", "shorter", "longer"])
def test_damage_in_the_store_is_found(what, save, url, bucket, s3, tmp_path):
    save(tmp_path, 6)
    gockpt.upload(tmp_path, url)
    save(tmp_path, 7)
    done = gockpt.upload(tmp_path, url)
    key = done.url.removeprefix(f"s3://{bucket}/")
    body = bytearray(s3.get_object(Bucket=bucket, Key=key)["Body"].read())
    with open_checkpoint(url) as stored:
        start = next(at for entry, at in stored.files.entries() if entry.name == "model/tall/c.1.0")
    body[start + 10] ^= 4
    changed = {"flipped": body, "shorter": body[:-9], "longer": body + b"x"}[what]
    s3.put_object(Bucket=bucket, Key=key, Body=bytes(changed))
    if what == "flipped":
        assert [problem.path for problem in gockpt.verify(url).problems] == ["model/tall/c.1.0"]
        with (
            gockpt.open(url) as checkpoint,
            pytest.raises(gockpt.ChunkCorrupt, match="differ from the checksum"),
        ):
            checkpoint["model/tall"][...]
    else:
        assert gockpt.steps(url) == [6]
        with pytest.raises(gockpt.ManifestCorrupt):
            gockpt.open(url, 7)


def test_both_forms_in_one_bucket(url, tmp_path):
    state = {"w": torch.zeros(100, 64)}

    def run(step, layout):
        state["w"].fill_(float(step))
        options = gockpt.Options(layout=layout, remote=url)
        with gockpt.Checkpointer(state, None, tmp_path / "ckpts", options=options) as saver:
            saver.after_step(step)

    for step, layout in ((1, "directory"), (2, "file"), (3, "directory"), (4, "file")):
        run(step, layout)
    assert gockpt.steps(url) == [1, 2, 3, 4]
    assert gockpt.latest(url) == 4
    for step in (1, 2, 3, 4):
        assert float(gockpt.open(url, step)["model/w"][0, 0]) == step
        assert gockpt.verify(url, step).ok
        assert run_cli(["show", url, "--step", str(step)]) == 0
    assert {one.name for one in gockpt.diff(url, url, step_a=1, step_b=2).changed} == {"model/w"}
    target = {"w": torch.zeros(100, 64)}
    assert gockpt.load(url, target).step == 4
    # A step that is saved again, in the other form, takes the place of the first; numbers go on.
    with gockpt.Checkpointer(
        target, None, tmp_path / "other", options=gockpt.Options(layout="directory", remote=url)
    ) as saver:
        saver.after_step(2)
    assert gockpt.open(url).metadata.seq == 5
    assert gockpt.steps(url) == [1, 2, 3, 4]
    assert float(gockpt.open(url, 2)["model/w"][0, 0]) == 4


def test_one_attempt_in_both_forms(save, url, tmp_path):
    held = save(tmp_path / "ckpts", 7)
    gockpt.unpack(tmp_path / "ckpts/step-0000000007.zip", tmp_path / "unpacked")
    gockpt.upload(tmp_path / "ckpts", url)
    gockpt.upload(tmp_path / "unpacked", url)
    assert gockpt.steps(url) == [7]
    assert torch.equal(gockpt.open(url)["model/tall"][...], held["tall"])


def test_a_later_run_goes_on_above_the_numbers_of_archives(save, url, tmp_path):
    held = save(tmp_path / "one", 7)
    gockpt.upload(tmp_path / "one", url)
    gockpt.load(url, held)
    with gockpt.Checkpointer(held, None, tmp_path / "two", options=gockpt.Options(remote=url)) as saver:
        saver.after_step(8)
    assert [gockpt.open(url, step).metadata.seq for step in (7, 8)] == [1, 2]


@pytest.mark.parametrize(
    "name", ["step-0000000007-1-00ff00ff.zip", "step-0000000007.zip", "step-0000000007.zip/"]
)
def test_no_checkpoint_is_uploaded_below_an_archive(name, save, url, bucket, s3, tmp_path):
    save(tmp_path, 7)
    with pytest.raises(gockpt.UsageError, match="names one checkpoint; pass the URL that stands above"):
        gockpt.upload(tmp_path, f"{url}/{name}")
    with pytest.raises(gockpt.UsageError, match="names one checkpoint") as caught:
        gockpt.upload(tmp_path, f"s3://me:pa55word@{bucket}/{name}")
    assert "pa55word" not in str(caught.value)
    options = gockpt.Options(remote=f"{url}/{name}")
    with pytest.raises(gockpt.UsageError, match="names one checkpoint"):
        gockpt.Checkpointer({"w": torch.ones(3)}, None, tmp_path / "other", options=options)
    assert keys(s3, bucket) == []


def test_numbers_go_on_above_an_archive_that_was_copied_by_hand(save, url, bucket, s3, tmp_path):
    for step in (1, 2, 3):
        held = save(tmp_path / "one", step)
    body = (tmp_path / "one/step-0000000003.zip").read_bytes()
    s3.put_object(Bucket=bucket, Key="runs/one/step-0000000003.zip", Body=body)
    options = gockpt.Options(remote=url, existing="continue")
    with gockpt.Checkpointer(held, None, tmp_path / "two", options=options) as saver:
        saver.after_step(4)
    assert gockpt.latest(url) == 4
    assert gockpt.open(url).metadata.seq == 4


def test_from_one_store_into_another(saved, url, tmp_path):
    gockpt.upload(saved, url)
    there = f"file://{tmp_path}/there"
    gockpt.upload(url, there)
    assert gockpt.verify(there).ok


def test_one_that_is_deleted_while_it_is_read(save, url, bucket, s3, tmp_path):
    save(tmp_path, 7)
    gockpt.upload(tmp_path, url)
    with gockpt.open(url) as checkpoint:
        s3.delete_object(Bucket=bucket, Key=keys(s3, bucket)[0])
        with pytest.raises(gockpt.CheckpointPruned, match="removed while it was being read"):
            checkpoint["model/tall"][...]


def test_parts_are_bounded(save_large, tmp_path, watched, monkeypatch):
    save_large(tmp_path)
    seen, store = [], watched()
    put = Objects.put

    def spy(self, path, data, **more):
        def counted():
            for piece in data():
                seen.append(len(piece))
                yield piece

        put(self, path, counted, **more)

    monkeypatch.setattr(Objects, "put", spy)
    done = gockpt.upload(tmp_path, store)
    assert seen == [8 << 20, 8 << 20, done.nbytes - (16 << 20)]


def test_pieces_made_ahead_are_the_same_and_stop_with_their_taker():
    made = []

    def pieces():
        for number in range(100):
            made.append(number)
            yield number

    with made_ahead(pieces()) as taken:
        assert list(taken) == list(range(100))
    made.clear()
    with made_ahead(pieces()) as taken:
        assert [next(taken), next(taken)] == [0, 1]
    assert len(made) < 10
    assert not any(thread.name == "gockpt-upload-read" for thread in threading.enumerate())
