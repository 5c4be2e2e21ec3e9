"""The ``zarr.json`` documents of Zarr v3, written without zarr.

Promise: zarr-python 3, zarrs and tensorstore open what these describe, and zarr-python would describe
the same arrays in the same words. Creating 444 arrays through ``zarr.create_array`` costs half a second;
these take milliseconds.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gockpt.schema import DTYPES
from gockpt.storage import strict_json
from gockpt.storage.codecs import zarr_codec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gockpt.schema import ArraySpec

__all__ = ["array_document", "dump", "group_document", "root_document"]


def array_document(spec: ArraySpec, chunk_shape: tuple[int, ...], codec: str | None = None) -> dict[str, Any]:
    """Return the document of one array: regular grid, little-endian bytes, crc32c, zero fill.

    The bytes are raw, or encoded by one of :data:`~gockpt.storage.codecs.CODECS`.

    A dtype of one byte has no endianness, and zarr-python writes none.
    """
    dtype = DTYPES[spec.dtype]
    encoding = [] if codec is None else [zarr_codec(codec, dtype.itemsize)]
    to_bytes: dict[str, Any] = {"name": "bytes"}
    if dtype.itemsize > 1:
        to_bytes["configuration"] = {"endian": "little"}
    return {
        "shape": list(spec.shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": dtype.fill_value,
        "codecs": [to_bytes, *encoding, {"name": "crc32c"}],
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def group_document() -> dict[str, Any]:
    """Return the document of a group inside a checkpoint."""
    return {"attributes": {}, "zarr_format": 3, "node_type": "group"}


def root_document(
    attributes: Mapping[str, Any],
    *,
    groups: Sequence[str],
    arrays: Mapping[str, Mapping[str, Any]],
    dtypes: Sequence[str],
) -> dict[str, Any]:
    """Return the root group's document, with all others consolidated in it if every reader can take that.

    One dtype that zarr-python doesn't know, named in consolidated metadata, makes it refuse the whole
    group; unconsolidated, it refuses that array only.

    Args:
        attributes: The root's attributes.
        groups: Paths of all other groups.
        arrays: Each array's document by path.
        dtypes: The dtypes of all arrays.
    """
    document: dict[str, Any] = {"attributes": dict(attributes), "zarr_format": 3}
    if all(DTYPES[dtype].core for dtype in dtypes):
        nothing = {"kind": "inline", "must_understand": False, "metadata": {}}
        inner = {
            path: {"attributes": {}, "zarr_format": 3, "consolidated_metadata": nothing, "node_type": "group"}
            for path in groups
        }
        metadata = dict(sorted({**inner, **arrays}.items()))
        document["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": metadata}
    document["node_type"] = "group"
    return document


def dump(document: Mapping[str, Any]) -> bytes:
    """Return a document's bytes, small ones without the checks that only users' values need."""
    if document["attributes"]:
        return strict_json.dumps(document, what="the root group's zarr.json", foreign=document["attributes"])
    return json.dumps(document, allow_nan=False, separators=(",", ":")).encode("ascii")
