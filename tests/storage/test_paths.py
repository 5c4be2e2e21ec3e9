"""Paths as users give them: ``~`` is expanded, and what can't be a path is refused by name."""

from __future__ import annotations

import os
import pwd
from pathlib import Path, PurePosixPath

import pytest

from gockpt.errors import UsageError
from gockpt.storage.paths import directory_to_save, local_path
from gockpt.storage.read.find import location_at


class OfBytes:
    def __repr__(self):
        return "OfBytes()"

    def __fspath__(self):
        return b"ckpts"


@pytest.fixture
def home(monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd() / "home"))
    return Path.cwd() / "home"


@pytest.mark.parametrize(
    "given", ["~/ckpts", "~//ckpts", Path("~/ckpts"), PurePosixPath("~/ckpts")], ids=repr
)
def test_a_home_is_expanded(home, given):
    assert directory_to_save(given) == str(home.resolve() / "ckpts")
    assert Path(local_path(given)) == home / "ckpts"


def test_a_users_home_is_expanded():
    user = pwd.getpwuid(os.getuid())
    assert local_path(f"~{user.pw_name}/x") == user.pw_dir.rstrip("/") + "/x"


@pytest.mark.parametrize("given", ["a/~", "./~/x", "x~", "~".join("ab")])
def test_a_tilde_elsewhere_is_a_letter(home, given):
    assert local_path(given) == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "path='' is empty"),
        (b"ckpts", r"path=b'ckpts' is a bytes.*os\.fsdecode"),
        (OfBytes(), "OfBytes: pass text or a pathlib.Path"),
        (None, "path=None is a NoneType"),
        (3, "path=3 is a int"),
        ("a\0b", r"path='a\\x00b' contains a NUL"),
        ("a\ud800b", "can't be encoded"),
        ("~nobody-of-that-name/x", r"no home directory is known for '~nobody-of-that-name'.*'\./~nobody"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("taken", [directory_to_save, location_at])
def test_what_is_no_path_is_refused(taken, given, message):
    with pytest.raises(UsageError, match=message):
        taken(given)
    assert os.listdir() == []


@pytest.mark.parametrize(
    "url",
    [
        *("s3://bucket/run", "gs://b/r", "az://b/r", "abfss://c@account/r", "file:///tmp/run", "hdfs://h/r"),
        *("s3:/bucket/run", "https://example.org/run", "S3://bucket/run", Path("s3://bucket/run")),
    ],
    ids=repr,
)
def test_a_url_is_no_place_to_save(url):
    with pytest.raises(UsageError, match=r"is a URL.*Options\(remote="):
        directory_to_save(url)
    assert os.listdir() == []


def test_credentials_of_a_url_are_not_repeated():
    with pytest.raises(UsageError) as caught:
        directory_to_save("s3://key:secret@bucket/run")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("given", ["a:b", "run:7", "a/b://c", "./s3://x"])
def test_a_colon_alone_makes_no_url(given):
    assert directory_to_save(given) == os.path.realpath(given)
