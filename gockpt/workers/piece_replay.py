"""Replay and proof of one piece: its gradients in order, then its bits against the live state's.

Nothing is locked here: a job has at most one task at a time for a piece.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING

import numpy as np

from gockpt.kernels import replay
from gockpt.kernels.fingerprint_numba import fingerprint
from gockpt.kernels.gradient_encoding import empty, seal
from gockpt.replay.rounding_probes import Probes
from gockpt.replay.tiled import replay_encoded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gockpt.core.descriptors import Capture, Gradient, ReplayPiece, Stretch
    from gockpt.replay.rounding_error import Sums
    from gockpt.staging.arena import Arena

__all__ = ["PieceReplay"]


@dataclass(slots=True)
class PieceReplay:
    """A piece and how far its replay is.

    Attributes:
        piece: The piece.
        pending: Gradients that wait for replay, oldest first.
        busy: Whether a task works on it.
        proven: Whether it was compared with the live state.
        probes: Where its rounding is measured, once a gradient came that is rounded.
        gradients: How many sealed gradients were replayed.
        last: The number of the newest of these.
        intact: Whether every one of them was what was posted.
    """

    piece: ReplayPiece
    pending: list[Gradient] = field(default_factory=list)
    busy: bool = False
    proven: bool = False
    probes: Probes | None = None
    gradients: int = 0
    last: int = 0
    intact: bool = True

    def run(self, arena: Arena, ring: Arena, gradients: list[Gradient]) -> None:
        """Replay gradients, oldest first."""
        piece, views = self.piece, self._views(arena)
        data = [ring.view(g.offset, g.nbytes) for g in gradients]
        self._unseal(gradients, data)
        starts = next((g.probes for g in gradients if g.probes), ())
        if starts and self.probes is None:
            self.probes = Probes(starts, views)
        if self.probes is None and not _exact(piece, gradients, data):
            self.intact = False  # the one that says where its probes are is missing
        elif self.probes is None and all(g.encoding is None for g in gradients):
            grads = [encoded.view(np.float32) for encoded in data]
            rows = [g.scalars for g in gradients]
            replay.run(piece.kernel, piece.flags, views[0], views[1:], grads, rows, tail=piece.tail)
        else:
            replay_encoded(piece, views, gradients, data, self.probes)

    def prove(self, arena: Arena, ring: Arena, capture: Capture) -> list[tuple[Stretch, Sums]] | None:
        """Compare the piece with the live state at the boundary.

        Returns:
            How far each stretch is off that differs by rounding alone; ``None`` if anything else differs.
        """
        stretches = self.piece.stretches
        got = [fingerprint(arena.view(s.offset, s.nbytes), s.position) for s in stretches]
        wrong = [a != b for a, b in zip(got, capture.proofs[self.piece.index], strict=True)]
        if not any(wrong):
            return []
        found = self._measure(arena, ring, capture, wrong)
        return None if found is None else list(compress(zip(stretches, found, strict=True), wrong))

    def _measure(
        self, arena: Arena, ring: Arena, capture: Capture, wrong: Sequence[bool]
    ) -> list[Sums] | None:
        """Return how far a piece is off, with what arrays are ``wrong``; ``None`` if it must not be."""
        sample = capture.samples.get(self.piece.index)
        if sample is None or self.probes is None:
            return None
        offset, posted = sample
        # Rounding explains only what was made of the very gradients that were posted, of all of them.
        if not self.intact or self.gradients != posted:
            return None
        live = ring.view(offset, self.probes.nbytes).view(np.float32)
        found = self.probes.judge(self._views(arena), live)
        # Nor does it where no probe saw any.
        return found if found is not None and self.probes.saw(found, wrong) else None

    def _views(self, arena: Arena) -> list[np.ndarray]:
        return [arena.view(s.offset, s.nbytes).view(np.float32) for s in self.piece.stretches]

    def _unseal(self, gradients: list[Gradient], data: list[np.ndarray]) -> None:
        """Count the gradients that are sealed, and note if one is not what was posted."""
        for gradient, encoded in zip(gradients, data, strict=True):
            if gradient.seal is not None:
                self.gradients += 1
                found = seal(self.piece.index, gradient.encoding, encoded, gradient.number, gradient.scalars)
                self.intact &= found == gradient.seal and gradient.number > self.last
                self.last = gradient.number


def _exact(piece: ReplayPiece, gradients: list[Gradient], data: list[np.ndarray]) -> bool:
    """Whether nothing of these gradients is rounded: they are as they were, or 0."""
    count = piece.stretches[0].stop - piece.stretches[0].start
    pairs = zip(gradients, data, strict=True)
    return all(g.encoding is None or empty(g.encoding, encoded, count) for g, encoded in pairs)
