"""Measured deviation of a checkpoint that is not exact."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Deviation", "deviation_of"]


@dataclass(frozen=True, slots=True)
class Deviation:
    """Deviation of tensors that were replayed from 16-bit gradients from the live ones.

    Measured at a sample of their elements. Norms are Euclidean, over that sample.

    Attributes:
        grad_dtype: The encoding of the gradients.
        tensors: Number of tensors that are not exact.
        max_abs: The largest difference of any element, saved less live.
        of_movement: Norm of the differences, divided by the norm of the elements' change from their copy to
            the checkpoint's step; the largest of all tensors. ``None`` if one did not change at all.
        of_values: Norm of the differences, divided by the norm of the live values, likewise.
        sampled: Number of compared elements.
        elements: Number of elements in the inexact stretches of these tensors.
    """

    grad_dtype: str
    tensors: int
    max_abs: float
    of_movement: float | None
    of_values: float | None
    sampled: int
    elements: int

    def __str__(self) -> str:
        moved = "" if self.of_movement is None else f", {self.of_movement:.2g} of the window's movement"
        return (
            f"gradients in {self.grad_dtype}; {self.tensors} tensors off, by up to {self.max_abs:.2g}{moved} "
            f"at the {self.sampled} of {self.elements} elements that were compared"
        )


def deviation_of(attributes: Any) -> Deviation | None:
    """Return the deviation in the root group's attributes; ``None`` if it is absent or malformed.

    Attributes are untrusted: anyone may have written them.
    """
    own = attributes.get("gockpt") if isinstance(attributes, dict) else None
    found = own.get("deviation") if isinstance(own, dict) else None
    if not isinstance(found, dict) or not {field.name for field in fields(Deviation)} <= found.keys():
        return None
    values = {field.name: found[field.name] for field in fields(Deviation)}
    counts = (values["tensors"], values["sampled"], values["elements"])
    shares = [values[name] for name in ("of_movement", "of_values") if values[name] is not None]
    sound = (
        values["grad_dtype"] in ("fp16", "bf16")
        and all(type(count) is int and 0 <= count < 1 << 62 for count in counts)
        and all(_is_size(size) for size in (values["max_abs"], *shares))
    )
    return Deviation(**values) if sound else None


def _is_size(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf and value < 1e300
