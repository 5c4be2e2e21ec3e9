"""The manifest's list of arrays: its form as JSON, and the rules that every array in it obeys.

Promise: as for :mod:`gockpt.storage.format.manifest`, of which it is a part.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
from typing import TYPE_CHECKING, Any

import numpy as np

from gockpt.core.array_spec import DTYPES, MAX_NDIM, ArraySpec, public_name
from gockpt.storage.format import array_paths, json_fields, zip_archive
from gockpt.storage.format.chunk_grid import chunk_key
from gockpt.storage.format.codecs import CODECS, MAX_CHUNK_NBYTES, Coded, most_nbytes
from gockpt.storage.format.json_fields import Broken, Unknown, expect
from gockpt.storage.format.manifest_entries import ArrayEntry, FileEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

__all__ = ["MAX_ARRAYS", "MAX_CHUNKS", "dump", "encode_arrays", "parse_arrays", "version_of"]

MAX_ARRAYS = 10**6
MAX_CHUNKS = 4 * 10**6

_ARRAY_KEYS = ("name", "path", "shape", "dtype", "chunk", "meta")
_CODED_KEYS = ("codec", "stored")
_PLACE_KEYS = ("at",)
_KEYS = {
    (is_coded, is_placed): _ARRAY_KEYS + is_coded * _CODED_KEYS + is_placed * _PLACE_KEYS
    for is_coded in (False, True)
    for is_placed in (False, True)
}
_LENGTHS_CODED, _LENGTHS_PLACED = (8, 9), (7, 9)


def encode_arrays(entries: Sequence[ArrayEntry]) -> bytes:
    """Return a manifest's list of arrays as JSON.

    It is the same for all checkpoints of the same raw arrays, in an archive if their chunks are at the same
    offsets.
    """
    return dump([_array_object(entry) for entry in entries])


def version_of(arrays: Iterable[ArrayEntry]) -> int:
    """Return the format version of a manifest with these arrays: the lowest that has all they use."""
    return max(
        (3 if entry.at is not None else 2 if entry.coded is not None else 1 for entry in arrays), default=1
    )


def dump(value: Any) -> bytes:
    """Return a part of the manifest, without anything foreign, as JSON."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


def _array_object(entry: ArrayEntry) -> dict[str, Any]:
    array = {
        "name": entry.spec.name,
        "path": entry.path,
        "shape": entry.spec.shape,
        "dtype": entry.spec.dtype,
        "chunk": entry.chunk_shape,
        "meta": {"size": entry.meta.size, "crc32c": f"{entry.meta.crc32c:08x}"},
    }
    if entry.coded is not None:
        array.update(codec=entry.coded.codec, stored=entry.coded.nbytes)
    if entry.at is not None:
        array["at"] = entry.at
    return array


def parse_arrays(value: Any, document_name: str) -> tuple[ArrayEntry, ...]:
    """Return the arrays of the list.

    Columns are checked as a whole, and what follows from shape, dtype and chunk shape once for all arrays
    that share them.

    Args:
        value: The parsed JSON.
        document_name: Name of an array's Zarr document.

    Raises:
        Broken: If it breaks a rule.
    """
    values = json_fields.items(value, "arrays", MAX_ARRAYS)
    rows = [json_fields.fields(one, "an array", _keys_of(one)) for one in values]
    if not rows:
        return ()
    names, paths, given_shapes, dtypes, given_chunks, metas = zip(*(row[:6] for row in rows), strict=True)
    for name in names:
        json_fields.items(name, "a name", array_paths.MAX_COMPONENTS)
    json_fields.text_column([*itertools.chain(*names)], lambda _: "a component of a name")

    def what(index: int) -> str:
        return f"the array {public_name(names[index])!r}"

    shapes = _shape_column(given_shapes, "shape", what)
    chunks = _shape_column(given_chunks, "chunk", what)
    json_fields.text_column(dtypes, lambda index: f"the dtype of {what(index)}")
    json_fields.text_column(paths, lambda index: f"the path of {what(index)}")
    grids = [*zip(shapes, dtypes, chunks, strict=True)]
    for grid, index in dict(zip(grids, range(len(grids)), strict=True)).items():
        _check_grid(*grid, what(index))
    sizes, given_crcs = zip(
        *(json_fields.fields(meta, "the meta of an array", ("size", "crc32c")) for meta in metas), strict=True
    )
    json_fields.integer_column(sizes, lambda index: f"the meta size of {what(index)}")
    crcs = json_fields.crc_column(given_crcs, lambda index: f"the meta crc32c of {what(index)}")
    documents = [*map(FileEntry, (f"{path}/{document_name}" for path in paths), sizes, crcs)]
    specs = [*map(ArraySpec, map(tuple, names), shapes, dtypes)]
    coded: list[Coded | None] = [None] * len(rows)
    for index, row in enumerate(rows):
        if len(row) in _LENGTHS_CODED:
            raw = ArrayEntry(specs[index], paths[index], chunks[index], documents[index])
            coded[index] = _coded(raw, *row[6:8], what=what(index))
    placed = [row[-1] for row in rows if len(row) in _LENGTHS_PLACED]
    expect(len(placed) in (0, len(rows)), "some arrays have offsets, and others have not")
    for index, at in enumerate(placed):
        if type(at) is not list:
            json_fields.items(at, f"the offsets of {what(index)}", MAX_CHUNKS)
    offsets = map(tuple, placed) if placed else itertools.repeat(None)
    entries = tuple(map(ArrayEntry, specs, paths, chunks, documents, coded, offsets))
    if placed:
        _check_places(entries, what)
    return entries


def _keys_of(value: Any) -> tuple[str, ...]:
    """Return the keys that an array must have, by the optional ones among those it has."""
    has = value if type(value) is dict else {}
    return _KEYS["codec" in has, "at" in has]


