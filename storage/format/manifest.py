"""The manifest: the list of a checkpoint's files and arrays, and the mark that it is complete.

Promise: :func:`parse` accepts exactly the output of :func:`encode`. Whoever wrote the bytes, every number it
returns is in range, every size follows from shapes and chunks or is bounded by them, every path is the one
derived from its name and lies inside the checkpoint, and the names are distinct. Readers trust nothing else.

File ``gockpt.json``: one line with a JSON object, one line ``{"crc32c": "xxxxxxxx"}`` with the checksum of
the first line, its newline included. The version follows from the arrays, and is the lowest that has what
they use: 1 has raw chunks in files of their own, 2 encoded ones as well, 3 chunks in an archive. A reader of
an earlier version then says that it is too old, not that the checkpoint is damaged.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from gockpt.core.nonfinite import nonfinite_of
from gockpt.core.runs import Run, ancestors_of
from gockpt.errors import FormatTooNew, ManifestCorrupt, UsageError
from gockpt.storage.format import array_paths, checksum, json_fields, strict_json
from gockpt.storage.format.json_fields import Broken, Unknown, expect
from gockpt.storage.format.manifest_arrays import (
    MAX_ARRAYS,
    MAX_CHUNKS,
    dump,
    encode_arrays,
    parse_arrays,
    version_of,
)
from gockpt.storage.format.manifest_entries import ArrayEntry, FileEntry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gockpt.core.runs import Ancestor

__all__ = [
    "BLOCKS_FILE",
    "FORMAT",
    "GROUP_FILE",
    "MANIFEST_FILE",
    "STATE_FILE",
    "VERSION",
    "Identity",
    "Manifest",
    "encode",
    "expected_files",
    "finite_of",
    "glance",
    "identify",
    "identity_of",
    "metrics_of",
    "parse",
    "run_of",
]

FORMAT = "gockpt"
VERSION = 3
"""The newest version; written only if a feature of it is used."""
MANIFEST_FILE = "gockpt.json"
STATE_FILE = "state.json"
BLOCKS_FILE = "blocks.crc32c"
GROUP_FILE = "zarr.json"
"""Every array and group directory has one; the root's too."""

_TOP_KEYS = (
    *("format", "version", "step", "seq", "attempt", "run", "parent", "exact", "created", "writer"),
    *("attributes", "arrays", "files"),
)
_CHECK_LINE = re.compile(rb'\{"crc32c": "([0-9a-f]{8})"\}\n')
# Beginning of every manifest that encode() wrote, up to the fields that glance() reads.
_HEAD = re.compile(
    rb'\{"format":"%s","version":[1-%d],"step":(0|[1-9][0-9]{0,17}),"seq":(0|[1-9][0-9]{0,17}),'
    rb'"attempt":"([0-9a-f]{8,64})",' % (FORMAT.encode(), VERSION)
)
_CHECK_LINE_NBYTES = len(b'{"crc32c": "00000000"}\n')


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that is known about one complete checkpoint without reading its data.

    Attributes:
        step: The user's step.
        seq: Its number among this path's publications; the highest is the newest.
        attempt: Hexadecimal, unique to this writing of the step.
        run: Hexadecimal, the training run's id, which a load preserves.
        parent: ``seq`` of the checkpoint that the run continued from, if known.
        exact: Whether every bit equals a blocking save's.
        created: ISO 8601 time with offset.
        writer: The program that wrote it: ``{"gockpt": version}``.
        attributes: The root group's attributes.
        arrays: In the order of the block checksums.
        files: Group documents, state document, block checksums.
    """

    step: int
    seq: int
    attempt: str
    run: str
    parent: int | None
    exact: bool
    created: str
    writer: Mapping[str, str]
    attributes: Mapping[str, Any]
    arrays: tuple[ArrayEntry, ...]
    files: tuple[FileEntry, ...]

    def file(self, path: str) -> FileEntry:
        """Return the entry of one of the non-array files, by path."""
        return next(entry for entry in self.files if entry.path == path)

    def in_directory(self) -> Manifest:
        """Return the manifest of the same checkpoint with each chunk in a file of its own."""
        return replace(self, arrays=tuple(replace(entry, at=None) for entry in self.arrays))

    def first_blocks(self) -> tuple[int, ...]:
        """Return the index of each array's first entry in the block checksums, and the total at the end."""
        return tuple(accumulate((entry.block_count for entry in self.arrays), initial=0))


@dataclass(frozen=True, slots=True)
class Identity:
    """Identity of a checkpoint: the fields that :func:`identify` reads.

    Attributes:
        step: The user's step.
        seq: Its number among its path's publications.
        attempt: Unique to this writing of the step.
        metrics: Numbers among its extras, by name; not compared.
        finite: Whether parameters and optimizer state have no NaN or Inf; ``None`` if not counted.
        run: The training run's id; not compared.
        ancestors: Runs that it descends from; ``None`` if an older gockpt wrote it.
    """

    step: int
    seq: int
    attempt: str
    metrics: Mapping[str, float] = field(default_factory=dict, compare=False)
    finite: bool | None = field(default=None, compare=False)
    run: str = field(default="", compare=False)
    ancestors: tuple[Ancestor, ...] | None = field(default=None, compare=False)


