from __future__ import annotations

import io
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gockpt.errors import CheckpointCorrupt
from gockpt.storage.format import zip_archive
from gockpt.storage.format.zip_archive import CentralEntry

GIB4 = 2**32

names = st.text(st.sampled_from("abz/._-~=0"), min_size=1, max_size=30)


def archive(files, *, base=0):
    """Return an archive of (name, data, aligned) from its first header on, which is at ``base``."""
    out, records, at = bytearray(), [], base
    for name, data, aligned in files:
        crc = zip_archive.archive_crc32(data)
        padding, data_at = zip_archive.place(at, len(name), len(data), aligned=aligned)
        out += zip_archive.local_header(name, len(data), crc, padding) + data
        records.append(zip_archive.central_record(name, len(data), crc, at))
        assert len(out) == data_at + len(data) - base
        assert len(records[-1]) == zip_archive.central_record_nbytes(name, at)
        at = data_at + len(data)
    directory = b"".join(records)
    return bytes(out + directory + zip_archive.end_records(len(records), at, len(directory)))


def parse(data, nbytes):
    """Return what an archive of ``nbytes``, of which ``data`` is the end, says that it holds."""
    tail = zip_archive.parse_tail(data[-zip_archive.TAIL_NBYTES :], nbytes, where="x")
    before = nbytes - len(data)
    start = tail.directory_at - before
    return tail, zip_archive.parse_directory(data[start : start + tail.directory_nbytes], tail, where="x")


FILES = [
    ("model/w/c.0.0", b"w" * 70_000, True),
    ("model/b/c", b"b" * 8, True),
    ("model/w/c.1.0", b"v" * 65_536, True),
    ("model/b/zarr.json", b"{}", False),
    ("empty", b"", False),
    ("gockpt.json", b"manifest", False),
]


def test_other_programs_read_what_the_records_describe(tmp_path):
    data = archive(FILES)
    path = tmp_path / "x.zip"
    path.write_bytes(data)
    with zipfile.ZipFile(path) as found:
        assert found.testzip() is None
        assert {name: found.read(name) for name in found.namelist()} == {n: d for n, d, _ in FILES}
        for info in found.infolist():
            assert info.date_time == (1980, 1, 1, 0, 0, 0)
            assert (info.flag_bits, info.compress_type, info.external_attr >> 16) == (0, 0, 0o100644)
    if shutil.which("unzip"):
        found = subprocess.run(["unzip", "-t", path], capture_output=True, text=True, check=False)
        assert (found.returncode, found.stderr) == (0, "")
        assert "No errors detected" in found.stdout


def test_chunks_are_aligned_and_documents_are_not():
    data = archive(FILES)
    _, entries = parse(data, len(data))
    at = {entry.name: entry.header_at for entry in entries}
    for name, content, aligned in FILES:
        if aligned:
            assert data[-len(data) :].index(content) % (4096 if len(content) >= 65_536 else 64) == 0
        else:
            start = at[name] + 30 + len(name)
            assert data[start : start + len(content)] == content


@given(st.integers(0, 2**40), st.integers(1, 2000), st.integers(0, 2**31 - 1), st.booleans())
def test_a_place_is_the_nearest_that_padding_can_reach(at, name_nbytes, nbytes, aligned):
    padding, data_at = zip_archive.place(at, name_nbytes, nbytes, aligned=aligned)
    assert data_at == at + 30 + name_nbytes + padding
    step = zip_archive.alignment(nbytes) if aligned else 1
    assert data_at % step == 0
    assert padding == 0 or 6 <= padding <= min(step + 5, zip_archive.MAX_PADDING_NBYTES)


@given(names, st.integers(0, 2**31 - 1), st.integers(0, 2**32 - 1), st.sampled_from([0, 6, 64, 4101]))
def test_a_local_header_is_what_zipfile_expects(name, nbytes, crc, padding):
    header = zip_archive.local_header(name, nbytes, crc, padding)
    assert len(header) == zip_archive.LOCAL_HEADER_NBYTES + len(name) + padding
    fields = struct.unpack_from(zipfile.structFileHeader, header)
    assert fields[0] == zipfile.stringFileHeader
    assert fields[-5:] == (crc, nbytes, nbytes, len(name), padding)
    (patched,) = struct.unpack_from("<L", header, zip_archive.LOCAL_CRC_AT)
    assert patched == crc
    if padding:
        assert struct.unpack_from("<2H", header, 30 + len(name)) == (0xD935, padding - 4)


@pytest.mark.parametrize("base", [0, GIB4 - 200_000, GIB4 - 1, GIB4, 5 * 2**40])
def test_offsets_beyond_4_gib_are_read_back(base, tmp_path):
    data = archive(FILES, base=base)
    tail, entries = parse(data, base + len(data))
    assert [entry.name for entry in entries] == [name for name, _, _ in FILES]
    start = tail.manifest_at - base
    assert data[start : start + tail.manifest.nbytes] == b"manifest"
    assert entries[-1] == tail.manifest
    if base <= 2**33:  # longer files are not for every file system, sparse or not
        path = tmp_path / "x.zip"
        with path.open("wb") as file:
            file.seek(base)
            file.write(data)
        with zipfile.ZipFile(path) as found:
            assert {name: found.read(name) for name in found.namelist()} == {n: d for n, d, _ in FILES}


def test_the_crc_of_the_central_record_is_at_its_constant_offset():
    record = zip_archive.central_record("model/w/c.0", 5, 0x01020304, GIB4)
    (found,) = struct.unpack_from("<L", record, zip_archive.CENTRAL_CRC_AT)
    assert found == 0x01020304


