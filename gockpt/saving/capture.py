"""One capture attempt: the pieces that were copied, await gradients, or must be copied again.

The attempt watches the pieces that were copied before the closing tick. Around every update their live bytes
are fingerprinted; a piece with a change that no update explains is *late*: it is copied again at the closing
tick. At the close the fingerprints of all replayed pieces are taken from the live state: the worker publishes
only if its replay has exactly these.

Each stager copies the pieces in its memory (:class:`gockpt.saving.stager_capture.StagerCapture`). The attempt
divides the pieces among the stagers, and puts together what comes of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gockpt.core.array_spec import public_name
from gockpt.core.descriptors import ArenaId, ArrayPlace
from gockpt.saving.at_once import AtOnce
from gockpt.saving.late_pieces import CHANGED, GRAPHED, OVERTAKEN
from gockpt.saving.stager_capture import StagerCapture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from gockpt.core.array_spec import Name
    from gockpt.core.timeline import Trace
    from gockpt.options import Options
    from gockpt.planning.planner import Plan
    from gockpt.saving.facts import Shape
    from gockpt.saving.write_items import Cut, Unit
    from gockpt.staging.arena import Arena
    from gockpt.staging.gradient_ring import Ring
    from gockpt.staging.stager import Stager
    from gockpt.state.live_state import LiveState
    from gockpt.workers.job_client import JobClient

__all__ = ["Attempt"]


class Attempt:
    """The training side of one attempt.

    Attributes:
        ticks: Ticks it was spread over so far.
        lost: Names of arrays whose copies at the closing tick don't equal the state at their boundary.
        variant: How a device's stager copies, in a few words; ``None`` if there is nothing to say.
        graphed: Whether an update was captured into a graph, which may run unseen.
    """

    def __init__(
        self,
        *,
        live: LiveState,
        shape: Shape,
        cut: Cut,
        plan: Plan,
        stagers: Sequence[Stager],
        arena: Arena,
        ring: Ring,
        ring_arena: Arena,
        options: Options,
        overtaken: frozenset[Name] | None,
        job: JobClient,
        trace: Trace,
    ) -> None:
        """Divide what was cut among ``stagers``; ``overtaken`` can't be copied behind the closing tick."""
        self.live = live
        self.layout = shape.layout
        self._shape = shape
        self.shape_key = shape.key
        self.cut = cut
        self.plan = plan
        self.job = job
        self.graphed = False
        self.ticks = 0
        self.lost: list[Name] = []
        self._overtaken = overtaken
        self._ring = ring
        self._arena = arena
        self._parts = cut.parts(plan)
        self._next_part = 0
        # What changes behind the optimizer's back must be seen by its bits: rounding might explain it later.
        full = options.verify == "full" or options.grad_dtype is not None
        self._at_once = AtOnce(cut.at_once, arena)
        self._captures = [
            StagerCapture(
                stager,
                cut,
                shape.layout,
                pieces=[piece for piece in cut.pieces if piece.stager == number],
                behind=[piece for piece in cut.behind if piece.stager == number],
                prompt=[piece for piece in cut.prompt if piece.stager == number],
                arena=arena,
                ring=ring,
                ring_arena=ring_arena,
                job=job,
                trace=trace,
                full=full,
                grad_dtype=options.grad_dtype,
            )
            for number, stager in enumerate(stagers)
        ]
        self.variant = next((stager.variant for stager in stagers if stager.variant is not None), None)

    # -- ticks -------------------------------------------------------------------------------

    def send_part(self, live: LiveState) -> None:
        """Start copying the next part; the copies must equal its live bytes at this moment."""
        self._tick(live)
        part = self._parts[self._next_part] if self._next_part < len(self._parts) else []
        self._next_part += 1
        for number, capture in enumerate(self._captures):
            capture.tick(live, [piece for piece in part if piece.stager == number])

    def close(self, live: LiveState) -> None:
        """Take the closing boundary, and start copying the rest; :meth:`start_rest` says who is told."""
        self._tick(live)
        samples_at = self._ring.nbytes
        for capture in self._captures:
            capture.close(live, self._overtaken_before, samples_at)
            samples_at = capture.samples_end

    def _tick(self, live: LiveState) -> None:
        """Finish what the last tick began, and copy what is copied at every tick."""
        self.collect()
        self.ticks += 1
        self.live = live
        if self.graphed:
            # What left before may be changed by the graph, unseen.
            for capture in self._captures:
                capture.gradients.all_late(GRAPHED)
        self._at_once.copy(live.entries)

    def collect(self) -> None:
        """Finish those copies that only the training thread can finish."""
        for capture in self._captures:
            capture.collect()

    def proofs(self) -> dict[int, tuple[int, ...]]:
        """Return what the replay of each piece must arrive at, once all is settled."""
        return {index: proof for capture in self._captures for index, proof in capture.proofs().items()}

    def samples(self) -> dict[int, tuple[int, int]]:
        """Return where the live values of probes stand, and how many gradients were posted, by piece.

        As with :meth:`proofs`, once all is settled.
        """
        return {index: found for capture in self._captures for index, found in capture.samples().items()}

    def _overtaken_before(self, unit: Unit) -> bool:
        """Whether a copy behind the closing tick is likely to be overtaken, as another one was."""
        if self._overtaken is None or not self._overtaken.isdisjoint(unit.names):
            return True
        return any(piece.late in (CHANGED, OVERTAKEN) for piece in unit.pieces)

    def stands_at_tick(self, live: LiveState) -> bool:
        """Whether the whole state still is, bit for bit, what it was at the last tick looked at."""
        return self._at_once.same(live.entries) and all(capture.stands(live) for capture in self._captures)

    def start_rest(self, on_done: Callable[[], None]) -> None:
        """Call ``on_done`` when the copies that :meth:`close` began may all have ended."""
        for capture in self._captures:
            capture.tell(on_done)
        if self.rest_ended:
            on_done()

    @property
    def rest_ended(self) -> bool:
        """Whether none of its copies is in flight, successful or not."""
        return not any(capture.under_way for capture in self._captures)

    @property
    def refused(self) -> str | None:
        """Reason for which a device refused the sent copies; ``None`` if it did not."""
        return next((capture.refused for capture in self._captures if capture.refused is not None), None)

    @property
    def doubts(self) -> dict[Name, str]:
        """Of what is lost: arrays that no change overtook, and what is wrong with them."""
        return {name: why for capture in self._captures for name, why in capture.doubts.items()}

    def torn(self) -> tuple[frozenset[Name], str]:
        """Return the arrays that have to be copied at once from now on, and why the attempt is void."""
        # Which arrays lose such a race is chance, so all of their kind are copied at once.
        raced = [name for name in self.lost if name not in self.doubts]
        kinds = {name[0] for name in raced}
        overtaken = frozenset(a.spec.name for a in self.layout.arrays if a.spec.name[0] in kinds)
        first = (raced or self.lost)[0]
        what = "changed before it was copied" if raced else f"can't be replayed: {self.doubts[first]}"
        return overtaken, self.refused or f"{public_name(first)} {what}"

    @property
    def copied_bytes(self) -> int:
        """Bytes that have arrived."""
        return sum(capture.nbytes for capture in self._captures)

    @property
    def sample(self) -> tuple[int, float]:
        """Bytes and seconds of copies, for the measured copy rate."""
        samples = [capture.sample for capture in self._captures]
        return sum(nbytes for nbytes, _ in samples), sum(seconds for _, seconds in samples)

    # -- copies under way --------------------------------------------------------------------

    def settle(self) -> None:
        """Wait until all copies have arrived, helping, and verify them.

        May be interrupted anywhere and called again. What is in ``lost`` afterwards voids the attempt.
        """
        # Added, not replaced: after an interrupt below this is what the next call goes by.
        for capture in self._captures:
            self.lost = [*self.lost, *capture.settle()]

    def cancel(self) -> None:
        """Stop copying; afterwards this attempt no longer writes into the arena."""
        for capture in self._captures:
            capture.cancel()

    # -- updates -----------------------------------------------------------------------------

    def let_overwrite(self, optimizer: object | None) -> None:
        """Let an update, or with ``None`` anything, overwrite what is still to be copied."""
        for capture in self._captures:
            capture.guard(optimizer)

    def before_update(self, optimizer: torch.optim.Optimizer, *, closure: bool) -> None:
        """Let the update go ahead: nothing it overwrites is still needed afterwards."""
        for capture in self._captures:
            capture.before_update(optimizer, closure=closure)

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Take what the update consumed, for the pieces that already left."""
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None:
            known = self._known(found_inf)
            if known:
                for capture in self._captures:
                    capture.gradients.skipped(optimizer)
                return
            if known is not None:
                found_inf = None
        for capture in self._captures:
            capture.gradients.after_update(optimizer, found_inf)

    def _known(self, number: torch.Tensor | float) -> float | None:
        """Return a number; ``None`` if reading it would wait for a device."""
        if not isinstance(number, torch.Tensor):
            return float(number)
        # A device's first: a fake one may hold what is in host memory.
        stagers = (capture.stager for capture in reversed(self._captures))
        return next((stager.value(number) for stager in stagers if stager.holds(number)), None)

    # -- for the record ----------------------------------------------------------------------

    def parameters_of(self, pieces: Iterable[int]) -> frozenset[str]:
        """Return the names of the parameters that some pieces belong to."""
        units = (self.cut.pieces[index].unit for index in pieces)
        return frozenset(unit.fqn for unit in units if unit is not None)

    def late_parts(self) -> dict[str, str]:
        """Return why parameters left at the closing tick although a replay was planned."""
        late = {p.unit.fqn: p.late for p in self.cut.pieces if p.late is not None and p.unit is not None}
        return {**self.cut.reasons, **late}

    def places(self, live: LiveState) -> tuple[ArrayPlace, ...]:
        """Describe every array to the writer; arrays that stand in storage order say so."""
        if self._shape.row_major:
            return self._shape.places
        instead = {name for capture in self._captures for name in capture.instead}
        at_once = {*self.cut.at_once.names, *instead}
        result = []
        for array in self.layout.arrays:
            tensor = live.entries[array.spec.name]
            stored = array.spec.name not in at_once and not tensor.is_contiguous()
            strides = tuple(tensor.stride()) if stored else None
            result.append(ArrayPlace(array, ArenaId.STATE, strides))
        return tuple(result)
