"""The state document: everything in a checkpoint but its arrays. Written as ``state.json``.

::

    {"version": 2,
     "step": 1200, "optimizer_steps": 1200,          the user's step; updates seen by the run
     "exact": true, "inexact": {name: ...},          whether every bit is a blocking save's; where not
     "aliases": {alias: name},                       public names that share another's memory
     "buffers": [name, ...],                         which of the model's names are buffers
     "computed": {fqn: value},                       model state made for the state dict (extra_state)
     "metadata": {module: version or value},         of each module: state_dict()._metadata
     "keys": [fqn, ...],                             the state dict's order, if aliases or computed hide it
     "subclasses": {name: {...}},                    tensor subclasses, saved as their inner tensors
     "optimizers": [
        {"class": "torch.optim.adamw.AdamW",
         "groups": [{"params": [fqn, ...], "options": value}],
         "states": {fqn: value},                     {"exp_avg": {"$tensor": ["optimizer", fqn, "exp_avg"]}}
         "outside": {fqn: [name components]},        parameters that no entry of the model holds
         "values": value,                            state under keys that are no parameters
         "state_dict": value}],                      instead of states and values: its own state_dict()
     "wrappers": [{"class": ..., "optimizers": [index, ...], "adds": bool, "state_dict": value}],
     "elsewhere": [name, ...],                       arrays out of "state_dict" that were not on the CPU
     "strides": {name: [stride, ...]},               of what optimizers hold, where it is not row-major
     "extra": {name: value},                         the user's extras
     "rng": value}                                   of gockpt.state.rng_state, or null

``value`` is the form of :mod:`gockpt.state.value_encoder`, in which arrays are referred to by name. Names of
arrays: ``model/<fqn>``, ``optimizer/<fqn>/<state>``, ``optimizer_options/<i>/...`` for tensors among an
optimizer's options, ``extra/<name>/...``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from gockpt.core.array_spec import public_name
from gockpt.errors import UnsupportedState, UsageError
from gockpt.state.known_classes import class_name
from gockpt.state.optimizer_forms import Forms
from gockpt.state.saved_document import VERSION
from gockpt.state.strides import strides_of
from gockpt.state.tensor_subclasses import Flattened
from gockpt.state.tensors import is_subclass
from gockpt.state.value_encoder import Json, encode, is_ordinary_key, join

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gockpt.core.array_spec import Name
    from gockpt.state.live_state import LiveState, ParamEntry
    from gockpt.state.tensor_subclasses import Inner
    from gockpt.state.value_encoder import Place

__all__ = ["build_document", "capture_extras", "checked_extra", "metrics_of"]

OPTIONS = "optimizer_options"

Arrays = dict[tuple[str, ...], torch.Tensor]


def checked_extra(extra: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the extras as a mapping of its own; ``None`` if there are none.

    Raises:
        UsageError: If ``extra`` isn't a mapping.
    """
    if extra is None:
        return None
    if not isinstance(extra, Mapping):
        msg = f"extra is a {type(extra).__name__}; pass a mapping of names, as in extra={{'sched': sched}}"
        raise UsageError(msg)
    return dict(extra)


