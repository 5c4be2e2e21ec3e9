"""Moving bytes from device memory into the arena, behind the training step.

Everything is ordered on the device, by events; the training thread only queues work:

1. At a boundary the sources are fingerprinted on the stream that trains, and an event is recorded there.
2. What is due at once (buffers, gradients, snapshots) is packed on that same stream, so nothing that is
   queued later can overwrite it first. All else is packed on a side stream that waits for the event.
3. A copy stream waits for the pack and copies the slot into the arena. The next pack into that slot waits
   for the copy, on the device.
4. Before an update, the training stream waits for the packs of what the update overwrites: for no other
   load, and for no copy. References are held until the host has seen the end.
5. What has landed is fingerprinted on the host, and compared with the boundary's fingerprint.

So no lock, queue or copy ever holds up the training thread. The exception is the detour, where the arena
could not be registered: there the host must carry each slot on before it can be used again.
"""

from __future__ import annotations

import heapq
import logging
import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gockpt.errors import GockptError, SaveAborted, SaveError
from gockpt.staging.copy_batches import Load, Urgency
from gockpt.staging.copy_pipeline import Line
from gockpt.staging.device_budget import COPY_BYTES
from gockpt.staging.in_flight import Consignment, Flight
from gockpt.staging.pinned_memory import PIECE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterator, Sequence

    from gockpt.staging.arena import Arena
    from gockpt.staging.copy_batches import Shipment
    from gockpt.staging.device import Device, Source, Stream
    from gockpt.staging.device_budget import Room

__all__ = ["DeviceTransfer"]

_log = logging.getLogger("gockpt")

BRIEF = 0.01
"""Seconds between two looks at what another thread is about to end."""

IDLE = 1.0
"""Seconds after which the background thread looks whether its owner was dropped without close()."""


