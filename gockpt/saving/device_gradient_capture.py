"""Capture of gradients and scalars of updates on a device, for pieces that were already copied.

Called around every update, in the training thread. All work is queued on the device; nothing waits for it. A
piece whose gradient can't be captured is copied at the closing tick instead.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from gockpt.errors import SaveError
from gockpt.kernels.gradient16_launch import form_of
from gockpt.replay import rules
from gockpt.replay.gradient_encoding import seal_position
from gockpt.replay.pending_scalars import LateNumbers
from gockpt.saving.device_selection import to_ring
from gockpt.saving.late_pieces import (
    ELSEWHERE,
    FULL,
    NOT_DENSE,
    OPTIONS,
    REFUSED,
    REPLACED,
    SCALAR_ELSEWHERE,
    bar,
    bar_for_closure,
    followed,
    make_late,
)
from gockpt.saving.update_order import Follow, Following, Numbers, Role, Update
from gockpt.staging.device import Source
from gockpt.tensor_memory import is_dense

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gockpt.core.descriptors import Stretch
    from gockpt.kernels.gradient16_launch import Form
    from gockpt.replay.rules import Rule
    from gockpt.saving.device_selection import Road
    from gockpt.saving.write_items import Piece, Unit
    from gockpt.staging.copy_batches import Shipment
    from gockpt.staging.gradient_ring import Ring
    from gockpt.workers.job_client import JobClient

__all__ = ["GatheringAboard"]


class GatheringAboard:
    """Takes gradients off a device for one attempt."""

    def __init__(
        self,
        road: Road,
        units: Sequence[Unit],
        following: Following,
        *,
        ring: Ring,
        job: JobClient,
        arrived: Callable[[], None],
        full: bool,
        grad_dtype: str | None,
    ) -> None:
        """Gather for ``units``, all of which stand on the road's device.

        Args:
            road: The road off it.
            units: What can be replayed.
            following: Who is told what was sent.
            ring: Room for gradients.
            job: Where they are replayed.
            arrived: Called when something has arrived, on whichever thread saw that.
            full: Whether what left is looked at around each update.
            grad_dtype: How gradients are encoded on their way, if at all.
        """
        self._road = road
        self._units = units
        self._following = following
        self._ring = ring
        self._job = job
        self._arrived = arrived
        self._full = full
        self._grad_dtype = grad_dtype
        self._numbers: Counter[int] = Counter()
        self._pre: dict[int, tuple[Update, dict[int, list[Follow]]]] = {}
        self._hurrying = False

    def before_update(self, optimizer: torch.optim.Optimizer, *, closure: bool) -> None:
        """Take the gradients that the update is about to overwrite."""
        self.make_late()
        if closure:
            bar_for_closure(self._units, optimizer, self.drop, encodes=self._grad_dtype is not None)
        if self._full:
            self._look([(piece, Role.SAME) for piece in self._following.pieces])
        update = Update()
        taken: dict[int, list[Follow]] = {}
        self._pre[id(optimizer)] = update, taken
        cargo: list[Shipment] = []
        follows: list[Follow] = []
        for unit, pieces in followed(self._units, optimizer):
            if unit.rule.gradient_at == "pre":
                taken[id(unit)] = self._take(unit, pieces, update, cargo)
                follows += taken[id(unit)]
        self._send(follows, update, cargo, None)

    def after_update(self, optimizer: torch.optim.Optimizer, found_inf: torch.Tensor | None) -> None:
        """Send what the update consumed.

        Args:
            optimizer: Who has stepped.
            found_inf: Says on the device whether it was skipped; ``None`` if it was not.
        """
        self.make_late()
        update, taken = self._pre.pop(id(optimizer), (Update(), {}))
        numbers = _Collection()
        if found_inf is not None and not numbers.found(found_inf, self._road):
            self.all_late(ELSEWHERE, optimizer)
        cargo: list[Shipment] = []
        follows: list[Follow] = []
        collected: set[int] = set()
        concerned = [
            (unit, pieces)
            for unit, pieces in followed(self._units, optimizer)
            if (taken.get(id(unit)) if unit.rule.gradient_at == "pre" else unit.param.grad is not None)
        ]
        rows = _rows([unit for unit, _ in concerned])
        for unit, pieces in concerned:
            got = taken[id(unit)] if unit.rule.gradient_at == "pre" else None
            row = rows[id(unit)]
            if row is None:
                bar(unit, OPTIONS, self.drop)
                continue
            if isinstance(row, LateNumbers) and not numbers.take(row, self._road):
                bar(unit, SCALAR_ELSEWHERE, self.drop)
                continue
            if got is None:
                got = self._take(unit, pieces, update, cargo)
                follows += got
            if isinstance(row, LateNumbers):
                numbers.wanted(row, got)
            else:
                for follow in got:
                    follow.row = row
            collected |= {follow.piece.index for follow in got}
        gathered = self._gather(numbers, cargo, optimizer) if collected else None
        self._send(follows, update, cargo, gathered)
        if gathered is None:
            self._following.settle(update)
        moved = [p for p in self._following.pieces if p.unit is not None and p.unit.optimizer is optimizer]
        if self._full:
            roles = (Role.MOVED, Role.TOUCHED)
            self._look([(piece, roles[piece.index not in collected]) for piece in moved])
        else:
            self._following.forget(moved)

    def skipped(self, optimizer: torch.optim.Optimizer) -> None:
        """The update changed nothing: forget what was taken before it."""
        pre = self._pre.pop(id(optimizer), None)
        if pre is not None:
            self._following.settle(pre[0], skipped=True)

    def all_late(self, why: str, optimizer: object | None = None) -> None:
        """Let all of an optimizer's pieces that left, or all there are, leave again at the closing tick."""
        for piece in self._following.pieces:
            if optimizer is None or (piece.unit is not None and piece.unit.optimizer is optimizer):
                self.drop(piece, why)

    def _take(
        self, unit: Unit, pieces: Sequence[Piece], update: Update, cargo: list[Shipment]
    ) -> list[Follow]:
        """Find room for a unit's gradient, and note what is to be sent."""
        grad = unit.param.grad
        if grad is None:
            return []
        problem = rules.gradient_reason(unit.param)
        if problem is None and not (self._road.holds(grad) and is_dense(grad)):
            problem = NOT_DENSE
        if problem is not None:
            bar(unit, problem, self.drop)
            return []
        taken = []
        for piece in pieces:
            stretch = piece.stretches[0]
            form = self._form(stretch)
            # Nobody waits for room here: what holds it may have to leave the device first.
            offset = self._ring.allocate(form.nbytes)
            if offset is None:
                self.drop(piece, FULL)
                continue
            number, position = 0, stretch.position
            if form.encoding is not None:
                self._numbers[piece.index] += 1
                number = self._numbers[piece.index]
                position = seal_position(number)
            low = stretch.start * stretch.itemsize
            source = Source(grad, low, stretch.nbytes, position)
            cargo.append(to_ring(source, offset, form))
            taken.append(Follow(piece, update, offset, form.nbytes, form.encoding, number))
        return taken

    def _form(self, stretch: Stretch) -> Form:
        """Return how a piece's gradients travel: always the same way."""
        count = stretch.stop - stretch.start
        form = form_of(self._grad_dtype, count)
        return form if form.nbytes <= self._road.slot_bytes else form_of(None, count)

    def _gather(
        self, numbers: _Collection, cargo: list[Shipment], optimizer: torch.optim.Optimizer
    ) -> Numbers | None:
        """Find room for the update's numbers; without any, what needs them is late."""
        if not numbers.nbytes:
            return None
        offset = self._ring.allocate(numbers.nbytes)
        if offset is None:
            self.all_late(FULL, optimizer)
            return None
        cargo += numbers.sources(offset)
        return numbers.at(offset)

    def _send(
        self, follows: list[Follow], update: Update, cargo: list[Shipment], numbers: Numbers | None
    ) -> None:
        hurried = 2 * self._ring.in_use > self._ring.nbytes
        if hurried != self._hurrying:
            self._hurrying = hurried
            self._job.hurry(on=hurried)
        if not cargo:
            return
        try:
            sent = self._road.follow(cargo, self._arrived)
        except SaveError as error:
            self.give_up(error)
            return
        self._following.gradients(follows, update, sent, numbers)

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
        if not sources or self._road.broken:
            return
        try:
            self._following.look(chosen, self._road.watch(sources, self._arrived))
        except SaveError as error:
            self.give_up(error)

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
            if tensor.itemsize != stretch.itemsize or not self._road.holds(tensor) or not is_dense(tensor):
                return None
            low = stretch.start * stretch.itemsize
            if low + stretch.nbytes > tensor.nbytes:
                return None
            found.append(Source(tensor, low, stretch.nbytes, stretch.position))
        return found

    # -- what leaves at the close after all --------------------------------------------------

    def make_late(self) -> None:
        """Let what has turned out not to be replayable leave at the closing tick."""
        if self._following.error is not None:
            self.give_up(self._following.error)
        for piece, why in self._following.problems():
            self.drop(piece, why)

    def drop(self, piece: Piece, why: str) -> None:
        """Let a piece leave at the closing tick, whatever was planned."""
        # In this order: replay must hear nothing of a piece that it was told to forget.
        self._following.drop(piece)
        make_late(piece, why, self._job)

    def give_up(self, error: BaseException) -> None:
        """Handle a refusal of the device: nothing is in flight then."""
        self._road.give_up(error)
        self.all_late(REFUSED)


