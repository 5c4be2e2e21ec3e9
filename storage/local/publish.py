"""The last step of a commit: give a complete partial its public name.

Promise: at every moment, crash or power loss included, a reader finds the previous checkpoint of that
step or the new one, whole; nothing is deleted before the new one is durable.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from gockpt.errors import StorageError
from gockpt.storage.format import step_names
from gockpt.storage.local import files
from gockpt.storage.local.catalog import identify

if TYPE_CHECKING:
    from gockpt.storage.format.manifest import Identity
    from gockpt.storage.local.catalog import Place

__all__ = ["Replaced", "expect_replaceable", "expect_step_replaceable", "publish", "set_aside"]

Replaced = list[tuple[str, "Identity"]]
"""Replaced checkpoints that still exist: their present names and their identities."""


Owns = Callable[["Identity"], bool]
"""Whether a checkpoint is the writing run's own."""


def expect_replaceable(place: Place, name: str, owns: Owns) -> Identity | None:
    """Return the complete checkpoint that stands under a public name; ``None`` if nothing does.

    Raises:
        StorageError: If something else stands there, or another run's checkpoint. It is not ours to move.
        OSError: If that can't be told.
    """
    identity = identify(place, name)
    if identity is None and place.has(name):
        msg = (
            f"{place.of(name)} exists and is no complete gockpt checkpoint (damaged, or somebody else's); "
            "move it away, or save to another path"
        )
        raise StorageError(msg)
    if identity is not None and not owns(identity):
        msg = (
            f"{place.of(name)} is a checkpoint of another run ({identity.run}), which is never replaced; "
            "save into another path, save other steps, or move it away"
        )
        raise StorageError(msg)
    return identity


def expect_step_replaceable(place: Place, step: int, owns: Owns) -> None:
    """Refuse to write a step whose names hold anything that may not be replaced.

    Raises:
        StorageError: As for :func:`expect_replaceable`.
        OSError: As for :func:`expect_replaceable`.
    """
    for archive in (False, True):
        expect_replaceable(place, step_names.of_step(step, archive=archive), owns)


def publish(place: Place, partial: str, step: int, owns: Owns, *, archive: bool) -> Replaced:
    """Rename a partial to its step's name and make that durable.

    Args:
        place: Where it lies.
        partial: Its name.
        step: The step.
        owns: Whether a checkpoint may be replaced.
        archive: Whether the partial is an archive.

    Returns:
        What it replaced: under the same name, and under that of the other layout.

    Raises:
        StorageError: If what stands there may not be replaced.
        OSError: What the system says. Then the new checkpoint may or may not be published; the previous
            one is intact either way.
    """
    target, other = (step_names.of_step(step, archive=which) for which in (archive, not archive))
    beside = expect_replaceable(place, other, owns)
    replaced: Replaced = [] if beside is None else [(other, beside)]
    try:
        # Where that is a look and a rename, the writer lock keeps the name free between them.
        files.rename_new(place.fs, partial, target, dir_fd=place.fd)
    except FileExistsError:
        replaced += _replace(place, partial, target, step, owns)
    place.fs.fsync(place.fd)
    return replaced


def _replace(place: Place, partial: str, target: str, step: int, owns: Owns) -> Replaced:
    previous = expect_replaceable(place, target, owns)
    if previous is None:  # removed since
        place.fs.rename(partial, target, dir_fd=place.fd)
        return []
    try:
        place.fs.exchange(partial, target, dir_fd=place.fd)
    except OSError as error:
        if error.errno not in files.UNKNOWN_FLAG:
            raise
    else:
        return [(partial, previous)]
    old = step_names.of_old(step, previous.attempt)
    place.fs.rename(target, old, dir_fd=place.fd)
    # Or a power loss could leave the new name in place of the old one, and the old one nowhere.
    place.fs.fsync(place.fd)
    place.fs.rename(partial, target, dir_fd=place.fd)
    return [(old, previous)]


def set_aside(place: Place, replaced: tuple[str, Identity], step: int) -> tuple[str, Identity]:
    """Give what was replaced the name of a replaced checkpoint, once its successor is durable.

    An error leaves it where it is, complete, and the next writer's sweep names it.
    """
    name, identity = replaced
    old = step_names.of_old(step, identity.attempt)
    if name != old:
        with suppress(OSError):
            place.fs.rename(name, old, dir_fd=place.fd)
            name = old
            place.fs.fsync(place.fd)
    return name, identity
