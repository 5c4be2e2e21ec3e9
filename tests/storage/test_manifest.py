from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gockpt.core.arena_layout import lay_out
from gockpt.core.array_spec import DTYPES, ArraySpec
from gockpt.errors import FormatTooNew, ManifestCorrupt, UnsupportedState
from gockpt.storage.format import array_paths, checksum, manifest, strict_json, zip_archive
from gockpt.storage.format.manifest import Manifest
from gockpt.storage.format.manifest_entries import ArrayEntry, FileEntry


def make(specs, *, chunk_rows=None, **fields):
    """Return a manifest of these arrays with everything in order."""
    paths = array_paths.escape_all(spec.name for spec in specs)
    arrays = []
    for layout in lay_out(specs).arrays:
        spec = layout.spec
        chunk = layout.chunk_shape
        if chunk_rows and chunk:
            chunk = (min(chunk_rows, chunk[0]), *chunk[1:])
        meta = FileEntry(f"{paths[spec.name]}/zarr.json", 300, 7)
        arrays.append(ArrayEntry(spec, paths[spec.name], chunk, meta))
    blocks = 4 * sum(array.block_count for array in arrays)
    files = tuple(
        FileEntry(path, blocks if path == manifest.BLOCKS_FILE else 10, 1)
        for path in manifest.expected_files(paths)
    )
    known = {
        "step": 1200,
        "seq": 5,
        "attempt": "ab" * 16,
        "run": "cd" * 16,
        "parent": 4,
        "exact": True,
        "created": "2025-01-01T00:00:00+00:00",
        "writer": {"gockpt": "0.1.0"},
        "attributes": {"a": [1, None, 0.5]},
    }
    return Manifest(**{**known, **fields}, arrays=tuple(arrays), files=files)


def placed(one, gap=0):
    """Return a manifest as it is in an archive, the chunks in order from the file's start."""
    at, arrays = gap, []
    for entry in one.arrays:
        offsets = []
        for chunk in range(entry.chunks):
            path, nbytes = entry.chunk_path(chunk), entry.file_nbytes(chunk)
            _, data_at = zip_archive.place(at, len(path), nbytes, aligned=True)
            offsets.append(data_at)
            at = data_at + nbytes
        arrays.append(replace(entry, at=tuple(offsets)))
    return replace(one, arrays=tuple(arrays))


SPECS = [
    ArraySpec(("model", "w"), (7, 33), "float32"),
    ArraySpec(("model", "a/b"), (), "bfloat16"),
    ArraySpec(("optimizer", "w", "exp_avg"), (0, 4), "uint8"),
]

specs = st.lists(
    st.builds(
        ArraySpec,
        name=st.tuples(
            st.sampled_from(["model", "optimizer"]), st.text(st.characters(exclude_categories=["Cs"]))
        ),
        shape=st.lists(st.integers(0, 10**5), max_size=3).map(tuple),
        dtype=st.sampled_from(list(DTYPES)),
    ),
    unique_by=lambda spec: spec.public_name,
    max_size=5,
)


@given(specs, st.none() | st.integers(1, 50), st.integers(0, 2**63 - 1), st.booleans())
def test_what_is_encoded_is_parsed_again(arrays, chunk_rows, step, exact):
    one = make(arrays, chunk_rows=chunk_rows, step=step, exact=exact, parent=None)
    data = manifest.encode(one)
    assert manifest.parse(data, where="x") == one
    assert manifest.identify(data, where="x") == manifest.Identity(step, 5, "ab" * 16)
    assert manifest.glance(data, where="x") == manifest.Identity(step, 5, "ab" * 16)


@given(specs, st.none() | st.integers(1, 50), st.integers(0, 2**50))
def test_offsets_make_version_3_and_leave_no_trace_without_them(rows, chunk_rows, gap):
    plain = make(rows, chunk_rows=chunk_rows)
    assume(all(entry.chunk_nbytes + 4 < 2**31 for entry in plain.arrays))
    one = placed(plain, gap)
    data = manifest.encode(one)
    assert manifest.parse(data, where="x") == one
    assert (b'"version":3,' in data) == bool(rows)
    arrays = tuple(replace(entry, at=None) for entry in manifest.parse(data, where="x").arrays)
    assert manifest.encode(replace(one, arrays=arrays)) == manifest.encode(plain)


