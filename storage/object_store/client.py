"""An object store as gockpt uses it: a thin layer over obstore, and the seam where tests inject faults.

Contract: a missing object raises ``FileNotFoundError``; all else that the store or the network says
becomes :class:`~gockpt.errors.RemoteError`, which names the URL and the way out and never a credential.
Calls may come from several threads; obstore lets go of the GIL and repeats requests that failed for the
moment.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import urlsplit

from gockpt.errors import CheckpointNotFound, RemoteError, UsageError
from gockpt.storage.object_store.made_ahead import made_ahead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from obstore.store import ObjectStore

    Where: TypeAlias = str | os.PathLike[str] | ObjectStore

__all__ = ["SCHEMES", "Objects", "TakenError", "objects_at"]

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "file")
"""URL schemes that are read and written through obstore."""

CRC_ATTRIBUTE = "gockpt-crc32c"
"""User metadata of a file's object, but for manifests: the crc32c of its bytes, 8 hexadecimal digits."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LOST_SLASH = re.compile(rf"({'|'.join(SCHEMES)}):/[^/]")
_USERINFO = re.compile(r"://[^/\s\"'@]*@")
_INSTALL = "install obstore with: pip install 'gockpt[remote]'"
_CREDENTIALS = (
    "check the credentials and their rights (obstore takes them from the environment, such as "
    "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION, or from the machine's role)"
)
_users: set[int] = set()
"""The process that used obstore first; its threads don't survive a fork."""


class TakenError(Exception):
    """An object that was to be made is there already."""


class Objects:
    """The objects below a URL; paths are relative to it.

    Attributes:
        url: The URL, without a slash at its end, for messages and as the path of what is opened.
    """

    def __init__(self, store: ObjectStore, url: str) -> None:
        """Use an obstore store, which messages call ``url``."""
        _expect_unforked()
        self._store = store
        self._attributes = True
        self.url = url.rstrip("/")

    def url_of(self, path: str) -> str:
        """Return the URL of an object or prefix; of the whole for ``""``."""
        return f"{self.url}/{path}" if path else self.url

    def stat(self, path: str) -> tuple[int, str | None]:
        """Return an object's size, and the checksum that its uploader noted; ``None`` if none did.

        Raises:
            FileNotFoundError: If there is no such object.
            RemoteError: If that can't be told.
        """
        import obstore

        with self._explained("look at", path):
            result = obstore.get(self._store, path, options={"head": True})
            # Stores are free to change the case of a name.
            noted = {str(name).lower(): value for name, value in result.attributes.items()}
            return result.meta["size"], noted.get(CRC_ATTRIBUTE)

    def read(self, path: str, start: int, nbytes: int) -> tuple[memoryview, int]:
        """Return bytes of an object, fewer if it ends before, and the whole object's size.

        Raises:
            FileNotFoundError: If there is no such object.
            RemoteError: If the store refuses or can't be reached.
        """
        import obstore

        with self._explained("read", path):
            try:
                result = obstore.get(self._store, path, options={"range": (start, start + nbytes)})
                size = result.meta["size"]
                return memoryview(result.bytes()), size
            except obstore.exceptions.BaseError as error:
                # A range behind the end is an error of its own in each store: the size tells.
                if "Range" not in str(error) or start < (size := self.stat(path)[0]):
                    raise
                return memoryview(b""), size

    def put(
        self,
        path: str,
        data: Callable[[], bytes | Iterator[bytes | bytearray]],
        *,
        crc: int | None,
        part: int,
        parallel: int,
    ) -> None:
        """Write an object, which appears as a whole or not at all, over one of that name.

        Args:
            path: Where.
            data: Gives all its bytes, or an iterator of pieces, which runs in a thread of its own and whose
                errors are raised as they are.
            crc: Their checksum, to be noted at the object; ``None`` notes nothing.
            part: Bytes of one part of a large upload.
            parallel: How many parts may be on their way at once.

        Raises:
            RemoteError: If the store refuses or can't be reached.
        """
        import obstore

        noted = None if crc is None else {CRC_ATTRIBUTE: f"{crc:08x}"}
        while True:
            content, attributes = data(), noted if self._attributes else None
            with self._explained("write", path), ExitStack() as stack:
                in_parts = not isinstance(content, bytes)
                given = content if isinstance(content, bytes) else stack.enter_context(made_ahead(content))
                try:
                    obstore.put(
                        self._store,
                        path,
                        given,
                        attributes=attributes,
                        use_multipart=in_parts,
                        chunk_size=part,
                        max_concurrency=parallel,
                    )
                except (NotImplementedError, obstore.exceptions.NotSupportedError):
                    if attributes is None:
                        raise
                    self._attributes = False  # a directory can't note anything
                else:
                    return

    def create(self, path: str, data: bytes) -> None:
        """Write an object that isn't there yet.

        Where a store can't promise that, it is looked for first.

        Raises:
            TakenError: If it is there.
            RemoteError: If the store refuses or can't be reached.
        """
        import obstore

        with self._explained("write", path):
            try:
                obstore.put(self._store, path, data, mode="create")
            except obstore.exceptions.AlreadyExistsError:
                raise TakenError(path) from None
            except (NotImplementedError, obstore.exceptions.NotSupportedError):
                try:
                    self.stat(path)
                except FileNotFoundError:
                    obstore.put(self._store, path, data)
                else:
                    raise TakenError(path) from None

    def children(self, path: str = "") -> tuple[list[str], list[str]]:
        """Return the names right below a prefix: prefixes of more, and objects.

        Raises:
            RemoteError: If the store refuses or can't be reached.
        """
        import obstore

        with self._explained("list", path):
            found = obstore.list_with_delimiter(self._store, path or None)
            return (
                [prefix.rsplit("/", 1)[-1] for prefix in found["common_prefixes"]],
                [meta["path"].rsplit("/", 1)[-1] for meta in found["objects"]],
            )

    def tree(self, path: str) -> dict[str, int]:
        """Return the size of every object below a prefix, by its path relative to that.

        Raises:
            RemoteError: If the store refuses or can't be reached.
        """
        import obstore

        lead = f"{path}/" if path else ""
        with self._explained("list", path):
            return {
                meta["path"].removeprefix(lead): meta["size"]
                for batch in obstore.list(self._store, path or None)
                for meta in batch
            }

    @contextmanager
    def _explained(self, doing: str, path: str) -> Iterator[None]:
        """Turn what obstore raises into what the contract says, without the secrets in its words."""
        import obstore

        where = self.url_of(path)
        try:
            yield
        except FileNotFoundError as error:
            words = _words(error)
            if "NoSuchBucket" in words or "ContainerNotFound" in words:
                msg = f"can't {doing} {where}: there is no such bucket; make it, or correct the URL"
                raise RemoteError(msg) from None
            if doing == "write":
                msg = f"can't write {where}: {words}; check the URL"
                raise RemoteError(msg) from None
            raise FileNotFoundError(errno.ENOENT, "there is no such object", where) from None
        except (
            obstore.exceptions.PermissionDeniedError,
            obstore.exceptions.UnauthenticatedError,
        ) as error:
            msg = f"can't {doing} {where}: the store refused ({_words(error)}); {_CREDENTIALS}"
            raise RemoteError(msg) from None
        except (obstore.exceptions.BaseError, NotImplementedError) as error:
            words = _words(error)
            if "NoSuchBucket" in words or "ContainerNotFound" in words:
                way_out = "make the bucket, or correct the URL"
            elif any(code in words for code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "credential")):
                way_out = _CREDENTIALS
            else:
                way_out = "check the URL, the network and the store's endpoint, then try again"
            msg = f"can't {doing} {where}: {words}; {way_out}"
            raise RemoteError(msg) from None


