"""Choice of the device whose state is copied in the background, and setup of its stager.

State is copied from a device in the background only if ``Options.device_memory`` allows it memory there. It
is tried for one device, the one that holds most of the state. After any failure the next save copies inside
the call again.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

import torch

from gockpt.core.descriptors import ArenaId
from gockpt.staging.copy_batches import Shipment, Urgency
from gockpt.staging.device import Source
from gockpt.staging.device_budget import make_room
from gockpt.staging.device_stager import DeviceTransfer

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from gockpt.core.array_spec import Name
    from gockpt.kernels.gradient16_launch import Form
    from gockpt.options import Options
    from gockpt.saving.write_items import Piece
    from gockpt.staging.arena import Arena
    from gockpt.staging.device import Device
    from gockpt.staging.host_stager import Transfer
    from gockpt.staging.in_flight import Consignment
    from gockpt.state.live_state import LiveState

__all__ = ["CudaDevices", "Devices", "Road", "Roads", "sources_of", "to_ring"]

_log = logging.getLogger("gockpt")

REGISTERING = "the gradient ring is being registered with the device"


class Devices(Protocol):
    """The devices of the process; tests use a fake one."""

    def find(self, tensors: Iterable[torch.Tensor]) -> torch.device | None:
        """Return the device that holds most of the tensors, if it is supported."""

    def holds(self, device: torch.device, tensor: torch.Tensor) -> bool:
        """Whether a tensor stands on that device."""

    def capturing(self) -> bool:
        """Whether what the calling thread queues now would go into a graph instead of running."""

    def updated(self, optimizer: Any) -> None:
        """Note that an optimizer's update was queued, on the calling thread's current streams."""

    def wait_for_updates(self) -> None:
        """Let what the calling thread queues from now on wait, on the devices, for these updates."""

    def open(self, device: torch.device) -> Device:
        """Return what speaks to it."""


class CudaDevices:
    """CUDA's."""

    def __init__(self) -> None:
        self._updates: dict[torch.cuda.Stream, torch.cuda.Event] = {}

    def find(self, tensors: Iterable[torch.Tensor]) -> torch.device | None:
        """Return the CUDA device that holds most bytes of them."""
        held: Counter[torch.device] = Counter()
        for tensor in tensors:
            if tensor.device.type == "cuda":
                held[tensor.device] += tensor.nbytes
        return max(held, key=lambda device: held[device]) if held else None

    def holds(self, device: torch.device, tensor: torch.Tensor) -> bool:
        """Whether a tensor stands on that device."""
        return tensor.device == device

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured on the current stream."""
        # Asking would initialise CUDA.
        started = bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
        return started and bool(torch.cuda.is_current_stream_capturing())

    def updated(self, optimizer: Any) -> None:
        """Record an event on the current stream of each device that the optimizer has parameters on."""
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return
        params = (param for group in optimizer.param_groups for param in group["params"])
        for device in {param.device for param in params if param.device.type == "cuda"}:
            event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            stream = torch.cuda.current_stream(device)
            event.record(stream)
            self._updates[stream] = event  # the newest of a stream stands for those before it

    def wait_for_updates(self) -> None:
        """Let the current streams wait for these events: they may be others than the updates'."""
        updates, self._updates = self._updates, {}
        for stream, event in updates.items():
            torch.cuda.current_stream(stream.device).wait_event(event)

    def open(self, device: torch.device) -> Device:
        """Return a :class:`gockpt.staging.cuda.CudaDevice`."""
        from gockpt.staging.cuda import CudaDevice

        return CudaDevice(device)


