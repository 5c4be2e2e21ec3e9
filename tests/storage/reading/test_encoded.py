"""Encoded chunks read back: any dtype, shape, box; and nothing a liar writes is believed."""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
import sys
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gockpt.core.array_spec import DTYPES, ArraySpec
from gockpt.core.boxes import Box
from gockpt.errors import ChunkCorrupt, ManifestCorrupt
from gockpt.storage.format.checksum import BLOCK, crc32c, crc32c_blocks
from gockpt.storage.format.chunk_grid import chunked_layout
from gockpt.storage.format.codecs import CODECS, Coded, decode, encode, most_nbytes
from gockpt.storage.format.manifest import encode as encode_manifest
from gockpt.storage.format.manifest import parse
from gockpt.storage.format.manifest_entries import FileEntry
from gockpt.storage.local.compression import Compression
from gockpt.storage.local.store import Store
from gockpt.storage.read.find import open_checkpoint


def publish(path, codec, arrays):
    """Save ``{name: (shape, dtype, chunk rows, bytes)}`` with all of it encoded."""
    layouts = []
    for name, (shape, dtype, rows, _) in arrays.items():
        chunk = (rows, *(max(1, n) for n in shape[1:])) if shape else ()
        layouts.append(chunked_layout(ArraySpec(("model", name), shape, dtype), chunk))
    with (
        Store(path, compression=Compression(codec, threads=1, smallest=1)) as store,
        store.begin(3, layouts, state={}, attributes={}, exact=True) as transaction,
    ):
        for layout, (_, _, _, data) in zip(layouts, arrays.values(), strict=True):
            at = 0
            for slot in layout.slots:
                buffer = bytearray(slot.capacity)
                buffer[: slot.nbytes] = data[at : at + slot.nbytes]
                transaction.write_chunk(layout, slot, memoryview(buffer))
                at += slot.nbytes
        return transaction.commit()


@st.composite
def cases(draw):
    """An array, its content, how it is cut, and a box inside."""
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=4)))
    dtype = draw(st.sampled_from(list(DTYPES)))
    rows = draw(st.integers(1, max(1, shape[0]))) if shape else 1
    starts = [draw(st.integers(0, n)) for n in shape]
    box = Box(tuple(starts), tuple(draw(st.integers(0, n - at)) for at, n in zip(starts, shape, strict=True)))
    nbytes = ArraySpec(("x",), shape, dtype).nbytes
    few = draw(st.booleans())  # repetitive, so that it shrinks; or not
    data = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 2 if few else 256, nbytes, np.uint8)
    return shape, dtype, rows, data & 1 if dtype == "bool" else data, box


@settings(deadline=None)
@given(cases(), st.sampled_from(CODECS), st.booleans())
def test_every_box_of_every_array_is_read_back(tmp_path_factory, case, codec, verify):
    shape, dtype, rows, data, box = case
    published = publish(tmp_path_factory.mktemp("saved"), codec, {"x": (shape, dtype, rows, data.tobytes())})
    itemsize = DTYPES[dtype].itemsize
    values = data.reshape(*shape, itemsize)
    wanted = values[tuple(slice(at, at + n) for at, n in zip(box.start, box.shape, strict=True))]
    with open_checkpoint(published.path) as checkpoint:
        for region, expected in ((None, values), (box, wanted)):
            out = np.empty(expected.size, np.uint8)
            checkpoint.read_into("model/x", region, out, verify=verify)
            assert out.tobytes() == expected.tobytes()
        assert checkpoint.verify().ok


@pytest.mark.parametrize("codec", CODECS)
def test_a_chunk_is_decoded_once_for_each_call_whatever_is_wanted_of_it(tmp_path, codec):
    """And read whole: what a call reads is the length of the files."""
    data = np.random.default_rng(5).bytes(50 * 70 * 4)
    published = publish(tmp_path, codec, {"x": ((50, 70), "float32", 20, data)})
    files = [file.stat().st_size for file in sorted(Path(published.path, "model/x").glob("c.*"))]
    values = np.frombuffer(data, np.float32).reshape(50, 70)
    with open_checkpoint(published.path, threads=3) as checkpoint:
        for box, read in ((Box((0, 0), (50, 1)), files), (Box((25, 3), (2, 2)), files[1:2])):
            out = np.empty(box.numel * 4, np.uint8)
            assert checkpoint.read_into("model/x", box, out) == sum(read)
            (i, j), (m, n) = box.start, box.shape
            assert out.tobytes() == values[i : i + m, j : j + n].tobytes()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("where", [0, 5, BLOCK, 2 * BLOCK + 9, -1, -5])
