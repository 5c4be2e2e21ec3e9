"""A model of what a power loss leaves behind, kept beside the real file system.

Each file and directory has what is surely on the disk, and a list of effects that may or may not be. An
``fsync`` makes those of its file or directory sure, ``syncfs`` those of all. After every call the model is
asked what the disk may hold: nothing unsynced, all of it, names without contents, contents without names,
or any part of it, writes torn at page boundaries. That is stricter than any journalling file system.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from gockpt.storage.local.filesystem import CALLS, Filesystem

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = 4096


@dataclass
class Node:
    """A file (``content`` is bytes) or directory (``content`` maps names to nodes): the durable state.

    Attributes:
        content: What is surely on the disk.
        pending: Effects since the last sync, in order.
        paths: Every name it had, relative to the watched directory; for messages and mutations.
    """

    content: Any
    pending: list[tuple[Any, ...]] = field(default_factory=list)
    path: str = ""

    @property
    def is_directory(self) -> bool:
        return isinstance(self.content, dict)

    def after(self, effects: list[tuple[Any, ...]]) -> Any:
        """Return the content with these effects."""
        if self.is_directory:
            entries = dict(self.content)
            for effect in effects:
                _change_entries(entries, effect)
            return entries
        data = bytearray(self.content)
        for kind, *what in effects:
            if kind == "write":
                offset, piece = what
                data.extend(bytes(max(0, offset - len(data))))
                data[offset : offset + len(piece)] = piece
            elif kind == "grow":
                data.extend(bytes(max(0, what[0] - len(data))))
            else:
                size = what[0]
                data = data[:size] + bytes(max(0, size - len(data)))
        return bytes(data)

    @property
    def live(self) -> Any:
        """What a running system sees."""
        return self.after(self.pending)

    def sync(self) -> None:
        self.content, self.pending = self.live, []


def _change_entries(entries: dict[str, Node], effect: tuple[Any, ...]) -> None:
    kind, *what = effect
    if kind == "set":
        entries[what[0]] = what[1]
    elif kind == "delete":
        name, node = what
        if entries.get(name) is node:
            del entries[name]
    elif kind == "move":
        source, target, node = what
        if entries.get(source) is node:
            del entries[source]
        entries[target] = node
    else:  # swap
        one, one_node, other, other_node = what
        entries[one], entries[other] = other_node, one_node


class PowerLoss(Filesystem):
    """Does everything for real, keeps the model, and calls ``look(model, call)`` after each call.

    Args:
        root: The directory that is watched; must exist and be empty.
        look: Asked after each call; ``None`` to ask nothing.
        forgets: ``(call, path) -> bool``: syncs that are left out of the model, as by a faulty program.
        whole: What ``syncfs_reports_errors`` answers.
    """

    def __init__(self, root: str, *, look=None, forgets=lambda call, path: False, whole: bool = True) -> None:
        self.root = Node({})
        self.look, self.forgets, self.whole = look, forgets, whole
        self.fds: dict[int, Node | None] = {}
        self.nodes: dict[tuple[int, int], Node] = {_key(os.stat(root)): self.root}
        self.count = 0

    # Each call's effect on the model; the real call comes first, so an error leaves the model alone.

    def _parent(self, name: str, dir_fd: int | None) -> tuple[Node | None, str]:
        if dir_fd is None:
            return None, name
        *parents, last = name.split("/")
        node = self.fds[dir_fd]
        for parent in parents:
            node = node.live[parent]
        return node, last

    def did_open(self, fd, name, flags, *, dir_fd=None):
        parent, last = self._parent(name, dir_fd)
        if parent is None:
            self.fds[fd] = self.nodes.get(_key(os.fstat(fd)))
            return
        if last not in parent.live:
            assert flags & os.O_CREAT
            node = Node(b"", path=f"{parent.path}/{last}".lstrip("/"))
            parent.pending.append(("set", last, node))
        self.fds[fd] = parent.live[last]

    def did_close(self, result, fd):
        del self.fds[fd]

    def did_mkdir(self, result, name, *, dir_fd=None):
        parent, last = self._parent(name, dir_fd)
        parent.pending.append(("set", last, Node({}, path=f"{parent.path}/{last}".lstrip("/"))))

    def did_pwrite(self, result, fd, data, offset):
        self.fds[fd].pending.append(("write", offset, bytes(memoryview(data)[:result])))

    def did_ftruncate(self, result, fd, nbytes):
        self.fds[fd].pending.append(("size", nbytes))

    def did_fallocate(self, result, fd, nbytes):
        self.fds[fd].pending.append(("grow", nbytes))

    def did_fsync(self, result, fd):
        node = self.fds[fd]
        if node is not None and not self.forgets("fsync", node.path):
            node.sync()

    def did_syncfs(self, result, fd):
        if not self.forgets("syncfs", ""):
            for node in self.everything(self.root):
                node.sync()

    def did_rename(self, result, source, target, *, dir_fd):
        (parent, old), (other, new) = self._parent(source, dir_fd), self._parent(target, dir_fd)
        node = parent.live[old]
        if parent is other:
            parent.pending.append(("move", old, new, node))
        else:
            parent.pending.append(("delete", old, node))
            other.pending.append(("set", new, node))

    did_rename_new = did_rename

    def did_exchange(self, result, one, other, *, dir_fd):
        parent, _ = self._parent(one, dir_fd)
        parent.pending.append(("swap", one, parent.live[one], other, parent.live[other]))

    def did_unlink(self, result, name, *, dir_fd):
        parent, last = self._parent(name, dir_fd)
        parent.pending.append(("delete", last, parent.live[last]))

    did_rmdir = did_unlink

    def did_nothing(self, *arguments, **keywords):
        pass

    did_pread = did_listdir = did_stat = did_fstat = did_touch = did_lock = did_direct_alignment = did_nothing

    def syncfs_reports_errors(self, fd):
        return self.whole

    # What may be on the disk.

    def everything(self, node: Node) -> list[Node]:
        found = [node]
        if node.is_directory:
            for child in node.live.values():
                found += self.everything(child)
        return found

    def left(self, choose: Callable[[Node], list[tuple[Any, ...]]]) -> dict[str, bytes | None]:
        """Return the tree that is there after the power came back, for a choice of unsynced effects."""
        tree: dict[str, bytes | None] = {}

        def add(node: Node, path: str) -> None:
            content = node.after(choose(node))
            if node.is_directory:
                for name, child in content.items():
                    inside = f"{path}/{name}".lstrip("/")
                    tree[inside] = None
                    add(child, inside)
            else:
                tree[path] = content

        add(self.root, "")
        return tree

    def outcomes(self, seeds: int) -> dict[str, dict[str, bytes | None]]:
        """Return what the disk may hold, by a name for the kind of loss."""
        kinds = {
            "none": lambda node: [],
            "all": lambda node: node.pending,
            "names only": lambda node: node.pending if node.is_directory else [],
            "contents only": lambda node: [] if node.is_directory else node.pending,
            "sizes only": lambda node: node.pending if node.is_directory else _without_data(node.pending),
        }
        for seed in range(seeds):
            kinds[f"some {seed}"] = _torn(random.Random(f"{self.count} {seed}"))
        return {kind: self.left(choose) for kind, choose in kinds.items()}


def _without_data(pending):
    return [
        ("write", offset, bytes(len(data))) if kind == "write" else (kind, offset, *data)
        for kind, offset, *data in pending
        if kind != "write"
    ] + [("grow", effect[1] + len(effect[2])) for effect in pending if effect[0] == "write"]


def _torn(chance: random.Random) -> Callable[[Node], list[tuple[Any, ...]]]:
    chosen: dict[int, list[tuple[Any, ...]]] = {}

    def choose(node: Node) -> list[tuple[Any, ...]]:
        if id(node) not in chosen:  # a node that two names lead to is still one node
            effects: list[tuple[Any, ...]] = []
            for effect in node.pending:
                if effect[0] == "write":
                    _, offset, data = effect
                    pages = range(0, len(data), PAGE)
                    effects += [
                        ("write", offset + at, data[at : at + PAGE]) for at in pages if chance.random() < 0.5
                    ]
                elif chance.random() < 0.5:
                    effects.append(effect)
            chosen[id(node)] = effects
        return chosen[id(node)]

    return choose


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _modelled(name: str) -> Callable[..., Any]:
    real = getattr(Filesystem, name)

    def method(self: PowerLoss, *arguments: Any, **keywords: Any) -> Any:
        # Syncing happens in the model; here nobody pulls the plug.
        result = None if name in ("fsync", "syncfs") else real(self, *arguments, **keywords)
        getattr(self, f"did_{name}")(result, *arguments, **keywords)
        self.count += 1
        if self.look is not None:
            self.look(self, name)
        return result

    return method


for _name in CALLS:
    if _name != "syncfs_reports_errors":
        setattr(PowerLoss, _name, _modelled(_name))


def lay_down(tree: dict[str, bytes | None], path: str) -> None:
    """Make a real directory that holds a tree."""
    os.mkdir(path)
    for inside, data in sorted(tree.items()):
        full = os.path.join(path, inside)
        if data is None:
            os.makedirs(full, exist_ok=True)
        else:
            with open(full, "wb") as file:
                file.write(data)


@pytest.fixture(scope="session")
def power() -> SimpleNamespace:
    return SimpleNamespace(Loss=PowerLoss, lay_down=lay_down)
