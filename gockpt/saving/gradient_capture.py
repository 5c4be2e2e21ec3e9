"""Capture of the gradients and scalars of updates, for replay of pieces that were already copied.

Called around every update, in the training thread. Each gradient is taken at the hook that its rule names,
and placed in the ring by the stager, in 16 bits if ``Options.grad_dtype`` is set. A piece whose gradient
can't be taken is copied at the closing tick instead.
"""

from __future__ import annotations

from collections import Counter
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from gockpt.errors import SaveError
from gockpt.kernels.gradient_encoding import seal_position
from gockpt.replay import rules
from gockpt.replay.pending_scalars import PendingScalars
from gockpt.saving.late_pieces import (
    ELSEWHERE,
    FULL,
    NOT_DENSE,
    OPTIONS,
    REFUSED,
    REPLACED,
    SCALAR_ELSEWHERE,
    exclude,
    exclude_for_closure,
    followed,
    make_late,
)
from gockpt.saving.piece_updates import GradientCopy, Role, Update, row_of
from gockpt.saving.scalar_capture import ScalarCapture
from gockpt.staging.stager import Source, Urgency
from gockpt.tensor_memory import is_dense

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gockpt.replay.rules import Rule
    from gockpt.saving.piece_updates import ScalarCopies
    from gockpt.saving.update_order import UpdateOrder
    from gockpt.saving.write_items import Piece, Unit
    from gockpt.staging.gradient_ring import Ring
    from gockpt.staging.stager import CopyRequest, Stager
    from gockpt.workers.job_client import JobClient

    Row = tuple[float, ...]

__all__ = ["GradientCapture"]

RING_PATIENCE = 30.0
"""Seconds a hook waits for room in the ring, if it may, before the piece leaves at the close instead."""


