"""Arenas that a device copies into: registered with it, piece by piece.

An arena is mapped first and registered then, because pinned allocators round up to powers of two. Where the
system refuses to register that much, copies go through a little pinned memory of the device's own instead.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gockpt.staging.arena import Arena
    from gockpt.staging.device import Device

__all__ = ["PIECE_BYTES", "Pinned"]

_log = logging.getLogger("gockpt")

PIECE_BYTES = 1 << 30
"""Registered at a time: a call for very much memory holds up others that need the driver."""


class Pinned:
    """One arena, as far as it could be registered: all of it, or nothing.

    Attributes:
        arena: The arena; alive as long as it is registered.
        reason: Why it is not registered; ``None`` if it is.
    """

    def __init__(self, device: Device, arena: Arena, *, piece_bytes: int = PIECE_BYTES) -> None:
        """Register ``arena``. Slow: it takes every page. Not for the training thread."""
        self.arena = arena
        self.reason: str | None = None
        self._device = device
        self._starts: list[int] = []
        self._piece_bytes = piece_bytes
        try:
            for start in range(0, arena.nbytes, piece_bytes):
                device.register(self._piece(start))
                self._starts.append(start)
        except Exception as error:  # noqa: BLE001 - whatever the driver raises: there is another way
            self.reason = f"{arena.nbytes} bytes of host memory could not be registered ({error})"
            _log.info("%s: copies from %s take a detour through pinned memory", self.reason, device.name)
            self.release()

    @property
    def registered(self) -> bool:
        """Whether copies may go straight into it."""
        return self.reason is None and bool(self._starts)

    def release(self) -> None:
        """Unregister what was registered. Nothing may be on its way into it any more.

        Raises:
            Exception: What the driver raised last; all pieces were tried.
        """
        failed: Exception | None = None
        while self._starts:
            try:
                self._device.unregister(self._piece(self._starts.pop()))
            except Exception as error:  # noqa: BLE001 - the others are tried first
                failed = error
        if failed is not None:
            raise failed

    def _piece(self, start: int) -> Bytes:
        return self.arena.view(start, min(self._piece_bytes, self.arena.nbytes - start))


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]
