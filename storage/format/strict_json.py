"""Strict JSON for untrusted files: bounded, and unambiguous.

Promise: :func:`loads` never overflows the stack, and accepts only texts that every reader parses to the same
document. Texts that Python's parser accepts and the standard doesn't (``NaN``, ``1e400``, a duplicate key)
are refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, Never

import numpy as np

from gockpt.errors import ManifestCorrupt, UnsupportedState

__all__ = ["MANIFEST_DEPTH", "MAX_BYTES", "STATE_DEPTH", "dumps", "loads", "nesting", "of_size"]

MAX_BYTES = 64 << 20
MANIFEST_DEPTH = 32
STATE_DEPTH = 256
"""Deeper than the manifest's: a user's nested value takes two or three levels for each of its own."""

# Possessive, and an unterminated string runs to the end: linear time for whatever bytes come.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+("?)', re.DOTALL)
_SLICE = 256 << 10
_ALL = object()
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}'))


def nesting(data: bytes) -> int:
    """Return the nesting depth of a JSON text, without parsing it.

    For malformed JSON it is at least the depth that a parser would reach before it fails.

    Examples:
        >>> nesting(b'{"a": [1, {"[[[[": 2}]}')
        3
    """
    depth = deepest = 0
    begin = b""  # of the next part: the quote of a string that goes on, and the first half of an escape
    for at in range(0, len(data), _SLICE):
        part = begin + data[at : at + _SLICE]
        half = b"\\" * ((len(part) - len(part.rstrip(b"\\"))) % 2)
        part = part.removesuffix(half)
        if b"\\" in part:
            part = _STRING.sub(rb'"\1', part)
        marks = np.frombuffer(part.translate(None, _NOT_STRUCTURE), np.uint8)
        quotes = marks == ord('"')
        inside = np.logical_xor.accumulate(quotes)
        brackets = marks[~(inside | quotes)]
        begin = b'"' * int(inside[-1:].sum()) + half
        if brackets.size:
            opening = (brackets == ord("[")) | (brackets == ord("{"))
            depths = depth + np.cumsum(np.where(opening, 1, -1))
            depth, deepest = int(depths[-1]), max(deepest, int(depths.max()))
    return deepest


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        count = Counter(key for key, _ in pairs)
        msg = f"the key {next(key for key in count if count[key] > 1)!r} is given twice"
        raise ValueError(msg)
    return document


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        msg = f"the number {text[:40]} is out of range"
        raise ValueError(msg)
    return value


def _refuse_constant(text: str) -> Never:
    msg = f"{text} is not JSON"
    raise ValueError(msg)


def _check_keys(document: Any) -> None:
    # json.dumps turns other keys into text without a word: 1 and "1" would become one.
    left = [document]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            for key in value:
                if type(key) is not str:
                    msg = f"the key {key!r} is not a string"
                    raise TypeError(msg)
            left.extend(value.values())
        elif isinstance(value, (list, tuple)):
            left.extend(value)


def loads(data: bytes, *, what: str, depth: int = MANIFEST_DEPTH) -> Any:
    """Parse one JSON document strictly.

    Args:
        data: The whole text, UTF-8.
        what: The file it comes from, for the message.
        depth: How deep arrays and objects may nest.

    Raises:
        ManifestCorrupt: If it is malformed, or larger, deeper or looser than is ever written.
    """
    if len(data) > MAX_BYTES:
        msg = f"{what} has {len(data)} bytes; at most {MAX_BYTES} are ever written"
        raise ManifestCorrupt(msg)
    if (found := nesting(data)) > depth:
        msg = f"{what} nests {found} deep; at most {depth} levels are ever written"
        raise ManifestCorrupt(msg)
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_float=_finite,
            parse_constant=_refuse_constant,
        )
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        msg = f"{what} is not valid: {error}"
        raise ManifestCorrupt(msg) from error


def dumps(
    document: Any, *, what: str, depth: int = MANIFEST_DEPTH, indent: int | None = None, foreign: Any = _ALL
) -> bytes:
    """Return a document as ASCII JSON that :func:`loads` accepts again under the same limits.

    Args:
        document: What it says.
        what: The file it is for, for the message.
        depth: How deep arrays and objects may nest.
        indent: As for ``json.dumps``.
        foreign: The part of it that others made; of the rest all keys are text for certain. By default all.

    Raises:
        UnsupportedState: If it holds what JSON can't (NaN, other types, keys that are no text) or is
            larger or deeper than the limits.
    """
    separators = (",", ":") if indent is None else (",", ": ")
    try:
        # The encoder first: it is the one that notices a document that contains itself.
        data = json.dumps(document, allow_nan=False, indent=indent, separators=separators).encode("ascii")
        _check_keys(document if foreign is _ALL else foreign)
    except (ValueError, TypeError, RecursionError) as error:
        msg = f"{what} has no exact form as JSON: {error}"
        raise UnsupportedState(msg) from error
    if (found := nesting(of_size(data, what=what))) > depth:
        msg = f"{what} would take {found} levels of nesting; at most {depth} can be read back"
        raise UnsupportedState(msg)
    return data


def of_size(data: bytes, *, what: str) -> bytes:
    """Return a text that is not too large for :func:`loads`.

    Raises:
        UnsupportedState: If it is.
    """
    if len(data) > MAX_BYTES:
        msg = f"{what} would take {len(data)} bytes; at most {MAX_BYTES} can be read back"
        raise UnsupportedState(msg)
    return data
