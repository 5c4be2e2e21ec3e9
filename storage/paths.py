"""Paths as users give them: checked, and with ``~`` expanded.

Promise: what these functions return can be handed to the system as it stands; anything else is a
:class:`~gockpt.errors.UsageError` that names the value and the way out, before anything is made or read.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from gockpt.errors import UsageError
from gockpt.storage.format import step_names
from gockpt.storage.object_store.client import objects_at

if TYPE_CHECKING:
    from gockpt.storage.object_store.client import Objects

__all__ = ["directory_to_save", "local_path", "store_to_write"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""Beginning of a URL; ``pathlib`` turns ``s3://bucket`` into ``s3:/bucket``."""


def local_path(path: Any) -> str:
    """Return a path of this machine as text, with ``~`` and ``~user`` expanded; it need not exist.

    Raises:
        UsageError: If it is no path: another type, empty, with a NUL, not encodable, or of an unknown home.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else path
    if not isinstance(text, str):
        hint = "; os.fsdecode() makes text of it" if isinstance(text, bytes) else ""
        msg = f"path={path!r} is a {type(path).__name__}: pass text or a pathlib.Path{hint}"
        raise UsageError(msg)
    if not text:
        msg = "path='' is empty: pass a directory; '.' is the current one"
        raise UsageError(msg)
    if "\0" in text:
        msg = f"path={text!r} contains a NUL character, which no path may"
        raise UsageError(msg)
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        msg = f"path={text!r} can't be encoded for this file system: {error.reason}"
        raise UsageError(msg) from error
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        home = expanded.partition("/")[0]
        msg = (
            f"path={text!r}: no home directory is known for {home!r} (is HOME set?); pass an absolute path, "
            f"or {'./' + text!r} for a directory of that name"
        )
        raise UsageError(msg)
    return expanded


def directory_to_save(path: Any) -> str:
    """Return the directory that checkpoints are to be saved into: absolute, links resolved.

    Raises:
        UsageError: As :func:`local_path`, and if it is a URL or an object store.
    """
    if type(path).__module__.startswith("obstore"):
        msg = (
            f"path={path!r} is an object store: checkpoints are saved into a local directory, and copied to "
            'a store with Options(remote="s3://bucket/run")'
        )
        raise UsageError(msg)
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if isinstance(text, str) and _URL.match(text):
        shown = _without_credentials(text)
        msg = (
            f"path={shown!r} is a URL: checkpoints are saved into a local directory, and copied to an object "
            f"store with Options(remote={shown!r}). For a directory of that name, pass {'./' + shown!r}"
        )
        raise UsageError(msg)
    return os.path.realpath(local_path(path))


def _without_credentials(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url)


def store_to_write(where: Any) -> Objects:
    """Return the objects below a URL, or of an obstore store, that checkpoints are to be uploaded to.

    Raises:
        UsageError: If it is no usable URL of an object store, or that of an archive.
    """
    above, _, name = where.rstrip("/").rpartition("/") if isinstance(where, str) else ("", "", "")
    if "://" in above and any(
        known is not None and known.archive
        for known in (step_names.parse_uploaded(name), step_names.parse(name))
    ):
        msg = f"{_without_credentials(where)!r} names one checkpoint; pass the URL that stands above it"
        raise UsageError(msg)
    objects = objects_at(where, make=True)
    if objects is None:
        msg = f"{where!r} is no URL of an object store, such as 's3://bucket/run' or 'gs://bucket/run'"
        raise UsageError(msg)
    return objects