class DeviceTransfer:
    """The road from one device into the arenas.

    Promise: what a consignment that is ``proven`` brought into the arena is what its sources were at the
    boundary, bit for bit, and not a byte beside it was written. Device memory stays within the room (beside
    the kernels' tables). ``send`` and ``guard`` belong to the training thread; everything may be called from
    any thread. What fails is raised by the next ``send``, ``guard`` or ``finish``, and by nothing else.

    Attributes:
        graphed: Whether a graph was being captured at a call that therefore did nothing.
        closed: Whether :meth:`close` was called.
    """

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
            arenas: Where shipments go, by index.
            room: Device memory that may be taken.
            direct: Let kernels store what is packed behind a step straight into the arena, instead of
                staging it for the copy engine. Not where an arena could not be registered.
            thread: Whether a background thread receives what lands. Without it, :meth:`poll` does.
            copy_bytes: The most one copy moves.
            piece_bytes: How much of an arena is registered at a time.
        """
        self.graphed = False
        self.closed = False
        self._device = device
        self._told = f"{device.name} refused while a save was moved off it, as another call was told"
        self._most = 2 * room.slots
        self._line = Line(device, arenas, room, direct=direct, copy_bytes=copy_bytes, piece_bytes=piece_bytes)
        self._changed = threading.Condition()
        self._waiting: list[Flight] = []
        self._flying: list[Flight] = []
        self._open: list[Consignment] = []
        self._sent = 0
        self._error: BaseException | None = None
        self._failing: set[int] = set()
        self._threaded = thread
        self._thread: threading.Thread | None = None

    @property
    def variant(self) -> str:
        """Way of the bytes into the arena, in a few words, for a plan's explanation."""
        return self._line.variant

    @property
    def detour(self) -> bool:
        """Whether it takes pinned host memory, as much as the staging ring, and the host's help."""
        return self._line.detour

    @property
    def slot_bytes(self) -> int:
        """The most that can be encoded on the way in one piece."""
        return self._line.slot_bytes

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        with self._changed:
            return not self._waiting and not self._flying

    # -- the training thread -----------------------------------------------------------------

    def send(
        self,
        shipments: Sequence[Shipment],
        urgency: Urgency,
        *,
        on_done: Callable[[], None] | None = None,
    ) -> Consignment:
        """Take the boundary for ``shipments`` now; they arrive behind the caller.

        Args:
            shipments: What is moved, in the order in which it should leave.
            urgency: ``BUFFER`` and ``GRADIENT`` are packed before anything that is queued later can change
                them. So is a ``SNAPSHOT``, as much of it as scratch memory is free for; the rest of it is
                ``STATE``. That is packed behind the step: call :meth:`guard` before an update.
            on_done: Called once it has arrived, or failed, on whichever thread saw that; not if cancelled.

        Raises:
            SaveError: If the device refused, now or since the last call; nothing of it is under way any more.
        """
        self._raise_pending()
        self._refuse_captured()
        with self._watched(), self._device.range("gockpt boundary"):
            main = self._line.main()
            # Of what is encoded on the way, fingerprints are taken when that is done.
            stands = [shipment.source for shipment in shipments if shipment.form is None]
            prints = self._device.prints(main, stands)
            consignment = Consignment(shipments, urgency, prints, main.record(), on_done)
            self._dispatch(consignment, main)
            self._start_thread()
            return consignment
        self._raise_pending()
        raise SaveError(self._told)

    def watch(self, sources: Sequence[Source], *, on_done: Callable[[], None] | None = None) -> Consignment:
        """Take the sources' fingerprints as of now, and move nothing; does not wait for the device.

        They are the consignment's ``expected``, once it is ``done``; until then the sources are held.

        Raises:
            SaveError: As :meth:`send`.
        """
        self._raise_pending()
        self._refuse_captured()
        with self._watched(), self._device.range("gockpt look"):
            main = self._line.main()
            prints = self._device.prints(main, sources)
            consignment = Consignment((), Urgency.GRADIENT, prints, main.record(), on_done, look=True)
            flight = Flight(Load(), consignment, (Urgency.GRADIENT, self._sent), beside=False)
            flight.packed = flight.landed = consignment.boundary
            flight.keep.append(tuple(sources))
            with self._changed:
                self._expect_well()
                consignment.loads_left = 1
                self._open.append(consignment)
                self._flying.append(flight)
                self._changed.notify_all()
            self._start_thread()
            return consignment
        self._raise_pending()
        raise SaveError(self._told)

    def _refuse_captured(self) -> None:
        if self._device.capturing():
            self.graphed = True
            msg = "a graph is being captured: what is queued now would become part of it instead of running"
            raise SaveError(msg)

    def guard(self, owners: Collection[Hashable] | None) -> None:
        """Let what is queued next overwrite what belongs to ``owners``; ``None`` means to anyone.

        The training stream waits, on the device, for the packs of their loads that are still to run, and for
        no others. Loads of theirs that were still waiting for their turn leave now, ahead of all others.

        Raises:
            SaveError: As :meth:`send`. The update may go ahead all the same.
        """
        if self.idle:
            self._raise_pending()
            return
        if self._device.capturing():
            self.graphed = True
            return
        with self._watched(), self._device.range("gockpt guard"):
            while (flight := self._next_of(owners)) is not None:
                self._issue(flight, self._line.beside)
            with self._changed:
                packed = [f.packed for f in self._flying if f.beside and _concerns(f, owners)]
            # One wait is enough: packs run in the order in which they were queued.
            if packed and (last := packed[-1]) is not None:
                self._line.main().wait(last)
        self._raise_pending()

    def hasten(self) -> None:
        """Queue all that waits for its turn: what is sent from now on arrives behind it.

        Raises:
            SaveError: As :meth:`send`.
        """
        with self._watched():
            while True:
                with self._changed:
                    flight = heapq.heappop(self._waiting) if self._waiting else None
                if flight is None:
                    break
                self._issue(flight, self._line.beside)
        self._raise_pending()

    # -- arenas ------------------------------------------------------------------------------

    def admit(self, arena: Arena) -> str | None:
        """Let shipments go into one more arena, with the next index. Slow: not for the training thread.

        Returns:
            Why they can't; ``None`` if they can.
        """
        pinned = self._line.pin(arena)
        if not pinned.registered:
            return pinned.reason
        with self._changed:
            if not self.closed:
                self._line.add(pinned)
                return None
        pinned.release()
        return f"the road from {self._device.name} is closed"

    def dismiss(self) -> None:
        """Let nothing go any more into the arena that was admitted last. Nothing may be on its way there."""
        with self._changed:
            pinned = None if self.closed else self._line.remove()
        if pinned is not None:
            with self._watched():
                pinned.release()

    # -- whoever waits -----------------------------------------------------------------------

    def poll(self) -> bool:
        """Receive what has landed and queue what may leave; whether anything is still under way."""
        with self._watched():
            while (flight := self._landed()) is not None:
                self._receive(flight)
            self._fill()
        return not self.idle

    def finish(self, consignment: Consignment | None = None) -> None:
        """Wait until a consignment, or all there is, has arrived.

        Raises:
            SaveError: If it will not arrive.
        """
        with self._watched():
            while not (self.idle if consignment is None else consignment.done.is_set()):
                self._fill()
                if (flight := self._oldest()) is not None:
                    self._receive(flight)
                elif consignment is not None:
                    consignment.done.wait(BRIEF)  # another thread is about to judge it
        if consignment is not None and consignment.error is not None:
            with self._changed:
                if self._error is consignment.error and not self._line.dead:
                    self._error = None
            raise consignment.error
        self._raise_pending()

    def cancel(self) -> None:
        """Drop what has not left and wait for what has: afterwards nothing writes into the arenas.

        Consignments under way end with ``SaveAborted``. Raises nothing.
        """
        with self._changed:
            dropped, self._open = self._open, []
            self._drop_waiting()
        try:
            while (flight := self._oldest()) is not None:
                self._receive(flight)
            for consignment in dropped:
                consignment.boundary.synchronize()  # until then its sources are being fingerprinted
        except Exception as error:  # noqa: BLE001 - what was dropped can't be hurt by it
            self._settle_all(error)
        for consignment in dropped:
            consignment.error = SaveAborted("it was given up while it was moved off the device")
            consignment.on_done = None
            consignment.tell()

    def look(self, sources: Sequence[Source]) -> list[int]:
        """Return the sources' fingerprints as of now. Waits for the device.

        Raises:
            SaveError: If the device refused.
        """
        with self._watched():
            main = self._line.main()
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
        self._line.release()

    # -- loads that leave --------------------------------------------------------------------

    def _dispatch(self, consignment: Consignment, main: Stream) -> None:
        """Cut a consignment into loads; pack what is due at once, and let the rest wait for its turn."""
        urgency = consignment.urgency
        loads = self._line.load_up(consignment)
        flights = [Flight(load, consignment, (urgency, self._sent + i)) for i, load in enumerate(loads)]
        with self._changed:
            self._expect_well()
            self._sent += len(loads)
            consignment.loads_left = len(loads)
            self._open.append(consignment)
        if not flights:
            self._end(consignment)
        elif urgency in (Urgency.BUFFER, Urgency.GRADIENT):
            for flight in flights:
                flight.beside = False
                self._issue(flight, main)
        else:
            room = urgency is Urgency.SNAPSHOT
            for flight in flights:
                with self._moving():
                    room = room and not self._failing and self._line.photograph(flight, main)
                    if not room:
                        flight.order = (Urgency.STATE, flight.order[1])
                    self._queue(flight)

    def _queue(self, flight: Flight) -> None:
        """Let a load wait for its turn, with the lock held."""
        if flight.consignment in self._open:
            heapq.heappush(self._waiting, flight)
        else:
            self._abandon(flight)
        self._changed.notify_all()

    def _abandon(self, flight: Flight) -> None:
        """Don't let a load leave, with the lock held: its consignment has ended. What it reads is awaited."""
        if flight.packed is not None:
            flight.landed = flight.packed
            self._flying.append(flight)

    def _issue(self, flight: Flight, stream: Stream) -> None:
        """Queue one load now: the device waits for its slot, or the host does on the detour."""
        while (before := self._issued(flight, stream)) is not None:
            self._receive(before)

    def _issued(self, flight: Flight, stream: Stream) -> Flight | None:
        """Queue one load, or return the one that the host must receive before."""
        with self._moving():
            if self._failing or flight.consignment not in self._open:
                self._abandon(flight)
                return None
            before = self._line.in_the_way()
            if before is None:
                # First, since from here on something may be queued: it has to be awaited, whatever fails.
                self._flying.append(flight)
                self._line.move(flight, stream)
            return before

    def _fill(self) -> None:
        """Queue what waits, most urgent first, as long as the ring is not twice full."""
        while True:
            with self._changed:
                if len(self._flying) >= self._most or not self._waiting:
                    return
                flight = heapq.heappop(self._waiting)
                if self._issued(flight, self._line.beside) is not None:
                    # The detour: its slot is still in use.
                    heapq.heappush(self._waiting, flight)
                    return

    def _next_of(self, owners: Collection[Hashable] | None) -> Flight | None:
        """Take the next waiting load out that an update of ``owners`` would overwrite."""
        with self._changed:
            mine = [f for f in self._waiting if f.packed is None and _concerns(f, owners)]
            if not mine:
                return None
            first = min(mine)
            self._waiting.remove(first)
            heapq.heapify(self._waiting)
            return first

    # -- loads that land ---------------------------------------------------------------------

    def _oldest(self) -> Flight | None:
        with self._changed:
            return self._flying[0] if self._flying else None

    def _landed(self) -> Flight | None:
        """Return a load that has landed and that nobody receives yet."""
        with self._changed:
            for flight in self._flying:
                if not flight.claimed and flight.landed is not None and flight.landed.query():
                    return flight
        return None

    def _receive(self, flight: Flight) -> None:
        """Wait until a load has landed, prove it, and let go of what it needed."""
        consignment = flight.consignment
        with self._changed:
            # Without an event, queuing it failed: whoever tried that awaits it.
            while (flight.claimed or flight.landed is None) and not flight.over:
                self._changed.wait()
            if flight.over or flight.landed is None:
                return
            flight.claimed = True
            wanted = consignment in self._open
        try:
            flight.landed.synchronize()
            values = self._line.arrival(flight) if wanted else []
            made = self._line.made(flight) if wanted else []
        except BaseException:
            with self._changed:
                flight.claimed = False  # it stays among what has to be awaited
                self._changed.notify_all()
            raise
        with self._changed:
            self._line.let_go(flight)
            self._flying.remove(flight)
            self._changed.notify_all()
            for number, value in values:
                consignment.add(number, value)
            for number, value in made:
                consignment.made(number, value)
            consignment.landed(flight.load.nbytes)
            last = not consignment.loads_left
        if last:
            self._end(consignment)

    def _end(self, consignment: Consignment) -> None:
        """Judge a consignment that has arrived, and tell whoever waits for it."""
        if consignment in self._open:
            consignment.judge()
        with self._changed:
            if consignment not in self._open:
                return
            self._open.remove(consignment)
        consignment.tell()

    # -- errors ------------------------------------------------------------------------------

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """Take the lock to queue a load. If that fails half-way, none is queued before all was awaited.

        What a slot is used for is not known then: the next load in it would not wait for it.
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
        for consignment in dropped:
            consignment.error = wrapped
            if not self._line.dead:
                consignment.recall()
            consignment.end()
        for consignment in dropped:
            try:
                consignment.tell()
            except Exception:  # noqa: BLE001 - the others must be told
                _log.exception("what follows a refused transfer failed")

    def _drop_waiting(self) -> None:
        """Forget what has not left, with the lock held."""
        for flight in self._waiting:
            self._abandon(flight)
        self._waiting.clear()

    def _settle_all(self, error: BaseException) -> None:
        """Wait until the device has done all that was queued, and drop references."""
        self._line.await_all(error)
        with self._changed:
            # Another thread may be carrying one on into the arena.
            self._changed.wait_for(lambda: not any(f.claimed for f in self._flying))
            self._line.forget(self._flying)
            self._flying.clear()
            self._changed.notify_all()

    def _raise_pending(self) -> None:
        with self._changed:
            error = self._error
            # A device that is lost stays so; after anything else the next save may go well.
            if not self._line.dead:
                self._error = None
        if error is not None:
            raise error
        if self.closed:
            msg = f"the road from {self._device.name} is closed"
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
        """Receive the oldest load; ``False`` when there is nothing to do."""
        flight = None
        with self._watched():
            self._fill()
            flight = self._oldest()
            if flight is not None:
                self._receive(flight)
        return flight is not None


def _serve(owner: weakref.ref[DeviceTransfer], changed: threading.Condition) -> None:
    while True:
        transfer = owner()
        if transfer is None:
            return
        while transfer._work():  # noqa: SLF001 - its own thread
            pass
        with changed:
            if transfer.closed:
                return
            if transfer.idle:
                del transfer
                changed.wait(IDLE)


def _concerns(flight: Flight, owners: Collection[Hashable] | None) -> bool:
    return owners is None or not flight.load.owners.isdisjoint(owners)
