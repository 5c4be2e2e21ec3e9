"""Messages between trainer and worker come back as they went, however the stream is cut."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.core.arena_layout import ArrayLayout, Slot
from gockpt.core.array_spec import DTYPES, ArraySpec
from gockpt.core.descriptors import ArenaId, ArrayPlace, Capture, Gradient, ReplayPiece, Stretch
from gockpt.core.exactness import Deviation
from gockpt.core.nonfinite import NonFinite
from gockpt.core.runs import Run
from gockpt.errors import WorkerError
from gockpt.options import Keep
from gockpt.storage.local.store import Follow
from gockpt.storage.local.transaction import Published
from gockpt.workers import messages as m
from gockpt.workers.channel import Frames, frame

pack = msgspec.msgpack.encode
counts = st.integers(0, 1 << 62)
bits = st.integers(0, (1 << 64) - 1)
texts = st.text(max_size=8)
names = st.lists(texts, max_size=3).map(tuple)
numbers = st.lists(counts, max_size=4).map(tuple)
floats = st.floats()
rows = st.lists(floats, max_size=9).map(tuple)
json = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | floats | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
documents = st.dictionaries(texts, json, max_size=3)


def many(strategy):
    return st.lists(strategy, max_size=4).map(tuple)


pieces = st.builds(
    ReplayPiece,
    index=counts,
    kernel=texts,
    flags=numbers,
    stretches=many(st.builds(Stretch, names, counts, counts, counts, counts)),
    tail=st.booleans(),
)
encodings = st.sampled_from([None, "fp16", "bf16"])
gradients = st.builds(Gradient, counts, counts, counts, rows, encodings, numbers, st.none() | bits, counts)
layouts = st.builds(
    ArrayLayout,
    spec=st.builds(ArraySpec, names, numbers, st.sampled_from(sorted(DTYPES))),
    chunk_shape=numbers,
    slots=many(st.builds(Slot, *(counts,) * 6)),
)
captures = st.builds(
    Capture,
    step=counts,
    arrays=many(st.builds(ArrayPlace, layouts, st.sampled_from(ArenaId), st.none() | numbers)),
    proofs=st.dictionaries(counts, st.lists(bits, max_size=3).map(tuple), max_size=3),
    state=documents,
    attributes=documents,
    exact=st.booleans(),
    grad_dtype=encodings,
    samples=st.dictionaries(counts, st.tuples(counts, counts), max_size=3),
)
shares = st.none() | st.floats(0, allow_infinity=False)
deviations = st.builds(Deviation, texts, counts, floats, shares, shares, counts, counts)
named = st.dictionaries(texts, st.tuples(counts, counts), max_size=3)
runs = st.builds(Run, texts, many(st.tuples(texts, counts)))
follows = st.builds(Follow, runs, st.none() | texts, st.booleans())
keeps = st.builds(Keep, st.integers(1, 9), st.none() | st.integers(1, 9), other_runs=st.booleans())
nonfinite = st.builds(NonFinite, counts, counts, counts, counts, named)
FIELDS = {
    "int": counts,
    "bool": st.booleans(),
    "str": texts,
    "bytes": st.binary(max_size=8),
    "bytes | None": st.none() | st.binary(max_size=8),
    "int | None": st.none() | counts,
    "tuple[int, ...]": numbers,
    "tuple[str, ...]": many(texts),
    "dict[str, Any]": documents,
    "Follow": follows,
    "Keep | int | None": st.none() | counts | keeps,
    "tuple[ReplayPiece, ...]": many(pieces),
    "tuple[Gradient, ...]": many(gradients),
    "tuple[tuple[str, float, float], ...]": many(st.tuples(texts, floats, floats)),
    "Capture": captures,
    "Deviation | None": st.none() | deviations,
    "NonFinite": nonfinite,
    "Published": st.builds(Published, counts, counts, texts, texts, counts, counts),
}
"""What a field may hold, by its type as it is written."""

messages = st.one_of(
    *(
        st.builds(kind, *(FIELDS[field] for field in kind.__annotations__.values()))
        for kind in m.Message.__subclasses__()
    )
)


@given(messages)
def test_a_message_comes_back_as_it_went(message):
    found = m.decode(m.encode(message))
    assert type(found) is type(message)
    assert repr(found) == repr(message)  # a NaN equals nothing, -0.0 equals 0.0


@given(st.lists(messages, max_size=4), st.data())
def test_a_stream_may_be_cut_anywhere(sent, data):
    stream = b"".join(frame(message) for message in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    frames, found = Frames(), []
    for low, high in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += frames.feed(stream[low:high])
    assert repr(found) == repr(sent)


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\xc1", b"\xff", b"\x93\xa4Done\x01", b"\x91" * 100_000),
        *(pack(it) for it in ([], 1, {}, "Done", ["Nobody"], ["Done"], ["Done", 1, 2], ["Close", 1], [1, 1])),
        *(pack(["Done", it]) for it in (1.0, True, "1", None, [1], {"reply": 1})),
        *(pack(["Freed", 1, it]) for it in ([1, "2"], [1, None], {"1": 2}, "12", 1)),
        *(pack(["Taken", 1]) + more for more in (b"\x00", b"\xff")),
        *(pack(["Open", b"p", it, None, {}, 2]) for it in ({}, {"run": {"id": "a"}}, None, [])),
    ],
)
def test_what_is_no_message_is_refused(data):
    with pytest.raises(WorkerError, match="no message"):
        m.decode(data)


def test_a_length_beyond_reason_is_refused():
    with pytest.raises(WorkerError, match="broken"):
        Frames().feed(b"\xff" * 16)


@pytest.mark.parametrize("thing", [object(), 1, Gradient(1, 2, 3, ())])
def test_only_messages_can_be_sent(thing):
    with pytest.raises(TypeError, match="no message"):
        m.encode(thing)


def test_an_object_can_not_be_sent():
    with pytest.raises(TypeError, match="object has no place in a message"):
        m.encode(m.Open(b"p", Follow(Run("a"), None, here=False), None, {"a": object()}, None))


def test_a_level_of_the_log_is_a_plain_number():
    assert m.decode(m.encode(m.Log(logging.WARNING, "ä"))) == m.Log(30, "ä")


class Number(int):
    pass


class Text(str):
    __slots__ = ()


def test_what_derives_from_a_plain_type_arrives_as_that():
    """A learning rate may be one of NumPy's numbers."""
    row = (np.float64(-0.0), np.float64("inf"), 1e-300)
    (found,) = m.decode(m.encode(m.Gradients(Number(1), (Gradient(0, 0, 4, row),)))).gradients
    assert repr(found.scalars) == "(-0.0, inf, 1e-300)"
    assert {type(number) for number in found.scalars} == {float}
    assert type(m.decode(m.encode(m.Done(Number(1)))).reply) is int
    assert type(m.decode(m.encode(m.Log(1, Text("ä")))).text) is str


def test_a_path_that_is_no_text_can_be_told():
    text = m.printable(f"no room in {os.fsdecode(b'/a/' + bytes([255]))}")
    assert m.decode(m.encode(m.Refused("StorageError", text))).text == "no room in /a/\\udcff"


def test_the_worker_needs_no_torch():
    code = (
        "import sys, gockpt.workers.worker_main, gockpt.workers.thread_pool, gockpt.workers.executor; "
        "import gockpt.kernels.replay; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
