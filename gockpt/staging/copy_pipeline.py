"""The copy pipeline: packs, copies and receives batches. Queues work on the device, and decides nothing.

A pipeline is not thread-safe; its owner calls ``snapshot``, ``move``, ``let_go``, ``forget``, ``add`` and
``remove`` under a lock.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from gockpt.kernels.fingerprint_numba import copy_fingerprint, fingerprint
from gockpt.staging.copy_batches import cut_batches
from gockpt.staging.pinned_memory import Pinned
from gockpt.staging.stager import Source, Urgency
from gockpt.staging.staging_buffers import StagingBuffers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from gockpt.staging.arena import Arena
    from gockpt.staging.copy_batches import Batch, Slice
    from gockpt.staging.device import Device, Stream
    from gockpt.staging.device_budget import Room
    from gockpt.staging.in_flight import BatchCopy, DeviceCopyResult

    Bytes = npt.NDArray[np.uint8]

__all__ = ["CopyPipeline"]

_log = logging.getLogger("gockpt")

_stranded: list[object] = []
"""Memory that an unresponsive device may still write to: never freed, never reused."""


class CopyPipeline:
    """Staging buffers, streams and registered arenas of one device stager.

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
        self._staging = StagingBuffers(device, room, bounced=self.detour)
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

    def reaches(self, arena: Arena | None) -> bool:
        """Whether batches may go into this arena."""
        return any(pinned.arena is arena for pinned in self._pinned)

    def pin(self, arena: Arena) -> Pinned:
        """Register one more arena, if that can be. Slow."""
        return Pinned(self.device, arena, piece_bytes=self._piece_bytes)

    def add(self, pinned: Pinned) -> None:
        """Let batches go into an arena that was registered."""
        self._pinned.append(pinned)

    def remove(self) -> Pinned:
        """Stop copying batches into the arena that was added last."""
        return self._pinned.pop()

    def main(self) -> Stream:
        """Return the stream that the calling thread trains on, and remember it for :meth:`await_all`."""
        self._main = self.device.main()
        return self._main

    def cut_batches(self, result: DeviceCopyResult) -> list[Batch]:
        """Cut a result into batches."""
        return cut_batches(
            result.requests,
            slot_bytes=self._room.slot_bytes,
            copy_bytes=self._copy_bytes,
            piece_bytes=self._piece_bytes,
            direct=self._direct and result.urgency is Urgency.STATE,
        )

    def snapshot(self, copy: BatchCopy, main: Stream) -> bool:
        """Pack a batch into scratch memory on the stream that trains, if there is room for it."""
        room = self._staging.scratch(copy.batch.used)
        if room is None:
            return False
        copy.memory, copy.base = room
        copy.beside = False
        self._pack(copy, main)
        return True

    def in_the_way(self) -> BatchCopy | None:
        """Return the batch that the host must receive before another can move; only on the detour."""
        return self._staging.next.copy if self.detour else None

    def move(self, copy: BatchCopy, stream: Stream) -> None:
        """Queue a batch's pack, unless it was snapshotted, and its copies.

        The pack waits, on the device, until the batch that had its slot before has left it.
        """
        batch = copy.batch
        if batch.piece is not None:
            arena, start = batch.piece
            copy.memory = self._piece(arena, start)
        elif copy.memory is None or self.detour:
            before = self._staging.next.copy
            if before is not None and before.landed is not None:
                stream.wait(before.landed)
            copy.slot = self._staging.take(copy)
            copy.memory = copy.slot.memory if copy.memory is None else copy.memory
        if copy.packed is None:
            if stream is self.beside:
                stream.wait(copy.result.boundary)
            self._pack(copy, stream)
        if batch.piece is not None:
            copy.landed = copy.packed
            return
        with self.device.range("gockpt copy"):
            if copy.packed is not None:
                self._copy.wait(copy.packed)
            for place, target in self._targets(copy):
                self.device.copy(self._copy, copy.memory, copy.base + place, target)
            copy.landed = self._copy.record()

    def arrival(self, copy: BatchCopy) -> list[tuple[int, int]]:
        """Return the number and the fingerprint of each slice that arrived; on the detour, carry it on."""
        with self.device.range("gockpt arrival"):
            return [(piece.number, self._arrival(copy, piece)) for piece in copy.batch.slices]

    def made(self, copy: BatchCopy) -> list[tuple[int, int]]:
        """Return the number and the fingerprint of each slice that was encoded, as the device made it."""
        if copy.prints is None:
            return []
        numbers = (piece.number for piece in copy.batch.slices if piece.request.form is not None)
        return list(zip(numbers, copy.prints.values(), strict=True))

    def let_go(self, copy: BatchCopy) -> None:
        """Free what a batch had that has landed and was received."""
        copy.over = True
        copy.keep.clear()
        if copy.slot is not None and copy.slot.copy is copy:
            copy.slot.copy = None
        if copy.result.urgency is Urgency.SNAPSHOT and not copy.beside:
            self._staging.drained()

    def await_all(self, error: BaseException) -> None:
        """Wait until the device has done all that was queued, whatever of it failed."""
        try:
            # All of what these streams hold: a batch that failed half-way left no event behind.
            for stream in (self._main, self.beside, self._copy):
                if stream is not None:
                    stream.record().synchronize()
        except Exception:  # noqa: BLE001 - whatever the driver raises
            # It can't be asked any more: what it might still write to is never used again.
            _log.exception("%s does not answer after %s", self.device.name, error)
            self.dead = True

    def forget(self, copies: Sequence[BatchCopy]) -> None:
        """Drop batches that failed, once :meth:`await_all` has returned."""
        for copy in copies:
            copy.over = True
            if self.dead:
                _stranded.append(copy)
            copy.keep = []
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

    def _pack(self, copy: BatchCopy, stream: Stream) -> None:
        plain = [piece for piece in copy.batch.slices if piece.request.form is None]
        encoded = [piece for piece in copy.batch.slices if piece.request.form is not None]
        with self.device.range("gockpt pack"):
            if plain:
                sources = [piece.request.source.part(piece.low, piece.nbytes) for piece in plain]
                places = [copy.base + piece.place for piece in plain]
                copy.keep.append(self.device.pack(stream, sources, places, copy.memory))
            if encoded:
                self._encode(copy, encoded, stream)
            copy.packed = stream.record()

    def _encode(self, copy: BatchCopy, pieces: Sequence[Slice], stream: Stream) -> None:
        """Encode some slices into the slot, and fingerprint there what that has made of them."""
        by_encoding: dict[str, list[Slice]] = {}
        for piece in pieces:
            form = piece.request.form
            if form is not None and form.encoding is not None:
                by_encoding.setdefault(form.encoding, []).append(piece)
        for encoding, some in by_encoding.items():
            sources = [piece.request.source for piece in some]
            places = [(copy.base + piece.place, piece.nbytes) for piece in some]
            copy.keep.append(self.device.encode(stream, sources, encoding, places, copy.memory))
        made = [Source(copy.memory, copy.base + p.place, p.nbytes, p.request.source.position) for p in pieces]
        copy.prints = self.device.prints(stream, made)

    def _targets(self, copy: BatchCopy) -> Iterator[tuple[int, Bytes]]:
        """Yield each copy of a batch: where it starts in the batch, and where it goes."""
        bounce = None if copy.slot is None else copy.slot.bounce
        for part in copy.batch.copies:
            if bounce is not None:
                yield part.place, bounce[part.place : part.place + part.nbytes]
            else:
                yield part.place, self._pinned[part.arena].arena.view(part.offset, part.nbytes)

    def _piece(self, arena: int, start: int) -> Bytes:
        whole = self._pinned[arena].arena
        return whole.view(start, min(self._piece_bytes, whole.nbytes - start))

    def _arrival(self, copy: BatchCopy, piece: Slice) -> int:
        position = piece.request.source.position + piece.low
        target = self._pinned[piece.request.arena].arena.view(piece.offset, piece.nbytes)
        if copy.slot is None or copy.slot.bounce is None:
            return fingerprint(target, position)
        inside = copy.slot.bounce[piece.place : piece.place + piece.nbytes]
        return copy_fingerprint(inside, target, position)