def _shape_column(values: Sequence[Any], which: str, what: Callable[[int], str]) -> list[tuple[int, ...]]:
    """Return shapes; equal ones are one object."""
    for index, value in enumerate(values):
        if type(value) is not list or len(value) > MAX_NDIM:
            json_fields.items(value, what(index), MAX_NDIM)
    owners = [index for index, value in enumerate(values) for _ in value]
    json_fields.integer_column([*itertools.chain(*values)], lambda at: f"a {which} of {what(owners[at])}")
    same: dict[tuple[int, ...], tuple[int, ...]] = {}
    return [same.setdefault(shape, shape) for shape in map(tuple, values)]


def _check_grid(shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...], what: str) -> None:
    """Check that an array can have this shape, dtype and chunk shape."""
    expect(dtype in DTYPES, f"{what} has the unknown dtype {dtype!r}")
    # Empty dimensions count as one here: readers multiply the others in 64 bits.
    whole = tuple(max(1, n) for n in shape)
    nbytes = math.prod(whole) * DTYPES[dtype].itemsize
    expect(nbytes <= json_fields.MAX_INTEGER, f"{what} is larger than 2**63 bytes")
    if len(chunk) != len(whole) or chunk[1:] != whole[1:] or not all(1 <= n <= whole[0] for n in chunk[:1]):
        msg = f"{what} of shape {list(shape)} can't have chunks of shape {list(chunk)}"
        is_grid = len(chunk) == len(whole) and all(1 <= n <= m for n, m in zip(chunk, whole, strict=True))
        raise Unknown(msg) if is_grid else Broken(msg)


def _coded(entry: ArrayEntry, codec: Any, stored: Any, *, what: str) -> Coded:
    """Return the encoding of the chunks of a raw ``entry``; lengths beyond the codec's bound are refused."""
    expect(
        json_fields.text(codec, f"the codec of {what}") in CODECS, f"{what} has the unknown codec {codec!r}"
    )
    sizes = tuple(
        json_fields.integer(n, f"a stored length of {what}")
        for n in json_fields.items(stored, what, MAX_CHUNKS)
    )
    whole, limit = entry.chunk_nbytes, most_nbytes(entry.chunk_nbytes)
    expect(whole <= MAX_CHUNK_NBYTES, f"{what} has chunks of {whole} bytes, too large to be encoded")
    expect(
        len(sizes) == entry.chunks > 0, f"{what} has {len(sizes)} stored lengths for {entry.chunks} chunks"
    )
    for size in sizes:
        expect(1 <= size <= limit, f"{what} has a chunk of {whole} bytes encoded to {size}")
    return Coded(codec, sizes)


def _check_places(entries: Sequence[ArrayEntry], what: Callable[[int], str]) -> None:
    """Check the offsets of chunks in an archive.

    Raises:
        Broken: If one is not aligned, or chunks and their local headers overlap.
    """
    lengths: list[int] = []
    name_lengths: list[int] = []
    owners: list[int] = []
    keys = [1 + len(chunk_key(0, ndim)) for ndim in range(MAX_NDIM + 1)]
    places = [entry.at or () for entry in entries]
    for index, (entry, at) in enumerate(zip(entries, places, strict=True)):
        chunks = entry.chunks
        if len(at) != chunks:
            msg = f"{what(index)} has {len(at)} offsets for {chunks} chunks"
            raise Broken(msg)
        if chunks == 1:
            lengths.append(entry.file_nbytes(0))
            name_lengths.append(len(entry.path) + keys[len(entry.chunk_shape)])
            owners.append(index)
        else:
            lengths += map(entry.file_nbytes, range(chunks))
            name_lengths += (len(entry.chunk_path(chunk)) for chunk in range(chunks))
            owners += [index] * chunks
    offsets = [*itertools.chain(*places)]
    json_fields.integer_column(offsets, lambda _: "an offset of a chunk")
    if max(lengths, default=0) > zip_archive.MAX_ENTRY_NBYTES:
        index, nbytes = next(
            pair for pair in zip(owners, lengths, strict=True) if pair[1] > zip_archive.MAX_ENTRY_NBYTES
        )
        msg = f"{what(index)} has a chunk of {nbytes} bytes, too large for an archive"
        raise Broken(msg)
    alignments = {nbytes: zip_archive.alignment(nbytes) for nbytes in set(lengths)}
    if any(map(operator.mod, offsets, map(alignments.__getitem__, lengths))):
        index, offset, nbytes = next(
            each for each in zip(owners, offsets, lengths, strict=True) if each[1] % alignments[each[2]]
        )
        msg = f"{what(index)} has a chunk of {nbytes} bytes at offset {offset}, which is not aligned"
        raise Broken(msg)
    _check_apart(offsets, lengths, name_lengths)


def _check_apart(offsets: Sequence[int], lengths: Sequence[int], name_lengths: Sequence[int]) -> None:
    """Check that chunks and their local headers don't overlap."""
    starts = np.array(offsets, np.uint64)
    order = np.argsort(starts, kind="stable")
    starts = starts[order]
    # Below 2**64: an offset has 63 bits, a length 31, and a name is shorter than the manifest.
    needed = np.zeros(len(starts), np.uint64)
    needed[1:] = starts[:-1] + np.array(lengths, np.uint64)[order][:-1]
    needed += np.array(name_lengths, np.uint64)[order] + np.uint64(zip_archive.LOCAL_HEADER_NBYTES)
    if (tight := np.flatnonzero(starts < needed)).size:
        msg = f"the chunk at offset {starts[tight[0]]} overlaps another one, or has no room for its header"
        raise Broken(msg)
