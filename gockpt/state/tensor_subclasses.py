"""Tensor subclasses that are made of other tensors: taken apart to be saved, and made again.

A class with ``__tensor_flatten__`` and ``__tensor_unflatten__`` (torchao's quantised weights and optimizer
states) says itself which *inner tensors* it holds, and what else there is to know: its *context*. Inner
tensors are saved as arrays of their own, contexts as JSON.

Contexts are encoded as by :mod:`gockpt.state.value_encoder`, with one form more::

    {"$fields": class, "of": {...}}      a dataclass or a named tuple: compared with a live one, never made

A checkpoint can name a class, but never import one: classes are looked for among those that exist.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gockpt.core.array_spec import public_name
from gockpt.errors import StateMismatch, UnsupportedState
from gockpt.state.known_classes import class_name, known_subclasses
from gockpt.state.saved_document import MAX_DEPTH
from gockpt.state.tensors import is_subclass, refusal
from gockpt.state.value_decoder import decode, enum_member
from gockpt.state.value_encoder import encode, enum_document, is_ordinary_key

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gockpt.state.value_encoder import Json

__all__ = [
    "Flattened",
    "Inner",
    "check_rebuild",
    "context_text",
    "flatten",
    "rebuild",
]

Inner = tuple[str, ...]
"""Path of an inner tensor: its attribute, after that of each subclass in between."""


@dataclass(frozen=True, slots=True)
class Flattened:
    """A tensor subclass, taken apart.

    Attributes:
        tensor: The live object.
        kind: Its class: module and qualified name.
        context: Its context, encoded.
        inner: Its inner tensors by attribute, in the class's order; subclasses among them are flattened too.
    """

    tensor: torch.Tensor
    kind: str
    context: Json
    inner: dict[str, torch.Tensor | Flattened]

    def leaves(self) -> Iterator[tuple[Inner, torch.Tensor]]:
        """Yield every ordinary tensor inside, by its path."""
        for attribute, part in self.inner.items():
            if isinstance(part, Flattened):
                for below, tensor in part.leaves():
                    yield (attribute, *below), tensor
            else:
                yield (attribute,), part


def flatten(tensor: torch.Tensor, where: str, depth: int = 0) -> Flattened:
    """Take apart a tensor for which :func:`~gockpt.state.tensors.is_subclass` is true. Copies nothing.

    Args:
        tensor: The tensor.
        where: Its name, for messages.
        depth: Number of subclasses around it.

    Raises:
        UnsupportedState: If it can't be taken apart, or an inner tensor or the context has no exact form.
    """
    kind = class_name(type(tensor))
    try:
        attributes, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = {attribute: getattr(tensor, attribute) for attribute in attributes}
    except Exception as error:
        raise _unsupported(where, kind, f"its __tensor_flatten__ raised {error!r}") from error
    if not parts or len(parts) != len(attributes):
        raise _unsupported(where, kind, f"its __tensor_flatten__ names the inner tensors {attributes!r}")
    inner: dict[str, torch.Tensor | Flattened] = {}
    for attribute, part in parts.items():
        if not is_ordinary_key(attribute) or not isinstance(part, torch.Tensor):
            raise _unsupported(where, kind, f"its inner tensor {attribute!r} is a {class_name(type(part))}")
        if is_subclass(part):
            if depth >= MAX_DEPTH:
                raise _unsupported(where, kind, f"subclasses nest deeper in it than {MAX_DEPTH} levels")
            inner[attribute] = flatten(part, f"{where}/{attribute}", depth + 1)
        elif why := refusal(part):
            msg = f"{where} is a {kind} that can't be saved: of its inner tensor {attribute!r}, {why}"
            raise UnsupportedState(msg)
        else:
            inner[attribute] = part
    return Flattened(tensor, kind, _encode_context(context, where, kind), inner)


def _unsupported(where: str, kind: str, why: str) -> UnsupportedState:
    way_out = "keep its parts as ordinary tensors, or convert it to one"
    return UnsupportedState(f"{where} is a {kind} that can't be saved: {why}; {way_out}")


def context_text(context: Json, *, devices: bool = True) -> str:
    """Return a text that is equal for equal encoded contexts, types included.

    Args:
        context: The encoded context.
        devices: Whether devices count: a checkpoint may be loaded on another one.
    """

    def hide(value: Json) -> Json:
        if isinstance(value, list):
            return [hide(part) for part in value]
        if isinstance(value, dict):
            return {} if "$torch.device" in value else {key: hide(part) for key, part in value.items()}
        return value

    return json.dumps(context if devices else hide(context), sort_keys=True)


def _encode_context(value: Any, where: str, kind: str) -> Json:
    def inside(part: Any) -> Json:
        return _encode_context(part, where, kind)

    if type(value) in (list, tuple, torch.Size):
        parts: list[Json] = [inside(part) for part in value]
        if type(value) is list:
            return parts
        return {"$tuple" if type(value) is tuple else "$torch.Size": parts}
    if type(value) is dict and all(type(key) is str and not key.startswith("$") for key in value):
        return {key: inside(part) for key, part in value.items()}
    if isinstance(value, enum.Enum) and (member := enum_document(value)) is not None:
        return member
    fields = _fields(value)
    if fields is not None:
        return {"$fields": class_name(type(value)), "of": {key: inside(part) for key, part in fields.items()}}
    try:
        document, arrays = encode(value, prefix=("context",))
    except UnsupportedState as error:
        why = f"its context holds a {class_name(type(value))}, which has no exact form without pickle"
        raise _unsupported(where, kind, why) from error
    if arrays:
        raise _unsupported(where, kind, "its context holds tensors that __tensor_flatten__ does not name")
    return document


def _fields(value: Any) -> dict[str, Any] | None:
    """Return the fields of a dataclass or named tuple that has no other attributes."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return None
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return fields if vars(value).keys() <= fields.keys() else None