class Road:
    """Background copies from one device into one arena, and possibly into the ring of gradients.

    Attributes:
        arena: The target of state.
        ring: The target of gradients; ``None`` if they can't be copied.
        device: The source.
        variant: Way of the bytes into the arena, in a few words.
        broken: Whether it must no longer be used.
    """

    def __init__(
        self,
        device: torch.device,
        arena: Arena,
        transfer: DeviceTransfer,
        *,
        scratch: bool,
        holds: Callable[[torch.device, torch.Tensor], bool],
    ) -> None:
        self.arena = arena
        self.ring: Arena | None = None
        self.device = device
        self.variant = transfer.variant
        self.broken = False
        self._transfer = transfer
        self._urgency = Urgency.SNAPSHOT if scratch else Urgency.STATE
        self._holds = holds

    @property
    def slot_bytes(self) -> int:
        """The most that can be encoded on the way in one piece."""
        return self._transfer.slot_bytes

    @property
    def detour(self) -> bool:
        """Whether the host must carry all of it on, so that a call may wait for the device."""
        return self._transfer.detour

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether it starts where a tensor stands."""
        return self._holds(self.device, tensor)

    def send(
        self, live: LiveState, pieces: Sequence[Piece], on_done: Callable[[], None], *, prompt: bool = False
    ) -> Consignment:
        """Take the boundary for some pieces.

        What is ``prompt``, and what has room in scratch memory, may be overwritten at once; all else needs
        :meth:`guard`.
        """
        urgency = Urgency.BUFFER if prompt else self._urgency
        return self._transfer.send(_shipments(live, pieces), urgency, on_done=on_done)

    def hasten(self) -> None:
        """Let what is sent from now on arrive behind all that was sent before."""
        self._transfer.hasten()

    def follow(self, cargo: Sequence[Shipment], on_done: Callable[[], None]) -> Consignment:
        """Send what :func:`to_ring` made: gradients, say. They may be overwritten at once."""
        return self._transfer.send(cargo, Urgency.GRADIENT, on_done=on_done)

    def watch(self, sources: Sequence[Source], on_done: Callable[[], None]) -> Consignment:
        """Take fingerprints of what stands on the device now; waits for nothing."""
        return self._transfer.watch(sources, on_done=on_done)

    def look(self, live: LiveState, pieces: Sequence[Piece]) -> list[int]:
        """Return the pieces' fingerprints now. Waits for the device."""
        return self._transfer.look(sources_of(live, pieces))

    def admit(self, ring: Arena) -> str | None:
        """Let gradients follow into ``ring``, or return why they can't. Slow."""
        why = self._transfer.admit(ring)
        if why is None:
            self.ring = ring
        return why

    def dismiss(self) -> None:
        """Stop copying gradients: the ring's arena is about to be freed."""
        if self.ring is not None:
            self.ring = None
            self._transfer.dismiss()

    def guard(self, optimizer: object | None) -> None:
        """Let an optimizer's update, or with ``None`` anything, overwrite what is queued next."""
        self._transfer.guard(None if optimizer is None else {id(optimizer), None})

    def give_up(self, error: BaseException) -> None:
        """Stop using it: the device refused."""
        if not self.broken:
            self.broken = True
            _log.warning("state is copied inside the call from now on: %s", error)

    def finish(self, consignment: Consignment) -> None:
        """Wait until it has arrived."""
        self._transfer.finish(consignment)

    def cancel(self) -> None:
        """Drop what is under way; afterwards nothing writes into the arena."""
        self._transfer.cancel()

    def close(self, *, join: bool) -> None:
        """Give its memory back; with ``join`` its thread has ended afterwards."""
        self._transfer.close(join=join)


def to_ring(source: Source, offset: int, form: Form | None = None) -> Shipment:
    """Return a shipment to a place in the ring; ``form`` says how it is encoded on the way, if it is."""
    encoded = form is not None and form.encoding is not None
    return Shipment(source, ArenaId.RING, offset, None, form if encoded else None)


def sources_of(live: LiveState, pieces: Sequence[Piece]) -> list[Source]:
    """Return where the stretches of some pieces stand, as they are in ``live``."""
    return [shipment.source for shipment in _shipments(live, pieces)]


def _shipments(live: LiveState, pieces: Sequence[Piece]) -> list[Shipment]:
    owners = _owners(live)
    found = []
    for piece in pieces:
        for stretch in piece.stretches:
            tensor = live.entries[stretch.name]
            low = stretch.start * stretch.itemsize
            source = Source(tensor, low, stretch.nbytes, stretch.position)
            owner = owners.get(stretch.name)
            found.append(Shipment(source, ArenaId.STATE, stretch.offset, owner))
    return found


def _owners(live: LiveState) -> dict[Name, Hashable]:
    """Return which optimizer overwrites an array; ``None`` where it is not just one."""
    owners: dict[Name, Hashable] = {}
    for param in live.params:
        owner = id(live.optimizers[param.optimizer_index])
        for held in (param.name, *param.state_names.values()):
            for name in live.arrays_of(held):
                owners[name] = owner if owners.get(name, owner) == owner else None
    return owners


