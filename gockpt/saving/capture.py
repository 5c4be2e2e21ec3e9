"""One capture attempt: the pieces that were copied, await gradients, or must be copied again.

The attempt watches the pieces that were copied before the closing tick. Around every update their live bytes
are fingerprinted; a piece with a change that no update explains is *late*: it is copied again at the closing
tick. At the close the fingerprints of all replayed pieces are taken from the live state: the worker publishes
only if its replay has exactly these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gockpt.core.descriptors import ArenaId, ArrayPlace
from gockpt.saving.at_once import AtOnce
from gockpt.saving.device_capture import Aboard
from gockpt.saving.fingerprints import looks_at_updates, of_piece, of_pieces, take
from gockpt.saving.gradient_capture import Gathering
from gockpt.saving.late_pieces import (
    CHANGED,
    ELSEWHERE,
    GRAPHED,
    OVERTAKEN,
    REPLACED,
    UNSEEN,
    bar_for_closure,
)
from gockpt.staging.host_stager import Batch, Copy
from gockpt.tensor_memory import dense_bytes, expect_dense_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from gockpt.core.array_spec import Name
    from gockpt.core.descriptors import Stretch
    from gockpt.core.timeline import Trace
    from gockpt.options import Options
    from gockpt.planning.planner import Plan
    from gockpt.saving.device_selection import Road
    from gockpt.saving.facts import Shape
    from gockpt.saving.fingerprints import Evidence
    from gockpt.saving.write_items import Cut, Piece, Unit
    from gockpt.staging.arena import Arena
    from gockpt.staging.gradient_ring import Ring
    from gockpt.staging.host_stager import Transfer
    from gockpt.state.live_state import LiveState
    from gockpt.workers.job_client import JobClient

__all__ = ["Attempt"]

CPU = torch.device("cpu")


class Attempt:
    """The training side of one attempt.

    Attributes:
        ticks: Ticks it was spread over so far.
        proven: Whether all of the last copies equal the state at their boundary.
        lost: Names of arrays whose last copies don't.
        aboard: The part whose tensors are copied from a device in the background; ``None`` if there is none.
        variant: Way of these copies, in a few words; ``None`` if there are none.
        graphed: Whether an update was captured into a graph, which may run unseen.
        broken: Why the attempt can't go on (an update that ended in an exception); else ``None``.
    """

    def __init__(
        self,
        *,
        live: LiveState,
        shape: Shape,
        cut: Cut,
        plan: Plan,
        arena: Arena,
        ring: Ring,
        ring_arena: Arena,
        transfer: Transfer,
        options: Options,
        racing: frozenset[Name] | None,
        job: JobClient,
        trace: Trace,
        road: Road | None = None,
    ) -> None:
        self.live = live
        self.layout = shape.layout
        self._shape = shape
        self.shape_key = shape.key
        self.cut = cut
        self.plan = plan
        self.job = job
        self._trace = trace
        self.aboard: Aboard | None = None
        self.variant: str | None = None
        if road is not None:
            self.variant = road.variant
            self.aboard = Aboard(
                road,
                cut,
                shape.layout,
                arena=arena,
                ring=ring,
                ring_arena=ring_arena,
                job=job,
                trace=trace,
                full=looks_at_updates(options),
                grad_dtype=options.grad_dtype,
            )
        self.graphed = False
        self._unsettled = False
        self.broken: str | None = None
        self.ticks = 0
        self.proven = False
        self.lost: list[Name] = []
        self._copied = (0, 0.0)
        self._arena = arena
        self._transfer = transfer
        self._encodes = options.grad_dtype is not None
        self._full = looks_at_updates(options)
        self._samples: dict[int, tuple[int, int]] = {}
        self._racing = racing
        self._parts = cut.parts(plan)
        self._next_part = 0
        self._copies: list[Copy] = []
        self._batch: Batch | None = None
        self._evidence: Evidence = {}
        self._at_once = AtOnce(cut.at_once, arena)
        self._gathering = Gathering(cut, ring=ring, arena=ring_arena, job=job, grad_dtype=options.grad_dtype)

    # -- ticks -------------------------------------------------------------------------------

    def send_part(self, live: LiveState) -> None:
        """Start copying the next part; the copies must equal its live bytes at this moment."""
        self.settle()
        self.ticks += 1
        self._note_graph()
        evidence = self._look(live)
        last = self._next_part >= len(self._parts)
        part = [] if last else self._parts[self._next_part]
        if self.aboard is not None:
            self.aboard.tick(live, [piece for piece in part if piece.aboard])
        if last:
            return
        self._next_part += 1
        pieces = [piece for piece in part if not piece.aboard]
        self._copies = [self._copy(piece, stretch) for piece in pieces for stretch in piece.stretches]
        for piece in pieces:
            piece.sent = True
            piece.known = of_piece(evidence, piece)
        self._start()

    def close(self, live: LiveState) -> dict[int, tuple[int, ...]]:
        """Take the closing boundary; :meth:`start_rest` then copies the rest behind the next step.

        Returns:
            The fingerprints that each replayed piece must arrive at, but of what stands on a device: once
            that is settled, :meth:`proofs` tells.
        """
        self.settle()
        self.ticks += 1
        self._note_graph()
        evidence = self._look(live)
        proofs = {p.index: of_piece(evidence, p) for p in self._sent()}
        self._samples = self._gathering.sample(live, proofs)
        aboard = (
            set()
            if self.aboard is None
            else self.aboard.close(live, self._restless, self._gathering.samples_end)
        )
        late = [p for p in self.cut.pieces if p.index not in proofs and p.index not in aboard]
        self.job.discard(p.index for p in late)
        ashore = (p for p in (*late, *self.cut.loose) if not p.aboard)
        self._copies = [self._copy(p, s) for p in ashore for s in p.stretches]
        restless = {p.index for unit in self.cut.units if self._restless(unit) for p in unit.pieces}
        self._transfer.run([c.run for c in self._copies if c.owner[0].index in restless])
        self._unsettled = self.aboard is not None
        return proofs

    def proofs(self) -> dict[int, tuple[int, ...]]:
        """Return what the replay of pieces that stand on a device must arrive at, once all is settled."""
        return {} if self.aboard is None else self.aboard.proofs()

    def samples(self) -> dict[int, tuple[int, int]]:
        """Return where the live values of probes stand, and how many gradients were posted, by piece.

        As with :meth:`proofs`, of what stands on a device once all is settled.
        """
        return self._samples if self.aboard is None else {**self._samples, **self.aboard.samples()}

    def _restless(self, unit: Unit) -> bool:
        """Whether a copy behind the closing tick is likely to be overtaken, as another one was."""
        if self._racing is None or not self._racing.isdisjoint(unit.names):
            return True
        return any(piece.late in (CHANGED, OVERTAKEN) for piece in unit.pieces)

    def stands_at_tick(self, live: LiveState) -> bool:
        """Whether the whole state still is, bit for bit, what it was at the last tick looked at."""
        if not self._at_once.same(live.entries):
            return False
        if self.aboard is not None and not self.aboard.stands(live):
            return False
        return take(live, self.cut, self._transfer) == self._evidence

    def _look(self, live: LiveState) -> Evidence:
        """Copy what is copied at once, fingerprint the rest; what left and changed unexplained is late."""
        self.live = live
        self._at_once.copy(live.entries)
        evidence = self._evidence = take(live, self.cut, self._transfer)
        for piece in self._sent():
            self._judge(piece, of_piece(evidence, piece))
        return evidence

    def _judge(self, piece: Piece, now: tuple[int, ...] | None) -> None:
        if now is None:
            self._gathering.drop(piece, REPLACED)
        elif piece.known is not None and now != piece.known:
            self._gathering.drop(piece, CHANGED)
        piece.known = now

    def _sent(self) -> list[Piece]:
        return [p for p in self.cut.pieces if p.sent and p.late is None and not p.aboard]

    def _note_graph(self) -> None:
        """After an update was captured: what left before may be changed by the graph, unseen."""
        if not self.graphed:
            return
        for piece in self._sent():
            self._gathering.drop(piece, GRAPHED)
        if self.aboard is not None:
            self.aboard.gathering.all_late(GRAPHED)

    def start_rest(self, on_done: Callable[[], None]) -> None:
        """Start the copies that :meth:`close` took the boundary of."""
        if self.aboard is not None:
            self.aboard.tell(on_done)
        self._start(on_done)

    @property
    def on_the_road(self) -> bool:
        """Whether the closing boundary was taken of something on a device, and that is not settled."""
        return self._unsettled

    @property
    def rest_ended(self) -> bool:
        """Whether none of its copies is in flight, successful or not."""
        return self.aboard is None or not self.aboard.under_way

    @property
    def refused(self) -> str | None:
        """Reason for which a device refused the sent copies; ``None`` if it did not."""
        return None if self.aboard is None else self.aboard.refused

    @property
    def doubts(self) -> dict[Name, str]:
        """Of what is lost: arrays that no change overtook, and what is wrong with them."""
        return {} if self.aboard is None else self.aboard.doubts

    def let_overwrite(self, optimizer: object | None) -> None:
        """Finish the copies of the host's, and let the device wait for what would be overwritten."""
        self._settle_copies()
        if self.aboard is not None:
            self.aboard.guard(optimizer)

    @property
    def all_proven(self) -> bool:
        """Whether every copy under way ended and is proven, without touching the live state."""
        done = self._batch is None or (self._batch.done.is_set() and not self._batch.errors)
        return done and not self._unsettled and not self.lost and all(c.proven for c in self._copies)

    @property
    def copied_bytes(self) -> int:
        """Bytes that have arrived."""
        return self._copied[0] + (0 if self.aboard is None else self.aboard.nbytes)

    @property
    def sample(self) -> tuple[int, float]:
        """Bytes and seconds of copies, for the measured copy rate."""
        nbytes, seconds = (0, 0.0) if self.aboard is None else self.aboard.sample
        return self._copied[0] + nbytes, self._copied[1] + seconds

    # -- copies under way --------------------------------------------------------------------

    def _start(self, on_done: Callable[[], None] | None = None) -> None:
        self.proven = False
        self.lost = []
        copies = [c for c in self._copies if c.arrived is None]
        nbytes = sum(c.source.nbytes for c in copies)
        self._batch = self._transfer.submit([c.run for c in copies], nbytes=nbytes, on_done=on_done)

    def settle(self) -> None:
        """Finish the copies in flight, helping; verify them; retry those overtaken by an undone change.

        May be interrupted anywhere and called again: a copy counts only once it is proven. What is in
        ``lost`` afterwards is late already inside a window; at the close the attempt is void.
        """
        self._settle_copies()
        if self._unsettled and self.aboard is not None:
            self.lost = [*self.lost, *self.aboard.settle()]
            self._unsettled = False
        self.proven = not self.lost

    def _settle_copies(self) -> None:
        batch = self._batch
        if batch is not None:
            batch.finish()
        lost: list[Name] = []
        for copy in self._copies:
            if copy.retry():
                continue
            piece, name = copy.owner
            lost.append(name)
            if piece.sent and piece.late is None:
                self._gathering.drop(piece, OVERTAKEN)
        if batch is not None:
            nbytes, seconds = self._copied
            self._copied = (nbytes + batch.nbytes, seconds + batch.ended - batch.started)
            self._trace.span("copy", batch.started, batch.ended)
        # Added, not replaced: after an interrupt below this is what the next call goes by.
        self.lost = [*self.lost, *lost]
        self._batch = None
        self._copies = []

    def cancel(self) -> None:
        """Stop copying; afterwards this attempt no longer writes into the arena."""
        batch, self._batch = self._batch, None
        self._copies = []
        if batch is not None:
            batch.cancel()
        if self.aboard is not None:
            self.aboard.cancel()

    # -- updates -----------------------------------------------------------------------------

    def before_hooks(self) -> None:
        """Others may change anything from here on."""
        self.settle()
        if self.aboard is not None:
            self.aboard.guard(None)

    def before_update(self, optimizer: torch.optim.Optimizer, *, closure: bool) -> None:
        """Let the update go ahead: nothing it overwrites is still needed afterwards."""
        self.settle()
        if self.aboard is not None:
            self.aboard.before_update(optimizer, closure=closure)
        if closure:
            ashore = (unit for unit in self.cut.units if not unit.aboard)
            bar_for_closure(ashore, optimizer, self._gathering.drop, encodes=self._encodes)
        if self._full:
            for piece, now in of_pieces(self._sent(), self._live_bytes(), self._transfer):
                self._judge(piece, now)
        self._gathering.before_update(optimizer)

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Take what the update consumed, for the pieces that already left."""
        found_inf = getattr(optimizer, "found_inf", None)
        aboard = self.aboard is not None and self.aboard.holds(found_inf)
        if found_inf is not None and not aboard:
            if getattr(found_inf, "device", CPU) != CPU:
                self._unread(optimizer)
                if self.aboard is not None:
                    self.aboard.gathering.all_late(ELSEWHERE, optimizer)
                return
            if float(found_inf) != 0.0:
                self._gathering.forget()
                if self.aboard is not None:
                    self.aboard.gathering.skipped(optimizer)
                return
        if self.aboard is not None:
            self.aboard.gathering.after_update(optimizer, found_inf if aboard else None)
        if aboard:
            self._unread(optimizer)
            return
        collected = self._gathering.after_update(optimizer)
        moved = [p for p in self._sent() if p.unit is not None and p.unit.optimizer is optimizer]
        if not self._full:
            for piece in moved:
                piece.known = None
            return
        for piece, now in of_pieces(moved, self._live_bytes(), self._transfer):
            if piece.index not in collected and now != piece.known:
                self._gathering.drop(piece, UNSEEN)
            piece.known = now

    def _unread(self, optimizer: torch.optim.Optimizer) -> None:
        """Whether the update happened stands on a device, and reading that would wait for it."""
        self._gathering.forget()
        for piece in self._sent():
            if piece.unit is not None and piece.unit.optimizer is optimizer:
                self._gathering.drop(piece, ELSEWHERE)

    # -- small helpers -----------------------------------------------------------------------

    def late_parts(self) -> dict[str, str]:
        """Return why parameters left at the closing tick although a replay was planned."""
        late = {p.unit.fqn: p.late for p in self.cut.pieces if p.late is not None and p.unit is not None}
        return {**self.cut.reasons, **late}

    def places(self, live: LiveState) -> tuple[ArrayPlace, ...]:
        """Describe every array to the writer; arrays that stand in storage order say so."""
        if self._shape.row_major:
            return self._shape.places
        instead = set() if self.aboard is None else self.aboard.instead
        at_once = {*self.cut.at_once.names, *instead}
        result = []
        for array in self.layout.arrays:
            tensor = live.entries[array.spec.name]
            stored = array.spec.name not in at_once and not tensor.is_contiguous()
            strides = tuple(tensor.stride()) if stored else None
            result.append(ArrayPlace(array, ArenaId.STATE, strides))
        return tuple(result)

    def _copy(self, piece: Piece, stretch: Stretch) -> Copy:
        source = expect_dense_bytes(stretch.name, self.live.entries[stretch.name])
        low, high = stretch.start * stretch.itemsize, stretch.stop * stretch.itemsize
        target = self._arena.view(stretch.offset, stretch.nbytes)
        expected = self._evidence[stretch.name, stretch.start]
        return Copy(source[low:high], target, stretch.position, (piece, stretch.name), expected)

    def _live_bytes(self) -> Callable[[Piece], list[np.ndarray | None]]:
        """Return a look-up of units' live memory as it is now; each unit is looked up once."""
        views: dict[str, list[np.ndarray | None]] = {}

        def of(piece: Piece) -> list[np.ndarray | None]:
            unit = piece.unit
            if unit is None:
                return [None] * len(piece.stretches)
            if unit.fqn not in views:
                views[unit.fqn] = _live_views(unit)
            return views[unit.fqn]

        return of


def _live_views(unit: Unit) -> list[np.ndarray | None]:
    expected = unit.param.shape
    try:
        tensors = unit.tensors()
    except KeyError:
        return [None] * len(unit.names)
    return [
        dense_bytes(t)
        if isinstance(t, torch.Tensor) and t.shape == expected and t.dtype == torch.float32
        else None
        for t in tensors
    ]
