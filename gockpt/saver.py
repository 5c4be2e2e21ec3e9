"""Saver of one model and its optimizers into one directory, without regard to the rest of the process.

:class:`gockpt.checkpointer.Checkpointer` adds that: other savers, signals and the end of the process.
"""

from __future__ import annotations

import logging
import sys
import weakref
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from gockpt.core.step_number import checked_step
from gockpt.deferred_signals import uninterrupted
from gockpt.errors import GockptError, UploadError, UsageError
from gockpt.opening import open_path
from gockpt.ranks import Bystander, is_bystander
from gockpt.saving.engine import Engine
from gockpt.saving.moments import in_signal_handler
from gockpt.state.lineage import note_run, origin_of
from gockpt.state.optimizers import Found, find_optimizers
from gockpt.state.state_document import checked_extra
from gockpt.storage.paths import directory_to_save
from gockpt.validation import (
    anchors,
    checked_every,
    checked_options,
    model_ids,
    modules,
    reference,
)

if TYPE_CHECKING:
    import os
    import threading
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from gockpt.options import Options
    from gockpt.saving.handle import Saved, SaveHandle
    from gockpt.state.lineage import Origin
    from gockpt.uploads import Uploads, UploadStatus
    from gockpt.validation import Model

    Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None

__all__ = ["Saver", "failure_now"]

_log = logging.getLogger("gockpt")


def failure_now() -> int:
    """Return an id of the uncaught exception that was reported last; 0 if there was none."""
    failure = getattr(sys, "last_value", None)
    return 0 if failure is None else id(failure)


