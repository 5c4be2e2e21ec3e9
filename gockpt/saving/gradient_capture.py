"""Capture of the gradients of updates on the host, for replay of pieces that were already copied.

It is called around every update, takes each gradient at the hook that its rule names, and puts it into the
ring, in 16 bits if ``Options.grad_dtype`` is set. A piece whose gradient can't be taken is copied at the
closing tick instead.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from gockpt.core.descriptors import Gradient
from gockpt.replay import rules
from gockpt.replay.gradient_encoding import encode, seal
from gockpt.replay.pending_scalars import LateNumbers
from gockpt.replay.rounding_probes import choose, elements
from gockpt.saving.late_pieces import FULL, NOT_DENSE, OPTIONS, bar, followed, make_late
from gockpt.staging.gradient_ring import block_bytes
from gockpt.tensor_memory import dense_bytes, expect_dense_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from gockpt.saving.write_items import Cut, Piece, Unit
    from gockpt.staging.arena import Arena
    from gockpt.staging.gradient_ring import Ring
    from gockpt.state.live_state import LiveState
    from gockpt.workers.job_client import JobClient

__all__ = ["Gathering"]

RING_PATIENCE = 30.0
"""Seconds a post-hook waits for room in the ring before the piece leaves at the close instead."""


class Gathering:
    """Takes gradients for one attempt, in the training thread.

    Attributes:
        samples_end: Where, in the ring's arena, live values of probes that were copied end.
    """

    def __init__(self, cut: Cut, *, ring: Ring, arena: Arena, job: JobClient, grad_dtype: str | None) -> None:
        """Gather for the pieces of ``cut`` that stand on the host.

        Args:
            cut: What is saved.
            ring: Room for gradients.
            arena: The memory that the ring divides; live values of probes have their place behind it.
            job: Where gradients are replayed.
            grad_dtype: How gradients are encoded, if at all.
        """
        self._units = [unit for unit in cut.units if not unit.aboard]
        self._pieces = cut.pieces
        self._ring = ring
        self._arena = arena
        self._job = job
        self._grad_dtype = grad_dtype
        self._at_pre: dict[int, list[Gradient]] = {}
        self._probes: dict[int, tuple[int, ...]] = {}
        self._posted: Counter[int] = Counter()
        self.samples_end = ring.nbytes

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the gradients that the update is about to overwrite."""
        for unit, pieces in followed(self._units, optimizer):
            if unit.rule.gradient_at == "pre":
                got = self._take(unit, pieces)
                self._at_pre.update({id(unit): got} if got else {})

    def after_update(self, optimizer: torch.optim.Optimizer) -> set[int]:
        """Take the other gradients, and post all of them with the update's numbers.

        Returns:
            The pieces that will be replayed for this update.
        """
        collected: set[int] = set()
        for unit, pieces in followed(self._units, optimizer):
            at_pre = unit.rule.gradient_at == "pre"
            got = self._at_pre.pop(id(unit), []) if at_pre else self._take(unit, pieces)
            gradients = self._with_scalars(unit, got)
            if gradients:
                # Unit by unit, so that replay can free the room that later units wait for.
                self._job.gradients(gradients)
                collected.update(g.piece for g in gradients)
                self._probes.update({g.piece: g.probes for g in gradients if g.probes})
        return collected

    def forget(self) -> None:
        """Give back what was taken before an update that did not happen."""
        for gradients in self._at_pre.values():
            for gradient in gradients:
                self._ring.free(gradient.offset)
        self._at_pre.clear()

    def sample(self, live: LiveState, pieces: Iterable[int]) -> dict[int, tuple[int, int]]:
        """Copy the live values of the probes, of those pieces that an encoded gradient came for.

        Returns:
            Where they stand in the ring's arena, and how many gradients were posted, by piece.
        """
        places = {}
        offset = self._ring.nbytes
        for index in pieces:
            starts = self._probes.get(index)
            if starts is None:
                continue
            stretches = self._pieces[index].stretches
            at = elements(starts, stretches[0].stop - stretches[0].start)
            nbytes = 4 * at.size * len(stretches)
            rows = self._arena.view(offset, nbytes).view(np.float32).reshape(len(stretches), at.size)
            for stretch, row in zip(stretches, rows, strict=True):
                data = expect_dense_bytes(stretch.name, live.entries[stretch.name])
                np.take(data.view(np.float32)[stretch.start : stretch.stop], at, out=row)
            places[index] = (offset, self._posted[index])
            offset += block_bytes(nbytes)
        self.samples_end = offset
        return places

    def drop(self, piece: Piece, why: str) -> None:
        """Let a piece leave at the closing tick, whatever was planned."""
        make_late(piece, why, self._job)

    def _with_scalars(self, unit: Unit, gradients: list[Gradient]) -> list[Gradient]:
        if not gradients:
            return []
        row = rules.scalars(unit.rule, unit.group, unit.optimizer.state.get(unit.param, {}))
        if isinstance(row, LateNumbers):
            row = row.row(tuple(float(tensor) for tensor in row.tensors))
        if row is None:
            bar(unit, OPTIONS, self.drop)
            for gradient in gradients:
                self._ring.free(gradient.offset)
            return []
        return [self._sealed(replace(g, scalars=row)) for g in gradients if self._wanted(g)]

    def _sealed(self, gradient: Gradient) -> Gradient:
        """Number and seal a gradient that is about to be posted, if rounding is to be told from errors."""
        if self._grad_dtype is None:
            return gradient
        self._posted[gradient.piece] += 1
        data = self._arena.view(gradient.offset, gradient.nbytes)
        number = self._posted[gradient.piece]
        found = seal(gradient.piece, gradient.encoding, data, number, gradient.scalars)
        return replace(gradient, seal=found, number=number)

    def _wanted(self, gradient: Gradient) -> bool:
        if self._pieces[gradient.piece].late is None:
            return True
        self._ring.free(gradient.offset)
        return False

    def _take(self, unit: Unit, pieces: list[Piece]) -> list[Gradient]:
        grad = unit.param.grad
        if grad is None:
            return []
        problem = rules.gradient_reason(unit.param)
        source = None if problem else dense_bytes(grad)
        if source is None:
            bar(unit, problem or NOT_DENSE, self.drop)
            return []
        taken = []
        for piece in pieces:
            stretch = piece.stretches[0]
            low = stretch.start * stretch.itemsize
            values = source[low : low + stretch.nbytes].view(np.float32)
            found = encode(self._grad_dtype, values, self._allocate, self._arena.view, self._ring.free)
            if found is None:
                self.drop(piece, FULL)
                continue
            wanted = found.encoding is not None and piece.index not in self._probes and values.any()
            probes = choose(values) if wanted else ()
            taken.append(Gradient(piece.index, found.offset, found.nbytes, (), found.encoding, probes))
        return taken

    def _allocate(self, nbytes: int) -> int | None:
        offset = self._ring.allocate(nbytes)
        if offset is not None:
            return offset
        deadline = perf_counter() + RING_PATIENCE
        self._job.hurry(on=True)
        try:
            while offset is None and self._job.replaying and perf_counter() < deadline:
                self._ring.wait_for_room(0.05)
                offset = self._ring.allocate(nbytes)
        finally:
            self._job.hurry(on=False)
        # The last replay may have ended between the two looks, and freed what it had.
        return self._ring.allocate(nbytes) if offset is None else offset
