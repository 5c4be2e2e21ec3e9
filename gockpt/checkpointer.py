"""Checkpointer: saving of one model and its optimizers into one directory, as an object."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self

from gockpt import preemption, registry
from gockpt.deferred_signals import uninterrupted
from gockpt.process_end import finish_at_end
from gockpt.saver import Saver
from gockpt.validation import modules

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from types import TracebackType

    from gockpt.options import Options
    from gockpt.saver import Optimizers
    from gockpt.validation import Model

__all__ = ["Checkpointer"]


class Checkpointer(Saver):
    """Saves one model and its optimizers into one directory, while training goes on.

    A checkpoint published for step t holds, bit for bit, what a blocking save at that point of the
    loop would have written. Use it as a context manager: leaving it normally finishes the saves in
    flight; leaving it by an exception aborts an open window and finishes a save that was captured.

    Examples:
        >>> import torch, tempfile, gockpt
        >>> model = torch.nn.Linear(4, 2)
        >>> opt = torch.optim.AdamW(model.parameters())
        >>> with tempfile.TemporaryDirectory() as path:
        ...     options = gockpt.Options(when_busy="wait")  # these steps are faster than any disk
        ...     with gockpt.Checkpointer(model, opt, path, every=5, options=options) as saver:
        ...         for step in range(1, 11):
        ...             model(torch.ones(1, 4)).sum().backward()
        ...             opt.step(); opt.zero_grad()
        ...             handle = saver.after_step(step)
        ...     gockpt.steps(path)
        [5, 10]
    """

    @uninterrupted
    def __init__(
        self,
        model: Model,
        optimizer: Optimizers,
        path: str | os.PathLike[str] = "checkpoints",
        *,
        every: int | Literal["auto"] | None = None,
        extra: Mapping[str, Any] | None = None,
        options: Options | None = None,
    ) -> None:
        """Attach to a model and its optimizers, and take the path for writing.

        Args:
            model: A module, a list of modules, or a mapping of names to tensors.
            optimizer: One optimizer, several, or ``None`` for a model alone.
            path: Directory of the checkpoints; created if missing.
            every: ``None`` saves the state of each call. With a number a save is due whenever
                ``step // every`` grows; ``"auto"`` chooses the interval.
            extra: Saved with every checkpoint: objects with ``state_dict()``, callables, plain values.
            options: See :class:`gockpt.Options`.

        Raises:
            UsageError: If an argument is invalid, or ``path`` holds checkpoints that the model was not loaded
                from (see :class:`gockpt.Options`, ``existing``); names it and the way out.
            PathBusy: If another living writer saves into ``path``.
            StorageError: If ``path`` can't be created or written.
            RemoteError: If ``options.remote`` can't be reached.
        """
        with registry.lock:
            registry.close_orphans()
            super().__init__(model, optimizer, path, every=every, extra=extra, options=options)
            registry.opened.add(self)
            finish_at_end(self)
            preemption.watch(self)
            self._farewells = [weakref.finalize(m, registry.model_gone, self) for m in modules(model)]

    def _take_over(self, *, resumed: bool) -> None:
        registry.take_over(self.path, self, resumed=resumed)

    def _refuse_step(self) -> NoReturn:
        registry.expect_not_taken(self)
        super()._refuse_step()

    def _stepped(self) -> None:
        preemption.after_step(self)

    @uninterrupted
    def close(self) -> None:
        """Finish saves and uploads in flight, then release threads, memory and the path.

        If it is interrupted (Ctrl-C), a captured save is still written; the next call of the library, the
        next use of the path or the end of the program then closes it.
        """
        try:
            super().close()
        except BaseException as error:
            if not self.closed and not isinstance(error, Exception):
                registry.close_later(self)
            raise

    def _leave(self) -> None:
        """Remove every reference to this checkpointer, after it is closed."""
        if self.closed:
            registry.opened.discard(self)
            preemption.let_go(self)
            super()._leave()
            if self not in registry.by_call.values():
                self.forget_model()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.of_this_process:
            return
        if error is None:
            self.close()
            return
        try:
            self.abort(f"{type(error).__name__} left the with block")
            self.close()
        except Exception as failure:  # noqa: BLE001 - the error in flight is the one to raise
            error.add_note(f"gockpt: the save in flight failed as well: {failure}")
