"""Order of gradients from a device: each is released to replay once its piece's state has been verified.

State and gradients of a piece are copied at different moments, and arrive in any order. Replay gets an update
only after the piece's state and the update's gradient have arrived and were verified, its scalars are known,
and all earlier updates of the piece were released. The training thread reports what was sent, the stager's
thread what has arrived; neither waits for the other.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import torch

from gockpt.core.descriptors import Gradient
from gockpt.replay.gradient_encoding import empty, incomplete, sealed
from gockpt.replay.rounding_probes import choose_encoded, spread
from gockpt.saving.late_pieces import BROKEN, CHANGED, NOT_ARRIVED, OPTIONS, OVERTAKEN, UNSEEN

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gockpt.core.array_spec import Name
    from gockpt.replay.pending_scalars import LateNumbers
    from gockpt.saving.write_items import Piece
    from gockpt.staging.arena import Arena
    from gockpt.staging.gradient_ring import Ring
    from gockpt.staging.in_flight import Consignment
    from gockpt.workers.job_client import JobClient

    Row = tuple[float, ...]

__all__ = ["Follow", "Following", "Numbers", "Role", "Update"]


class Role(Enum):
    """Meaning of a fingerprint of a piece that was copied."""

    FIRST = "what it is as it leaves"
    SAME = "what it must still be"
    MOVED = "what its update has made of it"
    TOUCHED = "what it must still be, although its optimizer has stepped"
    PROOF = "what replay must arrive at"


_STILL = {Role.SAME: CHANGED, Role.TOUCHED: UNSEEN, Role.PROOF: CHANGED}
"""Roles in which a piece must be what it was before, and what is wrong if it is not."""


@dataclass(slots=True, eq=False)
class Update:
    """One update by one optimizer.

    Attributes:
        known: Whether it is known what became of it.
        skipped: Whether it changed nothing, as a gradient scaler's that found an infinity.
    """

    known: bool = False
    skipped: bool = False


@dataclass(slots=True, eq=False)
class Follow:
    """One update's gradient of one piece, on its way into the ring.

    Attributes:
        piece: The piece.
        update: The update.
        offset: Where the gradient goes.
        nbytes: How many bytes it has.
        encoding: How it is encoded; ``None`` for as it is.
        number: Which of its piece it is, counted from 1; 0 where gradients are not sealed.
        row: The kernel's numbers; ``None`` while they are on their way.
        landed: Whether nothing is written to its place any longer.
        dropped: Whether it is no longer needed.
        incomplete: Whether it has landed without blocks with an Inf or NaN, and so is none.
        made: The fingerprint of its bytes, as the device took it, once it has landed.
    """

    piece: Piece
    update: Update
    offset: int
    nbytes: int
    encoding: str | None = None
    number: int = 0
    row: Row | None = None
    landed: bool = False
    dropped: bool = False
    incomplete: bool = False
    made: int | None = None


@dataclass(slots=True, eq=False)
class Numbers:
    """Numbers of one update on their way, in one block of the ring.

    Attributes:
        offset: Where the block is.
        places: Offset and dtype of each number.
        found_inf: Which of them says that the update was skipped; ``None`` for none of them.
        rows: Who needs which of them.
    """

    offset: int
    places: list[tuple[int, torch.dtype]]
    found_inf: int | None
    rows: list[tuple[LateNumbers, tuple[int, ...], list[Follow]]]


@dataclass(slots=True, eq=False)
class _Lane:
    """One piece. With ``encoded`` gradients behind it, its replay can't be proven by its bits.

    ``sent`` counts its gradients, ``skipped`` those of updates that were skipped; ``probes`` is where the
    runs of its probes begin, ``()`` while that is not chosen; ``told`` whether replay was told of them.
    """

    piece: Piece
    here: bool = False
    problem: str | None = None
    torn: bool = False
    watched: bool = False
    known: tuple[int, ...] | None = None
    proof: tuple[int, ...] | None = None
    follows: deque[Follow] = field(default_factory=deque)
    encoded: bool = False
    sent: int = 0
    skipped: int = 0
    probes: tuple[int, ...] = ()
    told: bool = False

    @property
    def count(self) -> int:
        """Elements of the piece."""
        stretch = self.piece.stretches[0]
        return stretch.stop - stretch.start


@dataclass(slots=True, eq=False)
class _State:
    places: dict[int, Piece]
    pieces: Sequence[Piece]


@dataclass(slots=True, eq=False)
class _Gradients:
    follows: dict[int, Follow]
    update: Update
    numbers: Numbers | None


@dataclass(slots=True, eq=False)
class _Look:
    rows: Sequence[tuple[Piece, Role]]
    values: Sequence[int] | None = None


@dataclass(slots=True, eq=False)
class _Rest:
    names: dict[int, Name]


@dataclass(slots=True, eq=False)
class _Samples:
    places: dict[int, Piece]


_Load = _State | _Gradients | _Look | _Rest | _Samples


class Following:
    """The pieces of one attempt that left a device, and what follows them. Thread-safe.

    Attributes:
        nbytes: Bytes that have arrived.
        sample: Bytes and seconds that tell how fast state leaves.
        spans: When what has arrived was sent, and when it was there, in ``perf_counter`` seconds.
        lost: Arrays that left at the closing tick and arrived otherwise.
        error: Why something did not arrive at all; ``None`` if all has, or still may.
    """

    def __init__(self, ring: Ring, arena: Arena, job: JobClient) -> None:
        """Follow pieces.

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
        self._ring = ring
        self._arena = arena
        self._job = job
        self._lock = threading.Lock()
        self._lanes: dict[int, _Lane] = {}
        self._open: list[tuple[Consignment, _Load]] = []
        self._looks: deque[_Look] = deque()
        self._kept: set[int] = set()
        self._closed = False
        self._over = False

    # -- what was sent, by the training thread -----------------------------------------------

    def state(self, pieces: Sequence[Piece], sent: Consignment) -> None:
        """Some pieces were sent: replay may begin once they have arrived."""
        places = {stretch.offset: piece for piece in pieces for stretch in piece.stretches}
        with self._lock:
            for piece in pieces:
                self._lanes[piece.index] = _Lane(piece)
            self._open.append((sent, _State(places, pieces)))
        self.receive()

    def gradients(
        self, follows: Sequence[Follow], update: Update, sent: Consignment, numbers: Numbers | None = None
    ) -> None:
        """Some gradients were sent, in the order of updates for each piece, maybe with numbers."""
        with self._lock:
            for follow in follows:
                lane = self._lanes.get(follow.piece.index)
                if lane is None:
                    follow.dropped = True
                else:
                    lane.follows.append(follow)
                    lane.sent += 1
                    lane.encoded |= follow.encoding is not None
            self._open.append((sent, _Gradients({f.offset: f for f in follows}, update, numbers)))
        self.receive()

    def settle(self, update: Update, *, skipped: bool = False) -> None:
        """Record that an update's scalars are known, and whether it was skipped."""
        with self._lock:
            update.known, update.skipped = True, skipped
            self._advance()

    def samples(self, places: dict[int, Piece], sent: Consignment) -> None:
        """Live values of probes were sent at the closing tick; ``places`` says which piece's go where."""
        with self._lock:
            self._open.append((sent, _Samples(places)))
        self.receive()

    def rest(self, pieces: Sequence[Piece], sent: Consignment) -> None:
        """Some pieces were sent at the closing tick: nothing follows them."""
        names = {stretch.offset: stretch.name for piece in pieces for stretch in piece.stretches}
        with self._lock:
            self._open.append((sent, _Rest(names)))
        self.receive()

    def look(self, rows: Sequence[tuple[Piece, Role]], sent: Consignment) -> None:
        """Fingerprints of what each piece is now were sent for, stretch by stretch."""
        look = _Look(rows)
        with self._lock:
            self._looks.append(look)
            self._open.append((sent, look))
        self.receive()

    def forget(self, pieces: Iterable[Piece]) -> None:
        """Nobody looks what an update has made of these pieces."""
        with self._lock:
            self._looks.append(_Look([(piece, Role.MOVED) for piece in pieces], ()))
            self._judge()

    # -- what the training thread asks -------------------------------------------------------

    @property
    def pieces(self) -> list[Piece]:
        """Pieces that were copied, and still get gradients."""
        with self._lock:
            return [lane.piece for lane in self._lanes.values()]

    @property
    def ended(self) -> bool:
        """Whether nothing is on its way."""
        return not self._open

    @property
    def oldest(self) -> Consignment | None:
        """The sent copy that has been in flight for the longest time."""
        with self._lock:
            return self._open[0][0] if self._open else None

    @property
    def arriving(self) -> set[int]:
        """Pieces whose state is on its way, also of those that are followed no more."""
        with self._lock:
            states = [load for _, load in self._open if isinstance(load, _State)]
            return {piece.index for load in states for piece in load.pieces}

    def problems(self) -> list[tuple[Piece, str]]:
        """Return what has turned out not to be replayable, and why."""
        with self._lock:
            found = [(lane.piece, lane.problem) for lane in self._lanes.values()]
        return [(piece, problem) for piece, problem in found if problem is not None]

    @property
    def torn(self) -> set[int]:
        """Pieces that did not arrive as they were at their boundary."""
        with self._lock:
            return {index for index, lane in self._lanes.items() if lane.torn}

    @property
    def doubtful(self) -> dict[int, str]:
        """Pieces that rounding must not explain: encoded gradients came, and what was wrong with them."""
        with self._lock:
            lanes = self._lanes.items()
            return {index: lane.problem for index, lane in lanes if lane.encoded and lane.problem is not None}

    def probes(self) -> list[tuple[Piece, tuple[int, ...]]]:
        """Return where the probes stand of each piece that encoded gradients were sent for: now they must."""
        with self._lock:
            found = []
            for lane in self._lanes.values():
                if lane.encoded:
                    lane.probes = lane.probes or self._chosen(lane) or spread(lane.count)
                    found.append((lane.piece, lane.probes))
            return found

    def posted(self) -> dict[int, int]:
        """Return how many gradients replay must have had, by piece, once all has arrived."""
        with self._lock:
            return {index: lane.sent - lane.skipped for index, lane in self._lanes.items()}

    def drop(self, piece: Piece) -> None:
        """Drop a piece: afterwards nothing about it is handed to replay."""
        with self._lock:
            lane = self._lanes.pop(piece.index, None)
            for follow in () if lane is None else lane.follows:
                follow.dropped = True
                if follow.landed:
                    self._ring.free(follow.offset)

    def close(self) -> None:
        """The closing tick was taken: what changed before it is for the proof to find."""
        with self._lock:
            self._closed = True

    def proofs(self) -> dict[int, tuple[int, ...]]:
        """Return what replay must arrive at, once all has arrived."""
        with self._lock:
            return {index: lane.proof for index, lane in self._lanes.items() if lane.proof is not None}

    def stop(self) -> None:
        """Stop handing anything over."""
        with self._lock:
            self._over = True
            self.error = None
            gradients = [load for _, load in self._open if isinstance(load, _Gradients)]
            self._kept |= {f.offset for lane in self._lanes.values() for f in lane.follows}
            self._kept |= {f.offset for load in gradients for f in load.follows.values() if f.dropped}
            self._kept |= {load.numbers.offset for load in gradients if load.numbers is not None}
            self._open.clear()
            self._lanes.clear()

    def release(self) -> None:
        """Free in the ring what was not handed over; after :meth:`stop`, once nothing is in flight."""
        with self._lock:
            kept, self._kept = self._kept, set()
            for offset in kept:
                self._ring.free(offset)

    # -- what has arrived, on whichever thread saw that --------------------------------------

    def receive(self) -> None:
        """Go on with what has arrived."""
        with self._lock:
            ended: list[tuple[Consignment, _Load]] = []
            left: list[tuple[Consignment, _Load]] = []
            for entry in self._open:
                # One look at each: what ends behind it is received next time, by whoever ended it.
                (ended if entry[0].done.is_set() else left).append(entry)
            if self._over or not ended:
                return
            self._open = left
            for sent, load in ended:
                self.error = self.error or sent.error
                if isinstance(load, _Look):
                    self._take_look(sent, load)
                    continue
                self.nbytes += sent.nbytes
                self.spans.append((sent.began, sent.ended))
                if isinstance(load, _Gradients):
                    self._take_gradients(sent, load)
                    continue
                if isinstance(load, _Samples):
                    for shipment in sent.lost:
                        self._tear(load.places[shipment.offset])
                    continue
                self.sample = (self.sample[0] + sent.sample[0], self.sample[1] + sent.sample[1])
                if isinstance(load, _State):
                    self._take_state(sent, load)
                else:
                    self.lost += [load.names[shipment.offset] for shipment in sent.lost]
            self._advance()

    def _take_state(self, sent: Consignment, load: _State) -> None:
        lost = {load.places[shipment.offset].index for shipment in sent.lost}
        for piece in load.pieces:
            lane = self._lanes.get(piece.index)
            if lane is None:
                continue
            lane.here = True
            if sent.error is not None:
                _blame(lane, str(sent.error), torn=True)
            elif piece.index in lost:
                _blame(lane, OVERTAKEN, torn=True)

    def _take_gradients(self, sent: Consignment, load: _Gradients) -> None:
        for follow in load.follows.values():
            # After an error its place is left alone: nobody can say whether it is still written to.
            follow.landed = sent.error is None
            if follow.landed and follow.dropped:
                self._ring.free(follow.offset)
        lost = {shipment.offset for shipment in sent.lost}
        numbers = load.numbers
        if sent.error is not None or (
            numbers is not None and lost.intersection(o for o, _ in numbers.places)
        ):
            lost = set(load.follows)
        for offset in lost & load.follows.keys():
            self._blame(load.follows[offset], NOT_ARRIVED)
        # Gradients come first in what was sent. Of one that has no fingerprint there is no seal either.
        expected = () if sent.error is not None else sent.expected
        for follow, made in zip(load.follows.values(), expected, strict=False):
            follow.made = made
            if follow.encoding is not None and follow.landed and not follow.dropped:
                self._look_into(follow)
        if numbers is None:
            return
        if sent.error is None:
            values = [_number(self._arena, *place) for place in numbers.places]
            self._ring.free(numbers.offset)
            if numbers.found_inf is not None:
                load.update.skipped = values[numbers.found_inf] != 0.0
            for late, places, follows in numbers.rows:
                row, why = _row(late, tuple(values[place] for place in places))
                for follow in follows:
                    follow.row = row
                    if row is None:
                        self._blame(follow, why)
        load.update.known = True

    def _look_into(self, follow: Follow) -> None:
        """Look whether an encoded gradient that has landed is one."""
        data = self._arena.view(follow.offset, follow.nbytes)
        lane = self._lanes.get(follow.piece.index)
        if lane is not None and lane.problem is None:
            # That of an update that was skipped is expected not to be.
            follow.incomplete = incomplete(follow.encoding, data, lane.count)

    def _chosen(self, lane: _Lane) -> tuple[int, ...]:
        """Choose probes by the first gradient here that is not 0, of an update that was not skipped."""
        for follow in lane.follows:
            skipped = follow.update.skipped or not follow.update.known
            if not follow.landed or follow.encoding is None or skipped or follow.incomplete:
                continue
            data = self._arena.view(follow.offset, follow.nbytes)
            if not empty(follow.encoding, data, lane.count):
                return choose_encoded(follow.encoding, data, lane.count)
        return ()

    def _tear(self, piece: Piece) -> None:
        lane = self._lanes.get(piece.index)
        if lane is not None:
            _blame(lane, OVERTAKEN, torn=True)

    def _take_look(self, sent: Consignment, load: _Look) -> None:
        load.values = sent.expected
        if sent.error is not None:
            load.rows = ()
        self._judge()

    def _judge(self) -> None:
        """Judge looks in the order in which they were taken."""
        while self._looks and (values := self._looks[0].values) is not None:
            start = 0
            for piece, role in self._looks.popleft().rows:
                stop = start + len(piece.stretches)
                now = tuple(values[start:stop]) or None
                start = stop
                lane = self._lanes.get(piece.index)
                if lane is None:
                    continue
                lane.watched |= role is Role.FIRST
                if not lane.watched:
                    continue  # that was before it left: updates changed it meanwhile
                if role is Role.PROOF:
                    lane.proof = now
                if lane.encoded:
                    # Rounding would explain a small change: it must be seen by its bits, even now.
                    unknown = None in (now, lane.known) and role is not Role.PROOF
                    if role in _STILL and not unknown and now != lane.known:
                        _blame(lane, _STILL[role])
                elif role is Role.PROOF:
                    pass
                elif not self._closed and None not in (now, lane.known) and now != lane.known:
                    if role is Role.SAME:
                        _blame(lane, CHANGED)
                    elif role is Role.TOUCHED:
                        _blame(lane, UNSEEN)
                lane.known = now

    def _blame(self, follow: Follow, why: str) -> None:
        lane = self._lanes.get(follow.piece.index)
        if lane is not None:
            _blame(lane, why)

    def _advance(self) -> None:
        """Hand over what may be."""
        ready: list[Gradient] = []
        for lane in self._lanes.values():
            while lane.here and lane.problem is None and lane.follows:
                follow = lane.follows[0]
                if not follow.landed or not follow.update.known:
                    break
                if follow.update.skipped:
                    self._ring.free(follow.offset)
                    lane.skipped += 1
                elif follow.row is None:
                    break
                elif follow.incomplete:
                    _blame(lane, BROKEN)
                    break
                else:
                    if follow.encoding is not None and not lane.told:
                        lane.probes = lane.probes or self._chosen(lane)
                    ready.append(_gradient(lane, follow, follow.row))
                lane.follows.popleft()
        if ready and not self._over:
            # Under the lock: updates of a piece must not overtake each other.
            self._job.gradients(ready)


