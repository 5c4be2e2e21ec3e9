"""Decoder of the documents that :mod:`gockpt.state.value_encoder` writes.

Documents are untrusted: only names in the tables below are looked up or called, and a document that
``encode`` would not have written raises :class:`ManifestCorrupt`.
"""

from __future__ import annotations

import base64
import datetime as dt
import enum
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import PosixPath, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from gockpt.errors import GockptError, ManifestCorrupt, StateMismatch
from gockpt.state.known_classes import known_subclasses
from gockpt.state.value_encoder import FACTORIES, NUMPY_SCALARS

if TYPE_CHECKING:
    from collections.abc import Callable

    from gockpt.state.value_encoder import Json

__all__ = ["array_name", "decode", "enum_member", "is_mapping", "items"]

Read: TypeAlias = "Callable[[tuple[str, ...]], torch.Tensor]"


def decode(document: Json, read: Read) -> Any:
    """Return the value that was encoded.

    Args:
        document: The result of ``encode``, read back from JSON.
        read: Returns the array of a name as a new CPU tensor, which becomes part of the value.

    Raises:
        ManifestCorrupt: If ``encode`` doesn't write such a document.
    """
    try:
        return _decode(document, read)
    except GockptError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
        msg = f"a saved value is not in a known form ({error}); it may come from a newer gockpt"
        raise ManifestCorrupt(msg) from error


def is_mapping(document: Json) -> bool:
    """Return whether this is the document of an ordinary ``dict``, which :func:`items` accepts."""
    if not isinstance(document, dict):
        return False
    return "$dict" in document or not any(key.startswith("$") for key in document)


def items(document: Json) -> list[tuple[Json, Json]]:
    """Return the encoded keys and values of an encoded ``dict``; the inverse of ``join``.

    Raises:
        ManifestCorrupt: If it is the document of another type.
    """
    if isinstance(document, dict) and is_mapping(document):
        if "$dict" not in document:
            return list(document.items())
        pairs = document["$dict"]
        if isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            return [(pair[0], pair[1]) for pair in pairs]  # type: ignore[index] # checked above
    msg = f"expected a saved dict, found {str(document)[:60]}"
    raise ManifestCorrupt(msg)


def array_name(document: Json) -> tuple[str, ...] | None:
    """Return the array's name if the document is that of a tensor, else ``None``.

    Raises:
        ManifestCorrupt: If the name is malformed.
    """
    if isinstance(document, dict) and list(document) == ["$tensor"]:
        try:
            return _name(document["$tensor"])
        except TypeError as error:
            raise ManifestCorrupt(str(error)) from error
    return None


def enum_member(content: Any, where: str) -> enum.Enum:
    """Return the member that a document names.

    Args:
        content: The value of ``$enum``.
        where: Name of its holder, for the message.

    Raises:
        StateMismatch: If the enum doesn't exist in this process, or lacks the member.
    """
    if isinstance(content, list) and len(content) == 2:
        for kind in known_subclasses(enum.Enum, str(content[0])):
            if str(content[1]) in kind.__members__:
                return kind.__members__[str(content[1])]  # type: ignore[no-any-return]
    named = ".".join(map(str, content)) if isinstance(content, list) else str(content)
    msg = f"{where} holds {named[:120]}, of an enum that is not imported here; import its module first"
    raise StateMismatch(msg, mismatched=(where,))


def _decode(document: Any, read: Read) -> Any:
    if isinstance(document, list):
        return [_decode(item, read) for item in document]
    if not isinstance(document, dict):
        return document
    tag = next((key for key in document if key.startswith("$")), None)
    if tag is None:
        return {key: _decode(item, read) for key, item in document.items()}
    return _DECODERS[tag](document[tag], document, read)


def _name(components: Any) -> tuple[str, ...]:
    if not isinstance(components, list) or not all(isinstance(part, str) for part in components):
        msg = f"an array name must be a list of strings, found {str(components)[:60]}"
        raise TypeError(msg)
    return tuple(components)


def _text(content: Any) -> str:
    if not isinstance(content, str):
        msg = f"expected a string, found {str(content)[:60]}"
        raise TypeError(msg)
    return content


def _sequence(content: Any, read: Read) -> list[Any]:
    if isinstance(content, dict):
        packed = read(_name(content["$tensor"]))
        if packed.dtype not in (torch.int64, torch.float64) or packed.dim() != 1:
            msg = f"a list was stored as {packed.dtype} of shape {tuple(packed.shape)}"
            raise TypeError(msg)
        values: list[Any] = packed.tolist()
        return values
    if not isinstance(content, list):
        msg = f"expected a list, found {str(content)[:60]}"
        raise TypeError(msg)
    return [_decode(item, read) for item in content]


