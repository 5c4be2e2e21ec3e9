"""A checkpoint opened for reading: names, metadata, and tensors that are read when indexed.

Promise: opening reads names, shapes and metadata only, and indexing a tensor reads only the bytes of the
smallest box around the wanted elements (in whole verified blocks). Returned bytes have been compared with
their checksums, unless the caller turned that off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from gockpt.catalog import metadata_of, state_of
from gockpt.core.array_spec import public_name
from gockpt.core.step_number import checked_step
from gockpt.errors import TensorNotFound, UsageError
from gockpt.garbage_collection import collection_paused
from gockpt.loading.lazy_tensor import LazyTensor, not_found, read_whole
from gockpt.state.value_decoder import decode
from gockpt.storage.read.find import open_checkpoint

if TYPE_CHECKING:
    from types import TracebackType

    from gockpt.state.saved_document import SavedState
    from gockpt.storage.object_store.client import Where
    from gockpt.storage.read.checkpoint import StoredCheckpoint

__all__ = ["Checkpoint", "open"]


class Checkpoint(Mapping[str, LazyTensor]):
    """A complete checkpoint as a mapping of names to lazy tensors; a context manager that closes it.

    Names are ``model/<fqn>``, ``optimizer/<fqn>/<state>`` and ``extra/<name>/...``; tied weights appear under
    each of their names. A tensor subclass (such as a quantised weight) is held as its inner tensors, each
    below its name: ``model/<fqn>/<attribute>``.

    Attributes:
        metadata: Everything known about it besides the tensors.
        extra: The plain values of the user's extras, by name; each is read on access.
    """

    def __init__(self, stored: StoredCheckpoint, *, verify: bool = True) -> None:
        """Take over an open checkpoint; ``verify`` tells whether reads are compared with checksums."""
        self._stored = stored
        self._verify = verify
        self._state = state_of(stored)
        self._specs = {name: array.spec for name, array in stored.arrays.items()}
        for alias, target in self._state.aliases.items():
            for inner, array in self._arrays_of(target):
                self._specs[alias + inner] = self._specs[array]
        self.metadata = metadata_of(stored, self._state)
        self.extra: Mapping[str, Any] = _Extras(stored, self._state)

    def __getitem__(self, name: str) -> LazyTensor:
        try:
            return LazyTensor(self._stored, self._specs[name], name, verify=self._verify)
        except (KeyError, TypeError):
            target = self._state.aliases.get(name, name) if isinstance(name, str) else ""
            if target in self._state.subclasses:
                inner = ", ".join(name + part for part, _ in self._arrays_of(target))
                kind = self._state.subclasses[target].kind
                msg = f"{name!r} is a {kind}, which is saved as its inner tensors: {inner}"
                raise TensorNotFound(msg) from None
            raise TensorNotFound(not_found(name, list(self._specs), self.metadata.step)) from None

    def _arrays_of(self, name: str) -> Iterator[tuple[str, str]]:
        """Yield for each array of a name the suffix behind the name, and the array's own name."""
        saved = self._state.subclasses.get(name)
        if saved is None:
            yield "", name
            return
        for inner, array in saved.arrays():
            yield f"/{'/'.join(inner)}", public_name(array)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __repr__(self) -> str:
        return f"<Checkpoint step={self.metadata.step} tensors={len(self)} at {self.metadata.path!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close it; its tensors can no longer be read."""
        self._stored.close()


class _Extras(Mapping[str, Any]):
    def __init__(self, stored: StoredCheckpoint, state: SavedState) -> None:
        self._stored = stored
        self._state = state

    def __getitem__(self, name: str) -> Any:
        return decode(self._state.extra[name], lambda array: read_whole(self._stored, public_name(array)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._state.extra)

    def __len__(self) -> int:
        return len(self._state.extra)

    def __repr__(self) -> str:
        return f"<extras: {', '.join(self) or 'none'}>"


def open(path: Where, step: int | None = None, *, verify: Literal["blocks", "none"] = "blocks") -> Checkpoint:
    """Open a checkpoint for reading; reads names, shapes and metadata, no tensor.

    Args:
        path: Where checkpoints are saved, or one checkpoint's own directory or archive.
        step: The wanted step; ``None`` for the newest (published last, whatever its step).
        verify: ``"blocks"`` reads whole blocks of 1 MiB around the wanted bytes and compares each with its
            checksum. ``"none"`` reads just the wanted bytes, from disk at most a page more at either end:
            cheaper for small slices, but damage by the disk or the network goes unnoticed.

    Raises:
        CheckpointNotFound: If there is no complete checkpoint, or none of that step.
        NotACheckpoint: If the path is a file or directory that gockpt didn't write.
        ManifestCorrupt: If its manifest or state document is damaged.
        UsageError: If ``verify`` has another value.
    """
    if verify not in ("blocks", "none"):
        msg = f'verify={verify!r}: expected "blocks" or "none"'
        raise UsageError(msg)
    with collection_paused():
        stored = open_checkpoint(path, checked_step(step))
    try:
        return Checkpoint(stored, verify=verify == "blocks")
    except BaseException:
        stored.close()
        raise
