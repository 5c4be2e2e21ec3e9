"""An archive made to do harm gets a clear error, at once, before any memory is set aside for it."""

from __future__ import annotations

import json
import os
import socket
import struct
import tracemalloc
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest

from gockpt.errors import CheckpointCorrupt, ManifestCorrupt
from gockpt.storage.format import zip_archive
from gockpt.storage.format.checksum import crc32c
from gockpt.storage.read.find import list_checkpoints, open_checkpoint

ARRAYS = {("model", "w"): ((8, 4), "float32"), ("large",): ((200, 100), "float32"), ("s",): ((), "int64")}
CHUNK, LARGE = "model/w/c.0.0", "large/c.0.0"


@contextmanager
def hardly_any_memory():
    """Fail if what runs inside allocates more than 16 MiB at a time, arrays included."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


@dataclass
class Archive:
    """An archive in parts, each of which a case may change.

    Attributes:
        data: Bytes of each entry.
        headers: Local header of each, with its padding.
        records: Central record of each.
        at: Offset of each one's local header.
        end: Changes of the numbers in the end records: entries, offset and length of the directory.
        before: Bytes in front of everything.
        behind: Bytes behind everything.
        hole: Bytes of a hole at the begin of the central directory.
    """

    data: dict[str, bytes]
    headers: dict[str, bytes] = field(default_factory=dict)
    records: dict[str, bytes] = field(default_factory=dict)
    at: dict[str, int] = field(default_factory=dict)
    end: dict[str, int] = field(default_factory=dict)
    before: bytes = b""
    behind: bytes = b""
    hole: int = 0

    def lay_out(self):
        for parts in (self.headers, self.records, self.at):
            parts.clear()
        at = 0
        for name, data in self.data.items():
            crc = zlib.crc32(data)
            padding, data_at = zip_archive.place(at, len(name), len(data), aligned=is_chunk(name))
            self.headers[name] = zip_archive.local_header(name, len(data), crc, padding)
            self.records[name] = zip_archive.central_record(name, len(data), crc, at)
            self.at[name] = at
            at = data_at + len(data)

    def document(self):
        return json.loads(self.data["gockpt.json"].splitlines()[0])

    def seal(self, document):
        """Let the archive have another manifest."""
        line = json.dumps(document, separators=(",", ":")).encode() + b"\n"
        self.data["gockpt.json"] = line + b'{"crc32c": "%08x"}\n' % crc32c(line)
        self.lay_out()

    def record(self, name, *, header_at=None, **fields):
        """Let a central record say something else."""
        places = {
            "version": 6,
            "flags": 8,
            "method": 10,
            "time": 12,
            "crc": 16,
            "size": 20,
            "whole": 24,
            "disk": 34,
        }
        record = bytearray(self.records[name])
        for key, value in fields.items():
            form = "<L" if key in ("crc", "size", "whole") else "<H"
            struct.pack_into(form, record, places[key], value)
        if header_at is not None:
            struct.pack_into("<L", record, 42, header_at)
        self.records[name] = bytes(record)

    def header(self, name, **fields):
        """Let a local header say something else."""
        places = {"flags": 6, "method": 8, "crc": 14, "size": 18, "whole": 22}
        header = bytearray(self.headers[name])
        for key, value in fields.items():
            struct.pack_into("<L" if key in ("crc", "size", "whole") else "<H", header, places[key], value)
        self.headers[name] = bytes(header)

    def write(self, path):
        body = self.before + b"".join(self.headers[name] + self.data[name] for name in self.data)
        directory = b"".join(self.records.values())
        numbers = {
            "entries": len(self.records),
            "directory_at": len(body),
            "directory_nbytes": self.hole + len(directory),
        }
        with path.open("wb") as file:
            file.write(body)
            file.seek(self.hole, os.SEEK_CUR)
            file.write(directory + zip_archive.end_records(**(numbers | self.end)) + self.behind)


def is_chunk(name):
    return name.rpartition("/")[2].split(".")[0] == "c"


@pytest.fixture
def parts(write, zips, tmp_path):
    written = write(tmp_path / "made", ARRAYS, state={"lr": 0.1})
    contents = zips.contents(written.path)
    sealed = zips.of(contents)  # with the offsets of the chunks in the manifest
    tail = zip_archive.parse_tail(sealed[-zip_archive.TAIL_NBYTES :], len(sealed), where="x")
    contents["gockpt.json"] = sealed[tail.manifest_at :][: tail.manifest.nbytes]
    order = sorted(contents, key=lambda name: (name == "gockpt.json", not is_chunk(name)))
    archive = Archive({name: contents[name] for name in order})
    archive.lay_out()
    return archive, written


def at_of(change):
    """Change the offsets of the first array in the manifest."""

    def apply(archive):
        document = archive.document()
        entry = document["arrays"][0]
        entry["at"] = change(entry["at"], document["arrays"][1]["at"])
        archive.seal(document)

    return apply


def extra(name, data=b"x"):
    """Add an entry in front of the manifest."""

    def apply(archive):
        last = archive.data.pop("gockpt.json")
        archive.data[name] = data
        archive.data["gockpt.json"] = last
        archive.lay_out()

    return apply


def renamed(old, new):
    """Give an entry another name, in its header and its record."""

    def apply(archive):
        at = archive.at[old]
        for parts, start in ((archive.headers, 30), (archive.records, 46)):
            raw = parts[old]
            assert len(new) == len(old)
            parts[old] = raw[:start] + new + raw[start + len(new) :]
        assert archive.at[old] == at

    return apply


def many_entries(archive):
    archive.end["entries"] = 10**6
    archive.hole = 10**6 * 57


def long_directory(archive):
    archive.hole = 1 << 40


def long_manifest(nbytes):
    def apply(archive):
        archive.record("gockpt.json", size=nbytes, whole=nbytes)

    return apply


def gap(archive):
    """Put bytes between two entries that belong to none; all offsets are right."""
    name = "zarr.json"
    first = dict(list(archive.data.items())[: list(archive.data).index(name)])
    last = max(first, key=lambda one: archive.at[one])
    shift = 32
    for moved in list(archive.data)[list(archive.data).index(name) :]:
        nbytes, crc = len(archive.data[moved]), zlib.crc32(archive.data[moved])
        archive.records[moved] = zip_archive.central_record(moved, nbytes, crc, archive.at[moved] + shift)
    archive.data[last] += b"between the entries, 32 bytes...."[:shift]


def twice(archive):
    archive.records["state.json"] = archive.records["zarr.json"]


CASES = {
    # refused when it is opened
    "nothing": ("open", None, b""),
    "bytes behind the end": ("open", lambda a: setattr(a, "behind", b"\0")),
    "bytes before the begin": ("open", lambda a: setattr(a, "before", bytes(64))),
    "no entries": ("open", lambda a: a.end.update(entries=0)),
    "more entries than fit": ("open", lambda a: a.end.update(entries=10**6)),
    "a directory elsewhere": ("open", lambda a: a.end.update(directory_at=0)),
    "a directory of nothing": ("open", lambda a: a.end.update(directory_nbytes=0)),
    "a directory longer than the file": ("open", lambda a: a.end.update(directory_nbytes=1 << 40)),
    "a manifest of 2 GiB": ("open", long_manifest(1 << 31)),
    "a manifest of 1 GiB": ("open", long_manifest(1 << 30)),
    "a manifest of no bytes": ("open", long_manifest(0)),
    "a deflated manifest": ("open", lambda a: a.record("gockpt.json", method=8)),
    "an encrypted manifest": ("open", lambda a: a.record("gockpt.json", flags=1)),
    "a manifest on another disk": ("open", lambda a: a.record("gockpt.json", disk=1)),
    "a chunk at a fraction of a page": ("open", at_of(lambda own, _: [own[0] + 1])),
    "a chunk at the place of another": ("open", at_of(lambda _, other: other)),
    "a chunk at the begin": ("open", at_of(lambda *_: [0])),
    "a chunk before the begin": ("open", at_of(lambda *_: [-4096])),
    "a chunk at 2**63": ("open", at_of(lambda *_: [1 << 63])),
    "two places for one chunk": ("open", at_of(lambda own, _: own * 2)),
    "countless places for one chunk": ("open", at_of(lambda own, _: own * 10**5)),
    # refused when it is read
    "a chunk far behind the end": ("load", at_of(lambda *_: [1 << 62])),
    "a chunk over the manifest": ("load", at_of(lambda *_: [1 << 17])),
    "a million entries": ("load", many_entries),
    "a directory of terabytes": ("load", long_directory),
    "an entry too few": ("load", lambda a: a.records.pop("s/zarr.json")),
    "an entry too many": ("load", extra("more.json")),
    "an entry for a directory": ("load", extra("model/", b"")),
    "a name out of the tree": ("load", extra("../../out")),
    "an absolute name": ("load", extra("/etc/passwd")),
    "the state twice and no root": ("load", twice),
    "a deflated state": ("load", lambda a: a.record("state.json", method=8)),
    "a bomb": ("load", lambda a: a.record("state.json", method=8, whole=0xFFFFFFFE)),
    "a state of 1 GiB": ("load", lambda a: a.record("state.json", size=1 << 30, whole=1 << 30)),
    "an encrypted state": ("load", lambda a: a.record("state.json", flags=1)),
    "a state with a data descriptor": ("load", lambda a: a.record("state.json", flags=8)),
    "a state at another place": ("load", lambda a: a.record("state.json", header_at=0)),
    "a state behind the end": ("load", lambda a: a.record("state.json", header_at=0x7FFFFFFF)),
    "blocks under another name": ("load", renamed("blocks.crc32c", b"blocks.crc32d")),
    # told by a verification
    "a deflated chunk": ("verify", lambda a: a.record(CHUNK, method=8)),
    "a chunk of another length": ("verify", lambda a: a.record(CHUNK, size=1, whole=1)),
    "a chunk of two lengths": ("verify", lambda a: a.record(CHUNK, size=1)),
    "a chunk at another place": ("verify", lambda a: a.record(CHUNK, header_at=64)),
    "a chunk with another CRC-32": ("verify", lambda a: (a.record(CHUNK, crc=1), a.header(CHUNK, crc=1))),
    "a chunk whose records differ": ("verify", lambda a: a.header(CHUNK, crc=1)),
    "a chunk whose header says another length": ("verify", lambda a: a.header(LARGE, size=1 << 30)),
    "a chunk whose header says deflated": ("verify", lambda a: a.header(LARGE, method=8)),
    "a chunk under another name": ("verify", renamed(CHUNK, b"model/w/c.1.0")),
    "a chunk under a name out of the tree": ("verify", renamed(CHUNK, b"../../../outs")),
    "a chunk under a name with a NUL": ("verify", renamed(CHUNK, b"model/w/\0.0.0")),
    "a chunk under a name that is not ASCII": ("verify", renamed(CHUNK, b"model/w/\xff.0.0")),
    "a chunk of another version": ("verify", lambda a: a.record(CHUNK, version=46)),
    "a chunk of another day": ("verify", lambda a: a.record(CHUNK, time=1)),
    "a chunk on another disk": ("verify", lambda a: a.record(CHUNK, disk=1)),
    "bytes between the entries": ("verify", gap),
}


def refusal(path, right):
    """Return at which stage the archive is refused; what is loaded before that must be right."""
    try:
        stored = open_checkpoint(path, threads=1)
    except ManifestCorrupt:
        return "open"
    with stored:
        try:
            stored.state()
            for name, array in stored.arrays.items():
                out = np.empty(array.spec.nbytes, np.uint8)
                stored.read_into(name, None, out)
                assert out.tobytes() == right[name].tobytes()
        except CheckpointCorrupt:
            assert not stored.verify().ok
            return "load"
        return "nowhere" if stored.verify().ok else "verify"


@pytest.mark.parametrize("case", CASES)
def test_an_archive_that_lies_is_refused(parts, case, tmp_path):
    archive, written = parts
    stage, change, *content = CASES[case]
    path = tmp_path / "ckpts" / "step-0000000007.zip"
    path.parent.mkdir()
    if content:
        path.write_bytes(content[0])
    else:
        change(archive)
        archive.write(path)
    before = set(os.listdir("/proc/self/fd"))
    with hardly_any_memory():
        assert refusal(path, written.values) == stage
        listed = list_checkpoints(path.parent)
    assert len(listed) == (stage != "open")
    assert set(os.listdir("/proc/self/fd")) == before


def test_the_archive_without_a_change_is_right(parts, tmp_path):
    archive, written = parts
    archive.write(tmp_path / "a.zip")
    assert refusal(tmp_path / "a.zip", written.values) == "nowhere"


@pytest.mark.parametrize("nbytes", [1, 98, 167, 168, 4096, 20_000])
def test_an_archive_that_is_cut_is_refused(parts, nbytes, tmp_path):
    archive, written = parts
    archive.write(tmp_path / "a.zip")
    os.truncate(tmp_path / "a.zip", os.path.getsize(tmp_path / "a.zip") - nbytes)
    assert refusal(tmp_path / "a.zip", written.values) == "open"


@pytest.mark.parametrize("place", ["fifo", "socket", "device", "directory without a manifest"])
def test_what_is_no_file_under_an_archives_name_is_refused(place, tmp_path):
    path = tmp_path / "step-0000000007.zip"
    if place == "fifo":
        os.mkfifo(path)
    elif place == "socket":
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(str(path))
    elif place == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    assert list_checkpoints(tmp_path) == []