def finite_of(attributes: Any) -> bool | None:
    """Return whether parameters and optimizer state are finite by the attributes; ``None`` if not stated."""
    found = nonfinite_of(attributes)
    return None if found is None else found.finite


def metrics_of(attributes: Any) -> dict[str, float]:
    """Return the numbers among a checkpoint's extras, as the root group's attributes list them.

    Only finite numbers are returned: attributes are untrusted.
    """
    own = attributes.get(FORMAT) if isinstance(attributes, dict) else None
    metrics = own.get("metrics") if isinstance(own, dict) else None
    if not isinstance(metrics, dict):
        return {}
    return {name: value for name, value in metrics.items() if type(value) in (int, float) and _fits(value)}


def _fits(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def expected_files(paths: Mapping[tuple[str, ...], str]) -> list[str]:
    """Return the paths of every non-array file but the manifest, for the escaped paths of all arrays."""
    directories = {path.rpartition("/")[0] for path in paths.values()} - {""}
    above = directories
    while above:
        above = {path.rpartition("/")[0] for path in above} - directories - {""}
        directories |= above
    groups = ["", *sorted(f"{directory}/" for directory in directories)]
    return [*(f"{directory}{GROUP_FILE}" for directory in groups), STATE_FILE, BLOCKS_FILE]


def encode(manifest: Manifest, arrays: bytes | None = None) -> bytes:
    """Return the bytes of ``gockpt.json``.

    Args:
        manifest: The manifest.
        arrays: The result of :func:`encode_arrays` for its arrays, if known.

    Raises:
        UnsupportedState: If attributes or names have no exact form as JSON.
    """
    document = {
        "format": FORMAT,
        "version": version_of(manifest.arrays),
        "step": manifest.step,
        "seq": manifest.seq,
        "attempt": manifest.attempt,
        "run": manifest.run,
        "parent": manifest.parent,
        "exact": manifest.exact,
        "created": manifest.created,
        "writer": dict(manifest.writer),
        "attributes": dict(manifest.attributes),
    }
    files = [
        {"path": entry.path, "size": entry.size, "crc32c": f"{entry.crc32c:08x}"} for entry in manifest.files
    ]
    head = strict_json.dumps(document, what=MANIFEST_FILE, foreign=document["attributes"])[:-1]
    text = encode_arrays(manifest.arrays) if arrays is None else arrays
    line = head + b',"arrays":' + text + b',"files":' + dump(files) + b"}\n"
    strict_json.of_size(line, what=MANIFEST_FILE)
    return line + json.dumps({"crc32c": f"{checksum.crc32c(line):08x}"}).encode() + b"\n"


def parse(data: bytes, *, where: str) -> Manifest:
    """Return the manifest in ``data``, the bytes of a ``gockpt.json``.

    Args:
        data: The whole file.
        where: Its path, for messages.

    Raises:
        ManifestCorrupt: If a byte differs from the written one, or the manifest breaks a rule.
        FormatTooNew: If it is of a later version.
    """
    document = strict_json.loads(_line(data, where), what=where)
    try:
        return _manifest(document, where)
    except Unknown as error:
        msg = f"{where}: {error}"
        if document.get("version") != VERSION:
            raise ManifestCorrupt(msg) from error
        msg = f"{msg}; a newer gockpt wrote it: upgrade gockpt"
        raise FormatTooNew(msg, seq=_seq(document)) from error
    except (Broken, UsageError) as error:
        msg = f"{where}: {error}"
        raise ManifestCorrupt(msg) from error


def identify(data: bytes, *, where: str) -> Identity:
    """Return the identity in an undamaged manifest, without reading its arrays.

    Raises:
        ManifestCorrupt: As for :func:`parse`, for the part it reads.
    """
    document = strict_json.loads(_line(data, where), what=where)
    try:
        _expect_readable(document, where)
        return Identity(
            step=json_fields.integer(document.get("step"), "step"),
            seq=json_fields.integer(document.get("seq"), "seq"),
            attempt=json_fields.identifier(document.get("attempt"), "attempt"),
            metrics=metrics_of(document.get("attributes")),
            finite=finite_of(document.get("attributes")),
            run=json_fields.identifier(document.get("run"), "run"),
            ancestors=ancestors_of(document.get("attributes")),
        )
    except Broken as error:
        msg = f"{where}: {error}"
        raise ManifestCorrupt(msg) from error


def run_of(manifest: Manifest) -> Run:
    """Return a checkpoint's run."""
    return Run(manifest.run, ancestors_of(manifest.attributes) or ())


def identity_of(content: Manifest) -> Identity:
    """Return a manifest's identity."""
    return Identity(
        step=content.step,
        seq=content.seq,
        attempt=content.attempt,
        metrics=metrics_of(content.attributes),
        finite=finite_of(content.attributes),
        run=content.run,
        ancestors=ancestors_of(content.attributes),
    )


def glance(data: bytes, *, where: str) -> Identity:
    """Return the identity in a manifest that agrees with its checksum.

    It takes a hundredth of the time of :func:`identify`, and returns the same for every manifest that
    :func:`identify` accepts: the text is not parsed, but compared with its checksum.

    Raises:
        ManifestCorrupt: If a byte differs from the written one, or the identity is missing.
    """
    head = _HEAD.match(_line(data, where))
    if head is None:
        return identify(data, where=where)
    return Identity(step=int(head[1]), seq=int(head[2]), attempt=head[3].decode("ascii"))


def _line(data: bytes, where: str) -> bytes:
    """Return the line before the checksum, which must agree with it."""
    match = _CHECK_LINE.fullmatch(data[-_CHECK_LINE_NBYTES:])
    if not match:
        msg = f"{where} doesn't end with its checksum: it is cut off, or no manifest"
        raise ManifestCorrupt(msg)
    line = data[:-_CHECK_LINE_NBYTES]
    found = checksum.crc32c(line)
    if found != int(match[1], 16):
        msg = f"{where} is damaged: its checksum is {found:08x} instead of {match[1].decode()}"
        raise ManifestCorrupt(msg)
    if line.find(b"\n") != len(line) - 1:
        msg = f"{where} has not exactly one line before its checksum"
        raise ManifestCorrupt(msg)
    return line


def _expect_readable(document: Any, where: str) -> None:
    expect(type(document) is dict and document.get("format") == FORMAT, "it is not a gockpt manifest")
    version = json_fields.integer(document.get("version"), "the format version")
    expect(version, "format version 0 is unknown")
    if version > VERSION:
        known = f"this gockpt reads up to {VERSION}"
        msg = f"{where}: format version {version} is unknown ({known}); upgrade gockpt"
        raise FormatTooNew(msg, seq=_seq(document))


def _files(value: Any) -> tuple[FileEntry, ...]:
    values = json_fields.items(value, "files", MAX_ARRAYS)
    rows = [json_fields.fields(one, "a file", ("path", "size", "crc32c")) for one in values]
    names, sizes, given = zip(*rows, strict=True) if rows else ((), (), ())
    json_fields.text_column(names, lambda _: "the path of a file")
    json_fields.integer_column(sizes, lambda index: f"the size of {names[index]!r}")
    crcs = json_fields.crc_column(given, lambda index: f"the crc32c of {names[index]!r}")
    return tuple(map(FileEntry, names, sizes, crcs))


def _check_set(arrays: Sequence[ArrayEntry], files: Sequence[FileEntry]) -> None:
    names = [entry.spec.name for entry in arrays]
    array_paths.check_names(names)
    paths = array_paths.escape_all(names)
    for entry, path in zip(arrays, paths.values(), strict=True):
        if entry.path != path:
            msg = f"{entry.spec.public_name!r} is at {entry.path!r} instead of {path!r}"
            raise Broken(msg)
    found, expected = sorted(entry.path for entry in files), sorted(expected_files(paths))
    if found != expected:
        odd = sorted(set(found) ^ set(expected))[:8]
        msg = f"the files it lists are not the ones its arrays need: {odd or 'one comes twice'}"
        raise Unknown(msg) if set(found) > set(expected) else Broken(msg)
    chunks = sum(entry.chunks for entry in arrays)
    expect(chunks <= MAX_CHUNKS, f"it has {chunks} chunks; at most {MAX_CHUNKS} are ever written")
    size = next(entry.size for entry in files if entry.path == BLOCKS_FILE)
    blocks = sum(entry.block_count for entry in arrays)
    expect(size == 4 * blocks, f"{BLOCKS_FILE} has {size} bytes instead of 4 for each of {blocks} blocks")


def _seq(document: dict[str, Any]) -> int | None:
    """Return the number of a publication whose manifest can't be read; ``None`` if it isn't there."""
    seq = document.get("seq")
    return seq if type(seq) is int else None


def _manifest(document: Any, where: str) -> Manifest:
    _expect_readable(document, where)
    _, version, step, seq, attempt, run, parent, exact, created, writer, attributes, arrays, files = (
        json_fields.fields(document, "the manifest", _TOP_KEYS)
    )
    expect(type(exact) is bool, "exact is neither true nor false")
    expect(type(attributes) is dict, "attributes is not an object")
    expect(type(writer) is dict, "writer is not an object")
    for value in writer.values():
        json_fields.text(value, "a value of writer")
    entries = parse_arrays(arrays, GROUP_FILE)
    expect(version == version_of(entries), f"version {version} is not the one for what it describes")
    documents = _files(files)
    _check_set(entries, documents)
    number = json_fields.integer(seq, "seq")
    origin = None if parent is None else json_fields.integer(parent, "parent")
    expect(origin is None or origin < number, f"parent {origin} is not older than seq {number}")
    return Manifest(
        step=json_fields.integer(step, "step"),
        seq=number,
        attempt=json_fields.identifier(attempt, "attempt"),
        run=json_fields.identifier(run, "run"),
        parent=origin,
        exact=exact,
        created=json_fields.time(created, "created"),
        writer=writer,
        attributes=attributes,
        arrays=entries,
        files=documents,
    )
