"""Memory order of a loaded optimizer's state, from the saved strides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gockpt.errors import ManifestCorrupt
from gockpt.state.strides import row_major

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gockpt.core.array_spec import ArraySpec
    from gockpt.state.saved_document import SavedState
    from gockpt.state.strides import Strides

__all__ = ["order_of_state", "strides_saved"]


def order_of_state(
    saved: SavedState, arrays: Mapping[str, ArraySpec], source: str, param: torch.Tensor, of_param: str
) -> Strides | None:
    """Return the strides of a state to load; ``None`` if they were not saved.

    A state that had its parameter's memory order gets the live parameter's order, whichever it is: fused
    kernels traverse both in memory order.

    Args:
        saved: The state document.
        arrays: Every stored array by public name.
        source: The array of the state.
        param: The live parameter.
        of_param: The array of the parameter.
    """
    if saved.strides is None:
        return None
    spec = arrays[source]
    strides = strides_saved(saved.strides, source, spec)
    if torch.nn.parameter.is_lazy(param) or spec.shape != tuple(param.shape):
        return strides  # a lazy parameter gets its size and memory when the model is loaded
    if of_param in arrays and strides == strides_saved(saved.strides, of_param, arrays[of_param]):
        if param.is_contiguous() and param.stride() == strides:
            return strides
        return torch.empty_like(param.detach(), device="meta").stride()
    return strides


def strides_saved(saved: Mapping[str, Strides], source: str, spec: ArraySpec) -> Strides:
    """Return the strides that an array was saved with.

    Raises:
        ManifestCorrupt: If their number isn't that of the array's dimensions.
    """
    strides = saved.get(source)
    if strides is None:
        return row_major(spec.shape)
    if len(strides) != len(spec.shape):
        msg = f"the state document gives {source!r} {len(strides)} strides, for the shape {spec.shape}"
        raise ManifestCorrupt(msg)
    return strides
