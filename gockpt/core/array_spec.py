"""Arrays as specs: name, shape and dtype, in the terms of Zarr v3.

Pure: standard library only. The dtype names are the Zarr v3 ones (core specification and
zarr-extensions), which are also torch's names without the ``torch.`` prefix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["DTYPES", "MAX_NDIM", "ArraySpec", "DType", "Name", "public_name"]

Name = tuple[str, ...]
"""Components of an array's name, outermost first: ``("model", fqn)``, ``("optimizer", fqn, state)``."""

MAX_NDIM = 32


@dataclass(frozen=True, slots=True)
class DType:
    """One element type.

    Attributes:
        name: Zarr v3 ``data_type``; equals ``str(torch_dtype)[6:]``.
        itemsize: Bytes per element.
        fill_value: The JSON ``fill_value`` whose bytes are all zero.
        core: Whether every supported version of zarr-python supports it without extensions.
    """

    name: str
    itemsize: int
    fill_value: bool | int | float | list[float]
    core: bool = True


DTYPES: dict[str, DType] = {
    d.name: d
    for d in (
        DType("bool", 1, False),
        DType("int8", 1, 0),
        DType("int16", 2, 0),
        DType("int32", 4, 0),
        DType("int64", 8, 0),
        DType("uint8", 1, 0),
        DType("uint16", 2, 0),
        DType("uint32", 4, 0),
        DType("uint64", 8, 0),
        DType("float16", 2, 0.0),
        DType("float32", 4, 0.0),
        DType("float64", 8, 0.0),
        DType("complex64", 8, [0.0, 0.0]),
        DType("complex128", 16, [0.0, 0.0]),
        DType("bfloat16", 2, 0.0, core=False),
        DType("float8_e4m3fn", 1, 0.0, core=False),
        DType("float8_e5m2", 1, 0.0, core=False),
        DType("float8_e4m3fnuz", 1, 0.0, core=False),
        DType("float8_e5m2fnuz", 1, 0.0, core=False),
        DType("float8_e8m0fnu", 1, 2.0**-127, core=False),  # its bits are an exponent: it has no zero
    )
}
"""Every dtype that is stored, by name. Others are refused by name, never cast."""


def public_name(name: Name) -> str:
    """Return the name that users see and pass: components joined by ``/``.

    Examples:
        >>> public_name(("optimizer", "fc.weight", "exp_avg"))
        'optimizer/fc.weight/exp_avg'
    """
    return "/".join(name)


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One stored array.

    Attributes:
        name: A component may hold any text, ``/`` included; the public name joins them by ``/``.
        shape: Global shape.
        dtype: A key of :data:`DTYPES`.
    """

    name: Name
    shape: tuple[int, ...]
    dtype: str

    @property
    def public_name(self) -> str:
        """Its name as users see and pass it."""
        return public_name(self.name)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPES[self.dtype].itemsize

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a 0-d array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.numel * self.itemsize
