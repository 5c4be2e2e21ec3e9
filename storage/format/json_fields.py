"""Typed access to the values of a parsed JSON document.

Promise: a returned value has exactly the stated type (neither ``true`` nor ``1.0`` is an integer) and lies in
the stated range. Any other value raises :class:`Broken`, whose message names the fault. The functions for
columns check many values at once, and make no message unless one of them is refused.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "MAX_INTEGER",
    "Broken",
    "Unknown",
    "crc",
    "crc_column",
    "expect",
    "fields",
    "identifier",
    "integer",
    "integer_column",
    "items",
    "text",
    "text_column",
    "time",
]

MAX_INTEGER = 2**63 - 1

_CRC = re.compile(r"[0-9a-f]{8}")
_IDENTIFIER = re.compile(r"[0-9a-f]{8,64}")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Broken(Exception):
    """A rule of the format that the document breaks."""


class Unknown(Broken):
    """A rule that the document breaks, and that a later version of gockpt may have loosened."""


def expect(condition: object, otherwise: str) -> None:
    """Raise :class:`Broken` with that message unless the condition holds."""
    if not condition:
        raise Broken(otherwise)


def fields(value: Any, what: str, keys: tuple[str, ...]) -> list[Any]:
    """Return the values of an object that has exactly these keys, in their order.

    Raises:
        Unknown: If it has others as well.
        Broken: If it is no object, or lacks one.
    """
    expect(type(value) is dict, f"{what} is not an object")
    found = [value[key] for key in keys if key in value]
    if len(found) != len(keys) or len(value) != len(keys):
        msg = f"{what} has the keys {sorted(value)} instead of {sorted(keys)}"
        raise Unknown(msg) if value.keys() > set(keys) else Broken(msg)
    return found


def items(value: Any, what: str, limit: int) -> list[Any]:
    """Return an array of at most ``limit`` items."""
    expect(type(value) is list, f"{what} is not an array")
    expect(len(value) <= limit, f"{what} has {len(value)} items; at most {limit} are ever written")
    return list(value)


def integer(value: Any, what: str) -> int:
    """Return an integer from 0 to :data:`MAX_INTEGER`."""
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        msg = f"{what} is {str(value)[:40]}, not an integer from 0 to 2**63 - 1"
        raise Broken(msg)
    return value


def integer_column(values: Sequence[Any], what: Callable[[int], str]) -> None:
    """Check that all values are integers from 0 to :data:`MAX_INTEGER`; ``what`` names one by its index."""
    if {*map(type, values)} <= {int} and (not values or (min(values) >= 0 and max(values) <= MAX_INTEGER)):
        return
    for index, value in enumerate(values):
        integer(value, what(index))


def text(value: Any, what: str) -> str:
    """Return a text that has a UTF-8 form."""
    expect(type(value) is str, f"{what} is not a string")
    if not value.isascii():
        expect(not _SURROGATE.search(value), f"{what} has an unpaired surrogate")
    return str(value)


def text_column(values: Sequence[Any], what: Callable[[int], str]) -> None:
    """Check that all values are texts that have a UTF-8 form; ``what`` names one by its index."""
    if {*map(type, values)} <= {str} and all(map(str.isascii, values)):
        return
    for index, value in enumerate(values):
        text(value, what(index))


def crc(value: Any, what: str) -> int:
    """Return a checksum written as 8 lower-case hexadecimal digits."""
    expect(_CRC.fullmatch(text(value, what)), f"{what} is not 8 hexadecimal digits")
    return int(value, 16)


def crc_column(values: Sequence[Any], what: Callable[[int], str]) -> list[int]:
    """Return checksums, each written as 8 hexadecimal digits; ``what`` names one by its index."""
    text_column(values, what)
    if not all(map(_CRC.fullmatch, values)):
        for index, value in enumerate(values):
            crc(value, what(index))
    return [int(value, 16) for value in values]


def identifier(value: Any, what: str) -> str:
    """Return an id of 8 to 64 lower-case hexadecimal digits."""
    expect(_IDENTIFIER.fullmatch(text(value, what)), f"{what} is not 8 to 64 hexadecimal digits")
    return str(value)


def time(value: Any, what: str) -> str:
    """Return an ISO 8601 time that states its offset."""
    try:
        aware = datetime.fromisoformat(text(value, what)).tzinfo is not None
    except ValueError:
        aware = False
    expect(aware, f"{what} is {str(value)[:40]!r}, not an ISO 8601 time with an offset")
    return str(value)
