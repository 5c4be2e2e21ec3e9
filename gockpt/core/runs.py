"""Identity of a training run: its own checkpoints, and the right to write into a path.

Pure arithmetic on manifests. A run has a random id, which a load preserves: a process that loads a checkpoint
and saves to the path of that checkpoint's run continues the same run. One that saves to an empty path starts
a run with a new id, which lists as *ancestors* the runs that its state descends from.

Promise: only checkpoints of the same run or of an ancestor count as a run's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Ancestor", "Claim", "Run", "adopted", "ancestors_of", "beginning", "claim"]

MOST_ANCESTORS = 64
"""Largest number of ancestors that a checkpoint lists; older ones are dropped."""

Ancestor = tuple[str, int]
"""An ancestor run's id, and the ``seq`` of the last of its checkpoints that counts as the run's own."""


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
        """Return a new run that continues in another path from this run's checkpoint ``seq``.

        Examples:
            >>> Run("aa").forked("bb", 3)
            Run(id='bb', ancestors=(('aa', 3),))
        """
        return Run(new_id, ((self.id, seq), *self.ancestors)[:MOST_ANCESTORS])


Ancestry = tuple[Run, int]
"""The run of a checkpoint, and its ``seq``."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to write into a path that has checkpoints.

    Attributes:
        run: The run to write as.
        foreign: Whether the newest checkpoint there is another run's.
    """

    run: Run
    foreign: bool = False


def beginning(*, new_id: str, run: Run | None, loaded: Ancestry | None, home: bool) -> Run:
    """Return the run as which a model is saved into a path without checkpoints.

    Args:
        new_id: The id for a new run.
        run: The run as which the model has been saved since it was loaded, if any.
        loaded: The checkpoint that was loaded into it, if any.
        home: Whether that was loaded from this path, or from its copies in an object store.
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
    """Return the run as which a model may be saved into a path with checkpoints; ``None`` if it may not.

    Args:
        newest: Run and ``seq`` of the newest checkpoint there.
        new_id: The id for a new run.
        run: The run as which the model has been saved since it was loaded, if any.
        loaded: The checkpoint that was loaded into it, if any.
        here: Whether that was loaded from this very path.
        process: The runs that this process has saved, by id.
        anyway: Whether the user allowed other runs' checkpoints there.
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
    """Return the run, with checkpoints of gockpt versions that wrote no ancestors counted as its own.

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

    Attributes are untrusted: a malformed list counts as an empty one.
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
