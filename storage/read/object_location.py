"""Checkpoints in an object store: one range request per read.

Names of uploads, archives and prefixes alike, say everything: the newest is found by one listing and one
manifest, however many there are. Archives that somebody copied there under the names they have on disk don't
say it: each one's manifest is read.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from gockpt.errors import CheckpointCorrupt, CheckpointNotFound, ManifestCorrupt, NotACheckpoint
from gockpt.storage.format import step_names
from gockpt.storage.format.manifest import MANIFEST_FILE
from gockpt.storage.read.archive_files import ArchiveFiles
from gockpt.storage.read.location import Child, Names, expect_no_offsets, expect_plain, expect_size
from gockpt.storage.read.scratch import PIECE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from gockpt.storage.format.manifest import Manifest
    from gockpt.storage.object_store.client import Objects
    from gockpt.storage.read.location import File
    from gockpt.storage.read.scratch import Scratch

__all__ = ["ObjectArchive", "ObjectArchiveLocation", "ObjectFiles", "ObjectLocation"]

PARALLEL = 16
"""Requests in flight: a connection to an object store is slow, many are not."""


@dataclass(frozen=True, slots=True)
class ObjectFile:
    """An object of known size.

    Attributes:
        objects: Where it is.
        key: Its path there.
        path: Its path inside the checkpoint, for messages.
        nbytes: Its size; every read compares it with the size that the store says.
    """

    objects: Objects
    key: str
    path: str
    nbytes: int

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is held open."""

    def read_into(self, views: Sequence[memoryview], offset: int) -> int:
        """Fill every view, in order, from ``offset`` on; never returns with less.

        Raises:
            CheckpointCorrupt: If the object has another size than it must have, or ends too early.
            FileNotFoundError: If it is not there (any more).
            RemoteError: If the store refuses or can't be reached.
        """
        left = [view.cast("B") for view in views if view.nbytes]
        wanted, total = sum(view.nbytes for view in left), 0
        while total < wanted:
            n = min(PIECE, wanted - total)
            data, size = self.objects.read(self.key, offset + total, n)
            expect_size(self.path, size, self.nbytes)
            if data.nbytes != n:
                msg = f"{self.path} ends at byte {offset + total + data.nbytes}; there should be more"
                raise CheckpointCorrupt(msg)
            total += n
            while data.nbytes:
                part = min(data.nbytes, left[0].nbytes)
                left[0][:part] = data[:part]
                data, left[0] = data[part:], left[0][part:]
                if not left[0].nbytes:
                    del left[0]
        return total


class ObjectFiles:
    """The objects below one prefix, as the files of one checkpoint.

    Attributes:
        is_copy: Always: checkpoints are saved on disks, and uploaded from there.
    """

    is_copy = True

    def __init__(self, objects: Objects, base: str) -> None:
        """See what is below ``base``; ``""`` is the URL's own prefix."""
        self._objects = objects
        self._base = base
        self._tree: dict[str, set[str]] = {}

    def accept(self, manifest: Manifest, *, where: str) -> None:
        """Refuse the manifest of an archive."""
        expect_no_offsets(manifest, where=where)

    def open(
        self,
        path: str,
        *,
        nbytes: int | None = None,
        scratch: Scratch | None = None,  # noqa: ARG002 - the contract's
        at: int | None = None,  # noqa: ARG002 - of archives only
    ) -> File:
        """Open an object. With a size given nothing is asked of the store before the first read."""
        expect_plain(path)
        key = self._key(path)
        if not nbytes:
            size, _ = self._objects.stat(key)
            expect_size(path, size, nbytes)
            nbytes = size
        return ObjectFile(self._objects, key, path, nbytes)

    def names(self, path: str) -> Names:
        """Return the names in a directory. Asked for the root, it lists all that is below it once."""
        if not path:
            self._tree = {"": set()}
            for key in self._objects.tree(self._base):
                parts = key.split("/")
                for depth in range(len(parts)):
                    self._tree.setdefault("/".join(parts[:depth]), set()).add(parts[depth])
        elif path not in self._tree:
            return Names()
        return Names(sorted(self._tree[path]))

    def checked(self) -> ObjectFiles:
        """Return these: nothing is said of them beside the manifest."""
        return self

    def faults(self) -> Iterator[str]:
        """Yield nothing: there is nothing beside the files."""
        return iter(())

    def is_gone(self) -> bool:
        """Whether its manifest is gone: whoever deletes a checkpoint deletes that first."""
        try:
            self._objects.stat(self._key(MANIFEST_FILE))
        except FileNotFoundError:
            return True
        return False

    def close(self) -> None:
        """Nothing is held open."""

    def _key(self, path: str) -> str:
        return f"{self._base}/{path}" if self._base else path


