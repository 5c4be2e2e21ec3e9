"""Replay from rounded gradients is judged: rounding passes, whatever its kind; what is broken does not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.core.descriptors import Gradient, ReplayPiece
from gockpt.kernels import replay
from gockpt.kernels.gradient_encoding import encode
from gockpt.replay.rounding_error import Sums, summary
from gockpt.replay.rounding_probes import LARGE, MANY, Probes, choose, elements, most_elements
from gockpt.replay.tiled import TILE, replay_encoded

KERNELS = ("adam", "amsgrad", "momentum", "sgd")
KINDS = ("independent", "constant", "alternating", "sparse", "wide", "drifting")


def rows(kernel, updates, lr, first, decay):
    """Return scalars of consecutive updates, as torch's Adam and SGD have them."""
    if kernel in ("sgd", "momentum"):
        return [(1.0, decay, 0.9 if kernel == "momentum" else 0.0, 1.0, 0.0, -lr)] * updates
    found = []
    for step in range(first, first + updates):
        root, left = (1 - 0.999**step) ** 0.5, 1 - 0.9**step
        found.append((1.0, 0.0, 1 - lr * decay, 1 - 0.9, 0.999, 1 - 0.999, root, 1e-8, -lr / left))
    return found


def chosen(gradient):
    """Return the probes of a gradient in float32."""
    return choose(None, gradient.view(np.uint8), gradient.size)


class Mine:
    """Memory of one gradient alone."""

    def __init__(self, memory):
        self.memory = memory

    def allocate(self, _nbytes):
        return 0

    def view(self, _offset, nbytes):
        return self.memory[:nbytes]

    def free(self, _offset):
        pass


class Case:
    """A piece, its gradients and what training makes of them."""

    def __init__(
        self, kernel, count, updates, encoding, kind, *, lr=1e-3, size=1.0, first=5, seed=0, decay=0.0
    ):
        random = np.random.default_rng(seed)
        self.kernel, self.encoding, self.random = kernel, encoding, random
        self.piece = ReplayPiece(0, kernel, (0, 0), (), tail=True)
        self.rows = rows(kernel, updates, lr, first, decay)
        base = random.standard_normal(count) * size
        self.gradients = [
            self._gradient(kind, base, n, random, size).astype(np.float32) for n in range(updates)
        ]
        states = replay.SHAPES[kernel][0]
        start = [random.standard_normal(count), base * 0.3, base**2 * 0.01, base**2 * 0.02]
        if first == 1:
            start[1:] = [np.zeros(count)] * 3
        self.sent = [array.astype(np.float32) for array in start[: 1 + states]]
        self.live = [array.copy() for array in self.sent]
        replay.run(kernel, (0, 0), self.live[0], self.live[1:], self.gradients, self.rows, tail=True)

    @staticmethod
    def _gradient(kind, base, number, random, size):
        fresh = random.standard_normal(base.size) * size
        return {
            "independent": lambda: fresh,
            "constant": lambda: base,
            "alternating": lambda: base * (-1) ** number,
            "sparse": lambda: fresh * (random.random(base.size) < 0.05),
            "wide": lambda: np.ldexp(fresh, random.integers(-45, 1, base.size)),
            "drifting": lambda: base * (1 + 0.01 * number) + 0.01 * fresh,
        }[kind]()

    def replayed(self, *, gradients=None, rows=None, kernel=None):
        """Replay, as a worker would, and return what is found, or ``None``, and the arrays."""
        saved = [array.copy() for array in self.sent]
        messages, data = [], []
        pairs = zip(gradients or self.gradients, rows or self.rows, strict=True)
        for values, row in pairs:
            memory = np.zeros(values.nbytes + 64, np.uint8)
            take = Mine(memory)
            found = encode(self.encoding, values, take.allocate, take.view, take.free)
            messages.append(Gradient(0, 0, found.nbytes, row, found.encoding))
            data.append(memory[: found.nbytes])
        starts = chosen(self.gradients[0])
        probes = Probes(starts, saved)
        piece = ReplayPiece(0, kernel or self.kernel, (0, 0), (), tail=True)
        replay_encoded(piece, saved, messages, data, probes)
        at = elements(starts, self.sent[0].size)
        return probes.judge(saved, np.concatenate([array[at] for array in self.live])), saved


