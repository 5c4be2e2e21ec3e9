"""The background half of a save, with a store in memory: replay, proof, writing, one report."""

from __future__ import annotations

import threading
import weakref
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.core.arena_layout import lay_out
from gockpt.core.array_spec import ArraySpec
from gockpt.core.descriptors import ArenaId, ArrayPlace, Capture, Gradient, ReplayPiece, Stretch
from gockpt.core.nonfinite import NonFinite, attributes_with
from gockpt.core.timeline import Trace
from gockpt.errors import StorageError, WorkerError
from gockpt.kernels.fingerprint_numba import fingerprint
from gockpt.kernels.gradient_encoding import encode, seal
from gockpt.replay.rounding_probes import choose, elements
from gockpt.staging.arena import Arena
from gockpt.staging.gradient_ring import Ring
from gockpt.workers import piece_replay
from gockpt.workers import save_job as job_module
from gockpt.workers.save_job import Job
from gockpt.workers.thread_pool import Pool

ELEMENTS = 48
LR = 0.25


def plain_sgd(kernel, flags, p, states, grads, scalars, *, tail):
    """Stand in for the kernel: ``p -= lr * grad`` with one rounding each, oldest first."""
    for grad, (lr,) in zip(grads, scalars, strict=True):
        np.subtract(p, np.float32(lr) * grad, out=p)


@pytest.fixture
def plain_kernel(monkeypatch):
    monkeypatch.setattr(piece_replay.replay, "run", plain_sgd)


class Bench:
    """One job over two replayed arrays of two pieces each and one array that is not replayed."""

    def __init__(self, doubles, *, ring_gradients=6, **fails):
        self.specs = [ArraySpec(("model", n), (2 * ELEMENTS,), "float32") for n in "ab"]
        self.specs.append(ArraySpec(("model", "loose"), (5,), "float32"))
        self.layout = lay_out(self.specs)
        self.state = Arena(self.layout.nbytes)
        self.ring_arena = Arena(1 << 16)
        self.ring = Ring(0, ring_gradients * 4 * ELEMENTS)
        self.outcome = doubles.Outcome()
        self.transactions = []
        self.fails = fails
        self.transaction_of = doubles.Transaction
        rng = np.random.default_rng(3)
        self.live = {s.name: rng.standard_normal(s.numel).astype(np.float32) for s in self.specs}
        for array in self.layout.arrays:
            self.arena_of(array)[:] = self.live[array.spec.name]
        self.pieces = []
        for array in self.layout.arrays[:2]:
            for low in (0, ELEMENTS):
                offset = array.slots[0].offset + 4 * low
                stretch = Stretch(array.spec.name, offset, low, low + ELEMENTS, 4)
                self.pieces.append(ReplayPiece(len(self.pieces), "sgd", (), (stretch,), low > 0))
        self.job = Job(
            arenas=(self.state, self.ring_arena, Arena(0)),
            pieces=self.pieces,
            ring=self.ring,
            store=self,
            outcome=self.outcome,
            trace=Trace(),
        )

    def begin(self, step, arrays, *, state, attributes, exact):
        if "begin" in self.fails:
            raise self.fails["begin"]
        fails = {k: v for k, v in self.fails.items() if k != "begin"}
        contents = (step, [array.spec.name for array in arrays], state, attributes, exact)
        self.transactions.append(self.transaction_of(contents, **fails))
        return self.transactions[-1]

    def arena_of(self, array):
        slot = array.slots[0]
        return self.state.view(slot.offset, slot.nbytes).view(np.float32)

    def part(self, piece):
        stretch = piece.stretches[0]
        return self.live[stretch.name][stretch.start : stretch.stop]

    def update(self, rng, pieces=None):
        """Make one update of the live state and post its gradients, as a post-hook would."""
        posted = []
        for piece in self.pieces if pieces is None else pieces:
            grad = rng.standard_normal(ELEMENTS).astype(np.float32)
            part = self.part(piece)
            np.subtract(part, np.float32(LR) * grad, out=part)
            while (offset := self.ring.allocate(4 * ELEMENTS)) is None:
                self.job.hurry(on=True)
                self.ring.wait_for_room(0.01)
            self.ring_arena.view(offset, 4 * ELEMENTS).view(np.float32)[:] = grad
            posted.append(Gradient(piece.index, offset, 4 * ELEMENTS, (LR,)))
        self.job.gradients(posted)
        self.job.hurry(on=False)

    def capture(self, late=()):
        """Close: what is proven must equal the live state; late pieces are copied anew."""
        for piece in late:
            stretch = piece.stretches[0]
            self.state.view(stretch.offset, stretch.nbytes).view(np.float32)[:] = self.part(piece)
        proofs = {
            p.index: (fingerprint(self.part(p).view(np.uint8), p.stretches[0].position),)
            for p in self.pieces
            if p not in late
        }
        places = tuple(ArrayPlace(array, ArenaId.STATE) for array in self.layout.arrays)
        return Capture(7, places, proofs, {"a": 1}, {"b": 2}, exact=True)

    def close(self, capture=None, added=None):
        self.job.close(capture or self.capture(), (self.state, self.ring_arena, added or Arena(0)))

    def written(self):
        (transaction,) = self.transactions
        return {name: np.frombuffer(data, np.float32) for name, _, data, _ in transaction.writes}


