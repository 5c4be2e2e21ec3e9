"""What goes wrong in a store is told for what it is: damage, removal, refusal; and no secret is told."""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import gockpt
from gockpt.storage.object_store.client import _words as words_of
from gockpt.storage.object_store.client import objects_at

pytestmark = pytest.mark.usefixtures("directories")
SECRETS = ("very-secret-text", "AKIAEXAMPLEKEY", "pa55word")


@pytest.fixture
def uploaded(save, url, bucket, s3, tmp_path):
    """Return a checkpoint at a URL, its keys by path, and how to change one."""
    held = save(tmp_path, 7)
    done = gockpt.upload(tmp_path, url)
    base = done.url.removeprefix(f"s3://{bucket}/") + "/"

    class There:
        tensors = held

        def get(self, path):
            return s3.get_object(Bucket=bucket, Key=base + path)["Body"].read()

        def put(self, path, body):
            s3.put_object(Bucket=bucket, Key=base + path, Body=bytes(body))

        def delete(self, path):
            s3.delete_object(Bucket=bucket, Key=base + path)

    return There()


def flip(there, path, at=10):
    body = bytearray(there.get(path))
    body[at] ^= 4
    there.put(path, body)


def swap(there):
    one, two = (there.get(f"model/tall/c.{n}.0") for n in (0, 1))
    there.put("model/tall/c.0.0", two)
    there.put("model/tall/c.1.0", one)


