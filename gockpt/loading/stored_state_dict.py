"""A saved state dict whose tensors are read on access.

Modules with loading code of their own get it in place of an ordinary state dict: it has the same keys and
values, but only the values they access are ever in memory.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import ItemsView, ValuesView
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from gockpt.core.array_spec import ArraySpec, public_name
from gockpt.errors import ManifestCorrupt
from gockpt.loading.fit_model import fills_for
from gockpt.loading.fit_subclass import inner_names, make_subclass
from gockpt.state.tensors import DTYPE_OF
from gockpt.state.value_decoder import array_name, decode
from gockpt.storage.format.checksum import crc32c

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gockpt.loading.fit_model import Fill
    from gockpt.state.saved_document import SavedState, SavedSubclass
    from gockpt.tensor_memory import Bytes

    Read = Callable[[tuple[str, ...]], torch.Tensor]
    BytesOf = Callable[[tuple[str, ...]], Bytes]

__all__ = ["Stored", "StoredStateDict", "saved_entries", "saved_metadata"]

_ABSENT: Any = object()
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Stored:
    """A value of a state dict that is an array of the checkpoint.

    Attributes:
        source: Public name of the array, or of a tensor subclass that is saved as several.
        spec: Its shape and dtype, or the subclass.
        read: Returns its values as a new tensor.
        arrays: Every stored array by public name.
        bytes_of: Returns its bytes in memory of their own; ``None`` if it is more than bytes on the CPU.
    """

    source: str
    spec: ArraySpec | SavedSubclass
    read: Callable[[], torch.Tensor]
    arrays: Mapping[str, ArraySpec]
    bytes_of: Callable[[], Bytes] | None = None

    def fills(self, target: torch.Tensor, name: str) -> list[Fill] | str:
        """Return the fills of a live tensor of that name, or how it differs."""
        return fills_for(self.source, self.spec, target, name, self.arrays)


class _Lent:
    """A stored value that was handed out as a tensor, which may have been changed since.

    It keeps the bytes while another reference to them exists; after that only if the tensor was put into a
    state dict and changed.
    """

    def __init__(self, stored: Stored, spec: ArraySpec, data: Bytes) -> None:
        self.stored = stored
        self._spec = spec
        self.kept = False
        self._data: Bytes | None = data
        self._checksum = crc32c(data.data)
        seen = data.view()  # dies with the last tensor or array over this memory
        self._watch = weakref.ref(seen, self._let_go)
        self._first = self._tensor_over(seen)
        self._tensor = weakref.ref(self._first)

    def _tensor_over(self, data: Bytes) -> torch.Tensor:
        """Return bytes as a tensor that shares their memory."""
        return torch.from_numpy(data).view(DTYPE_OF[self._spec.dtype]).reshape(self._spec.shape)

    def take(self) -> torch.Tensor:
        """Return the tensor to hand out, once."""
        tensor = self._first
        del self._first
        return tensor

    def _let_go(self, _: object) -> None:
        if not self.kept or crc32c(self._data.data) == self._checksum:  # type: ignore[union-attr]
            self._data = None

    @property
    def alive(self) -> bool:
        """Whether the tensor that was handed out is still referenced."""
        return self._tensor() is not None

    def is_of(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is the one that was handed out."""
        return self._tensor() is tensor

    def now(self) -> Stored | torch.Tensor:
        """Return the tensor's current value, or the stored one if they are equal."""
        tensor = self._tensor()
        if tensor is not None:
            return tensor
        return self.stored if self._data is None else self._tensor_over(self._data)


