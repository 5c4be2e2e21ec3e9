"""From the names users see to paths that every file system and every Zarr reader accepts.

Promise: the path of a name depends only on the set of names stored together, never on their order;
two names never share a path, not even on a file system that ignores case; and ordinary names (letters,
digits, ``._=@+,-``) stay as they are. Paths are never parsed back: the manifest holds the true names.

One array is one path: a component's own ``/`` is escaped. An escaped byte is ``~`` and two lower-case
hexadecimal digits of its UTF-8 form; a component too long for a file name is cut and ends in ``~h``
and its hash.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from gockpt.core.array_spec import public_name
from gockpt.errors import UnsupportedState, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["MAX_COMPONENTS", "check_names", "escape", "escape_all", "groups_of"]

MAX_COMPONENTS = 32
MAX_PATH_BYTES = 2000
_MAX_COMPONENT_BYTES = 200
_KEPT_WHEN_CUT = 120

_UNSAFE = re.compile(rb"[^A-Za-z0-9._=@+,-]")
_UNSAFE_OR_CAPITAL = re.compile(rb"[^a-z0-9._=@+,-]")
# Names that mean something else where an array or group stands: Zarr's and our own documents and a
# chunk's key. Windows devices keep their meaning with any suffix.
_RESERVED = re.compile(
    rb"zarr\.json|gockpt\.json(\.tmp)?|state\.json|blocks\.crc32c|\.z(array|group|attrs|metadata)"
    rb"|c(\.[0-9]+)*"
    rb"|(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?",
    re.IGNORECASE | re.DOTALL,
)


def _hex(byte: int) -> bytes:
    return b"~%02x" % byte


def escape(component: str, *, capitals: bool = False) -> str:
    """Return the file name for one component of a name; different components, different file names.

    Args:
        component: Any text without unpaired surrogates; may be empty.
        capitals: Escape capital letters too, for a name that another one equals but for case.

    Raises:
        UnsupportedState: If the text has no UTF-8 form.

    Examples:
        >>> escape("layers.3.mlp.weight"), escape("a/b"), escape("zarr.json"), escape("")
        ('layers.3.mlp.weight', 'a~2fb', '~7aarr.json', '~')
    """
    try:
        raw = component.encode("utf-8")
    except UnicodeEncodeError as error:
        msg = f"the name {component!r} holds an unpaired surrogate and has no file name; rename it"
        raise UnsupportedState(msg) from error
    if not raw:
        return "~"
    unsafe = _UNSAFE_OR_CAPITAL if capitals else _UNSAFE
    text = unsafe.sub(lambda match: _hex(match[0][0]), raw)
    if raw.endswith(b"."):
        text = text[:-1] + _hex(raw[-1])
    # All dots, a leading "__" (reserved by Zarr) and reserved words: the first byte gives them away.
    if text.startswith(b"__") or not raw.strip(b".") or _RESERVED.fullmatch(raw):
        text = _hex(raw[0]) + text[1:] if text[0] == raw[0] else text
    if len(text) > _MAX_COMPONENT_BYTES:
        text = text[:_KEPT_WHEN_CUT] + b"~h" + hashlib.sha256(raw).hexdigest()[:32].encode()
    return text.decode("ascii")


def escape_all(names: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Return the path of every name, components joined by ``/``.

    Where two siblings differ only in case, capitals are escaped in both.

    Raises:
        UnsupportedState: If a name has no path: an unpaired surrogate, or far too long.

    Examples:
        >>> escape_all([("model", "D"), ("model", "e")])
        {('model', 'D'): 'model/D', ('model', 'e'): 'model/e'}
        >>> escape_all([("model", "D"), ("model", "d")])
        {('model', 'D'): 'model/~44', ('model', 'd'): 'model/d'}
    """
    names = list(names)
    plain = {component: escape(component) for component in set(itertools.chain(*names))}
    folded = Counter(map(str.lower, plain.values()))
    alike = {component for component, text in plain.items() if folded[text.lower()] > 1}
    # Which of those have a sibling that differs only in case; the same component may have none elsewhere.
    siblings: defaultdict[tuple[tuple[str, ...], str], set[str]] = defaultdict(set)
    for name in names if alike else ():
        for depth, component in enumerate(name):
            if component in alike:
                siblings[name[:depth], plain[component].lower()].add(component)
    paths = {name: "/".join(map(plain.__getitem__, name)) for name in names}
    for name in names if any(len(components) > 1 for components in siblings.values()) else ():
        paths[name] = "/".join(
            escape(component, capitals=True)
            if len(siblings.get((name[:depth], plain[component].lower()), ())) > 1
            else plain[component]
            for depth, component in enumerate(name)
        )
    for name, path in paths.items():
        if len(name) > MAX_COMPONENTS or len(path) > MAX_PATH_BYTES:
            shown = public_name(name)[:200]
            msg = (
                f"the name {shown!r} ({len(name)} components, {len(path)} bytes as a path) is nested too "
                f"deep or too long; at most {MAX_COMPONENTS} components and {MAX_PATH_BYTES} bytes"
            )
            raise UnsupportedState(msg)
    return paths


def groups_of(names: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return every group that holds one of these arrays, parents before children, the root ``()`` first.

    Examples:
        >>> groups_of([("model", "w"), ("optimizer", "w", "exp_avg")])
        [(), ('model',), ('optimizer',), ('optimizer', 'w')]
    """
    groups: dict[tuple[str, ...], None] = {(): None}
    for parent in dict.fromkeys(name[:-1] for name in names):
        for depth in range(1, len(parent) + 1):
            groups[parent[:depth]] = None
    return list(groups)


def check_names(names: Iterable[tuple[str, ...]]) -> None:
    """Refuse names that can't stand in one checkpoint together.

    Raises:
        UsageError: If a name has no component, comes twice, equals another one once components are
            joined by ``/``, or is a group that holds another array.
    """
    seen: dict[str, tuple[str, ...]] = {}
    names = list(names)
    groups = set(groups_of(names))
    if len(set(map(public_name, names))) == len(names) and groups.isdisjoint(names):
        return
    for name in names:
        public = public_name(name)
        if not name:
            msg = "an array needs a name of at least one component"
        elif public in seen:
            msg = f"two arrays are both called {public!r}: {seen[public]} and {name}; rename one"
        elif name in groups:
            msg = f"{public!r} is an array and at the same time holds other arrays; rename one"
        else:
            seen[public] = name
            continue
        raise UsageError(msg)
