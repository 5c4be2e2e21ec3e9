"""The ``zarr.json`` documents of Zarr v3, written without zarr.

Promise: zarr-python 3, zarrs and tensorstore open the described arrays, and zarr-python would write the same
documents. Creating 444 arrays through ``zarr.create_array`` costs half a second; these take milliseconds.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gockpt.core.array_spec import DTYPES
from gockpt.storage.format import strict_json
from gockpt.storage.format.codecs import zarr_codec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gockpt.core.array_spec import ArraySpec

__all__ = [
    "MAX_CONSOLIDATED",
    "array_document",
    "consolidated",
    "dimension_names",
    "dump",
    "group_document",
    "root",
]

MAX_CONSOLIDATED = 1000
"""Most arrays of a checkpoint whose documents are repeated in the root's."""


def array_document(spec: ArraySpec, chunk_shape: tuple[int, ...], codec: str | None = None) -> dict[str, Any]:
    """Return the document of one array: regular grid, little-endian bytes, crc32c, zero fill.

    The bytes are raw, or encoded by one of :data:`~gockpt.storage.format.codecs.CODECS`.

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
        **({"dimension_names": dimension_names(spec.shape)} if spec.shape else {}),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def dimension_names(shape: tuple[int, ...]) -> list[str]:
    """Return the name of each dimension: its position and its size, such as ``dim_0:64``.

    xarray takes dimensions of one name in a group for the same one, and refuses a group where their sizes
    differ. Names of position and size never clash, and let an array and its optimizer states combine. No
    variable has such a name either: in paths ``:`` is escaped.

    Examples:
        >>> dimension_names((64, 32))
        ['dim_0:64', 'dim_1:32']
    """
    return [f"dim_{position}:{size}" for position, size in enumerate(shape)]


def group_document() -> dict[str, Any]:
    """Return the document of a group inside a checkpoint."""
    return {"attributes": {}, "zarr_format": 3, "node_type": "group"}


def consolidated(
    *, groups: Sequence[str], arrays: Mapping[str, bytes], dtypes: Sequence[str]
) -> bytes | None:
    """Return the documents of all arrays and groups but the root, by path, as one JSON object.

    ``None`` unless every reader can take that, and gains by it. One dtype that zarr-python doesn't know,
    named in consolidated metadata, makes it refuse the whole group; unconsolidated, it refuses that array
    only. And it builds every array that consolidated metadata names when it opens the group: where there are
    more than :data:`MAX_CONSOLIDATED`, that takes longer than it saves.

    Args:
        groups: Paths of all groups but the root.
        arrays: Each array's document by path.
        dtypes: The dtypes of all arrays.
    """
    if len(arrays) > MAX_CONSOLIDATED or not all(DTYPES[dtype].core for dtype in dtypes):
        return None
    nothing = {"kind": "inline", "must_understand": False, "metadata": {}}
    group = dump({"attributes": {}, "zarr_format": 3, "consolidated_metadata": nothing, "node_type": "group"})
    documents = {**dict.fromkeys(groups, group), **arrays}
    pairs = (json.dumps(path).encode("ascii") + b":" + documents[path] for path in sorted(documents))
    return b"{" + b",".join(pairs) + b"}"


def root(attributes: Mapping[str, Any], metadata: bytes | None) -> bytes:
    """Return the root group's document.

    Args:
        attributes: The root's attributes, which may hold anything.
        metadata: The result of :func:`consolidated`.

    Raises:
        UnsupportedState: If the attributes have no exact form as JSON, or the whole is larger than readers
            take.
    """
    what = "the root group's zarr.json"
    head = {"attributes": dict(attributes), "zarr_format": 3}
    text = strict_json.dumps(head, what=what, foreign=head["attributes"])[:-1]
    if metadata is not None:
        kind = b'"kind":"inline","must_understand":false'
        text += b',"consolidated_metadata":{' + kind + b',"metadata":' + metadata + b"}"
    return strict_json.of_size(text + b',"node_type":"group"}', what=what)


def dump(document: Mapping[str, Any]) -> bytes:
    """Return the bytes of a document without users' values."""
    return json.dumps(document, allow_nan=False, separators=(",", ":")).encode("ascii")