def _decode_context(document: Json, device: torch.device, where: str) -> Any:
    if isinstance(document, list):
        return [_decode_context(part, device, where) for part in document]
    if isinstance(document, dict):
        tag = next(iter(document), "")
        if tag in ("$tuple", "$torch.Size") and isinstance(document[tag], list):
            parts = _decode_context(document[tag], device, where)
            return tuple(parts) if tag == "$tuple" else torch.Size(parts)
        if tag == "$enum":
            return enum_member(document[tag], f"{where}: its context")
        if tag == "$torch.device":
            return device
        if tag == "$fields":
            msg = f"{where}: its context holds a {document[tag]}, which a checkpoint can't make"
            raise StateMismatch(msg, mismatched=(where,))
        if not tag.startswith("$"):
            return {key: _decode_context(part, device, where) for key, part in document.items()}
    return decode(document, _no_array)


def _no_array(name: tuple[str, ...]) -> torch.Tensor:
    msg = f"a context refers to the array {public_name(name)!r}"
    raise ValueError(msg)


def _class_of(name: str, where: str) -> type[torch.Tensor]:
    found = [kind for kind in known_subclasses(torch.Tensor, name) if hasattr(kind, "__tensor_unflatten__")]
    if len(found) == 1:
        return found[0]  # type: ignore[no-any-return]
    what = f"{len(found)} classes have that name" if found else "no such class is imported here"
    module = name.rpartition(".")[0]
    msg = f"{where} was saved from a {name}, and {what}; import {module} before loading"
    raise StateMismatch(msg, mismatched=(where,))


def rebuild(
    kind: str,
    context: Json,
    inner: Mapping[str, torch.Tensor],
    *,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    device: torch.device,
    where: str,
) -> torch.Tensor:
    """Return a tensor subclass made of its inner tensors.

    Args:
        kind: The class's module and qualified name.
        context: The encoded context.
        inner: Its inner tensors by attribute.
        shape: Its own shape.
        stride: Its own strides.
        device: Stands for every device in the context.
        where: Its name, for messages.

    Raises:
        StateMismatch: If the class doesn't exist here, or makes a tensor of another shape or class.
    """
    found = _class_of(kind, where)
    decoded = _decode_context(context, device, where)
    try:
        with torch.no_grad():
            made = found.__tensor_unflatten__(dict(inner), decoded, torch.Size(shape), stride)  # type: ignore[attr-defined]
    except Exception as error:
        msg = f"{where}: {kind}.__tensor_unflatten__ raised {error!r}"
        raise StateMismatch(msg, mismatched=(where,)) from error
    if type(made) is not found or tuple(made.shape) != tuple(shape):
        msg = (
            f"{where}: {kind}.__tensor_unflatten__ made a {class_name(type(made))} of another shape or class"
        )
        raise StateMismatch(msg, mismatched=(where,))
    return made


_rebuilt: set[tuple[Any, ...]] = set()


def check_rebuild(flat: Flattened, where: str) -> None:
    """Check that a tensor can be rebuilt without a live tensor of its kind.

    Done once for tensors of the same class, context and geometry.

    Raises:
        UnsupportedState: If :func:`rebuild` makes another tensor from its inner tensors.
    """
    for attribute, part in flat.inner.items():
        if isinstance(part, Flattened):
            check_rebuild(part, f"{where}/{attribute}")
    tensor = flat.tensor
    inner = {key: part.tensor if isinstance(part, Flattened) else part for key, part in flat.inner.items()}
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    key = (
        type(tensor),
        context_text(flat.context),
        shape,
        stride,
        *((name, part.shape, part.dtype) for name, part in inner.items()),
    )
    if key in _rebuilt:
        return
    try:
        made = rebuild(
            flat.kind, flat.context, inner, shape=shape, stride=stride, device=tensor.device, where=where
        )
        again = flatten(made, where)
    except StateMismatch as error:
        msg = f"{where} can't be saved: a load could not rebuild it. {error}"
        raise UnsupportedState(msg) from error
    same = (
        type(made) is type(tensor)
        and made.dtype == tensor.dtype
        and context_text(again.context) == context_text(flat.context)
        and [(path, leaf.shape, leaf.dtype) for path, leaf in again.leaves()]
        == [(path, leaf.shape, leaf.dtype) for path, leaf in flat.leaves()]
    )
    if not same:
        raise _unsupported(where, flat.kind, "its __tensor_unflatten__ makes a different tensor of its parts")
    _rebuilt.add(key)
