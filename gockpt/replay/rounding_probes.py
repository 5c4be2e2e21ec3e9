"""Verification of replay from 16-bit gradients: the error is measured at probes, and bounded.

Such a replay can't be verified by its bits. A few elements of each piece, its *probes*, are followed instead:
their values when the piece was copied, in the live state at the closing tick, and after replay. Rounding is
bounded, and so is its effect on them: the probes are replayed several times more, each time from gradients
changed by as much as rounding can have changed them. They are changed upwards; away from zero; away from zero
in some updates and towards it in the others, in patterns that differ between any two updates, since Adam does
not react to gradients that all become larger. A piece is accepted if its probes are no further from the live
ones than

    2 * the largest of these moves + 2 units in the last place of the values,

in the Euclidean norm over its probes, array by array. A replay that uses a wrong learning rate, drops an
update or follows another formula is far beyond that.

Probes without a gradient prove nothing: if only a few rows of a parameter change, all probes may lie between
them. A piece that is not exact counts as measured only if rounding changed a gradient at one of its probes,
and if in each array that differs a probe changed during the window, or differs itself. A differing probe in
every such array can't be required: with small steps, rounding changes one value in thousands.
"""

from __future__ import annotations

from itertools import compress
from typing import TYPE_CHECKING

import numpy as np

from gockpt.kernels import replay
from gockpt.kernels.gradient_encoding import decode, glance, uncertainty
from gockpt.replay.rounding_error import Sums

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gockpt.core.descriptors import Gradient, ReplayPiece

__all__ = [
    "PROBE_COPIES",
    "RUN",
    "Probes",
    "choose",
    "elements",
    "most_elements",
    "spread",
]

RUN = 16
"""Number of adjacent probes."""

FEW, MANY, LARGE = 64, 256, 1 << 14
"""Smaller and larger number of probes of a piece, and the size from which it has the larger one."""

PATTERNS = 4
"""Bits of an update's number: enough to tell apart the updates of the longest window."""

VARIANTS = 3 + PATTERNS
"""As they are, upwards, outwards, and the patterns."""

PROBE_COPIES = 1 + VARIANTS
"""Number of copies of each probe's values, besides the live ones."""

LOOKED_AT = 4096
"""Largest number of a gradient's elements that are read to find where it is large."""

BOUND = 2.0
ULPS = 2.0 * 2.0**-23
TAIL_ULPS = 16.0 * 2.0**-23
"""Between a piece and its probes: fused updates round elsewhere at a tensor's end, once in each update."""


def most_elements(count: int) -> int:
    """Return the most probes that a piece of ``count`` elements has."""
    return min(count, FEW if count < LARGE else MANY)


def spread(count: int) -> tuple[int, ...]:
    """Return where as many runs begin if no gradient has been seen: evenly spread."""
    runs, wanted = -(-count // RUN), -(-most_elements(count) // RUN)
    if runs <= wanted:
        return tuple(range(0, count, RUN))
    return tuple(sorted({round(i * (runs - 1) / (wanted - 1)) * RUN for i in range(wanted)}))


def choose(encoding: str | None, data: np.ndarray, count: int) -> tuple[int, ...]:
    """Return the starts of the runs of 16 probes: half evenly spread, half where the gradient is large.

    Args:
        encoding: The gradient's encoding.
        data: All of its bytes.
        count: Its number of values.
    """
    runs = -(-count // RUN)
    wanted = -(-most_elements(count) // RUN)
    if runs <= wanted:
        return tuple(range(0, count, RUN))
    chosen = {round(i * (runs - 1) / (wanted // 2 - 1)) for i in range(wanted // 2)}
    step = -(-runs // LOOKED_AT)
    sizes = np.abs(glance(encoding, data, count, RUN * step))
    sizes[~np.isfinite(sizes)] = 0
    sizes[[run // step for run in chosen if run % step == 0]] = -1
    rest = wanted - len(chosen)
    strong = np.argpartition(sizes, sizes.size - rest)[sizes.size - rest :]
    chosen.update(int(run) * step for run in strong)
    return tuple(sorted(run * RUN for run in chosen))


def elements(starts: Sequence[int], count: int) -> np.ndarray:
    """Return the probes' indexes within their piece of ``count`` elements."""
    return np.concatenate([np.arange(start, min(start + RUN, count)) for start in starts])


class Probes:
    """The probes of one piece while it is replayed."""

    def __init__(self, starts: Sequence[int], stretches: Sequence[np.ndarray]) -> None:
        """Begin with what the piece's arrays, float32, hold before the first gradient that is not exact."""
        self._count = stretches[0].size
        self._at = elements(starts, self._count)
        self._sent = [stretch[self._at] for stretch in stretches]
        self._moved = [np.tile(array, VARIANTS) for array in self._sent]
        self._update = 0
        self._touched = False

    @property
    def nbytes(self) -> int:
        """Bytes of the live values that :meth:`judge` takes."""
        return sum(array.nbytes for array in self._sent)

    def follow(self, piece: ReplayPiece, gradients: Sequence[Gradient], data: Sequence[np.ndarray]) -> None:
        """Replay these updates for the probes; ``data`` are the gradients' bytes."""
        many = []
        for gradient, encoded in zip(gradients, data, strict=True):
            values = np.empty(self._at.size, np.float32)
            # Run by run, as they stand side by side.
            ends = [*(np.flatnonzero(np.diff(self._at) != 1) + 1).tolist(), self._at.size]
            for low, high in zip([0, *ends[:-1]], ends, strict=True):
                decode(gradient.encoding, encoded, self._count, int(self._at[low]), values[low:high])
            upward = uncertainty(gradient.encoding, encoded, self._count, self._at, values)
            # Of a zero nothing is known: an infinitesimal would be one as well.
            self._touched |= bool(((values != 0) & (upward > 0)).any())
            outward = np.copysign(upward, values)
            signs = [1 - 2 * (self._update >> bit & 1) for bit in range(PATTERNS)]
            with np.errstate(all="ignore"):
                moved = [values + upward, values + outward, *(values + sign * outward for sign in signs)]
            many.append(np.concatenate([values, *moved]).astype(np.float32))
            self._update += 1
        rows = [gradient.scalars for gradient in gradients]
        # Where these end is no tensor's end, but a tail only rounds in another place.
        p, *states = self._moved
        replay.run(piece.kernel, piece.flags, p, states, many, rows, tail=True)

    def saw(self, found: Sequence[Sums], differs: Sequence[bool]) -> bool:
        """Whether something was measured of each of the piece's arrays that differs.

        Args:
            found: What :meth:`judge` found of each array.
            differs: Which of them are not exact.
        """
        return self._touched and all(
            sums.max_abs > 0 or sums.movement > 0 for sums in compress(found, differs)
        )

    def judge(self, stretches: Sequence[np.ndarray], live: np.ndarray) -> list[Sums] | None:
        """Return how far replay is from the live values; ``None`` if further than rounding explains.

        Args:
            stretches: The piece's arrays as replay left them.
            live: Live float32 of the probes at the closing tick, array after array.
        """
        found = []
        rows = live.reshape(len(stretches), self._at.size)
        for stretch, row, sent, moved in zip(stretches, rows, self._sent, self._moved, strict=True):
            sums = _judge(stretch[self._at], row, sent, moved.reshape(VARIANTS, -1), stretch.size)
            if sums is None:
                return None
            found.append(sums)
        return found


def _judge(
    saved: np.ndarray, live: np.ndarray, sent: np.ndarray, variants: np.ndarray, count: int
) -> Sums | None:
    saved, live, sent, variants = (array.astype(np.float64) for array in (saved, live, sent, variants))
    finite = np.isfinite(saved) & np.isfinite(live)
    same = (saved == live) | (np.isnan(saved) & np.isnan(live))
    if not (finite | same).all():
        return None
    with np.errstate(all="ignore"):
        differences = _where(finite, saved - live)
        movement = _where(finite, live - sent)
        spread = _where(finite, variants[1:] - variants[0])
        largest = np.abs([_where(finite, array) for array in (sent, saved, live)]).max(axis=0)
        astray = _where(finite, saved - variants[0])
    # Beside the proof of the numbers: what the probes' own replay came to is what the piece's came to.
    allowed = BOUND * _norm(np.abs(spread).max(axis=0)) + ULPS * _norm(largest)
    if _norm(differences) > allowed or _norm(astray) > allowed + TAIL_ULPS * _norm(largest):
        return None
    return Sums(
        float(np.abs(differences).max(initial=0)),
        float((differences**2).sum()),
        float((movement**2).sum()),
        float((_where(finite, live) ** 2).sum()),
        saved.size,
        count,
    )


def _where(finite: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.where(finite & np.isfinite(values), values, 0)


def _norm(values: np.ndarray) -> float:
    return float(np.sqrt((values**2).sum()))