def _pairs(content: Any, read: Read) -> list[tuple[Any, Any]]:
    return [(_decode(key, read), _decode(value, read)) for key, value in content]


def _binary(content: Any, read: Read) -> bytes:
    if isinstance(content, dict):
        return bytes(read(_name(content["$tensor"])).numpy().tobytes())
    return base64.b64decode(_text(content), validate=True)


def _with_attributes(value: Any, document: dict[str, Any], read: Read) -> Any:
    if "attributes" in document:
        vars(value).update(_decode(document["attributes"], read))
    return value


def _counter(content: Any, document: dict[str, Any], read: Read) -> Any:
    counter: Counter[Any] = Counter()
    dict.update(counter, _pairs(content, read))  # Counter.update would count the pairs
    return _with_attributes(counter, document, read)


def _default_dict(content: Any, document: dict[str, Any], read: Read) -> Any:
    factory = document["factory"]
    return defaultdict(None if factory is None else FACTORIES[factory], _pairs(content, read))


def _floating(content: Any) -> float:
    if content in ("nan", "inf", "-inf"):
        return float(content)
    (value,) = np.frombuffer(bytes.fromhex(content), ">f8").tolist()
    return float(value)


def _complex_number(content: Any, _: dict[str, Any], read: Read) -> complex:
    real, imag = (_decode(part, read) for part in content)
    return complex(real, imag)


def _scalar_type(name: Any) -> Any:
    if name not in NUMPY_SCALARS:
        msg = f"unknown NumPy type {str(name)[:60]!r}"
        raise ValueError(msg)
    return np.dtype(name)


def _numpy_scalar(content: Any, document: dict[str, Any], read: Read) -> Any:
    dtype = _scalar_type(content)
    if "bytes" in document:
        return np.frombuffer(bytes.fromhex(document["bytes"]), dtype)[0]
    return dtype.type(_decode(document["value"], read))


def _torch_dtype(content: Any) -> torch.dtype:
    dtype = getattr(torch, _text(content), None)
    if not isinstance(dtype, torch.dtype):
        msg = f"torch has no dtype {content[:60]!r}"
        raise TypeError(msg)
    return dtype


def _device(content: Any) -> torch.device:
    try:
        return torch.device(_text(content))
    except RuntimeError as error:
        raise ValueError(str(error)) from error


_DECODERS: dict[str, Callable[[Any, dict[str, Any], Read], Any]] = {
    "$int": lambda content, _, __: int(content, 16),
    "$float": lambda content, _, __: _floating(content),
    "$complex": _complex_number,
    "$str": lambda content, _, __: base64.b64decode(content, validate=True).decode("utf-8", "surrogatepass"),
    "$bytes": lambda content, _, read: _binary(content, read),
    "$bytearray": lambda content, _, read: bytearray(_binary(content, read)),
    "$list": lambda content, _, read: _sequence(content, read),
    "$tuple": lambda content, _, read: tuple(_sequence(content, read)),
    "$set": lambda content, _, read: set(_sequence(content, read)),
    "$frozenset": lambda content, _, read: frozenset(_sequence(content, read)),
    "$deque": lambda content, document, read: deque(_sequence(content, read), document["maxlen"]),
    "$dict": lambda content, _, read: dict(_pairs(content, read)),
    "$OrderedDict": lambda content, document, read: _with_attributes(
        OrderedDict(_pairs(content, read)), document, read
    ),
    "$Counter": _counter,
    "$defaultdict": _default_dict,
    "$range": lambda content, _, read: range(*(_decode(part, read) for part in content)),
    "$slice": lambda content, _, read: slice(*(_decode(part, read) for part in content)),
    "$tensor": lambda content, _, read: read(_name(content)),
    "$ndarray": lambda content, _, read: read(_name(content)).numpy(),
    "$numpy": _numpy_scalar,
    "$numpy.dtype": lambda content, _, __: _scalar_type(content),
    "$torch.dtype": lambda content, _, __: _torch_dtype(content),
    "$torch.device": lambda content, _, __: _device(content),
    "$torch.Size": lambda content, _, read: torch.Size(_sequence(content, read)),
    "$enum": lambda content, _, __: enum_member(content, "a saved value"),
    "$Path": lambda content, _, read: PosixPath(_text(_decode(content, read))),
    "$PurePath": lambda content, _, read: PurePosixPath(_text(_decode(content, read))),
    "$date": lambda content, _, __: dt.date.fromisoformat(content),
    "$datetime": lambda content, document, _: dt.datetime.fromisoformat(content).replace(
        fold=document.get("fold", 0)
    ),
    "$timedelta": lambda content, _, __: dt.timedelta(*content),
}
