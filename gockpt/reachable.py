"""Whether a program still uses an object, or only something that is left over keeps it alive.

A traceback, a frame that was interrupted and a notebook's output history keep objects alive that nothing
will use again. Promise: what a running frame or a module's variable leads to counts as used, and so does what
can't be told.
"""

from __future__ import annotations

import gc
import re
import sys
from types import FrameType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["in_use"]

MOST_LEVELS = 24
MOST_OBJECTS = 50_000
"""Bounds of the search: beyond them an object counts as used."""

_HISTORY = re.compile(r"_+|_\d+|_i+\d*|_i?h|_oh|_dh|In|Out|last_(traceback|value|exc|type)")
"""Names under which notebooks and the interpreter keep what was shown and what failed."""


def in_use(get: Callable[[], list[Any]]) -> bool:
    """Whether a running frame or a module's variable leads to one of some objects.

    Args:
        get: Returns them in a list of its own, which holds the only reference that the caller has to them:
            frames that run are told by references that no object the garbage collector knows accounts for.
    """
    variables, skipped = _module_variables()
    alone = next(map(sys.getrefcount, [object()])) - 1
    level = get()
    seen: set[int] = set()
    for _ in range(MOST_LEVELS):
        seen.update(map(id, level))
        if len(seen) > MOST_OBJECTS or any(number in variables for number in map(id, level)):
            return True
        unaccounted = dict(zip(map(id, level), map(sys.getrefcount, level), strict=True))
        following: list[Any] = []
        referrers = gc.get_referrers(*level)
        while referrers:
            following.append(referrers.pop())
            for number in map(id, gc.get_referents(following[-1])):
                if number in unaccounted:
                    unaccounted[number] -= 1
            number = id(following[-1])
            if following[-1] is level or number in seen or number in skipped or _is_left_over(following[-1]):
                following.pop()
        if any(count > alone for count in unaccounted.values()):
            return True
        if not following:
            return False
        level = following
    return True


def _module_variables() -> tuple[set[int], set[int]]:
    """Return the ids of what modules' variables are, and of namespaces and histories, which lead nowhere."""
    variables: set[int] = set()
    skipped: set[int] = set()
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType):
            continue
        skipped.add(id(vars(module)))
        for name, value in list(vars(module).items()):
            if _HISTORY.fullmatch(name):
                skipped.add(id(value))
            elif not _is_ours(vars(module).get("__name__")):
                variables.add(id(value))
    return variables - skipped, skipped


def _is_left_over(one: object) -> bool:
    """Whether what it leads to is not used for that. Frames that run are no objects that lead anywhere."""
    return isinstance(one, (FrameType, TracebackType)) or _is_ours(type(one).__module__)


def _is_ours(module: Any) -> bool:
    return isinstance(module, str) and (module == "gockpt" or module.startswith("gockpt."))
