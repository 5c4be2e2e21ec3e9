"""Checkpoints on disk as plain Zarr v3: written, read and verified here. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gockpt.storage.format.zarr_dtypes import register_zarr

__all__ = ["register_zarr"]


def __getattr__(name: str) -> Any:
    """Load ``register_zarr`` when it is first asked for: it imports zarr."""
    if name == "register_zarr":
        from gockpt.storage.format.zarr_dtypes import register_zarr

        return register_zarr
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
