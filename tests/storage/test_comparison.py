"""Comparing two checkpoints: every difference is found, and what is called the same is the same."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.core.arena_layout import lay_out
from gockpt.core.array_spec import DTYPES, ArraySpec
from gockpt.storage.local.store import Store
from gockpt.storage.read import compare as comparison
from gockpt.storage.read.compare import compare, pieces
from gockpt.storage.read.element_values import as_numbers, magnitudes_of_difference
from gockpt.storage.read.find import open_checkpoint


@pytest.fixture
def save(scratch, faults):
    """Save arrays given as NumPy values (with the dtype's name where NumPy has none), and open them."""
    opened = []

    def save(path, arrays, state=None, *, attributes=None):
        made = {
            name: value if isinstance(value, tuple) else (value, value.dtype.name)
            for name, value in arrays.items()
        }
        layout = lay_out(
            ArraySpec(tuple(name.split("/")), value.shape, dtype) for name, (value, dtype) in made.items()
        )
        documents = {"state": state or {}, "attributes": attributes or {}}
        with (
            Store(scratch / path, fs=faults.NoWait()) as store,
            store.begin(1, layout.arrays, **documents, exact=True) as transaction,
        ):
            for array in layout.arrays:
                data = made["/".join(array.spec.name)][0].tobytes()
                at = 0
                for slot in array.slots:
                    buffer = np.zeros(slot.capacity, np.uint8)
                    buffer[: slot.nbytes] = np.frombuffer(data[at : at + slot.nbytes], np.uint8)
                    transaction.write_chunk(array, slot, buffer.data)
                    at += slot.nbytes
            transaction.commit()
        opened.append(open_checkpoint(scratch / path))
        return opened[-1]

    yield save
    for stored in opened:
        stored.close()


@given(
    st.lists(st.integers(0, 7), max_size=4).map(tuple), st.sampled_from([1, 2, 4, 16]), st.integers(16, 200)
)
def test_pieces_cover_each_element_once_and_stay_small(shape, itemsize, limit):
    seen = np.zeros(shape, int)
    order = []
    numbers = np.arange(seen.size).reshape(shape)
    for box in pieces(shape, itemsize, limit):
        where = tuple(slice(at, at + n) for at, n in zip(box.start, box.shape, strict=True))
        assert 0 < box.numel * itemsize <= limit
        seen[where] += 1
        order += numbers[where].ravel().tolist()
    assert (seen == 1).all()
    assert order == sorted(order)


@pytest.mark.parametrize("quick", [False, True])
def test_equal_ones_are_equal(save, quick):
    arrays = {"model/w": np.arange(30, dtype=np.float32).reshape(5, 6), "model/none": np.zeros((0, 3))}
    a, b = save("a", arrays, {"x": [1, 2]}), save("b", arrays, {"x": [1, 2]})
    report = compare(a, b, quick=quick)
    assert report.equal
    assert (report.same, report.changed, report.nbytes) == (2, (), 120)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("size", [comparison.PIECE, 16])
def test_elements_that_differ_are_counted_and_measured(save, quick, size, monkeypatch):
    monkeypatch.setattr(comparison, "PIECE", size)
    one = np.arange(30, dtype=np.float32).reshape(5, 6)
    two = one.copy()
    two[1, 2] += 0.5
    two[4, 5] -= 3
    two[0, 0] = -0.0  # other bits, no distance
    two[2, 2] = math.nan
    a, b = save("a", {"m/w": one, "m/same": one}), save("b", {"m/w": two, "m/same": one})
    (found,) = compare(a, b, quick=quick, threads=3).changed
    assert (found.name, found.elements, found.max_abs_difference, found.not_finite) == ("m/w", 4, 3.0, 1)


def test_names_shapes_and_dtypes(save):
    one = np.zeros(4, np.float32)
    a = save("a", {"m/gone": one, "m/shape": one, "m/dtype": one, "m/w": one})
    b = save(
        "b", {"m/new": one, "m/shape": np.zeros(5, np.float32), "m/dtype": one.astype(np.int32), "m/w": one}
    )
    report = compare(a, b)
    assert (report.only_in_a, report.only_in_b, report.same) == (("m/gone",), ("m/new",), 1)
    assert [(one.name, one.shapes, one.dtypes, one.elements) for one in report.changed] == [
        ("m/shape", ((4,), (5,)), ("float32", "float32"), None),
        ("m/dtype", ((4,), (4,)), ("float32", "int32"), None),
    ]
    assert not report.same_tensors


def test_documents_are_compared_to_their_innermost_difference(save):
    deep = {
        "step": 1,
        "extra": {"sched": {"lr": [0.1, {"a": 1}]}, "gone": 1, "zero": 0.0},
        "long": list(range(99)),
    }
    other = json.loads(json.dumps(deep))
    other["step"] = 2
    other["extra"]["sched"]["lr"][1]["a"] = 1.0
    other["extra"]["zero"] = -0.0
    del other["extra"]["gone"]
    other["long"][50] = -1
    arrays = {"m/w": np.zeros(2, np.float32)}
    a = save("a", arrays, deep, attributes={"gockpt": {"step": 1}, "title": "x"})
    b = save("b", arrays, other, attributes={"gockpt": {"step": 2}, "title": "y"})
    report = compare(a, b)
    assert report.same_tensors
    assert not report.equal
    assert {one.where: one.values for one in report.metadata} == {
        "gockpt.json/attributes/title": ("x", "y"),
        "state.json/extra/sched/lr/1/a": (1, 1.0),
        "state.json/extra/gone": (1, None),
        "state.json/extra/zero": (0.0, -0.0),
        "state.json/long": ("a list of 99", "a list of 99"),
    }


def test_quick_reads_only_what_has_other_checksums(save):
    one, two = np.zeros(1000, np.float32), np.ones(1000, np.float32)
    a, b = save("a", {"m/same": one, "m/other": one}), save("b", {"m/same": one, "m/other": two})
    seen = []
    report = compare(a, b, quick=True, on_progress=lambda done, total: seen.append((done, total)))
    assert [one.name for one in report.changed] == ["m/other"]
    assert (a.bytes_read, b.bytes_read) == (4000, 4000)
    assert seen[0] == (4000, 8000)
    assert seen[-1] == (8000, 8000)


def test_damage_is_an_error_not_a_difference(save, scratch):
    from gockpt.errors import ChunkCorrupt

    arrays = {"m/w": np.arange(9, dtype=np.float32)}
    a, b = save("a", arrays), save("b", arrays)
    chunk = scratch / "b/step-0000000001/m/w/c.0"
    chunk.write_bytes(b"\1" + chunk.read_bytes()[1:])
    with pytest.raises(ChunkCorrupt):
        compare(a, b)


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name.startswith(("float8", "bfloat16"))])
def test_every_pattern_of_small_floats_is_what_ml_dtypes_says(dtype):
    width = DTYPES[dtype].itemsize
    patterns = np.arange(256**width, dtype=f"<u{width}")
    with np.errstate(invalid="ignore"):
        real = patterns.view(getattr(ml_dtypes, dtype)).astype(np.float64)
    assert np.array_equal(as_numbers(patterns.view(np.uint8).reshape(-1, width), dtype), real, equal_nan=True)


@pytest.mark.parametrize("dtype", [name for name in DTYPES if not name.startswith(("float8", "bfloat16"))])
def test_distances_are_exact_at_the_ends(dtype):
    native = np.dtype(dtype)
    if native.kind in "iu":
        values = np.array([np.iinfo(native).min, np.iinfo(native).max], native)
        expected = float(int(values[1]) - int(values[0]))
    elif native.kind == "b":
        values, expected = np.array([False, True]), 1.0
    elif native.kind == "c":
        values, expected = np.array([3j, 4], native), 5.0
    else:
        values, expected = np.array([-1.5, 2.0], native), 3.5
    a, b = (value.reshape(1).view(np.uint8).reshape(1, -1) for value in values)
    for one, two in ((a, b), (b, a)):
        distances, finite = magnitudes_of_difference(one, two, dtype)
        assert (distances.tolist(), finite) == ([expected], 1)


def test_a_distance_beyond_all_numbers_is_the_largest_one():
    a, b = (np.array([x]).view(np.uint8).reshape(1, -1) for x in (1e308, -1e308))
    assert magnitudes_of_difference(a, b, "float64")[0].tolist() == [np.finfo(np.float64).max]
