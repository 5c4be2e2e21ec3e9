"""The host memory of saves: the arenas, and what else a save takes, counted before any of it is taken."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

from gockpt.core.descriptors import ArenaId
from gockpt.errors import StateTooLarge
from gockpt.kernels.gradient16_launch import fitting
from gockpt.planning.planner import RING_GRADIENTS
from gockpt.replay.rounding_probes import PROBE_COPIES
from gockpt.replay.tiled import SCRATCH_BYTES
from gockpt.saving.capture import Attempt
from gockpt.saving.facts import ring_bytes_of, sample_bytes_of
from gockpt.saving.write_items import cut
from gockpt.staging.arena import whole_pages
from gockpt.staging.gradient_ring import Ring
from gockpt.staging.host_stager import HostStager
from gockpt.storage.local.compression import largest_encoded, memory_bound
from gockpt.storage.local.page_writer import most_gathered
from gockpt.storage.local.partial_archive import small_bytes
from gockpt.workers.thread_pool import WRITERS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gockpt.core.arena_layout import ArenaLayout
    from gockpt.core.timeline import Trace
    from gockpt.options import Options
    from gockpt.planning.planner import Plan
    from gockpt.saving.device_selection import DeviceStagers
    from gockpt.saving.facts import Shape
    from gockpt.saving.write_items import Cut
    from gockpt.staging.arena import Arena
    from gockpt.staging.device_stager import DeviceStager
    from gockpt.staging.task_thread import TaskThread
    from gockpt.state.live_state import LiveState
    from gockpt.workers.executor import Background
    from gockpt.workers.job_client import JobClient, Outcome

__all__ = ["Memory"]


class Memory:
    """The arenas of one engine: state, gradient ring, and what a closing tick adds. Kept between saves.

    Promise: the arenas, the copies of extras on their way into theirs, what the last copies are compared by,
    what arrays in storage order are reordered in, what encoding and writing the encoded takes, and what
    replay from gradients in 16 bits takes, never come to more than ``Options.host_memory`` at a time; what
    would is refused before it is taken. Not counted are what the user's own ``state_dict()`` and callables
    make, and the JSON documents and checksums.
    """

    def __init__(self, options: Options, background: Background[Any], stagers: DeviceStagers) -> None:
        self._options = options
        self._background = background
        self._stagers = stagers
        self._held: list[Arena | None] = [None] * len(ArenaId)
        self._passing = 0
        self._reordering = 0
        self._encoded = 0
        self._small = 0
        self._replaying = 0

    @property
    def nbytes(self) -> int:
        """Bytes of host memory held."""
        return sum(a.nbytes for a in self._held if a is not None)

    @property
    def spare(self) -> int:
        """Bytes of host memory that may be taken beside the arenas and what a save takes beside them."""
        limit = self._options.host_memory
        return 1 << 62 if limit is None else max(0, limit - self.nbytes - self._beside())

    @property
    def arenas(self) -> tuple[Arena, ...]:
        """State, ring and additions."""
        return tuple(self._arena(use, 0) for use in ArenaId)

    def prepare(self, live: LiveState, shape: Shape, tasks: TaskThread) -> None:
        """Reserve the state's arena, and in the background touch its pages and set up its device stager."""
        self._note_writing(shape)
        self._make_room({ArenaId.STATE: shape.layout.nbytes, ArenaId.RING: 0, ArenaId.EXTRA: 0})
        arena = self._arena(ArenaId.STATE, shape.layout.nbytes)
        tasks.submit([arena.prefault])
        self._stagers.prepare(live, arena, tasks)

    def _note_writing(self, shape: Shape) -> None:
        """Find what writing a state takes beside the arenas."""
        self._encoded = largest_encoded(self._options.compression, shape.layout.arrays)
        self._small = self._gathered_bytes(shape.layout)

    def _gathered_bytes(self, layout: ArenaLayout) -> int:
        """Return the bytes of small chunks that are gathered before they are written."""
        return 0 if self._options.layout == "directory" else small_bytes(layout.arrays)

    def admission(self) -> Callable[[int], None]:
        """Return what is to be told of each array of the extras before it is copied.

        It raises ``StateTooLarge`` once they can't fit.
        """
        copied = 0

        def admit(nbytes: int) -> None:
            nonlocal copied
            copied += nbytes
            self._make_room({ArenaId.EXTRA: copied}, copies=copied)

        return admit

    def additions(self, layout: ArenaLayout) -> Arena:
        """Return an arena for what the closing tick adds (extras, random states).

        Raises:
            StateTooLarge: If that takes more than is allowed.
        """
        encoded = largest_encoded(self._options.compression, layout.arrays)
        copies = sum(array.spec.nbytes for array in layout.arrays)
        small = self._gathered_bytes(layout)
        self._make_room({ArenaId.EXTRA: layout.nbytes}, copies=copies, encoded=encoded, small=small)
        return self._arena(ArenaId.EXTRA, layout.nbytes)

    def device_stager(self, live: LiveState) -> DeviceStager | None:
        """Return the device stager into the state's arena, if there is one that is usable for the state."""
        return self._stagers.ready(live, self._held[ArenaId.STATE])

    def obstacle(self, live: LiveState) -> str | None:
        """Return why no state leaves a device behind training; ``None`` if some does or none is on one."""
        return None if self.device_stager(live) is not None else self._stagers.obstacle(live)

    def device_elements(self, device: DeviceStager | None) -> int | None:
        """Return the most elements of an encoded gradient that a device can copy; ``None`` if none is."""
        encodes = device is not None and self._options.grad_dtype is not None
        return fitting(device.slot_bytes) if device is not None and encodes else None

    def hindrance(self, device: DeviceStager) -> str | None:
        """Return why gradients could not be copied from the device when asked for; ``None`` if they could."""
        return self._stagers.hindrance(device)

    def reach(
        self, device: DeviceStager, shape: Shape, plans: Sequence[tuple[Cut, Plan]], tasks: TaskThread
    ) -> str | None:
        """Return why gradients can't follow off a device in any of these plans; ``None`` if they can.

        Raises:
            StateTooLarge: If the ring takes more than is allowed.
        """
        nbytes = max(
            self._ring_bytes(pieces, plan, shape) + sample_bytes_of(pieces, plan, self._options.grad_dtype)
            for pieces, plan in plans
        )
        self._make_room({ArenaId.STATE: shape.layout.nbytes, ArenaId.RING: nbytes, ArenaId.EXTRA: 0})
        if not device.reaches(self._held[ArenaId.STATE]):
            return "copying from the device has to be set up anew"
        return self._stagers.reach(device, self._arena(ArenaId.RING, nbytes), tasks)

    def attempt(
        self,
        live: LiveState,
        shape: Shape,
        plan: Plan,
        *,
        excluded: frozenset[str],
        overtaken: frozenset[tuple[str, ...]] | None,
        tasks: TaskThread,
        outcome: Outcome,
        trace: Trace,
        afresh: bool,
    ) -> tuple[Attempt, JobClient]:
        """Set up one attempt and its background job; ``afresh`` if no earlier additions are needed.

        Raises:
            StateTooLarge: If that takes more than is allowed.
        """
        device, stay = self.device_stager(live), None
        while True:
            on_device = None if device is None else device.holds
            pieces = cut(
                live,
                shape.layout,
                window=plan.window,
                excluded=excluded,
                overtaken=overtaken,
                on_device=on_device,
                stay=stay,
                device_elements=self.device_elements(device),
            )
            samples = sample_bytes_of(pieces, plan, self._options.grad_dtype)
            # With a helper for saves that are late.
            threads = self._options.worker_threads + 1
            self._replaying = threads * SCRATCH_BYTES + PROBE_COPIES * samples if samples else 0
            self._passing, self._reordering = (
                (0, 0) if shape.row_major else _rearranged(live, shape.layout, pieces, self._options)
            )
            self._note_writing(shape)
            ring_bytes = self._ring_bytes(pieces, plan, shape)
            needs = {ArenaId.STATE: shape.layout.nbytes, ArenaId.RING: ring_bytes + samples}
            self._make_room(needs | {ArenaId.EXTRA: 0} if afresh else needs)
            arena = self._arena(ArenaId.STATE, shape.layout.nbytes)
            ring = self._held[ArenaId.RING] if self._kept(ArenaId.RING) >= ring_bytes + samples else None
            if device is not None and not device.reaches(arena):
                device = None  # it copies into an arena that was too small, or too large
            elif (
                device is not None
                and stay is None
                and (ring is None or not device.reaches(ring))
                and pieces.any_on_device
            ):
                stay = "its gradients can't follow now"
            else:
                break
        self._stagers.prepare(live, arena, tasks)
        if self._kept(ArenaId.RING) < ring_bytes + samples:
            tasks.submit([self._arena(ArenaId.RING, ring_bytes + samples).prefault])
        room = Ring(0, ring_bytes)
        job = self._background.job(
            # Not the third: what is added may yet need a larger one, and the job would keep this one alive.
            arenas=self.arenas[: ArenaId.EXTRA],
            pieces=[p.message() for p in pieces.pieces],
            ring=room,
            outcome=outcome,
            trace=trace,
        )
        ring_arena = self._arena(ArenaId.RING, ring_bytes + samples)
        host = HostStager(tasks, (arena, ring_arena))
        attempt = Attempt(
            live=live,
            shape=shape,
            cut=pieces,
            plan=plan,
            stagers=[host] if device is None else [host, device],
            arena=arena,
            ring=room,
            ring_arena=ring_arena,
            options=self._options,
            overtaken=overtaken,
            job=job,
            trace=trace,
        )
        return attempt, job

    def release(self) -> None:
        """Let the memory go."""
        self._stagers.leave(join=True)
        self._held = [None] * len(ArenaId)

    def _ring_bytes(self, pieces: Cut, plan: Plan, shape: Shape) -> int:
        """Return the room for gradients; as much as for a state on the host where there is no more."""
        most = ring_bytes_of(pieces, plan, self._options.grad_dtype)
        limit = self._options.host_memory
        extras = max(self._kept(ArenaId.EXTRA), whole_pages(0))
        taken = whole_pages(shape.layout.nbytes) + extras + self._beside()
        if limit is None or taken + whole_pages(most) <= limit:
            return most
        return ring_bytes_of(pieces, plan, self._options.grad_dtype, of_device=RING_GRADIENTS)

    def _let_go(self, use: ArenaId) -> None:
        """Free one arena; what copies into it from a device is closed first."""
        if use == ArenaId.STATE and self._held[use] is not None:
            self._stagers.leave()
        if use == ArenaId.RING and self._held[use] is not None:
            self._stagers.leave_ring()
        self._held[use] = None

    def _kept(self, use: ArenaId) -> int:
        arena = self._held[use]
        return 0 if arena is None else arena.nbytes

    def _arena(self, use: ArenaId, nbytes: int) -> Arena:
        """Return the arena of one use, at least that large; a smaller one goes first."""
        arena = self._held[use]
        if arena is None or arena.nbytes < nbytes:
            arena = None  # never both at a time
            self._let_go(use)
            arena = self._held[use] = self._background.arena(nbytes)
        return arena

    def _make_room(
        self, needs: dict[ArenaId, int], *, copies: int = 0, encoded: int = 0, small: int = 0
    ) -> None:
        """Refuse what can't fit; arenas that are larger than they need to be go first.

        Args:
            needs: Bytes of the arenas that may be replaced, by use; the others stay as they are.
            copies: Bytes of extras that are copied before they stand in their arena.
            encoded: The largest chunk of theirs that is encoded.
            small: Bytes of their small chunks in an archive.
        """
        limit = self._options.host_memory
        if limit is None:
            return
        beside = self._beside(copies, encoded, small)

        def total() -> int:
            uses = (max(self._kept(use), whole_pages(needs.get(use, 0))) for use in ArenaId)
            return sum(uses) + beside

        if total() > limit:
            for use, nbytes in needs.items():
                if self._kept(use) > whole_pages(nbytes):
                    self._let_go(use)
        nbytes = total()
        if nbytes > limit:
            extras = copies and copies + needs[ArenaId.EXTRA]
            self._refuse(nbytes, limit, extras=extras, encoding=self._encoding(encoded))

    def _beside(self, copies: int = 0, encoded: int = 0, small: int = 0) -> int:
        """Return what a save takes beside the arenas; see :meth:`_make_room`."""
        # One after the other: extras are copied, the closing tick is compared, chunks are written.
        writing = self._reordering + self._encoding(encoded) + most_gathered(self._small + small)
        return max(copies, self._passing, writing) + self._replaying

    def _encoding(self, encoded: int) -> int:
        """Return what encoding takes if a chunk of ``encoded`` bytes is among what is encoded."""
        return memory_bound(max(self._encoded, encoded), self._options.worker_threads)

    def _refuse(self, nbytes: int, limit: int, *, extras: int, encoding: int) -> None:
        msg = (
            f"saving this state takes {nbytes} bytes of host memory and host_memory={limit} allows less; "
            "raise host_memory or use window=1, which needs no gradient ring"
        )
        if encoding:
            msg += f", or compression=None ({encoding} of these bytes)"
        if extras:
            msg += f", or save less along with it: copies of extras take {extras} bytes"
        raise StateTooLarge(msg)


def _rearranged(live: LiveState, layout: ArenaLayout, pieces: Cut, options: Options) -> tuple[int, int]:
    """Return what comparing, and then reordering, arrays that are not row-major takes at the most.

    A closing without a tick compares what was copied at once, chunk by chunk, by way of copies of it. Writing
    reorders a chunk in a copy of it, on as many threads as write.
    """
    at_once = set(pieces.at_once.names)
    compared = 0
    reordered: list[int] = []
    for array in layout.arrays:
        tensor = live.entries[array.spec.name]
        if array.spec.name in at_once:
            lazy = tensor.is_conj() or tensor.is_neg()
            if lazy or not tensor.is_contiguous():
                compared = max(compared, (1 + lazy) * max(slot.nbytes for slot in array.slots))
        elif not tensor.is_contiguous():
            reordered.extend(slot.nbytes for slot in array.slots)
    # With a helper for saves that are late.
    return compared, sum(heapq.nlargest(options.worker_threads + WRITERS + 1, reordered))