LARGE = ArraySpec(("model", "x"), (40_000,), "float32")
IN_ARCHIVE = placed(make([LARGE, ArraySpec(("model", "y"), (5,), "uint8")], chunk_rows=20_000))


@pytest.mark.parametrize(
    ("at", "match"),
    [
        ([(4096, 86_016), None], "some arrays have offsets"),
        ([(4096,), (200_000,)], "1 offsets for 2 chunks"),
        ([(4096, 86_016, 200_704), (300_032,)], "3 offsets for 2 chunks"),
        ([(4096, 86_016 + 64), (200_000,)], "not aligned"),
        ([(4096, 86_016), (200_001,)], "not aligned"),
        ([(0, 86_016), (200_000,)], "no room for its header"),
        ([(4096, 4096), (200_000,)], "overlaps"),
        ([(4096, 81_920), (200_000,)], "overlaps"),
        ([(4096, 86_016), (86_016 + 64,)], "overlaps"),
        ([(4096, 86_016), (84_096,)], "overlaps"),
        ([(4096, -4096), (200_000,)], "not an integer"),
        ([(4096, 86_016.0), (200_000,)], "not an integer"),
        ([(4096, 2**63), (200_000,)], "not an integer"),
        ([4096, (200_000,)], "not an array"),
        ([{"0": 4096}, (200_000,)], "not an array"),
    ],
)
def test_offsets_that_chunks_can_not_have_are_refused(at, match):
    arrays = tuple(replace(entry, at=one) for entry, one in zip(IN_ARCHIVE.arrays, at, strict=True))
    with pytest.raises(ManifestCorrupt, match=match):
        manifest.parse(manifest.encode(replace(IN_ARCHIVE, arrays=arrays)), where="x")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.update(surprise=1), "has the keys"),
        (lambda d: d["arrays"][0].update(digest="0" * 64), "has the keys"),
        (lambda d: d["arrays"][0]["meta"].update(surprise=1), "has the keys"),
        (lambda d: d["arrays"][0].update(chunk=[20_000, 1]), "can't have chunks"),
        (lambda d: d["files"].append({"path": "more.json", "size": 1, "crc32c": "0" * 8}), "not the ones"),
    ],
)
def test_what_is_unknown_in_version_3_is_of_a_newer_gockpt(change, match):
    wide = placed(make([ArraySpec(("model", "x"), (40_000, 2), "float32")], chunk_rows=20_000))
    for one in (wide, replace(wide, arrays=(replace(wide.arrays[0], at=None),))):
        document = json.loads(manifest.encode(one).splitlines()[0])
        change(document)
        kind = FormatTooNew if one is wide else ManifestCorrupt
        with pytest.raises(kind, match=match) as caught:
            manifest.parse(sealed(json.dumps(document).encode() + b"\n"), where="/a/gockpt.json")
        assert type(caught.value) is kind
        assert ("upgrade" in str(caught.value)) == (one is wide)
        assert str(caught.value).startswith("/a/gockpt.json: ")


def test_a_chunk_too_large_for_an_archive_is_refused():
    one = make([ArraySpec(("model", "x"), (2**31 + 100,), "uint8")])
    array = replace(one.arrays[0], chunk_shape=(2**31 - 4,), at=(4096, 2**33))
    with pytest.raises(ManifestCorrupt, match="too large for an archive"):
        manifest.parse(manifest.encode(replace(one, arrays=(array,))), where="x")