def objects_at(where: Any, *, make: bool = False) -> Objects | None:
    """Return the objects below a URL, or of an obstore store; ``None`` for a path of this machine.

    Args:
        where: What the user named: a path, a URL, or a store.
        make: Whether a missing directory of a ``file://`` URL is made.

    Raises:
        UsageError: If the URL can't be used, obstore is not installed, or this process was forked from one
            that has used it.
        CheckpointNotFound: If a ``file://`` URL leads nowhere.
    """
    if isinstance(where, Objects):
        return where
    if not isinstance(where, (str, os.PathLike)):
        if not type(where).__module__.startswith("obstore"):
            return None  # what it is instead, the caller's own check says
        return Objects(where, _name_of(where))
    text = os.fspath(where)
    if _LOST_SLASH.match(text) and not isinstance(where, str):
        msg = f"{text!r} has lost a slash: pass a URL as text, not as a Path"
        raise UsageError(msg)
    match = _URL.match(text)
    if match is None:
        return None
    url = urlsplit(text)
    shown = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
    if match[1] not in SCHEMES:
        msg = f"{shown!r}: the scheme {match[1]!r} is none of {', '.join(SCHEMES)}"
        raise UsageError(msg)
    if url.query or url.fragment or ("@" in url.netloc and not match[1].startswith("abfs")):
        msg = (
            f"{shown!r} was given with credentials, a query or a fragment, which have no place in it; "
            + _CREDENTIALS
        )
        raise UsageError(msg)
    return _from_url(text if "@" not in text else url.geturl(), shown, make=make)


def _from_url(url: str, shown: str, *, make: bool) -> Objects:
    try:
        import obstore
        from obstore.store import LocalStore, from_url
    except ImportError as error:
        msg = f"{shown!r} is in an object store; {_INSTALL}"
        raise UsageError(msg) from error
    _expect_unforked()
    try:
        store = LocalStore.from_url(url, mkdir=make) if url.startswith("file:") else from_url(url)
    except (obstore.exceptions.BaseError, ValueError, OSError) as error:
        if url.startswith("file:") and not make:
            msg = f"no checkpoint in {shown!r}: there is no such directory"
            raise CheckpointNotFound(msg) from None
        msg = f"{shown!r} can't be used: {_words(error)}"
        raise UsageError(msg) from None
    return Objects(store, shown)


def _expect_unforked() -> None:
    if not _users:
        _users.add(os.getpid())
    if os.getpid() not in _users:
        msg = (
            "this process was forked from one that has used an object store, whose threads are not here: the "
            "call would hang. Start the process with 'spawn' or 'forkserver' instead"
        )
        raise UsageError(msg)


def _name_of(store: Any) -> str:
    """Return what messages call a store: its URL, where its own words tell, which hold no credentials."""
    text = _USERINFO.sub("://", str(store))
    match = re.match(r'(S3|GCS|Azure)Store\((?:bucket|container)\w*="([^"]*)"(?:, prefix="([^"]*)")?', text)
    if match is None:
        return f"{type(store).__name__}()" if text.startswith("<") else text
    scheme = {"S3": "s3", "GCS": "gs", "Azure": "az"}[match[1]]
    return f"{scheme}://{match[2]}" + (f"/{match[3]}" if match[3] else "")


def _words(error: BaseException) -> str:
    """Return what an error says in one line, without what may hold a credential."""
    text = _USERINFO.sub("://", str(error).partition("\n\nDebug source:")[0])
    code = re.search(r"<Code>([^<]*)</Code>", text)
    said = re.search(r"<Message>([^<]*)</Message>", text)
    if code:
        text = f"{code[1]}: {said[1]}" if said else code[1]
    return re.sub(r"\?[^\s'\")]*", "?...", " ".join(text.split()))[:300]
