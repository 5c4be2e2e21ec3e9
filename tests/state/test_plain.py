"""Values through JSON and back: the same types, order and bits, or a refusal that names the place."""

from __future__ import annotations

import datetime as dt
import enum
import json
import math
import random
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from functools import reduce
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gockpt.errors import ManifestCorrupt, UnsupportedState
from gockpt.state.tensors import DTYPE_OF
from gockpt.state.value_decoder import array_name, decode, is_mapping, items
from gockpt.state.value_encoder import MAX_DEPTH, NUMPY_SCALARS, encode, is_ordinary_key, join
from gockpt.storage.format import strict_json
from gockpt.tensor_memory import as_bytes


def through(value):
    """Encode, write and read strictly, decode; the arrays' names must be distinct as users see them."""
    document, arrays = encode(value, prefix=("extra", "x"))
    data = strict_json.dumps({"x": document}, what="x", depth=strict_json.STATE_DEPTH)
    document = strict_json.loads(data, what="x", depth=strict_json.STATE_DEPTH)["x"]
    names = ["/".join(name) for name in arrays]
    assert len(set(names)) == len(names)
    for name in arrays:  # an array's directory can't lie inside another array's
        assert not any(name[:n] in arrays for n in range(1, len(name)))
        "/".join(name).encode()
    return decode(document, arrays.__getitem__)


floats = st.floats(allow_nan=True) | st.sampled_from([-0.0, 5e-324, math.inf, -math.inf])
text = st.text(st.characters(), max_size=6) | st.sampled_from(
    ["$x", "$tuple", "#0", "a/b", "", "\ud800", "0", "1"]
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**54), 2**54),
    floats,
    st.complex_numbers(),
    text,
    st.binary(max_size=9),
    st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 3)),
    st.sampled_from([torch.float32, torch.device("cpu"), torch.device("cuda", 3), np.dtype("int16")]),
    st.sampled_from([torch.Size([1, 2]), Path("/tmp/x"), PurePosixPath("y")]),
    st.dates() | st.timedeltas() | st.datetimes() | st.datetimes(timezones=st.just(dt.UTC)),
)
arrays = st.one_of(
    hnp.arrays(
        hnp.scalar_dtypes().filter(lambda d: d.name in NUMPY_SCALARS and d.isnative),
        hnp.array_shapes(min_dims=0, min_side=0),
    ),
    hnp.arrays(st.sampled_from(["float32", "complex64", "float16"]), ()).map(lambda a: a[()]),
    st.lists(st.integers(0, 255), max_size=8).map(
        lambda xs: torch.tensor(xs, dtype=torch.uint8).view(torch.float8_e5m2)
    ),
)


def hashable(children):
    return st.one_of(children, st.tuples(children, children), st.frozensets(children, max_size=3))


keys = st.recursive(scalars, hashable, max_leaves=3).filter(lambda key: key == key)  # noqa: PLR0124 - no NaN
values = st.recursive(
    scalars | arrays,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["a", "1", "$a", "#0", "b/c"]) | st.integers(0, 2), inner, max_size=5
        ),
        st.dictionaries(text, inner, max_size=3).map(OrderedDict),
        st.dictionaries(text, inner, max_size=3).map(lambda d: defaultdict(list, d)),
        st.lists(inner, max_size=3).map(lambda xs: deque(xs, maxlen=3)),
        st.dictionaries(text, st.integers(), max_size=3).map(Counter),
        st.sets(keys.filter(lambda key: not isinstance(key, float)), max_size=3),
        st.binary(max_size=5).map(bytearray),
    ),
    max_leaves=12,
)


@given(values)
def test_every_value_comes_back(same, value):
    same(through(value), value)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5).map(lambda few: few * 4096))
def test_long_lists_of_integers_become_one_array(same, value):
    document, found = encode(value, prefix=("x",))
    assert document == {"$list": {"$tensor": ["x"]}}
    assert found[("x",)].dtype == torch.int64
    same(through(value), value)
    same(through(tuple(value)), tuple(value))


@pytest.mark.parametrize(
    "value",
    [
        [0.1] * 5000,
        [math.nan, -0.0, math.inf] * 2000,
        [2**63] * 5000,
        [True] * 5000,
        [1, 1.0] * 3000,
        [1] * 4095,
        ["x"] * 5000,
        b"\x00\xff" * 40_000,
        bytearray(70_000),
        {"order": list(range(6000)), "nested": [tuple(range(5000))]},
    ],
    ids=lambda value: f"{type(value).__name__}-{str(value)[:12]}",
)
def test_long_values_come_back(same, value):
    same(through(value), value)