def test_a_flipped_bit_is_found_before_anything_is_decoded(tmp_path, monkeypatch, codec, where):
    data = np.random.default_rng(6).bytes(5 << 19)
    published = publish(tmp_path, codec, {"x": ((5 << 19,), "uint8", 5 << 19, data)})
    file = Path(published.path, "model/x/c.0")
    stored = bytearray(file.read_bytes())
    stored[where] ^= 4
    file.write_bytes(stored)
    monkeypatch.setattr("gockpt.storage.read.decode.decode", lambda *_, **__: pytest.fail("decoded"))
    with open_checkpoint(published.path) as checkpoint:
        with pytest.raises(ChunkCorrupt, match="model/x/c.0"):
            checkpoint.read_into("model/x", Box((7,), (1,)), np.empty(1, np.uint8))
        (problem,) = checkpoint.verify().problems
    assert problem.path == "model/x/c.0"
    assert "checksum" in problem.what


def rewrite(published, stored, array=0):
    """Put other bytes in an array's only chunk, and let everything vouch for them, as a liar would."""
    root = Path(published.path)
    manifest = parse((root / "gockpt.json").read_bytes(), where="x")
    entry = manifest.arrays[array]
    (root / entry.chunk_path(0)).write_bytes(stored + crc32c(stored).to_bytes(4, "little"))
    changed = replace(entry, coded=Coded(entry.codec, (len(stored),)))
    blocks = crc32c_blocks(memoryview(stored)).tobytes()
    (root / "blocks.crc32c").write_bytes(blocks)
    files = [
        FileEntry(file.path, len(blocks), crc32c(blocks)) if file.path == "blocks.crc32c" else file
        for file in manifest.files
    ]
    content = replace(manifest, arrays=(changed,), files=tuple(files))
    (root / "gockpt.json").write_bytes(encode_manifest(content))


def zstd_claiming(nbytes):
    return struct.pack("<IBQ", 0xFD2FB528, 0b11100000, nbytes) + b"\1\0\0"


def blosc_claiming(nbytes, stored=32):
    return struct.pack("<4BIII", 2, 1, 0x94, 4, nbytes, nbytes, stored) + bytes(16)


