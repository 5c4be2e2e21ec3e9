"""Additions of a closing tick to the live state: extras, random states, options, checked and copied."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from gockpt.core.arena_layout import lay_out
from gockpt.core.descriptors import ArenaId, ArrayPlace
from gockpt.errors import SaveError, UnsupportedState, UsageError
from gockpt.saving.at_once import copy_at_once
from gockpt.state import rng_state
from gockpt.state.state_document import build_document, capture_extras
from gockpt.state.tensors import spec_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

    import torch

    from gockpt.saving.boundary import Boundary
    from gockpt.saving.memory import Memory
    from gockpt.state.live_state import LiveState

__all__ = ["added_at", "refusing", "write_additions"]


def write_additions(added: Mapping[tuple[str, ...], torch.Tensor], memory: Memory) -> tuple[ArrayPlace, ...]:
    """Copy the tensors of extras and random states into their own arena, now.

    They are laid out at the close because only then is it known which there are.
    """
    layout = lay_out([spec_of(name, tensor) for name, tensor in added.items()])
    arena = memory.additions(layout)
    for array, tensor in zip(layout.arrays, added.values(), strict=True):
        copy_at_once(tensor, array, arena)
    return tuple(ArrayPlace(array, ArenaId.EXTRA) for array in layout.arrays)


def added_at(
    live: LiveState, moment: Boundary, admit: Callable[[int], None]
) -> tuple[dict[str, Any], dict[tuple[str, ...], torch.Tensor]]:
    """Copy everything but the live state's entries; return the state document, and the arrays by name.

    Raises:
        UnsupportedState: If an extra, an option or a state has no exact form; names it.
        StateTooLarge: If ``admit`` raises it.
    """
    with refusing():
        return build_document(
            live,
            step=moment.step,
            optimizer_steps=moment.updates,
            extra=capture_extras(moment.extra),
            rng=rng_state.capture(),
            admit=admit,
        )


@contextmanager
def refusing() -> Iterator[None]:
    """Raise a ``UsageError`` about the state as ``UnsupportedState``, which is a ``SaveError`` as well."""
    try:
        yield
    except UsageError as error:
        if isinstance(error, SaveError):
            raise
        raise UnsupportedState(str(error)) from error
