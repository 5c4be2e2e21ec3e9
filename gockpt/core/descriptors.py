"""Descriptors of a worker's tasks: arrays and gradients to replay, verify and write, by arena offset.

Messages hold offsets into the arenas, never the bytes themselves. So the same worker can run as threads of
the training process or in a process that maps the same arenas. :mod:`gockpt.workers.messages` serialises
these values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from gockpt.core.arena_layout import ArrayLayout  # noqa: TC001 - read with messages, whose types are checked

__all__ = ["ArenaId", "ArrayPlace", "Capture", "Gradient", "ReplayPiece", "Stretch"]


class ArenaId(IntEnum):
    """The arenas of a save, and the index of each wherever they are listed."""

    STATE = 0
    """Parameters, buffers and optimizer state."""
    RING = 1
    """Gradients on their way to replay, and behind them live values of probes."""
    EXTRA = 2
    """Extras and random states, which the closing tick adds."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A run of consecutive elements of one array, in storage order.

    Attributes:
        name: The array's name.
        offset: Arena offset of the first element.
        start: Index of the first element within the array.
        stop: Index after the last.
        itemsize: Bytes per element.
    """

    name: tuple[str, ...]
    offset: int
    start: int
    stop: int
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes of the stretch."""
        return (self.stop - self.start) * self.itemsize

    @property
    def position(self) -> int:
        """Position at which it is fingerprinted: of its first byte in the array, rounded up to a word of 8.

        Stretches are cut at whole words from the start of their chunk, but a chunk of an array beyond 96 MB
        whose rows are not whole words may begin inside a word. Its words are then counted from the next one.
        No fingerprints of several chunks are summed.
        """
        return -(-self.start * self.itemsize // 8) * 8


@dataclass(frozen=True, slots=True)
class ReplayPiece:
    """A stretch of one parameter and of its states, and the kernel that replays it.

    Attributes:
        index: Identifies the piece in later messages.
        kernel: Name of the replay kernel.
        flags: The kernel's flags.
        stretches: The parameter's stretch, then its states' in kernel order.
        tail: Whether its end is the tensor's end, where fused updates round differently.
    """

    index: int
    kernel: str
    flags: tuple[int, ...]
    stretches: tuple[Stretch, ...]
    tail: bool


@dataclass(frozen=True, slots=True)
class Gradient:
    """One update's gradient for one piece, in the ring.

    Attributes:
        piece: Index of the piece.
        offset: Arena offset of the gradient's bytes.
        nbytes: Their number.
        scalars: The update's scalars for the kernel: learning rate, step, …
        encoding: ``None`` for float32; else an encoding of :mod:`gockpt.kernels.gradient_encoding`.
        probes: Starts of the runs of probes; given with the first encoded gradient of its piece that isn't 0.
        seal: The result of :func:`gockpt.kernels.gradient_encoding.seal`; ``None`` if gradients are not
            encoded: replay is then verified by its bits.
        number: Its number among its piece's gradients, sealed with it. Numbers increase, with gaps for
            updates that turned out later to have been skipped.
    """

    piece: int
    offset: int
    nbytes: int
    scalars: tuple[float, ...]
    encoding: str | None = None
    probes: tuple[int, ...] = ()
    seal: int | None = None
    number: int = 0


@dataclass(frozen=True, slots=True)
class ArrayPlace:
    """An array to be written.

    Attributes:
        layout: Its chunks and slots.
        arena: The arena of its slots.
        strides: Its element strides, if its memory order isn't row-major.
    """

    layout: ArrayLayout
    arena: ArenaId
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Capture:
    """Contents of one checkpoint: sent when every byte that is not replayed has arrived.

    Attributes:
        step: The published step.
        arrays: Every array.
        proofs: For each replayed piece, the live fingerprints at the boundary, one per stretch.
        state: The state document.
        attributes: Small attributes of the root group.
        exact: Whether the checkpoint is bit-exact, as far as known before replay has ended.
        grad_dtype: The encoding of gradients, if any was encoded.
        samples: For each piece with encoded gradients: the offset in the ring's arena of its probes' live
            values at the boundary, stretch after stretch; and the number of its gradients.
    """

    step: int
    arrays: tuple[ArrayPlace, ...]
    proofs: dict[int, tuple[int, ...]]
    state: dict[str, Any]
    attributes: dict[str, Any]
    exact: bool
    grad_dtype: str | None = None
    samples: dict[int, tuple[int, int]] = field(default_factory=dict)