@dataclass(frozen=True, slots=True)
class ObjectArchive:
    """An archive that is one object.

    Attributes:
        objects: Where it is.
        key: Its path there.
        nbytes: Its size.
        is_copy: Always: archives are saved on disks.
    """

    objects: Objects
    key: str
    nbytes: int
    is_copy: bool = True

    @property
    def path(self) -> str:
        """Its URL."""
        return self.objects.url_of(self.key)

    def open(self, path: str, nbytes: int, scratch: Scratch | None) -> File:  # noqa: ARG002 - the contract's
        """Return the object."""
        return ObjectFile(self.objects, self.key, path, self.nbytes)

    def is_gone(self) -> bool:
        """Whether the object is gone."""
        try:
            self.objects.stat(self.key)
        except FileNotFoundError:
            return True
        return False

    def close(self) -> None:
        """Nothing is held open."""


def _open_archive(objects: Objects, key: str) -> ArchiveFiles:
    """Open an object that is an archive.

    Raises:
        FileNotFoundError: If there is no such object.
        ManifestCorrupt: If it is no archive.
        RemoteError: If the store refuses or can't be reached.
    """
    try:
        return ArchiveFiles(ObjectArchive(objects, key, objects.stat(key)[0]))
    except CheckpointCorrupt as error:
        raise ManifestCorrupt(str(error)) from error


class ObjectArchiveLocation:
    """A URL that is one archive itself.

    Attributes:
        path: The URL.
        kind: An object store.
        parallel: Many requests at once.
    """

    kind: Literal["object store"] = "object store"
    parallel = PARALLEL

    def __init__(self, objects: Objects, name: str) -> None:
        """Look at the object ``name``; nothing is asked of the store yet."""
        self._objects = objects
        self._name = name
        self.path = objects.url_of(name)

    def children(self) -> list[Child]:
        """Return the archive itself."""
        return [Child("", self.path)]

    def open(self, child: Child) -> ArchiveFiles:  # noqa: ARG002 - there is one
        """Open the archive."""
        return _open_archive(self._objects, self._name)

    def not_found(self) -> CheckpointNotFound:
        """Return an error: there is no such object."""
        return CheckpointNotFound(f"no checkpoint at {self.path!r}: there is no such object")

    def close(self) -> None:
        """Nothing is held open."""


class ObjectLocation:
    """A URL below which checkpoints were uploaded, or one checkpoint's own.

    Attributes:
        path: The URL.
        kind: An object store.
        parallel: Many requests at once.
    """

    kind: Literal["object store"] = "object store"
    parallel = PARALLEL

    def __init__(self, objects: Objects) -> None:
        """Look below the URL of ``objects``; nothing is asked of the store yet."""
        self._objects = objects
        self.path = objects.url

    def children(self) -> list[Child]:
        """Return copied archives, highest step first, then uploads, newest first; itself if it is one.

        Raises:
            RemoteError: If the store refuses or can't be reached.
        """
        with suppress(FileNotFoundError):
            self._objects.stat(MANIFEST_FILE)
            return [Child("", self.path)]
        uploads, archives = [], []
        prefixes, names = self._objects.children()
        for name, archive in (*((name, False) for name in prefixes), *((name, True) for name in names)):
            known = step_names.parse_uploaded(name)
            if known is not None and known.archive == archive:
                url = self._objects.url_of(name)
                uploads.append(Child(name, url, known.step, known.seq, known.attempt))
        for name in names:
            entry = step_names.parse(name)
            if entry is not None and entry.archive:
                archives.append(Child(name, self._objects.url_of(name), entry.step))
        archives.sort(key=lambda child: child.step or 0, reverse=True)
        uploads.sort(key=lambda child: (child.seq, child.step, child.attempt), reverse=True)
        return archives + uploads

    def open(self, child: Child) -> ObjectFiles | ArchiveFiles:
        """Return a child's objects, of which nothing is asked yet, or open its archive."""
        if child.name.endswith(".zip"):
            return _open_archive(self._objects, child.name)
        return ObjectFiles(self._objects, child.name)

    def not_found(self) -> CheckpointNotFound | NotACheckpoint:
        """Return the error that says what stands there instead."""
        prefixes, names = self._objects.children()
        others = [name for name in (*names, *prefixes) if step_names.parse_uploaded(name) is None]
        if others:
            return NotACheckpoint(
                f"{self.path!r} holds no uploaded checkpoints, but {others[0]!r} and the like"
            )
        return CheckpointNotFound(f"no complete checkpoint in {self.path!r}")

    def close(self) -> None:
        """Nothing is held open."""