def capture_extras(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the current plain value of each extra, by name.

    The value is the extra's ``state_dict()`` if it has one, the result of another callable, or the extra
    itself. It may refer to live memory: encode it (:func:`build_document`) before anything changes.

    Raises:
        UsageError: If ``extra`` isn't a mapping whose names are ordinary strings.
    """
    values = {}
    for name, source in (checked_extra(extra) or {}).items():
        if not is_ordinary_key(name):
            msg = f"extra has the name {name!r}; use non-empty text without '/' that does not start with '#'"
            raise UsageError(msg)
        if hasattr(source, "state_dict") and not isinstance(source, type):
            values[name] = source.state_dict()
        else:
            values[name] = source() if callable(source) else source
    return values


def metrics_of(document: Mapping[str, Any]) -> dict[str, float]:
    """Return the plain finite numbers among the extras of a state document, by name."""
    found: dict[str, float] = {}
    for name, value in document["extra"].items():
        number: Any = value.get("value") if isinstance(value, dict) and "$numpy" in value else value
        if type(number) in (int, float):
            found[name] = number
    return found


def build_document(
    live: LiveState,
    *,
    step: int,
    optimizer_steps: int,
    extra: Mapping[str, Any] | None = None,
    rng: Mapping[str, Any] | None = None,
    exact: bool = True,
    inexact: Mapping[str, Any] | None = None,
    admit: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, Json], Arrays]:
    """Return the document of the live state, and its additional arrays.

    Everything but the entries of ``live`` is copied by this call: make it at the boundary.

    Args:
        live: The state collected at this boundary.
        step: The user's step.
        optimizer_steps: Updates seen.
        extra: Plain values, from :func:`capture_extras`.
        rng: From :func:`gockpt.state.rng_state.capture`.
        exact: Whether every bit equals a blocking save's.
        inexact: Information about each array that doesn't, by public name; JSON values.
        admit: Called with the size of each of these arrays in bytes before it is copied; may raise.

    Returns:
        The JSON document, and the CPU tensors by name to store besides ``live.entries``. Their names differ
        from the entries', and they share memory with nothing.

    Raises:
        UnsupportedState: If an extra, an option or a state has no exact form; names it.
    """
    arrays: Arrays = {}

    strides: dict[str, Json] = {}

    def plain(value: Any, *prefix: str, place: Place = lambda _, __: None) -> Json:
        # Every load decodes extras, so they must not need a class; an optimizer's classes are imported.
        enums = prefix[0] in ("optimizer", OPTIONS)
        document, found = encode(value, prefix=prefix, admit=admit, place=place, enums=enums)
        arrays.update(found)
        return document

    def note_strides(name: tuple[str, ...], tensor: torch.Tensor) -> None:
        if not is_subclass(tensor) and (order := strides_of(tensor)) is not None:
            strides[public_name(name)] = list(order)

    constant = live.once("document", lambda: _constant_of(live))
    strides.update(constant.strides)
    forms = Forms(live, plain, note_strides)
    noting = partial(plain, place=note_strides)
    optimizers: list[Json] = [
        _optimizer(index, live, constant.optimizers[index], noting, forms)
        for index in range(len(live.optimizers))
    ]
    document: dict[str, Json] = {
        "version": VERSION,
        "step": step,
        "optimizer_steps": optimizer_steps,
        "exact": exact,
        "inexact": dict(inexact or {}),
        "aliases": dict(live.aliases),
        "buffers": constant.buffers,
        "computed": {fqn: plain(made.value, "model", fqn) for fqn, made in live.computed.items()},
        "optimizers": optimizers,
        "wrappers": forms.wrappers(),
        "elsewhere": [*forms.elsewhere],
        "strides": strides,
        "extra": {name: plain(value, "extra", name) for name, value in (extra or {}).items()},
        "rng": None if rng is None else plain(dict(rng), "rng"),
        "metadata": {name: _metadata(name, value, plain) for name, value in live.metadata.items()},
    }
    if live.aliases or live.computed:
        document["keys"] = [*live.keys]
    if live.subclassed:
        document["subclasses"] = {
            public_name(name): _subclass(known.flat, known.arrays) for name, known in live.subclassed.items()
        }
    _check_names(live, arrays, constant.names)
    return document, arrays


@dataclass(frozen=True, slots=True)
class _Optimizer:
    """The part of an optimizer's document that follows from the layout.

    Attributes:
        own: Whether it has saving code of its own.
        groups: Names of the parameters of each group.
        states: The document of each parameter's state; ``None`` if that depends on more than the layout,
            or if there is state under keys that are no parameters.
        outside: Names of the arrays of parameters that no entry of the model holds.
    """

    own: bool
    groups: list[list[Json]]
    states: dict[str, Json] | None
    outside: dict[str, Json]


@dataclass(frozen=True, slots=True)
class _Constant:
    """The parts of a document that follow from the layout. Documents share them: nothing changes them.

    Attributes:
        names: Public names of all arrays and subclasses.
        strides: As in the document, of the entries.
        buffers: As in the document.
        optimizers: Of each optimizer.
    """

    names: frozenset[str]
    strides: dict[str, Json]
    buffers: list[Json]
    optimizers: list[_Optimizer]


def _constant_of(live: LiveState) -> _Constant:
    strides: dict[str, Json] = {}
    for name in _held_by_optimizers(live):
        tensor = live.entries[name]
        if not is_subclass(tensor) and (order := strides_of(tensor)) is not None:
            strides[public_name(name)] = list(order)
    names: set[str] = set()
    for name in (*live.entries, *live.subclassed):
        _add_name(public_name(name), names, live)
    optimizers = []
    for entry in live.trained:
        params = [param for group in entry.groups for param in group.params]
        raws = [(param, param.raw) for param in params if param.raw is not None]
        plain = not entry.values and all(_is_plain(param, raw) for param, raw in raws)
        optimizers.append(
            _Optimizer(
                entry.own,
                [[param.fqn for param in group.params] for group in entry.groups],
                {param.fqn: _state(param, lambda value, *_: value) for param, _ in raws} if plain else None,
                {param.fqn: list(param.name) for param in params if param.name[0] != "model"},
            )
        )
    return _Constant(
        frozenset(names), strides, [*sorted(public_name(name) for name in live.buffers)], optimizers
    )


def _is_plain(param: ParamEntry, raw: Any) -> bool:
    """Whether a parameter's state is a dict of arrays of the checkpoint, and ``None``."""
    return type(raw) is dict and all(
        is_ordinary_key(key) and (value is None or key in param.state_names) for key, value in raw.items()
    )


def _held_by_optimizers(live: LiveState) -> Iterator[tuple[str, ...]]:
    yield from (name for name in live.entries if name[0] == "optimizer")
    in_model = (param.name for param in live.params if param.name[0] == "model")
    yield from dict.fromkeys(array for name in in_model for array in live.arrays_of(name))


def _subclass(flat: Flattened, arrays: Mapping[Inner, Name]) -> Json:
    """Return the document of a tensor subclass, given the names of its inner tensors."""
    inner: dict[str, Json] = {}
    for attribute, part in flat.inner.items():
        if isinstance(part, Flattened):
            below = {path[1:]: name for path, name in arrays.items() if path[0] == attribute}
            inner[attribute] = _subclass(part, below)
        else:
            inner[attribute] = {"$tensor": list(arrays[attribute,])}
    return {
        "class": flat.kind,
        "context": flat.context,
        "shape": list(flat.tensor.shape),
        "stride": list(flat.tensor.stride()),
        "dtype": str(flat.tensor.dtype).removeprefix("torch."),
        "inner": inner,
    }


def _metadata(name: str, value: Any, plain: Any) -> Json:
    """Return a module's metadata as saved: the version alone if there is nothing else."""
    if type(value) is dict and list(value) == ["version"] and type(value["version"]) is int:
        return value["version"]
    return plain(value, "module_metadata", name)  # type: ignore[no-any-return]


def _optimizer(
    index: int, live: LiveState, constant: _Optimizer, plain: Any, forms: Forms
) -> dict[str, Json]:
    options = (OPTIONS, str(index))
    optimizer = live.optimizers[index]
    groups: list[Json] = []
    for g, (group, names) in enumerate(zip(optimizer.param_groups, constant.groups, strict=True)):
        rest = {key: value for key, value in group.items() if key != "params" and not constant.own}
        groups.append({"params": names, "options": plain(rest, *options, f"group{g}")})
    document: dict[str, Json] = {
        "class": class_name(type(optimizer)),
        "groups": groups,
        "states": {} if constant.own else constant.states,
        "outside": constant.outside,
        "values": {},
    }
    if constant.own:
        document["state_dict"] = forms.of(index)
    elif constant.states is None:
        entry = live.trained[index]
        params = (param for group in entry.groups for param in group.params if param.raw is not None)
        document["states"] = {param.fqn: _state(param, plain) for param in params}
        document["values"] = plain(entry.values, *options, "values")
    return document


def _state(param: ParamEntry, plain: Any) -> Json:
    prefix = ("optimizer", param.owner)
    if not isinstance(param.raw, Mapping):
        return plain(param.raw, *prefix, "state")  # type: ignore[no-any-return]
    pairs: list[tuple[Json, Json]] = []
    for position, (key, value) in enumerate(param.raw.items()):
        name = param.state_names.get(key)
        if name is not None:
            pairs.append((key, {"$tensor": list(name)}))
        elif is_ordinary_key(key):
            pairs.append((key, plain(value, *prefix, key)))
        else:
            pairs.append((plain(key, *prefix, f"#{position}"), plain(value, *prefix, f"#{position}")))
    return join(pairs)


def _check_names(live: LiveState, arrays: Arrays, taken: frozenset[str]) -> None:
    seen: set[str] = set()
    for name in arrays:
        public = public_name(name)
        if public in taken:
            _refuse_name(public)
        _add_name(public, seen, live)


def _add_name(public: str, seen: set[str], live: LiveState) -> None:
    if public in seen or public in live.aliases:
        _refuse_name(public)
    seen.add(public)


def _refuse_name(public: str) -> NoReturn:
    msg = f"two arrays would have the name {public!r}; rename one of them"
    raise UnsupportedState(msg)
