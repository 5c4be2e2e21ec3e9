"""Cutting live state into what leaves together: pieces of replayable units, and the rest.

A *unit* is a parameter with its elementwise optimizer states; a *piece* is an element range of a unit
(or of one other array). Pieces are cut inside chunks, so each is contiguous in the arena.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from gockpt.core.descriptors import ReplayPiece, Stretch
from gockpt.planning.planner import part_ranges
from gockpt.replay import rules
from gockpt.replay.calibration_runs import lab_for
from gockpt.saving.at_once import Slots, slots_of
from gockpt.tensor_memory import is_dense

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gockpt.core.arena_layout import ArenaLayout, ArrayLayout
    from gockpt.core.array_spec import Name
    from gockpt.planning.planner import Plan
    from gockpt.replay.rules import Rule
    from gockpt.state.live_state import LiveState, ParamEntry

__all__ = ["Cut", "Piece", "Unit", "cut"]

MAX_PIECE = 1 << 20
MAX_DEVICE_PIECE = 8 << 20
"""Elements of a piece at the most. On a device each costs a place in every launch, so there are fewer."""
MIN_PIECE = 256
SMALL = 64 << 10
"""Arrays up to this size are copied inside the closing tick: cheaper than proving a copy behind it."""
NOT_COPIED = "state on its device is not copied behind training"
_ALIGN = 16


@dataclass(slots=True)
class Unit:
    """A parameter that can be replayed.

    Attributes:
        fqn: Its name.
        param: The live parameter.
        optimizer: The optimizer that owns it.
        group_index: Its parameter group there.
        rule: How it is replayed.
        names: Array names: the parameter's, then its states' in kernel order.
        stager: Index of the attempt's stager that copies it: 0 for host memory's, 1 for the device's.
        pieces: Its pieces.
        excluded: Why its pieces leave at the closing tick after all; ``None`` while they need not.
    """

    fqn: str
    param: torch.Tensor
    optimizer: torch.optim.Optimizer
    group_index: int
    rule: Rule
    names: tuple[Name, ...]
    stager: int = 0
    pieces: list[Piece] = field(default_factory=list)
    excluded: str | None = None

    @property
    def group(self) -> dict[str, object]:
        """The live parameter group; looked up each time, since ``load_state_dict`` replaces it."""
        group: dict[str, object] = self.optimizer.param_groups[self.group_index]
        return group

    def tensors(self) -> list[torch.Tensor]:
        """Return the live tensors, the parameter first; looked up each time.

        Raises:
            KeyError: If a state is gone.
        """
        # Not state[param]: torch's is a defaultdict, and looking must leave nothing behind.
        state = self.optimizer.state.get(self.param, {})
        return [self.param, *(state[key] for key in self.rule.states)]


@dataclass(slots=True)
class Piece:
    """An element range that leaves as one.

    Attributes:
        index: Its number within the cut.
        stretches: Its bytes in the arena, array by array.
        unit: The unit it belongs to; ``None`` for an array that is not replayed.
        tail: Whether its end is the array's end.
        sent: Whether it left before the closing tick.
        late: Why it leaves at the closing tick although it was, or could have been, sent.
        stager: As of its unit.
    """

    index: int
    stretches: tuple[Stretch, ...]
    unit: Unit | None = None
    tail: bool = False
    sent: bool = False
    late: str | None = None
    stager: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all stretches."""
        return sum(s.nbytes for s in self.stretches)

    def message(self) -> ReplayPiece:
        """Describe the piece to the worker."""
        if self.unit is None:
            msg = f"piece {self.index} is not replayed"
            raise ValueError(msg)
        rule = self.unit.rule
        return ReplayPiece(self.index, rule.kernel, rule.flags, self.stretches, self.tail)


@dataclass(frozen=True, slots=True)
class Cut:
    """All of the live state, cut.

    Attributes:
        units: What can be replayed.
        pieces: Their pieces, in the order they leave.
        behind: Pieces of arrays that leave at the closing tick, behind the next step.
        prompt: Pieces of arrays on a device that leave inside the closing tick.
        at_once: Slots of the arrays that are copied inside the closing tick.
        reasons: Why parameters can't be replayed, by name.
    """

    units: tuple[Unit, ...]
    pieces: tuple[Piece, ...]
    behind: tuple[Piece, ...]
    prompt: tuple[Piece, ...]
    at_once: Slots
    reasons: dict[str, str]

    @property
    def replay_bytes(self) -> int:
        """Bytes that can leave early."""
        return sum(p.nbytes for p in self.pieces)

    @property
    def grad_bytes(self) -> int:
        """Bytes of one full gradient of what can leave early."""
        return sum(p.stretches[0].nbytes for p in self.pieces)

    @property
    def any_on_device(self) -> bool:
        """Whether something can leave a device before the closing tick."""
        return any(piece.stager for piece in self.pieces)

    def parts(self, plan: Plan) -> list[list[Piece]]:
        """Divide the pieces into those that leave before the closing tick, one part per tick."""
        ranges = part_ranges([piece.nbytes for piece in self.pieces], plan.shares)
        return [[self.pieces[index] for index in part] for part in ranges[:-1]]


