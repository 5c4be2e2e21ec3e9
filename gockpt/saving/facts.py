"""Sizes of state, gradients and buffers, computed before a save starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gockpt.core.arena_layout import ArenaLayout, lay_out
from gockpt.core.descriptors import ArenaId, ArrayPlace
from gockpt.kernels.gradient16_launch import form_of
from gockpt.kernels.gradient_encoding import usual_bytes
from gockpt.planning.planner import DEVICE_GRADIENTS, RING_GRADIENTS, Facts
from gockpt.replay.rounding_probes import most_elements
from gockpt.saving.write_items import cut
from gockpt.staging.gradient_ring import block_bytes
from gockpt.state.tensors import spec_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from gockpt.planning.planner import Plan
    from gockpt.saving.write_items import Cut, Piece
    from gockpt.state.live_state import LiveState

__all__ = ["Shape", "facts_of", "ring_bytes_of", "sample_bytes_of", "shape_of"]


@dataclass(frozen=True, slots=True)
class Shape:
    """The geometry of a state: what must not change inside a window.

    Attributes:
        key: Equal for states with the same names, shapes, dtypes, memory orders and parameters.
        layout: Place of every array in the arena.
        nbytes: Payload bytes.
        places: Every array as the writer is told of it where all are row-major.
        row_major: Whether they are.
    """

    key: tuple[object, ...]
    layout: ArenaLayout
    nbytes: int
    places: tuple[ArrayPlace, ...]
    row_major: bool

    def rough(
        self, step_seconds: float | None, copy_rate: float | None, grad_dtype: str | None = None
    ) -> Facts:
        """Return facts that assume all is replayable: a first guess, before looking closer."""
        gradient = self.nbytes // (3 if grad_dtype is None else 6)
        return Facts(self.nbytes, self.nbytes, gradient, step_seconds, copy_rate)


def shape_of(live: LiveState, known: Shape | None = None) -> Shape:
    """Return the geometry of ``live``; ``known`` itself if it is the same."""
    return live.once("shape", lambda: _shape_of(live, known))


def _shape_of(live: LiveState, known: Shape | None) -> Shape:
    specs = [spec_of(name, tensor) for name, tensor in live.entries.items()]
    orders = tuple(None if t.is_contiguous() else t.stride() for t in live.entries.values())
    owners = tuple((p.fqn, id(p.param), p.optimizer_index, p.group_index) for p in live.params)
    key = (tuple(specs), orders, owners, tuple(sorted(live.aliases.items())), frozenset(live.buffers))
    if known is not None and known.key == key:
        return known
    layout = lay_out(specs)
    places = tuple(ArrayPlace(array, ArenaId.STATE) for array in layout.arrays)
    return Shape(key, layout, sum(s.nbytes for s in specs), places, all(order is None for order in orders))


def facts_of(
    live: LiveState,
    shape: Shape,
    excluded: frozenset[str],
    step_seconds: float | None,
    copy_rate: float | None,
    grad_dtype: str | None = None,
    *,
    on_device: Callable[[torch.Tensor], bool] | None = None,
    stay: str | None = None,
    obstacle: str | None = None,
) -> Facts:
    """Return the facts for a plan; checks every parameter's optimizer.

    Args:
        live: The state.
        shape: Its geometry.
        excluded: Parameters whose replay is not trusted.
        step_seconds: As measured.
        copy_rate: As measured.
        grad_dtype: How gradients are encoded, if at all.
        on_device: Whether a tensor is on the device that has a stager; ``None`` if there is none.
        stay: Why nothing leaves that device early; ``None`` if it may.
        obstacle: What keeps state on a device from leaving behind training, or early; ``None`` for nothing.
    """
    pieces = cut(live, shape.layout, window=2, excluded=excluded, on_device=on_device, stay=stay)
    there = [t.nbytes for t in live.entries.values() if on_device is not None and on_device(t)]
    return Facts(
        shape.nbytes,
        pieces.replay_bytes,
        sum(_gradient_bytes(p, grad_dtype) for p in pieces.pieces),
        step_seconds,
        copy_rate,
        device_bytes=sum(there),
        device_replay_bytes=sum(piece.nbytes for piece in pieces.pieces if piece.stager),
        obstacle=obstacle,
    )


def ring_bytes_of(
    pieces: Cut, plan: Plan, grad_dtype: str | None = None, *, of_device: int = DEVICE_GRADIENTS
) -> int:
    """Return the room that gradients need: an update never waits for room that it holds itself.

    Encoded gradients with an Inf or NaN are larger and may have to wait, or make their piece late.
    Gradients that leave a device are never waited for, so there is room for more of them, as far as they
    are that many.

    Args:
        pieces: The state.
        plan: The plan.
        grad_dtype: How gradients are encoded, if at all.
        of_device: How many full gradients there is room for at the most if some leave a device.
    """
    early = pieces.parts(plan)
    sizes = [[block_bytes(_gradient_bytes(p, grad_dtype)) for p in part] for part in early]
    one_update = sum(sum(part) for part in sizes)
    units = {id(p.unit) for part in early for p in part if p.stager}
    if not units:
        return min(RING_GRADIENTS, plan.window - 1) * one_update
    all_of_them = sum((plan.window - 1 - number) * sum(part) for number, part in enumerate(sizes))
    # Numbers that stand on the device follow as well: a few for each parameter, in a block per update.
    numbers = (plan.window - 1) * block_bytes(32 * (len(units) + 1))
    return max(one_update, min(all_of_them, of_device * one_update)) + numbers


def sample_bytes_of(pieces: Cut, plan: Plan, grad_dtype: str | None) -> int:
    """Return the room for live values of probes, of all that encoded gradients may come for."""
    if grad_dtype is None:
        return 0
    return sum(
        block_bytes(4 * most_elements(_count(p)) * len(p.stretches))
        for part in pieces.parts(plan)
        for p in part
        if _gradient_bytes(p, grad_dtype) < p.stretches[0].nbytes
    )


def _gradient_bytes(piece: Piece, grad_dtype: str | None) -> int:
    """Return what one gradient of a piece takes, if there is not an unusual lot of Inf and NaN in it."""
    count = _count(piece)
    return form_of(grad_dtype, count).nbytes if piece.stager else usual_bytes(grad_dtype, count)


def _count(piece: Piece) -> int:
    return piece.stretches[0].stop - piece.stretches[0].start
