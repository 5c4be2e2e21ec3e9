"""What the state weighs, and the memory that saving it takes: both known before the first byte moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gockpt.arena import Arena
from gockpt.engine.attempt import Attempt
from gockpt.engine.cut import cut
from gockpt.engine.job import Job
from gockpt.engine.ring import Ring, block_bytes
from gockpt.errors import OptionsError
from gockpt.layout import ArenaLayout, lay_out
from gockpt.schedule import RING_GRADIENTS, Facts, part_ranges
from gockpt.schema import ArraySpec
from gockpt.storage.compression import is_encodable, memory_bound

if TYPE_CHECKING:
    from gockpt.engine.cut import Cut
    from gockpt.engine.job import Begin, Outcome
    from gockpt.engine.trace import Trace
    from gockpt.options import Options
    from gockpt.schedule import Plan
    from gockpt.state import LiveState
    from gockpt.transfer import Transfer

__all__ = ["Memory", "Shape", "facts_of", "shape_of"]


@dataclass(frozen=True, slots=True)
class Shape:
    """The geometry of a state: what must not change inside a window.

    Attributes:
        key: Equal for states with the same names, shapes, dtypes, memory orders and parameters.
        layout: Where every array lies in the arena.
        nbytes: Payload bytes.
    """

    key: tuple[object, ...]
    layout: ArenaLayout
    nbytes: int

    def rough(self, step_seconds: float | None, copy_rate: float | None) -> Facts:
        """Return facts that assume all is replayable: a first guess, before looking closer."""
        return Facts(self.nbytes, self.nbytes, self.nbytes // 3, step_seconds, copy_rate)


def shape_of(live: LiveState, known: Shape | None = None) -> Shape:
    """Return the geometry of ``live``; ``known`` itself if it is the same."""
    specs = [
        ArraySpec(name, tuple(t.shape), str(t.dtype).removeprefix("torch."))
        for name, t in live.entries.items()
    ]
    orders = tuple(None if t.is_contiguous() else t.stride() for t in live.entries.values())
    owners = tuple((p.fqn, id(p.param), p.optimizer_index, p.group_index) for p in live.params)
    key = (tuple(specs), orders, owners, tuple(sorted(live.aliases.items())), frozenset(live.buffers))
    if known is not None and known.key == key:
        return known
    return Shape(key, lay_out(specs), sum(s.nbytes for s in specs))


def facts_of(
    live: LiveState, shape: Shape, barred: frozenset[str], step_seconds: float | None, copy_rate: float | None
) -> Facts:
    """Return what a plan is made from: looks at every parameter's optimizer."""
    pieces = cut(live, shape.layout, window=2, barred=barred)
    return Facts(shape.nbytes, pieces.replay_bytes, pieces.grad_bytes, step_seconds, copy_rate)


def ring_bytes_of(pieces: Cut, plan: Plan) -> int:
    """Return the room that gradients need: an update never waits for room that it holds itself."""
    parts = part_ranges([p.nbytes for p in pieces.pieces], plan.shares)
    early = [pieces.pieces[i] for part in parts[:-1] for i in part]
    one_update = sum(block_bytes(p.stretches[0].nbytes) for p in early)
    return min(RING_GRADIENTS, plan.window - 1) * one_update


def _encoding_bytes(layout: ArenaLayout, options: Options) -> int:
    """Return the most memory that compression can take."""
    if options.compression is None:
        return 0
    chunks = [array.chunk_nbytes for array in layout.arrays if is_encodable(array)]
    return memory_bound(max(chunks), options.worker_threads) if chunks else 0


class Memory:
    """The arenas of one engine: state, gradient ring, and what a closing tick adds. Kept between saves."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._state: Arena | None = None
        self._ring: Arena | None = None
        self._extra: Arena | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of host memory held."""
        return sum(a.nbytes for a in (self._state, self._ring, self._extra) if a is not None)

    @property
    def arenas(self) -> tuple[Arena, Arena, Arena]:
        """State, ring and additions."""
        self._ring = self._ring or Arena(0)
        self._extra = self._extra or Arena(0)
        self._state = self._state or Arena(0)
        return self._state, self._ring, self._extra

    def prepare(self, shape: Shape, transfer: Transfer) -> None:
        """Reserve the state's arena and take its pages behind the caller."""
        self._check(shape)
        arena = self._state_arena(shape.layout.nbytes)
        transfer.submit([arena.prefault])

    def additions(self, nbytes: int) -> Arena:
        """Return an arena for what the closing tick adds (extras, random states)."""
        if self._extra is None or self._extra.nbytes < nbytes:
            self._extra = None
            self._extra = Arena(nbytes)
        return self._extra

    def attempt(
        self,
        live: LiveState,
        shape: Shape,
        plan: Plan,
        *,
        barred: frozenset[str],
        racing: frozenset[tuple[str, ...]] | None,
        transfer: Transfer,
        begin: Begin,
        outcome: Outcome,
        trace: Trace,
    ) -> tuple[Attempt, Job]:
        """Set up one attempt and its background job."""
        pieces = cut(live, shape.layout, window=plan.window, barred=barred, racing=racing)
        ring_bytes = ring_bytes_of(pieces, plan)
        self._check(shape, ring_bytes)
        arena = self._state_arena(shape.layout.nbytes)
        if self._ring is None or self._ring.nbytes < ring_bytes:
            self._ring = None
            self._ring = Arena(ring_bytes)
            transfer.submit([self._ring.prefault])
        ring = Ring(0, ring_bytes)
        job = Job(
            arenas=self.arenas,
            pieces=[p.message() for p in pieces.pieces],
            ring=ring,
            begin=begin,
            outcome=outcome,
            trace=trace,
        )
        attempt = Attempt(
            live=live,
            shape=shape,
            cut=pieces,
            plan=plan,
            arena=arena,
            ring=ring,
            ring_arena=self._ring,
            transfer=transfer,
            options=self._options,
            racing=racing,
            job=job,
            trace=trace,
        )
        return attempt, job

    def release(self) -> None:
        """Let the memory go."""
        self._state = self._ring = self._extra = None

    def _state_arena(self, nbytes: int) -> Arena:
        if self._state is None or self._state.nbytes < nbytes:
            self._state = None
            self._state = Arena(nbytes)
        return self._state

    def _check(self, shape: Shape, ring_bytes: int = 0) -> None:
        limit = self._options.host_memory
        encoding = _encoding_bytes(shape.layout, self._options)
        nbytes = shape.layout.nbytes + ring_bytes + encoding
        if limit is not None and nbytes > limit:
            msg = (
                f"saving this state takes {nbytes} bytes of host memory and host_memory={limit} allows less; "
                "raise host_memory or use window=1, which needs no gradient ring"
            )
            if encoding:
                msg += f", or compression=None ({encoding} of these bytes)"
            raise OptionsError(msg)
