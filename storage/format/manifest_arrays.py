"""The manifest's list of arrays: its form as JSON, and the rules that every array in it obeys.

Promise: as for :mod:`gockpt.storage.format.manifest`, of which it is a part.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import TYPE_CHECKING, Any

from gockpt.core.arena_layout import CHECKSUM_BYTES
from gockpt.core.array_spec import DTYPES, MAX_NDIM, ArraySpec, public_name
from gockpt.storage.format import array_paths, json_fields, zip_archive
from gockpt.storage.format.codecs import CODECS, MAX_CHUNK_NBYTES, Coded, most_nbytes
from gockpt.storage.format.json_fields import Broken, Unknown, expect
from gockpt.storage.format.manifest_entries import ArrayEntry, FileEntry

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["MAX_CHUNKS", "check_places", "dump", "encode_arrays", "parse_array", "version_of"]

MAX_CHUNKS = 4 * 10**6

_ARRAY_KEYS = ("name", "path", "shape", "dtype", "chunk", "meta")
_CODED_KEYS = ("codec", "stored")
_PLACE_KEYS = ("at",)


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


def parse_array(value: Any, document_name: str) -> ArrayEntry:
    """Return an array of the list.

    Args:
        value: The parsed JSON.
        document_name: Name of its Zarr document.

    Raises:
        Broken: If it breaks a rule.
        UsageError: If its name is none that an array can have.
    """
    has = value if type(value) is dict else {}
    is_coded, is_placed = _CODED_KEYS[0] in has, _PLACE_KEYS[0] in has
    keys = _ARRAY_KEYS + is_coded * _CODED_KEYS + is_placed * _PLACE_KEYS
    name, path, shape, dtype, chunk, meta, *more = json_fields.fields(value, "an array", keys)
    parts = json_fields.items(name, "a name", array_paths.MAX_COMPONENTS)
    components = tuple(json_fields.text(part, "a component of a name") for part in parts)
    what = f"the array {public_name(components)!r}"
    extents = _integers(shape, "shape", what)
    pieces = _integers(chunk, "chunk", what)
    expect(
        json_fields.text(dtype, f"the dtype of {what}") in DTYPES, f"{what} has the unknown dtype {dtype!r}"
    )
    spec = ArraySpec(components, extents, dtype)
    # Empty dimensions count as one here: readers multiply the others in 64 bits.
    whole = tuple(max(1, n) for n in extents)
    expect(math.prod(whole) * spec.itemsize <= json_fields.MAX_INTEGER, f"{what} is larger than 2**63 bytes")
    if (
        len(pieces) != len(whole)
        or pieces[1:] != whole[1:]
        or not all(1 <= n <= whole[0] for n in pieces[:1])
    ):
        msg = f"{what} of shape {list(extents)} can't have chunks of shape {list(pieces)}"
        is_grid = len(pieces) == len(whole) and all(1 <= n <= m for n, m in zip(pieces, whole, strict=True))
        raise Unknown(msg) if is_grid else Broken(msg)
    size, crc = json_fields.fields(meta, f"the meta of {what}", ("size", "crc32c"))
    directory = json_fields.text(path, f"the path of {what}")
    document = FileEntry(
        path=f"{directory}/{document_name}",
        size=json_fields.integer(size, f"the meta size of {what}"),
        crc32c=json_fields.crc(crc, f"the meta crc32c of {what}"),
    )
    entry = ArrayEntry(spec, directory, pieces, document)
    if is_coded:
        entry = ArrayEntry(spec, directory, pieces, document, _coded(entry, *more[:2], what=what))
    if is_placed:
        at = _places(entry, more[-1], what=what)
        entry = ArrayEntry(spec, directory, pieces, document, entry.coded, at)
    return entry


def _integers(value: Any, which: str, what: str) -> tuple[int, ...]:
    """Return the numbers of a shape; a message is only made for an error."""
    numbers = json_fields.items(value, what, MAX_NDIM)
    for n in numbers:
        if type(n) is not int or not 0 <= n <= json_fields.MAX_INTEGER:
            json_fields.integer(n, f"a {which} of {what}")
    return tuple(numbers)


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


def _places(entry: ArrayEntry, value: Any, *, what: str) -> tuple[int, ...]:
    """Return the offsets of the chunks of ``entry`` in an archive; those not aligned are refused."""
    offsets = json_fields.items(value, f"the offsets of {what}", MAX_CHUNKS)
    if len(offsets) != entry.chunks:
        msg = f"{what} has {len(offsets)} offsets for {entry.chunks} chunks"
        raise Broken(msg)
    lengths = (
        itertools.repeat(entry.chunk_nbytes + CHECKSUM_BYTES)
        if entry.coded is None
        else map(entry.file_nbytes, range(len(offsets)))
    )
    for offset, nbytes in zip(offsets, lengths, strict=False):
        if nbytes > zip_archive.MAX_ENTRY_NBYTES:
            msg = f"{what} has a chunk of {nbytes} bytes, too large for an archive"
            raise Broken(msg)
        if json_fields.integer(offset, "an offset of a chunk") % zip_archive.alignment(nbytes):
            msg = f"{what} has a chunk of {nbytes} bytes at offset {offset}, which is not aligned"
            raise Broken(msg)
    return tuple(offsets)


def check_places(arrays: Sequence[ArrayEntry]) -> None:
    """Check that all or no arrays have offsets, and that chunks and their local headers don't overlap.

    Raises:
        Broken: If they do.
    """
    placed = [entry for entry in arrays if entry.at is not None]
    expect(len(placed) in (0, len(arrays)), "some arrays have offsets, and others have not")
    found = [
        (offset, entry.file_nbytes(chunk), len(entry.chunk_path(chunk)))
        for entry in placed
        for chunk, offset in enumerate(entry.at or ())
    ]
    end = 0
    for offset, nbytes, name_nbytes in sorted(found):
        if offset < end + zip_archive.LOCAL_HEADER_NBYTES + name_nbytes:
            msg = f"the chunk at offset {offset} overlaps another one, or has no room for its header"
            raise Broken(msg)
        end = offset + nbytes
