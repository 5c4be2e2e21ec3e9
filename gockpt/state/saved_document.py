"""The saved state document: its form is checked, its values are not yet decoded.

Needs no torch, so that a checkpoint can be inspected without it. The document's fields are described in
:mod:`gockpt.state.state_document`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gockpt.errors import ManifestCorrupt

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gockpt.core.array_spec import Name
    from gockpt.state.value_encoder import Json

__all__ = [
    "VERSION",
    "SavedGroup",
    "SavedOptimizer",
    "SavedState",
    "SavedSubclass",
    "SavedWrapper",
    "parse",
]

VERSION = 2
"""The version written. Version 1 is read as well: it lacks fields added later, which are optional here."""

MAX_DEPTH = 16
"""Greatest depth to which tensor subclasses may nest."""


@dataclass(frozen=True, slots=True)
class SavedGroup:
    """One param group as saved: its parameters in order, and its encoded options."""

    params: tuple[str, ...]
    options: Json


@dataclass(frozen=True, slots=True)
class SavedOptimizer:
    """One optimizer as saved; fields as in the document, ``outside`` by array name.

    ``form`` is the document of what its own ``state_dict()`` returned; ``None`` if that was torch's default.
    """

    kind: str
    groups: tuple[SavedGroup, ...]
    states: dict[str, Json]
    outside: dict[str, Name]
    values: Json
    more: Json
    form: Json = None


@dataclass(frozen=True, slots=True)
class SavedWrapper:
    """A wrapper around optimizers as saved: their indices, whether it adds something to their state."""

    kind: str
    inside: tuple[int, ...]
    adds: bool
    form: Json


@dataclass(frozen=True, slots=True)
class SavedSubclass:
    """One tensor subclass as saved: its class's name, encoded context, geometry, and the arrays inside."""

    kind: str
    context: Json
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    inner: dict[str, Name | SavedSubclass]

    def arrays(self) -> Iterator[tuple[tuple[str, ...], Name]]:
        """Yield the array of every tensor inside, by the attributes that lead to it."""
        for attribute, part in self.inner.items():
            if isinstance(part, SavedSubclass):
                for below, array in part.arrays():
                    yield (attribute, *below), array
            else:
                yield (attribute,), part


@dataclass(frozen=True, slots=True)
class SavedState:
    """The state document, checked for its form; fields as in the document.

    ``strides`` and ``wrappers`` are ``None`` where they are not known: in version 1.
    """

    step: int
    optimizer_steps: int
    exact: bool
    inexact: dict[str, Any]
    aliases: dict[str, str]
    buffers: tuple[str, ...]
    computed: dict[str, Json]
    optimizers: tuple[SavedOptimizer, ...]
    extra: dict[str, Json]
    rng: Json
    strides: dict[str, tuple[int, ...]] | None
    metadata: dict[str, Json] | None
    keys: tuple[str, ...]
    subclasses: dict[str, SavedSubclass] = field(default_factory=dict)
    wrappers: tuple[SavedWrapper, ...] | None = None
    elsewhere: tuple[str, ...] = ()


