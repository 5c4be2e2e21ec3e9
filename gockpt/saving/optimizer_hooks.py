"""Optimizer hooks that only collect: they never raise and never keep the engine alive.

The pre-hook runs last of all pre-hooks and the post-hook first of all post-hooks, so that they see the values
that the optimizer consumed, whatever other hooks do. Nested pairs (a subclass calling ``super().step()``)
count as one update: the outermost.
"""

from __future__ import annotations

import os
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch.utils.hooks import RemovableHandle

__all__ = ["Hooks", "Listener"]


class Listener(Protocol):
    """Receiver of an optimizer's updates."""

    def before_hooks(self) -> None:
        """Other pre-hooks, which may change parameters, are about to run."""

    def before_update(self, optimizer: torch.optim.Optimizer, *, closure: bool) -> None:
        """The optimizer is about to change parameters; ``closure``: after running other code, such as one."""

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer has changed parameters."""


class Hooks:
    """The hooks of one engine on its optimizers."""

    def __init__(self, optimizers: Sequence[Any], listener: Listener) -> None:
        # Optimizers of another make have no hooks: their updates are not seen, and so not replayed.
        self._optimizers = [o for o in optimizers if hasattr(o, "_optimizer_step_post_hooks")]
        self._listener: Callable[[], Listener | None] = weakref.ref(listener)
        self._pid = os.getpid()
        self._depth: dict[int, int] = {}
        self._calling = 0
        self._handles: list[RemovableHandle] = []
        for optimizer in self._optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._first))
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))
        self.assert_order()

    def assert_order(self) -> None:
        """Put ours first and last before the update, and first after it, again. Only outside hooks."""
        for index, optimizer in enumerate(self._optimizers):
            first, last, post = self._handles[3 * index : 3 * index + 3]
            before: Any = getattr(optimizer, "_optimizer_step_pre_hooks", {})
            after: Any = getattr(optimizer, "_optimizer_step_post_hooks", {})
            if first.id in before and last.id in before:
                before.move_to_end(first.id, last=False)
                before.move_to_end(last.id)
            if post.id in after:
                after.move_to_end(post.id, last=False)

    def reset(self) -> bool:
        """Forget half-finished updates; whether there was one (a step that ended in an exception)."""
        unfinished = any(self._depth.values())
        self._depth.clear()
        return unfinished

    def let_go(self) -> None:
        """Forget the optimizers; their hooks then do nothing."""
        self._optimizers = []

    def remove(self) -> None:
        """Take the hooks off."""
        if self._calling:
            # torch is iterating over the hooks now. These stay, and do nothing.
            self._listener = _nobody
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _heard(self) -> Listener | None:
        """Return the listener; ``None`` in a forked child, and while a step is being compiled.

        A compiled step must not have these hooks traced into it; its updates are then not seen, which
        the ticks notice.
        """
        if torch.compiler.is_compiling() or os.getpid() != self._pid:
            return None
        return self._listener()

    def _first(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        listener = self._heard()
        # Two are ours.
        if listener is not None and len(optimizer._optimizer_step_pre_hooks) > 2:  # noqa: SLF001
            with self._call():
                listener.before_hooks()

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        listener = self._heard()
        if listener is None:
            return
        depth = self._depth[id(optimizer)] = self._depth.get(id(optimizer), 0) + 1
        if depth == 1:
            # torch hands over the arguments of step() with the optimizer itself first.
            given = any(value is not None for value in (*args[1:], *kwargs.values()))
            # A hook that came inside a window runs behind this one: other code as well.
            ours = {handle.id for handle in self._handles}
            later = next(reversed(getattr(optimizer, "_optimizer_step_pre_hooks", {})), None) not in ours
            with self._call():
                listener.before_update(optimizer, closure=given or later)

    def _after(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        listener = self._heard()
        if listener is None:
            return
        depth = self._depth[id(optimizer)] = max(0, self._depth.get(id(optimizer), 0) - 1)
        if depth == 0:
            with self._call():
                listener.after_update(optimizer)

    @contextmanager
    def _call(self) -> Iterator[None]:
        self._calling += 1
        try:
            yield
        finally:
            self._calling -= 1


def _nobody() -> None:
    """Stand in for a weak reference to a listener that is gone."""