class Saver:
    """Saver of one model and its optimizers into one directory, independent of other savers.

    Attributes:
        options: The checked options.
        every: The checked interval.
        path: The directory.
        model_ids: Identities of the model's parts.
        taken: Whether another living model's saver has taken over the path.
        comes_back: Whether ``save_overlapped`` was called for this model and path before it was made.
        failure_before: Id of the uncaught exception that had been reported before the last step.
    """

    def __init__(
        self,
        model: Model,
        optimizer: Optimizers,
        path: str | os.PathLike[str],
        *,
        every: int | Literal["auto"] | None,
        extra: Mapping[str, Any] | None,
        options: Options | None,
    ) -> None:
        """Check the arguments, attach to the model and its optimizers, and take the path for writing.

        Raises:
            UsageError: If an argument is invalid, or ``path`` holds checkpoints of another run.
            PathBusy: If another living writer saves into ``path``.
            StorageError: If ``path`` can't be created or written.
            RemoteError: If ``options.remote`` can't be reached.
        """
        self.options = checked_options(options)
        self.every = checked_every(every, self.options)
        self._extra = checked_extra(extra)
        self.path = directory_to_save(path)
        self._optimizers = find_optimizers(optimizer)
        self.model_ids = model_ids(model)
        self._uploads: Uploads | None = None
        self._calls = 0
        self.taken = False
        self.comes_back = False
        self._waiting_for_step: set[str] = set()
        self._farewells: list[weakref.finalize[..., Any]] = []
        origin = origin_of(model)
        self._engine: Engine | Bystander = (
            Bystander() if is_bystander(model, optimizer) else self._begin(model, optimizer, origin)
        )
        self.failure_before = failure_now()
        self._model = reference(model)
        self._origin = origin

    def _begin(self, model: Model, optimizer: Optimizers, origin: Origin | None) -> Engine:
        """Take the path for writing, and return the engine that saves into it."""
        self._take_over(resumed=origin is not None and origin.path == self.path)
        opened = open_path(self.path, model, origin, self.options)
        self._uploads = opened.uploads
        try:
            engine = Engine(
                reference(model),
                optimizer,
                opened.background,
                every=self.every,
                options=self.options,
                last_step=0 if origin is None else origin.step,
                updates=0 if origin is None else origin.optimizer_steps,
                on_published=self._upload,
            )
        except BaseException:
            opened.background.close()
            raise
        note_run(model, opened.run)
        return engine

    @uninterrupted
    def after_step(
        self, step: int | None = None, extra: Mapping[str, Any] | None = None
    ) -> SaveHandle | None:
        """Report that a training step is complete: the one call in the loop.

        Call it after ``optimizer.step()`` and ``scheduler.step()``. A save of this step holds the state at
        this call. With ``every`` it never waits for storage. With ``every=None`` it waits until the former
        save is durable, and copies the state before it returns.

        Args:
            step: The step just completed; ``None`` counts calls.
            extra: Replaces the extras given at construction, from this call on.

        Returns:
            With ``every=None`` the save of this call; else the newest one, or ``None`` before the first.

        Raises:
            SaveError: If a save failed in the background since the last call. Training may go on.
        """
        if self.closed:
            self._refuse_step()
        if extra is not None:
            self._extra = checked_extra(extra)
        number = checked_step(step)
        if self._put_off("save", harmless=self._engine.at_rest):
            return self.handle
        self._calls += 1
        self.failure_before = failure_now()
        # If a checkpoint was loaded meanwhile, counting continues from its step and updates.
        origin = origin_of(self._model())
        if origin is not None and origin is not self._origin:
            self._engine.count_from(origin.step, origin.optimizer_steps)
        self._origin = origin
        try:
            self._engine.tick(number, self._extra)
        finally:
            self._stepped()
        self._do_what_was_put_off()
        return self.handle

    def wait(self) -> None:
        """Finish saves and uploads in flight; an open window closes at the last reported step."""
        if not self._put_off("wait", harmless=self._engine.only_waits):
            self._finish(self._engine.wait)

    def finish(self) -> SaveHandle | None:
        """Save the last step's state if it isn't saved; return when it is durable and uploaded.

        See :func:`gockpt.finish`.

        Returns:
            The newest save; ``None`` if there is none.

        Raises:
            SaveError: If the state changed after the last call, so that it can't be saved under its step; or
                if a save failed.
        """
        if not self._put_off("finish", harmless=self._engine.finishes):
            self._finish(self._engine.finish)
        return self.handle

    def finish_until(self, deadline: float) -> None:
        """As :meth:`finish`, but wait for disk and uploads until ``deadline`` at most (``monotonic``)."""
        try:
            self._engine.finish(max(0.0, deadline - monotonic()))
        finally:
            if self._uploads is not None:
                self._uploads.wait(max(0.0, deadline - monotonic()))

    def stands(self) -> bool:
        """Whether the state is that of the last step, with all that belongs to it."""
        return self._engine.stands()

    @property
    def step_seconds(self) -> float:
        """Measured duration of a step; 0 before two were reported."""
        return self._engine.step_seconds

    def _put_off(self, what: str, *, harmless: Callable[[], bool]) -> bool:
        """Defer a call to the next step if the state may be inconsistent now; return whether it is deferred.

        Calls in the middle of an update or in a signal handler are deferred, except ``harmless`` ones while
        no step is being reported.
        """
        engine = self._engine
        if not engine.updating and not in_signal_handler():
            return False  # also for an extra that calls the library: the engine raises for that
        if not engine.inside and harmless():
            return False
        _log.warning("%s() was called in the middle of an update: it runs after the next reported step", what)
        self._waiting_for_step.add(what)
        return True

    def _do_what_was_put_off(self) -> None:
        """Make the calls that were deferred until a step was reported."""
        asked, self._waiting_for_step = self._waiting_for_step, set()
        if "finish" in asked:
            self._finish(self._engine.finish)
        elif "save" in asked:
            self._engine.finish(0.0)
        elif "wait" in asked:
            self._finish(self._engine.wait)

    @uninterrupted
    def close(self) -> None:
        """Finish saves and uploads in flight, then release threads, memory and the path."""
        try:
            self._finish(self._engine.close)
        finally:
            self._leave()

    def retire_with_error(self) -> GockptError | None:
        """Close the saver if there is nothing to wait for; return the error of a failed save or upload.

        :attr:`closed` tells whether it was closed.
        """
        if self.busy or self.closed:
            return None
        failure: GockptError | None = None
        try:
            if self._uploads is not None and not self._uploads.settle():
                return None
        except UploadError as error:
            failure = error
        try:
            self._engine.close()
        except GockptError as error:
            failure = error
        finally:
            self._leave()
        return failure

    def retire(self) -> bool:
        """Close the saver of a model that is gone, if that takes no waiting; return whether it is closed.

        A failed upload is tried once more in the background, and waited for like one in flight. Errors are
        logged: no caller is left to raise them to.
        """
        if not self.of_this_process:
            return True
        error = self.retire_with_error()
        if error is not None:
            whose = "a model that is gone" if self.model_is_gone else "a close() that was interrupted"
            _log.warning("of %s: %s", whose, error)
        return self.closed

    def _finish(self, saves: Callable[[], object]) -> None:
        """Finish the saves, then the uploads. A failed save is raised, with a failed upload as its note."""
        try:
            saves()
        except Exception as error:
            if self._uploads is not None:
                try:
                    self._uploads.wait()
                except UploadError as also:
                    error.add_note(f"and {also}")
            raise
        if self._uploads is not None:
            self._uploads.wait()

    @uninterrupted
    def abort(self, why: str = "abort() was called") -> None:
        """Abort an open window; a state that was captured already is still written."""
        self._engine.abort_window(why)

    @property
    def training_thread(self) -> threading.Thread:
        """The thread that reported the last step."""
        return self._engine.training_thread

    @property
    def last_told(self) -> float:
        """Time of the last reported step, in seconds of a monotonic clock."""
        return self._engine.last_told

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._engine.busy

    @property
    def uploads(self) -> UploadStatus | None:
        """Progress of the copies in the object store; ``None`` without ``Options.remote``."""
        return None if self._uploads is None else self._uploads.status

    @property
    def model(self) -> Any:
        """The model, or ``None`` if it no longer exists."""
        return self._model()

    def modules(self) -> list[torch.nn.Module]:
        """Return the modules of the model; none if it no longer exists."""
        return modules(self._model() or {})

    @property
    def model_is_gone(self) -> bool:
        """Whether the model no longer exists."""
        return self._model() is None

    @property
    def window_open(self) -> bool:
        """Whether a window of several steps is open, or a save waits for the next step."""
        return self._engine.window_open

    @property
    def of_this_process(self) -> bool:
        """Whether it was made in this process, not in a parent that forked it."""
        return self._engine.of_this_process

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._engine.closed

    @property
    def handle(self) -> SaveHandle | None:
        """The newest save."""
        return self._engine.handle

    def serves(self, model: Model, optimizer: Optimizers, every: int | str | None, options: Options) -> bool:
        """Whether this saver was made for exactly these arguments."""
        return (
            not self.closed
            and self.model_ids == model_ids(model)
            and self._optimizers.same_as(find_optimizers(optimizer))
            and self.every == every
            and self.options == options
        )

    def rebind(self, model: Model) -> None:
        """Save this object from now on: a mapping or list may be a new one in each call."""
        self._model = reference(model)
        self._engine.rebind(self._model)

    def let_go(self) -> None:
        """Drop the references to the optimizers of a model that is gone, and so to its parameters."""
        self._optimizers = Found()
        self._engine.let_go()

    def forget_model(self) -> None:
        """Remove the finalizers of the model: they would keep this saver alive as long as the model."""
        for farewell in self._farewells:
            farewell.detach()

    def saves_model_of(self, other: Saver) -> bool:
        """Whether both save the same model."""
        return bool(anchors(self._model()) & anchors(other.model))

    def when_model_goes(self, call: Callable[..., object], *given: object) -> None:
        """Register a function to be called when the model is collected."""
        for module in self.modules():
            weakref.finalize(module, call, *given)

    @property
    def serves_single_saves(self) -> bool:
        """Whether it was called only once, for a save of that state, and its path was not used before."""
        return self.every in (None, 1) and self._calls <= 1 and not self.comes_back

    @property
    def trained_elsewhere(self) -> bool:
        """Whether another living thread makes the calls."""
        return self._engine.trained_elsewhere

    @property
    def counted(self) -> tuple[int, int]:
        """The last step, and the updates seen so far."""
        return self._engine.counted

    def continue_after(self, counted: tuple[int, int]) -> None:
        """Continue the counts of another saver of the same model and path."""
        self._engine.count_from(*counted)

    def _upload(self, saved: Saved) -> None:
        if self._uploads is not None:
            self._uploads.offer(saved.step, saved.seq, str(saved.path))

    # -- the rest of the process: overridden by a subclass -----------------------------------

    def _take_over(self, *, resumed: bool) -> None:
        """Make another saver of the path release it; ``resumed`` if the model was loaded from there."""

    def _refuse_step(self) -> NoReturn:
        """Raise for a step that is reported after :meth:`close`."""
        msg = f"the checkpointer of {self.path} is closed; make a new one"
        raise UsageError(msg)

    def _stepped(self) -> None:
        """Run after each reported step, even if it failed."""

    def _leave(self) -> None:
        """Release everything that only saving needs, after it is closed."""
        if self.closed:
            self.let_go()
