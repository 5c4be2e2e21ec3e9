"""The ways to save that ``bench_train.py`` compares, behind one interface.

Each keeps two checkpoints on disk, and saves model and optimizer as its own documentation shows.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from pathlib import Path

    from gockpt import SaveHandle

__all__ = ["SAVERS", "Saver", "Timing"]

KEEP = 2


@dataclass(slots=True)
class Timing:
    """What one save took.

    Attributes:
        step: The step that is saved.
        exposed: Seconds that training waited for it, as far as the saver knows.
        durable: Seconds from the call at that step until it survives a power loss; ``None`` if it never does.
        window: Steps it was spread over.
        planned: Seconds that its steps would have to wait for copies, by its plan; ``None`` if there is none.
        attempts: How often it was tried.
    """

    step: int
    exposed: float
    durable: float | None = None
    window: int = 1
    planned: float | None = None
    attempts: int = 1


class Saver(Protocol):
    """One way to save."""

    timings: list[Timing]

    def tick(self, step: int) -> None:
        """Tell that a step is complete; saves if it is due."""

    def finish(self) -> None:
        """Wait until every save is on disk, as far as it ever is."""

    def close(self) -> None:
        """Let go of everything; the saver can't be used any more."""


class Nothing:
    """Does not save: what everything else is compared with."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.timings: list[Timing] = []

    def tick(self, step: int) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is held."""