@pytest.fixture
def bench(doubles, plain_kernel):
    def make(*, threads=0, **fails):
        made = Bench(doubles, **fails)
        benches.append(made)
        if threads:
            pools.append(Pool(threads, 0))
            pools[-1].serve(made.job)
        return made

    benches, pools = [], []
    yield make
    for made in benches:
        made.job.abort()
    for pool in pools:
        pool.join()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("updates", [0, 1, 2, 9])
def test_what_is_written_is_the_live_state_after_all_updates(bench, threads, updates):
    made = bench(threads=threads)
    rng = np.random.default_rng(updates)
    for _ in range(updates):
        made.update(rng)
    made.close()
    assert made.outcome.wait() == ("published", "published")
    for name, values in made.written().items():
        assert values.tobytes() == made.live[name].tobytes()
    (transaction,) = made.transactions
    attributes = attributes_with({"b": 2}, NonFinite())
    assert transaction.contents == (7, [s.name for s in made.specs], {"a": 1}, attributes, True)
    assert transaction.documents == 1
    assert transaction.committed
    assert transaction.aborted == 0
    assert len(transaction.writes) == 3
    capacities = {
        (array.spec.name, slot.chunk): slot.capacity for array in made.layout.arrays for slot in array.slots
    }
    assert {(name, chunk): length for name, chunk, _, length in transaction.writes} == capacities
    assert made.ring.in_use == 0
    assert made.job.written_bytes == made.job.total_bytes == sum(s.nbytes for s in made.specs)
    assert made.job.take() is None


