"""Device half of a capture attempt: stages state parts and gradients from device memory.

Called by the attempt, in the training thread. Calls inside a window queue work on the device and return;
arrivals are handled on the stager's thread (:mod:`gockpt.saving.update_order`). A piece that turns out there
not to be replayable is made late at the next call; after the closing tick, verification finds it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from gockpt.errors import SaveError
from gockpt.kernels.fingerprint_numba import fingerprint
from gockpt.replay.rounding_probes import RUN
from gockpt.saving.at_once import AtOnce, slots_of
from gockpt.saving.device_gradient_capture import GatheringAboard
from gockpt.saving.device_selection import sources_of, to_ring
from gockpt.saving.late_pieces import REFUSED
from gockpt.saving.update_order import Following, Role
from gockpt.staging.device import Source
from gockpt.staging.gradient_ring import block_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gockpt.core.arena_layout import ArenaLayout
    from gockpt.core.array_spec import Name
    from gockpt.core.timeline import Trace
    from gockpt.saving.device_selection import Road
    from gockpt.saving.write_items import Cut, Piece, Unit
    from gockpt.staging.arena import Arena
    from gockpt.staging.copy_batches import Shipment
    from gockpt.staging.gradient_ring import Ring
    from gockpt.staging.in_flight import Consignment
    from gockpt.state.live_state import LiveState
    from gockpt.workers.job_client import JobClient

__all__ = ["Aboard"]


class Aboard:
    """The part of one attempt whose tensors are on a device.

    Attributes:
        gathering: The capture of gradients for copied pieces.
        instead: Arrays that were copied inside the closing tick because the device refused.
        refused: Why the device refused the sent copies; else ``None``.
        doubts: Arrays among the result of :meth:`settle` that failed for another reason than a change during
            the copy, with that reason.
    """

    def __init__(
        self,
        road: Road,
        cut: Cut,
        layout: ArenaLayout,
        *,
        arena: Arena,
        ring: Ring,
        ring_arena: Arena,
        job: JobClient,
        trace: Trace,
        full: bool,
        grad_dtype: str | None,
    ) -> None:
        self.instead: set[Name] = set()
        self.refused: str | None = None
        self.doubts: dict[Name, str] = {}
        self._road = road
        self._cut = cut
        self._layout = layout
        self._arena = arena
        self._trace = trace
        self._following = Following(ring, ring_arena, job)
        self._units = [unit for unit in cut.units if unit.aboard]
        self.gathering = GatheringAboard(
            road,
            self._units,
            self._following,
            ring=ring,
            job=job,
            arrived=self._arrived,
            full=full,
            grad_dtype=grad_dtype,
        )
        self._pieces = [piece for piece in cut.pieces if piece.aboard]
        self._all = [*self._pieces, *cut.shipped, *cut.prompt]
        self._seen: list[tuple[Sequence[Piece], Consignment]] = []
        self._unseen: SaveError | None = None
        self._at_once: AtOnce | None = None
        self._closed = False
        self._kept: set[int] = set()
        self._again: set[int] = set()
        self._on_rest: Callable[[], None] | None = None
        self._sampled: dict[int, int] = {}

    # -- ticks -------------------------------------------------------------------------------

    def tick(self, live: LiveState, pieces: Sequence[Piece]) -> None:
        """Take a boundary inside the window, and send ``pieces``."""
        self.gathering.make_late()
        self._seen, self._unseen = [], None
        if not self._all:
            return
        if self._road.broken:
            self._look_only(live)
            return
        # One may be barred already, as by a closure.
        pieces = [piece for piece in pieces if piece.late is None]
        leaving = {piece.index for piece in pieces}
        try:
            sent = self._road.watch(sources_of(live, self._all), self._arrived)
            self._seen = [(self._all, sent)]
            if pieces:
                state = self._road.send(live, pieces, self._arrived)
                for piece in pieces:
                    piece.sent = True
                self._following.state(pieces, state)
        except SaveError as error:
            self.gathering.give_up(error)
            self._look_only(live)
            return
        roles = (Role.SAME, Role.FIRST)
        self._following.look([(piece, roles[piece.index in leaving]) for piece in self._all], sent)

    def close(self, live: LiveState, restless: Callable[[Unit], bool], samples_at: int) -> set[int]:
        """Take the closing boundary, and send everything that was not copied before.

        Args:
            live: The state.
            restless: Whether a copy of a unit behind the closing tick is likely to be overtaken.
            samples_at: Where, in the ring's arena, there is room for live values of probes.

        Returns:
            The pieces of which :meth:`proofs` will tell what their replay must arrive at.
        """
        self.gathering.make_late()
        following = self._following.pieces
        kept = self._kept = {piece.index for piece in following}
        late = [piece for piece in self._pieces if piece.index not in kept]
        hurried = {id(unit) for unit in self._units if restless(unit)}
        prompt = [*self._cut.prompt, *(p for p in late if id(p.unit) in hurried)]
        behind = [*self._cut.shipped, *(p for p in late if id(p.unit) not in hurried)]
        self._closed = True
        self._following.close()
        self._seen, self._unseen = [], None
        arriving = self._following.arriving
        self._again = {piece.index for piece in late} & arriving
        try:
            if self._road.broken:
                self._copy_all(live)
                return set()
            if self._again:
                self._road.hasten()
            if following:
                proof = self._road.watch(sources_of(live, following), self._arrived)
                self._following.look([(piece, Role.PROOF) for piece in following], proof)
                self._seen.append((following, proof))
            self._sample(live, samples_at)
            for pieces, packed in ((prompt, True), (behind, False)):
                if pieces:
                    sent = self._road.send(live, pieces, self._arrived, prompt=packed)
                    self._following.rest(pieces, sent)
                    self._seen.append((pieces, sent))
        except SaveError as error:
            self._road.give_up(error)
            self._copy_all(live)
            return set()
        return kept

    def _look_only(self, live: LiveState) -> None:
        """Take the boundary's fingerprints for :meth:`stands` alone: nothing more is sent."""
        for _ in range(2):  # the first time may tell only of what failed before
            try:
                self._seen = [(self._all, self._road.watch(sources_of(live, self._all), self._arrived))]
            except SaveError as error:
                self._unseen = error
            else:
                return

    def _sample(self, live: LiveState, place: int) -> None:
        """Send the live values of probes of what encoded gradients were sent for; packed at once."""
        cargo: list[Shipment] = []
        places: dict[int, Piece] = {}
        for piece, starts in self._following.probes():
            self._sampled[piece.index] = place
            for stretch in piece.stretches:
                for start in starts:
                    first = stretch.start + start
                    nbytes = min(RUN, stretch.stop - first) * stretch.itemsize
                    low, tensor = first * stretch.itemsize, live.entries[stretch.name]
                    position = stretch.position + start * stretch.itemsize
                    places[place] = piece
                    cargo.append(to_ring(Source(tensor, low, nbytes, position), place))
                    place += nbytes
            place = self._sampled[piece.index] + block_bytes(place - self._sampled[piece.index])
        if cargo:
            self._following.samples(places, self._road.follow(cargo, self._arrived))

    def stands(self, live: LiveState) -> bool:
        """Whether all of it certainly equals the state at the last tick. Waits for the device.

        Raises:
            SaveError: If the device fails.
        """
        if self._at_once is not None:
            return self._at_once.same(live.entries)
        if self._all and not self._seen:
            if self._unseen is not None:
                raise self._unseen
            return False
        for pieces, sent in self._seen:
            with suppress(SaveError):  # of what did not arrive, it may be known all the same what it was
                self._road.finish(sent)
            if sent.error is not None and not sent.expected:
                raise sent.error
            if self._road.look(live, pieces) != list(sent.expected):
                return False
        return True

    def _copy_all(self, live: LiveState) -> None:
        """Copy all of it now, and drop every copy in flight."""
        self._following.stop()
        self._road.cancel()
        self._following.release()
        self._kept = self._again = set()
        self._sampled = {}
        self._seen = []
        for piece in self._pieces:
            self.gathering.drop(piece, REFUSED)
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
        return not self._following.ended

    def tell(self, on_rest: Callable[[], None]) -> None:
        """Call ``on_rest`` whenever something has arrived from here on, on whichever thread saw it."""
        self._on_rest = on_rest

    def settle(self) -> list[Name]:
        """Wait until all has arrived; return the arrays that did not arrive as they were. After the close."""
        if not self._closed:
            return []
        self._on_rest = None
        while (sent := self._following.oldest) is not None:
            with suppress(SaveError):  # it is noted with what was to arrive
                self._road.finish(sent)
            self._following.receive()
        # Asked of what was sent as well: nothing of the close may be missed.
        errors = (self._following.error, *(sent.error for _, sent in self._seen))
        error = next((error for error in errors if error is not None), None)
        if error is not None:
            # As if all of it had been overtaken: it leaves again at the next tick, inside the call.
            self._road.give_up(error)
            self.refused = str(error)
        spans, self._following.spans = self._following.spans, []
        for began, ended in spans:
            self._trace.span("copy", began, ended)
        if self.refused is not None:
            return list(self._names())
        torn = [piece for piece in self._following.pieces if piece.index in self._following.torn]
        missing = [self._cut.pieces[index] for index in self._kept - self.proofs().keys()]
        stale = [
            piece for piece in self._pieces if piece.index in self._again and not self._stands_in_arena(piece)
        ]
        lost = [*self._lost(), *(s.name for piece in (*torn, *missing, *stale) for s in piece.stretches)]
        for index, why in self._following.doubtful.items():
            for stretch in self._cut.pieces[index].stretches:
                if stretch.name not in lost:
                    self.doubts.setdefault(stretch.name, why)
        return [*lost, *self.doubts]

    def _lost(self) -> list[Name]:
        """Return the arrays that did not arrive at the close as they were; asks what was sent itself."""
        lost = list(self._following.lost)
        for pieces, sent in self._seen:
            places = {shipment.offset for shipment in sent.lost}
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
        return self._following.proofs()

    def samples(self) -> dict[int, tuple[int, int]]:
        """Return where the live values of probes stand, and how many gradients there must have been."""
        posted = self._following.posted()
        return {index: (place, posted[index]) for index, place in self._sampled.items() if index in posted}

    @property
    def nbytes(self) -> int:
        """Bytes that have arrived."""
        return self._following.nbytes

    @property
    def sample(self) -> tuple[int, float]:
        """Bytes and seconds of copies, for the measured copy rate."""
        return self._following.sample

    def cancel(self) -> None:
        """Drop every copy in flight; afterwards none of them writes into the arenas."""
        self._on_rest = None
        self._following.stop()
        # Even if nothing is noted: an interrupt may have come between sending and noting.
        self._road.cancel()
        self._following.release()

    def _arrived(self) -> None:
        self._following.receive()
        on_rest = self._on_rest
        if on_rest is not None:
            on_rest()

    # -- updates -----------------------------------------------------------------------------

    def holds(self, value: object) -> bool:
        """Whether a number stands on the device, so that reading it would wait."""
        return isinstance(value, torch.Tensor) and self._road.holds(value)

    def guard(self, optimizer: object | None) -> None:
        """Let an update, or with ``None`` anything, overwrite what is still to be packed."""
        try:
            self._road.guard(optimizer)
        except SaveError as error:
            # Nothing reads what the update overwrites. After the closing tick, settle() reports the error.
            if self._closed:
                self._road.give_up(error)
            else:
                self.gathering.give_up(error)

    def before_update(self, optimizer: torch.optim.Optimizer, *, closure: bool) -> None:
        """Let the update go ahead on the device: what it overwrites is packed before."""
        self.guard(optimizer)
        self.gathering.before_update(optimizer, closure=closure)
