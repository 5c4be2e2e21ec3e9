"""Copy requests for pieces of the state, and for what goes into the gradient ring."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gockpt.core.array_spec import public_name
from gockpt.core.descriptors import ArenaId
from gockpt.staging.stager import CopyRequest, Source
from gockpt.tensor_memory import is_dense

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Sequence

    from gockpt.core.array_spec import Name
    from gockpt.saving.write_items import Piece
    from gockpt.state.live_state import LiveState

__all__ = ["owners", "requests_of", "ring_request", "sources_of"]


def owners(optimizer: object | None) -> Collection[Hashable] | None:
    """Return the owners that an optimizer's update overwrites; with ``None``, anything may be overwritten."""
    return None if optimizer is None else {id(optimizer), None}


def ring_request(source: Source, offset: int) -> CopyRequest:
    """Return the request to copy a source to a place in the gradient ring, as it is."""
    return CopyRequest(source, ArenaId.RING, offset, None)


def sources_of(live: LiveState, pieces: Sequence[Piece]) -> list[Source]:
    """Return the bytes of the stretches of some pieces, as they are in ``live``.

    Raises:
        ValueError: If a tensor is no longer contiguous in memory; names it.
    """
    dense: set[Name] = set()
    found = []
    for piece in pieces:
        for stretch in piece.stretches:
            tensor = live.entries[stretch.name]
            if stretch.name not in dense and not is_dense(tensor):
                msg = f"{public_name(stretch.name)} is no longer contiguous in memory"
                raise ValueError(msg)
            dense.add(stretch.name)
            found.append(Source(tensor, stretch.start * stretch.itemsize, stretch.nbytes, stretch.position))
    return found


def requests_of(live: LiveState, pieces: Sequence[Piece]) -> list[CopyRequest]:
    """Return the requests to copy some pieces to their places in the state's arena."""
    owner = live.once("owners", lambda: _owners(live))
    stretches = [stretch for piece in pieces for stretch in piece.stretches]
    return [
        CopyRequest(source, ArenaId.STATE, stretch.offset, owner.get(stretch.name))
        for stretch, source in zip(stretches, sources_of(live, pieces), strict=True)
    ]


def _owners(live: LiveState) -> dict[Name, Hashable]:
    """Return which optimizer overwrites an array; ``None`` where it is not just one."""
    found: dict[Name, Hashable] = {}
    for param in live.params:
        owner = id(live.optimizers[param.optimizer_index])
        for held in (param.name, *param.state_names.values()):
            for name in live.arrays_of(held):
                found[name] = owner if found.get(name, owner) == owner else None
    return found