@pytest.mark.parametrize(
    "bits", ["7ff8000000000000", "fff8000000000000", "7ff8000000000123", "7ff0000000000001"]
)
def test_a_nan_keeps_its_payload(bits):
    (value,) = struct.unpack(">d", bytes.fromhex(bits))
    assert struct.pack(">d", through(value)).hex() == bits


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64"])
def test_a_numpy_nan_keeps_its_payload(same, dtype):
    raw = np.dtype(dtype).itemsize
    value = np.frombuffer(b"\x01" + b"\xff" * (raw - 1), dtype)[0]
    assert value != value  # noqa: PLR0124 - it is a NaN
    same(through(value), value)


@pytest.mark.parametrize("dtype", sorted(DTYPE_OF))
def test_tensors_of_every_dtype(same, dtype):
    tensor = torch.empty(3, 5, dtype=DTYPE_OF[dtype])
    as_bytes(tensor)[:] = np.frombuffer(random.Random(1).randbytes(tensor.nbytes), np.uint8) & (
        1 if dtype == "bool" else 255
    )
    for value in (tensor, tensor.t(), tensor[1:1], tensor[0, 0], tensor[:, ::2], tensor[:1].expand(4, 5)):
        same(through(value), value)


def test_lazily_conjugated_and_trained_tensors(same):
    value = torch.randn(3, dtype=torch.complex64)
    same(through(value.conj()), value.conj().resolve_conj())
    same(through(value.conj().imag), value.conj().imag.resolve_neg())
    loaded = through(torch.nn.Parameter(torch.ones(2)))
    assert type(loaded) is torch.Tensor
    assert not loaded.requires_grad


def test_nothing_that_is_returned_shares_memory():
    tensor, array, raw = torch.zeros(3), np.zeros(3), bytearray(70_000)
    numbers = list(range(5000))
    _, found = encode([tensor, array, raw, numbers, np.asfortranarray(np.zeros((2, 2)))], prefix=("x",))
    before = [one.clone() for one in found.values()]
    tensor.fill_(1)
    array.fill(1)
    raw[:] = b"\x01" * len(raw)
    numbers[0] = 7
    for one, other in zip(found.values(), before, strict=True):
        assert torch.equal(one, other)


def test_arrays_have_natural_names():
    value = {"a": torch.ones(1), "list": [0, {"b": np.ones(2)}], 7: torch.ones(3), (1,): torch.ones(4)}
    _, found = encode(value, prefix=("extra", "x"))
    assert list(found) == [
        ("extra", "x", "a"),
        ("extra", "x", "list", "1", "b"),
        ("extra", "x", "7"),
        ("extra", "x", "#3"),
    ]
    _, found = encode(torch.ones(1), prefix=("extra", "x"))
    assert list(found) == [("extra", "x")]


def test_numbers_and_text_of_the_same_look_as_keys(same):
    for value in ({7: torch.zeros(1), "7": torch.ones(1)}, {"7": torch.zeros(1), 7: torch.ones(1)}):
        _, found = encode(value, prefix=("x",))
        assert len(found) == 2
        same(through(value), value)


@pytest.mark.parametrize("number", [2**53 - 1, 2**53, -(2**53), 10**30])
def test_integers_that_other_readers_of_json_would_round_are_marked(number):
    document, _ = encode(number, prefix=("x",))
    assert document == (number if abs(number) < 2**53 else {"$int": hex(number)})


def test_plain_values_are_readable_json():
    value = {"lr": 0.1, "betas": (0.9, 0.999), "names": ["a", None, True], "$odd": 1}
    document, _ = encode({key: value[key] for key in ("lr", "betas", "names")}, prefix=("x",))
    assert (
        json.dumps(document) == '{"lr": 0.1, "betas": {"$tuple": [0.9, 0.999]}, "names": ["a", null, true]}'
    )
    assert encode(value, prefix=("x",))[0]["$dict"][-1] == ["$odd", 1]


class Color(enum.IntEnum):
    RED = 1


Point = namedtuple("Point", "x y")  # noqa: PYI024 - the plain kind is what users have


@dataclass
class Config:
    lr: float


class Text(str):  # noqa: SLOT000 - a subclass is the point
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "builtins.object"),
        (lambda: 0, "builtins.function .*give plain values"),
        (Color.RED, r"Color that.*\.name or \.value"),
        (Point(1, 2), r"Point that.*_asdict"),
        (Config(1.0), r"Config that.*asdict"),
        (Text("x"), "Text that"),
        (torch.Generator(), r"get_state\(\)"),
        (torch.nn.Linear(1, 1), r"state_dict\(\)"),
        (torch.ones(2).to_sparse(), r"sparse_coo; convert it with \.to_dense\(\)"),
        (torch.empty(2, device="meta"), "meta"),
        (torch.ones(2, dtype=torch.int8).view(torch.uint4), "uint4"),
        (torch.nn.UninitializedParameter(), "not initialised"),
        (np.array(["a"]), "dtype <U1"),
        (np.array([1], dtype=">i4"), "dtype >i4"),
        (np.array([None]), "dtype object"),
        (np.ma.array([1]), r"np\.array\("),
        (np.datetime64("2020"), r"\.item\(\)"),
        (np.longdouble(1), r"\.item\(\)"),
        (np.str_("x"), r"\.item\(\)"),
        (np.dtype("M8[s]"), r"\.str"),
        (defaultdict(lambda: 0), "default_factory"),
        ({torch.ones(1): 1}, "key 0 holds an array"),
        (dt.datetime.now(dt.timezone(dt.timedelta(hours=1), "home")), "fixed-offset"),
        (dt.time(1), "datetime.time"),
        (type, "builtins.type"),
    ],
)
def test_what_has_no_exact_form_is_named_with_its_place(value, message):
    with pytest.raises(UnsupportedState, match=message) as caught:
        encode({"list": [0, {"deep": value}]}, prefix=("extra", "mine"))
    assert str(caught.value).startswith("extra/mine['list'][1]['deep']")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated, and still made