MORE = encode("zstd", 1, bytes(9000))
LIES = {
    "zstd, far too large": (
        "zstd",
        zstd_claiming(1 << 60),
        "stand for 1152921504606846976 bytes instead of 4000",
    ),
    "zstd, one too many": ("zstd", encode("zstd", 1, bytes(4001)), "4001 bytes instead of 4000"),
    "zstd, one too few": ("zstd", encode("zstd", 1, bytes(3999)), "3999 bytes instead of 4000"),
    "zstd, no size": ("zstd", bytes.fromhex("28b52ffd0058") + b"\1\0\0", "don't say how many"),
    "zstd, no frame": ("zstd", b"what is this", "don't say how many"),
    "zstd, one byte": ("zstd", b"(", "don't say how many"),
    "zstd, cut": ("zstd", encode("zstd", 1, np.random.default_rng(0).bytes(4000))[:-9], "can't be decoded"),
    "zstd, says less than it holds": (
        "zstd",
        MORE[:5] + (4000 - 256).to_bytes(2, "little") + MORE[7:],
        "can't be",
    ),
    "blosc, far too large": ("blosc", blosc_claiming(0xFFFFFFF0), "4294967280 bytes instead of 4000"),
    "blosc, one too many": ("blosc", encode("blosc", 1, bytes(4001)), "4001 bytes instead of 4000"),
    "blosc, another length": ("blosc", blosc_claiming(4000, 33), "don't say how many"),
    "blosc, another codec": (
        "blosc",
        struct.pack("<4BIII", 2, 1, 0x14, 4, 4000, 4000, 32) + bytes(16),
        "don't say",
    ),
    "blosc, no block": ("blosc", blosc_claiming(4000), "can't be decoded"),
    "blosc, ten bytes": ("blosc", bytes(10), "don't say how many"),
    "blosc, cut": (
        "blosc",
        encode("blosc", 1, np.random.default_rng(0).bytes(4000))[:-9],
        "don't say how many",
    ),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("verify", [True, False])
def test_what_an_encoded_chunk_says_of_itself_is_not_believed(tmp_path, lie, verify):
    codec, stored, what = LIES[lie]
    published = publish(tmp_path, codec, {"x": ((4000,), "uint8", 4000, bytes(4000))})
    rewrite(published, stored)
    with open_checkpoint(published.path) as checkpoint:
        with pytest.raises(ChunkCorrupt, match="model/x/c.0.*" + what):
            checkpoint.read_into("model/x", None, np.empty(4000, np.uint8), verify=verify)
        (problem,) = checkpoint.verify().problems
    assert (problem.path, problem.array) == ("model/x/c.0", "model/x")


def test_no_memory_is_taken_for_what_a_chunk_falsely_claims(tmp_path):
    whole = 16 << 20
    published = publish(tmp_path, "zstd", {"x": ((whole,), "uint8", whole, bytes(whole))})
    rewrite(published, zstd_claiming(whole + 1))
    with open_checkpoint(published.path) as checkpoint:
        tracemalloc.start()
        try:
            with pytest.raises(ChunkCorrupt, match="16777217 bytes instead of 16777216"):
                checkpoint.read_into("model/x", Box((0,), (1,)), np.empty(1, np.uint8))
            assert tracemalloc.get_traced_memory()[1] < whole // 4
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("codec", CODECS)
def test_padding_that_is_not_zero_is_found(tmp_path, codec):
    """Nobody reads it here, but other readers would see it if the array grew."""
    made = publish(tmp_path, codec, {"x": ((7,), "uint8", 4, bytes(7))})
    stored = encode(codec, 1, b"\0\0\0\7")
    root = Path(made.path)
    manifest = parse((root / "gockpt.json").read_bytes(), where="x")
    (entry,) = manifest.arrays
    (root / entry.chunk_path(1)).write_bytes(stored + crc32c(stored).to_bytes(4, "little"))
    blocks = (root / "blocks.crc32c").read_bytes()[:4] + crc32c(stored).to_bytes(4, "little")
    (root / "blocks.crc32c").write_bytes(blocks)
    files = tuple(
        FileEntry(file.path, len(blocks), crc32c(blocks)) if file.path == "blocks.crc32c" else file
        for file in manifest.files
    )
    changed = replace(entry, coded=Coded(codec, (entry.coded.nbytes[0], len(stored))))
    (root / "gockpt.json").write_bytes(encode_manifest(replace(manifest, arrays=(changed,), files=files)))
    with open_checkpoint(made.path) as checkpoint:
        (problem,) = checkpoint.verify().problems
    assert "padding" in problem.what


@settings(deadline=None)
@given(
    st.sampled_from(CODECS),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.integers(1, 70_000),
    st.integers(1, 256),
    st.integers(0, 99),
)
def test_encoding_is_undone_by_decoding_and_bounded(codec, itemsize, nbytes, symbols, seed):
    data = np.random.default_rng(seed).integers(0, symbols, nbytes, np.uint8)
    stored = encode(codec, itemsize, data)
    assert len(stored) <= most_nbytes(nbytes)
    out = np.empty(nbytes, np.uint8)
    decode(codec, np.frombuffer(stored, np.uint8), out, where="x")
    assert out.tobytes() == data.tobytes()


@settings(deadline=None)
@given(
    st.sampled_from(CODECS),
    st.integers(1, 5000),
    st.lists(st.tuples(st.integers(0, 9999), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_damaged_bytes_are_refused_or_decoded_into_the_target_alone(codec, nbytes, damage):
    data = np.random.default_rng(nbytes).integers(0, 4, nbytes, np.uint8)
    stored = np.frombuffer(encode(codec, 4, data), np.uint8).copy()
    for at, flip in damage:
        stored[at % len(stored)] ^= flip
    room = np.full(nbytes + 64, 0x5A, np.uint8)
    with contextlib.suppress(ChunkCorrupt):
        decode(codec, stored, room[32:-32], where="x")
    assert (room[:32] == 0x5A).all()
    assert (room[-32:] == 0x5A).all()


def lie_about(change):
    entry = {
        "name": ["model", "x"],
        "path": "model/x",
        "shape": [10],
        "dtype": "uint8",
        "chunk": [4],
        "meta": {"size": 300, "crc32c": "00000007"},
        "codec": "zstd",
        "stored": [9, 9, 9],
    }
    change(entry)
    return entry


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda e: e.update(codec="lz4"), "unknown codec"),
        (lambda e: e.update(codec="numcodecs.zstd"), "unknown codec"),
        (lambda e: e.update(codec=None), "not a string"),
        (lambda e: e.update(stored=[9, 9]), "2 stored lengths for 3 chunks"),
        (lambda e: e.update(stored=[9, 9, 9, 9]), "4 stored lengths for 3 chunks"),
        (lambda e: e.update(stored=[9, 9, 0]), "encoded to 0"),
        (lambda e: e.update(stored=[9, 9, most_nbytes(4) + 1]), "encoded to 69"),
        (lambda e: e.update(stored=[9, 9, 1 << 62]), "encoded to"),
        (lambda e: e.update(stored=[9, 9, 9.0]), "not an integer"),
        (lambda e: e.update(stored=27), "not an array"),
        (lambda e: e.pop("stored"), "has the keys"),
        (lambda e: e.pop("codec"), "has the keys"),
        (lambda e: e.update(shape=[1 << 40], chunk=[1 << 40], stored=[9]), "too large to be encoded"),
        (lambda e: e.update(shape=[0], chunk=[1], stored=[]), "0 stored lengths for 0 chunks"),
    ],
)
def test_what_a_manifest_says_of_encoded_chunks_is_bounded(tmp_path, change, match):
    published = publish(tmp_path, "zstd", {"x": ((10,), "uint8", 4, bytes(10))})
    line = Path(published.path, "gockpt.json").read_bytes().splitlines()[0]
    document = json.loads(line)
    document["arrays"] = [lie_about(lambda e: None)]

    def sealed():
        text = json.dumps(document).encode() + b"\n"
        return text + b'{"crc32c": "%08x"}\n' % crc32c(text)

    parse(sealed(), where="x")
    document["arrays"] = [lie_about(change)]
    with pytest.raises(ManifestCorrupt, match=match):
        parse(sealed(), where="x")


def test_a_forked_child_encodes_and_decodes():
    """Threads of a codec that stayed behind in the parent would be waited for in vain."""
    code = (
        "import os, numpy as np\n"
        "from gockpt.storage.format.codecs import CODECS, decode, encode\n"
        "data = np.arange(1 << 22, dtype=np.uint32).view(np.uint8)\n"
        "def both_ways():\n"
        "    for codec in CODECS:\n"
        "        out = np.empty_like(data)\n"
        "        decode(codec, np.frombuffer(encode(codec, 4, data), np.uint8), out, where='x')\n"
        "        assert (out == data).all()\n"
        "both_ways()\n"
        "child = os.fork()\n"
        "both_ways()\n"
        "if not child:\n"
        "    os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("codec", CODECS)
def test_other_threads_run_while_one_encodes_or_decodes(codec):
    data = np.random.default_rng(0).integers(0, 200, 32 << 20, np.uint8)
    done = threading.Event()

    def work():
        out = np.empty_like(data)
        decode(codec, np.frombuffer(encode(codec, 2, data), np.uint8), out, where="x")
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    turns = 0
    while not done.wait(0.001):
        turns += 1
    thread.join()
    assert turns >= 5
