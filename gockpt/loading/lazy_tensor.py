"""Tensors of a checkpoint that are read when indexed, and only the indexed part.

:func:`select` is pure: it maps an index to the smallest box around the selected elements, and the index that
remains within that box.
"""

from __future__ import annotations

import difflib
import operator
from typing import TYPE_CHECKING, Any

import torch

from gockpt.core.boxes import Box
from gockpt.errors import ManifestCorrupt
from gockpt.state.tensors import DTYPE_OF
from gockpt.tensor_memory import as_bytes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from gockpt.core.array_spec import ArraySpec
    from gockpt.storage.read.checkpoint import StoredCheckpoint

__all__ = ["LazyTensor", "not_found", "read_whole", "select"]

MAX_COMPARED = 5000
"""Number of names that are compared with a misspelt one."""


class LazyTensor:
    """One tensor of a checkpoint: shape and dtype are known, values are read when indexed.

    Index it like a tensor with integers, slices, ``...`` and ``None``; ``[...]`` reads all of it. The result
    is an ordinary CPU tensor of its own.
    """

    __slots__ = ("_spec", "_stored", "_verify", "name")

    def __init__(self, stored: StoredCheckpoint, spec: ArraySpec, name: str, *, verify: bool) -> None:
        self._stored = stored
        self._spec = spec
        self._verify = verify
        self.name = name

    @property
    def shape(self) -> torch.Size:
        """Its global shape."""
        return torch.Size(self._spec.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return DTYPE_OF[self._spec.dtype]

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self._spec.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all its elements."""
        return self._spec.nbytes

    def numel(self) -> int:
        """Return the number of elements."""
        return self._spec.numel

    def __len__(self) -> int:
        if not self._spec.shape:
            msg = f"{self.name} has no dimensions, so no length; read it with [...]"
            raise TypeError(msg)
        return self._spec.shape[0]

    def __repr__(self) -> str:
        return f"LazyTensor({self.name!r}, shape={self._spec.shape}, dtype={self.dtype})"

    def __getitem__(self, index: Any) -> torch.Tensor:
        box, rest = select(self._spec.shape, index)
        result = torch.empty(box.shape, dtype=self.dtype, device="cpu")
        if box.numel:
            self._stored.read_into(self._spec.public_name, box, as_bytes(result), verify=self._verify)
        sparse = any(isinstance(part, slice) and part.step not in (None, 1) for part in rest)
        # A strided result must not keep the elements in between alive.
        return result[rest].clone() if sparse else result[rest]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> np.ndarray[Any, Any]:  # noqa: FBT001 - NumPy's protocol
        if copy is False:
            msg = f"{self.name} is read from disk, which makes a copy"
            raise ValueError(msg)
        values: np.ndarray[Any, Any] = self[...].numpy()
        return values if dtype is None else values.astype(dtype, copy=False)


def select(shape: tuple[int, ...], index: Any) -> tuple[Box, tuple[Any, ...]]:
    """Return the smallest box around the elements that an index selects, and the index within that box.

    Raises:
        IndexError: If an integer is out of range, or there are more indices than dimensions.
        ValueError: If a slice has a negative step.
        TypeError: If the index holds anything but integers, slices, ``...`` and ``None``.
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    dots = [at for at, part in enumerate(parts) if part is Ellipsis]
    given = sum(part is not None and part is not Ellipsis for part in parts)
    if len(dots) > 1 or given > len(shape):
        msg = f"{given} indices and {len(dots)} '...' for {len(shape)} dimensions"
        raise IndexError(msg)
    at = dots[0] if dots else len(parts)
    parts[at : at + 1] = [slice(None)] * (len(shape) - given)
    start: list[int] = []
    extent: list[int] = []
    rest: list[Any] = []
    for part in parts:
        if part is None:
            rest.append(None)
            continue
        n = shape[len(start)]
        if isinstance(part, slice):
            low, high, step = part.indices(n)
            if step < 1:
                msg = f"a step of {step} would read backwards; read with a positive one, then use .flip()"
                raise ValueError(msg)
            count = len(range(low, high, step))
            start.append(low if count else 0)
            extent.append((count - 1) * step + 1 if count else 0)
            rest.append(slice(None, None, step))
            continue
        number = _integer(part)
        if not -n <= number < n:
            msg = f"index {number} is out of range for dimension {len(start)} with {n} elements"
            raise IndexError(msg)
        start.append(number % n)
        extent.append(1)
        rest.append(0)
    return Box(tuple(start), tuple(extent)), tuple(rest)


def _integer(part: Any) -> int:
    if not isinstance(part, (bool, torch.Tensor, list)):
        try:
            return operator.index(part)
        except TypeError:
            pass
    msg = f"index with integers, slices and '...', not {type(part).__name__}; read with [...] and index that"
    raise TypeError(msg)


def read_whole(stored: StoredCheckpoint, name: str) -> torch.Tensor:
    """Return an array that the state document refers to, as a new CPU tensor.

    Raises:
        ManifestCorrupt: If there is no array of that name.
        ChunkCorrupt: If its bytes differ from those written.
    """
    if name not in stored.arrays:
        msg = f"the state document refers to an array {name!r} that the checkpoint does not hold"
        raise ManifestCorrupt(msg)
    spec = stored.arrays[name].spec
    result = torch.empty(spec.shape, dtype=DTYPE_OF[spec.dtype], device="cpu")
    if spec.numel:
        stored.read_into(name, None, as_bytes(result))
    return result


def not_found(name: Any, names: list[str], step: int) -> str:
    """Return the message for a name that is not in a checkpoint, with similar names."""
    msg = f"no tensor {name!r} in the checkpoint of step {step}"
    if not isinstance(name, str):
        return f"{msg}; names are strings such as {names[0]!r}" if names else msg
    near = [full for full in (f"model/{name}", f"optimizer/{name}") if full in names]
    near = near or difflib.get_close_matches(name, names[:MAX_COMPARED], n=3)
    if near:
        return f"{msg}; did you mean {' or '.join(repr(one) for one in near)}?"
    return f"{msg}; it has {len(names)} names" + (f", such as {names[0]!r}" if names else "")