class Roads:
    """At most one :class:`Road`, set up in the background and kept between saves."""

    def __init__(self, options: Options, devices: Devices | None) -> None:
        self._limit = options.device_memory
        self._bounded = options.host_memory is not None
        self._devices: Devices = CudaDevices() if devices is None else devices
        self._lock = threading.Lock()
        self._wanted: Arena | None = None
        self._road: Road | None = None
        self._ring: Arena | None = None
        self._no_ring: str | None = None
        self._given_up = False

    def ready(self, live: LiveState, arena: Arena | None) -> Road | None:
        """Return the road into ``arena``, if one is ready and usable for the state."""
        with self._lock:
            road = self._road
            if road is not None and road.broken:
                self._given_up = True
            elif road is not None and road.arena is arena:
                return road if self._devices.find(live.entries.values()) == road.device else None
        return None

    def prepare(self, live: LiveState, arena: Arena, transfer: Transfer) -> None:
        """Set up a road into ``arena`` in the background, if ``device_memory`` is set and a device exists."""
        with self._lock:
            if self._limit is None or self._given_up or self._wanted is arena:
                return
            device = self._devices.find(live.entries.values())
            if device is None:
                return
            self._wanted = arena
        nbytes = sum(tensor.nbytes for tensor in live.entries.values() if tensor.device == device)
        transfer.submit([lambda: self._make(device, arena, nbytes)])

    def capturing(self) -> bool:
        """Whether what the calling thread queues on a device now would go into a graph instead."""
        return self._devices.capturing()

    def updated(self, optimizer: Any) -> None:
        """Note that an optimizer's update was queued by the calling thread."""
        self._devices.updated(optimizer)

    def wait_for_updates(self) -> None:
        """Let what the calling thread queues from now on wait, on the devices, for these updates."""
        self._devices.wait_for_updates()

    def obstacle(self, live: LiveState) -> str | None:
        """Return why no state leaves a device behind training; ``None`` if there is none on one."""
        device = self._devices.find(live.entries.values())
        if device is None:
            return None
        if self._limit is None:
            return f"what stands on {device} leaves behind training only with device_memory"
        if self._given_up:
            return f"the road off {device} can't be taken"
        return f"the road off {device} is being made"

    def reach(self, road: Road, ring: Arena, transfer: Transfer) -> str | None:
        """Return why gradients can't follow into ``ring`` by that road now; ``None`` if they can.

        The first time, the way there is made behind the caller.
        """
        with self._lock:
            if road.detour or self._ring is ring:
                return self._hindrance(road)
            self._ring, self._no_ring = ring, None
        transfer.submit([lambda: self._admit(road, ring)])
        return REGISTERING

    def hindrance(self, road: Road) -> str | None:
        """Return why gradients could not follow when :meth:`reach` was asked; ``None`` if they could."""
        with self._lock:
            return self._hindrance(road)

    def _hindrance(self, road: Road) -> str | None:
        if road.detour:
            return f"gradients can't follow by {road.variant}"
        if self._ring is None or road.ring is self._ring:
            return None
        return self._no_ring or REGISTERING

    def leave_ring(self) -> None:
        """Stop copying gradients: the ring's arena is about to be freed."""
        with self._lock:
            road, self._ring, self._no_ring = self._road, None, None
            if road is not None:
                road.dismiss()

    def leave(self, *, join: bool = False) -> None:
        """Close the road: its arena is about to be freed."""
        with self._lock:
            road, self._road, self._wanted = self._road, None, None
            self._ring = self._no_ring = None
        if road is not None:
            road.close(join=join)

    def _admit(self, road: Road, ring: Arena) -> None:
        with self._lock:
            if self._ring is not ring or self._road is not road:
                return
        why = road.admit(ring)
        with self._lock:
            if self._ring is not ring:
                road.dismiss()
            elif why is not None:
                _log.info("gradients can't follow off %s: %s", road.device, why)
                self._no_ring = why

    def _make(self, device: torch.device, arena: Arena, nbytes: int) -> None:
        limit = self._limit
        if limit is None:
            return
        try:
            there = self._devices.open(device)
            room = make_room(limit, free=there.free_bytes(), state_bytes=nbytes)
            transfer = DeviceTransfer(there, [arena], room)
        except Exception as error:  # noqa: BLE001 - whatever the driver raises: there is another way
            _log.warning("state on %s is copied inside the call: %s: %s", device, type(error).__name__, error)
            with self._lock:
                self._given_up = True
            return
        if self._bounded and transfer.detour:
            # Its pinned memory would come on top of what was admitted.
            _log.warning("state on %s is copied inside the call: %s", device, transfer.variant)
            transfer.close()
            return
        road = Road(device, arena, transfer, scratch=room.scratch_bytes > 0, holds=self._devices.holds)
        with self._lock:
            if self._wanted is arena and not self._given_up:
                self._road = road
                return
        road.close(join=False)
