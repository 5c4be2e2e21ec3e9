"""Every option and its default, in one frozen value. The only home of defaults."""

from __future__ import annotations

import dataclasses
import os
import signal
from dataclasses import dataclass
from typing import Literal

from gockpt.errors import OptionsError

__all__ = ["MAX_WINDOW", "Keep", "Options"]

MAX_WINDOW = 16
MIN_HOST_MEMORY = 1 << 16
_SIGNALS = {one.name for one in signal.Signals} - {"SIGKILL", "SIGSTOP"}
"""Signals that a process can handle."""


def _half_the_cores() -> int:
    return max(1, min(8, len(os.sched_getaffinity(0)) // 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Rules for keeping checkpoints when old ones are removed: one that any rule names is kept.

    Attributes:
        newest: The newest this many, by publication. A run that went back to an older step and published
            again has abandoned the higher steps before it; these count last.
        every: Also each one whose step is a multiple of this; ``None`` for no such rule.
        best: Also the best this many by ``metric``.
        metric: Name of a plain number among the save's extras, as in ``extra={"val_loss": 0.3}``. A
            checkpoint without it, or with a NaN or an infinity, is never among the best. As long as none has
            it, all are kept.
        mode: ``"min"`` if the lowest is the best, ``"max"`` if the highest.
        other_runs: Whether checkpoints of other runs in the path are counted and removed like this run's own.
            By default they are neither.
    """

    newest: int = 2
    every: int | None = None
    best: int = 0
    metric: str | None = None
    mode: Literal["min", "max"] = "min"
    other_runs: bool = False

    def __post_init__(self) -> None:
        if not _is_int(self.newest, 1, 1 << 31):
            _refuse("newest", self.newest, "a whole number of at least 1: the newest is never removed")
        if self.every is not None and not _is_int(self.every, 1, 1 << 62):
            _refuse("every", self.every, "None or a whole number of at least 1")
        if not _is_int(self.best, 0, 1 << 31):
            _refuse("best", self.best, "a whole number from 0")
        if self.metric is not None and (not isinstance(self.metric, str) or not self.metric):
            _refuse("metric", self.metric, "None or the name of an extra")
        if (self.metric is None) != (not self.best):
            _refuse("metric", self.metric, f"a name if and only if best (now {self.best!r}) is above 0")
        if self.mode not in ("min", "max"):
            _refuse("mode", self.mode, '"min" or "max"')
        if type(self.other_runs) is not bool:
            _refuse("other_runs", self.other_runs, "True or False")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of saves. Frozen: pass a new value to change something.

    Attributes:
        window: Steps one save is spread over: ``"auto"`` (measured in the run) or 1 to 16.
            A forced window above 1 needs ``every >= window``.
        when_busy: What a due save does while the previous one is still being written: ``"skip"``
            (logged) or ``"wait"``.
        verify: ``"full"``: parts that already left are fingerprinted around every update, so
            that a change behind the optimizer's back costs nothing but a second copy of that part.
            ``"close"``: only at the closing step; such a change then costs a second attempt. Both
            publish only what was proven equal.
        keep: Keep the newest this many checkpoints and remove older ones after each publication;
            ``None`` keeps all. At least 2: a damaged newest one needs a predecessor. A :class:`Keep`
            also keeps milestones and the best.
        host_memory: Upper bound in bytes for what a save takes at any time: the arena, the gradient ring,
            extras (once in their place, once on the way there), what compression takes, and copies of
            chunks that are not row-major while they are written. ``None`` bounds it by the size of state
            and extras plus at most two full gradients, and the rest of these. A state or extra that can't
            fit is refused before memory is taken for it. What ``state_dict()`` of extras itself makes, JSON
            documents, checksums and uploads come on top.
        device_memory: Upper bound in bytes of device memory for staging and a snapshot. With it, state on a
            CUDA device is copied in the background; the kernels' tables, a thousandth of the state, and
            gradients that wait to be copied come on top. ``None`` copies such state inside the call. Copying
            in the background has been tested on a simulated device only. State on the CPU needs none.
        cpu_threads: Background threads for replay, checksums and writing; ``None`` is half the
            usable cores, between 1 and 8.
        nice: Niceness of those threads (0 to 19). With ``every`` above 1, a captured save that is not durable
            half-way to the next one gets an un-niced one.
        overhead: For ``every="auto"``: the largest share of training time that saving may take.
        grad_dtype: How gradients travel to replay inside a window. ``None``: as they are. ``"fp16"``: as
            float16 with a power of two for each 1024 values. ``"bf16"``: as bfloat16. These halve the
            gradient ring, and what is replayed from them is no longer exact: the checkpoint says so
            (``exact: false``) and by how much, measured at a sample of its elements. ``verify="close"`` then
            looks as often as ``"full"``.
        compression: ``None`` stores raw bytes. ``"zstd"`` (level 1) and ``"blosc"`` (zstd level 1 over sorted
            bits or bytes) encode arrays of 4 KiB and more; a slice is then read by decoding whole chunks.
            ``"auto"`` writes the first checkpoint raw, measures disk and codecs meanwhile, and from then on
            encodes the kinds of tensor whose encoding makes a save shorter. Encoding takes host memory of its
            own: at most three times the largest chunk for each of ``cpu_threads``, and three times more; and
            up to 8 MiB to write from for each of these threads, and three more.
        layout: ``"file"``: a checkpoint is one file, ``step-0000001200.zip``, an uncompressed ZIP of a Zarr
            hierarchy. ``"directory"``: it is a directory of that hierarchy's files. ``"auto"``: one file,
            unless a row of an array has 2 GiB or more.
        worker: Where the background of saves runs. ``"thread"``: in this process. ``"process"``: in one of
            its own over shared memory, which needs Linux: what it does in Python holds up no training step,
            and a save that is captured is published even if this process is killed.
        worker_timeout: For ``worker="process"``: seconds without a sign of life after which that process is
            taken for hung and killed; the save in flight then fails.
        remote: URL of an object store, such as ``"s3://bucket/run"``, that checkpoints are copied to in the
            background once they are durable; ``None`` copies nothing. Needs ``gockpt[remote]``.
        existing: What a path (or ``remote``) with checkpoints that the model was not loaded from means:
            ``"refuse"``: an error, before anything is changed there. ``"continue"``: save beside them, as a
            run of its own: theirs are never replaced, and only removed if :class:`Keep` says so. A run that
            goes on needs neither: load first, or save in the process that has saved there.
        on_signal: Names of signals, such as ``("SIGTERM",)``, before whose handlers the state is saved: that
            of the next step, or, if none comes in time, that of the last one where it still stands. Extras
            are then asked for at each call.
        grace: Seconds from such a signal to the moment at which its former handler runs, or the process ends
            by it, at the latest.
    """

    window: int | Literal["auto"] = "auto"
    when_busy: Literal["skip", "wait"] = "skip"
    verify: Literal["full", "close"] = "full"
    keep: int | Keep | None = None
    host_memory: int | None = None
    device_memory: int | None = None
    cpu_threads: int | None = None
    nice: int = 10
    overhead: float = 0.01
    grad_dtype: Literal["fp16", "bf16"] | None = None
    compression: Literal["zstd", "blosc", "auto"] | None = None
    layout: Literal["auto", "file", "directory"] = "auto"
    worker: Literal["thread", "process"] = "thread"
    worker_timeout: float = 60.0
    remote: str | None = None
    existing: Literal["refuse", "continue"] = "refuse"
    on_signal: tuple[str, ...] = ()
    grace: float = 30.0

    def __post_init__(self) -> None:
        if self.window != "auto" and not _is_int(self.window, 1, MAX_WINDOW):
            _refuse("window", self.window, f'"auto" or a whole number from 1 to {MAX_WINDOW}')
        if self.when_busy not in ("skip", "wait"):
            _refuse("when_busy", self.when_busy, '"skip" or "wait"')
        if self.verify not in ("full", "close"):
            _refuse("verify", self.verify, '"full" or "close"')
        least = self.keep.newest if isinstance(self.keep, Keep) else self.keep
        if least is not None and not _is_int(least, 2, 1 << 31):
            _refuse("keep", self.keep, "None (keep all), a whole number of at least 2, or a Keep of such")
        for name in ("host_memory", "device_memory"):
            value = getattr(self, name)
            if value is not None and not _is_int(value, MIN_HOST_MEMORY, 1 << 62):
                _refuse(name, value, f"None or a number of bytes of at least {MIN_HOST_MEMORY}")
        if self.cpu_threads is not None and not _is_int(self.cpu_threads, 1, 256):
            _refuse("cpu_threads", self.cpu_threads, "None or a whole number from 1 to 256")
        if not _is_int(self.nice, 0, 19):
            _refuse("nice", self.nice, "a whole number from 0 to 19")
        if not isinstance(self.overhead, (int, float)) or not 0 < self.overhead < 1:
            _refuse("overhead", self.overhead, "a share between 0 and 1, such as 0.01")
        if self.grad_dtype not in (None, "fp16", "bf16"):
            _refuse("grad_dtype", self.grad_dtype, 'None, "fp16" or "bf16"')
        if self.compression not in (None, "zstd", "blosc", "auto"):
            _refuse("compression", self.compression, 'None, "zstd", "blosc" or "auto"')
        if self.layout not in ("auto", "file", "directory"):
            _refuse("layout", self.layout, '"auto", "file" or "directory"')
        if self.worker not in ("thread", "process"):
            _refuse("worker", self.worker, '"thread" or "process"')
        timeout = self.worker_timeout
        if type(timeout) not in (int, float) or not 1 <= timeout <= 86400:
            _refuse("worker_timeout", timeout, "seconds from 1 to 86400")
        if self.remote is not None and (not isinstance(self.remote, str) or "://" not in self.remote):
            _refuse("remote", self.remote, 'None or a URL such as "s3://bucket/run"')
        if self.existing not in ("refuse", "continue"):
            _refuse("existing", self.existing, '"refuse" or "continue"')
        names = self.on_signal
        if not isinstance(names, tuple) or not all(name in _SIGNALS for name in names):
            _refuse("on_signal", names, 'a tuple of names of signals, such as ("SIGTERM",)')
        if type(self.grace) not in (int, float) or not 0 < self.grace <= 86400:
            _refuse("grace", self.grace, "seconds above 0, up to 86400")

    @property
    def worker_threads(self) -> int:
        """``cpu_threads``, or its default for this machine."""
        return self.cpu_threads if self.cpu_threads is not None else _half_the_cores()

    def replace(self, **changes: object) -> Options:
        """Return a copy with ``changes`` applied and checked."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def _is_int(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _refuse(name: str, value: object, expected: str) -> None:
    msg = f"{name}={value!r}: expected {expected}"
    raise OptionsError(msg)
