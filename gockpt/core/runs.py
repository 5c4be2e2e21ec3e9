"""The identity of a training run: which checkpoints are its own, and who may go on in a path.

Pure arithmetic on what manifests say. A run has a random id, which a load carries on: whoever loads a
checkpoint and goes on where checkpoints of its run are is the same run. Whoever goes on in an empty path
gets an id of its own, and remembers as *ancestors* the runs that its state descends from.

Promise: a checkpoint whose run is neither the same nor an ancestor is never called a run's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Ancestor", "Claim", "Run", "adopted", "ancestors_of", "beginning", "claim"]

MOST_ANCESTORS = 64
"""Ancestors that a checkpoint lists; older ones are forgotten."""

Ancestor = tuple[str, int]
"""A run's id, and the ``seq`` of the last of its checkpoints that counts."""


@dataclass(frozen=True, slots=True)
class Run:
    """A training run.

    Attributes:
        id: Hexadecimal, random.
        ancestors: Runs that its state descends from, the latest first.
    """

    id: str
    ancestors: tuple[Ancestor, ...] = ()

    def owns(self, run: str, seq: int) -> bool:
        """Whether a checkpoint is this run's own, or one that its state descends from.

        Examples:
            >>> one = Run("bb", (("aa", 3),))
            >>> one.owns("bb", 9), one.owns("aa", 3), one.owns("aa", 4), one.owns("cc", 1)
            (True, True, False, False)
        """
        return run == self.id or any(run == other and seq <= last for other, last in self.ancestors)

    def forked(self, new_id: str, seq: int) -> Run:
        """Return the run that goes on elsewhere from this one's checkpoint ``seq``.

        Examples:
            >>> Run("aa").forked("bb", 3)
            Run(id='bb', ancestors=(('aa', 3),))
        """
        return Run(new_id, ((self.id, seq), *self.ancestors)[:MOST_ANCESTORS])


Ancestry = tuple[Run, int]
"""The run of a checkpoint, and its ``seq``."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to go on in a place.

    Attributes:
        run: As which run.
        foreign: Whether the newest checkpoint there is another run's.
    """

    run: Run
    foreign: bool = False


def beginning(*, new_id: str, run: Run | None, loaded: Ancestry | None, home: bool) -> Run:
    """Return as which run a model is saved into a place without checkpoints.

    Args:
        new_id: The id of the run, should it be a new one.
        run: As which run the model has been saved before, since it was loaded.
        loaded: What was loaded into it.
        home: Whether that was loaded from this place, or from its copies in an object store.
    """
    if run is not None:
        return run
    if loaded is None:
        return Run(new_id)
    return loaded[0] if home else loaded[0].forked(new_id, loaded[1])


def claim(
    newest: Ancestor,
    *,
    new_id: str,
    run: Run | None,
    loaded: Ancestry | None,
    here: bool,
    process: dict[str, Run],
    anyway: bool,
) -> Claim | None:
    """Return as which run a model may be saved into a place with checkpoints; ``None`` if it may not.

    Args:
        newest: Run and ``seq`` of the newest checkpoint there.
        new_id: The id of the run, should it be a new one.
        run: As which run the model has been saved before, since it was loaded.
        loaded: What was loaded into it.
        here: Whether that was loaded from this very place.
        process: The runs that this process has saved, by id.
        anyway: Whether the user said that what is there doesn't matter.
    """
    known = run or (loaded[0] if loaded else None)
    if known is not None and (here or known.owns(*newest)):
        return Claim(known)
    if newest[0] in process:
        return Claim(process[newest[0]])
    if anyway:
        return Claim(beginning(new_id=new_id, run=run, loaded=loaded, home=False), foreign=True)
    return None


def adopted(run: Run, unlabelled: Iterable[Ancestor]) -> Run:
    """Return the run with the checkpoints of a gockpt that knew no ancestors among its own.

    Examples:
        >>> adopted(Run("aa"), [("bb", 1), ("bb", 2), ("aa", 3)])
        Run(id='aa', ancestors=(('bb', 2),))
    """
    last: dict[str, int] = {}
    for other, seq in unlabelled:
        if not run.owns(other, seq):
            last[other] = max(seq, last.get(other, seq))
    added = sorted(last.items(), key=lambda item: -item[1])
    return Run(run.id, (*run.ancestors, *added)[:MOST_ANCESTORS])


def ancestors_of(attributes: Any) -> tuple[Ancestor, ...] | None:
    """Return the ancestors that a checkpoint's attributes list; ``None`` if an older gockpt wrote it.

    Attributes are anybody's: what is no list of ancestors counts as none.
    """
    own = attributes.get("gockpt") if isinstance(attributes, dict) else None
    listed = own.get("ancestors") if isinstance(own, dict) else None
    if not isinstance(listed, list):
        return None
    return tuple(
        (entry[0], entry[1])
        for entry in listed[:MOST_ANCESTORS]
        if isinstance(entry, list) and [type(part) for part in entry] == [str, int]
    )
