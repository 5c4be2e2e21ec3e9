"""Fingerprints of the whole state at one tick: 64 bits for each stretch of each piece.

They decide everything at a boundary: whether pieces copied earlier are unchanged, whether a copy behind the
step and a replay are right, and whether the state is still that of the boundary when a window is closed
without a tick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gockpt.kernels.fingerprint_numba import fingerprint
from gockpt.tensor_memory import expect_dense_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy as np

    from gockpt.core.array_spec import Name
    from gockpt.options import Options
    from gockpt.saving.write_items import Cut, Piece
    from gockpt.staging.host_stager import Transfer
    from gockpt.state.live_state import LiveState

__all__ = ["Evidence", "looks_at_updates", "of_piece", "of_pieces", "take"]

Evidence = dict[tuple["Name", int], int]
"""Fingerprints by array name and first element of the stretch."""


def looks_at_updates(options: Options) -> bool:
    """Whether what left is fingerprinted before and after each update, not at ticks alone."""
    # What changes behind the optimizer's back must be seen by its bits: rounding might explain it later.
    return options.verify == "full" or options.grad_dtype is not None


def take(live: LiveState, cut: Cut, transfer: Transfer) -> Evidence:
    """Fingerprint every piece of ``live`` on the host now, on the background thread and this one together."""
    evidence: Evidence = {}
    views: dict[Name, np.ndarray] = {}
    ashore = [piece for piece in (*cut.pieces, *cut.loose) if not piece.aboard]
    tasks = [_piece_task(piece, live, views, evidence) for piece in ashore]
    transfer.run(tasks)
    return evidence


def of_piece(evidence: Evidence, piece: Piece) -> tuple[int, ...]:
    """Return one piece's fingerprints, stretch by stretch."""
    return tuple(evidence[s.name, s.start] for s in piece.stretches)


def of_pieces(
    pieces: Iterable[Piece], live_bytes: Callable[[Piece], list[np.ndarray | None]], transfer: Transfer
) -> list[tuple[Piece, tuple[int, ...] | None]]:
    """Fingerprint some pieces' live bytes; ``None`` where one is gone or has another form."""
    chosen = list(pieces)
    results: list[list[int | None]] = [[None] * len(piece.stretches) for piece in chosen]
    transfer.run(
        [
            _stretch_task(piece, live_bytes(piece), result)
            for piece, result in zip(chosen, results, strict=True)
        ]
    )
    return [
        (piece, None if None in result else tuple(v for v in result if v is not None))
        for piece, result in zip(chosen, results, strict=True)
    ]


def _piece_task(
    piece: Piece, live: LiveState, views: dict[Name, np.ndarray], evidence: Evidence
) -> Callable[[], None]:
    for stretch in piece.stretches:
        if stretch.name not in views:
            views[stretch.name] = expect_dense_bytes(stretch.name, live.entries[stretch.name])

    def task() -> None:
        for stretch in piece.stretches:
            low, high = stretch.start * stretch.itemsize, stretch.stop * stretch.itemsize
            part = views[stretch.name][low:high]
            evidence[stretch.name, stretch.start] = fingerprint(part, stretch.position)

    return task


def _stretch_task(
    piece: Piece, views: list[np.ndarray | None], result: list[int | None]
) -> Callable[[], None]:
    def task() -> None:
        for position, (stretch, view) in enumerate(zip(piece.stretches, views, strict=True)):
            high = stretch.stop * stretch.itemsize
            if view is not None and view.nbytes >= high:
                part = view[stretch.start * stretch.itemsize : high]
                result[position] = fingerprint(part, stretch.position)

    return task
