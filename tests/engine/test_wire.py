"""Messages between trainer and worker come back as they went, however the stream is cut."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.core.arena_layout import ArrayLayout, Slot
from gockpt.core.array_spec import DTYPES, ArraySpec
from gockpt.core.descriptors import ArrayPlace, Capture, Gradient, ReplayPiece, Stretch
from gockpt.core.exactness import Deviation
from gockpt.core.nonfinite import NonFinite
from gockpt.errors import WorkerError
from gockpt.storage.local.transaction import Published
from gockpt.workers import notices
from gockpt.workers.channel import Frames, decode, encode

counts = st.integers(0, 1 << 62)
bits = st.integers(0, (1 << 64) - 1)
texts = st.text(max_size=8)
names = st.lists(texts, max_size=3).map(tuple)
numbers = st.lists(counts, max_size=4).map(tuple)
floats = st.floats()
rows = st.lists(floats, max_size=9).map(tuple)
json = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | texts,
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
    arrays=many(st.builds(ArrayPlace, layouts, counts, st.none() | numbers)),
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
nonfinite = st.builds(NonFinite, counts, counts, counts, counts, named)
FIELDS = {
    "int": counts,
    "bool": st.booleans(),
    "str": texts,
    "str | None": st.none() | texts,
    "int | None": st.none() | counts,
    "tuple[int, ...]": numbers,
    "tuple[str, ...]": many(texts),
    "dict[str, Any]": documents,
    "dict[str, Any] | int | None": st.none() | counts | documents,
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
        st.builds(kind, *(FIELDS[field.type] for field in dataclasses.fields(kind)))
        for kind in (getattr(notices, name) for name in notices.__all__)
    )
)


@given(messages)
def test_a_message_comes_back_as_it_went(message):
    frame = encode(message)
    found = decode(frame[8:])
    assert type(found) is type(message)
    assert repr(found) == repr(message)  # a NaN equals nothing, -0.0 equals 0.0


@given(st.lists(messages, max_size=4), st.data())
def test_a_stream_may_be_cut_anywhere(sent, data):
    stream = b"".join(encode(message) for message in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    frames, found = Frames(), []
    for low, high in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += frames.feed(stream[low:high])
    assert repr(found) == repr(sent)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"1", b'["Nobody"]', b'["Done"]', b'["Done",1,2]', b'["Close",1]', b"\xff"]
)
def test_what_is_no_message_is_refused(data):
    with pytest.raises(WorkerError, match="no message"):
        decode(data)


def test_a_length_beyond_reason_is_refused():
    with pytest.raises(WorkerError, match="broken"):
        Frames().feed(b"\xff" * 16)


@pytest.mark.parametrize("thing", [object(), 1, Gradient(1, 2, 3, ())])
def test_only_messages_can_be_sent(thing):
    with pytest.raises(TypeError, match="no message"):
        encode(thing)


def test_what_is_not_json_can_not_be_sent():
    with pytest.raises(TypeError):
        encode(notices.Open("p", {}, None, {"a": object()}, None))


def test_a_level_of_the_log_is_a_plain_number():
    assert decode(encode(notices.Log(logging.WARNING, "ä"))[8:]) == notices.Log(30, "ä")


def test_the_worker_needs_no_torch():
    code = (
        "import sys, gockpt.workers.worker_main, gockpt.workers.thread_pool, gockpt.workers.executor; "
        "import gockpt.kernels.replay; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
