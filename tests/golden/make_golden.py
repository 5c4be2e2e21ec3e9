"""Write golden checkpoints: ``python tests/golden/make_golden.py NAME ...``, into directories beside it.

What is there is never written again: checkpoints of every version that was released must load for ever. A new
version of the format gets new names. Good ones are written by the package itself; broken ones are copies of
``v1-small`` (``encoded-``: of ``v1-blosc``) with one thing changed, as their entry in ``BROKEN`` says. What a
reader must say of them stands in ``expected.json``.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from content import bits

from gockpt.core.array_spec import DTYPES, ArraySpec
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
CODECS = {"v1-zstd": "zstd", "v1-blosc": "blosc"}
STATE = {"text": "ä\n", "numbers": [1, -2.5, 2**53 - 1], "nothing": None, "deep": {"er": [[]]}}


def write(name: str) -> None:
    """Write a good one through the store."""
    layouts, data = [], {}
    for array, (shape, dtype, rows) in ARRAYS[name].items():
        spec = ArraySpec(array, shape, dtype)
        layouts.append(chunked_layout(spec, (rows, *(max(1, n) for n in shape[1:])) if shape else ()))
        data[array] = bits("/".join(array), dtype, spec.nbytes).tobytes()
    compression = Compression(CODECS.get(name), threads=1, smallest=1)
    with (
        tempfile.TemporaryDirectory() as path,
        Store(path, compression=compression) as store,
        store.begin(12, layouts, state=STATE, attributes={"golden": name}, exact=True) as transaction,
    ):
        for layout in layouts:
            at = 0
            for slot in layout.slots:
                memory = mmap.mmap(-1, slot.capacity)
                memory[: slot.nbytes] = data[layout.spec.name][at : at + slot.nbytes]
                transaction.write_chunk(layout, slot, memoryview(memory))
                at += slot.nbytes
        published = transaction.commit()
        shutil.copytree(published.path, HERE / name)


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


def damage(name: str) -> None:
    """Write one of the broken ones."""
    target = HERE / f"broken-{name}"
    shutil.copytree(HERE / ("v1-blosc" if name.startswith("encoded-") else "v1-small"), target)
    BROKEN[name](target)


if __name__ == "__main__":
    for wanted in sys.argv[1:] or [*ARRAYS, "v1-training", *(f"broken-{name}" for name in BROKEN)]:
        if (HERE / wanted).exists():
            print(f"{wanted} is there, and stays as it is")  # noqa: T201 - a script: it says what it does
        elif wanted == "v1-training":
            write_training()
        elif wanted in ARRAYS:
            write(wanted)
        else:
            damage(wanted.removeprefix("broken-"))
