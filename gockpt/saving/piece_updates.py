"""Updates of pieces that were copied: gradients and scalars in flight, and what is known of each piece."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import torch

from gockpt.core.descriptors import Gradient
from gockpt.kernels.gradient_encoding import sealed
from gockpt.saving.late_pieces import CHANGED, OPTIONS, UNSEEN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gockpt.core.array_spec import Name
    from gockpt.replay.pending_scalars import PendingScalars
    from gockpt.saving.write_items import Piece
    from gockpt.staging.arena import Arena

    Row = tuple[float, ...]

__all__ = [
    "STILL",
    "CopiedPiece",
    "GradientCopies",
    "GradientCopy",
    "Look",
    "RestCopies",
    "Role",
    "SampleCopies",
    "ScalarCopies",
    "StateCopies",
    "Update",
    "Work",
    "blame",
    "described",
    "read_number",
    "row_of",
]


class Role(Enum):
    """Meaning of a fingerprint of a piece that was copied."""

    FIRST = "what it is as it leaves"
    SAME = "what it must still be"
    MOVED = "what its update has made of it"
    TOUCHED = "what it must still be, although its optimizer has stepped"
    PROOF = "what replay must arrive at"


STILL = {Role.SAME: CHANGED, Role.TOUCHED: UNSEEN, Role.PROOF: CHANGED}
"""Roles in which a piece must be what it was before, and what is wrong if it is not."""


@dataclass(slots=True, eq=False)
class Update:
    """One update by one optimizer.

    Attributes:
        known: Whether it is known what became of it.
        skipped: Whether it changed nothing, as a gradient scaler's that found an infinity.
    """

    known: bool = False
    skipped: bool = False


@dataclass(slots=True, eq=False)
class GradientCopy:
    """One update's gradient of one piece, copied into the ring.

    Attributes:
        piece: The piece.
        update: The update.
        offset: Where the gradient goes.
        nbytes: How many bytes it has.
        encoding: How it is encoded; ``None`` for as it is.
        number: Which of its piece it is, counted from 1; 0 where gradients are not sealed.
        row: The kernel's numbers; ``None`` while they are on their way.
        landed: Whether nothing is written to its place any longer.
        dropped: Whether it is no longer needed.
        incomplete: Whether its blocks with an Inf or NaN are missing, so that it is no gradient.
        made: The fingerprint of its bytes, as the device took it, once it has landed.
    """

    piece: Piece
    update: Update
    offset: int
    nbytes: int
    encoding: str | None = None
    number: int = 0
    row: Row | None = None
    landed: bool = False
    dropped: bool = False
    incomplete: bool = False
    made: int | None = None


@dataclass(slots=True, eq=False)
class ScalarCopies:
    """Scalars of one update in flight, in one block of the ring.

    Attributes:
        offset: Where the block is.
        places: Offset and dtype of each number.
        found_inf: Which of them says that the update was skipped; ``None`` for none of them.
        rows: Who needs which of them.
    """

    offset: int
    places: list[tuple[int, torch.dtype]]
    found_inf: int | None
    rows: list[tuple[PendingScalars, tuple[int, ...], list[GradientCopy]]]


@dataclass(slots=True, eq=False)
class CopiedPiece:
    """A piece that was copied, and what is known of its updates.

    Attributes:
        piece: The piece.
        here: Whether its state has arrived.
        problem: Why it can't be replayed; ``None`` if it can.
        torn: Whether it did not arrive as it was.
        watched: Whether its first fingerprints have been seen.
        known: Fingerprints that it must have now; ``None`` while they are unknown.
        proof: Fingerprints that replay must arrive at.
        gradients: Gradients that were not handed to replay yet.
        encoded: Whether encoded gradients were sent, so that its replay can't be proven by its bits.
        sent: Number of gradients.
        skipped: Number of those whose update was skipped.
        probes: Starts of the runs of its probes; ``()`` while they are not chosen.
        told: Whether replay was told of its probes.
    """

    piece: Piece
    here: bool = False
    problem: str | None = None
    torn: bool = False
    watched: bool = False
    known: tuple[int, ...] | None = None
    proof: tuple[int, ...] | None = None
    gradients: deque[GradientCopy] = field(default_factory=deque)
    encoded: bool = False
    sent: int = 0
    skipped: int = 0
    probes: tuple[int, ...] = ()
    told: bool = False

    @property
    def count(self) -> int:
        """Elements of the piece."""
        stretch = self.piece.stretches[0]
        return stretch.stop - stretch.start


@dataclass(slots=True, eq=False)
class StateCopies:
    """Pieces that were sent; ``places`` finds them by where they go."""

    places: dict[int, Piece]
    pieces: Sequence[Piece]


@dataclass(slots=True, eq=False)
class GradientCopies:
    """Gradients that were sent, by where they go, and perhaps scalars of their update."""

    gradients: dict[int, GradientCopy]
    update: Update
    numbers: ScalarCopies | None


@dataclass(slots=True, eq=False)
class Look:
    """Fingerprints that were asked for, piece by piece, and their values once they are there."""

    rows: Sequence[tuple[Piece, Role]]
    values: Sequence[int] | None = None


@dataclass(slots=True, eq=False)
class RestCopies:
    """Pieces that were sent at the closing tick: the names of their arrays, by where they go."""

    names: dict[int, Name]


@dataclass(slots=True, eq=False)
class SampleCopies:
    """Live values of probes that were sent: their pieces, by where they go."""

    places: dict[int, Piece]


Work = StateCopies | GradientCopies | Look | RestCopies | SampleCopies


def described(copied: CopiedPiece, gradient: GradientCopy, row: Row) -> Gradient:
    """Describe a gradient to replay, sealed if its piece may be replayed from encoded ones."""
    # Not by its bytes: by what the device said of them.
    seal = None
    if gradient.number:
        index = gradient.piece.index
        made = gradient.made
        seal = -1 if made is None else sealed(made, index, gradient.encoding, gradient.number, row)
    probes: tuple[int, ...] = ()
    if gradient.encoding is not None and not copied.told and copied.probes:
        copied.told, probes = True, copied.probes
    return Gradient(
        gradient.piece.index,
        gradient.offset,
        gradient.nbytes,
        row,
        gradient.encoding,
        probes,
        seal,
        gradient.number,
    )


def blame(copied: CopiedPiece, why: str, *, torn: bool = False) -> None:
    """Note why a piece can't be replayed; the first reason stays."""
    copied.torn |= torn
    if copied.problem is None:
        copied.problem = why


def row_of(pending: PendingScalars, values: Row) -> tuple[Row | None, str]:
    """Return the kernel's numbers, or the reason for their absence."""
    try:
        return pending.row(values), OPTIONS
    except Exception as error:  # noqa: BLE001 - whatever a rule raises: the piece leaves at the close
        return None, f"its numbers can't be used: {type(error).__name__}: {error}"


def read_number(arena: Arena, offset: int, dtype: torch.dtype) -> float:
    """Return a number that has arrived in an arena."""
    content = bytearray(arena.view(offset, dtype.itemsize).tobytes())
    return float(torch.frombuffer(content, dtype=dtype).item())