@given(
    st.sampled_from(KERNELS),
    st.sampled_from([1, 2, 3, 7, 17, 40, 64, 100, 300, 2000]),
    st.integers(1, 15),
    st.sampled_from(["fp16", "bf16"]),
    st.sampled_from(KINDS),
    st.integers(-7, 0),
    st.integers(-8, 3),
    st.sampled_from([1, 2, 10, 1000]),
    st.integers(0, 2**32 - 1),
)
def test_rounding_passes(kernel, count, updates, encoding, kind, lr, size, first, seed):
    case = Case(
        kernel,
        count,
        updates,
        encoding,
        kind,
        lr=10.0**lr,
        size=10.0**size,
        first=first,
        seed=seed,
        decay=0.01,
    )
    found, saved = case.replayed()
    assert found is not None
    for sums, array, live in zip(found, saved, case.live, strict=True):
        difference = np.abs(array.astype(np.float64) - live)
        assert sums.max_abs <= difference.max()
        assert sums.elements == count
        assert sums.sampled == min(count, most_elements(count)) or sums.sampled < count
        if sums.sampled == count:
            assert sums.max_abs == difference.max()
            assert sums.error == pytest.approx((difference**2).sum())


def drop(case):
    return {"gradients": case.gradients[:3] + case.gradients[4:], "rows": case.rows[:3] + case.rows[4:]}


def twice(case):
    return {"gradients": [*case.gradients, case.gradients[-1]], "rows": [*case.rows, case.rows[-1]]}


def swapped_pieces(case):
    return {"gradients": [np.roll(g, 1) for g in case.gradients]}


def wrong_lr(case):
    return {"rows": [(*row[:-1], row[-1] * 1.05) for row in case.rows]}


def wrong_sign(case):
    return {"rows": [(-1.0, *row[1:]) for row in case.rows]}


def wrong_momentum(case):
    at = 2 if case.kernel == "momentum" else 3
    return {"rows": [(*row[:at], row[at] * 0.95, *row[at + 1 :]) for row in case.rows]}


def clipped(case):
    return {"gradients": [g * np.float32(0.9) for g in case.gradients]}


