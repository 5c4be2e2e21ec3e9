"""Replay of a piece tile by tile, so that no encoded gradient is decoded as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gockpt.kernels import replay
from gockpt.kernels.gradient_encoding import decode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gockpt.core.descriptors import Gradient, ReplayPiece
    from gockpt.replay.rounding_probes import Probes

__all__ = ["SCRATCH_BYTES", "replay_encoded"]

TILE = 1 << 16
AT_ONCE = 2
SCRATCH_BYTES = 4 * TILE * AT_ONCE
"""Bytes of decoded gradients on each thread that replays."""


def replay_encoded(
    piece: ReplayPiece,
    stretches: Sequence[np.ndarray],
    gradients: Sequence[Gradient],
    data: Sequence[np.ndarray],
    probes: Probes | None,
) -> None:
    """Apply the updates in order, to a piece and to its probes.

    Args:
        piece: The piece.
        stretches: Its float32 arrays: the parameter's, then the states'.
        gradients: The updates, oldest first.
        data: The gradients' bytes.
        probes: Followed along; ``None`` while none are needed, since all gradients are 0.
    """
    for first in range(0, len(gradients), AT_ONCE):
        some = slice(first, first + AT_ONCE)
        if probes is not None:
            probes.follow(piece, gradients[some], data[some])
        _replay(piece, stretches, gradients[some], data[some])


def _replay(
    piece: ReplayPiece,
    stretches: Sequence[np.ndarray],
    gradients: Sequence[Gradient],
    data: Sequence[np.ndarray],
) -> None:
    count = stretches[0].size
    scratch = np.empty((len(gradients), min(TILE, count)), np.float32)
    rows = [gradient.scalars for gradient in gradients]
    for low in range(0, count, TILE):
        high = min(low + TILE, count)
        tiles = []
        for gradient, encoded, row in zip(gradients, data, scratch, strict=True):
            if gradient.encoding is None:
                tiles.append(encoded.view(np.float32)[low:high])
            else:
                decode(gradient.encoding, encoded, count, low, row[: high - low])
                tiles.append(row[: high - low])
        p, *states = (stretch[low:high] for stretch in stretches)
        last = piece.tail and high == count
        replay.run(piece.kernel, piece.flags, p, states, tiles, rows, tail=last)
