"""Checkpoints for the reader's tests, put together by hand: plain files, no Store.

So a test can leave out, distort or invent any part of one, and the reader is not tested against a
writer that might share its mistakes.
"""

from __future__ import annotations

import math
import shutil
import zlib
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gockpt.core.array_spec import DTYPES, ArraySpec
from gockpt.storage.format import array_paths, strict_json, zarr_metadata, zip_archive
from gockpt.storage.format.checksum import BLOCK, crc32c
from gockpt.storage.format.chunk_grid import chunk_key
from gockpt.storage.format.manifest import Manifest, encode, parse
from gockpt.storage.format.manifest_entries import ArrayEntry, FileEntry

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHAPES = {
    "vector": (7,),
    "matrix": (9, 5),
    "tall": (5, 2, 3),
    "four": (3, 2, 2, 3),
    "scalar": (),
    "empty": (0, 4),
    "hollow": (3, 0, 2),
    "one": (1,),
}


@dataclass(frozen=True)
class Written:
    """A checkpoint on disk and what it should hold.

    Attributes:
        path: Its directory.
        values: Public name to the array's elements as bytes, ``shape + (itemsize,)``.
        manifest: What its manifest says.
    """

    path: Path
    values: dict[str, np.ndarray]
    manifest: Manifest


def element_bytes(spec: ArraySpec, seed: int) -> np.ndarray:
    """Return random bits for every element; booleans are 0 or 1."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (*spec.shape, spec.itemsize), dtype=np.uint8)
    return data & 1 if spec.dtype == "bool" else data


def write_checkpoint(
    parent: Path,
    arrays: dict[tuple[str, ...], tuple[tuple[int, ...], str]],
    *,
    step: int = 7,
    seq: int = 1,
    attempt: str = "00000001",
    chunk_rows: int | None = None,
    state: dict[str, Any] | None = None,
    attributes: dict[str, Any] | None = None,
    directory: str | None = None,
    distort: Callable[[Manifest], Manifest] = lambda manifest: manifest,
) -> Written:
    """Write one complete checkpoint, file by file, the manifest last and perhaps distorted."""
    root = parent / (directory or f"step-{step:010d}")
    root.mkdir(parents=True)
    paths = array_paths.escape_all(arrays)
    texts, entries, values, blocks, dtypes = {}, [], {}, bytearray(), []
    for number, (name, (shape, dtype)) in enumerate(arrays.items()):
        spec = ArraySpec(name, shape, dtype)
        dtypes.append(dtype)
        data = values[spec.public_name] = element_bytes(spec, number)
        rows = min(chunk_rows or 1 << 60, max(1, shape[0])) if shape else 1
        chunk = (rows, *(max(1, n) for n in shape[1:])) if shape else ()
        folder = root / paths[name]
        folder.mkdir(parents=True)
        texts[paths[name]] = text = zarr_metadata.dump(zarr_metadata.array_document(spec, chunk))
        (folder / "zarr.json").write_bytes(text)
        meta = FileEntry(f"{paths[name]}/zarr.json", len(text), crc32c(text))
        entries.append(ArrayEntry(spec, paths[name], chunk, meta))
        whole = math.prod(chunk) * spec.itemsize
        for index in range(entries[-1].chunks):
            real = data[index * rows : (index + 1) * rows].tobytes() if shape else data.tobytes()
            padded = real + bytes(whole - len(real))
            (folder / chunk_key(index, len(shape))).write_bytes(padded + crc32c(padded).to_bytes(4, "little"))
            for at in range(0, len(real), BLOCK):
                blocks += crc32c(real[at : at + BLOCK]).to_bytes(4, "little")
    groups = ["/".join(paths[name].split("/")[:depth]) for name in paths for depth in range(1, len(name))]
    metadata = zarr_metadata.consolidated(groups=sorted(set(groups)), arrays=texts, dtypes=dtypes)
    files = {f"{group}/zarr.json": zarr_metadata.dump(zarr_metadata.group_document()) for group in groups}
    files["zarr.json"] = zarr_metadata.root(attributes or {}, metadata)
    files["state.json"] = strict_json.dumps(state or {}, what="state.json", depth=strict_json.STATE_DEPTH)
    files["blocks.crc32c"] = bytes(blocks)
    for path, text in files.items():
        (root / path).write_bytes(text)
    manifest = Manifest(
        step=step,
        seq=seq,
        attempt=attempt,
        run="0" * 32,
        parent=None,
        exact=True,
        created="2026-01-01T00:00:00+00:00",
        writer={"gockpt": "0.1.0"},
        attributes=attributes or {},
        arrays=tuple(entries),
        files=tuple(FileEntry(path, len(text), crc32c(text)) for path, text in files.items()),
    )
    (root / "gockpt.json").write_bytes(encode(distort(manifest)))
    return Written(root, values, manifest)


def is_chunk(path: str) -> bool:
    """Return whether a path inside a checkpoint is a chunk's."""
    return path.rpartition("/")[2].split(".")[0] == "c"


