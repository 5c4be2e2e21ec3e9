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

from gockpt.staging.device_budget import make_room
from gockpt.staging.device_stager import DeviceStager

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gockpt.options import Options
    from gockpt.staging.arena import Arena
    from gockpt.staging.device import Device
    from gockpt.staging.task_thread import TaskThread
    from gockpt.state.live_state import LiveState

__all__ = ["CudaDevices", "DeviceStagers", "Devices"]

_log = logging.getLogger("gockpt")

REGISTERING = "the gradient ring is being registered with the device"


class Devices(Protocol):
    """The devices of the process; tests use a fake one."""

    def find(self, tensors: Iterable[torch.Tensor]) -> torch.device | None:
        """Return the device that holds most of the tensors, if it is supported."""

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


class DeviceStagers:
    """At most one device stager, set up in the background and kept between saves."""

    def __init__(self, options: Options, devices: Devices | None) -> None:
        self._limit = options.device_memory
        self._bounded = options.host_memory is not None
        self._devices: Devices = CudaDevices() if devices is None else devices
        self._lock = threading.Lock()
        self._wanted: Arena | None = None
        self._device: torch.device | None = None
        self._stager: DeviceStager | None = None
        self._ring: Arena | None = None
        self._no_ring: str | None = None
        self._given_up = False

    def ready(self, live: LiveState, arena: Arena | None) -> DeviceStager | None:
        """Return the stager into ``arena``, if one is ready and usable for the state."""
        with self._lock:
            stager = self._stager
            if stager is not None and stager.broken:
                self._given_up = True
            elif stager is not None and stager.reaches(arena):
                return stager if self._devices.find(live.entries.values()) == self._device else None
        return None

    def prepare(self, live: LiveState, arena: Arena, tasks: TaskThread) -> None:
        """Set up a stager into ``arena`` in the background, if ``device_memory`` and a device are there."""
        with self._lock:
            if self._limit is None or self._given_up or self._wanted is arena:
                return
            device = self._devices.find(live.entries.values())
            if device is None:
                return
            self._wanted = arena
        nbytes = sum(tensor.nbytes for tensor in live.entries.values() if tensor.device == device)
        tasks.submit([lambda: self._make(device, arena, nbytes)])

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
        """Return why no state is copied from a device behind training; ``None`` if none is on one."""
        device = self._devices.find(live.entries.values())
        if device is None:
            return None
        if self._limit is None:
            return f"what stands on {device} leaves behind training only with device_memory"
        if self._given_up:
            return f"state on {device} can't be copied behind training"
        return f"copying from {device} behind training is being set up"

    def reach(self, stager: DeviceStager, ring: Arena, tasks: TaskThread) -> str | None:
        """Return why gradients can't be copied into ``ring`` by that stager now; ``None`` if they can.

        The first time, the ring is registered behind the caller.
        """
        with self._lock:
            if stager.detour or self._ring is ring:
                return self._hindrance(stager)
            self._ring, self._no_ring = ring, None
        tasks.submit([lambda: self._admit(stager, ring)])
        return REGISTERING

    def hindrance(self, stager: DeviceStager) -> str | None:
        """Return why gradients could not be copied when :meth:`reach` was asked; ``None`` if they could."""
        with self._lock:
            return self._hindrance(stager)

    def _hindrance(self, stager: DeviceStager) -> str | None:
        if stager.detour:
            return f"gradients can't follow by {stager.variant}"
        if self._ring is None or stager.reaches(self._ring):
            return None
        return self._no_ring or REGISTERING

    def leave_ring(self) -> None:
        """Stop copying gradients: the ring's arena is about to be freed."""
        with self._lock:
            stager, ring, self._ring, self._no_ring = self._stager, self._ring, None, None
            if stager is not None and ring is not None and stager.reaches(ring):
                stager.dismiss()

    def leave(self, *, join: bool = False) -> None:
        """Close the stager: its arena is about to be freed."""
        with self._lock:
            stager, self._stager, self._wanted = self._stager, None, None
            self._ring = self._no_ring = None
        if stager is not None:
            stager.close(join=join)

    def _admit(self, stager: DeviceStager, ring: Arena) -> None:
        with self._lock:
            if self._ring is not ring or self._stager is not stager:
                return
        why = stager.admit(ring)
        with self._lock:
            if self._ring is not ring:
                if why is None:
                    stager.dismiss()
            elif why is not None:
                _log.info("gradients can't follow off %s: %s", self._device, why)
                self._no_ring = why

    def _make(self, device: torch.device, arena: Arena, nbytes: int) -> None:
        limit = self._limit
        if limit is None:
            return
        try:
            there = self._devices.open(device)
            room = make_room(limit, free=there.free_bytes(), state_bytes=nbytes)
            stager = DeviceStager(there, [arena], room)
        except Exception as error:  # noqa: BLE001 - whatever the driver raises: there is another way
            _log.warning("state on %s is copied inside the call: %s: %s", device, type(error).__name__, error)
            with self._lock:
                self._given_up = True
            return
        if self._bounded and stager.detour:
            # Its pinned memory would come on top of what was admitted.
            _log.warning("state on %s is copied inside the call: %s", device, stager.variant)
            stager.close()
            return
        with self._lock:
            if self._wanted is arena and not self._given_up:
                self._device, self._stager = device, stager
                return
        stager.close(join=False)
