"""Exact form of user values without pickle: strict, readable JSON, and arrays for tensors.

Promise: ``encode(value)``, decoded by :func:`gockpt.state.value_decoder.decode`, has the same types, order
and bits as ``value``; otherwise ``encode`` raises and names the part without an exact form. ``None``,
``bool``, ``str``, ``list``, ``int`` below 2^53, finite ``float`` and ``dict`` with ordinary string keys are
written as themselves. Every other value is an object whose first key starts with ``$``:

==================================== ==============================================================
``{"$tuple": [...]}``                also ``$set``, ``$frozenset``, ``$deque`` (with ``maxlen``)
``{"$dict": [[k, v], ...]}``         any other keys; also ``$OrderedDict``, ``$Counter`` (both with
                                     ``attributes`` if they carry some), ``$defaultdict`` (``factory``)
``{"$int": "0x..."}``                from 2^53 on, where other JSON readers would round
``{"$float": "nan"}``                ``inf``, ``-inf``, ``nan``, or the 16 hex digits of another NaN
``{"$complex": [re, im]}``           two floats
``{"$str": base64}``                 text with lone surrogates, as UTF-8 with ``surrogatepass``
``{"$bytes": base64}``               also ``$bytearray``; from 64 KiB on an array of uint8
``{"$list": {"$tensor": ...}}``      a list (or ``$tuple``) of 4096 or more ints or floats: an array
``{"$range": [start, stop, step]}``  also ``$slice``
``{"$tensor": [name, ...]}``         an array of the checkpoint, by the components of its name
``{"$ndarray": [name, ...]}``        the same, as a NumPy array
``{"$numpy": dtype, "value": v}``    a NumPy scalar; ``bytes`` (hex, little-endian) instead for NaNs
``{"$numpy.dtype": name}``           also ``$torch.dtype``, ``$torch.device``, ``$torch.Size``
``{"$enum": [class, member]}``       if ``enums`` is set: its decoding needs the class
``{"$Path": text}``                  also ``$PurePath``, ``$date``, ``$datetime``, ``$timedelta``
==================================== ==============================================================

Not kept: the identity of an object held in two places (each gets its own copy), ``requires_grad``, the
device of a tensor (decoded ones are on the CPU), and the memory order of an array.
"""

from __future__ import annotations

import base64
import datetime as dt
import enum
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from functools import lru_cache
from pathlib import PosixPath, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from gockpt.core.array_spec import DTYPES, public_name
from gockpt.errors import UnsupportedState
from gockpt.state.known_classes import class_name
from gockpt.state.tensors import is_subclass, refusal, to_host

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

__all__ = [
    "FACTORIES",
    "MAX_DEPTH",
    "NUMPY_SCALARS",
    "Json",
    "encode",
    "enum_document",
    "is_ordinary_key",
    "join",
]

Place: TypeAlias = "Callable[[tuple[str, ...], torch.Tensor], tuple[str, ...] | None]"

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

MAX_DEPTH = 64
"""Greatest depth of a value. A level takes up to three levels of JSON, whose reader stops at 256."""

EXACT_INT = 1 << 53
LONG_BYTES = 1 << 16
LONG_LIST = 4096

FACTORIES: dict[str, Any] = {
    kind.__name__: kind for kind in (bool, bytes, complex, dict, float, int, list, set, str, tuple)
}
"""The ``default_factory`` functions a ``defaultdict`` may have."""

NUMPY_SCALARS = frozenset(
    name for name in DTYPES if not name.startswith(("bfloat", "float8"))
)  # the names are NumPy's own


def encode(
    value: Any,
    *,
    prefix: tuple[str, ...],
    admit: Callable[[int], None] = lambda _: None,
    place: Place = lambda _, __: None,
    enums: bool = False,
) -> tuple[Json, dict[tuple[str, ...], torch.Tensor]]:
    """Return a value as JSON, and copies of the arrays that it refers to.

    Args:
        value: Nested plain values, tensors and arrays.
        prefix: Path of the value: the first components of its arrays' names, and of the path that an
            error shows.
        admit: Called with the size of each array in bytes before it is copied; may raise.
        place: Called with each tensor and the name that its array would have; returns the name of an array
            that holds the tensor already, or ``None``.
        enums: Whether members of enums are accepted. Decoding them needs their class to be imported.

    Returns:
        The JSON document, and CPU tensors by name (``prefix`` followed by keys and indices; a value
        that is itself a tensor is named ``prefix``).

    Raises:
        UnsupportedState: If a part has no exact form; names it, its type and the way out. Also for a
            value that contains itself, or nests deeper than :data:`MAX_DEPTH`.
    """
    encoder = _Encoder(prefix, admit, place, enums=enums)
    return encoder.encode(value), encoder.arrays


