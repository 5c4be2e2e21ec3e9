"""A checkpoint in an object store, as its readers see it: one range request per read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from gockpt.errors import CheckpointCorrupt
from gockpt.storage.format.manifest import MANIFEST_FILE
from gockpt.storage.read.local_location import Names
from gockpt.storage.read.read_execute import PIECE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from gockpt.storage.object_store.client import Objects
    from gockpt.storage.read.local_location import File
    from gockpt.storage.read.scratch import Scratch

__all__ = ["RemoteFolder"]


@dataclass(frozen=True, slots=True)
class RemoteFile:
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
            if size != self.nbytes:
                msg = f"{self.path} has {size} bytes instead of {self.nbytes}"
                raise CheckpointCorrupt(msg)
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


class RemoteFolder:
    """The objects below one prefix, as the files of one checkpoint."""

    def __init__(self, objects: Objects, base: str) -> None:
        """See what is below ``base``; ``""`` is the URL's own prefix."""
        self._objects = objects
        self._base = base
        self._tree: dict[str, set[str]] = {}

    def open(self, path: str, *, nbytes: int | None = None, scratch: Scratch | None = None) -> File:  # noqa: ARG002 - the contract's
        """Open an object. With a size given nothing is asked of the store before the first read."""
        if any(part in ("", ".", "..") or "\0" in part for part in path.split("/")):
            msg = f"{path!r} is not a plain path inside the checkpoint"
            raise CheckpointCorrupt(msg)
        key = self._key(path)
        if not nbytes:
            size, _ = self._objects.stat(key)
            if nbytes is not None and size != nbytes:
                msg = f"{path} has {size} bytes instead of {nbytes}"
                raise CheckpointCorrupt(msg)
            nbytes = size
        return RemoteFile(self._objects, key, path, nbytes)

    def names(self, path: str) -> Names:
        """Return what stands in a directory. Asked for the root, it lists all that is below it once."""
        if not path:
            self._tree = {"": set()}
            for key in self._objects.tree(self._base):
                parts = key.split("/")
                for depth in range(len(parts)):
                    self._tree.setdefault("/".join(parts[:depth]), set()).add(parts[depth])
        elif path not in self._tree:
            return Names()
        return Names(sorted(self._tree[path]))

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
