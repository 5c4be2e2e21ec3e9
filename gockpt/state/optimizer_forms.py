"""Forms of optimizers and wrappers with saving code of their own: their ``state_dict()``, as documents."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch.utils.weak import WeakIdKeyDictionary

from gockpt.core.array_spec import public_name
from gockpt.errors import UnsupportedState
from gockpt.state.tensors import refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from gockpt.core.array_spec import Name
    from gockpt.state.live_state import LiveState, WrapperEntry
    from gockpt.state.value_encoder import Json

__all__ = ["Forms", "adds_something", "adds_to_live", "states_in_form"]

_Place: TypeAlias = "tuple[Any, ...]"


class _Judged(NamedTuple):
    """Keys of an optimizer's states that were looked for in its form, and those that were found."""

    looked_for: frozenset[Any]
    found: frozenset[Any]


# By optimizer.
_judged: Any = WeakIdKeyDictionary()


def states_in_form(optimizer: Any) -> frozenset[Any]:
    """Return the keys of the states whose tensors an optimizer's ``state_dict()`` hands out as they are.

    Only these need entries of their own; everything else is copied with the result of ``state_dict()``. It is
    called once for each set of keys: if its result changes later, some tensors are copied twice, and the save
    is still right.
    """
    raw = [state for state in optimizer.state.values() if isinstance(state, Mapping)]
    keys = frozenset(
        key
        for state in raw
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and type(key) is str
    )
    try:
        known = _judged.get(optimizer)
    except TypeError:  # it can't be referred to weakly
        known = None
    if known is not None and keys <= known.looked_for:
        found: frozenset[Any] = known.found
        return found
    form = optimizer.state_dict()
    handed_out = {place for tensor in _tensors(form) for place in _places(tensor)}
    missing = {
        key
        for state in raw
        for key, value in state.items()
        if key in keys and not handed_out.intersection(_places(value))
    }
    judged = _Judged(keys, keys - missing)
    with contextlib.suppress(TypeError):
        _judged[optimizer] = judged
    return judged.found


def adds_something(form: Any, inner: list[Any]) -> bool:
    """Whether a wrapper's form holds more than the forms of the optimizers inside it."""
    if any(_same(form, each) for each in inner):
        return False
    if type(form) is dict:
        return any(adds_something(value, inner) for value in form.values())
    if type(form) in (list, tuple):
        return any(adds_something(value, inner) for value in form)
    return form is not None


def adds_to_live(entry: WrapperEntry, live: LiveState) -> bool:
    """Whether a live wrapper keeps more than the optimizers, and the wrappers, inside it."""
    after = live.wrappers[live.wrappers.index(entry) + 1 :]
    inner = [live.optimizers[index] for index in entry.inside]
    inner += [other.wrapper for other in after if other.own]
    forms = [one.state_dict() for one in inner if hasattr(one, "state_dict")]
    return adds_something(entry.wrapper.state_dict(), forms)


class Forms:
    """Forms of one state document: each is computed once, and refers to tensors that have entries.

    Attributes:
        elsewhere: Public names of arrays of tensors that were not on the CPU.
    """

    def __init__(
        self,
        live: LiveState,
        encode: Callable[..., Json],
        note: Callable[[Name, torch.Tensor], None],
    ) -> None:
        """Prepare to encode forms.

        Args:
            live: The live state.
            encode: Called as ``encode(value, *prefix, place=...)``.
            note: Called with the name and the tensor of each array.
        """
        self.elsewhere: list[str] = []
        self._live = live
        self._encode = encode
        self._note = note
        # Kept alive until all is encoded: a freed tensor's address could be given to another one.
        self._forms: dict[int, Any] = {}
        self._names: dict[_Place, Name] = {}
        if live.wrappers or any(entry.own for entry in live.trained):
            for param in live.params:
                self._names |= dict.fromkeys(_places(param.param), param.name)
                for key, name in param.state_names.items():
                    self._names |= dict.fromkeys(_places(param.state[key]), name)

    def of(self, index: int) -> Json:
        """Return the document of an optimizer's form."""
        entry = self._live.trained[index]
        return self._document(entry.optimizer, entry.kind, "optimizer_options", str(index), "state_dict")

    def wrappers(self) -> list[Json]:
        """Return the documents of the wrappers that have a form."""
        documents: list[Json] = []
        for at, entry in enumerate(self._live.wrappers):
            if not entry.own:
                continue
            document = self._document(
                entry.wrapper, entry.kind, "optimizer_options", f"wrapper{at}", "state_dict"
            )
            inner = [self._form(self._live.optimizers[index]) for index in entry.inside]
            inner += [self._form(other.wrapper) for other in self._live.wrappers[at + 1 :] if other.own]
            documents.append(
                {
                    "class": entry.kind,
                    "optimizers": [*entry.inside],
                    "adds": adds_something(self._form(entry.wrapper), inner),
                    "state_dict": document,
                }
            )
        return documents

    def _form(self, owner: Any) -> Any:
        if id(owner) not in self._forms:
            self._forms[id(owner)] = owner.state_dict() if hasattr(owner, "state_dict") else None
        return self._forms[id(owner)]

    def _document(self, owner: Any, kind: str, *prefix: str) -> Json:
        try:
            return self._encode(self._form(owner), *prefix, place=self._place)
        except UnsupportedState as error:
            msg = f"the result of {kind}.state_dict() can't be saved: {error}"
            raise UnsupportedState(msg) from error

    def _place(self, name: Name, tensor: torch.Tensor) -> Name | None:
        places = _places(tensor)
        for place in places:
            if place in self._names:
                return self._names[place]
        if refusal(tensor) is not None:
            return None  # and the caller will refuse it
        self._names |= dict.fromkeys(places, name)
        self._note(name, tensor)
        if tensor.device.type != "cpu":
            self.elsewhere.append(public_name(name))
        return None


def _places(tensor: torch.Tensor) -> list[_Place]:
    """Return keys that identify a tensor among all live ones: the object, and its memory and geometry."""
    places: list[_Place] = [(id(tensor),)]
    if refusal(tensor) is None and tensor.numel():
        places.append((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device))
    return places


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        return both and bool(set(_places(one)) & set(_places(other)))
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) in (int, float, bool, str) and one == other
