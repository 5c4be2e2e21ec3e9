"""Memory order that the state of an optimizer is to have, out of the strides that were saved."""

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
    """Return the strides that a state is to have; ``None`` where they were not saved.

    What lay in memory as its parameter did does so again, whatever the live parameter's order is: fused
    kernels go through both in the order of their memory.

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
        return strides  # a lazy one takes its size, and memory in order, when the model is loaded
    if of_param in arrays and strides == strides_saved(saved.strides, of_param, arrays[of_param]):
        return torch.empty_like(param.detach(), device="meta").stride()
    return strides


def strides_saved(saved: Mapping[str, Strides], source: str, spec: ArraySpec) -> Strides:
    """Return the strides that an array was saved with.

    Raises:
        ManifestCorrupt: If they are of another number of dimensions.
    """
    strides = saved.get(source)
    if strides is None:
        return row_major(spec.shape)
    if len(strides) != len(spec.shape):
        msg = f"the state document gives {source!r} {len(strides)} strides, for the shape {spec.shape}"
        raise ManifestCorrupt(msg)
    return strides
