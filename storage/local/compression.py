"""Compression of a checkpoint's arrays: the choice of codecs, and bounded concurrent encoding.

Promise: an array has one codec in one checkpoint, chosen before its first chunk is written; memory for
encoding is bounded by :func:`memory_bound`. ``"auto"`` writes the first checkpoint raw, measures meanwhile,
and then uses the result of :func:`choose`, a pure function of the measurements.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from gockpt.core.arena_layout import CHECKSUM_BYTES
from gockpt.errors import OptionsError
from gockpt.storage.format.codecs import CODECS, MAX_CHUNK_NBYTES, encode, most_nbytes
from gockpt.storage.local.chunk_writer import most_bounced

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from gockpt.core.arena_layout import ArrayLayout, Slot
    from gockpt.core.array_spec import ArraySpec

__all__ = [
    "AUTO",
    "Compression",
    "Kind",
    "Measured",
    "Trial",
    "choose",
    "is_encodable",
    "largest_encoded",
    "memory_bound",
]

_log = logging.getLogger(__name__)

AUTO = "auto"
SMALLEST = 4096
"""Arrays below this many bytes stay raw: a file takes a page on the disk whatever is in it."""

WORTH = 0.9
"""Encoding is chosen only if it brings a save's time below this share of a raw one's."""

HANDLING = 1.5
"""Encoding takes about this many times what the codec takes: its result is memory to be got, hashed, copied
and written, all by the same cores."""

SAMPLE = 1 << 20
SAMPLES = 8
"""Number of samples of each kind, and the most bytes of one."""

_SAMPLE_FROM = 64 << 10
_WRITING = 3  # results that may be on their way to the disk while others are being made


@dataclass(frozen=True, slots=True, order=True)
class Kind:
    """Tensors that compress alike.

    Attributes:
        role: ``model``, or the name of an optimizer's state; else the first component of the name.
        dtype: As in the manifest.
    """

    role: str
    dtype: str

    @classmethod
    def of(cls, spec: ArraySpec) -> Kind:
        """Return an array's kind."""
        is_state = spec.name[0] == "optimizer" and len(spec.name) > 2
        return cls(spec.name[-1] if is_state else spec.name[0], spec.dtype)

    def __str__(self) -> str:
        return f"{self.role} ({self.dtype})"