class StoredStateDict(OrderedDict[str, Any]):
    """A state dict that holds :class:`Stored` values and returns tensors.

    Each access reads the value again; keep the tensor to avoid that. Values that were put in are returned
    unchanged. A tensor that was taken out and put in again, as renaming hooks do, is replaced by its stored
    value once no other reference to it exists, if it was not changed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lent: dict[int, _Lent] = {}

    def raw(self, key: str) -> Any:
        """Return a value as held, without reading it."""
        value = super().__getitem__(key)
        return value.now() if isinstance(value, _Lent) else value

    def __getitem__(self, key: str) -> Any:
        value = self.raw(key)
        return self._show(value) if isinstance(value, Stored) else value

    def _show(self, stored: Stored) -> torch.Tensor:
        spec = stored.spec
        if stored.bytes_of is None or not isinstance(spec, ArraySpec) or not spec.numel:
            return stored.read()
        lent = _Lent(stored, spec, stored.bytes_of())
        tensor = lent.take()
        self._lent = {number: one for number, one in self._lent.items() if one.alive}
        self._lent[id(tensor)] = lent
        return tensor

    def __setitem__(self, key: str, value: Any) -> None:
        lent = self._lent.get(id(value)) if isinstance(value, torch.Tensor) else None
        if lent is not None and lent.is_of(value):
            lent.kept = True
            super().__setitem__(key, lent)
        else:
            super().__setitem__(key, value)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or the default."""
        return self[key] if key in self else default  # noqa: SIM401 - this is get

    def pop(self, key: str, default: Any = _ABSENT) -> Any:
        """Remove a key and return its value."""
        if key not in self and default is not _ABSENT:
            return default
        value = self[key]
        del self[key]
        return value

    def popitem(self, last: bool = True) -> tuple[str, Any]:  # noqa: FBT001, FBT002 - as OrderedDict has it
        """Remove the last or first key, and return it with its value."""
        key = next(reversed(self) if last else iter(self))
        return key, self.pop(key)

    def items(self) -> Any:
        """Return a view that reads each value when it is iterated over."""
        return ItemsView(self)

    def values(self) -> Any:
        """Return a view that reads each value when it is iterated over."""
        return ValuesView(self)

    def copy(self) -> Self:
        """Return a copy with the same values, none of them read."""
        return self.where(lambda _: True)

    __copy__ = copy

    def where(self, wanted: Callable[[str], bool]) -> Self:
        """Return a copy with only the wanted keys, no value of which is read."""
        other = type(self)()
        for key in self:
            if wanted(key):
                OrderedDict.__setitem__(other, key, super().__getitem__(key))
        return other


def saved_entries(
    saved: SavedState, arrays: Mapping[str, ArraySpec], read: Read, bytes_of: BytesOf
) -> dict[str, Stored | Any]:
    """Return a model's saved entries by natural name, in the order of its state dict if that is known.

    Values that aren't arrays of their own are decoded by this call, so that later errors can only concern the
    bytes of arrays.

    Raises:
        ManifestCorrupt: If the form of a value is unknown.
    """

    def stored(public: str) -> Stored:
        subclass = saved.subclasses.get(public)
        if subclass is not None:
            return Stored(public, subclass, lambda: make_subclass(subclass, read, _CPU, public), arrays)
        spec = arrays[public]
        return Stored(public, spec, lambda: read(spec.name), arrays, lambda: bytes_of(spec.name))

    entries: dict[str, Any] = {}
    for public, spec in arrays.items():
        if spec.name[0] == "model" and len(spec.name) == 2:
            entries[spec.name[1]] = stored(public)
    for public in saved.subclasses:
        if public.startswith("model/"):
            entries[public.removeprefix("model/")] = stored(public)
    inside = set(inner_names(saved.subclasses))
    for alias, target in saved.aliases.items():
        if alias.startswith("model/") and alias not in inside:
            entries[alias.removeprefix("model/")] = stored(target)
    for fqn, document in saved.computed.items():
        public = public_name(array_name(document) or ())
        entries[fqn] = stored(public) if public in arrays else decode(document, read)
    known = [key for key in saved.keys if key in entries]
    return {key: entries[key] for key in dict.fromkeys([*known, *entries])}


def saved_metadata(saved: SavedState, read: Read) -> dict[str, dict[str, Any]] | None:
    """Return the saved ``state_dict()._metadata`` of each module, by natural name; ``None`` if not saved.

    Raises:
        ManifestCorrupt: If its form is unknown.
    """
    if saved.metadata is None:
        return None
    found: dict[str, dict[str, Any]] = {}
    for name, document in saved.metadata.items():
        value = {"version": document} if type(document) is int else decode(document, read)
        if not isinstance(value, dict):
            msg = f"the saved metadata of module {name!r} is {str(value)[:60]}"
            raise ManifestCorrupt(msg)
        found[name] = value
    return found