@pytest.mark.parametrize("kind", ["independent", "drifting", "constant"])
@pytest.mark.parametrize("encoding", ["fp16", "bf16"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "damage",
    [drop, twice, swapped_pieces, wrong_lr, wrong_sign, wrong_momentum, clipped],
    ids=lambda d: d.__name__,
)
def test_what_is_broken_is_caught(kernel, encoding, kind, damage):
    if damage is wrong_momentum and kernel == "sgd":
        damage = wrong_lr
    for count in (64, 5000):
        case = Case(kernel, count, 7, encoding, kind, lr=1e-2)
        assert case.replayed()[0] is not None
        found, _ = case.replayed(**damage(case))
        assert found is None, count


@pytest.mark.parametrize("encoding", ["fp16", "bf16"])
def test_another_kernel_is_caught(encoding):
    case = Case("momentum", 3000, 5, encoding, "independent")
    rows = [(row[0], row[1], row[2], row[3], 1.0, row[5]) for row in case.rows]  # nesterov
    assert case.replayed(rows=rows)[0] is None
    case = Case("adam", 3000, 5, encoding, "independent")
    coupled = [(row[0], 0.1, *row[2:]) for row in case.rows]
    assert case.replayed(rows=coupled)[0] is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_must_be_so_on_both_sides(value):
    case = Case("sgd", 40, 3, "bf16", "independent")
    case.gradients[1][7] = value
    case.live = [array.copy() for array in case.sent]
    with np.errstate(all="ignore"):
        replay.run("sgd", (0, 0), case.live[0], [], case.gradients, case.rows, tail=True)
    assert not np.isfinite(case.live[0][7])
    case.sent[0][9] = case.live[0][9] = np.inf
    found, saved = case.replayed()
    assert found is not None
    assert np.isfinite(found[0].max_abs)
    assert not np.isfinite(saved[0][7])
    case.live[0][7] = 1.0
    assert case.replayed()[0] is None
    case.live[0][7] = value
    case.live[0][8] = np.nan
    assert case.replayed()[0] is None


def test_values_in_another_place_than_their_probes_are_caught():
    """The piece itself must have come to what its probes came to, and not only these to the live values."""
    case = Case("adam", 5000, 3, "fp16", "independent")
    starts = chosen(case.gradients[0])
    probes = Probes(starts, case.sent)
    at = elements(starts, 5000)
    live = np.concatenate([array[at] for array in case.live])
    assert probes.judge(case.sent, live) is None  # nothing was replayed
    assert probes.judge(case.live, live) is None  # equal to the live values, by another way


@given(st.integers(1, 3000) | st.sampled_from([LARGE - 1, LARGE, TILE + 5, 1 << 20]), st.integers(0, 99))
def test_probes_are_few_spread_and_where_the_gradient_is_large(count, seed):
    random = np.random.default_rng(seed)
    values = np.zeros(count, np.float32)
    row = int(random.integers(0, count))
    values[row : row + 4096] = 5.0
    values[random.integers(0, count)] = np.nan
    starts = chosen(values)
    assert list(starts) == sorted(set(starts))
    assert all(start % 16 == 0 for start in starts)
    at = elements(starts, count)
    assert at.size <= most_elements(count) <= MANY
    assert at.max() < count
    assert starts[0] == 0
    assert at[-1] // 16 == (count - 1) // 16
    if count > 4096 and row + 4096 < count:
        assert (values[at] == 5.0).any()


def test_a_large_piece_is_replayed_tile_by_tile():
    case = Case("adam", 2 * TILE + 1234, 5, "fp16", "independent")
    found, saved = case.replayed()
    assert found is not None
    assert 0 < np.abs(saved[0] - case.live[0]).max() < 1e-4


@pytest.mark.parametrize("kernel", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("encoding", ["fp16", "bf16"])
def test_probes_between_the_rows_that_move_have_measured_nothing(kernel, encoding):
    case = Case(kernel, 5000, 3, encoding, "independent", first=1)
    for grad in case.gradients:
        grad[:1040] = 0
        grad[1056:] = 0
    case.live = [array.copy() for array in case.sent]
    replay.run(kernel, (0, 0), case.live[0], case.live[1:], case.gradients, case.rows, tail=True)
    seen = []
    for starts in ((0, 2000, 4992), (0, 1040, 4992)):
        saved = [array.copy() for array in case.sent]
        probes = Probes(starts, saved)
        memory = [np.zeros(30_000, np.uint8) for _ in case.gradients]
        takes = [Mine(one) for one in memory]
        found = [
            encode(encoding, values, take.allocate, take.view, take.free)
            for values, take in zip(case.gradients, takes, strict=True)
        ]
        messages = [
            Gradient(0, 0, one.nbytes, row, one.encoding) for one, row in zip(found, case.rows, strict=True)
        ]
        data = [one[: message.nbytes] for one, message in zip(memory, messages, strict=True)]
        replay_encoded(case.piece, saved, messages, data, probes)
        at = elements(starts, 5000)
        sums = probes.judge(saved, np.concatenate([array[at] for array in case.live]))
        differs = [bool((array != live).any()) for array, live in zip(saved, case.live, strict=True)]
        assert any(differs)
        seen.append(probes.saw(sums, differs))
    assert seen == [False, True]


def test_an_array_of_which_no_probe_moved_has_not_been_measured():
    case = Case("momentum", 5000, 3, "fp16", "independent")
    probes = Probes(chosen(case.gradients[0]), case.sent)
    probes._touched = True
    moved, still = Sums(0.0, 0.0, 1.0, 1.0, 64, 5000), Sums(0.0, 0.0, 0.0, 1.0, 64, 5000)
    off = Sums(1e-9, 1e-18, 0.0, 1.0, 64, 5000)
    assert probes.saw([moved, off], [True, True])
    assert probes.saw([moved, still], [True, False])
    assert not probes.saw([moved, still], [True, True])


def test_nothing_of_nothing_is_no_share():
    plain = Sums(0.0, 0.0, 0.0, 0.0, 64, 1000).plain()
    assert plain["of_movement"] is plain["of_values"] is None
    assert Sums(0.0, 0.0, 1.0, 1.0, 64, 1000).plain()["of_movement"] == 0.0


def test_the_summary_is_the_worst():
    tensors = {
        "model/a": Sums(1e-6, 4e-12, 4e-4, 4.0, 64, 1000),
        "model/b": Sums(3e-6, 9e-12, 9e-4, 900.0, 64, 500) + Sums(2e-6, 0.0, 0.0, 0.0, 16, 16),
    }
    found = summary("fp16", tensors)
    assert (found.tensors, found.sampled, found.elements, found.max_abs) == (2, 144, 1516, 3e-6)
    assert found.of_movement == pytest.approx(1e-4)
    assert found.of_values == pytest.approx(1e-6)
    assert "2 tensors off, by up to 3e-06, 0.0001 of the window's movement" in str(found)
    still = summary("bf16", {"model/c": Sums(1e-6, 1e-12, 0.0, 1.0, 16, 16)})
    assert still.of_movement is None
    assert "movement" not in str(still)