@given(specs.filter(bool), st.none() | st.integers(1, 50))
def test_geometry_adds_up(arrays, chunk_rows):
    one = make(arrays, chunk_rows=chunk_rows)
    for entry in one.arrays:
        slots = entry.layout().slots if entry.chunks < 10**4 else None
        if slots is not None:
            assert len(slots) == entry.chunks
            assert sum(slot.nbytes for slot in slots) == entry.spec.nbytes
            assert sum(checksum.block_count(slot.nbytes) for slot in slots) == entry.block_count
            assert all(slot.nbytes <= entry.file_nbytes(slot.chunk) - 4 for slot in slots)
    assert one.first_blocks()[-1] == sum(entry.block_count for entry in one.arrays)


def test_the_checksum_is_of_all_bytes_before_the_last_line():
    first, last = manifest.encode(make(SPECS)).splitlines(keepends=True)
    assert last == b'{"crc32c": "%08x"}\n' % checksum.crc32c(first)
    assert json.loads(first)["arrays"][1] == {
        "name": ["model", "a/b"],
        "path": "model/a~2fb",
        "shape": [],
        "dtype": "bfloat16",
        "chunk": [],
        "meta": {"size": 300, "crc32c": "00000007"},
    }


def test_every_flipped_bit_and_every_cut_is_noticed():
    data = manifest.encode(make(SPECS[:1]))
    for at in range(len(data)):
        for bit in (0, 3, 7):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            with pytest.raises(ManifestCorrupt):
                manifest.parse(bytes(damaged), where="x")
        with pytest.raises(ManifestCorrupt):
            manifest.parse(data[:at], where="x")
    with pytest.raises(ManifestCorrupt):
        manifest.parse(data + b"\n", where="x")


def sealed(line: bytes) -> bytes:
    """Return a manifest file of any first line, with its right checksum."""
    return line + b'{"crc32c": "%08x"}\n' % checksum.crc32c(line)


def rewritten(change) -> bytes:
    document = json.loads(manifest.encode(make(SPECS, chunk_rows=3)).splitlines()[0])
    change(document)
    return sealed(json.dumps(document).encode() + b"\n")


def test_an_unchanged_document_is_accepted_whoever_wrote_it():
    assert manifest.parse(rewritten(lambda document: None), where="x") == make(SPECS, chunk_rows=3)


def put(*path_and_value):
    *path, last, value = path_and_value

    def change(document):
        for key in path:
            document = document[key]
        document[last] = value

    return change


def drop(*path):
    def change(document):
        for key in path[:-1]:
            document = document[key]
        del document[path[-1]]

    return change


