"""Order of updates: each is released to replay once its piece's state has been verified.

State and gradients of a piece may be copied at different moments, and arrive in any order. Replay gets an
update only after the piece's state and the update's gradient have arrived and were verified, its scalars are
known, and all earlier updates of the piece were released. The training thread reports what was sent, and
whoever sees it what has arrived; neither waits for the other.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from gockpt.kernels.gradient_encoding import empty, incomplete
from gockpt.replay.rounding_probes import choose, spread
from gockpt.saving.late_pieces import BROKEN, NOT_ARRIVED, OVERTAKEN
from gockpt.saving.piece_updates import (
    STILL,
    CopiedPiece,
    GradientCopies,
    GradientCopy,
    Look,
    RestCopies,
    Role,
    SampleCopies,
    ScalarCopies,
    StateCopies,
    Update,
    Work,
    blame,
    described,
    read_number,
    row_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from gockpt.core.array_spec import Name
    from gockpt.core.descriptors import Gradient
    from gockpt.saving.write_items import Piece
    from gockpt.staging.arena import Arena
    from gockpt.staging.gradient_ring import Ring
    from gockpt.staging.stager import CopyResult
    from gockpt.workers.job_client import JobClient

__all__ = ["UpdateOrder"]


class UpdateOrder:
    """The pieces of one attempt that one stager copied, and their updates in order. Thread-safe.

    Attributes:
        nbytes: Bytes that have arrived.
        sample: Bytes and seconds that tell how fast state leaves.
        spans: When what has arrived was sent, and when it was there, in ``perf_counter`` seconds.
        lost: Arrays that left at the closing tick and arrived otherwise.
        error: Why something did not arrive at all; ``None`` if all has, or still may.
        on_rest: Called whenever something has arrived; ``None`` while nobody wants to know.
    """

    def __init__(self, ring: Ring, arena: Arena, job: JobClient) -> None:
        """Keep pieces in order.

        Args:
            ring: Room for gradients; allocating is the caller's concern.
            arena: The memory that it divides.
            job: Who replays.
        """
        self.nbytes = 0
        self.sample = (0, 0.0)
        self.spans: list[tuple[float, float]] = []
        self.lost: list[Name] = []
        self.error: BaseException | None = None
        self.on_rest: Callable[[], None] | None = None
        self._ring = ring
        self._arena = arena
        self._job = job
        self._lock = threading.Lock()
        self._copied: dict[int, CopiedPiece] = {}
        self._open: list[tuple[CopyResult, Work]] = []
        self._looks: deque[Look] = deque()
        self._kept: set[int] = set()
        self._closed = False
        self._over = False

    # -- what was sent, by the training thread -----------------------------------------------

    def state(self, pieces: Sequence[Piece], sent: CopyResult) -> None:
        """Some pieces were sent: replay may begin once they have arrived."""
        places = {stretch.offset: piece for piece in pieces for stretch in piece.stretches}
        with self._lock:
            for piece in pieces:
                self._copied[piece.index] = CopiedPiece(piece)
            self._open.append((sent, StateCopies(places, pieces)))
        self.receive()

    def gradients(
        self,
        gradients: Sequence[GradientCopy],
        update: Update,
        sent: CopyResult,
        numbers: ScalarCopies | None = None,
    ) -> None:
        """Some gradients were sent, in the order of updates for each piece, maybe with numbers."""
        with self._lock:
            for gradient in gradients:
                copied = self._copied.get(gradient.piece.index)
                if copied is None:
                    gradient.dropped = True
                else:
                    copied.gradients.append(gradient)
                    copied.sent += 1
                    copied.encoded |= gradient.encoding is not None
            self._open.append((sent, GradientCopies({g.offset: g for g in gradients}, update, numbers)))
        self.receive()

    def settle(self, update: Update, *, skipped: bool = False) -> None:
        """Record that an update's scalars are known, and whether it was skipped."""
        with self._lock:
            update.known, update.skipped = True, skipped
            self._advance()

    def advance(self) -> None:
        """Hand over what may be: scalars have become known."""
        with self._lock:
            self._advance()

    def samples(self, places: dict[int, Piece], sent: CopyResult) -> None:
        """Live values of probes were sent at the closing tick; ``places`` says which piece's go where."""
        with self._lock:
            self._open.append((sent, SampleCopies(places)))
        self.receive()

    def rest(self, pieces: Sequence[Piece], sent: CopyResult) -> None:
        """Some pieces were sent at the closing tick: no gradients come for them."""
        names = {stretch.offset: stretch.name for piece in pieces for stretch in piece.stretches}
        with self._lock:
            self._open.append((sent, RestCopies(names)))
        self.receive()

    def look(self, rows: Sequence[tuple[Piece, Role]], sent: CopyResult) -> None:
        """Fingerprints of what each piece is now were sent for, stretch by stretch."""
        look = Look(rows)
        with self._lock:
            self._looks.append(look)
            self._open.append((sent, look))
        self.receive()

    def forget(self, pieces: Iterable[Piece]) -> None:
        """Nobody looks what an update has made of these pieces."""
        with self._lock:
            self._looks.append(Look([(piece, Role.MOVED) for piece in pieces], ()))
            self._judge()

    # -- what the training thread asks -------------------------------------------------------

    @property
    def pieces(self) -> list[Piece]:
        """Pieces that were copied, and still get gradients."""
        with self._lock:
            return [copied.piece for copied in self._copied.values()]

    @property
    def ended(self) -> bool:
        """Whether nothing is on its way."""
        return not self._open

    @property
    def oldest(self) -> CopyResult | None:
        """The sent copy that has been in flight for the longest time."""
        with self._lock:
            return self._open[0][0] if self._open else None

    @property
    def arriving(self) -> set[int]:
        """Pieces whose state is on its way, also of those that are followed no more."""
        with self._lock:
            states = [work for _, work in self._open if isinstance(work, StateCopies)]
            return {piece.index for work in states for piece in work.pieces}

    def problems(self) -> list[tuple[Piece, str]]:
        """Return what has turned out not to be replayable, and why."""
        with self._lock:
            found = [(copied.piece, copied.problem) for copied in self._copied.values()]
        return [(piece, problem) for piece, problem in found if problem is not None]

    @property
    def torn(self) -> set[int]:
        """Pieces that did not arrive as they were at their boundary."""
        with self._lock:
            return {index for index, copied in self._copied.items() if copied.torn}

    @property
    def doubtful(self) -> dict[int, str]:
        """Pieces that rounding must not explain: encoded gradients came, and what was wrong with them."""
        with self._lock:
            pieces = self._copied.items()
            return {
                index: copied.problem
                for index, copied in pieces
                if copied.encoded and copied.problem is not None
            }

    def probes(self) -> list[tuple[Piece, tuple[int, ...]]]:
        """Return where the probes stand of each piece that encoded gradients were sent for: now they must."""
        with self._lock:
            found = []
            for copied in self._copied.values():
                if copied.encoded:
                    copied.probes = copied.probes or self._chosen(copied) or spread(copied.count)
                    found.append((copied.piece, copied.probes))
            return found

    def posted(self) -> dict[int, int]:
        """Return how many gradients replay must have had, by piece, once all has arrived."""
        with self._lock:
            return {index: copied.sent - copied.skipped for index, copied in self._copied.items()}

    def drop(self, piece: Piece) -> None:
        """Drop a piece: afterwards nothing about it is handed to replay."""
        with self._lock:
            copied = self._copied.pop(piece.index, None)
            for gradient in () if copied is None else copied.gradients:
                gradient.dropped = True
                if gradient.landed:
                    self._ring.free(gradient.offset)

    def close(self) -> None:
        """The closing tick was taken: a change before it that is not known yet is for the proof to find."""
        with self._lock:
            self._closed = True

    def proofs(self) -> dict[int, tuple[int, ...]]:
        """Return what replay must arrive at, once all has arrived."""
        with self._lock:
            return {index: copied.proof for index, copied in self._copied.items() if copied.proof is not None}

    def stop(self) -> None:
        """Stop handing anything over."""
        with self._lock:
            self._over = True
            self.error = None
            gradients = [work for _, work in self._open if isinstance(work, GradientCopies)]
            self._kept |= {g.offset for copied in self._copied.values() for g in copied.gradients}
            self._kept |= {g.offset for work in gradients for g in work.gradients.values() if g.dropped}
            self._kept |= {work.numbers.offset for work in gradients if work.numbers is not None}
            self._open.clear()
            self._copied.clear()

    def release(self) -> None:
        """Free in the ring what was not handed over; after :meth:`stop`, once nothing is in flight."""
        with self._lock:
            kept, self._kept = self._kept, set()
            for offset in kept:
                self._ring.free(offset)

    # -- what has arrived, on whichever thread saw that --------------------------------------

    def arrived(self) -> None:
        """Go on with what has arrived, and tell whoever waits for the rest."""
        self.receive()
        on_rest = self.on_rest
        if on_rest is not None:
            on_rest()

    def receive(self) -> None:
        """Go on with what has arrived."""
        with self._lock:
            ended: list[tuple[CopyResult, Work]] = []
            left: list[tuple[CopyResult, Work]] = []
            for entry in self._open:
                # One look at each: what ends behind it is received next time, by whoever ended it.
                (ended if entry[0].done.is_set() else left).append(entry)
            if self._over or not ended:
                return
            self._open = left
            for sent, work in ended:
                self.error = self.error or sent.error
                if isinstance(work, Look):
                    self._take_look(sent, work)
                    continue
                self.nbytes += sent.nbytes
                if sent.ended > sent.began:
                    self.spans.append((sent.began, sent.ended))
                if isinstance(work, GradientCopies):
                    self._take_gradients(sent, work)
                    continue
                if isinstance(work, SampleCopies):
                    for request in sent.lost:
                        self._tear(work.places[request.offset])
                    continue
                self.sample = (self.sample[0] + sent.sample[0], self.sample[1] + sent.sample[1])
                if isinstance(work, StateCopies):
                    self._take_state(sent, work)
                else:
                    self.lost += [work.names[request.offset] for request in sent.lost]
            self._advance()

    def _take_state(self, sent: CopyResult, work: StateCopies) -> None:
        lost = {work.places[request.offset].index for request in sent.lost}
        for piece in work.pieces:
            copied = self._copied.get(piece.index)
            if copied is None:
                continue
            copied.here = True
            if sent.error is not None:
                blame(copied, str(sent.error), torn=True)
            elif piece.index in lost:
                blame(copied, OVERTAKEN, torn=True)

    def _take_gradients(self, sent: CopyResult, work: GradientCopies) -> None:
        for gradient in work.gradients.values():
            # After an error its place is left alone: nobody can say whether it is still written to.
            gradient.landed = sent.error is None
            if gradient.landed and gradient.dropped:
                self._ring.free(gradient.offset)
        lost = {request.offset for request in sent.lost}
        numbers = work.numbers
        if sent.error is not None or (
            numbers is not None and lost.intersection(o for o, _ in numbers.places)
        ):
            lost = set(work.gradients)
        for offset in lost & work.gradients.keys():
            self._blame(work.gradients[offset], NOT_ARRIVED)
        # Gradients come first in what was sent. Of one that has no fingerprint there is no seal either.
        expected = () if sent.error is not None else sent.expected
        for gradient, made in zip(work.gradients.values(), expected, strict=False):
            gradient.made = made
            if gradient.encoding is not None and gradient.landed and not gradient.dropped:
                self._look_into(gradient)
        if numbers is None:
            return
        if sent.error is None:
            values = [read_number(self._arena, *place) for place in numbers.places]
            self._ring.free(numbers.offset)
            if numbers.found_inf is not None:
                work.update.skipped = values[numbers.found_inf] != 0.0
            for pending, places, gradients in numbers.rows:
                row, why = row_of(pending, tuple(values[place] for place in places))
                for gradient in gradients:
                    gradient.row = row
                    if row is None:
                        self._blame(gradient, why)
        work.update.known = True

    def _look_into(self, gradient: GradientCopy) -> None:
        """Look whether an encoded gradient that has landed is one."""
        data = self._arena.view(gradient.offset, gradient.nbytes)
        copied = self._copied.get(gradient.piece.index)
        if copied is not None and copied.problem is None:
            # That of an update that was skipped is expected not to be.
            gradient.incomplete = incomplete(gradient.encoding, data, copied.count)

    def _chosen(self, copied: CopiedPiece) -> tuple[int, ...]:
        """Choose probes by the first gradient here that is not 0, of an update that was not skipped."""
        for gradient in copied.gradients:
            skipped = gradient.update.skipped or not gradient.update.known
            if not gradient.landed or gradient.encoding is None or skipped or gradient.incomplete:
                continue
            data = self._arena.view(gradient.offset, gradient.nbytes)
            if not empty(gradient.encoding, data, copied.count):
                return choose(gradient.encoding, data, copied.count)
        return ()

    def _tear(self, piece: Piece) -> None:
        copied = self._copied.get(piece.index)
        if copied is not None:
            blame(copied, OVERTAKEN, torn=True)

    def _take_look(self, sent: CopyResult, work: Look) -> None:
        work.values = sent.expected
        if sent.error is not None:
            work.rows = ()
        self._judge()

    def _judge(self) -> None:
        """Judge looks in the order in which they were taken."""
        while self._looks and (values := self._looks[0].values) is not None:
            start = 0
            for piece, role in self._looks.popleft().rows:
                stop = start + len(piece.stretches)
                now = tuple(values[start:stop]) or None
                start = stop
                copied = self._copied.get(piece.index)
                if copied is None:
                    continue
                copied.watched |= role is Role.FIRST
                if not copied.watched:
                    continue  # that was before it left: updates changed it meanwhile
                if role is Role.PROOF:
                    copied.proof = now
                unknown = None in (now, copied.known)
                if copied.encoded:
                    # Rounding would explain a small change: it must be seen by its bits, even now.
                    unknown = unknown and role is not Role.PROOF
                elif self._closed:
                    unknown = True
                if role in STILL and not unknown and now != copied.known:
                    blame(copied, STILL[role])
                copied.known = now

    def _blame(self, gradient: GradientCopy, why: str) -> None:
        copied = self._copied.get(gradient.piece.index)
        if copied is not None:
            blame(copied, why)

    def _advance(self) -> None:
        """Hand over what may be."""
        ready: list[Gradient] = []
        for copied in self._copied.values():
            while copied.here and copied.problem is None and copied.gradients:
                gradient = copied.gradients[0]
                if not gradient.landed or not gradient.update.known:
                    break
                if gradient.update.skipped:
                    self._ring.free(gradient.offset)
                    copied.skipped += 1
                elif gradient.row is None:
                    break
                elif gradient.incomplete:
                    blame(copied, BROKEN)
                    break
                else:
                    if gradient.encoding is not None and not copied.told:
                        copied.probes = copied.probes or self._chosen(copied)
                    ready.append(described(copied, gradient, gradient.row))
                copied.gradients.popleft()
        if ready and not self._over:
            # Under the lock: updates of a piece must not overtake each other.
            self._job.gradients(ready)
