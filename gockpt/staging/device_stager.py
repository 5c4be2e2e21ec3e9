"""Moving bytes from device memory into the arena, behind the training step.

Everything is ordered on the device, by events; the training thread only queues work:

1. At a boundary the sources are fingerprinted on the stream that trains, and an event is recorded there.
2. What is due at once (buffers, gradients, snapshots) is packed on that same stream, so nothing that is
   queued later can overwrite it first. All else is packed on a side stream that waits for the event.
3. A copy stream waits for the pack and copies the slot into the arena. The next pack into that slot waits
   for the copy, on the device.
4. Before an update, the training stream waits for the packs of what the update overwrites: for no other
   batch, and for no copy. References are held until the host has seen the end.
5. What has landed is fingerprinted on the host, and compared with the boundary's fingerprint.

So no lock, queue or copy ever holds up the training thread. The exception is the detour, where the arena
could not be registered: there the host must carry each slot on before it can be used again.
"""

from __future__ import annotations

import heapq
import logging
import threading
from typing import TYPE_CHECKING

from gockpt.core.descriptors import ArenaId
from gockpt.errors import SaveAborted, SaveError
from gockpt.kernels.gradient16_launch import form_of
from gockpt.staging.copy_batches import Batch
from gockpt.staging.device_budget import COPY_BYTES
from gockpt.staging.device_queue import DeviceQueue, concerns
from gockpt.staging.in_flight import BatchCopy, DeviceCopyResult
from gockpt.staging.pinned_memory import PIECE_BYTES
from gockpt.staging.stager import CopyRequest, Urgency

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Sequence
    from typing import Any

    from gockpt.staging.arena import Arena
    from gockpt.staging.device import Device
    from gockpt.staging.device_budget import Room
    from gockpt.staging.gradient_ring import Ring
    from gockpt.staging.stager import CopyResult, Source

__all__ = ["DeviceStager"]

_log = logging.getLogger("gockpt")

BRIEF = 0.01
"""Seconds between two looks at what another thread is about to end."""