@given(st.lists(st.lists(st.integers(0, 3), unique=True, max_size=4), max_size=6), st.integers(1, 3))
def test_any_pattern_of_updates_by_any_number_of_threads(doubles, pattern, threads):
    """Hypothesis: some pieces get no gradient in some updates (``grad is None``)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(piece_replay.replay, "run", plain_sgd)
        made, pool = Bench(doubles), Pool(threads, 0)
        pool.serve(made.job)
        rng = np.random.default_rng(0)
        for chosen in pattern:
            made.update(rng, [made.pieces[i] for i in chosen])
        made.close()
        assert made.outcome.wait()[0] == "published"
        pool.join()
        for name, values in made.written().items():
            assert values.tobytes() == made.live[name].tobytes()


def test_a_late_piece_is_not_replayed_and_its_gradients_are_given_back(bench):
    made = bench(ring_gradients=20)
    rng = np.random.default_rng(0)
    made.update(rng)
    made.job.discard([1, 99])
    assert made.ring.in_use == 3 * 4 * ELEMENTS
    made.update(rng, [made.pieces[i] for i in (0, 2, 3)])
    late = made.pieces[1]
    part = made.part(late)
    part[:] = 5.0
    pool = Pool(1, 0)
    pool.serve(made.job)
    made.close(made.capture(late=[late]))
    assert made.outcome.wait()[0] == "published"
    pool.join()
    for name, values in made.written().items():
        assert values.tobytes() == made.live[name].tobytes()


def encoded_update(made, rng, piece, grad=None, starts=None):
    """Post a gradient in 16 bits for one piece; return the elements that are its probes."""
    grad = rng.standard_normal(ELEMENTS).astype(np.float32) if grad is None else grad
    part = made.part(piece)
    np.subtract(part, np.float32(LR) * grad, out=part)
    found = encode("fp16", grad, made.ring.allocate, made.ring_arena.view, made.ring.free)
    starts = choose(None, grad.view(np.uint8), grad.size) if starts is None else starts
    print_ = seal(piece.index, "fp16", made.ring_arena.view(found.offset, found.nbytes), 1, (LR,))
    where = (piece.index, found.offset, found.nbytes)
    made.job.gradients([Gradient(*where, (LR,), found.encoding, starts, print_, 1)])
    return elements(starts, ELEMENTS) if starts else None


@pytest.mark.parametrize("broken", ["", "moved", "lost"])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_not_exact_is_measured_before_the_documents_are_written(bench, threads, broken):
    made = bench()
    rng = np.random.default_rng(0)
    piece = made.pieces[1]
    made.update(rng)
    at = encoded_update(made, rng, piece)
    if broken == "moved":
        made.part(piece)[at[3]] += 0.01
    offset = made.ring.nbytes
    made.ring_arena.view(offset, 4 * at.size).view(np.float32)[:] = made.part(piece)[at]
    known = {"gockpt": {"step": 7, "exact": True}, "b": 2}
    capture = replace(
        made.capture(),
        state={"a": 1, "exact": True},
        attributes=known,
        samples={1: (offset, 2 if broken == "lost" else 1)},
        grad_dtype="fp16",
    )
    made.job.close(capture, (made.state, made.ring_arena, Arena(0)))
    pool = Pool(threads, 0)
    pool.serve(made.job)
    if broken:
        assert made.outcome.wait() == ("mismatched", (1,))
        assert not any(t.committed or t.documents for t in made.transactions)
        pool.join()
        return
    assert made.outcome.wait() == ("published", "published")
    pool.join()
    (transaction,) = made.transactions
    found = made.job.deviation
    assert transaction.committed
    assert transaction.restated["exact"] is False
    assert set(transaction.restated["state"]["inexact"]) == {"model/a"}
    assert transaction.restated["state"]["exact"] is False
    assert transaction.restated["attributes"]["gockpt"]["deviation"] == asdict(found)
    assert transaction.restated["attributes"]["b"] == 2
    assert (found.grad_dtype, found.tensors, found.sampled, found.elements) == ("fp16", 1, ELEMENTS, ELEMENTS)
    difference = made.written()[("model", "a")].astype(np.float64) - made.live[("model", "a")]
    assert found.max_abs == np.abs(difference).max() > 0
    assert not difference[:ELEMENTS].any()
    assert made.written()[("model", "b")].tobytes() == made.live[("model", "b")].tobytes()
    assert made.ring.in_use == 0


@pytest.mark.parametrize(
    ("starts", "said"), [((0,), "mismatched"), ((0, 16), "published"), ((), "mismatched")]
)
def test_probes_that_saw_nothing_have_measured_nothing(bench, starts, said):
    made = bench()
    grad = np.zeros(ELEMENTS, np.float32)
    grad[20] = 0.1
    at = encoded_update(made, None, made.pieces[1], grad, starts)
    place = made.ring.nbytes
    if starts:
        at = elements(starts, ELEMENTS)
        made.ring_arena.view(place, 4 * at.size).view(np.float32)[:] = made.part(made.pieces[1])[at]
    capture = replace(
        made.capture(),
        state={"exact": True},
        attributes={"gockpt": {}},
        samples={1: (place, 1)},
        grad_dtype="fp16",
    )
    made.job.close(capture, (made.state, made.ring_arena, Arena(0)))
    pool = Pool(1, 0)
    pool.serve(made.job)
    assert made.outcome.wait()[0] == said
    pool.join()


def test_gradients_of_zeros_need_no_probes(bench):
    made = bench(threads=1)
    encoded_update(made, None, made.pieces[1], np.zeros(ELEMENTS, np.float32), ())
    made.close()
    assert made.outcome.wait() == ("published", "published")


@pytest.mark.parametrize("swapped", [False, True])
def test_messages_that_change_places_with_their_seals_are_caught(bench, monkeypatch, swapped):
    """They are so alike that rounding might explain it."""
    made = bench()
    first = np.random.default_rng(0).standard_normal(ELEMENTS).astype(np.float32)
    posted = []
    place, samples = made.ring.nbytes, {}
    with monkeypatch.context() as patch:
        patch.setattr(made.job, "gradients", posted.extend)
        for piece, grad in zip(made.pieces[:2], (first, first * np.float32(1 + 2.0**-12)), strict=True):
            at = encoded_update(made, None, piece, grad)
            made.ring_arena.view(place, 4 * at.size).view(np.float32)[:] = made.part(piece)[at]
            samples[piece.index] = (place, 1)
            place += 4 * at.size
    if swapped:
        posted = [replace(gradient, piece=1 - gradient.piece) for gradient in posted]
    made.job.gradients(posted)
    capture = replace(
        made.capture(),
        state={"exact": True},
        attributes={"gockpt": {}},
        samples=samples,
        grad_dtype="fp16",
    )
    made.job.close(capture, (made.state, made.ring_arena, Arena(0)))
    pool = Pool(1, 0)
    pool.serve(made.job)
    assert made.outcome.wait() == (("mismatched", (0, 1)) if swapped else ("published", "published"))
    pool.join()


def test_without_live_values_of_its_probes_a_piece_must_be_exact(bench):
    made = bench(threads=1)
    encoded_update(made, np.random.default_rng(0), made.pieces[1])
    made.close()
    assert made.outcome.wait() == ("mismatched", (1,))


def test_a_wrong_replay_is_reported_with_its_pieces_and_nothing_is_published(bench):
    made = bench(threads=2)
    made.update(np.random.default_rng(0))
    made.part(made.pieces[2])[7] += 1.0  # as if the optimizer had done something else
    made.part(made.pieces[3])[0] = np.nan
    made.close()
    assert made.outcome.wait() == ("mismatched", (2, 3))
    assert all(not t.committed for t in made.transactions)
    assert all(t.aborted == 1 for t in made.transactions)
    assert made.ring.in_use == 0
    assert made.job.take() is None


@pytest.mark.parametrize("end", ["published", "mismatched", "failed", "aborted"])
def test_who_hears_that_a_job_has_ended_can_have_its_memory(bench, end):
    class Watched(Arena):  # slots take no weak references
        pass

    made = bench(**({"fail_at_commit": StorageError("no room")} if end == "failed" else {}))
    if end == "mismatched":
        made.part(made.pieces[2])[7] += 1.0
    added = Watched(0)
    alive = weakref.ref(added)
    made.close(added=added)
    del added
    assert alive() is not None
    if end == "aborted":
        made.job.abort()
    else:
        heard = []
        tell = getattr(made.outcome, end)
        setattr(made.outcome, end, lambda *args: (heard.append(alive()), tell(*args)))
        while (task := made.job.take()) is not None:
            task()
            del task
        assert heard == [None]
    assert alive() is None


@pytest.mark.parametrize("sign", [-1, 1])
def test_one_unit_in_the_last_place_is_a_mismatch(bench, sign):
    made = bench(threads=1)
    part = made.part(made.pieces[0])
    part.view(np.int32)[3] += sign
    made.close()
    assert made.outcome.wait() == ("mismatched", (0,))


@pytest.mark.parametrize(
    "fails",
    [
        {"begin": StorageError("no room")},
        {"fail_at_write": {0: StorageError("no room")}},
        {"fail_at_write": {2: StorageError("no room")}},
        {"fail_at_documents": StorageError("no room")},
        {"fail_at_commit": StorageError("no room")},
    ],
    ids=["begin", "first write", "last write", "documents", "commit"],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_of_the_store_is_reported_as_it_is_and_the_partial_removed(bench, fails, threads):
    made = bench(threads=threads, **fails)
    made.update(np.random.default_rng(0))
    made.close()
    what, error = made.outcome.wait()
    assert what == "failed"
    assert type(error) is StorageError
    assert str(error) == "no room"
    assert all(not t.committed for t in made.transactions)
    assert all(t.aborted == 1 for t in made.transactions)
    assert made.ring.in_use == 0
    assert made.job.ended


def test_any_other_error_is_a_worker_error_with_its_cause(bench, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("in a kernel")

    monkeypatch.setattr(piece_replay.replay, "run", broken)
    made = bench(threads=2)
    made.update(np.random.default_rng(0))
    made.close()
    what, error = made.outcome.wait()
    assert what == "failed"
    assert type(error) is WorkerError
    assert "ZeroDivisionError: in a kernel" in str(error)
    assert type(error.__cause__) is ZeroDivisionError
    assert made.ring.in_use == 0


def test_writers_take_the_large_proven_chunks_and_nothing_else(bench, monkeypatch):
    made = bench()
    large = 8 * ELEMENTS  # the two replayed arrays; the loose one is small
    monkeypatch.setattr(job_module, "LARGE", large)
    monkeypatch.setattr(job_module, "SMALL", large)
    made.close()
    made.job._list_chunks()  # as each thread does first
    assert made.job._next_chunk(range(3), large) is None  # they are not proven yet
    for _ in made.pieces:
        made.job.take()()
    for _ in range(2):
        made.job.take_write()()
    assert {write[0] for write in made.transactions[0].writes} == {("model", "a"), ("model", "b")}
    assert made.job._next_chunk(range(1), large) is None
    for _ in range(3):  # the documents, the small one and the commit
        made.job.take()()
    assert made.outcome.wait() == ("published", "published")
    assert made.job.take_write() is None


def test_small_chunks_are_written_in_a_row_but_none_before_its_proof(bench):
    made = bench()
    made.close()
    for _ in range(2):  # the pieces of the first array
        made.job.take()()
    held = [made.job.take(), made.job.take()]  # those of the second
    made.job.take()()  # the documents
    made.job.take()()
    (transaction,) = made.transactions
    assert [write[0][1] for write in transaction.writes] == ["a", "loose"]
    for replay in held:
        replay()
    made.job.take()()
    made.job.take()()
    assert made.outcome.wait() == ("published", "published")
    assert [write[0][1] for write in transaction.writes] == ["a", "loose", "b"]
    assert made.job.written_bytes == made.job.total_bytes
    assert made.written().keys() == made.live.keys()


@pytest.mark.parametrize("small", [0, 1 << 20])
def test_at_most_so_many_chunks_and_only_small_ones_are_written_in_a_row(bench, monkeypatch, small):
    monkeypatch.setattr(job_module, "SMALL", small)
    monkeypatch.setattr(job_module, "SMALL_BATCH", 2)
    made = bench()
    made.close()
    for _ in made.pieces:
        made.job.take()()
    made.job.take()()
    made.job.take()()
    assert len(made.transactions[0].writes) == (2 if small else 1)


def test_after_a_kernel_failed_in_the_window_the_training_side_is_never_stuck(bench, monkeypatch):
    """Posting and discarding pieces of a job that failed return, and give the ring's room back."""

    def broken(*_, **__):
        raise ZeroDivisionError("in a kernel")

    monkeypatch.setattr(piece_replay.replay, "run", broken)
    made = bench(threads=1, ring_gradients=40)
    rng = np.random.default_rng(0)
    made.update(rng)
    made.update(rng)
    assert made.outcome.wait()[0] == "failed"
    made.update(rng)
    made.job.discard(range(4))
    assert made.ring.in_use == 0
    told = []
    made.job.close(made.capture(), (made.state, made.ring_arena, Arena(0)), lambda: told.append(1))
    assert made.job.closed
    assert not told
    made.job.abort()
    assert made.job.take() is None


