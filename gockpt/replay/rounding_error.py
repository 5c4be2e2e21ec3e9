"""Measured rounding errors of a checkpoint that is not exact: by array, summed, and in its documents."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from gockpt.core.array_spec import public_name
from gockpt.core.exactness import Deviation

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gockpt.core.descriptors import Capture

__all__ = ["Findings", "Sums", "summary"]


@dataclass(frozen=True, slots=True)
class Sums:
    """The measurement of one stretch, in a form that adds up.

    Attributes:
        max_abs: The largest difference.
        error: Sum of the squared differences.
        movement: Sum of the squared movements.
        values: Sum of the squared live values.
        sampled: Probes.
        elements: Elements.
    """

    max_abs: float
    error: float
    movement: float
    values: float
    sampled: int
    elements: int

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            max(self.max_abs, other.max_abs),
            self.error + other.error,
            self.movement + other.movement,
            self.values + other.values,
            self.sampled + other.sampled,
            self.elements + other.elements,
        )

    def plain(self) -> dict[str, Any]:
        """Return a tensor's entry in the state document."""
        return {
            "max_abs": self.max_abs,
            "of_movement": _share(self.error, self.movement),
            "of_values": _share(self.error, self.values),
            "sampled": self.sampled,
            "elements": self.elements,
        }


def summary(grad_dtype: str, tensors: Mapping[str, Sums]) -> Deviation:
    """Return the deviation of all tensors together."""
    shares = [(_share(s.error, s.movement), _share(s.error, s.values)) for s in tensors.values()]
    return Deviation(
        grad_dtype=grad_dtype,
        tensors=len(tensors),
        max_abs=max(s.max_abs for s in tensors.values()),
        of_movement=_worst(share for share, _ in shares),
        of_values=_worst(share for _, share in shares),
        sampled=sum(s.sampled for s in tensors.values()),
        elements=sum(s.elements for s in tensors.values()),
    )


class Findings:
    """Measurements of one checkpoint's arrays, collected by stretch. Not thread-safe."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Sums] = {}

    def add(self, name: tuple[str, ...], sums: Sums) -> None:
        """Add the measurement of one stretch that is not exact."""
        known = self._sums.get(name)
        self._sums[name] = sums if known is None else known + sums

    def documents(self, capture: Capture) -> tuple[Deviation, dict[str, Any], dict[str, Any]] | None:
        """Return the deviation, and the state document and the attributes that contain it.

        ``None`` if all is exact.
        """
        if not self._sums:
            return None
        tensors = {public_name(name): sums for name, sums in sorted(self._sums.items())}
        deviation = summary(capture.grad_dtype or "", tensors)
        plain = {name: sums.plain() for name, sums in tensors.items()}
        own = {**capture.attributes["gockpt"], "exact": False, "deviation": asdict(deviation)}
        state = {**capture.state, "exact": False, "inexact": plain}
        return deviation, state, {**capture.attributes, "gockpt": own}


def _share(part: float, whole: float) -> float | None:
    return math.sqrt(part / whole) if whole else None


def _worst(shares: Iterable[float | None]) -> float | None:
    known = list(shares)
    return None if None in known else max(share for share in known if share is not None)