class DeviceStager(DeviceQueue):
    """Stager of one device: see :class:`gockpt.staging.stager.Stager`.

    Promise: what a result that is ``proven`` brought into the arena is what its sources were at the
    boundary, bit for bit, and not a byte beside it was written. Device memory stays within the room (beside
    the kernels' tables). What fails is raised by the next ``copy``, ``guard`` or ``finish``, and by nothing
    else.

    Attributes:
        broken: Whether it must no longer be used.
        behind: The urgency of state that is copied behind training.
        waits_for_room: ``False``: what holds the room may have to leave the device first.
    """

    waits_for_room = False

    def __init__(
        self,
        device: Device,
        arenas: Sequence[Arena],
        room: Room,
        *,
        direct: bool = False,
        thread: bool = True,
        copy_bytes: int = COPY_BYTES,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        """Register the arenas. Slow, so not for the training thread.

        Args:
            device: Where sources are.
            arenas: Where requests go, by index.
            room: Device memory that may be taken.
            direct: Let kernels store what is packed behind a step straight into the arena, instead of
                staging it for the copy engine. Not where an arena could not be registered.
            thread: Whether a background thread receives what lands. Without it, :meth:`poll` does.
            copy_bytes: The most one copy moves.
            piece_bytes: How much of an arena is registered at a time.
        """
        super().__init__(
            device,
            arenas,
            room,
            direct=direct,
            thread=thread,
            copy_bytes=copy_bytes,
            piece_bytes=piece_bytes,
        )
        self.broken = False
        self.behind = Urgency.SNAPSHOT if room.scratch_bytes > 0 else Urgency.STATE

    @property
    def variant(self) -> str:
        """Way of the bytes into the arena, in a few words, for a plan's explanation."""
        return self._pipeline.variant

    @property
    def detour(self) -> bool:
        """Whether it takes pinned host memory, as much as the staging ring, and the host's help."""
        return self._pipeline.detour

    @property
    def slot_bytes(self) -> int:
        """The most that can be encoded on the way in one piece."""
        return self._pipeline.slot_bytes

    def holds(self, tensor: Any) -> bool:
        """Whether a tensor is in the device's memory."""
        return self._device.holds(tensor)

    def value(self, tensor: Any) -> float | None:  # noqa: ARG002 - whichever it is
        """Return ``None``: reading a number on a device waits for it."""
        return None

    def reaches(self, arena: Arena | None) -> bool:
        """Whether requests may go into this arena."""
        return self._pipeline.reaches(arena)

    def give_up(self, error: BaseException) -> None:
        """Stop using it: the device refused."""
        if not self.broken:
            self.broken = True
            _log.warning("state is copied inside the call from now on: %s", error)

    def place_gradient(self, source: Source, grad_dtype: str | None, ring: Ring) -> CopyRequest | None:
        """Find room for a gradient; its encoding and size follow from its length alone."""
        count = source.nbytes // 4
        form = form_of(grad_dtype, count)
        if form.nbytes > self.slot_bytes:
            form = form_of(None, count)
        offset = ring.allocate(form.nbytes)
        if offset is None:
            return None
        return CopyRequest(source, ArenaId.RING, offset, None, None if form.encoding is None else form)

    def collect(self) -> None:
        """Do nothing: copies go on without the training thread."""

    # -- the training thread -----------------------------------------------------------------

    def copy(
        self,
        requests: Sequence[CopyRequest],
        urgency: Urgency,
        *,
        on_done: Callable[[], None] | None = None,
        seen: CopyResult | None = None,  # noqa: ARG002
    ) -> DeviceCopyResult:
        """Take the boundary for ``requests`` now; they arrive behind the caller.

        Args:
            requests: What is moved, in the order in which it should leave.
            urgency: ``BUFFER`` and ``GRADIENT`` are packed before anything that is queued later can change
                them. So is a ``SNAPSHOT``, as much of it as scratch memory is free for; the rest of it is
                ``STATE``. That is packed behind the step: call :meth:`guard` before an update.
            on_done: Called once it has arrived, or failed, on whichever thread saw that; not if cancelled.
            seen: Not used: its fingerprints are not known yet.

        Raises:
            SaveError: If the device refused, now or since the last call; nothing of it is under way any more.
        """
        self._raise_pending()
        self._refuse_captured()
        with self._watched(), self._device.range("gockpt boundary"):
            main = self._pipeline.main()
            # Of what is encoded on the way, fingerprints are taken when that is done.
            stands = [request.source for request in requests if request.form is None]
            prints = self._device.prints(main, stands)
            result = DeviceCopyResult(requests, urgency, prints, main.record(), on_done)
            self._dispatch(result, main)
            self._start_thread()
            return result
        self._raise_pending()
        raise SaveError(self._told)

    def fingerprint(
        self, sources: Sequence[Source], *, on_done: Callable[[], None] | None = None
    ) -> DeviceCopyResult:
        """Take the sources' fingerprints as of now, and move nothing; does not wait for the device.

        They are the result's ``expected``, once it is ``done``; until then the sources are held.

        Raises:
            SaveError: As :meth:`copy`.
        """
        self._raise_pending()
        self._refuse_captured()
        with self._watched(), self._device.range("gockpt look"):
            main = self._pipeline.main()
            prints = self._device.prints(main, sources)
            result = DeviceCopyResult((), Urgency.GRADIENT, prints, main.record(), on_done, look=True)
            copy = BatchCopy(Batch(), result, (Urgency.GRADIENT, self._sent), beside=False)
            copy.packed = copy.landed = result.boundary
            copy.keep.append(tuple(sources))
            with self._changed:
                self._expect_well()
                result.batches_left = 1
                self._open.append(result)
                self._in_flight.append(copy)
                self._changed.notify_all()
            self._start_thread()
            return result
        self._raise_pending()
        raise SaveError(self._told)

    def _refuse_captured(self) -> None:
        if self._device.capturing():
            self.graphed = True
            msg = "a graph is being captured: what is queued now would become part of it instead of running"
            raise SaveError(msg)

    def guard(self, owners: Collection[Hashable] | None) -> None:
        """Let what is queued next overwrite what belongs to ``owners``; ``None`` means to anyone.

        The training stream waits, on the device, for the packs of their batches that are still to run, and
        for no others. Batches of theirs that were still waiting for their turn leave now, ahead of others.

        Raises:
            SaveError: As :meth:`copy`. The update may go ahead all the same.
        """
        if self.idle:
            self._raise_pending()
            return
        if self._device.capturing():
            self.graphed = True
            return
        with self._watched(), self._device.range("gockpt guard"):
            while (copy := self._next_of(owners)) is not None:
                self._issue(copy, self._pipeline.beside)
            with self._changed:
                packed = [f.packed for f in self._in_flight if f.beside and concerns(f, owners)]
            # One wait is enough: packs run in the order in which they were queued.
            if packed and (last := packed[-1]) is not None:
                self._pipeline.main().wait(last)
        self._raise_pending()

    def flush(self) -> None:
        """Queue all that waits for its turn: what is sent from now on arrives behind it.

        Raises:
            SaveError: As :meth:`copy`.
        """
        with self._watched():
            while True:
                with self._changed:
                    copy = heapq.heappop(self._waiting) if self._waiting else None
                if copy is None:
                    break
                self._issue(copy, self._pipeline.beside)
        self._raise_pending()

    # -- arenas ------------------------------------------------------------------------------

    def admit(self, arena: Arena) -> str | None:
        """Let requests go into one more arena, with the next index. Slow: not for the training thread.

        Returns:
            Why they can't; ``None`` if they can.
        """
        pinned = self._pipeline.pin(arena)
        if not pinned.registered:
            return pinned.reason
        with self._changed:
            if not self.closed:
                self._pipeline.add(pinned)
                return None
        pinned.release()
        return f"copying from {self._device.name} has ended"

    def dismiss(self) -> None:
        """Let nothing go any more into the arena that was admitted last. Nothing may be on its way there."""
        with self._changed:
            pinned = None if self.closed else self._pipeline.remove()
        if pinned is not None:
            with self._watched():
                pinned.release()

    # -- whoever waits -----------------------------------------------------------------------

    def poll(self) -> bool:
        """Receive what has landed and queue what may leave; whether anything is still under way."""
        with self._watched():
            while (copy := self._landed()) is not None:
                self._receive(copy)
            self._fill()
        return not self.idle

    def finish(self, result: CopyResult | None = None) -> None:
        """Wait until a result, or all there is, has arrived.

        Raises:
            SaveError: If it will not arrive.
        """
        with self._watched():
            while not (self.idle if result is None else result.done.is_set()):
                self._fill()
                if (copy := self._oldest()) is not None:
                    self._receive(copy)
                elif result is not None:
                    result.done.wait(BRIEF)  # another thread is about to judge it
        if result is not None and result.error is not None:
            with self._changed:
                if self._error is result.error and not self._pipeline.dead:
                    self._error = None
            raise result.error
        self._raise_pending()

    def cancel(self) -> None:
        """Drop what has not left and wait for what has: afterwards nothing writes into the arenas.

        Results under way end with ``SaveAborted``. Raises nothing.
        """
        with self._changed:
            dropped, self._open = self._open, []
            self._drop_waiting()
        try:
            while (copy := self._oldest()) is not None:
                self._receive(copy)
            for result in dropped:
                result.boundary.synchronize()  # until then its sources are being fingerprinted
        except Exception as error:  # noqa: BLE001 - what was dropped can't be hurt by it
            self._settle_all(error)
        for result in dropped:
            result.error = SaveAborted("it was given up while it was moved off the device")
            result.on_done = None
            result.tell()

    def fingerprint_now(self, sources: Sequence[Source]) -> list[int]:
        """Return the sources' fingerprints as of now. Waits for the device.

        Raises:
            SaveError: If the device refused.
        """
        with self._watched():
            main = self._pipeline.main()
            prints = self._device.prints(main, sources)
            main.record().synchronize()
            return prints.values()
        self._raise_pending()
        raise SaveError(self._told)

    def close(self, *, join: bool = True) -> None:
        """Cancel, give staging back, and unregister the arenas. Raises nothing.

        Without ``join``, the thread may be in ``on_done`` still; it ends by itself.
        """
        with self._changed:
            if self.closed:
                return
            self.closed = True
            self._changed.notify_all()
        self.cancel()
        if join and self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._pipeline.release()