def test_discard_waits_while_a_piece_is_replayed(bench, monkeypatch):
    inside, go_on, left = threading.Event(), threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        inside.set()
        assert go_on.wait(30)
        plain_sgd(*args, **kwargs)
        left.set()

    monkeypatch.setattr(piece_replay.replay, "run", slow)
    made = bench(threads=1, ring_gradients=20)
    rng = np.random.default_rng(0)
    made.update(rng, made.pieces[:1])
    made.update(rng, made.pieces[:1])
    assert inside.wait(30)
    seen = []
    thread = threading.Thread(target=lambda: (made.job.discard([0]), seen.append(left.is_set())))
    thread.start()
    go_on.set()
    thread.join(30)
    assert seen == [True]


def test_abort_returns_when_nothing_touches_the_arena_any_more(bench, monkeypatch):
    inside, go_on, left = threading.Event(), threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        inside.set()
        assert go_on.wait(30)
        left.set()

    monkeypatch.setattr(piece_replay.replay, "run", slow)
    made = bench(threads=1, ring_gradients=20)
    rng = np.random.default_rng(0)
    made.update(rng)
    made.update(rng)
    assert inside.wait(30)
    seen = []
    thread = threading.Thread(target=lambda: (made.job.abort(), seen.append(left.is_set())))
    thread.start()
    go_on.set()
    thread.join(30)
    assert seen == [True]
    assert made.ring.in_use == 0
    assert made.outcome.reports == []  # who gave it up knows
    assert made.job.take() is None


