"""Protocol of a device: only the needed operations, so that tests run the logic on a fake one.

All launches are asynchronous: they queue work on a stream and return. Nothing here waits for the device but
:meth:`Event.synchronize` and :meth:`Prints.values`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    import numpy as np
    import numpy.typing as npt

    from gockpt.staging.stager import Source

    Bytes = npt.NDArray[np.uint8]

__all__ = ["Device", "Event", "Prints", "Stream"]


class Event(Protocol):
    """A mark in a stream: complete once all that was queued before it has run."""

    def query(self) -> bool:
        """Whether it is complete."""

    def synchronize(self) -> None:
        """Wait on the host until it is complete; other threads go on."""


class Stream(Protocol):
    """A queue of work on the device."""

    def record(self) -> Event:
        """Mark the end of what is queued."""

    def wait(self, event: Event) -> None:
        """Let what is queued from now on wait for the event, on the device."""


class Prints(Protocol):
    """Fingerprints that the device works out."""

    def values(self) -> list[int]:
        """Return one for each source; ready once an event recorded after the launch is complete."""


class Device(Protocol):
    """One device. Every method may be called from any thread, and may raise what its driver raises."""

    @property
    def name(self) -> str:
        """Name of the device in messages."""

    def holds(self, tensor: Any) -> bool:
        """Whether a tensor is in its memory."""

    def main(self) -> Stream:
        """Return the stream that the calling thread trains on now."""

    def side(self) -> Stream:
        """Return a new stream for work beside training."""

    def capturing(self) -> bool:
        """Whether work queued now would go into a graph instead of running."""

    def free_bytes(self) -> int:
        """Return how much of its memory nobody uses."""

    def allocate(self, nbytes: int) -> Any:
        """Return that much of its memory, at a multiple of 16 bytes."""

    def release(self, memory: Any) -> None:
        """Give :meth:`allocate`'s back; nothing that is queued may need it any more."""

    def pack(self, stream: Stream, sources: Sequence[Source], places: Sequence[int], target: Any) -> object:
        """Copy each source to its place, a byte offset, in the target.

        Args:
            stream: Where it is queued.
            sources: What is copied.
            places: Where each of them goes.
            target: What :meth:`allocate` gave, or registered host memory, which is then stored to directly.

        Returns:
            What must be kept alive until it has run.
        """

    def encode(
        self,
        stream: Stream,
        sources: Sequence[Source],
        encoding: str,
        places: Sequence[tuple[int, int]],
        target: Any,
    ) -> object:
        """Write each source, float32, to its place in the target in 16 bits, see ``gradient16_launch``.

        Args:
            stream: Where it is queued.
            sources: What is encoded.
            encoding: ``"fp16"`` or ``"bf16"``.
            places: Where each of them goes, a byte offset that is a multiple of 16, and the bytes it takes.
            target: What :meth:`allocate` gave.

        Returns:
            What must be kept alive until it has run.
        """

    def copy(self, stream: Stream, memory: Any, place: int, target: Bytes) -> None:
        """Copy from ``place`` in :meth:`allocate`'s memory to registered or pinned host memory."""

    def prints(self, stream: Stream, sources: Sequence[Source]) -> Prints:
        """Fingerprint each source."""

    def register(self, memory: Bytes) -> None:
        """Make host memory reachable for copies that don't wait. Slow: not on the training thread."""

    def unregister(self, memory: Bytes) -> None:
        """Undo :meth:`register`, of exactly the same bytes; before they are unmapped."""

    def pinned(self, nbytes: int) -> Bytes:
        """Return a little host memory of the device's own that copies don't wait for."""

    def range(self, name: str) -> AbstractContextManager[Any]:
        """Return a range that profilers show around what the calling thread does."""