class GradientCapture:
    """Takes gradients from one stager's memory, for one attempt."""

    def __init__(
        self,
        stager: Stager,
        units: Sequence[Unit],
        order: UpdateOrder,
        *,
        ring: Ring,
        job: JobClient,
        full: bool,
        grad_dtype: str | None,
    ) -> None:
        """Take gradients of ``units``.

        Args:
            stager: The stager that holds all of them.
            units: What can be replayed.
            order: Receives what was sent.
            ring: Room for gradients.
            job: Where they are replayed.
            full: Whether what left is looked at around each update.
            grad_dtype: How gradients are encoded, if at all.
        """
        self._stager = stager
        self._units = units
        self._order = order
        self._ring = ring
        self._job = job
        self._full = full
        self._grad_dtype = grad_dtype
        self._numbers: Counter[int] = Counter()
        self._pre: dict[int, tuple[Update, dict[int, list[GradientCopy]]]] = {}
        self._hurrying = False

    def before_update(self, optimizer: torch.optim.Optimizer, *, closure: bool) -> None:
        """Take the gradients that the update is about to overwrite."""
        self.make_late()
        if closure:
            exclude_for_closure(self._units, optimizer, self.drop, encodes=self._grad_dtype is not None)
        if self._full:
            self._look([(piece, Role.SAME) for piece in self._order.pieces])
        update = Update()
        taken: dict[int, list[GradientCopy]] = {}
        self._pre[id(optimizer)] = update, taken
        sending = _Sending(update)
        for unit, pieces in followed(self._units, optimizer):
            if unit.rule.gradient_at == "pre":
                taken[id(unit)] = self._take(unit, pieces, sending)
        self._send(sending)

    def after_update(self, optimizer: torch.optim.Optimizer, found_inf: torch.Tensor | None) -> None:
        """Take what the update consumed.

        Args:
            optimizer: The optimizer that has stepped.
            found_inf: Pending number that says whether the update was skipped; ``None`` if it was not.
        """
        self.make_late()
        update, taken = self._pre.pop(id(optimizer), (Update(), {}))
        scalars = ScalarCapture(self._stager)
        if found_inf is not None and not scalars.found(found_inf):
            self.all_late(ELSEWHERE, optimizer)
        concerned = [
            (unit, pieces)
            for unit, pieces in followed(self._units, optimizer)
            if (taken.get(id(unit)) if unit.rule.gradient_at == "pre" else unit.param.grad is not None)
        ]
        rows = self._rows([unit for unit, _ in concerned], scalars)
        if not scalars.nbytes:
            self._order.settle(update)
        sending = _Sending(update)
        collected: set[int] = set()
        for unit, pieces in concerned:
            row = rows[id(unit)]
            if isinstance(row, str):
                exclude(unit, row, self.drop)
                continue
            pre = unit.rule.gradient_at == "pre"
            got = taken[id(unit)] if pre else self._take(unit, pieces, sending)
            if isinstance(row, PendingScalars):
                scalars.wanted(row, got)
            else:
                for gradient in got:
                    gradient.row = row
            collected |= {gradient.piece.index for gradient in got}
        if scalars.nbytes and not self._send_scalars(scalars, sending, optimizer, wanted=bool(collected)):
            self._order.settle(update)
        self._send(sending)
        self._order.advance()
        moved = [p for p in self._order.pieces if p.unit is not None and p.unit.optimizer is optimizer]
        if self._full:
            roles = (Role.MOVED, Role.TOUCHED)
            self._look([(piece, roles[piece.index not in collected]) for piece in moved])
        else:
            self._order.forget(moved)

    def skipped(self, optimizer: torch.optim.Optimizer) -> None:
        """The update changed nothing: forget what was taken before it."""
        pre = self._pre.pop(id(optimizer), None)
        if pre is not None:
            self._order.settle(pre[0], skipped=True)

    def all_late(self, why: str, optimizer: object | None = None) -> None:
        """Let all of an optimizer's pieces that left, or all there are, leave again at the closing tick."""
        for piece in self._order.pieces:
            if optimizer is None or (piece.unit is not None and piece.unit.optimizer is optimizer):
                self.drop(piece, why)

    # -- gradients and scalars ---------------------------------------------------------------

    def _rows(self, units: Sequence[Unit], scalars: ScalarCapture) -> dict[int, Row | PendingScalars | str]:
        """Return each unit's scalars of the update that has just run, or the reason for their absence."""
        groups: dict[tuple[int, Rule], list[Unit]] = {}
        for unit in units:
            groups.setdefault((unit.group_index, unit.rule), []).append(unit)
        found: dict[int, Row | PendingScalars | str] = {}
        for (_, rule), members in groups.items():
            states = [unit.optimizer.state.get(unit.param, {}) for unit in members]
            # Few launches for a whole group.
            rows = rules.scalars_of(rule, members[0].group, states)
            for unit, row in zip(members, rows, strict=True):
                found[id(unit)] = self._row(row, scalars)
        return found

    def _row(self, row: Row | PendingScalars | None, scalars: ScalarCapture) -> Row | PendingScalars | str:
        """Read what can be read now of an update's scalars; take note of what has to be copied."""
        if isinstance(row, PendingScalars):
            values = [self._stager.value(tensor) for tensor in row.tensors]
            known = [value for value in values if value is not None]
            if len(known) < len(values):
                return row if scalars.take(row) else SCALAR_ELSEWHERE
            row, why = row_of(row, tuple(known))
            return why if row is None else row
        return OPTIONS if row is None else row

    def _take(self, unit: Unit, pieces: Sequence[Piece], sending: _Sending) -> list[GradientCopy]:
        """Find room for a unit's gradient, and note what is to be sent."""
        grad = unit.param.grad
        if grad is None:
            return []
        problem = rules.gradient_reason(unit.param)
        if problem is None and not (self._stager.holds(grad) and is_dense(grad)):
            problem = NOT_DENSE
        if problem is not None:
            exclude(unit, problem, self.drop)
            return []
        taken = []
        for piece in pieces:
            stretch = piece.stretches[0]
            number, position = 0, stretch.position
            if self._grad_dtype is not None:
                self._numbers[piece.index] += 1
                number = self._numbers[piece.index]
                position = seal_position(number)
            source = Source(grad, stretch.start * stretch.itemsize, stretch.nbytes, position)
            request = self._place(source, sending)
            if request is None:
                self.drop(piece, FULL)
                continue
            encoding = None if request.form is None else request.form.encoding
            gradient = GradientCopy(piece, sending.update, request.offset, request.nbytes, encoding, number)
            sending.requests.append(request)
            sending.gradients.append(gradient)
            taken.append(gradient)
        return taken

    def _place(self, source: Source, sending: _Sending) -> CopyRequest | None:
        """Find room for a gradient, waiting for it if the stager allows that."""
        request = self._stager.place_gradient(source, self._grad_dtype, self._ring)
        if request is not None or not self._stager.waits_for_room:
            return request
        # Replay can free the room of what it was given.
        self._send(sending)
        self._order.advance()
        deadline = perf_counter() + RING_PATIENCE
        self._job.hurry(on=True)
        try:
            while request is None and self._job.replaying and perf_counter() < deadline:
                self._ring.wait_for_room(0.05)
                request = self._stager.place_gradient(source, self._grad_dtype, self._ring)
        finally:
            self._job.hurry(on=False)
        # The last replay may have ended between the two looks, and freed what it had.
        return request or self._stager.place_gradient(source, self._grad_dtype, self._ring)

    def _send_scalars(
        self, scalars: ScalarCapture, sending: _Sending, optimizer: torch.optim.Optimizer, *, wanted: bool
    ) -> bool:
        """Find room for the update's scalars; without any, what needs them is late."""
        if not wanted:
            return False
        offset = self._ring.allocate(scalars.nbytes)
        if offset is None:
            self.all_late(FULL, optimizer)
            return False
        sending.requests += scalars.requests(offset)
        sending.scalars = scalars.at(offset)
        return True

    def _send(self, sending: _Sending) -> None:
        """Send what was taken so far."""
        self._hurry()
        requests, gradients, scalars = sending.requests, sending.gradients, sending.scalars
        sending.requests, sending.gradients, sending.scalars = [], [], None
        if not requests:
            return
        try:
            sent = self._stager.copy(requests, Urgency.GRADIENT, on_done=self._order.arrived)
        except SaveError as error:
            self.give_up(error)
            return
        self._order.gradients(gradients, sending.update, sent, scalars)

    def _hurry(self) -> None:
        """Let replay hurry while more than half of the ring is in use, if nobody waits for room."""
        hurried = not self._stager.waits_for_room and 2 * self._ring.in_use > self._ring.nbytes
        if hurried != self._hurrying:
            self._hurrying = hurried
            self._job.hurry(on=hurried)

    # -- fingerprints ------------------------------------------------------------------------

    def _look(self, rows: list[tuple[Piece, Role]]) -> None:
        """Fingerprint some pieces that left, as they are now."""
        chosen: list[tuple[Piece, Role]] = []
        sources: list[Source] = []
        for piece, role in rows:
            found = self._sources(piece)
            if found is None:
                self.drop(piece, REPLACED)
            else:
                chosen.append((piece, role))
                sources += found
        if not sources or self._stager.broken:
            return
        try:
            self._order.look(chosen, self._stager.fingerprint(sources, on_done=self._order.arrived))
        except SaveError as error:
            self.give_up(error)
        self.make_late()

    def _sources(self, piece: Piece) -> list[Source] | None:
        """Return a piece's current sources; ``None`` if it no longer exists."""
        unit = piece.unit
        try:
            tensors: list[Any] = [] if unit is None else unit.tensors()
        except KeyError:
            return None
        found = []
        for stretch, tensor in zip(piece.stretches, tensors, strict=True):
            if not isinstance(tensor, torch.Tensor) or tensor.shape != tensors[0].shape:
                return None
            if tensor.itemsize != stretch.itemsize or not self._stager.holds(tensor) or not is_dense(tensor):
                return None
            low = stretch.start * stretch.itemsize
            if low + stretch.nbytes > tensor.nbytes:
                return None
            found.append(Source(tensor, low, stretch.nbytes, stretch.position))
        return found

    # -- what leaves at the close after all --------------------------------------------------

    def make_late(self) -> None:
        """Let what has turned out not to be replayable leave at the closing tick."""
        if self._order.error is not None:
            self.give_up(self._order.error)
        for piece, why in self._order.problems():
            self.drop(piece, why)

    def drop(self, piece: Piece, why: str) -> None:
        """Let a piece leave at the closing tick, whatever was planned."""
        # In this order: replay must hear nothing of a piece that it was told to forget.
        self._order.drop(piece)
        make_late(piece, why, self._job)

    def give_up(self, error: BaseException) -> None:
        """Handle a refusal of the device: nothing is in flight then."""
        self._stager.give_up(error)
        self.all_late(REFUSED)


class _Sending:
    """Gradients and scalars of one update that were taken, and are to be sent."""

    def __init__(self, update: Update) -> None:
        self.update = update
        self.requests: list[CopyRequest] = []
        self.gradients: list[GradientCopy] = []
        self.scalars: ScalarCopies | None = None