def join(items: Iterable[tuple[Json, Json]]) -> Json:
    """Return the document of a ``dict`` from its encoded keys and values."""
    pairs = list(items)
    if all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
        return {str(key): value for key, value in pairs}
    return {"$dict": [[key, value] for key, value in pairs]}


def enum_document(member: enum.Enum) -> dict[str, Json] | None:
    """Return ``{"$enum": [class, name]}``; ``None`` for a combination of flags, which has no such name."""
    if member.name not in type(member).__members__:
        return None
    return {"$enum": [class_name(type(member)), member.name]}


@lru_cache(maxsize=4096)
def is_ordinary_key(key: Hashable) -> bool:
    """Return whether a key can be a component of an array's name unchanged."""
    if type(key) is not str or not key or key.startswith("#") or "/" in key:
        return False
    return key.isascii() or not _has_surrogates(key)


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


class _Encoder:
    """State of one encoding: the arrays found so far, and the path to the current value."""

    def __init__(
        self, prefix: tuple[str, ...], admit: Callable[[int], None], place: Place, *, enums: bool
    ) -> None:
        self.admit = admit
        self.place = place
        self.enums = enums
        self.arrays: dict[tuple[str, ...], torch.Tensor] = {}
        self.name = list(prefix)
        self.path = [public_name(prefix)]
        self.open: set[int] = set()

    def encode(self, value: Any) -> Json:
        encoder = _ENCODERS.get(type(value))
        if encoder is not None:
            return encoder(self, value)
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if isinstance(value, np.generic):
            return self.numpy_scalar(value)
        if isinstance(value, np.dtype):
            return self.numpy_dtype(value)
        if self.enums and isinstance(value, enum.Enum) and (member := enum_document(value)) is not None:
            return member
        return self.refuse(value)

    def child(self, component: str, accessor: str, value: Any) -> Json:
        """Encode a value one level below; the component becomes part of its arrays' names."""
        self.name.append(component)
        self.path.append(accessor)
        try:
            return self.encode(value)
        finally:
            self.name.pop()
            self.path.pop()

    def refuse(self, value: Any, why: str | None = None) -> Json:
        kind = type(value)
        where = "".join(self.path)
        what = why or f"there is no exact form without pickle for it; {_way_out(value)}"
        msg = f"{where} is a {kind.__module__}.{kind.__qualname__} that can't be saved: {what}"
        raise UnsupportedState(msg)

    def enter(self, value: Any) -> None:
        if id(value) in self.open:
            self.refuse(value, "it contains itself; store the cycle's parts apart")
        if len(self.open) >= MAX_DEPTH:
            self.refuse(value, f"it nests deeper than {MAX_DEPTH} levels; flatten it")
        self.open.add(id(value))

    def array(self, tensor: torch.Tensor) -> list[Json]:
        name = tuple(self.name)
        self.arrays[name] = tensor
        return list(name)

    # -- leaves

    def scalar(self, value: bool | None) -> Json:  # noqa: FBT001 - the value itself
        return value

    def integer(self, value: int) -> Json:
        return value if -EXACT_INT < value < EXACT_INT else {"$int": hex(value)}

    def floating(self, value: float) -> Json:
        if math.isfinite(value):
            return value
        bits = struct.pack(">d", value)
        if math.isinf(value) or bits == struct.pack(">d", math.nan):
            return {"$float": repr(value)}
        return {"$float": bits.hex()}

    def complex_number(self, value: complex) -> Json:
        return {"$complex": [self.floating(value.real), self.floating(value.imag)]}

    def text(self, value: str) -> Json:
        if value.isascii() or not _has_surrogates(value):
            return value
        return {"$str": base64.b64encode(value.encode("utf-8", "surrogatepass")).decode()}

    def binary(self, value: bytes | bytearray) -> Json:
        tag = f"${type(value).__name__}"
        if len(value) < LONG_BYTES:
            return {tag: base64.b64encode(value).decode()}
        self.admit(len(value))
        return {tag: {"$tensor": self.array(torch.from_numpy(np.frombuffer(value, np.uint8).copy()))}}

    def tensor(self, value: torch.Tensor) -> Json:
        if is_subclass(value) and (held := self.place(tuple(self.name), value)) is not None:
            return {"$tensor": list(held)}
        # A lazily conjugated or negated one is resolved in a copy of its own.
        plain = not torch.nn.parameter.is_lazy(value) and not is_subclass(value)
        lazily = plain and (value.is_conj() or value.is_neg())
        if why := refusal(value.detach().resolve_conj().resolve_neg() if lazily else value):
            self.refuse(value, why)
        held = self.place(tuple(self.name), value)
        if held is not None:
            return {"$tensor": list(held)}
        copies = 2 if lazily else 1
        self.admit(copies * value.numel() * value.element_size())
        return {"$tensor": self.array(to_host(value))}

    def ndarray(self, value: np.ndarray[Any, Any]) -> Json:
        if value.dtype.name not in NUMPY_SCALARS or not value.dtype.isnative:
            kinds = ", ".join(sorted(NUMPY_SCALARS))
            self.refuse(value, f"arrays of dtype {value.dtype} are not stored; convert it to one of {kinds}")
        if value.ndim > 32:  # NumPy 2 allows 64
            self.refuse(value, "it has more than 32 dimensions; reshape it")
        self.admit(value.nbytes)
        return {"$ndarray": self.array(torch.from_numpy(value.copy(order="C")))}

    def numpy_scalar(self, value: np.generic) -> Json:
        dtype = value.dtype
        if dtype.name not in NUMPY_SCALARS or type(value) is not np.dtype(dtype.name).type:
            self.refuse(value, f"NumPy scalars of type {dtype} are not stored; convert it with .item()")
        if value != value:  # noqa: PLR0124 - a NaN, maybe with a payload that float() would change
            return {"$numpy": dtype.name, "bytes": np.array(value).tobytes().hex()}
        return {"$numpy": dtype.name, "value": self.encode(value.item())}

    def numpy_dtype(self, value: np.dtype[Any]) -> Json:
        if value.name not in NUMPY_SCALARS or not value.isnative or value.metadata:
            self.refuse(value, "only dtypes of stored arrays are kept; store its .str")
        return {"$numpy.dtype": value.name}

    def path_object(self, value: PurePosixPath) -> Json:
        return {"$Path" if isinstance(value, PosixPath) else "$PurePath": self.text(str(value))}

    def date(self, value: dt.date) -> Json:
        return {"$date": value.isoformat()}

    def moment(self, value: dt.datetime) -> Json:
        text = value.isoformat()
        again = dt.datetime.fromisoformat(text).replace(fold=value.fold)
        same = (again, again.tzname()) == (value, value.tzname())
        if not same or type(value.tzinfo) not in (type(None), dt.timezone):
            self.refuse(value, "only plain and fixed-offset times are kept; convert it to UTC or to text")
        return {"$datetime": text, "fold": 1} if value.fold else {"$datetime": text}

    def duration(self, value: dt.timedelta) -> Json:
        return {"$timedelta": [value.days, value.seconds, value.microseconds]}

    def bounds(self, value: range | slice) -> Json:
        parts = [self.encode(part) for part in (value.start, value.stop, value.step)]
        return {f"${type(value).__name__}": parts}

    def torch_word(self, value: torch.dtype | torch.device) -> Json:
        return {f"$torch.{type(value).__name__}": str(value).removeprefix("torch.")}

    # -- containers

    def items(self, values: Iterable[Any]) -> list[Json]:
        return [
            item if type(item) is str and item.isascii() else self.child(str(i), f"[{i}]", item)
            for i, item in enumerate(values)
        ]

    def sequence(self, value: Sequence[Any] | set[Any] | frozenset[Any]) -> Json:
        kind = type(value)
        if len(value) >= LONG_LIST and (packed := _pack(value, self.admit)) is not None:
            return {f"${kind.__name__}": {"$tensor": self.array(packed)}}
        self.enter(value)
        encoded = self.items(value)
        self.open.discard(id(value))
        if kind is list:
            return encoded
        return {"$torch.Size" if kind is torch.Size else f"${kind.__name__}": encoded}

    def queue(self, value: deque[Any]) -> Json:
        self.enter(value)
        encoded = self.items(value)
        self.open.discard(id(value))
        return {"$deque": encoded, "maxlen": value.maxlen}

    def pairs(self, value: Mapping[Any, Any]) -> list[tuple[Json, Json]]:
        self.enter(value)
        encoded = []
        for position, (key, item) in enumerate(value.items()):
            accessor = f"[{key!r}]" if len(repr(key)) <= 80 else f"[<key {position}>]"
            found = len(self.arrays)
            component = f"#{position}"
            if is_ordinary_key(key):
                component = encoded_key = key
            else:
                encoded_key = self.child(component, f"<key {position}>", key)
                if type(key) is int and str(key) not in value:
                    component = str(key)
            if len(self.arrays) != found:
                self.refuse(value, f"its key {position} holds an array; use names as keys")
            encoded.append((encoded_key, self.child(component, accessor, item)))
        self.open.discard(id(value))
        return encoded

    def mapping(self, value: dict[Any, Any]) -> Json:
        return join(self.pairs(value))

    def tagged_mapping(self, value: OrderedDict[Any, Any] | Counter[Any] | defaultdict[Any, Any]) -> Json:
        tag = f"${type(value).__name__}"
        document: dict[str, Json] = {tag: [[key, item] for key, item in self.pairs(value)]}
        if isinstance(value, defaultdict):
            factory = value.default_factory
            name = None if factory is None else getattr(factory, "__name__", "")
            if name is not None and FACTORIES.get(name) is not factory:
                self.refuse(value, f"its default_factory must be one of {sorted(FACTORIES)}; use a dict")
            document["factory"] = name
        elif attributes := vars(value):  # such as _metadata of a module's state_dict()
            document["attributes"] = self.child("#attributes", ".__dict__", attributes)
        return document