def archive_bytes(contents: dict[str, bytes], *, reserved: int = 0) -> bytes:
    """Return the archive of some files, whose manifest gets the offsets of the chunks.

    Args:
        contents: Each file's bytes; the manifest is in the form that it has in a directory.
        reserved: Offset of the first entry's header, for tests of holes.
    """
    order = sorted(contents, key=lambda path: (path == "gockpt.json", not is_chunk(path)))
    out, records, offsets = bytearray(reserved), [], {}
    for path in order:
        data = contents[path]
        if path == "gockpt.json":
            manifest = parse(data, where=path)
            arrays = (
                replace(one, at=tuple(offsets[one.chunk_path(n)] for n in range(one.chunks)))
                for one in manifest.arrays
            )
            data = encode(replace(manifest, arrays=tuple(arrays)))
        add_entry(out, records, path, data, offsets)
    return seal_archive(out, records)


def add_entry(out: bytearray, records: list[bytes], path: str, data: bytes, offsets: dict[str, int]) -> None:
    """Append an entry to an archive in the making."""
    at, crc = len(out), zlib.crc32(data)
    padding, offsets[path] = zip_archive.place(at, len(path), len(data), aligned=is_chunk(path))
    records.append(zip_archive.central_record(path, len(data), crc, at))
    out += zip_archive.local_header(path, len(data), crc, padding) + data


def seal_archive(out: bytearray, records: list[bytes]) -> bytes:
    """Return an archive in the making with its central directory and its end."""
    directory = b"".join(records)
    return bytes(out) + directory + zip_archive.end_records(len(records), len(out), len(directory))


def contents_of(directory: Path) -> dict[str, bytes]:
    """Return the files below a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def zips() -> SimpleNamespace:
    """The functions that make archives: from contents, or entry by entry."""
    return SimpleNamespace(
        of=archive_bytes, add=add_entry, seal=seal_archive, contents=contents_of, is_chunk=is_chunk
    )


@pytest.fixture(scope="session")
def archived() -> Callable[[Path], Path]:
    """The function that puts an archive in place of a checkpoint's directory, and returns its path."""

    def archive(directory: Path) -> Path:
        target = directory.with_name(f"{directory.name}.zip")
        target.write_bytes(archive_bytes(contents_of(directory)))
        shutil.rmtree(directory)
        return target

    return archive


@pytest.fixture(scope="session")
def write() -> Callable[..., Written]:
    """The function that writes a checkpoint."""
    return write_checkpoint


@pytest.fixture(scope="session")
def reseal() -> Callable[[Written], None]:
    """Make the manifest agree again with documents that a test has changed, as a liar would."""

    def seal(written: Written) -> None:
        def entry(file: FileEntry) -> FileEntry:
            data = (written.path / file.path).read_bytes()
            return FileEntry(file.path, len(data), crc32c(data))

        manifest = written.manifest
        arrays = tuple(replace(array, meta=entry(array.meta)) for array in manifest.arrays)
        files = tuple(entry(file) for file in manifest.files)
        (written.path / "gockpt.json").write_bytes(encode(replace(manifest, arrays=arrays, files=files)))

    return seal


@pytest.fixture(scope="session")
def every_dtype() -> dict[tuple[str, ...], tuple[tuple[int, ...], str]]:
    """Arrays of every dtype and of every kind of shape."""
    arrays = {("model", f"layer.{dtype}"): ((4, 3), dtype) for dtype in DTYPES}
    shapes = zip(SHAPES.items(), [*DTYPES, *DTYPES], strict=False)
    return arrays | {("optimizer", name, dtype): (shape, dtype) for (name, shape), dtype in shapes}
