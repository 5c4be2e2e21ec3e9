"""Retention: the choice of checkpoints to remove, as pure arithmetic on publications.

Promise: always kept are the newest publication, the newest that is known to be whole, the newest whose
parameters and optimizer state are not known to have NaN or Inf, and everything that a rule of
:class:`~gockpt.options.Keep` names. If the best are to be kept and none has a metric, only superseded
publications are removed. The order is that of publication; steps only tell which publications were superseded
or abandoned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gockpt.options import Keep

__all__ = ["Publication", "abandoned", "expendable", "superseded", "unjudged"]


@dataclass(frozen=True, slots=True)
class Publication:
    """One complete checkpoint, as retention sees it.

    Attributes:
        seq: Its number among its path's publications; unique.
        step: The user's step.
        metric: The number that the best are chosen by, if it has one.
        verified: Whether all its bytes are known to have been read and verified.
        finite: Whether its parameters and optimizer state have no NaN or Inf; ``None`` if not counted.
    """

    seq: int
    step: int
    metric: float | None = None
    verified: bool = False
    finite: bool | None = None


def superseded(publications: Iterable[Publication]) -> frozenset[int]:
    """Return the ``seq`` of each publication whose step was published again later."""
    by_age = sorted(publications, key=lambda one: one.seq)
    newest = {one.step: one.seq for one in by_age}
    return frozenset(one.seq for one in by_age if newest[one.step] != one.seq)


def abandoned(publications: Iterable[Publication]) -> frozenset[int]:
    """Return the ``seq`` of each publication whose run later went back to a lower step and published there.

    Examples:
        >>> went_back = [Publication(1, 1000), Publication(2, 1500), Publication(3, 1100)]
        >>> sorted(abandoned(went_back))
        [2]
    """
    found = []
    lowest_since: float = math.inf
    for one in sorted(publications, key=lambda one: one.seq, reverse=True):
        if one.step > lowest_since:
            found.append(one.seq)
        lowest_since = min(lowest_since, one.step)
    return frozenset(found)


def unjudged(publications: Iterable[Publication], keep: Keep) -> bool:
    """Whether the best are to be kept, but no publication has a metric.

    Examples:
        >>> from gockpt.options import Keep
        >>> unjudged([Publication(1, 10), Publication(2, 20)], Keep(best=1, metric="loss"))
        True
    """
    if not keep.best:
        return False
    everything = list(publications)
    replaced = superseded(everything)
    return not any(_is_judged(one) for one in everything if one.seq not in replaced)


def expendable(publications: Iterable[Publication], keep: Keep) -> frozenset[int]:
    """Return the ``seq`` of each publication that may be removed.

    Superseded ones don't count towards any rule; abandoned ones count as the oldest. The newest that is known
    to be whole is always kept, and so is the newest that is not known to have NaN or Inf in parameters or
    optimizer state. If they are :func:`unjudged`, all that are not superseded are kept.

    Args:
        publications: All complete checkpoints of a path.
        keep: The rules; a publication that any rule names is kept.
    """
    everything = list(publications)
    replaced = superseded(everything)
    counted = [one for one in everything if one.seq not in replaced]
    left = abandoned(counted)
    counted.sort(key=lambda one: (one.seq not in left, one.seq), reverse=True)
    stay = {one.seq for one in counted[: keep.newest]}
    if keep.every is not None:
        stay.update(one.seq for one in counted if one.step % keep.every == 0)
    if unjudged(counted, keep):
        stay.update(one.seq for one in counted)
    sign = 1 if keep.mode == "min" else -1
    ranked = sorted(
        (sign * one.metric, -one.seq, one.seq)
        for one in counted
        if one.metric is not None and _is_judged(one)
    )
    stay.update(seq for _, _, seq in ranked[: keep.best])
    whole = [one.seq for one in everything if one.verified]
    if whole:
        stay.add(max(whole))
    finite = [one.seq for one in everything if one.finite is not False]
    if finite:
        stay.add(max(finite))
    return frozenset(one.seq for one in everything) - stay


def _is_judged(one: Publication) -> bool:
    return one.metric is not None and math.isfinite(one.metric)