def parse(document: Mapping[str, Any], *, where: str) -> SavedState:
    """Return the contents of a state document.

    Args:
        document: The parsed JSON object.
        where: The file, for messages.

    Raises:
        ManifestCorrupt: If it has not the form above, or is of a later version.
    """
    version = document.get("version")
    if type(version) is int and version > VERSION:
        msg = f"{where} is in version {version} of the format, this gockpt reads {VERSION}: upgrade gockpt"
        raise ManifestCorrupt(msg)
    try:
        if version not in range(1, VERSION + 1):
            msg = f"its version is {version!r}"
            raise TypeError(msg)
        return SavedState(
            step=_of(document["step"], int),
            optimizer_steps=_of(document["optimizer_steps"], int),
            exact=_of(document["exact"], bool),
            inexact=_of(document["inexact"], dict),
            aliases={name: _of(target, str) for name, target in _of(document["aliases"], dict).items()},
            buffers=tuple(_of(name, str) for name in _of(document["buffers"], list)),
            computed=_of(document["computed"], dict),
            optimizers=tuple(_saved_optimizer(entry) for entry in _of(document["optimizers"], list)),
            extra=_of(document["extra"], dict),
            rng=document["rng"],
            strides=_strides(document["strides"]) if "strides" in document else None,
            metadata=_of(document["metadata"], dict) if "metadata" in document else None,
            keys=tuple(_of(key, str) for key in _of(document.get("keys", []), list)),
            subclasses={
                name: _saved_subclass(entry, depth=0)
                for name, entry in _of(document.get("subclasses", {}), dict).items()
            },
            wrappers=_wrappers(document["wrappers"]) if "wrappers" in document else None,
            elsewhere=tuple(_of(name, str) for name in _of(document.get("elsewhere", []), list)),
        )
    except (TypeError, KeyError) as error:
        msg = f"{where} is not a valid state document: {error}"
        raise ManifestCorrupt(msg) from error


def _saved_optimizer(entry: Any) -> SavedOptimizer:
    groups = tuple(
        SavedGroup(tuple(_of(name, str) for name in _of(group["params"], list)), group["options"])
        for group in (_of(group, dict) for group in _of(_of(entry, dict)["groups"], list))
    )
    outside = {fqn: _name(name) for fqn, name in _of(entry["outside"], dict).items()}
    return SavedOptimizer(
        kind=_of(entry["class"], str),
        groups=groups,
        states=_of(entry["states"], dict),
        outside=outside,
        values=entry["values"],
        more=entry.get("more", {}),
        form=entry.get("state_dict"),
    )


def _wrappers(entries: Any) -> tuple[SavedWrapper, ...]:
    return tuple(
        SavedWrapper(
            kind=_of(entry["class"], str),
            inside=tuple(_of(index, int) for index in _of(entry["optimizers"], list)),
            adds=_of(entry["adds"], bool),
            form=entry["state_dict"],
        )
        for entry in (_of(entry, dict) for entry in _of(entries, list))
    )


def _strides(entry: Any) -> dict[str, tuple[int, ...]]:
    found = {
        name: tuple(_of(stride, int) for stride in _of(each, list)) for name, each in _of(entry, dict).items()
    }
    for name, strides in found.items():
        if not all(0 <= stride < 1 << 63 for stride in strides):
            msg = f"the strides of {name!r} are {strides}"
            raise TypeError(msg)
    return found


def _saved_subclass(entry: Any, *, depth: int) -> SavedSubclass:
    if depth > MAX_DEPTH:
        msg = f"subclasses nest deeper than {MAX_DEPTH} levels"
        raise TypeError(msg)
    inner: dict[str, Name | SavedSubclass] = {}
    for attribute, part in _of(_of(entry, dict)["inner"], dict).items():
        if "$tensor" in _of(part, dict):
            inner[attribute] = _name(part["$tensor"])
        else:
            inner[attribute] = _saved_subclass(part, depth=depth + 1)
    return SavedSubclass(
        kind=_of(entry["class"], str),
        context=entry["context"],
        shape=_sizes(entry["shape"]),
        stride=_sizes(entry["stride"]),
        dtype=_of(entry["dtype"], str),
        inner=inner,
    )


def _sizes(value: Any) -> tuple[int, ...]:
    sizes = tuple(_of(size, int) for size in _of(value, list))
    if any(not 0 <= size < 1 << 63 for size in sizes):
        msg = f"expected a list of sizes, found {value}"
        raise TypeError(msg)
    return sizes


def _name(value: Any) -> Name:
    return tuple(_of(part, str) for part in _of(value, list))


def _of(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        msg = f"expected {kind.__name__}, found {str(value)[:60]!r}"
        raise TypeError(msg)
    return value
