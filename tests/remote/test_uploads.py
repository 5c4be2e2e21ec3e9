"""Copies behind a running training: the newest, whole, and never at the expense of a save."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import gockpt
from gockpt import registry
from gockpt import uploads as uploads_module
from gockpt.core.runs import Run
from gockpt.errors import RemoteError
from gockpt.storage.local.store import Store
from gockpt.storage.object_store import client
from gockpt.storage.object_store.client import Objects
from gockpt.storage.object_store.upload import upload_checkpoint
from gockpt.storage.paths import store_to_write
from gockpt.storage.read.find import list_checkpoints, open_checkpoint
from gockpt.uploads import Uploads

pytestmark = pytest.mark.usefixtures("layout")
REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def saver(url, tmp_path, small_chunks):
    """Make a checkpointer of a small mapping that copies to the URL; closed at the end whatever happens."""
    made = []

    def make(path=tmp_path, **options):
        options.setdefault("remote", url)
        state = {"w": torch.zeros(100, 64)}
        made.append(
            gockpt.Checkpointer(state, None, path, options=gockpt.Options(when_busy="wait", **options))
        )
        made[-1].state = state
        return made[-1]

    yield make
    for one in made:
        with suppress(gockpt.UploadError):
            one.close()


def step(saver, number):
    saver.state["w"].fill_(float(number))
    saver.after_step(number).result()


def idle(uploads):
    """Return when nothing is being uploaded; what failed is not tried again."""
    with uploads._changed:
        assert uploads._changed.wait_for(lambda: uploads._active is None, 60)


class Gate:
    """Holds uploads up at their begin until a test opens it, or lets them fail before or then."""

    def __init__(self, monkeypatch):
        self.reached, self.open = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self.late: BaseException | None = None
        self.seen: list[str] = []
        self.threads: set[str] = set()
        real = uploads_module.upload_checkpoint

        def gated(stored, *given, **more):
            self.seen.append(stored.path)
            self.threads.add(threading.current_thread().name)
            if self.error is not None:
                raise self.error
            self.reached.set()
            assert self.open.wait(60)
            if self.late is not None:
                raise self.late
            return real(stored, *given, **more)

        monkeypatch.setattr(uploads_module, "upload_checkpoint", gated)


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


def test_each_checkpoint_arrives(saver, url, tmp_path):
    one = saver()
    for number in (10, 20):
        step(one, number)
        one.wait()
        assert gockpt.latest(url) == number
    status = one.uploads
    assert (status.url, status.newest.step, status.active, status.waiting, status.error) == (
        *(url, 20),
        *(None, None, None),
    )
    assert status.done == status.total == 0
    assert gockpt.steps(url) == gockpt.steps(tmp_path) == [10, 20]
    assert float(gockpt.open(url, 10)["model/w"][0, 0]) == 10.0
    assert all(gockpt.verify(url, number).ok for number in (10, 20))


def test_without_remote_there_is_none(tmp_path):
    with gockpt.Checkpointer({"w": torch.zeros(3)}, None, tmp_path) as one:
        assert one.uploads is None


def test_the_function_and_wait_do_it_too(url, tmp_path):
    state = {"w": torch.ones(5)}
    gockpt.save_overlapped(state, None, tmp_path, step=3, options=gockpt.Options(remote=url))
    gockpt.wait()
    assert gockpt.steps(url) == [3]


def test_a_save_does_not_wait_for_an_upload_and_only_the_newest_follows(saver, url, gate, caplog):
    caplog.set_level(logging.INFO, "gockpt")
    one = saver()
    step(one, 1)
    assert gate.reached.wait(60)
    for number in (2, 3, 4):
        step(one, number)  # durable while the upload of step 1 stands still
    assert (one.uploads.active, one.uploads.waiting) == (1, 4)
    gate.open.set()
    one.wait()
    assert gockpt.steps(url) == [1, 4]
    assert "step 2 is not uploaded: step 3 is newer" in caplog.text


def test_pruning_spares_what_is_being_uploaded(saver, url, gate, tmp_path):
    one = saver(keep=2)
    step(one, 1)
    assert gate.reached.wait(60)
    for number in (2, 3, 4, 5):
        step(one, number)
    assert gockpt.steps(tmp_path) == [1, 4, 5]
    gate.open.set()
    one.wait()
    assert gockpt.steps(url) == [1, 5]
    assert gockpt.verify(url, 1).ok
    step(one, 6)
    assert gockpt.steps(tmp_path) == [5, 6]


def test_what_was_removed_before_its_upload_is_left_out(tmp_path, url, caplog, save, suffix):
    save(tmp_path, 1)
    with Store(tmp_path) as store:
        uploads = Uploads(url, str(tmp_path / "empty"), store, store.run, nice=0)
        uploads.offer(7, 9, str(tmp_path / "step-0000000007"))
        uploads.offer(7, 9, str(tmp_path / f"step-0000000001{suffix}"))  # another one in its place
        uploads.wait()
    assert gockpt.steps(url) == []
    assert uploads.status.error is None
    assert "was removed" in caplog.text


def test_a_failure_is_told_at_the_end_and_once(saver, url, gate, tmp_path, caplog):
    one = saver()
    gate.error = RemoteError("can't list it: 503 Slow Down")
    for number in (1, 2):
        step(one, number)
    with pytest.raises(
        gockpt.UploadError, match=r"step 2 is complete in .*503 Slow Down.*gockpt\.upload\("
    ) as e:
        one.wait()
    assert isinstance(e.value.__cause__, RemoteError)
    assert "step 1 was not uploaded" in caplog.text or "step 1 is not uploaded" in caplog.text
    assert "503" in one.uploads.error
    assert gockpt.steps(tmp_path) == [1, 2]
    one.wait()  # once is enough
    one.close()


def test_the_next_checkpoint_tries_afresh(saver, url, gate):
    one = saver()
    gate.error = RemoteError("503")
    step(one, 1)
    idle(one._uploads)
    assert one.uploads.error == "503"
    gate.error = None
    gate.open.set()
    step(one, 2)
    one.wait()
    assert one.uploads.error is None
    assert gockpt.steps(url) == [2]


def test_wait_tries_a_failed_one_again(saver, url, gate):
    one = saver()
    gate.error = RemoteError("503")
    step(one, 1)
    idle(one._uploads)
    gate.error = None
    gate.open.set()
    one.wait()
    assert gockpt.steps(url) == [1]


def of_a_model_that_is_gone(url, path, step=1):
    """Save a module that nobody holds afterwards; return its checkpointer once the save is durable."""
    model = torch.nn.Linear(3, 3)
    gockpt.save_overlapped(model, None, path, step=step, options=gockpt.Options(remote=url)).result()
    (made,) = (one for one in registry.opened if one.path == str(path.resolve()))
    return made


@pytest.mark.parametrize("works", [True, False])
def test_a_tick_does_not_wait_for_what_a_model_that_is_gone_left_to_upload(
    url, gate, tmp_path, caplog, works
):
    """Its failed upload is tried once more on its own thread; ticks of another model go on meanwhile."""
    gate.error = RemoteError("503")
    gone = of_a_model_that_is_gone(url, tmp_path / "gone")
    uploads = gone._uploads
    idle(uploads)
    gc.collect()
    gate.error = None
    other = {"w": torch.zeros(3)}
    for number in (1, 2, 3):
        # The upload stands still at its gate all the time: a call that waited for it would never return.
        gockpt.save_overlapped(other, None, tmp_path / "other", step=number).result()
        assert gate.reached.wait(60)
        assert not gone.closed
    assert gate.threads == {"gockpt-upload"}
    if not works:
        gate.late = RemoteError("still 503")
    gate.open.set()
    idle(uploads)
    gockpt.save_overlapped(other, None, tmp_path / "other", step=4).result()
    assert gone.closed
    assert gate.seen == gate.seen[:2]  # once, and once more
    told = "of a model that is gone: the checkpoint of step 1 is complete" in caplog.text
    assert (gockpt.steps(url), told) == (([1], False) if works else ([], True))
    gockpt.wait()


def test_gockpt_wait_and_a_with_block_raise_it(url, gate, tmp_path):
    gate.error = RemoteError("503")
    options = gockpt.Options(remote=url)
    state = {"w": torch.zeros(3)}
    gockpt.save_overlapped(state, None, tmp_path / "a", step=1, options=options)
    with pytest.raises(gockpt.UploadError, match="step 1"):
        gockpt.wait()
    with (
        pytest.raises(gockpt.UploadError, match="step 2"),
        gockpt.Checkpointer({"v": torch.zeros(3)}, None, tmp_path / "b", options=options) as one,
    ):
        one.after_step(2)
    assert one.closed


def test_what_cant_work_shows_at_the_first_call(bucket, tmp_path):
    state = {"w": torch.zeros(3)}
    with pytest.raises(gockpt.RemoteError, match=r"s3://no-such-bucket/x.*bucket"):
        gockpt.Checkpointer(state, None, tmp_path, options=gockpt.Options(remote="s3://no-such-bucket/x"))
    with pytest.raises(gockpt.UsageError, match="scheme 'ftp'"):
        gockpt.Checkpointer(state, None, tmp_path, options=gockpt.Options(remote="ftp://there/x"))
    for bad in ("bucket/run", 3):
        with pytest.raises(gockpt.OptionsError, match="remote="):
            gockpt.Options(remote=bad)
    gockpt.Checkpointer(state, None, tmp_path).close()  # the path was let go of


def test_a_run_that_moves_goes_on_with_higher_numbers(saver, url, tmp_path):
    first = saver(tmp_path / "one")
    for number in (1000, 1500):
        step(first, number)
        first.wait()
    first.close()
    state = {"w": torch.zeros(100, 64)}
    gockpt.load(url, state, step=1000)
    options = gockpt.Options(remote=url)
    with gockpt.Checkpointer(state, None, tmp_path / "two", options=options) as second:
        second.after_step(1100).result()
    assert gockpt.latest(url) == 1100
    assert gockpt.open(tmp_path / "two").metadata.seq == 3
    assert gockpt.open(url).metadata.parent == 1
    # Back on the first machine: its newest is stale there, and is not uploaded over what is newer.
    with gockpt.Checkpointer(state, None, tmp_path / "one", options=options) as third:
        third.wait()
        assert gockpt.latest(url) == 1100
        third.after_step(1200).result()
    assert gockpt.open(tmp_path / "one").metadata.seq == 4
    assert gockpt.latest(url) == 1200


def test_a_run_killed_while_it_uploads_goes_on_at_the_next_start(url, bucket, s3, tmp_path, killed, layout):
    script = (
        f"gockpt.Options.__init__.__kwdefaults__['layout'] = {layout!r}\n"
        "state = {'w': torch.full((50, 3), 7.0), 'v': torch.zeros(9)}\n"
        "options = gockpt.Options(remote=sys.argv[2])\n"
        "gockpt.save_overlapped(state, None, sys.argv[1], step=7, options=options)\n"
        "gockpt.wait()\n"
    )
    in_parts = layout == "directory"
    killed(script, tmp_path, url, nth=7 if in_parts else 1)
    assert gockpt.steps(url) == []
    assert gockpt.steps(tmp_path) == [7]
    assert (s3.list_objects_v2(Bucket=bucket)["KeyCount"] > 0) == in_parts
    state = {"w": torch.zeros(50, 3), "v": torch.zeros(9)}
    gockpt.load(tmp_path, state)
    with gockpt.Checkpointer(state, None, tmp_path, options=gockpt.Options(remote=url)) as one:
        one.wait()
        newest = one.uploads.newest
    assert newest.step == 7
    assert 0 < newest.sent <= newest.nbytes
    assert (newest.sent < newest.nbytes) == in_parts
    assert gockpt.verify(url).ok


def test_leaving_the_program_finishes_the_upload(url, tmp_path, process):
    script = (
        "import sys, torch, gockpt\n"
        "options = gockpt.Options(remote=sys.argv[2])\n"
        "state = {'w': torch.ones(50, 3)}\n"
        "gockpt.save_overlapped(state, None, sys.argv[1], step=7, options=options)\n"
    )
    done = process(script, tmp_path, url)
    assert (done.returncode, done.stderr) == (0, "")
    assert gockpt.steps(url) == [7]


def test_its_threads_are_nice(url, tmp_path, save, monkeypatch):
    save(tmp_path, 1)
    seen = set()

    def looked(write):
        def call(self, *given, **more):
            seen.add(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            write(self, *given, **more)

        return call

    for name in ("put", "create"):
        monkeypatch.setattr(Objects, name, looked(getattr(Objects, name)))
    with Store(tmp_path) as store:
        run = Run(list_checkpoints(tmp_path)[0].run)
        Uploads(url, str(tmp_path), store, run, nice=19).wait()
    assert seen == {19}


def test_a_priority_that_is_refused_is_done_without(saver, monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    one = saver(nice=0)
    monkeypatch.setattr(os, "setpriority", refused)
    step(one, 1)
    one.wait()
    assert one.uploads.newest.step == 1


def test_a_failed_save_is_not_hidden_by_a_failed_upload(saver, monkeypatch, tmp_path):
    one = saver()
    step(one, 1)
    one.wait()
    gate = Gate(monkeypatch)
    gate.error = RemoteError("the store is down")
    gate.open.set()
    step(one, 2)
    (tmp_path / "step-0000000003" / "foreign").mkdir(parents=True)
    one.after_step(3)
    with pytest.raises(gockpt.StorageError, match="step-0000000003") as caught:
        one.wait()
    assert "could not be uploaded" in str(caught.value.__notes__)


def test_threads_that_cant_begin_publish_nothing(save, url, tmp_path):
    save(tmp_path / "ckpts", 1)

    def fails():
        raise OSError("no priority for you")

    with open_checkpoint(tmp_path / "ckpts") as stored, pytest.raises(OSError, match="for you"):
        upload_checkpoint(stored, store_to_write(url), prepare_thread=fails)
    assert gockpt.steps(url) == []


def test_one_job_is_uploaded_once(saver, monkeypatch):
    """Whatever is offered while a thread is about to end: it gets its job under the lock, or none."""
    one = saver()
    uploads = one._uploads
    running, most = [], []

    def counted(job):
        running.append(job)
        most.append(len(running))
        running.remove(job)

    monkeypatch.setattr(uploads, "_upload", counted)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for number in range(3000):
            uploads.offer(number, number, "nowhere")
        one.wait()
    finally:
        sys.setswitchinterval(interval)
    assert max(most) == 1
    assert uploads._active is None


def test_userinfo_of_an_endpoint_is_never_shown():
    said = client._words(
        RuntimeError('error sending request: HEAD "http://user:very-secret@127.0.0.1:1/b/a"')
    )
    assert "very-secret" not in said
    assert "http://127.0.0.1:1/b/a" in said
