"""Look-up of classes that a checkpoint names, among those that exist in this process.

Promise: nothing is imported, and no code of any module runs. An unknown name finds nothing.
"""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["class_name", "known_subclasses"]


def class_name(kind: type) -> str:
    """Return a class's module and qualified name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def known_subclasses(base: type, name: str) -> list[Any]:
    """Return the existing subclasses of a class that have this name.

    If there are several, as after a notebook cell ran again, only the one that its module holds, if any.
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
    """Return the object that a class's module holds under the class's name."""
    place: Any = sys.modules.get(kind.__module__)
    for part in kind.__qualname__.split("."):
        place = vars(place).get(part) if hasattr(place, "__dict__") else None
    return place