class Gockpt:
    """This project."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        directory: Path,
        *,
        every: int,
        window: Any = "auto",
        worker: Any = "thread",
        device_memory: int | None = None,
        nice: int | None = None,
    ) -> None:
        import gockpt

        options = gockpt.Options(window=window, keep=KEEP, worker=worker, device_memory=device_memory)
        if nice is not None:
            options = options.replace(nice=nice)
        self._saver = gockpt.Checkpointer(model, optimizer, directory, every=every, options=options)
        self._newest: SaveHandle | None = None
        self._told: dict[int, float] = {}
        self._ended: list[tuple[float, SaveHandle]] = []
        self.timings: list[Timing] = []

    def tick(self, step: int) -> None:
        """Call it at every step, as its users do."""
        self._told[step] = perf_counter()
        handle = self._saver.after_step(step)
        if handle is not None and handle is not self._newest:
            self._newest = handle
            handle.add_done_callback(lambda done: self._ended.append((perf_counter(), done)))

    def finish(self) -> None:
        """Wait for the newest save, and take the figures of all."""
        self._saver.wait()
        for at, handle in self._ended:
            saved = handle.result(0)
            durable, planned = at - self._told[saved.step], handle.plan.stall_seconds
            self.timings.append(
                Timing(saved.step, saved.exposed_seconds, durable, saved.window, planned, saved.attempts)
            )
        self._ended.clear()

    def close(self) -> None:
        """Give threads, hooks and memory back."""
        self._saver.close()


class TorchSave:
    """``torch.save`` inside the loop: into a temporary file, then renamed."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        directory: Path,
        *,
        every: int,
        sync: bool,
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._directory = directory
        self._every = every
        self._sync = sync
        self.timings: list[Timing] = []

    def tick(self, step: int) -> None:
        """Save when due; ``sync`` waits for the disk, as a durable checkpoint must."""
        if step % self._every:
            return
        began = perf_counter()
        target = self._directory / f"{step // self._every % KEEP}.pt"
        temporary = target.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(_state(self._model, self._optimizer, step), file)
            if self._sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(target)
        if self._sync:
            _sync_directory(self._directory)
        seconds = perf_counter() - began
        self.timings.append(Timing(step, seconds, seconds if self._sync else None))

    def finish(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is held."""


class DcpAsync:
    """``torch.distributed.checkpoint.async_save`` in a single process: its defaults, or its pinned stager."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        directory: Path,
        *,
        every: int,
        pinned: bool = False,
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._directory = directory
        self._every = every
        self._under_way: Future[Any] | None = None
        self._staging: Future[Any] | None = None
        self._stager: Any = None
        if pinned:
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            self._stager = DefaultStager(StagingOptions(use_shared_memory=False))
            # Its copies read the live state: no update may come before they have ended.
            optimizer.register_step_pre_hook(lambda *_: self._staged())
        self._kept: list[Path] = []
        self.timings: list[Timing] = []

    def tick(self, step: int) -> None:
        """Stage when due, after the previous save has ended: it allows one at a time."""
        if step % self._every:
            return
        import torch.distributed.checkpoint as dcp

        began = perf_counter()
        self.finish()
        target = self._directory / str(step)
        answer: Any = dcp.async_save(
            _state(self._model, self._optimizer, step),
            checkpoint_id=target,
            no_dist=True,
            async_stager=self._stager,
        )
        future = answer
        if self._stager is not None:
            future, self._staging = answer.upload_completion, answer.staging_completion
        timing = Timing(step, perf_counter() - began)
        self.timings.append(timing)
        future.add_done_callback(self._done(target, timing, began))
        self._under_way = future

    def _staged(self) -> None:
        staging, self._staging = self._staging, None
        if staging is not None:
            began = perf_counter()
            staging.result()
            self.timings[-1].exposed += perf_counter() - began

    def _done(self, target: Path, timing: Timing, began: float) -> Callable[[Any], None]:
        def ended(_: Any) -> None:
            timing.durable = perf_counter() - began
            self._kept.append(target)
            while len(self._kept) > KEEP:
                shutil.rmtree(self._kept.pop(0))

        return ended

    def finish(self) -> None:
        """Wait for the save under way."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def close(self) -> None:
        """Wait for the save under way, and let the stager's memory go."""
        self.finish()
        if self._stager is not None:
            self._stager.close()


class LazyCopy:
    """A copy off the device behind one forward and backward pass, then ``torch.save`` in a thread.

    What DataStates-LLM (arXiv 2406.10707) does: one side stream copies everything into pinned memory, and the
    next update waits for the end of it.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, directory: Path, *, every: int
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._directory = directory
        self._every = every
        self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pinned: dict[str, torch.Tensor] = {}
        self._copied: Any = None
        self._writer = ThreadPoolExecutor(1)
        self._under_way: Future[None] | None = None
        optimizer.register_step_pre_hook(lambda *_: self._wait())
        self.timings: list[Timing] = []

    def tick(self, step: int) -> None:
        """Start the copy when due, after the previous save has ended."""
        if step % self._every:
            return
        began = perf_counter()
        self.finish()
        live = _state(self._model, self._optimizer, step)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            state = self._on_the_host(live, "")
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(self._stream)
        timing = Timing(step, perf_counter() - began)
        self.timings.append(timing)
        self._under_way = self._writer.submit(self._write, state, self._copied, timing, began)

    def _on_the_host(self, value: Any, name: str) -> Any:
        """Return the same state with its tensors on their way into pinned memory that is used every time."""
        if isinstance(value, dict):
            return {key: self._on_the_host(each, f"{name}/{key}") for key, each in value.items()}
        if isinstance(value, list):
            return [self._on_the_host(each, f"{name}/{i}") for i, each in enumerate(value)]
        if not isinstance(value, torch.Tensor):
            return value
        if name not in self._pinned:
            self._pinned[name] = torch.empty_like(value, device="cpu", pin_memory=True)
        return self._pinned[name].copy_(value, non_blocking=True)

    def _wait(self) -> None:
        """Let the update wait for the copy, on the device."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def _write(self, state: Any, copied: Any, timing: Timing, began: float) -> None:
        copied.synchronize()
        target = self._directory / f"{timing.step // self._every % KEEP}.pt"
        temporary = target.with_suffix(".tmp")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        _sync_directory(self._directory)
        timing.durable = perf_counter() - began

    def finish(self) -> None:
        """Wait for the save under way."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def close(self) -> None:
        """Wait for the save under way, and end the thread."""
        self.finish()
        self._writer.shutdown()


def _state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


SAVERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "no saving": (Nothing, {}),
    "gockpt, window auto": (Gockpt, {"window": "auto"}),
    "gockpt, window 4": (Gockpt, {"window": 4}),
    "gockpt, window auto, nice 19": (Gockpt, {"window": "auto", "nice": 19}),
    "gockpt, window auto, process": (Gockpt, {"window": "auto", "worker": "process"}),
    "gockpt, window 4, process": (Gockpt, {"window": 4, "worker": "process"}),
    "torch.save + fsync": (TorchSave, {"sync": True}),
    "torch.save, no fsync": (TorchSave, {"sync": False}),
    "dcp.async_save": (DcpAsync, {}),
    "dcp.async_save, pinned": (DcpAsync, {"pinned": True}),
    "lazy copy of one step": (LazyCopy, {}),
}
"""By name: the class and its options. "no saving" shows how far chance alone goes."""

DEVICE_ONLY = {"dcp.async_save, pinned", "lazy copy of one step"}
"""Those that need a CUDA device."""

ON_A_DEVICE: dict[str, dict[str, Any]] = {
    name: {"device_memory": 1 << 30} for name in SAVERS if name.startswith("gockpt")
}
"""Options on a CUDA device, beside the others."""
