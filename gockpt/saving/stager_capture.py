"""Part of a capture attempt in one stager's memory: copies state pieces and gradients, and verifies them.

Called by the attempt, in the training thread. What has arrived is handled on whichever thread sees it
(:mod:`gockpt.saving.update_order`). A piece that turns out not to be replayable is made late at once, or at
the next call; after the closing tick, verification finds it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from gockpt.errors import SaveError
from gockpt.kernels.fingerprint_numba import fingerprint
from gockpt.replay.rounding_probes import RUN
from gockpt.saving.at_once import AtOnce, slots_of
from gockpt.saving.copy_requests import owners, requests_of, ring_request, sources_of
from gockpt.saving.gradient_capture import GradientCapture
from gockpt.saving.late_pieces import REFUSED
from gockpt.saving.piece_updates import Role
from gockpt.saving.update_order import UpdateOrder
from gockpt.staging.gradient_ring import block_bytes
from gockpt.staging.stager import Source, Urgency

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from gockpt.core.arena_layout import ArenaLayout
    from gockpt.core.array_spec import Name
    from gockpt.core.timeline import Trace
    from gockpt.saving.write_items import Cut, Piece, Unit
    from gockpt.staging.arena import Arena
    from gockpt.staging.gradient_ring import Ring
    from gockpt.staging.stager import CopyRequest, CopyResult, Stager
    from gockpt.state.live_state import LiveState
    from gockpt.workers.job_client import JobClient

__all__ = ["StagerCapture"]


class StagerCapture:
    """The part of one attempt whose tensors one stager copies.

    Attributes:
        stager: That stager.
        gradients: The capture of gradients for copied pieces.
        instead: Arrays that were copied inside the closing tick because the stager failed.
        refused: Why the stager failed; else ``None``.
        doubts: Arrays among the result of :meth:`settle` that failed for another reason than a change during
            the copy, with that reason.
        samples_end: Where, in the ring's arena, live values of probes that were copied end.
    """

    def __init__(
        self,
        stager: Stager,
        cut: Cut,
        layout: ArenaLayout,
        *,
        pieces: Sequence[Piece],
        behind: Sequence[Piece],
        prompt: Sequence[Piece],
        arena: Arena,
        ring: Ring,
        ring_arena: Arena,
        job: JobClient,
        trace: Trace,
        full: bool,
        grad_dtype: str | None,
    ) -> None:
        """Capture some of an attempt's pieces.

        Args:
            stager: The stager that copies them.
            cut: All pieces of the attempt.
            layout: Place of every array in the arena.
            pieces: The pieces that can be replayed.
            behind: The pieces that leave behind the closing tick.
            prompt: The pieces that leave inside the closing tick.
            arena: The state's arena.
            ring: Room for gradients.
            ring_arena: The memory that it divides.
            job: Where gradients are replayed.
            trace: Receives the spans of copies.
            full: Whether what left is looked at around each update.
            grad_dtype: How gradients are encoded, if at all.
        """
        self.stager = stager
        self.instead: set[Name] = set()
        self.refused: str | None = None
        self.doubts: dict[Name, str] = {}
        self.samples_end = ring.nbytes
        self._cut = cut
        self._layout = layout
        self._arena = arena
        self._job = job
        self._trace = trace
        self._order = UpdateOrder(ring, ring_arena, job)
        self._pieces = pieces
        self._behind = behind
        self._prompt = prompt
        self._all = [*pieces, *behind, *prompt]
        self._units = list({id(p.unit): p.unit for p in pieces if p.unit is not None}.values())
        self.gradients = GradientCapture(
            stager,
            self._units,
            self._order,
            ring=ring,
            job=job,
            full=full,
            grad_dtype=grad_dtype,
        )
        self._seen: list[tuple[Sequence[Piece], CopyResult]] = []
        self._unseen: SaveError | None = None
        self._at_once: AtOnce | None = None
        self._closed = False
        self._kept: set[int] = set()
        self._again: set[int] = set()
        self._sampled: dict[int, int] = {}

    # -- ticks -------------------------------------------------------------------------------

    def collect(self) -> None:
        """Finish the copies that only the training thread can finish; in a window, what is lost is late."""
        self.stager.collect()
        if not self._closed:
            self.gradients.make_late()

    def tick(self, live: LiveState, pieces: Sequence[Piece]) -> None:
        """Take a boundary inside the window, and send ``pieces``."""
        self.gradients.make_late()
        self._seen, self._unseen = [], None
        if not self._all:
            return
        if self.stager.broken:
            self._look_only(live)
            return
        # One may be excluded already, as by a closure.
        pieces = [piece for piece in pieces if piece.late is None]
        leaving = {piece.index for piece in pieces}
        try:
            seen = self.stager.fingerprint(sources_of(live, self._all), on_done=self._order.arrived)
            self._seen = [(self._all, seen)]
            if pieces:
                state = self._send(live, pieces, self.stager.behind, seen)
                for piece in pieces:
                    piece.sent = True
                self._order.state(pieces, state)
        except SaveError as error:
            self.gradients.give_up(error)
            self._look_only(live)
            return
        roles = (Role.SAME, Role.FIRST)
        self._order.look([(piece, roles[piece.index in leaving]) for piece in self._all], seen)
        self.gradients.make_late()

    def close(self, live: LiveState, hurried: Callable[[Unit], bool], samples_at: int) -> set[int]:
        """Take the closing boundary, and send everything that was not copied before.

        Args:
            live: The state.
            hurried: Whether a copy of a unit behind the closing tick is likely to be overtaken.
            samples_at: Where, in the ring's arena, there is room for live values of probes.

        Returns:
            The pieces of which :meth:`proofs` will tell what their replay must arrive at.
        """
        self.gradients.make_late()
        self._seen, self._unseen = [], None
        self.samples_end = samples_at
        try:
            return self._close(live, hurried)
        except SaveError as error:
            self._closed = True
            self._order.close()
            self.stager.give_up(error)
            self._copy_all(live)
            return set()

    def _close(self, live: LiveState, hurried: Callable[[Unit], bool]) -> set[int]:
        following = self._order.pieces
        seen = None
        if self.stager.broken:
            raise SaveError(REFUSED)
        if following:
            seen = self.stager.fingerprint(sources_of(live, following), on_done=self._order.arrived)
            self._seen.append((following, seen))
            # What is known of it at once may still make a piece late.
            self._order.look([(piece, Role.PROOF) for piece in following], seen)
            self.gradients.make_late()
        self._closed = True
        self._order.close()
        kept = self._kept = {piece.index for piece in self._order.pieces}
        late = [piece for piece in self._pieces if piece.index not in kept]
        self._job.discard(piece.index for piece in late)
        soon = {id(unit) for unit in self._units if hurried(unit)}
        self._again = {piece.index for piece in late} & self._order.arriving
        if self._again:
            self.stager.flush()
        self._sample(live)
        prompt = [*self._prompt, *(p for p in late if id(p.unit) in soon)]
        behind = [*self._behind, *(p for p in late if id(p.unit) not in soon)]
        for pieces, urgency in ((prompt, Urgency.BUFFER), (behind, self.stager.behind)):
            if pieces:
                sent = self._send(live, pieces, urgency, seen)
                self._order.rest(pieces, sent)
                self._seen.append((pieces, sent))
        return kept

    def _send(
        self, live: LiveState, pieces: Sequence[Piece], urgency: Urgency, seen: CopyResult | None
    ) -> CopyResult:
        return self.stager.copy(requests_of(live, pieces), urgency, on_done=self._order.arrived, seen=seen)

    def _look_only(self, live: LiveState) -> None:
        """Take the boundary's fingerprints for :meth:`stands` alone: nothing more is sent."""
        for _ in range(2):  # the first time may tell only of what failed before
            try:
                seen = self.stager.fingerprint(sources_of(live, self._all), on_done=self._order.arrived)
            except SaveError as error:
                self._unseen = error
            else:
                self._seen = [(self._all, seen)]
                return

    def _sample(self, live: LiveState) -> None:
        """Send the live values of probes of what encoded gradients were sent for; packed at once."""
        requests: list[CopyRequest] = []
        places: dict[int, Piece] = {}
        place = self.samples_end
        for piece, starts in self._order.probes():
            first = self._sampled[piece.index] = place
            for stretch in piece.stretches:
                for start in starts:
                    element = stretch.start + start
                    nbytes = min(RUN, stretch.stop - element) * stretch.itemsize
                    low, tensor = element * stretch.itemsize, live.entries[stretch.name]
                    position = stretch.position + start * stretch.itemsize
                    places[place] = piece
                    requests.append(ring_request(Source(tensor, low, nbytes, position), place))
                    place += nbytes
            place = first + block_bytes(place - first)
        self.samples_end = place
        if requests:
            sent = self.stager.copy(requests, Urgency.GRADIENT, on_done=self._order.arrived)
            self._order.samples(places, sent)

    def stands(self, live: LiveState) -> bool:
        """Whether all of it certainly equals the state at the last tick. Waits for the stager.

        Raises:
            SaveError: If the stager fails.
        """
        if self._at_once is not None:
            return self._at_once.same(live.entries)
        if self._all and not self._seen:
            if self._unseen is not None:
                raise self._unseen
            return False
        for pieces, sent in self._seen:
            with suppress(SaveError):  # of what did not arrive, it may be known all the same what it was
                self.stager.finish(sent)
            if sent.error is not None and not sent.expected:
                raise sent.error
            if self.stager.fingerprint_now(sources_of(live, pieces)) != list(sent.expected):
                return False
        return True

    def _copy_all(self, live: LiveState) -> None:
        """Copy all of it now, and drop every copy in flight."""
        self._order.stop()
        self.stager.cancel()
        self._order.release()
        self._kept = self._again = set()
        self._sampled = {}
        self._seen = []
        for piece in self._pieces:
            self.gradients.drop(piece, REFUSED)
        self.instead = set(self._names())
        arrays = (array for array in self._layout.arrays if array.spec.name in self.instead)
        self._at_once = AtOnce(slots_of(arrays), self._arena)
        self._at_once.copy(live.entries)

    def _names(self) -> Iterator[Name]:
        for piece in self._all:
            for stretch in piece.stretches:
                yield stretch.name

    # -- the end -----------------------------------------------------------------------------

    @property
    def under_way(self) -> bool:
        """Whether something that was sent has not been received."""
        return not self._order.ended

    def tell(self, on_rest: Callable[[], None]) -> None:
        """Call ``on_rest`` whenever something has arrived from here on, on whichever thread saw it."""
        self._order.on_rest = on_rest

    def settle(self) -> list[Name]:
        """Wait until all has arrived; return the arrays that did not arrive as they were. After the close."""
        if not self._closed:
            return []
        self._order.on_rest = None
        while (sent := self._order.oldest) is not None:
            with suppress(SaveError):  # it is noted with what was to arrive
                self.stager.finish(sent)
            self._order.receive()
        # Asked of what was sent as well: nothing of the close may be missed.
        errors = (self._order.error, *(sent.error for _, sent in self._seen))
        error = next((error for error in errors if error is not None), None)
        if error is not None:
            # As if all of it had been overtaken: it leaves again at the next tick, inside the call.
            self.stager.give_up(error)
            self.refused = str(error)
        spans, self._order.spans = self._order.spans, []
        for began, ended in spans:
            self._trace.span("copy", began, ended)
        if self.refused is not None:
            return list(self._names())
        torn = [piece for piece in self._order.pieces if piece.index in self._order.torn]
        missing = [self._cut.pieces[index] for index in self._kept - self.proofs().keys()]
        stale = [
            piece for piece in self._pieces if piece.index in self._again and not self._stands_in_arena(piece)
        ]
        lost = [*self._lost(), *(s.name for piece in (*torn, *missing, *stale) for s in piece.stretches)]
        for index, why in self._order.doubtful.items():
            for stretch in self._cut.pieces[index].stretches:
                if stretch.name not in lost:
                    self.doubts.setdefault(stretch.name, why)
        return [*lost, *self.doubts]

    def _lost(self) -> list[Name]:
        """Return the arrays that did not arrive at the close as they were; asks what was sent itself."""
        lost = list(self._order.lost)
        for pieces, sent in self._seen:
            places = {request.offset for request in sent.lost}
            for stretch in (s for piece in pieces for s in piece.stretches):
                if (stretch.offset in places or not sent.done.is_set()) and stretch.name not in lost:
                    lost.append(stretch.name)
        return lost

    def _stands_in_arena(self, piece: Piece) -> bool:
        """Whether a piece that left twice at a time arrived in that order, now that nothing is on its way."""
        for pieces, sent in self._seen:
            place = 0
            for one in pieces:
                if one is piece:
                    now = [
                        fingerprint(self._arena.view(s.offset, s.nbytes), s.position) for s in piece.stretches
                    ]
                    return now == list(sent.expected[place : place + len(now)])
                place += len(one.stretches)
        return False

    def proofs(self) -> dict[int, tuple[int, ...]]:
        """Return what the replay of each piece must arrive at, once all has arrived."""
        return self._order.proofs()

    def samples(self) -> dict[int, tuple[int, int]]:
        """Return where the live values of probes stand, and how many gradients there must have been."""
        posted = self._order.posted()
        return {index: (place, posted[index]) for index, place in self._sampled.items() if index in posted}

    @property
    def nbytes(self) -> int:
        """Bytes that have arrived."""
        return self._order.nbytes

    @property
    def sample(self) -> tuple[int, float]:
        """Bytes and seconds of copies, for the measured copy rate."""
        return self._order.sample

    def cancel(self) -> None:
        """Drop every copy in flight; afterwards none of them writes into the arenas."""
        self._order.on_rest = None
        self._order.stop()
        # Even if nothing is noted: an interrupt may have come between sending and noting.
        self.stager.cancel()
        self._order.release()

    # -- updates -----------------------------------------------------------------------------

    def guard(self, optimizer: object | None) -> None:
        """Let an update, or with ``None`` anything, overwrite what is still to be copied."""
        try:
            self.stager.guard(owners(optimizer))
        except SaveError as error:
            # Nothing reads what the update overwrites. After the closing tick, settle() reports the error.
            if self._closed:
                self.stager.give_up(error)
            else:
                self.gradients.give_up(error)

    def before_update(self, optimizer: torch.optim.Optimizer, *, closure: bool) -> None:
        """Let the update go ahead: what it overwrites is copied, or will be in time."""
        self.guard(optimizer)
        self.gradients.before_update(optimizer, closure=closure)
