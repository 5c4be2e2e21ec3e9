"""A CUDA device, by torch, the driver, and the kernels that :mod:`gockpt.staging.pack_launch` launches.

Device memory comes from torch's allocator, on a stream of its own: a block is never one that training has
just let go of and may still be writing. Events block in the driver, not in a loop.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gockpt.staging.pack_launch import Encoding, Fingerprints, Packing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from gockpt.staging.device import Device, Event, Stream
    from gockpt.staging.stager import Source

    Bytes = npt.NDArray[np.uint8]

__all__ = ["CudaDevice"]

PORTABLE_AND_MAPPED = 1 | 2
"""``cudaHostRegisterPortable | cudaHostRegisterMapped``: any context may use it, and kernels store there."""

BESIDE = 32
"""Programs of a launch beside training: a few more than keep a copy engine busy."""

PER_PROCESSOR = 8
"""Programs per multiprocessor of a launch that training waits for anyway."""


class _Stream:
    """A stream, and how many programs a launch on it may have."""

    def __init__(self, stream: torch.cuda.Stream, programs: int) -> None:
        self.stream = stream
        self.programs = programs

    def record(self) -> Event:
        event: torch.cuda.Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return event

    def wait(self, event: Event) -> None:
        if not isinstance(event, torch.cuda.Event):
            msg = f"expected a CUDA event, got {event!r}"
            raise TypeError(msg)
        self.stream.wait_event(event)


class _Prints:
    """Fingerprints on their way to the host."""

    def __init__(self, launched: Fingerprints) -> None:
        self._launched = launched
        self._launched.send()

    def values(self) -> list[int]:
        return list(self._launched.values().values())


class CudaDevice:
    """One CUDA device, see :class:`gockpt.staging.device.Device`.

    Beside what :meth:`allocate` gives, a launch takes tables of a thousandth of the bytes that it reads, or
    of up to a 512th where it encodes gradients, until it has run.
    """

    def __init__(self, device: torch.device) -> None:
        """Use ``device``, a CUDA device with an index."""
        self._device = device
        properties = torch.cuda.get_device_properties(device)
        self._all = PER_PROCESSOR * int(properties.multi_processor_count)
        self._name = f"{device} ({properties.name})"
        self._memory = _new_stream(device)

    @property
    def name(self) -> str:
        """Name of the device in messages."""
        return self._name

    def holds(self, tensor: Any) -> bool:
        """Whether a tensor is in its memory."""
        return bool(tensor.device == self._device)

    def main(self) -> _Stream:
        """Return the current stream."""
        return _Stream(torch.cuda.current_stream(self._device), self._all)

    def side(self) -> _Stream:
        """Return a new stream, of which launches are small."""
        return _Stream(_new_stream(self._device), BESIDE)

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""
        with torch.cuda.device(self._device):
            return bool(torch.cuda.is_current_stream_capturing())

    def free_bytes(self) -> int:
        """Return what the driver calls free."""
        return int(torch.cuda.mem_get_info(self._device)[0])

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return uint8 of that length."""
        with torch.cuda.stream(self._memory):
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        # torch has few streams and hands them out in turn: this one may be a stream of the user's as well,
        # whose kernels still use a block that was freed there. It is idle otherwise, and this takes no time.
        self._memory.synchronize()
        return memory

    def release(self, memory: Any) -> None:
        """Nothing: torch takes it back when the last reference goes."""

    def pack(self, stream: Stream, sources: Sequence[Source], places: Sequence[int], target: Any) -> object:
        """Launch the packing kernel, with its tables on the way."""
        buffer = torch.from_numpy(target) if isinstance(target, np.ndarray) else target
        own = _own(stream)
        with torch.cuda.stream(own.stream):
            packing = Packing(_bytes(sources), places, buffer.numel(), self._device)
            packing.pack(buffer, max_programs=own.programs)
        return packing

    def encode(
        self,
        stream: Stream,
        sources: Sequence[Source],
        encoding: str,
        places: Sequence[tuple[int, int]],
        target: Any,
    ) -> object:
        """Launch the kernels that encode, with their tables on the way."""
        own = _own(stream)
        with torch.cuda.stream(own.stream):
            encoded = Encoding(_elements(sources), encoding, places, target.numel(), self._device)
            encoded.encode(target, max_programs=own.programs)
        return encoded

    def copy(self, stream: Stream, memory: Any, place: int, target: Bytes) -> None:
        """Queue one copy."""
        with torch.cuda.stream(_own(stream).stream):
            torch.from_numpy(target).copy_(memory[place : place + target.nbytes], non_blocking=True)

    def prints(self, stream: Stream, sources: Sequence[Source]) -> _Prints:
        """Launch the fingerprint kernel, and the copy of its sums."""
        own = _own(stream)
        with torch.cuda.stream(own.stream):
            prints = Fingerprints(_bytes(sources), [s.position for s in sources], self._device)
            prints.launch(max_programs=own.programs)
            return _Prints(prints)

    def register(self, memory: Bytes) -> None:
        """Register memory, for all contexts and for kernels."""
        with torch.cuda.device(self._device):
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            code = int(cudart.cudaHostRegister(memory.ctypes.data, memory.nbytes, PORTABLE_AND_MAPPED))
            self._check(code, f"cudaHostRegister of {memory.nbytes} bytes")

    def unregister(self, memory: Bytes) -> None:
        """Unregister memory."""
        with torch.cuda.device(self._device):
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            code = int(cudart.cudaHostUnregister(memory.ctypes.data))
            self._check(code, "cudaHostUnregister")

    def pinned(self, nbytes: int) -> Bytes:
        """Return a little of torch's pinned memory."""
        with torch.cuda.device(self._device):  # no context on another device
            pinned = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        memory: Bytes = pinned.numpy()
        return memory

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        """Show a range in NVTX and in torch.profiler."""
        with torch.profiler.record_function(name), torch.cuda.nvtx.range(name):
            yield

    def _check(self, code: int, what: str) -> None:
        if not code:
            return
        # The runtime keeps the code as this thread's last error, and torch's next launch would raise it.
        with suppress(RuntimeError):
            torch.ones(1, device=self._device).add_(1)
        msg = f"{what} failed with CUDA error {code}"
        raise RuntimeError(msg)


def _own(stream: Stream) -> _Stream:
    if not isinstance(stream, _Stream):
        msg = f"expected a stream of this device, got {stream!r}"
        raise TypeError(msg)
    return stream


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


def _bytes(sources: Sequence[Source]) -> dict[str, torch.Tensor]:
    """Return the bytes of each source as a 1-D tensor."""
    return {
        str(number): _flat(source).view(torch.uint8)[source.low : source.low + source.nbytes]
        for number, source in enumerate(sources)
    }


def _elements(sources: Sequence[Source]) -> dict[str, torch.Tensor]:
    """Return the elements of each source as a 1-D tensor."""
    found = {}
    for number, source in enumerate(sources):
        flat = _flat(source)
        first = source.low // flat.itemsize
        found[str(number)] = flat[first : first + source.nbytes // flat.itemsize]
    return found


def _flat(source: Source) -> torch.Tensor:
    tensor: torch.Tensor = source.memory.detach()
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


if TYPE_CHECKING:
    _is_a_device: type[Device] = CudaDevice