CHUNK = "model/tall/c.1.0"
DAMAGE = {
    "flipped byte": (lambda there: flip(there, CHUNK), [CHUNK], "differ from the checksum"),
    "missing object": (lambda there: there.delete(CHUNK), [CHUNK], "missing"),
    "swapped objects": (swap, ["model/tall/c.0.0", CHUNK], "differ from the checksum"),
    "shorter object": (lambda there: there.put(CHUNK, there.get(CHUNK)[:-9]), [CHUNK], "bytes instead of"),
    "longer object": (lambda there: there.put(CHUNK, there.get(CHUNK) + b"x"), [CHUNK], "bytes instead of"),
    "empty object": (lambda there: there.put(CHUNK, b""), [CHUNK], "0 bytes instead of"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found(what, uploaded, url):
    damage, paths, words = DAMAGE[what]
    checkpoint = gockpt.open(url)
    damage(uploaded)
    with pytest.raises(gockpt.ChunkCorrupt, match=words):
        checkpoint["model/tall"][...]
    report = gockpt.verify(url)
    assert [problem.path for problem in report.problems] == paths
    with pytest.raises(gockpt.ChunkCorrupt):
        gockpt.load(url, uploaded.tensors)


@pytest.mark.parametrize("path", ["state.json", "zarr.json", "blocks.crc32c", "model/w/zarr.json"])
def test_a_flipped_document_is_found(path, uploaded, url):
    flip(uploaded, path, at=2)
    assert path in [problem.path for problem in gockpt.verify(url).problems]


def test_objects_of_others_are_named_and_no_damage(uploaded, url):
    uploaded.put("model/tall/c.9.0", b"hello")
    uploaded.put("other/thing", b"hello")
    report = gockpt.verify(url)
    assert report.ok
    assert report.foreign == ("model/tall/c.9.0", "other")


def test_a_damaged_manifest_is_passed_over_and_reported(uploaded, url, save, tmp_path, caplog):
    save(tmp_path, 6)
    gockpt.upload(tmp_path, url)
    flip(uploaded, "gockpt.json")
    assert gockpt.steps(url) == [6]
    assert "damaged checkpoint" in caplog.text
    with pytest.raises(gockpt.ManifestCorrupt):
        gockpt.open(url, 7)
    report = gockpt.verify(url)
    assert report.step == 6
    assert [problem.path.endswith("/gockpt.json") for problem in report.problems] == [True]


def test_a_checkpoint_under_another_prefix_is_not_believed(uploaded, url, bucket, s3, tmp_path):
    body = uploaded.get("gockpt.json")
    s3.put_object(Bucket=bucket, Key=f"runs/one/step-0000000009-5-{'0' * 32}/gockpt.json", Body=body)
    assert gockpt.steps(url) == [7]
    with pytest.raises(gockpt.ManifestCorrupt, match="it was renamed"):
        gockpt.open(url, 9)


def test_only_a_manifest_makes_a_checkpoint(uploaded, url, bucket, s3):
    uploaded.delete("gockpt.json")
    assert gockpt.steps(url) == []
    with pytest.raises(gockpt.CheckpointNotFound):
        gockpt.open(url)


def test_removed_while_it_is_read(uploaded, url):
    checkpoint = gockpt.open(url)
    for path in ("gockpt.json", CHUNK):
        uploaded.delete(path)
    with pytest.raises(gockpt.CheckpointPruned, match="removed while it was being read"):
        checkpoint["model/tall"][...]


def refuse_all(status, body=b""):
    """Serve one answer for everything; returns the endpoint, the requests seen, and how to end it."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            seen.append(self.command)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *given): ...

    for method in ("GET", "PUT", "HEAD", "POST", "DELETE"):
        setattr(Handler, f"do_{method}", Handler.answer)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def end():
        server.shutdown()
        thread.join()
        server.server_close()

    return f"http://127.0.0.1:{server.server_address[1]}", seen, end


FORBIDDEN = (
    b"<Error><Code>InvalidAccessKeyId</Code><Message>The key does not exist.</Message>"
    b"<AWSAccessKeyId>AKIAEXAMPLEKEY</AWSAccessKeyId><Signature>very-secret-text</Signature></Error>"
)


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (403, FORBIDDEN, r"check the credentials.*AWS_ACCESS_KEY_ID"),
        (401, FORBIDDEN, r"check the credentials.*AWS_ACCESS_KEY_ID"),
        (500, b"<Error><Code>InternalError</Code><Message>Try again.</Message></Error>", "500|InternalError"),
        (503, b"", "503"),
    ],
)
def test_a_refusal_says_what_now_and_no_secret(status, body, words, quick, save, tmp_path):
    save(tmp_path, 7)
    endpoint, seen, end = refuse_all(status, body)
    try:
        store = quick("some-bucket", endpoint=endpoint)
        for call in (
            lambda: gockpt.open(store),
            lambda: gockpt.steps(store),
            lambda: gockpt.verify(store),
            lambda: gockpt.load(store, {"w": torch.zeros(3)}),
            lambda: gockpt.upload(tmp_path, store),
        ):
            with pytest.raises(gockpt.RemoteError, match="some-bucket") as caught:
                call()
            told = "".join(traceback.format_exception(caught.value))
            assert re.search(words, str(caught.value)), caught.value
            assert not any(secret in told for secret in SECRETS), told
        with pytest.raises(gockpt.RemoteError) as caught:
            objects_at(store).children()
        assert not any(secret in str(caught.value) for secret in SECRETS)
        assert (b"InvalidAccessKeyId" in body) == ("InvalidAccessKeyId: The key" in str(caught.value))
    finally:
        end()
    assert seen


def test_signed_addresses_are_cut_off():
    """Azure's and presigned S3's addresses are credentials themselves."""
    error = OSError("GET https://a.example/b/c?sv=1&sig=pa55word (reset)\n\nDebug source:\npa55word")
    assert words_of(error) == "GET https://a.example/b/c?... (reset)"


def test_nobody_answers(quick):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(gockpt.RemoteError, match="check the URL, the network"):
            gockpt.steps(quick("some-bucket", endpoint=endpoint))


def test_a_bucket_that_is_not_there(bucket, tmp_path, save):
    save(tmp_path, 7)
    for call in (
        lambda: gockpt.steps("s3://no-such-bucket/run"),
        lambda: gockpt.open("s3://no-such-bucket/run"),
        lambda: gockpt.upload(tmp_path, "s3://no-such-bucket/run"),
    ):
        with pytest.raises(gockpt.RemoteError, match=r"s3://no-such-bucket/run.*bucket"):
            call()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://AKIAEXAMPLEKEY:pa55word@bucket/run", "credentials"),
        ("s3://bucket/run?X-Amz-Signature=pa55word", "credentials"),
        ("ftp://bucket/run", "scheme 'ftp'"),
        (Path("s3://bucket/run"), "lost a slash"),
    ],
)
def test_a_url_that_cant_be_used(url, words, tmp_path):
    for call in (gockpt.open, gockpt.steps, gockpt.verify, lambda there: gockpt.upload(tmp_path, there)):
        with pytest.raises(gockpt.GockptError) as caught:
            call(url)
        if call in (gockpt.open, gockpt.steps, gockpt.verify):
            assert isinstance(caught.value, gockpt.UsageError)
            assert words in str(caught.value)
        assert "pa55word" not in "".join(traceback.format_exception(caught.value))


def test_without_obstore_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(gockpt.UsageError, match=r"pip install 'gockpt\[remote\]'"):
        gockpt.open("s3://bucket/run")


def test_local_work_never_loads_it(tmp_path, process):
    script = (
        "import sys, torch, gockpt\n"
        "gockpt.save_overlapped({'w': torch.ones(3)}, None, sys.argv[1], step=1).result()\n"
        "assert gockpt.verify(sys.argv[1]).ok and gockpt.open(sys.argv[1])['model/w'][...].sum() == 3\n"
        "assert 'obstore' not in sys.modules\n"
    )
    done = process(script, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_forked_child_is_refused_and_does_not_hang(url):
    assert gockpt.steps(url) == []
    child = os.fork()
    if child == 0:  # pragma: no cover - not measured in the child
        code = 1
        try:
            gockpt.steps(url)
        except gockpt.UsageError as error:
            code = 0 if "spawn" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_path_that_is_no_url_is_no_store(tmp_path):
    for path in ("ckpts", tmp_path, "a:b", "s3:bucket", 5, None):
        assert objects_at(path) is None
    with pytest.raises(gockpt.CheckpointNotFound):
        gockpt.upload(tmp_path, tmp_path)
