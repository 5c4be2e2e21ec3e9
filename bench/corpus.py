"""Real text that is on every machine: the sources of Python's own standard library, as bytes.

The order is fixed, so two processes on one machine read the same tokens; the loader's state names the
corpus by its digest, so that a resumed run refuses to go on with another one.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Batch", "Corpus", "Loader", "standard_library"]

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's tokens.

    Attributes:
        inputs: (B, T) int64 tokens.
        targets: (B, T) int64: for each input, the token after it.
    """

    inputs: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text.

    Attributes:
        tokens: All of it, one uint8 per byte.
        files: How many files it was read from.
        digest: Identifies it: SHA-256 of the tokens, in hex.
    """

    tokens: np.ndarray
    files: int
    digest: str


def standard_library(limit: int | None = None) -> Corpus:
    """Return the standard library's sources, one file after the other in the order of their paths.

    Args:
        limit: Stop before the file that would exceed this many bytes; ``None`` reads all.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts: list[bytes] = []
    size = 0
    for path in _sources(root):
        text = path.read_bytes() + b"\n\0"
        size += len(text)
        if limit is not None and size > limit:
            break
        texts.append(text)
    joined = b"".join(texts)
    return Corpus(np.frombuffer(joined, np.uint8), len(texts), hashlib.sha256(joined).hexdigest())


def _sources(root: Path) -> Iterator[Path]:
    inside = (path.relative_to(root) for path in root.rglob("*.py"))
    for path in sorted(inside, key=lambda p: p.as_posix()):
        if LEFT_OUT.isdisjoint(path.parts[:-1]):
            yield root / path


class Loader:
    """Shuffled batches of a corpus, without end; where it stands can be saved and restored.

    The text is cut into sequences of T + 1 tokens, T apart. Each epoch visits them in an order drawn
    from the seed and the epoch alone, so the whole state is a few numbers.
    """

    def __init__(self, corpus: Corpus, *, context: int, batch: int, seed: int) -> None:
        self._corpus = corpus
        self._context = context
        self._batch = batch
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._sequences = (len(corpus.tokens) - 1) // context
        if self._sequences < batch:
            msg = (
                f"a batch of {batch} sequences of {context} tokens needs more than {len(corpus.tokens)} bytes"
            )
            raise ValueError(msg)
        self._order = self._shuffled()

    def next(self) -> Batch:
        """Return the next batch and move on."""
        if self._position + self._batch > self._sequences:
            self._epoch += 1
            self._position = 0
            self._order = self._shuffled()
        chosen = self._order[self._position : self._position + self._batch]
        self._position += self._batch
        index = chosen[:, None] * self._context + np.arange(self._context + 1)
        tokens = torch.from_numpy(self._corpus.tokens[index].astype(np.int64))
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands, and in what."""
        return {**self._identity(), "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where ``state`` stood.

        Raises:
            ValueError: If the state is of another corpus, or of batches of another shape.
        """
        differ = {k: (state.get(k), v) for k, v in self._identity().items() if state.get(k) != v}
        if differ:
            msg = f"this loader reads something else than the saved one (saved, here): {differ}"
            raise ValueError(msg)
        self._epoch = int(state["epoch"])
        self._position = int(state["position"])
        self._order = self._shuffled()

    def _identity(self) -> dict[str, Any]:
        return {
            "corpus": self._corpus.digest,
            "context": self._context,
            "batch": self._batch,
            "seed": self._seed,
        }

    def _shuffled(self) -> np.ndarray:
        return np.random.default_rng([self._seed, self._epoch]).permutation(self._sequences)