def cut(
    live: LiveState,
    layout: ArenaLayout,
    *,
    window: int,
    excluded: frozenset[str] = frozenset(),
    overtaken: frozenset[Name] | None = frozenset(),
    on_device: Callable[[torch.Tensor], bool] | None = None,
    stay: str | None = None,
    device_elements: int | None = None,
) -> Cut:
    """Cut ``live`` into what can leave early, what leaves at the close, and what is copied at once.

    Args:
        live: The state.
        layout: Where each array lies in the arena.
        window: Ticks of the window; with 1, nothing leaves early.
        excluded: Parameters whose replay is not trusted.
        overtaken: Arrays that must be copied inside the closing tick because a copy behind it was
            overtaken before; ``None`` means all of them.
        on_device: Whether a tensor is on the device that has a stager; ``None`` if there is none.
        stay: Why nothing leaves that device early; ``None`` if it may.
        device_elements: The most elements of a piece that leaves that device early; ``None`` for as many as
            are best.
    """

    def anew() -> Cut:
        return _cut(live, layout, window, excluded, overtaken, on_device, stay, device_elements)

    if window == 1 and on_device is None:
        # Nothing of it depends on options of optimizers, or is noted in its pieces.
        return live.once(("cut", overtaken), anew)
    return anew()


def _cut(
    live: LiveState,
    layout: ArenaLayout,
    window: int,
    excluded: frozenset[str],
    overtaken: frozenset[Name] | None,
    on_device: Callable[[torch.Tensor], bool] | None,
    stay: str | None,
    device_elements: int | None,
) -> Cut:
    arrays = {a.spec.name: a for a in layout.arrays}
    small = min(SMALL, sum(a.spec.nbytes for a in layout.arrays) // 4096)
    size = _piece_elements(live, window, MAX_PIECE)
    device_size = _piece_elements(live, window, min(MAX_DEVICE_PIECE, device_elements or MAX_DEVICE_PIECE))
    units: list[Unit] = []
    pieces: list[Piece] = []
    reasons: dict[str, str] = {}
    taken: set[Name] = set()
    params = live.params if window > 1 else ()
    owners = Counter(id(entry.param) for entry in params)
    for entry in params:
        if owners[id(entry.param)] > 1:
            reasons[entry.fqn] = "several optimizers update it"
            continue
        if entry.param.device.type != "cpu" and (on_device is None or not on_device(entry.param)):
            reasons[entry.fqn] = NOT_COPIED
            continue
        unit = _unit(live, entry, excluded, reasons)
        if unit is None:
            continue
        why = _place(unit, live, on_device, stay)
        if why is not None:
            reasons[unit.fqn] = why
            continue
        if sum(arrays[n].spec.nbytes for n in unit.names) <= small:
            continue
        ranges = _ranges([arrays[n] for n in unit.names], device_size if unit.stager else size)
        if ranges is None or (len(arrays[unit.names[0]].slots) > 1 and not unit.param.is_contiguous()):
            reasons[unit.fqn] = "its chunks can't be cut for replay"
            continue
        for stretches, tail in ranges:
            piece = Piece(len(pieces), stretches, unit, tail, stager=unit.stager)
            unit.pieces.append(piece)
            pieces.append(piece)
        units.append(unit)
        taken.update(unit.names)
    behind: list[Piece] = []
    prompt: list[Piece] = []
    at_once: list[ArrayLayout] = []
    for name, array in arrays.items():
        if name in taken or not array.slots:
            continue
        tensor = live.entries[name]
        there = on_device is not None and on_device(tensor)
        whole = not is_dense(tensor) or (len(array.slots) > 1 and not tensor.is_contiguous())
        hurried = overtaken is None or name in overtaken or name in live.buffers or array.spec.nbytes <= small
        # A window must not wait for the device at each of its ticks.
        packed = there and hurried and window > 1
        if whole or (hurried and not packed) or (not there and tensor.device.type != "cpu"):
            at_once.append(array)
            continue
        into = prompt if packed else behind
        # A device's stager cuts as it needs to.
        for stretch in _behind_ranges(array, max(1, array.spec.numel) if there else size):
            number = len(pieces) + len(behind) + len(prompt)
            into.append(Piece(number, (stretch,), stager=int(there)))
    return Cut(
        tuple(units),
        tuple(pieces),
        tuple(behind),
        tuple(prompt),
        slots_of(at_once),
        reasons,
    )


def _place(
    unit: Unit, live: LiveState, on_device: Callable[[torch.Tensor], bool] | None, stay: str | None
) -> str | None:
    """Note where a unit stands; return why it can't leave early from there."""
    tensors = [live.entries[name] for name in unit.names]
    if on_device is not None and all(on_device(tensor) for tensor in tensors):
        unit.stager = 1
        return stay
    # If only some of them are on that device, none is copied in the background.
    if on_device is not None and any(on_device(tensor) for tensor in tensors):
        return "its state stands on several devices"
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return NOT_COPIED
    return None


def _unit(
    live: LiveState, entry: ParamEntry, excluded: frozenset[str], reasons: dict[str, str]
) -> Unit | None:
    if entry.fqn in excluded:
        reasons[entry.fqn] = "an earlier replay of it did not match"
        return None
    optimizer = live.optimizers[entry.optimizer_index]
    if not isinstance(optimizer, torch.optim.Optimizer):
        reasons[entry.fqn] = "its optimizer is none of torch's"
        return None
    group = optimizer.param_groups[entry.group_index]
    lab = lab_for(entry.param.device)
    rule = rules.rule_for(optimizer, group, entry.param, optimizer.state.get(entry.param, {}), lab)
    if isinstance(rule, str):
        reasons[entry.fqn] = rule
        return None
    if not entry.state_names.keys() >= {*rule.states}:
        reasons[entry.fqn] = "its optimizer's state_dict() does not hand out its state as it is"
        return None
    names = (entry.name, *(entry.state_names[key] for key in rule.states))
    return Unit(entry.fqn, entry.param, optimizer, entry.group_index, rule, names)


def _piece_elements(live: LiveState, window: int, most: int) -> int:
    """Return how many elements a piece has: enough pieces to balance parts, never tiny ones."""
    total = sum(tensor.numel() for name, tensor in live.entries.items() if name[0] == "model")
    wanted = total // (8 * max(1, window))
    return max(MIN_PIECE, min(most, -(-wanted // _ALIGN) * _ALIGN))


def _ranges(arrays: list[ArrayLayout], size: int) -> list[tuple[tuple[Stretch, ...], bool]] | None:
    """Cut arrays of equal shape along the same elements, each piece inside one chunk.

    Returns:
        For each piece its stretches and whether it ends the arrays; ``None`` if the arrays are not chunked
        alike, or a chunk inside them ends within a vector, where fused updates round differently.
    """
    first = arrays[0]
    if any(
        a.spec.shape != first.spec.shape
        or len(a.slots) != len(first.slots)
        or a.chunk_shape != first.chunk_shape
        for a in arrays
    ):
        return None
    numel = first.spec.numel
    result = []
    for number, slot in enumerate(first.slots):
        begin = slot.row * (numel // max(1, first.spec.shape[0] if first.spec.shape else 1))
        count = slot.nbytes // first.spec.itemsize
        for low, high in _steps(begin, begin + count, size):
            stretches = tuple(
                Stretch(
                    a.spec.name,
                    a.slots[number].offset + (low - begin) * a.spec.itemsize,
                    low,
                    high,
                    a.spec.itemsize,
                )
                for a in arrays
            )
            if high < numel and (high - low) % _ALIGN:
                return None
            result.append((stretches, high == numel))
    return result


def _behind_ranges(array: ArrayLayout, size: int) -> Iterator[Stretch]:
    spec = array.spec
    begin = 0
    for slot in array.slots:
        count = slot.nbytes // spec.itemsize
        for low, high in _steps(begin, begin + count, size):
            yield Stretch(spec.name, slot.offset + (low - begin) * spec.itemsize, low, high, spec.itemsize)
        begin += count


def _steps(begin: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    for low in range(begin, end, size):
        yield low, min(end, low + size)