def _pack(values: Any, admit: Callable[[int], None]) -> torch.Tensor | None:
    """Return a long list of ints or of floats as one tensor; ``None`` for any other value."""
    if type(values) not in (list, tuple) or type(values[0]) not in (int, float):
        return None
    if set(map(type, values)) != {type(values[0])}:
        return None
    admit(8 * len(values))
    try:
        packed = np.array(values, dtype=np.int64 if type(values[0]) is int else np.float64)
    except OverflowError:
        return None
    return torch.from_numpy(packed)


def _way_out(value: Any) -> str:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return "give ._asdict() or tuple(...) of it"
    if hasattr(value, "state_dict"):
        return "give its state_dict()"
    if hasattr(type(value), "__members__"):
        return "give its .name or .value"
    if hasattr(type(value), "__dataclass_fields__"):
        return "give dataclasses.asdict(...) of it"
    if isinstance(value, np.ndarray):
        return "give np.array(...) of it"
    if isinstance(value, torch.Generator):
        return "give its get_state(), and set_state() when loading"
    return (
        "give plain values (numbers, text, lists, dicts, tensors) instead, or pass an object with "
        "state_dict() and load_state_dict() that makes and takes them"
    )


_ENCODERS: dict[type, Callable[[_Encoder, Any], Json]] = {
    type(None): _Encoder.scalar,
    bool: _Encoder.scalar,
    int: _Encoder.integer,
    float: _Encoder.floating,
    complex: _Encoder.complex_number,
    str: _Encoder.text,
    bytes: _Encoder.binary,
    bytearray: _Encoder.binary,
    list: _Encoder.sequence,
    tuple: _Encoder.sequence,
    set: _Encoder.sequence,
    frozenset: _Encoder.sequence,
    torch.Size: _Encoder.sequence,
    deque: _Encoder.queue,
    dict: _Encoder.mapping,
    OrderedDict: _Encoder.tagged_mapping,
    Counter: _Encoder.tagged_mapping,
    defaultdict: _Encoder.tagged_mapping,
    range: _Encoder.bounds,
    slice: _Encoder.bounds,
    np.ndarray: _Encoder.ndarray,
    torch.dtype: _Encoder.torch_word,
    torch.device: _Encoder.torch_word,
    PosixPath: _Encoder.path_object,
    PurePosixPath: _Encoder.path_object,
    dt.date: _Encoder.date,
    dt.datetime: _Encoder.moment,
    dt.timedelta: _Encoder.duration,
}
