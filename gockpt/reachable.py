"""Detection of objects that a program no longer uses, but leftover references keep alive.

A traceback, an interrupted frame and a notebook's output history keep objects alive that nothing will use
again. Promise: an object that is reachable from a running frame or a module's variable counts as used, and so
does one in doubt.
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
"""Names under which notebooks and the interpreter keep outputs and errors."""


def in_use(get: Callable[[], list[Any]]) -> bool:
    """Whether one of some objects is reachable from a running frame or a module's variable.

    Args:
        get: Returns the objects in a new list, which holds the caller's only reference to them: a running
            frame is recognised by references that no object known to the garbage collector holds.
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
    """Return the ids of modules' variables, and of namespaces and histories, which the search skips."""
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
    """Whether references of an object don't count as use; running frames are recognised otherwise."""
    return isinstance(one, (FrameType, TracebackType)) or _is_ours(type(one).__module__)


def _is_ours(module: Any) -> bool:
    return isinstance(module, str) and (module == "gockpt" or module.startswith("gockpt."))
