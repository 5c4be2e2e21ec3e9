"""Pieces that leave at the closing tick although they left, or could have left, before it: why, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch

    from gockpt.saving.write_items import Piece, Unit
    from gockpt.workers.job_client import JobClient

__all__ = [
    "BROKEN",
    "CHANGED",
    "CLOSURE",
    "ELSEWHERE",
    "FULL",
    "GRAPHED",
    "INSIDE",
    "NOT_ARRIVED",
    "NOT_DENSE",
    "OPTIONS",
    "OVERTAKEN",
    "REFUSED",
    "REPLACED",
    "SCALAR_ELSEWHERE",
    "UNSEEN",
    "exclude",
    "exclude_for_closure",
    "followed",
    "make_late",
]

BROKEN = "too many of its gradient's blocks of 1024 have an Inf or NaN"
CHANGED = "changed outside optimizer.step()"
CLOSURE = "its gradient comes from a closure, and the step overwrites it"
ELSEWHERE = "what its gradient scaler found stands on another device"
FULL = "the gradient ring is full"
GRAPHED = "an update was captured into a graph, which runs unseen"
INSIDE = "a closure or hook runs inside the step; what it changes can't be told from rounding"
NOT_ARRIVED = "its gradient did not arrive as it was"
NOT_DENSE = "its gradient is on another device, or not contiguous in memory"
OPTIONS = "its parameter group's options changed"
OVERTAKEN = "overtaken by a change while it was copied"
REFUSED = "the device refused"
REPLACED = "its tensors were replaced"
SCALAR_ELSEWHERE = "a number that its replay needs stands on another device"
UNSEEN = "updated without a gradient that was seen"


def make_late(piece: Piece, why: str, job: JobClient) -> None:
    """Let a piece leave at the closing tick, whatever was planned; what was sent of it is forgotten."""
    if piece.late is None:
        piece.late = why
        job.discard([piece.index])


def exclude(unit: Unit, why: str, drop: Callable[[Piece, str], None]) -> None:
    """Let all of a unit leave at the closing tick, from now on; ``drop`` makes a piece late."""
    unit.excluded = why
    for piece in unit.pieces:
        drop(piece, why)


def exclude_for_closure(
    units: Iterable[Unit],
    optimizer: torch.optim.Optimizer,
    drop: Callable[[Piece, str], None],
    *,
    encodes: bool,
) -> None:
    """Exclude an optimizer's units that a closure inside the step makes impossible to replay.

    The closure is yet to compute the gradient that will be consumed.

    Args:
        units: The units to choose from.
        optimizer: The optimizer that is about to step.
        drop: Makes a piece late.
        encodes: Whether gradients are encoded, so that a change inside the step could pass for rounding.
    """
    for unit in units:
        if unit.optimizer is not optimizer or unit.excluded is not None:
            continue
        if unit.rule.gradient_at == "pre":
            exclude(unit, CLOSURE, drop)
        elif encodes:
            exclude(unit, INSIDE, drop)


def followed(units: Iterable[Unit], optimizer: torch.optim.Optimizer) -> Iterator[tuple[Unit, list[Piece]]]:
    """Yield an optimizer's units of which something left and is not late, with those pieces."""
    for unit in units:
        if unit.optimizer is optimizer:
            pieces = [piece for piece in unit.pieces if piece.sent and piece.late is None]
            if pieces:
                yield unit, pieces
