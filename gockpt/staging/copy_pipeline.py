"""The line that loads move along: pack, copy, arrival. Queues work on the device, and decides nothing.

A line is not thread-safe; its owner calls :meth:`Line.photograph`, :meth:`Line.move`, :meth:`Line.let_go`,
:meth:`Line.forget`, :meth:`Line.add` and :meth:`Line.remove` under a lock.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from gockpt.kernels.fingerprint_numba import copy_fingerprint, fingerprint
from gockpt.staging.copy_batches import Urgency, load_up
from gockpt.staging.device import Source
from gockpt.staging.pinned_memory import Pinned
from gockpt.staging.staging_buffers import Staging

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from gockpt.staging.arena import Arena
    from gockpt.staging.copy_batches import Load, Slice
    from gockpt.staging.device import Device, Stream
    from gockpt.staging.device_budget import Room
    from gockpt.staging.in_flight import Consignment, Flight

    Bytes = npt.NDArray[np.uint8]

__all__ = ["Line"]

_log = logging.getLogger("gockpt")

_stranded: list[object] = []
"""Memory that an unresponsive device may still write to: never freed, never reused."""


class Line:
    """Staging, streams and registered arenas of one road.

    Attributes:
        detour: Whether an arena could not be registered, so that the host must carry every slot on.
        beside: The stream that packs behind training.
        dead: Whether the device no longer responds.
    """

    def __init__(
        self,
        device: Device,
        arenas: Sequence[Arena],
        room: Room,
        *,
        direct: bool,
        copy_bytes: int,
        piece_bytes: int,
    ) -> None:
        """Register the arenas. Slow."""
        self.device = device
        self.dead = False
        self._room = room
        self._copy_bytes = copy_bytes
        self._piece_bytes = piece_bytes
        self._pinned = [Pinned(device, arena, piece_bytes=piece_bytes) for arena in arenas]
        self.detour = not all(pinned.registered for pinned in self._pinned)
        self._direct = direct and not self.detour
        self._staging = Staging(device, room, bounced=self.detour)
        self.beside, self._copy = device.side(), device.side()
        self._main: Stream | None = None

    @property
    def slot_bytes(self) -> int:
        """The most that leaves in one piece."""
        return self._room.slot_bytes

    @property
    def variant(self) -> str:
        """Way of the bytes into the arena, in a few words."""
        if self.detour:
            reasons = sorted({pinned.reason for pinned in self._pinned if pinned.reason})
            return "staging, the copy engine, and a detour through pinned memory: " + "; ".join(reasons)
        if self._direct:
            return "kernels that store into registered memory"
        return "staging and the copy engine"

    def pin(self, arena: Arena) -> Pinned:
        """Register one more arena, if that can be. Slow."""
        return Pinned(self.device, arena, piece_bytes=self._piece_bytes)

    def add(self, pinned: Pinned) -> None:
        """Let loads go into an arena that was registered."""
        self._pinned.append(pinned)

    def remove(self) -> Pinned:
        """Stop copying loads into the arena that was added last."""
        return self._pinned.pop()

    def main(self) -> Stream:
        """Return the stream that the calling thread trains on, and remember it for :meth:`await_all`."""
        self._main = self.device.main()
        return self._main

    def load_up(self, consignment: Consignment) -> list[Load]:
        """Cut a consignment into loads."""
        return load_up(
            consignment.shipments,
            slot_bytes=self._room.slot_bytes,
            copy_bytes=self._copy_bytes,
            piece_bytes=self._piece_bytes,
            direct=self._direct and consignment.urgency is Urgency.STATE,
        )

    def photograph(self, flight: Flight, main: Stream) -> bool:
        """Pack a load into scratch memory on the stream that trains, if there is room for it."""
        room = self._staging.scratch(flight.load.used)
        if room is None:
            return False
        flight.memory, flight.base = room
        flight.beside = False
        self._pack(flight, main)
        return True

    def in_the_way(self) -> Flight | None:
        """Return the load that the host must receive before another can move; only on the detour."""
        return self._staging.next.flight if self.detour else None

    def move(self, flight: Flight, stream: Stream) -> None:
        """Queue a load's pack, unless it was photographed, and its copies.

        The pack waits, on the device, until the load that had its slot before has left it.
        """
        load = flight.load
        if load.piece is not None:
            arena, start = load.piece
            flight.memory = self._piece(arena, start)
        elif flight.memory is None or self.detour:
            before = self._staging.next.flight
            if before is not None and before.landed is not None:
                stream.wait(before.landed)
            flight.slot = self._staging.take(flight)
            flight.memory = flight.slot.memory if flight.memory is None else flight.memory
        if flight.packed is None:
            if stream is self.beside:
                stream.wait(flight.consignment.boundary)
            self._pack(flight, stream)
        if load.piece is not None:
            flight.landed = flight.packed
            return
        with self.device.range("gockpt copy"):
            if flight.packed is not None:
                self._copy.wait(flight.packed)
            for place, target in self._targets(flight):
                self.device.copy(self._copy, flight.memory, flight.base + place, target)
            flight.landed = self._copy.record()

    def arrival(self, flight: Flight) -> list[tuple[int, int]]:
        """Return the number and the fingerprint of each slice that arrived; on the detour, carry it on."""
        with self.device.range("gockpt arrival"):
            return [(piece.number, self._arrival(flight, piece)) for piece in flight.load.slices]

    def made(self, flight: Flight) -> list[tuple[int, int]]:
        """Return the number and the fingerprint of each slice that was encoded, as the device made it."""
        if flight.prints is None:
            return []
        numbers = (piece.number for piece in flight.load.slices if piece.shipment.form is not None)
        return list(zip(numbers, flight.prints.values(), strict=True))

    def let_go(self, flight: Flight) -> None:
        """Free what a load had that has landed and was received."""
        flight.over = True
        flight.keep.clear()
        if flight.slot is not None and flight.slot.flight is flight:
            flight.slot.flight = None
        if flight.consignment.urgency is Urgency.SNAPSHOT and not flight.beside:
            self._staging.drained()

    def await_all(self, error: BaseException) -> None:
        """Wait until the device has done all that was queued, whatever of it failed."""
        try:
            # All of what these streams hold: a load that failed half-way left no event behind.
            for stream in (self._main, self.beside, self._copy):
                if stream is not None:
                    stream.record().synchronize()
        except Exception:  # noqa: BLE001 - whatever the driver raises
            # It can't be asked any more: what it might still write to is never used again.
            _log.exception("%s does not answer after %s", self.device.name, error)
            self.dead = True

    def forget(self, flights: Sequence[Flight]) -> None:
        """Drop loads that failed, once :meth:`await_all` has returned."""
        for flight in flights:
            flight.over = True
            if self.dead:
                _stranded.append(flight)
            flight.keep = []
        self._staging.free()

    def release(self) -> None:
        """Give all memory back, and unregister the arenas. Nothing may be under way. Raises nothing."""
        everything = (self._pinned, self._staging)
        if self.dead:
            _stranded.append(everything)
            return
        try:
            self._staging.release()
            for pinned in self._pinned:
                pinned.release()
        except Exception:  # noqa: BLE001 - whatever the driver raises: it is logged, and nothing is reused
            _stranded.append(everything)
            _log.exception("memory of %s could not be given back; it is left alone", self.device.name)

    def _pack(self, flight: Flight, stream: Stream) -> None:
        plain = [piece for piece in flight.load.slices if piece.shipment.form is None]
        encoded = [piece for piece in flight.load.slices if piece.shipment.form is not None]
        with self.device.range("gockpt pack"):
            if plain:
                sources = [piece.shipment.source.part(piece.low, piece.nbytes) for piece in plain]
                places = [flight.base + piece.place for piece in plain]
                flight.keep.append(self.device.pack(stream, sources, places, flight.memory))
            if encoded:
                self._encode(flight, encoded, stream)
            flight.packed = stream.record()

    def _encode(self, flight: Flight, pieces: Sequence[Slice], stream: Stream) -> None:
        """Encode some slices into the slot, and fingerprint there what that has made of them."""
        by_encoding: dict[str, list[Slice]] = {}
        for piece in pieces:
            form = piece.shipment.form
            if form is not None and form.encoding is not None:
                by_encoding.setdefault(form.encoding, []).append(piece)
        for encoding, some in by_encoding.items():
            sources = [piece.shipment.source for piece in some]
            places = [(flight.base + piece.place, piece.nbytes) for piece in some]
            flight.keep.append(self.device.encode(stream, sources, encoding, places, flight.memory))
        made = [
            Source(flight.memory, flight.base + p.place, p.nbytes, p.shipment.source.position) for p in pieces
        ]
        flight.prints = self.device.prints(stream, made)

    def _targets(self, flight: Flight) -> Iterator[tuple[int, Bytes]]:
        """Yield each copy of a load: where it starts in the load, and where it goes."""
        bounce = None if flight.slot is None else flight.slot.bounce
        for copy in flight.load.copies:
            if bounce is not None:
                yield copy.place, bounce[copy.place : copy.place + copy.nbytes]
            else:
                yield copy.place, self._pinned[copy.arena].arena.view(copy.offset, copy.nbytes)

    def _piece(self, arena: int, start: int) -> Bytes:
        whole = self._pinned[arena].arena
        return whole.view(start, min(self._piece_bytes, whole.nbytes - start))

    def _arrival(self, flight: Flight, piece: Slice) -> int:
        position = piece.shipment.source.position + piece.low
        target = self._pinned[piece.shipment.arena].arena.view(piece.offset, piece.nbytes)
        if flight.slot is None or flight.slot.bounce is None:
            return fingerprint(target, position)
        inside = flight.slot.bounce[piece.place : piece.place + piece.nbytes]
        return copy_fingerprint(inside, target, position)