WHOLE = "a shape|not an integer|instead|can't have chunks"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put("format", "zarr"), "not a gockpt manifest"),
        (put("version", 4), "version 4 is unknown .* upgrade"),
        (put("version", 1.0), "not an integer"),
        (put("version", True), "not an integer"),
        (drop("exact"), "has the keys"),
        (put("surprise", 1), "has the keys"),
        (put("step", -1), "not an integer"),
        (put("step", 1.0), "not an integer"),
        (put("step", True), "not an integer"),
        (put("step", "1"), "not an integer"),
        (put("step", 2**63), "not an integer"),
        (put("seq", None), "not an integer"),
        (put("parent", 5), "not older"),
        (put("parent", -1), "not an integer"),
        (put("attempt", "../../etc"), "hexadecimal"),
        (put("attempt", "ABCDEF00"), "hexadecimal"),
        (put("run", 5), "not a string"),
        (put("exact", 1), "neither true nor false"),
        (put("created", "yesterday"), "ISO 8601"),
        (put("created", "2025-01-01T00:00:00"), "ISO 8601"),
        (put("writer", []), "writer is not an object"),
        (put("writer", "gockpt", 1), "not a string"),
        (put("attributes", []), "attributes is not an object"),
        (put("arrays", {}), "arrays is not an array"),
        (put("arrays", 0, []), "an array is not an object"),
        (drop("arrays", 0, "chunk"), "has the keys"),
        (put("arrays", 0, "name", []), "at least one component"),
        (put("arrays", 0, "name", ["model", 3]), "not a string"),
        (put("arrays", 0, "name", ["model", "\ud800"]), "surrogate"),
        (put("arrays", 0, "name", ["a"] * 33), "at most 32"),
        (put("arrays", 0, "name", ["model", "v"]), "is at 'model/w' instead of 'model/v'"),
        (put("arrays", 0, "path", "../w"), "instead of 'model/w'"),
        (put("arrays", 0, "path", "/etc/passwd"), "instead of 'model/w'"),
        (put("arrays", 0, "path", "model/w/"), "instead of 'model/w'"),
        (put("arrays", 0, "path", "optimizer/w/exp_avg"), "instead of 'model/w'"),
        (put("arrays", 1, "name", ["model", "w"]), "both called"),
        (put("arrays", 1, "name", ["model/w"]), "both called"),
        (put("arrays", 1, "name", ["optimizer", "w"]), "at the same time holds"),
        (put("arrays", 0, "dtype", "float128"), "unknown dtype"),
        (put("arrays", 0, "dtype", ["float32"]), "not a string"),
        (put("arrays", 0, "shape", [7, 33.0]), WHOLE),
        (put("arrays", 0, "shape", [7, -33]), WHOLE),
        (put("arrays", 0, "shape", [7, True]), WHOLE),
        (put("arrays", 0, "shape", [1] * 33), "at most 32"),
        (put("arrays", 0, "shape", [2**62, 33]), "larger than 2"),
        (put("arrays", 0, "shape", [2**40, 0, 2**40]), "larger than 2|can't have"),
        (put("arrays", 0, "chunk", [3]), "can't have chunks"),
        (put("arrays", 0, "chunk", [3, 33, 1]), "can't have chunks"),
        (put("arrays", 0, "chunk", [0, 33]), "can't have chunks"),
        (put("arrays", 0, "chunk", [8, 33]), "can't have chunks"),
        (put("arrays", 0, "chunk", [3, 11]), "can't have chunks"),
        (put("arrays", 1, "chunk", [1]), "can't have chunks"),
        (put("arrays", 0, "chunk", [1, 33]), "instead of 4 for each of 8 blocks"),
        (put("arrays", 0, "meta", "size", -1), "not an integer"),
        (put("arrays", 0, "meta", "crc32c", "xyz"), "hexadecimal"),
        (put("arrays", 0, "meta", "crc32c", 7), "not a string"),
        (put("files", 0, "path", "../zarr.json"), "not the ones its arrays need"),
        (drop("files", 0), "not the ones its arrays need"),
        (put("files", 1, "path", "zarr.json"), "not the ones its arrays need"),
        (put("files", 0, "crc32c", "0" * 9), "hexadecimal"),
        (put("files", -1, "size", 5), "instead of 4 for each of 4 blocks"),
    ],
)
def test_every_rule_of_the_format_is_checked(change, match):
    with pytest.raises(ManifestCorrupt, match=match) as caught:
        manifest.parse(rewritten(change), where="/a/gockpt.json")
    assert str(caught.value).startswith("/a/gockpt.json")


def test_an_identity_needs_its_fields():
    for key in ("step", "seq", "attempt"):
        with pytest.raises(ManifestCorrupt):
            manifest.identify(rewritten(drop(key)), where="x")
        with pytest.raises(ManifestCorrupt):
            manifest.glance(rewritten(drop(key)), where="x")


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_glance_compares_the_checksum_and_parses_nothing(version):
    line = b'{"format":"gockpt","version":%d,"step":7,"seq":5,"attempt":"abababab","rubbish' % version
    assert manifest.glance(sealed(line + b"\n"), where="x") == manifest.Identity(7, 5, "abababab")
    for damaged in (line, line + b"\n", sealed(line + b"\n").replace(b"7", b"8"), sealed(line)):
        with pytest.raises(ManifestCorrupt):
            manifest.glance(damaged, where="x")
    with pytest.raises(ManifestCorrupt):
        manifest.glance(sealed(line.replace(b":%d," % version, b":4,") + b"\n"), where="x")


