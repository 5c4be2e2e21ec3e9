"""bfloat16 and float8 for zarr-python, which has no such data types of its own.

zarr-python finds these classes by the entry points ``zarr.data_type`` from 3.4.1 on; before that,
and always for Python 3.11, call :func:`register_zarr` once. Values are ml_dtypes scalars, bit for
bit; ml_dtypes is imported when the first value is touched, so that an environment without it can
still open everything else.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from zarr.core.dtype.common import HasEndianness, HasItemSize
from zarr.dtype import ZDType, data_type_registry

try:
    from zarr.errors import DataTypeValidationError  # type: ignore[attr-defined, unused-ignore]
except ImportError:  # older releases have it elsewhere
    from zarr.dtype import DataTypeValidationError

if TYPE_CHECKING:
    from zarr.core.common import JSON, ZarrFormat
    from zarr.core.dtype.common import DTypeJSON

__all__ = [
    "BFloat16",
    "Float8E4M3FN",
    "Float8E4M3FNUZ",
    "Float8E5M2",
    "Float8E5M2FNUZ",
    "Float8E8M0FNU",
    "register_zarr",
]

_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def register_zarr() -> None:
    """Make zarr-python read and write bfloat16 and float8 arrays, in this process.

    Calling it again changes nothing, and a data type that zarr-python already knows is left alone.
    """
    for cls in (BFloat16, Float8E4M3FN, Float8E5M2, Float8E4M3FNUZ, Float8E5M2FNUZ, Float8E8M0FNU):
        if cls._zarr_v3_name not in data_type_registry.contents:
            data_type_registry.register(cls._zarr_v3_name, cls)


@dataclass(frozen=True, kw_only=True)
class _Extension(ZDType[np.dtype[Any], np.generic], HasItemSize):
    """A float of ml_dtypes as a Zarr v3 extension data type; Zarr v2 has no name for it."""

    _zarr_v3_name: ClassVar[str]

    @classmethod
    def _check_native_dtype(cls, dtype: np.dtype[Any]) -> bool:  # type: ignore[override]
        # By name, so that asking about float32 doesn't import ml_dtypes.
        return dtype.name == cls._zarr_v3_name

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype[Any]) -> Self:
        """Wrap the numpy dtype, which must be the one of this class."""
        if cls._check_native_dtype(dtype):
            return cls()
        msg = f"{dtype} is not {cls._zarr_v3_name}"
        raise DataTypeValidationError(msg)

    def to_native_dtype(self) -> np.dtype[Any]:
        """Return the numpy dtype that ml_dtypes defines."""
        try:
            import ml_dtypes
        except ImportError as error:
            msg = f"reading {self._zarr_v3_name} through zarr needs ml_dtypes: pip install ml_dtypes"
            raise ImportError(msg) from error
        dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, self._zarr_v3_name))
        return dtype

    @classmethod
    def _from_json_v2(cls, data: DTypeJSON) -> Self:
        msg = f"{cls._zarr_v3_name} exists in Zarr v3 only, not as {data!r}"
        raise DataTypeValidationError(msg)

    @classmethod
    def _from_json_v3(cls, data: DTypeJSON) -> Self:
        if data == cls._zarr_v3_name:
            return cls()
        msg = f"{data!r} is not {cls._zarr_v3_name!r}"
        raise DataTypeValidationError(msg)

    def to_json(self, zarr_format: ZarrFormat) -> str:  # type: ignore[override]
        """Return the name of the data type."""
        if zarr_format == 3:
            return self._zarr_v3_name
        msg = f"{self._zarr_v3_name} can't be stored in Zarr v{zarr_format}: use Zarr v3"
        raise ValueError(msg)

    def _check_scalar(self, data: object) -> bool:
        if isinstance(data, str):
            return data in _SPECIAL
        return isinstance(data, int | float | np.number) or type(data) is self.to_native_dtype().type

    def cast_scalar(self, data: object) -> np.generic:
        """Return a number, or the name of a special one, as a scalar of this type."""
        if not self._check_scalar(data):
            msg = f"{data!r} is not a {self._zarr_v3_name} scalar"
            raise TypeError(msg)
        scalar: np.generic = self.to_native_dtype().type(_SPECIAL[data] if isinstance(data, str) else data)
        return scalar

    def default_scalar(self) -> np.generic:
        """Return zero."""
        return self.cast_scalar(0)

    def from_json_scalar(self, data: JSON, *, zarr_format: ZarrFormat) -> np.generic:
        """Return a fill value: a number, ``"NaN"``, ``"Infinity"`` or the bits as ``"0x..."``."""
        if isinstance(data, str) and data.startswith("0x"):
            bits = int(data, 16).to_bytes(self.item_size, sys.byteorder)
            scalar: np.generic = np.frombuffer(bits, self.to_native_dtype())[0]
            return scalar
        if zarr_format == 3 and not isinstance(data, bool):
            return self.cast_scalar(data)
        msg = f"{data!r} is not a {self._zarr_v3_name} fill value of Zarr v{zarr_format}"
        raise TypeError(msg)

    def to_json_scalar(self, data: object, *, zarr_format: ZarrFormat) -> JSON:
        """Return a fill value that :meth:`from_json_scalar` gives back bit for bit."""
        del zarr_format
        scalar = np.asarray(self.cast_scalar(data))
        value = float(scalar)
        if math.isfinite(value):
            return value
        for name, special in _SPECIAL.items():
            if np.asarray(self.cast_scalar(special)).tobytes() == scalar.tobytes():
                return name
        return f"0x{int(scalar.view(f'u{self.item_size}')):0{2 * self.item_size}x}"


@dataclass(frozen=True, kw_only=True)
class BFloat16(_Extension, HasEndianness):
    """The upper half of a float32."""

    _zarr_v3_name: ClassVar[str] = "bfloat16"

    @property
    def item_size(self) -> int:
        """Bytes per element."""
        return 2


@dataclass(frozen=True, kw_only=True)
class _Float8(_Extension):
    """One byte, so it must not have an endianness: zarr-python would demand one of its codec."""

    @property
    def item_size(self) -> int:
        """Bytes per element."""
        return 1


@dataclass(frozen=True, kw_only=True)
class Float8E4M3FN(_Float8):
    """4 bits of exponent, 3 of mantissa, no infinities."""

    _zarr_v3_name: ClassVar[str] = "float8_e4m3fn"


@dataclass(frozen=True, kw_only=True)
class Float8E5M2(_Float8):
    """5 bits of exponent, 2 of mantissa."""

    _zarr_v3_name: ClassVar[str] = "float8_e5m2"


@dataclass(frozen=True, kw_only=True)
class Float8E4M3FNUZ(_Float8):
    """4 bits of exponent, 3 of mantissa, no infinities, no negative zero."""

    _zarr_v3_name: ClassVar[str] = "float8_e4m3fnuz"


@dataclass(frozen=True, kw_only=True)
class Float8E5M2FNUZ(_Float8):
    """5 bits of exponent, 2 of mantissa, no infinities, no negative zero."""

    _zarr_v3_name: ClassVar[str] = "float8_e5m2fnuz"


@dataclass(frozen=True, kw_only=True)
class Float8E8M0FNU(_Float8):
    """8 bits of exponent and nothing else: positive powers of two and NaN, neither zero nor sign."""

    _zarr_v3_name: ClassVar[str] = "float8_e8m0fnu"

    def default_scalar(self) -> np.generic:
        """Return the smallest number, whose bits are zero."""
        return self.from_json_scalar("0x00", zarr_format=3)