def test_quantised_tensors_are_refused():
    with pytest.raises(UnsupportedState, match="quantised; keep"):
        encode(torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), prefix=("x",))


def test_an_array_of_too_many_dimensions():
    with pytest.raises(UnsupportedState, match="33 dimensions"):
        encode(torch.ones((1,) * 33), prefix=("x",))
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        with pytest.raises(UnsupportedState, match="32 dimensions"):
            encode(np.ones((1,) * 33), prefix=("x",))


@pytest.mark.parametrize(
    "make", [list, lambda x: {"k": x[0]} if x else {}, deque], ids=["list", "dict", "deque"]
)
def test_a_value_that_contains_itself(make):
    value = make([None])
    if isinstance(value, dict):
        value["k"] = value
    else:
        value.append(value)
    with pytest.raises(UnsupportedState, match="contains itself"):
        encode(value, prefix=("x",))


def test_the_same_value_twice_is_no_cycle(same):
    part = [1, {"a": torch.ones(2)}]
    same(through([part, part, (part,)]), [part, part, (part,)])


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: (x,), lambda x: {1: x}, lambda x: {"$": x}])
def test_nesting_is_limited_to_what_can_be_read_back(same, wrap):
    deep = reduce(lambda value, _: wrap(value), range(MAX_DEPTH), 0)
    same(through(deep), deep)
    with pytest.raises(UnsupportedState, match=f"deeper than {MAX_DEPTH}"):
        encode(wrap(deep), prefix=("x",))


@pytest.mark.parametrize(
    "document",
    [
        {"$unknown": 1},
        {"$tuple": 1},
        {"$tuple": {"$tensor": 5}},
        {"$tuple": {"$tensor": ["bytes"]}},
        {"$tensor": "x"},
        {"$tensor": [1]},
        {"$int": 5},
        {"$int": "five"},
        {"$float": 1.0},
        {"$float": "ff"},
        {"$complex": [1]},
        {"$str": "?"},
        {"$bytes": 5},
        {"$bytes": "?"},
        {"$dict": [1]},
        {"$dict": [[[], 1]]},
        {"$defaultdict": [], "factory": "eval"},
        {"$defaultdict": []},
        {"$deque": []},
        {"$numpy": "object", "value": 1},
        {"$numpy": "float32"},
        {"$numpy": "float32", "bytes": "00"},
        {"$numpy.dtype": "O"},
        {"$torch.dtype": "load"},
        {"$torch.dtype": "nothing"},
        {"$torch.device": "nowhere"},
        {"$torch.Size": ["a"]},
        {"$range": [0, 1, 0]},
        {"$date": "yesterday"},
        {"$datetime": 3},
        {"$timedelta": [10**30, 0, 0]},
        {"$Path": 3},
        {"$set": [[1]]},
    ],
    ids=str,
)
def test_a_document_that_was_never_written_is_refused(document):
    stored = {("bytes",): torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(ManifestCorrupt, match="not in a known form"):
        decode([document], stored.__getitem__)


def test_mappings_can_be_taken_apart_and_put_together():
    for value in ({}, {"a": 1}, {"$a": 1}, {1: 2}):
        document, _ = encode(value, prefix=("x",))
        assert is_mapping(document)
        assert join(items(document)) == document
    for other in ([1], 3, {"$tuple": []}, {"$OrderedDict": []}):
        assert not is_mapping(other)
        with pytest.raises(ManifestCorrupt, match="expected a saved dict"):
            items(other)
    with pytest.raises(ManifestCorrupt, match="expected a saved dict"):
        items({"$dict": [[1]]})
    assert array_name({"$tensor": ["a", "b"]}) == ("a", "b")
    assert array_name({"$ndarray": ["a"]}) is None
    assert array_name(["a"]) is None


@pytest.mark.parametrize(
    ("key", "ordinary"),
    [
        ("a", True),
        ("ä.b", True),
        ("$a", True),
        ("", False),
        ("#a", False),
        ("a/b", False),
        (1, False),
        ("\ud800", False),
    ],
)
def test_ordinary_keys(key, ordinary):
    assert is_ordinary_key(key) is ordinary
