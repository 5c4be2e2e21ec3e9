"""Write golden checkpoints: ``make_golden.py NAME ...``, into directories and archives beside it.

What is there is never written again: checkpoints of every version that was released must load for ever. A new
version of the format gets new names; ``v3-*`` are archives. Good ones are written by the package itself.
Broken ones are copies of ``v1-small`` (``encoded-``: of ``v1-blosc``; ``archive-``: of ``v3-small.zip``) with
one thing changed, as their entry in ``BROKEN`` or ``BROKEN_ARCHIVES`` says. What a reader must say of them
stands in ``expected.json``.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from content import bits

from gockpt.core.array_spec import DTYPES, ArraySpec
from gockpt.storage.format import zip_archive
from gockpt.storage.format.checksum import crc32c
from gockpt.storage.format.chunk_grid import chunked_layout
from gockpt.storage.local.compression import Compression
from gockpt.storage.local.store import Store

HERE = Path(__file__).parent
EXTENSIONS = [name for name, dtype in DTYPES.items() if not dtype.core]

# Name to (shape, dtype, rows of a chunk).
ARRAYS = {
    "v1-dtypes": {
        **{("model", f"matrix.{dtype}"): ((3, 2), dtype, 3) for dtype in DTYPES},
        **{("model", f"scalar.{dtype}"): ((), dtype, 1) for dtype in ("float32", "int64", *EXTENSIONS)},
        ("model", "empty"): ((0, 4), "float32", 1),
        ("model", "hollow"): ((2, 0, 3), "bfloat16", 2),
    },
    "v1-chunks": {
        ("model", "even"): ((6, 3), "float32", 2),
        ("model", "padded"): ((7, 2, 2), "int16", 3),
        ("model", "Case"): ((4,), "uint8", 4),
        ("model", "case"): ((4,), "uint8", 3),
        ("extra", "a/b ä~", "c"): ((5,), "float64", 2),
        ("extra", "x" * 150 + "ä" * 30): ((1,), "int8", 1),
    },
    "v1-zstd": {
        **{("model", f"matrix.{dtype}"): ((3, 2), dtype, 2) for dtype in DTYPES},
        ("model", "scalar"): ((), "float32", 1),
        ("model", "empty"): ((0, 4), "float32", 1),
    },
    "v1-blosc": {
        **{("model", f"matrix.{dtype}"): ((3, 2), dtype, 2) for dtype in DTYPES},
        ("model", "long"): ((300,), "int64", 200),
        ("model", "scalar"): ((), "float32", 1),
    },
    "v1-small": {("model", "w"): ((3, 2), "float32", 2), ("s",): ((), "int64", 1)},
}
ARRAYS |= {f"v3-{kind}.zip": ARRAYS[f"v1-{kind}"] for kind in ("dtypes", "chunks", "blosc", "small")}
ARRAYS["v3-large.zip"] = ARRAYS["v1-small"] | {("model", "large"): ((17_000,), "float32", 17_000)}
CODECS = {"v1-zstd": "zstd", "v1-blosc": "blosc", "v3-blosc.zip": "blosc"}
STATE = {"text": "ä\n", "numbers": [1, -2.5, 2**53 - 1], "nothing": None, "deep": {"er": [[]]}}


def write(name: str) -> None:
    """Write a good one through the store."""
    layouts, data = [], {}
    for array, (shape, dtype, rows) in ARRAYS[name].items():
        spec = ArraySpec(array, shape, dtype)
        layouts.append(chunked_layout(spec, (rows, *(max(1, n) for n in shape[1:])) if shape else ()))
        data[array] = bits("/".join(array), dtype, spec.nbytes).tobytes()
    compression = Compression(CODECS.get(name), threads=1, smallest=1)
    layout = "file" if name.endswith(".zip") else "directory"
    with (
        tempfile.TemporaryDirectory() as path,
        Store(path, compression=compression, layout=layout) as store,
        store.begin(12, layouts, state=STATE, attributes={"golden": name}, exact=True) as transaction,
    ):
        for one in layouts:
            at = 0
            for slot in one.slots:
                memory = mmap.mmap(-1, slot.capacity)
                memory[: slot.nbytes] = data[one.spec.name][at : at + slot.nbytes]
                transaction.write_chunk(one, slot, memoryview(memory))
                at += slot.nbytes
        published = transaction.commit()
        copy(Path(published.path), HERE / name)


def copy(source: Path, target: Path) -> None:
    """Copy a directory or an archive."""
    shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)


def write_training() -> None:
    """Write one as a training run does, with every kind of extra."""
    import training

    import gockpt

    with tempfile.TemporaryDirectory() as path:
        model, optimizer = training.build()
        training.fill(model, optimizer)
        training.seed()
        saved = gockpt.save_overlapped(model, optimizer, path, step=12, extra=training.extras()).result()
        shutil.copytree(saved.path, HERE / "v1-training")


# -- broken ones -------------------------------------------------------------------------------------


def seal(path: Path, line: bytes) -> None:
    """Write a manifest from one line of text, with the checksum it should have."""
    (path / "gockpt.json").write_bytes(line + b'{"crc32c": "%08x"}\n' % crc32c(line))


def edit(change):
    """Change the manifest's object and seal it again."""

    def apply(path: Path) -> None:
        document = json.loads((path / "gockpt.json").read_bytes().splitlines()[0])
        change(document)
        seal(path, json.dumps(document, separators=(",", ":")).encode() + b"\n")

    return apply