def test_gradients_are_gathered_unless_the_ring_is_full(bench):
    """Two updates in one pass over memory; when there is no room for the second, one by one."""
    made = bench(ring_gradients=20)
    passes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            piece_replay.replay, "run", lambda *a, **k: (passes.append(len(a[4])), plain_sgd(*a, **k))
        )
        rng = np.random.default_rng(0)
        made.update(rng)
        made.update(rng)
        for _ in range(4):
            made.job.take()()
        assert passes == [2] * 4
        passes.clear()
        made.update(rng)
        made.job.hurry(on=True)
        for _ in range(4):
            made.job.take()()
        assert passes == [1] * 4


@given(st.permutations(range(3)), st.lists(st.integers(1, 4), min_size=3, max_size=3))
def test_storage_order_becomes_row_major(order, shape):
    """An array that stands in another memory order is turned in place before it is written."""
    row_major = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    stored = np.ascontiguousarray(row_major.transpose(order))
    inverse = np.argsort(order)
    strides = tuple(n // 4 for n in stored.transpose(inverse).strides)
    data = stored.reshape(-1).view(np.uint8).copy()
    job_module._to_row_major(data, tuple(shape), strides)
    assert data.tobytes() == row_major.tobytes()


def test_progress_and_timeline_of_a_job(bench):
    made = bench(threads=1)
    made.update(np.random.default_rng(0))
    made.close()
    made.outcome.wait()
    lanes = {span.lane for span in made.job._trace.spans()}
    assert {"replay", "write", "commit"} <= lanes
    assert all(span.end >= span.start for span in made.job._trace.spans())