def _gradient(lane: _Lane, follow: Follow, row: Row) -> Gradient:
    """Describe a gradient to replay, sealed if its piece may be replayed from encoded ones."""
    # Not by its bytes: by what the device said of them.
    seal = None
    if follow.number:
        index = follow.piece.index
        made = follow.made
        seal = -1 if made is None else sealed(made, index, follow.encoding, follow.number, row)
    probes: tuple[int, ...] = ()
    if follow.encoding is not None and not lane.told and lane.probes:
        lane.told, probes = True, lane.probes
    return Gradient(
        follow.piece.index, follow.offset, follow.nbytes, row, follow.encoding, probes, seal, follow.number
    )


def _blame(lane: _Lane, why: str, *, torn: bool = False) -> None:
    lane.torn |= torn
    if lane.problem is None:
        lane.problem = why


def _row(late: LateNumbers, values: Row) -> tuple[Row | None, str]:
    """Return the kernel's numbers, or why there are none."""
    try:
        return late.row(values), OPTIONS
    except Exception as error:  # noqa: BLE001 - whatever a rule raises: the piece leaves at the close
        return None, f"its numbers can't be used: {type(error).__name__}: {error}"


def _number(arena: Arena, offset: int, dtype: torch.dtype) -> float:
    content = bytearray(arena.view(offset, dtype.itemsize).tobytes())
    return float(torch.frombuffer(content, dtype=dtype).item())