def test_far_too_many_chunks_cost_nothing_to_refuse():
    huge = replace(
        make(SPECS[:1]).arrays[0], spec=ArraySpec(("model", "w"), (2**50, 1), "uint8"), chunk_shape=(1, 1)
    )
    one = replace(make(SPECS[:1]), arrays=(huge,))
    with pytest.raises(ManifestCorrupt, match="chunks; at most"):
        manifest.parse(manifest.encode(one), where="x")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b"[" * 10**6 + b"\n", "nests 1000000 deep"),
        (b'{"a":' * 40 + b"1" + b"}" * 40 + b"\n", "nests 40 deep"),
        (b'{"format": "gockpt", "format": "gockpt"}\n', "given twice"),
        (b'{"format": NaN}\n', "NaN is not JSON"),
        (b'{"format": -Infinity}\n', "Infinity is not JSON"),
        (b'{"format": 1e400}\n', "out of range"),
        (b'{"format": ' + b"1" * 5000 + b"}\n", "not valid"),
        (b'{"format": "\xff"}\n', "not valid"),
        (b'\xef\xbb\xbf{"format": "gockpt"}\n', "not valid"),
        (b'{"format":\n"gockpt"}\n', "exactly one line"),
        (b'{"format": "gockpt"}', "exactly one line"),
        (b"\n", "not valid"),
        (b"null\n", "not a gockpt manifest"),
        (b'{"format": "gockpt"\n', "not valid"),
    ],
)
def test_hostile_json_is_refused(line, match):
    with pytest.raises(ManifestCorrupt, match=match):
        manifest.parse(sealed(line), where="x")


def test_json_beyond_the_limit_is_not_even_parsed():
    with pytest.raises(ManifestCorrupt, match="at most 67108864 are ever written"):
        strict_json.loads(b" " * (strict_json.MAX_BYTES + 1), what="x")


@pytest.mark.parametrize("unit", [b'"', b"\\", b'\\"', b"[", b'"\\'])
def test_looking_at_the_depth_takes_linear_time(unit):
    strict_json.nesting(b'"' + unit * 2_000_000)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text('[]{}"\\a', max_size=4), inner),
    )
)
def test_documents_come_back_as_they_were(document):
    data = strict_json.dumps(document, what="x")
    assert strict_json.loads(data, what="x") == document

    def depth(value):
        if isinstance(value, dict):
            value = list(value.values())
        return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0

    assert strict_json.nesting(data) == depth(document)


@given(st.binary(max_size=40))
def test_no_bytes_do_harm(data):
    with contextlib.suppress(ManifestCorrupt):
        strict_json.loads(data, what="x")
    for line in (data, data + b"\n"):
        with pytest.raises(ManifestCorrupt):
            manifest.parse(sealed(line), where="x")


def nested(depth):
    value: list = []
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.mark.parametrize(
    "document",
    [
        float("nan"),
        float("inf"),
        {1: 2},
        {None: 1},
        {"a": {True: 1}},
        {1, 2},
        b"bytes",
        object(),
        nested(33),
        [1j],
    ],
)
def test_what_has_no_exact_form_is_not_written(document):
    with pytest.raises(UnsupportedState):
        strict_json.dumps(document, what="x")


def test_a_document_that_holds_itself_is_not_written():
    document: list = []
    document.append(document)
    with pytest.raises(UnsupportedState):
        strict_json.dumps(document, what="x")


def test_depth_has_a_limit_that_is_met_exactly():
    data = strict_json.dumps(nested(32), what="x")
    assert strict_json.loads(data, what="x") == nested(32)
    deep = strict_json.dumps(nested(256), what="x", depth=strict_json.STATE_DEPTH)
    assert strict_json.loads(deep, what="x", depth=strict_json.STATE_DEPTH) == nested(256)
    with pytest.raises(ManifestCorrupt):
        strict_json.loads(deep, what="x")


def test_what_is_no_finite_number_is_no_metric():
    metrics = {"a": 1, "b": 0.5, "huge": 10**400, "nan": float("nan"), "text": "1", "true": True}
    assert manifest.metrics_of({"gockpt": {"metrics": metrics}}) == {"a": 1, "b": 0.5}
