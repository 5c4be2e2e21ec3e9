"""Counts of NaN and Inf in a checkpoint's arrays."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 - as in descriptors
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gockpt.core.shortened import shortened

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["NonFinite", "attributes_with", "is_judged", "nonfinite_of", "summary"]

SHOWN = 8
"""Number of arrays that are named, parameters and optimizer state first."""

NAMED = 3
"""Number of them that are named in one line."""

_MOST = 1 << 62


@dataclass(frozen=True, slots=True)
class NonFinite:
    """Counts of NaN and Inf in the written arrays.

    The two parts of a complex number count separately. Tied weights count once.

    Attributes:
        nan: NaN in all arrays.
        inf: Inf in all arrays, of either sign.
        state: NaN and Inf together in parameters and optimizer state alone. Buffers and extras are left out:
            a mask of ``-inf`` is usual there.
        arrays: Number of arrays with any.
        first: The first of these by name, each with its NaN and Inf; those of ``state`` come first.
    """

    nan: int = 0
    inf: int = 0
    state: int = 0
    arrays: int = 0
    first: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        """Whether parameters and optimizer state have neither NaN nor Inf."""
        return not self.state

    def __str__(self) -> str:
        if not self.arrays:
            return "none"
        named = [f"{name} ({nan} NaN, {inf} Inf)" for name, (nan, inf) in self.first.items()]
        listed = shortened(named, NAMED, total=self.arrays)
        where = "" if self.state else ", none of them in parameters or optimizer state"
        return f"{self.nan} NaN and {self.inf} Inf{where}: {listed}"


def is_judged(name: str, buffers: Collection[str]) -> bool:
    """Whether an array is a parameter or optimizer state.

    Args:
        name: Its public name.
        buffers: The names of the model's buffers.
    """
    return name.startswith("optimizer/") or (name.startswith("model/") and name not in buffers)


def summary(counts: Mapping[str, tuple[int, int]], buffers: Collection[str]) -> NonFinite:
    """Return the summary of counts by public name; arrays without NaN and Inf may be left out."""
    found = {name: pair for name, pair in counts.items() if any(pair)}
    judged = {name for name in found if is_judged(name, buffers)}
    shown = sorted(found, key=lambda name: (name not in judged, name))[:SHOWN]
    return NonFinite(
        nan=sum(nan for nan, _ in found.values()),
        inf=sum(inf for _, inf in found.values()),
        state=sum(sum(found[name]) for name in judged),
        arrays=len(found),
        first={name: found[name] for name in shown},
    )


def attributes_with(attributes: Mapping[str, Any], found: NonFinite) -> dict[str, Any]:
    """Return the root group's attributes with the counts added."""
    said = {
        "nan": found.nan,
        "inf": found.inf,
        "state": found.state,
        "arrays": found.arrays,
        "first": {name: list(pair) for name, pair in found.first.items()},
    }
    return {**attributes, "gockpt": {**attributes.get("gockpt", {}), "nonfinite": said}}


def nonfinite_of(attributes: Any) -> NonFinite | None:
    """Return the counts in the root group's attributes; ``None`` if they are absent or malformed.

    Attributes are untrusted: anyone may have written them. Earlier versions wrote no counts.
    """
    own = attributes.get("gockpt") if isinstance(attributes, dict) else None
    said = own.get("nonfinite") if isinstance(own, dict) else None
    if not isinstance(said, dict):
        return None
    counts: list[Any] = [said.get(name) for name in ("nan", "inf", "state", "arrays")]
    first = said.get("first")
    if not all(_is_count(count) for count in counts) or not isinstance(first, dict):
        return None
    pairs = {name: tuple(pair) for name, pair in first.items() if isinstance(pair, list)}
    if len(pairs) != len(first) or not all(len(p) == 2 and all(map(_is_count, p)) for p in pairs.values()):
        return None
    nan, inf, state, arrays = counts
    return NonFinite(nan, inf, state, arrays, pairs)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST
