"""Classes and enum members that a checkpoint names, looked for among those that exist in this process.

Promise: nothing is imported, and no code of any module runs. A name that nothing has is an error.
"""

from __future__ import annotations

import enum
import sys
from typing import TYPE_CHECKING, Any

from gockpt.errors import StateMismatch

if TYPE_CHECKING:
    from gockpt.state.value_encoder import Json

__all__ = ["class_name", "enum_document", "enum_member", "known_subclasses"]


def class_name(kind: type) -> str:
    """Return a class's module and qualified name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def enum_document(member: enum.Enum) -> dict[str, Json] | None:
    """Return ``{"$enum": [class, name]}``; ``None`` for a combination of flags, which has no such name."""
    if member.name not in type(member).__members__:
        return None
    return {"$enum": [class_name(type(member)), member.name]}


def enum_member(content: Any, where: str) -> enum.Enum:
    """Return the member that a document names.

    Args:
        content: What stands under ``$enum``.
        where: What holds it, for the message.

    Raises:
        StateMismatch: If no enum of that name exists in this process, or it has no such member.
    """
    if isinstance(content, list) and len(content) == 2:
        for kind in known_subclasses(enum.Enum, str(content[0])):
            if str(content[1]) in kind.__members__:
                return kind.__members__[str(content[1])]  # type: ignore[no-any-return]
    named = ".".join(map(str, content)) if isinstance(content, list) else str(content)
    msg = f"{where} holds {named[:120]}, of an enum that is not imported here; import its module first"
    raise StateMismatch(msg, mismatched=(where,))


def known_subclasses(base: type, name: str) -> list[Any]:
    """Return the existing subclasses of a class that have this name.

    If there are several, as after a cell of a notebook ran again, the one that its module holds, if any.
    """
    found: list[Any] = []
    seen: set[type] = set()
    waiting: list[type] = [base]
    while waiting:
        kind: type
        for kind in type.__subclasses__(waiting.pop()):
            if kind not in seen:
                seen.add(kind)
                waiting.append(kind)
                if class_name(kind) == name:
                    found.append(kind)
    if len(found) > 1:
        held = [kind for kind in found if _held(kind) is kind]
        return held or found
    return found


def _held(kind: type) -> Any:
    """Return what stands under a class's name in its module."""
    place: Any = sys.modules.get(kind.__module__)
    for part in kind.__qualname__.split("."):
        place = vars(place).get(part) if hasattr(place, "__dict__") else None
    return place
