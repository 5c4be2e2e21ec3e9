"""What is encoded, with what, and what that takes: the choice, its figures, the writer."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.core.arena_layout import lay_out
from gockpt.core.array_spec import ArraySpec
from gockpt.errors import OptionsError
from gockpt.storage.format.chunk_grid import chunked_layout
from gockpt.storage.format.codecs import CODECS, MAX_CHUNK_NBYTES, most_nbytes
from gockpt.storage.local import compression
from gockpt.storage.local.chunk_writer import write_encoded
from gockpt.storage.local.compression import (
    Compression,
    Kind,
    Measured,
    Trial,
    choose,
    largest_encoded,
    memory_bound,
)
from gockpt.storage.local.filesystem import Filesystem
from gockpt.storage.local.store import Store
from gockpt.storage.read.find import open_checkpoint

WEIGHTS, MOMENTS, COUNTS = Kind("model", "bfloat16"), Kind("exp_avg", "float32"), Kind("step", "float32")


def layout(shape, dtype="float32", name=("model", "w"), rows=None):
    spec = ArraySpec(name, shape, dtype)
    return chunked_layout(spec, (rows or max(1, shape[0]), *shape[1:]) if shape else ())


def save(store, arrays, content, step=1):
    """Write arrays; ``content`` returns the bytes of each."""
    with store.begin(step, arrays, state={}, attributes={}, exact=True) as transaction:
        for array in arrays:
            data, at = content(array), 0
            for slot in array.slots:
                buffer = bytearray(slot.capacity)
                buffer[: slot.nbytes] = data[at : at + slot.nbytes]
                transaction.write_chunk(array, slot, memoryview(buffer))
                at += slot.nbytes
        return transaction.commit()


def codecs_of(published):
    with open_checkpoint(published.path) as checkpoint:
        assert checkpoint.verify().ok
        return {name: array.entry.codec for name, array in checkpoint.arrays.items()}


# -- the choice ------------------------------------------------------------------------------------


def test_a_slow_disk_gets_encoded_what_shrinks_and_a_fast_one_nothing():
    kinds = {
        WEIGHTS: Measured(10**9, {"zstd": Trial(1e9, 0.7), "blosc": Trial(0.9e9, 0.65)}),
        MOMENTS: Measured(4 * 10**9, {"zstd": Trial(1e9, 0.95)}),
        COUNTS: Measured(100, {}),
    }
    slow = choose(kinds, write_rate=0.1e9, threads=2)
    assert slow.codecs == {WEIGHTS: "zstd", MOMENTS: "zstd"} or slow.codecs[WEIGHTS] == "blosc"
    assert slow.seconds < slow.raw_seconds
    fast = choose(kinds, write_rate=20e9, threads=2)
    assert fast.codecs == {}
    assert fast.seconds == fast.raw_seconds
    # In between only what gains the most: the moments would take longer to encode than they save.
    assert set(choose(kinds, write_rate=1.5e9, threads=1).codecs) <= {WEIGHTS}


def test_one_figure_decides():
    one = {WEIGHTS: Measured(10**9, {"zstd": Trial(1e9, 0.5)})}
    # Raw takes 1 s at 1 GB/s. Encoded: the longer of 0.5 s of writing and 1.5 s of encoding by one thread.
    assert choose(one, write_rate=1e9, threads=1).codecs == {}
    two = choose(one, write_rate=1e9, threads=2)
    assert two.codecs == {WEIGHTS: "zstd"}
    assert (two.seconds, two.raw_seconds) == (0.75, 1.0)
    # A gain of less than a tenth isn't worth the cores.
    assert (
        choose({WEIGHTS: Measured(10**9, {"zstd": Trial(1e12, 0.91)})}, write_rate=1e9, threads=1).codecs
        == {}
    )


trials = st.builds(Trial, rate=st.floats(1e6, 1e11), ratio=st.floats(0.01, 1.1))
measured = st.builds(
    Measured, nbytes=st.integers(1, 10**12), trials=st.dictionaries(st.sampled_from(CODECS), trials)
)


def seconds(kinds, codecs, rate, threads):
    """The model, anew: the longer of writing and encoding."""
    writing = sum(
        kind.nbytes * (kind.trials[codecs[name]].ratio if name in codecs else 1)
        for name, kind in kinds.items()
    )
    encoding = sum(kinds[name].nbytes / kinds[name].trials[codec].rate for name, codec in codecs.items())
    return max(writing / rate, 1.5 * encoding / threads)


@given(
    st.dictionaries(st.sampled_from([WEIGHTS, MOMENTS, COUNTS]), measured, min_size=1),
    st.floats(1e6, 1e11),
    st.integers(1, 8),
)
def test_a_choice_is_what_it_says_never_slower_than_raw_and_the_same_again(kinds, rate, threads):
    made = choose(kinds, write_rate=rate, threads=threads)
    assert math.isclose(made.seconds, seconds(kinds, made.codecs, rate, threads), rel_tol=1e-6)
    assert math.isclose(made.raw_seconds, seconds(kinds, {}, rate, threads), rel_tol=1e-6)
    assert made.seconds <= made.raw_seconds
    assert not made.codecs or made.seconds < 0.9 * made.raw_seconds
    shuffled = dict(reversed(kinds.items()))
    assert choose(shuffled, write_rate=rate, threads=threads).codecs == made.codecs


@given(measured, st.floats(1e6, 1e11), st.integers(1, 8))
def test_of_one_kind_the_choice_leaves_no_gain_of_a_tenth(kind, rate, threads):
    made = choose({WEIGHTS: kind}, write_rate=rate, threads=threads)
    best = (
        min(seconds({WEIGHTS: kind}, {WEIGHTS: codec}, rate, threads) for codec in kind.trials)
        if kind.trials
        else math.inf
    )
    if best < 0.9 * made.raw_seconds * (1 - 1e-9):
        assert made.codecs


def test_kinds_are_by_role_and_dtype():
    assert Kind.of(ArraySpec(("model", "a.b"), (1,), "bfloat16")) == WEIGHTS
    assert Kind.of(ArraySpec(("optimizer", "a.b", "exp_avg"), (1,), "float32")) == MOMENTS
    assert Kind.of(ArraySpec(("extra", "x", "y"), (1,), "int64")) == Kind("extra", "int64")


# -- what is encoded -------------------------------------------------------------------------------


def test_an_unknown_codec_is_refused():
    with pytest.raises(OptionsError, match="lz4"):
        Compression("lz4", threads=1)


@pytest.mark.parametrize("codec", CODECS)
def test_tiny_arrays_and_giant_chunks_stay_raw(codec):
    made = Compression(codec, threads=1)
    assert made.codec_for(layout((1023,))) is None
    assert made.codec_for(layout((1024,))) == codec
    assert made.codec_for(layout((1, MAX_CHUNK_NBYTES // 4))) == codec
    assert made.codec_for(layout((1, MAX_CHUNK_NBYTES // 4 + 1))) is None
    assert Compression(None, threads=1).codec_for(layout((1024,))) is None


@pytest.mark.parametrize("codec", CODECS)
def test_the_manifest_says_the_codec_and_every_stored_length(tmp_path, codec):
    arrays = [
        layout((700, 3), rows=300),
        layout((5,), name=("model", "b")),
        layout((0, 3), name=("model", "e")),
    ]
    with Store(tmp_path, compression=Compression(codec, threads=1)) as store:
        published = save(store, arrays, lambda array: bytes(array.spec.nbytes))
    document = json.loads(Path(published.path, "gockpt.json").read_bytes().splitlines()[0])
    assert document["version"] == 2
    first, *others = document["arrays"]
    assert (first["codec"], len(first["stored"])) == (codec, 3)
    files = [Path(published.path, "model/w", f"c.{i}.0") for i in range(3)]
    assert [file.stat().st_size - 4 for file in files] == first["stored"]
    assert all(size < 200 for size in first["stored"])  # padding costs nothing
    assert all("codec" not in other and "stored" not in other for other in others)
    assert published.nbytes == sum(f.stat().st_size for f in Path(published.path).rglob("*") if f.is_file())


def test_without_an_encoded_array_the_format_is_version_1(tmp_path):
    with Store(tmp_path, compression=Compression("zstd", threads=1)) as store:
        published = save(store, [layout((5,))], lambda array: bytes(array.spec.nbytes))
    assert json.loads(Path(published.path, "gockpt.json").read_bytes().splitlines()[0])["version"] == 1
    assert published.encoding_memory == 0


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("nbytes", [4096, 300 << 10, (3 << 20) + 8])
def test_what_does_not_shrink_is_stored_all_the_same(tmp_path, codec, nbytes):
    """From one page, through one large enough for direct I/O, to several blocks."""
    data = np.random.default_rng(1).bytes(nbytes)
    with Store(tmp_path, compression=Compression(codec, threads=1)) as store:
        published = save(store, [layout((nbytes // 4,))], lambda _: data)
    assert Path(published.path, "model/w/c.0").stat().st_size > nbytes
    assert codecs_of(published) == {"model/w": codec}
    out = np.empty(nbytes, np.uint8)
    with open_checkpoint(published.path) as checkpoint:
        checkpoint.read_into("model/w", None, out)
    assert out.tobytes() == data


# -- memory ----------------------------------------------------------------------------------------


def test_memory_is_counted_given_back_and_within_its_bound():
    array = layout((10_000,), rows=6_000)
    whole = array.chunk_nbytes
    made = Compression("zstd", threads=2)
    data = memoryview(np.random.default_rng(2).bytes(whole))
    with made.encoded("zstd", array, array.slots[0], data) as full:
        assert made.peak_nbytes == most_nbytes(whole) + len(full)
    before = made.peak_nbytes
    with made.encoded("zstd", array, array.slots[1], data):
        pass
    assert before < made.peak_nbytes <= memory_bound(whole, 1)  # a padded copy on top of it


def test_the_bound_holds_while_every_thread_writes_from_unaligned_memory(tmp_path):
    """However many threads there are, four of one that encodes and three more have a result, and a copy of a
    piece of it.
    """
    array = layout((250_000,))
    whole = array.chunk_nbytes
    made = Compression("zstd", threads=1)
    data = memoryview(np.random.default_rng(3).bytes(whole))
    pieces, taken = [], []
    together = threading.Barrier(4, action=lambda: taken.append(made._held + sum(pieces)))

    class Gated(Filesystem):
        def open(self, name, flags, *, dir_fd=None):
            return super().open(name, flags & ~os.O_DIRECT, dir_fd=dir_fd)

        def direct_alignment(self, fd):
            return 512

        def pwrite(self, fd, piece, offset):
            if not offset:
                pieces.append(len(piece.obj))
                together.wait(60)
                pieces.remove(len(piece.obj))
            return super().pwrite(fd, piece, offset)

    directory = os.open(tmp_path, os.O_DIRECTORY)

    def work(number):
        with made.encoded("zstd", array, array.slots[0], data) as encoded:
            written = write_encoded(Gated(), directory, f"{number}", data=encoded, direct=True)
        os.close(written.fd)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    os.close(directory)
    assert len(taken) == 2
    assert 7 * whole < min(taken) <= max(taken) <= memory_bound(whole, 1)


def test_samples_are_counted_and_within_the_bound():
    array = layout((200_000,))
    made = Compression("auto", threads=1)
    made.sample(array, array.slots[0], memoryview(bytes(array.spec.nbytes)))
    assert made._held == 0
    assert 0 < made.peak_nbytes <= memory_bound(largest_encoded("auto", [array]), 1)


def test_what_is_never_encoded_takes_nothing():
    huge, tiny = layout((1, MAX_CHUNK_NBYTES // 4 + 1)), layout((5,))
    assert largest_encoded(None, [layout((5000,))]) == 0
    assert largest_encoded("zstd", [huge, tiny]) == largest_encoded("auto", [tiny]) == 0
    assert largest_encoded("auto", [huge, tiny]) == compression.SAMPLE
    assert largest_encoded("zstd", [layout((5000,)), layout((4000,)), huge]) == 20_000
    assert memory_bound(0, 8) == 0


def test_no_more_threads_than_asked_for_encode_at_a_time(monkeypatch):
    inside, most, mutex, together = 0, 0, threading.Lock(), threading.Barrier(2)

    def encode(*_):
        nonlocal inside, most
        with mutex:
            inside += 1
            most = max(most, inside)
        together.wait(timeout=60)  # two do encode side by side
        with mutex:
            inside -= 1
        return b"x"

    monkeypatch.setattr(compression, "encode", encode)
    array = layout((2000,))
    made = Compression("zstd", threads=2)

    def work():
        with made.encoded("zstd", array, array.slots[0], memoryview(bytes(array.spec.nbytes))):
            pass

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 2


# -- auto ------------------------------------------------------------------------------------------


def auto_arrays():
    return lay_out(
        [
            ArraySpec(("model", "w"), (100_000,), "float32"),
            ArraySpec(("optimizer", "w", "exp_avg"), (100_000,), "float32"),
            ArraySpec(("optimizer", "w", "step"), (), "float32"),
        ]
    ).arrays


def halves(array):
    """Moments that shrink to nothing, weights that don't shrink."""
    if array.spec.name[-1] == "exp_avg":
        return bytes(array.spec.nbytes)
    return np.random.default_rng(3).bytes(array.spec.nbytes)


