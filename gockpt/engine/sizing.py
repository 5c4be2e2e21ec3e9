"""What the state weighs, and what follows from that: known before the first byte moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gockpt.engine.cut import cut
from gockpt.engine.encodings import usual_bytes
from gockpt.engine.probes import most_elements
from gockpt.engine.ring import block_bytes
from gockpt.layout import ArenaLayout, lay_out
from gockpt.schedule import RING_GRADIENTS, Facts, part_ranges
from gockpt.schema import ArraySpec

if TYPE_CHECKING:
    from gockpt.engine.cut import Cut, Piece
    from gockpt.schedule import Plan
    from gockpt.state import LiveState

__all__ = ["Shape", "facts_of", "ring_bytes_of", "sample_bytes_of", "shape_of"]


@dataclass(frozen=True, slots=True)
class Shape:
    """The geometry of a state: what must not change inside a window.

    Attributes:
        key: Equal for states with the same names, shapes, dtypes, memory orders and parameters.
        layout: Where every array lies in the arena.
        nbytes: Payload bytes.
    """

    key: tuple[object, ...]
    layout: ArenaLayout
    nbytes: int

    def rough(
        self, step_seconds: float | None, copy_rate: float | None, grad_dtype: str | None = None
    ) -> Facts:
        """Return facts that assume all is replayable: a first guess, before looking closer."""
        gradient = self.nbytes // (3 if grad_dtype is None else 6)
        return Facts(self.nbytes, self.nbytes, gradient, step_seconds, copy_rate)


def shape_of(live: LiveState, known: Shape | None = None) -> Shape:
    """Return the geometry of ``live``; ``known`` itself if it is the same."""
    specs = [
        ArraySpec(name, tuple(t.shape), str(t.dtype).removeprefix("torch."))
        for name, t in live.entries.items()
    ]
    orders = tuple(None if t.is_contiguous() else t.stride() for t in live.entries.values())
    owners = tuple((p.fqn, id(p.param), p.optimizer_index, p.group_index) for p in live.params)
    key = (tuple(specs), orders, owners, tuple(sorted(live.aliases.items())), frozenset(live.buffers))
    if known is not None and known.key == key:
        return known
    return Shape(key, lay_out(specs), sum(s.nbytes for s in specs))


def facts_of(
    live: LiveState,
    shape: Shape,
    barred: frozenset[str],
    step_seconds: float | None,
    copy_rate: float | None,
    grad_dtype: str | None = None,
) -> Facts:
    """Return what a plan is made from: looks at every parameter's optimizer."""
    pieces = cut(live, shape.layout, window=2, barred=barred)
    gradient = sum(usual_bytes(grad_dtype, _count(p)) for p in pieces.pieces)
    return Facts(shape.nbytes, pieces.replay_bytes, gradient, step_seconds, copy_rate)


def ring_bytes_of(pieces: Cut, plan: Plan, grad_dtype: str | None = None) -> int:
    """Return the room that gradients need: an update never waits for room that it holds itself.

    Encoded gradients with an Inf or NaN are larger and may have to wait, or make their piece late.
    """
    one_update = sum(block_bytes(usual_bytes(grad_dtype, _count(p))) for p in _early(pieces, plan))
    return min(RING_GRADIENTS, plan.window - 1) * one_update


def sample_bytes_of(pieces: Cut, plan: Plan, grad_dtype: str | None) -> int:
    """Return the room for live values of probes, of all that encoded gradients may come for."""
    if grad_dtype is None:
        return 0
    return sum(
        block_bytes(4 * most_elements(_count(p)) * len(p.stretches))
        for p in _early(pieces, plan)
        if usual_bytes(grad_dtype, _count(p)) < p.stretches[0].nbytes
    )


def _early(pieces: Cut, plan: Plan) -> list[Piece]:
    parts = part_ranges([p.nbytes for p in pieces.pieces], plan.shares)
    return [pieces.pieces[i] for part in parts[:-1] for i in part]


def _count(piece: Piece) -> int:
    return piece.stretches[0].stop - piece.stretches[0].start