def flip(name: str, at: int):
    """Flip one bit."""

    def apply(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[at] ^= 4
        (path / name).write_bytes(data)

    return apply


def cut(name: str, nbytes: int):
    """Leave out the end of a file."""

    def apply(path: Path) -> None:
        os.truncate(path / name, (path / name).stat().st_size - nbytes)

    return apply


def swap(one: str, other: str):
    """Let two files change places."""

    def apply(path: Path) -> None:
        first, second = (path / one).read_bytes(), (path / other).read_bytes()
        (path / one).write_bytes(second)
        (path / other).write_bytes(first)

    return apply


def lie(path: Path) -> None:
    """Let an array's Zarr document, and with it the manifest's checksum, say another type."""
    name = path / "model/w/zarr.json"
    text = name.read_bytes().replace(b"float32", b"int32")
    name.write_bytes(text)
    meta = {"size": len(text), "crc32c": f"{crc32c(text):08x}"}
    edit(lambda d: d["arrays"][0].update(meta=meta))(path)


def dirty(path: Path) -> None:
    """Put something behind the last row, with the right checksum behind it."""
    name = path / "model/w/c.1.0"
    data = name.read_bytes()[:8] + b"stowaway"
    name.write_bytes(data + crc32c(data).to_bytes(4, "little"))


def grow(name: str):
    """Let a chunk be one byte longer than it is encoded to, and the manifest and the file agree on that."""

    def apply(path: Path) -> None:
        data = (path / name).read_bytes()[:-4] + b"\0"
        (path / name).write_bytes(data + crc32c(data).to_bytes(4, "little"))
        edit(lambda d: d["arrays"][-2]["stored"].__setitem__(1, len(data)))(path)

    return apply


BROKEN = {
    "manifest-cut": cut("gockpt.json", 30),
    "manifest-flipped": flip("gockpt.json", 100),
    "manifest-missing": lambda path: (path / "gockpt.json").unlink(),
    "manifest-of-a-later-version": edit(lambda d: d.update(version=1000)),
    "manifest-key-missing": edit(lambda d: d.pop("exact")),
    "manifest-key-twice": lambda path: seal(path, b'{"format":"gockpt","format":"gockpt"}\n'),
    "manifest-path-out": edit(lambda d: d["arrays"][0].update(path="../../w")),
    "manifest-terabytes": edit(lambda d: d["arrays"][0].update(shape=[1 << 40, 2], chunk=[1 << 40, 2])),
    "manifest-overflow": edit(lambda d: d["arrays"][0].update(shape=[1 << 62, 2], chunk=[1 << 62, 2])),
    "state-flipped": flip("state.json", 3),
    "state-missing": lambda path: (path / "state.json").unlink(),
    "blocks-flipped": flip("blocks.crc32c", 5),
    "chunk-flipped": flip("model/w/c.0.0", 7),
    "chunk-cut": cut("model/w/c.0.0", 1),
    "chunk-missing": lambda path: (path / "model/w/c.1.0").unlink(),
    "chunks-swapped": swap("model/w/c.0.0", "model/w/c.1.0"),
    "padding-dirty": dirty,
    "document-flipped": flip("model/w/zarr.json", 20),
    "document-lies": lie,
    "encoded-flipped": flip("model/long/c.0", 30),
    "encoded-cut": cut("model/long/c.0", 1),
    "encoded-length-lies": grow("model/long/c.1"),
    "encoded-codec-lies": edit(lambda d: d["arrays"][-2].update(codec="zstd")),
    "encoded-codec-unknown": edit(lambda d: d["arrays"][-2].update(codec="lzma")),
    "file-too-many": lambda path: (path / "model/w/c.2.0").write_bytes(b""),
}


# -- broken archives --------------------------------------------------------------------------------


def flip_at(find):
    """Flip one bit at the offset that ``find`` returns for the archive's bytes."""

    def apply(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[find(bytes(data))] ^= 4
        path.write_bytes(data)

    return apply


def header_of(name: bytes):
    """Return a function that finds the local header of an entry."""
    return lambda data: data.index(name) - 30


def record_of(name: bytes):
    """Return a function that finds the central record of an entry."""
    return lambda data: data.rindex(name) - 46


def remake(change):
    """Change the manifest's object, and write it, the central directory and the end again."""

    def apply(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            document = json.loads(archive.read("gockpt.json").splitlines()[0])
        change(document)
        line = json.dumps(document, separators=(",", ":")).encode() + b"\n"
        manifest = line + b'{"crc32c": "%08x"}\n' % crc32c(line)
        at = infos[-1].header_offset
        infos[-1].CRC, infos[-1].file_size = zip_archive.archive_crc32(manifest), len(manifest)
        entries = [(one.filename, one.file_size, one.CRC, one.header_offset) for one in infos]
        directory = b"".join(zip_archive.central_record(*entry) for entry in entries)
        header = zip_archive.local_header(*entries[-1][:3], 0)
        directory_at = at + len(header) + len(manifest)
        end = zip_archive.end_records(len(entries), directory_at, len(directory))
        path.write_bytes(path.read_bytes()[:at] + header + manifest + directory + end)

    return apply


def deflate(path: Path) -> None:
    """Let another program write the archive anew, compressed."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(zipfile.ZipInfo(name), data)


CHUNK = b"model/w/c.0.0"
BROKEN_ARCHIVES = {
    "cut": lambda path: os.truncate(path, path.stat().st_size - 30),
    "end-flipped": flip_at(lambda data: len(data) - 60),
    "chunk-flipped": flip_at(lambda data: 66),
    "padding-flipped": flip_at(lambda data: header_of(CHUNK)(data) + 30 + len(CHUNK) + 10),
    "header-flipped": flip_at(lambda data: header_of(CHUNK)(data) + 10),
    "record-flipped": flip_at(lambda data: record_of(CHUNK)(data) + zip_archive.CENTRAL_CRC_AT),
    "of-another-program": deflate,
    "offset-overlaps": remake(lambda d: d["arrays"][0].update(at=d["arrays"][0]["at"][:1] * 2)),
    "offset-lies": remake(lambda d: d["arrays"][0]["at"].reverse()),
    "offset-beyond": remake(lambda d: d["arrays"][0]["at"].__setitem__(1, 1 << 40)),
    "without-offsets": remake(lambda d: [d.update(version=1), *(one.pop("at") for one in d["arrays"])]),
    "key-unknown": remake(lambda d: d["arrays"][0].update({"from": "sha256:00"})),
}


def damage(name: str) -> None:
    """Write one of the broken ones."""
    target = HERE / f"broken-{name}"
    if name.startswith("archive-"):
        shutil.copyfile(HERE / "v3-small.zip", target)
        BROKEN_ARCHIVES[name.removeprefix("archive-").removesuffix(".zip")](target)
        return
    shutil.copytree(HERE / ("v1-blosc" if name.startswith("encoded-") else "v1-small"), target)
    BROKEN[name](target)


if __name__ == "__main__":
    broken = [*BROKEN, *(f"archive-{name}.zip" for name in BROKEN_ARCHIVES)]
    for wanted in sys.argv[1:] or [*ARRAYS, "v1-training", *(f"broken-{name}" for name in broken)]:
        if (HERE / wanted).exists():
            print(f"{wanted} is there, and stays as it is")  # noqa: T201 - a script: it says what it does
        elif wanted == "v1-training":
            write_training()
        elif wanted in ARRAYS:
            write(wanted)
        else:
            damage(wanted.removeprefix("broken-"))
