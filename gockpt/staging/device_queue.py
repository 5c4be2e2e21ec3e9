"""Queue of batches between a device and the arenas: order, arrival, verification, errors.

The thread that trains queues batches. A background thread receives what arrives, and queues what waits for
its turn. Whoever must have something finished receives it itself.
"""

from __future__ import annotations

import heapq
import logging
import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gockpt.errors import GockptError, SaveError
from gockpt.staging.copy_pipeline import CopyPipeline
from gockpt.staging.in_flight import BatchCopy
from gockpt.staging.stager import Urgency

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterator, Sequence

    from gockpt.staging.arena import Arena
    from gockpt.staging.device import Device, Stream
    from gockpt.staging.device_budget import Room
    from gockpt.staging.in_flight import DeviceCopyResult

__all__ = ["DeviceQueue", "concerns"]

_log = logging.getLogger("gockpt")

IDLE = 1.0
"""Seconds after which the background thread looks whether its owner was dropped without close()."""


class DeviceQueue:
    """The batches in flight from one device. Thread-safe.

    Attributes:
        graphed: Whether a graph was being captured at a call that therefore did nothing.
        closed: Whether it takes nothing any more.
    """

    def __init__(
        self,
        device: Device,
        arenas: Sequence[Arena],
        room: Room,
        *,
        direct: bool,
        thread: bool,
        copy_bytes: int,
        piece_bytes: int,
    ) -> None:
        """Register the arenas; see :class:`gockpt.staging.device_stager.DeviceStager`."""
        self.graphed = False
        self.closed = False
        self._device = device
        self._told = f"{device.name} refused while a save was moved off it, as another call was told"
        self._most = 2 * room.slots
        self._pipeline = CopyPipeline(
            device, arenas, room, direct=direct, copy_bytes=copy_bytes, piece_bytes=piece_bytes
        )
        self._changed = threading.Condition()
        self._waiting: list[BatchCopy] = []
        self._in_flight: list[BatchCopy] = []
        self._open: list[DeviceCopyResult] = []
        self._sent = 0
        self._error: BaseException | None = None
        self._failing: set[int] = set()
        self._threaded = thread
        self._thread: threading.Thread | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        with self._changed:
            return not self._waiting and not self._in_flight

    # -- batches that leave --------------------------------------------------------------------

    def _dispatch(self, result: DeviceCopyResult, main: Stream) -> None:
        """Cut a result into batches; pack what is due at once, and let the rest wait for its turn."""
        urgency = result.urgency
        batches = self._pipeline.cut_batches(result)
        copies = [BatchCopy(batch, result, (urgency, self._sent + i)) for i, batch in enumerate(batches)]
        with self._changed:
            self._expect_well()
            self._sent += len(batches)
            result.batches_left = len(batches)
            self._open.append(result)
        if not copies:
            self._end(result)
        elif urgency in (Urgency.BUFFER, Urgency.GRADIENT):
            for copy in copies:
                copy.beside = False
                self._issue(copy, main)
        else:
            room = urgency is Urgency.SNAPSHOT
            for copy in copies:
                with self._moving():
                    room = room and not self._failing and self._pipeline.snapshot(copy, main)
                    if not room:
                        copy.order = (Urgency.STATE, copy.order[1])
                    self._queue(copy)

    def _queue(self, copy: BatchCopy) -> None:
        """Let a batch wait for its turn, with the lock held."""
        if copy.result in self._open:
            heapq.heappush(self._waiting, copy)
        else:
            self._abandon(copy)
        self._changed.notify_all()

    def _abandon(self, copy: BatchCopy) -> None:
        """Don't let a batch leave, with the lock held: its result has ended. What it reads is awaited."""
        if copy.packed is not None:
            copy.landed = copy.packed
            self._in_flight.append(copy)

    def _issue(self, copy: BatchCopy, stream: Stream) -> None:
        """Queue one batch now: the device waits for its slot, or the host does on the detour."""
        while (before := self._issued(copy, stream)) is not None:
            self._receive(before)

    def _issued(self, copy: BatchCopy, stream: Stream) -> BatchCopy | None:
        """Queue one batch, or return the one that the host must receive before."""
        with self._moving():
            if self._failing or copy.result not in self._open:
                self._abandon(copy)
                return None
            before = self._pipeline.in_the_way()
            if before is None:
                # First, since from here on something may be queued: it has to be awaited, whatever fails.
                self._in_flight.append(copy)
                self._pipeline.move(copy, stream)
            return before

    def _fill(self) -> None:
        """Queue what waits, most urgent first, as long as the ring is not twice full."""
        while True:
            with self._changed:
                if len(self._in_flight) >= self._most or not self._waiting:
                    return
                copy = heapq.heappop(self._waiting)
                if self._issued(copy, self._pipeline.beside) is not None:
                    # The detour: its slot is still in use.
                    heapq.heappush(self._waiting, copy)
                    return

    def _next_of(self, owners: Collection[Hashable] | None) -> BatchCopy | None:
        """Take the next waiting batch out that an update of ``owners`` would overwrite."""
        with self._changed:
            mine = [f for f in self._waiting if f.packed is None and concerns(f, owners)]
            if not mine:
                return None
            first = min(mine)
            self._waiting.remove(first)
            heapq.heapify(self._waiting)
            return first

    # -- batches that land ---------------------------------------------------------------------

    def _oldest(self) -> BatchCopy | None:
        with self._changed:
            return self._in_flight[0] if self._in_flight else None

    def _landed(self) -> BatchCopy | None:
        """Return a batch that has landed and that nobody receives yet."""
        with self._changed:
            for copy in self._in_flight:
                if not copy.claimed and copy.landed is not None and copy.landed.query():
                    return copy
        return None

    def _receive(self, copy: BatchCopy) -> None:
        """Wait until a batch has landed, prove it, and let go of what it needed."""
        result = copy.result
        with self._changed:
            # Without an event, queuing it failed: whoever tried that awaits it.
            while (copy.claimed or copy.landed is None) and not copy.over:
                self._changed.wait()
            if copy.over or copy.landed is None:
                return
            copy.claimed = True
            wanted = result in self._open
        try:
            copy.landed.synchronize()
            values = self._pipeline.arrival(copy) if wanted else []
            made = self._pipeline.made(copy) if wanted else []
        except BaseException:
            with self._changed:
                copy.claimed = False  # it stays among what has to be awaited
                self._changed.notify_all()
            raise
        with self._changed:
            self._pipeline.let_go(copy)
            self._in_flight.remove(copy)
            self._changed.notify_all()
            for number, value in values:
                result.add(number, value)
            for number, value in made:
                result.made(number, value)
            result.landed(copy.batch.nbytes)
            last = not result.batches_left
        if last:
            self._end(result)

    def _end(self, result: DeviceCopyResult) -> None:
        """Judge a result that has arrived, and tell whoever waits for it."""
        if result in self._open:
            result.judge()
        with self._changed:
            if result not in self._open:
                return
            self._open.remove(result)
        result.tell()

    # -- errors ------------------------------------------------------------------------------

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """Take the lock to queue a batch. If that fails half-way, none is queued before all was awaited.

        What a slot is used for is not known then: the next batch in it would not wait for it.
        """
        with self._changed:
            try:
                yield
            except BaseException:
                self._failing.add(threading.get_ident())
                raise

    def _expect_well(self) -> None:
        """Refuse what is new, with the lock held, while another thread awaits the end of what failed."""
        if self._failing:
            raise SaveError(self._told)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """End all that is under way if what is done here fails; the error is pending then."""
        try:
            yield
        except BaseException as error:
            self._fail(error)
            if not isinstance(error, Exception):
                raise

    def _fail(self, error: BaseException) -> None:
        """End all that is under way with an error: it is awaited, references are dropped, nobody waits on."""
        wrapped = error
        if not isinstance(error, GockptError):
            wrapped = SaveError(
                f"{self._device.name} refused while a save was moved off it "
                f"({type(error).__name__}: {error}); the save is lost, training is not. "
                "If it is out of memory, lower device_memory"
            )
            wrapped.__cause__ = error
        with self._changed:
            self._failing.add(threading.get_ident())
            dropped, self._open = self._open, []
            self._error = self._error or wrapped
            self._drop_waiting()
        try:
            self._settle_all(error)
        finally:
            with self._changed:
                self._failing.discard(threading.get_ident())
        # All have ended before the first one is told of: whoever is told may wait for others of them.
        for result in dropped:
            result.error = wrapped
            if not self._pipeline.dead:
                result.recall()
            result.end()
        for result in dropped:
            try:
                result.tell()
            except Exception:  # noqa: BLE001 - the others must be told
                _log.exception("what follows a refused copy failed")

    def _drop_waiting(self) -> None:
        """Forget what has not left, with the lock held."""
        for copy in self._waiting:
            self._abandon(copy)
        self._waiting.clear()

    def _settle_all(self, error: BaseException) -> None:
        """Wait until the device has done all that was queued, and drop references."""
        self._pipeline.await_all(error)
        with self._changed:
            # Another thread may be carrying one on into the arena.
            self._changed.wait_for(lambda: not any(f.claimed for f in self._in_flight))
            self._pipeline.forget(self._in_flight)
            self._in_flight.clear()
            self._changed.notify_all()

    def _raise_pending(self) -> None:
        with self._changed:
            error = self._error
            # A device that is lost stays so; after anything else the next save may go well.
            if not self._pipeline.dead:
                self._error = None
        if error is not None:
            raise error
        if self.closed:
            msg = f"copying from {self._device.name} has ended"
            raise SaveError(msg)

    # -- the background thread ---------------------------------------------------------------

    def _start_thread(self) -> None:
        """Start it with the first thing that is sent, if there is to be one."""
        if not self._threaded or self._thread is not None:
            return
        of = (weakref.ref(self), self._changed)
        self._thread = threading.Thread(target=_serve, args=of, name="gockpt-device", daemon=True)
        self._thread.start()

    def _work(self) -> bool:
        """Receive the oldest batch; ``False`` when there is nothing to do."""
        copy = None
        with self._watched():
            self._fill()
            copy = self._oldest()
            if copy is not None:
                self._receive(copy)
        return copy is not None


def _serve(owner: weakref.ref[DeviceQueue], changed: threading.Condition) -> None:
    while True:
        queue = owner()
        if queue is None:
            return
        while queue._work():  # noqa: SLF001 - its own thread
            pass
        with changed:
            if queue.closed:
                return
            if queue.idle:
                del queue
                changed.wait(IDLE)


def concerns(copy: BatchCopy, owners: Collection[Hashable] | None) -> bool:
    """Whether an update of ``owners`` would overwrite what a batch still reads; ``None`` means any."""
    return owners is None or not copy.batch.owners.isdisjoint(owners)
