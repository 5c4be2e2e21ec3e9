"""Memory order of tensors: strides are saved, compared and given to new memory.

An optimizer's arithmetic may round differently if its state has another memory order (a transposed buffer, a
QR factor, ``channels_last``), so a resumed run is bit-identical only if the strides are the same.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Strides", "allocate", "has_strides", "row_major", "strides_of"]

Strides: TypeAlias = "tuple[int, ...]"

MAX_GAPS = 4
"""New memory takes at most this many times its elements' bytes; wider gaps are closed."""


def row_major(shape: Sequence[int]) -> Strides:
    """Return the strides, in elements, of a contiguous tensor.

    Examples:
        >>> row_major((2, 3, 4))
        (12, 4, 1)
    """
    return _row_major(tuple(shape))


@lru_cache(maxsize=1024)
def _row_major(shape: tuple[int, ...]) -> Strides:
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def strides_of(tensor: torch.Tensor) -> Strides | None:
    """Return a tensor's strides; ``None`` if it is row-major or empty."""
    if not tensor.numel() or tensor.stride() == row_major(tensor.shape):
        return None
    return tensor.stride()


def has_strides(tensor: torch.Tensor, strides: Strides) -> bool:
    """Whether each element of a tensor has the offset that these strides give it."""
    if not tensor.numel() or tensor.stride() == strides:
        return True
    return all(
        size == 1 or one == other
        for size, one, other in zip(tensor.shape, tensor.stride(), strides, strict=True)
    )


def allocate(
    shape: Sequence[int], strides: Strides, *, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return new memory with these strides.

    Elements share memory only along dimensions of stride 0 (``expand``). If the strides would make other
    elements overlap, or leave wide gaps, the result is dense, with its dimensions in the same order.
    """
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True) if size)
    elements = 1
    for size, stride in zip(shape, strides, strict=True):
        elements *= size if stride else 1
    if not elements or 0 in shape:
        return torch.empty(shape, dtype=dtype, device=device)
    if extent > MAX_GAPS * elements or _overlaps(shape, strides):
        order = sorted(range(len(shape)), key=lambda dim: (strides[dim], -dim), reverse=True)
        inner = torch.empty([shape[dim] for dim in order], dtype=dtype, device=device)
        return inner.permute([order.index(dim) for dim in range(len(shape))])
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _overlaps(shape: Sequence[int], strides: Strides) -> bool:
    """Whether elements may share memory other than along dimensions of stride 0."""
    reach = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size == 1 or not stride:
            continue
        if stride < reach:
            return True
        reach += stride * (size - 1)
    return False