class Clock:
    """A stand-in for the stopwatch: writing took so long."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def auto_saves(path, monkeypatch, seconds, count=3):
    """Save with compression="auto" on a disk that takes ``seconds`` for each checkpoint."""
    monkeypatch.setattr("gockpt.storage.local.draft.Stopwatch", lambda: Clock(seconds))
    with Store(path, compression=Compression("auto", threads=2)) as store:
        return [codecs_of(save(store, auto_arrays(), halves, step)) for step in range(count)]


def test_auto_writes_raw_first_and_then_encodes_what_pays_on_a_slow_disk(tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "gockpt.storage.local.compression"):
        first, *later = auto_saves(tmp_path, monkeypatch, seconds=1000.0)
    assert set(first.values()) == {None}
    for codecs in later:
        assert codecs["model/w"] is None
        assert codecs["optimizer/w/exp_avg"] in CODECS
        assert codecs["optimizer/w/step"] is None
    (record,) = caplog.records
    assert "exp_avg (float32) by" in record.message
    assert re.search(r"should take \d+\.\d\d s instead of 9\d\d\.\d\d s$", record.message)


def test_auto_stays_raw_on_a_disk_without_a_price(tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "gockpt.storage.local.compression"):
        saves = auto_saves(tmp_path, monkeypatch, seconds=1e-9)
    assert all(set(codecs.values()) == {None} for codecs in saves)
    (record,) = caplog.records
    assert "everything stays raw" in record.message


def test_auto_takes_a_few_samples_of_each_kind_and_none_afterwards(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(
        compression, "encode", lambda codec, itemsize, data: taken.append((codec, len(data))) or bytes(data)
    )
    arrays = [layout((40_000,), name=("model", str(n))) for n in range(12)] + [
        layout((600_000,), name=("optimizer", "0", "exp_avg")),
        layout((16_000,), name=("optimizer", "0", "mean")),
    ]
    with Store(tmp_path, compression=Compression("auto", threads=1)) as store:
        for step in range(2):
            save(store, arrays, lambda array: bytes(array.spec.nbytes), step)
    assert sorted(taken) == sorted(
        itertools.product(CODECS, [160_000] * compression.SAMPLES + [compression.SAMPLE])
    )


def test_auto_measures_the_disk_by_itself(tmp_path):
    """Whatever it decides here, all of it is readable."""
    with Store(tmp_path, compression=Compression("auto", threads=2)) as store:
        for step in range(2):
            codecs_of(save(store, auto_arrays(), halves, step))