@dataclass(frozen=True, slots=True)
class Trial:
    """Measurement of one codec on samples of one kind.

    Attributes:
        rate: Raw bytes that one thread encodes in a second.
        ratio: Encoded bytes by raw bytes.
    """

    rate: float
    ratio: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Measurements of one kind.

    Attributes:
        nbytes: Raw bytes of it in one checkpoint.
        trials: By codec.
    """

    nbytes: int
    trials: Mapping[str, Trial]


@dataclass(frozen=True, slots=True)
class Choice:
    """Choice of the kinds to encode.

    Attributes:
        codecs: Codec by kind; kinds without one stay raw.
        seconds: Expected time of writing a checkpoint with it.
        raw_seconds: Expected time of writing it raw.
    """

    codecs: Mapping[Kind, str]
    seconds: float
    raw_seconds: float


def choose(kinds: Mapping[Kind, Measured], *, write_rate: float, threads: int) -> Choice:
    """Return which kinds to encode so that a save takes the least time; none unless that is worth while.

    Encoding on ``threads`` threads and writing go on side by side, so that a save takes the longer of both.
    (Without :data:`HANDLING` saves got longer where both are about as long: ``bench_compression.py``.)
    Kinds are taken in the order of what they save the disk for each second of encoding, as long as the
    whole gets shorter; a slower codec of a kind takes the place of a faster one where that is shorter still.

    Args:
        kinds: What was measured.
        write_rate: Bytes that the disk takes in a second, syncing included.
        threads: How many threads encode.
    """
    raw = writing = sum(kind.nbytes for kind in kinds.values()) / write_rate
    encoding = 0.0
    offers = []
    for kind, measured in kinds.items():
        for codec, trial in measured.trials.items():
            saved = measured.nbytes * (1 - trial.ratio) / write_rate
            cost = HANDLING * measured.nbytes / trial.rate / threads
            if saved > 0:
                offers.append((-saved / cost, kind, codec, saved, cost))
    taken: dict[Kind, tuple[str, float, float]] = {}
    for _, kind, codec, saved, cost in sorted(offers):
        _, saved_before, cost_before = taken.get(kind, ("", 0.0, 0.0))
        with_it = writing + saved_before - saved, encoding - cost_before + cost
        if max(with_it) < max(writing, encoding):
            taken[kind] = codec, saved, cost
            writing, encoding = with_it
    seconds = max(writing, encoding)
    codecs = {kind: codec for kind, (codec, _, _) in taken.items()}
    return Choice(codecs, seconds, raw) if seconds < WORTH * raw else Choice({}, raw, raw)


def is_encodable(layout: ArrayLayout, smallest: int = SMALLEST) -> bool:
    """Whether an array is ever encoded: neither tiny nor cut into chunks too large to be held in memory."""
    return layout.spec.nbytes >= max(1, smallest) and layout.chunk_nbytes <= MAX_CHUNK_NBYTES


def memory_bound(largest: int, threads: int) -> int:
    """Return the most bytes that encoding takes beside the slots.

    Each encoding thread has a padded copy, the codec's working memory and its result; a few more results may
    be on their way to the disk, however many threads there are. Direct I/O copies these by pieces, as any
    unaligned memory.

    Args:
        largest: Bytes of the largest chunk that is encoded; 0 if none is.
        threads: How many threads encode at a time.
    """
    if not largest:
        return 0
    result = most_nbytes(largest)
    writing = result + most_bounced(result + CHECKSUM_BYTES)
    return threads * (largest + result) + (threads + _WRITING) * writing


def largest_encoded(codec: str | None, arrays: Iterable[ArrayLayout]) -> int:
    """Return the bytes of the largest chunk, or sample of one, that is ever encoded; 0 if none is.

    Args:
        codec: As for :class:`Compression`.
        arrays: Arrays of one checkpoint.
    """
    if codec is None:
        return 0
    largest = 0
    for array in arrays:
        nbytes = array.chunk_nbytes
        if is_encodable(array):
            largest = max(largest, nbytes)
        elif codec == AUTO and nbytes >= _SAMPLE_FROM:
            largest = max(largest, min(SAMPLE, nbytes))
    return largest


class Compression:
    """Encodes chunks as asked for; safe to use from several threads. Outlives single checkpoints.

    Attributes:
        peak_nbytes: The most memory that encoding has held at a time, beside the slots.
    """

    def __init__(self, codec: str | None, *, threads: int, smallest: int = SMALLEST) -> None:
        """Encode nothing yet.

        Args:
            codec: One of :data:`~gockpt.storage.format.codecs.CODECS`, ``"auto"``, or ``None``: all stays
                raw.
            threads: How many threads may encode at a time.
            smallest: Arrays below this many bytes stay raw.

        Raises:
            OptionsError: If there is no such codec.
        """
        if codec is not None and codec not in (*CODECS, AUTO):
            msg = f"compression={codec!r}: expected None, {', '.join(map(repr, CODECS))} or {AUTO!r}"
            raise OptionsError(msg)
        self.peak_nbytes = 0
        self._codec = codec
        self._threads = threads
        self._smallest = smallest
        self._turns = threading.BoundedSemaphore(threads)
        self._places = threading.BoundedSemaphore(threads + _WRITING)
        self._mutex = threading.Lock()
        self._held = 0
        self._choice: Choice | None = None
        self._samples: defaultdict[Kind, list[dict[str, tuple[int, float, int]]]] = defaultdict(list)

    def codec_for(self, layout: ArrayLayout) -> str | None:
        """Return what an array's chunks are to be encoded with; ``None``: they stay raw."""
        if self._codec is None or not is_encodable(layout, self._smallest):
            return None
        if self._codec == AUTO:
            return None if self._choice is None else self._choice.codecs.get(Kind.of(layout.spec))
        return self._codec

    @contextmanager
    def encoded(self, codec: str, layout: ArrayLayout, slot: Slot, buffer: memoryview) -> Iterator[bytes]:
        """Encode a slot's chunk, padded with zeros, and count its memory until the caller is done with it."""
        real, whole = slot.nbytes, layout.chunk_nbytes
        working = most_nbytes(whole) + (whole if real < whole else 0)
        held = 0
        self._places.acquire()
        try:
            with self._turns:
                self._hold(working)
                held += working
                data = _encoded(codec, layout, buffer[:real])
                self._hold(len(data))
                held += len(data)
                self._hold(-working)
                held -= working
            yield data
        finally:
            self._hold(-held)
            self._places.release()

    def sample(self, layout: ArrayLayout, slot: Slot, buffer: memoryview) -> None:
        """Try the codecs on a chunk that stays raw, if that is still to be decided."""
        if self._codec != AUTO or self._choice is not None or slot.nbytes < _SAMPLE_FROM:
            return
        kind = Kind.of(layout.spec)
        figures: dict[str, tuple[int, float, int]] = {}
        with self._mutex:
            if len(self._samples[kind]) >= SAMPLES:
                return
            self._samples[kind].append(figures)
        # Out of the middle: the first rows of a table are often used least.
        nbytes = min(SAMPLE, slot.nbytes)
        start = (slot.nbytes - nbytes) // 2 // layout.spec.itemsize * layout.spec.itemsize
        working = 2 * most_nbytes(nbytes)  # what is encoded into, and the result
        with self._turns:
            self._hold(working)
            try:
                for codec in CODECS:
                    began = perf_counter()
                    stored = len(encode(codec, layout.spec.itemsize, buffer[start : start + nbytes]))
                    figures[codec] = nbytes, perf_counter() - began, stored
            finally:
                self._hold(-working)

    def learn(self, arrays: Iterable[ArrayLayout], *, nbytes: int, seconds: float) -> None:
        """Decide, once, after a whole checkpoint was written.

        Args:
            arrays: All of its arrays.
            nbytes: Bytes of its files.
            seconds: How long the disk was busy with them.
        """
        if self._codec != AUTO or self._choice is not None or not nbytes:
            return
        weights: defaultdict[Kind, int] = defaultdict(int)
        for layout in arrays:
            weights[Kind.of(layout.spec)] += layout.spec.nbytes
        kinds = {kind: Measured(weight, self._trials(kind)) for kind, weight in weights.items()}
        rate = nbytes / max(seconds, 1e-9)
        self._choice = choose(kinds, write_rate=rate, threads=self._threads)
        _log.info("%s", _words(self._choice, kinds, rate))

    def _trials(self, kind: Kind) -> dict[str, Trial]:
        figures = self._samples.get(kind, [])
        trials = {}
        for codec in CODECS:
            found = [each[codec] for each in figures if codec in each]
            raw, seconds, stored = (
                (sum(column) for column in zip(*found, strict=True)) if found else (0, 0, 0)
            )
            if raw and seconds:
                trials[codec] = Trial(rate=raw / seconds, ratio=stored / raw)
        return trials

    def _hold(self, nbytes: int) -> None:
        with self._mutex:
            self._held += nbytes
            self.peak_nbytes = max(self.peak_nbytes, self._held)


def _encoded(codec: str, layout: ArrayLayout, rows: memoryview) -> bytes:
    if rows.nbytes == layout.chunk_nbytes:
        return encode(codec, layout.spec.itemsize, rows)
    padded = np.zeros(layout.chunk_nbytes, np.uint8)
    padded[: rows.nbytes] = rows
    return encode(codec, layout.spec.itemsize, padded)


def _words(choice: Choice, kinds: Mapping[Kind, Measured], rate: float) -> str:
    disk = f'compression="auto": the disk takes {rate / 1e9:.3g} GB/s'
    if not choice.codecs:
        return f"{disk}; encoding would not make saves shorter, so everything stays raw"
    what = ", ".join(
        f"{kind} by {codec} to {kinds[kind].trials[codec].ratio:.0%}"
        for kind, codec in sorted(choice.codecs.items())
    )
    return (
        f"{disk}; from the next save on: {what}; the rest stays raw. "
        f"Writing should take {choice.seconds:.2f} s instead of {choice.raw_seconds:.2f} s"
    )