def _rows(units: Sequence[Unit]) -> dict[int, tuple[float, ...] | LateNumbers | None]:
    """Return each unit's numbers of the update that has just been queued; few launches for a group."""
    groups: dict[tuple[int, Rule], list[Unit]] = {}
    for unit in units:
        groups.setdefault((unit.group_index, unit.rule), []).append(unit)
    found: dict[int, tuple[float, ...] | LateNumbers | None] = {}
    for (_, rule), members in groups.items():
        states = [unit.optimizer.state.get(unit.param, {}) for unit in members]
        numbers = rules.scalars_of(rule, members[0].group, states)
        found.update(zip(map(id, members), numbers, strict=True))
    return found


class _Collection:
    """Numbers on the device that one update needs, each of them once."""

    def __init__(self) -> None:
        self._tensors: dict[int, torch.Tensor] = {}
        self._found_inf: torch.Tensor | None = None
        self._wanted: list[tuple[LateNumbers, list[Follow]]] = []

    def found(self, tensor: torch.Tensor, road: Road) -> bool:
        """Take the number that says whether the update was skipped."""
        if not self._add(tensor, road):
            return False
        self._found_inf = tensor
        return True

    def take(self, late: LateNumbers, road: Road) -> bool:
        """Take an update's numbers; ``False`` if they can't leave by the road."""
        return all(self._add(tensor, road) for tensor in late.tensors)

    def wanted(self, late: LateNumbers, follows: list[Follow]) -> None:
        """Note who needs them."""
        self._wanted.append((late, follows))

    def _add(self, tensor: torch.Tensor, road: Road) -> bool:
        if tensor.numel() != 1 or not road.holds(tensor) or not is_dense(tensor):
            return False
        self._tensors[id(tensor)] = tensor
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.itemsize for tensor in self._tensors.values())

    def _ordered(self) -> list[torch.Tensor]:
        # Large ones first: then each is aligned, and there is no gap, so that they leave in one copy.
        return sorted(self._tensors.values(), key=lambda tensor: -tensor.itemsize)

    def sources(self, offset: int) -> list[Shipment]:
        """Return what is to be sent, each with its place, given the place of the first."""
        found = []
        for tensor in self._ordered():
            found.append(to_ring(Source(tensor, 0, tensor.itemsize, 0), offset))
            offset += tensor.itemsize
        return found

    def at(self, offset: int) -> Numbers:
        """Return what is to be read when they have arrived."""
        ordered = self._ordered()
        numbers = {id(tensor): number for number, tensor in enumerate(ordered)}
        places = []
        for tensor, shipment in zip(ordered, self.sources(offset), strict=True):
            places.append((shipment.offset, tensor.dtype))
        found = None if self._found_inf is None else numbers[id(self._found_inf)]
        rows = [
            (late, tuple(numbers[id(tensor)] for tensor in late.tensors), follows)
            for late, follows in self._wanted
        ]
        return Numbers(offset, places, found, rows)