@pytest.fixture
def chosen_anew():
    """Choose the function that computes CRC-32s in the test, and once more after it."""
    zip_archive._crc32.cache_clear()
    yield
    zip_archive._crc32.cache_clear()


def test_without_isal_it_is_told_once_and_zlib_computes(chosen_anew, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "isal", None)
    monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    with caplog.at_level("INFO", logger="gockpt"):
        assert zip_archive.archive_crc32(b"6789", zip_archive.archive_crc32(b"12345")) == 0xCBF43926
    (record,) = caplog.records
    assert (record.levelname, "isal" in record.getMessage()) == ("INFO", True)


def test_with_isal_that_computes(chosen_anew, monkeypatch, caplog):
    calls = []
    fast = SimpleNamespace(crc32=lambda data, crc: calls.append(data) or zlib.crc32(data, crc))
    monkeypatch.setitem(sys.modules, "isal", SimpleNamespace(isal_zlib=fast))
    monkeypatch.setitem(sys.modules, "isal.isal_zlib", fast)
    with caplog.at_level("INFO", logger="gockpt"):
        assert zip_archive.archive_crc32(b"123456789") == 0xCBF43926
    assert (calls, caplog.records) == ([b"123456789"], [])


@given(st.binary(max_size=200), st.integers(0, 2**32 - 1))
def test_it_is_the_crc_32_of_zlib(data, crc):
    assert zip_archive.archive_crc32(memoryview(data), crc) == zlib.crc32(data, crc)


def test_an_entry_is_found_by_its_name_alone():
    names = ["a/zarr.json", "zarr.json", "PK\1\2", "b/zarr.json", "ar.json"]
    directory = b"".join(zip_archive.central_record(name, n, n, n) for n, name in enumerate(names))
    for n, name in enumerate(names):
        assert zip_archive.find_entry(directory, name) == CentralEntry(name, n, n, n)
    for name in ("", "json", "zarr.jso", "a/zarr.json/b", "é"):
        assert zip_archive.find_entry(directory, name) is None
    assert zip_archive.find_entry(directory + directory, "zarr.json").nbytes == 1
    damaged = directory.replace(b"PK\1\2", b"PK\1\3", 2)
    assert zip_archive.find_entry(damaged, "zarr.json") is None


def test_the_tail_is_found_by_its_length_alone():
    assert zip_archive.TAIL_NBYTES == 69 + 98
    data = archive([("gockpt.json", b"m", False)])
    assert len(zip_archive.central_record("gockpt.json", 1, 0, 0)) == 69
    tail, entries = parse(data, len(data))
    assert entries == [CentralEntry("gockpt.json", 1, zip_archive.archive_crc32(b"m"), 0)]
    assert tail.manifest_at == 41


def test_every_flipped_bit_of_the_directory_and_the_end_is_noticed_or_changes_what_is_found():
    data = archive(FILES)
    tail, entries = parse(data, len(data))
    for at in range(tail.directory_at, len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[at] ^= 1 << bit
            try:
                found = parse(bytes(broken), len(data))
            except CheckpointCorrupt:
                continue
            assert found != (tail, entries)


@pytest.mark.parametrize("nbytes", [0, 1, 97, 98, 166, 167, 1000])
def test_what_is_no_archive_is_refused(nbytes):
    data = bytes(nbytes)
    with pytest.raises(CheckpointCorrupt, match="x"):
        zip_archive.parse_tail(data[-zip_archive.TAIL_NBYTES :], nbytes, where="x")


def test_an_archive_of_another_program_is_refused():
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for name, data, _ in FILES:
            file.writestr(name, data)
    data = made.getvalue()
    with pytest.raises(CheckpointCorrupt, match="no archive"):
        zip_archive.parse_tail(data[-zip_archive.TAIL_NBYTES :], len(data), where="x")


def test_gockpt_json_must_come_last():
    data = archive([FILES[-1], FILES[0]])
    with pytest.raises(CheckpointCorrupt, match="x"):
        parse(data, len(data))


def test_a_name_must_not_come_twice():
    data = archive([FILES[0], FILES[0], FILES[-1]])
    with pytest.raises(CheckpointCorrupt, match="twice"):
        parse(data, len(data))


def test_the_directory_must_fit_the_tail():
    data = archive(FILES)
    tail, _ = parse(data, len(data))
    directory = data[tail.directory_at : tail.directory_at + tail.directory_nbytes]
    with pytest.raises(CheckpointCorrupt, match="longer than its 6 records"):
        zip_archive.parse_directory(directory + b"x", tail, where="x")
    with pytest.raises(CheckpointCorrupt, match="record 6 of the central directory"):
        zip_archive.parse_directory(directory, replace(tail, entries=7), where="x")
    other = replace(tail, manifest=replace(tail.manifest, crc32=0))
    with pytest.raises(CheckpointCorrupt, match="not the last entry"):
        zip_archive.parse_directory(directory, other, where="x")


def test_an_entry_must_not_reach_into_the_directory():
    data = bytearray(archive([("a", b"1234", False), FILES[-1]]))
    tail, _ = parse(bytes(data), len(data))
    record = zip_archive.central_record("a", 400, 0, 0)
    data[tail.directory_at : tail.directory_at + len(record)] = record
    with pytest.raises(CheckpointCorrupt, match="beyond"):
        parse(bytes(data), len(data))


@given(st.binary(max_size=300))
def test_no_bytes_do_harm(data):
    with pytest.raises(CheckpointCorrupt):
        parse(data, len(data))
    tail = zip_archive.Tail(7, 0, len(data), CentralEntry("gockpt.json", 1, 2, 3), 44)
    with pytest.raises(CheckpointCorrupt):
        zip_archive.parse_directory(data, tail, where="x")
