"""Memory of tensors as bytes, shared with them.

A tensor is *dense* when its elements fill one range of memory exactly once, in any order of dimensions
(row-major, transposed, ``channels_last``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bytes = npt.NDArray[np.uint8]

__all__ = ["as_bytes", "dense_range", "is_dense"]


def is_dense(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's elements, as they are, fill one range of memory exactly once."""
    if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
        return False
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def as_bytes(tensor: torch.Tensor) -> Bytes:
    """Return the memory of a dense CPU tensor as 1-D bytes in storage order, sharing it."""
    # Not reshape(-1): dimensions of size 1 may have any stride, and keep it.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    result: Bytes = flat.view(torch.uint8).numpy()
    return result


def dense_range(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Return the address and number of a tensor's bytes, in storage order; nothing holds them alive.

    Returns:
        ``None`` where the tensor is not dense or not in CPU memory, and where its storage was made smaller
        than it.
    """
    if not (tensor.is_cpu and is_dense(tensor)):
        return None
    nbytes, itemsize = tensor.numel() * tensor.element_size(), tensor.element_size()
    if tensor.storage_offset() * itemsize + nbytes > tensor.untyped_storage().nbytes():
        return None
    return tensor.data_ptr(), nbytes
