"""gockpt saves a training run while it keeps training.

A checkpoint published for step *t* holds, bit for bit, what a blocking save at that point of the loop
would have written. Where that can't be promised it says so in its metadata, and never silently.

::

    import gockpt

    save = gockpt.save_overlapped(model, opt, "ckpts", step=step, every=100)   # in the loop, after opt.step()
    restored = gockpt.load("ckpts", model, opt)                                # newest complete, in place
    ckpt = gockpt.open("ckpts", step=1200)                                     # lazy: nothing read yet

Importing this package is free: it starts nothing, and each public name loads its module when it is
first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gockpt.api import finish, save_overlapped, wait
    from gockpt.catalog import checkpoints, diff, latest, prune, steps, verify
    from gockpt.checkpointer import Checkpointer
    from gockpt.errors import (
        CheckpointCorrupt,
        CheckpointNotFound,
        CheckpointPruned,
        ChunkCorrupt,
        ExistingCheckpoints,
        FormatTooNew,
        GockptError,
        ManifestCorrupt,
        NonFiniteCheckpoint,
        NotACheckpoint,
        NotFoundError,
        OptionsError,
        PathBusy,
        RemoteError,
        SaveAborted,
        SaveError,
        StateMismatch,
        StateTooLarge,
        StorageError,
        TensorNotFound,
        UnsupportedState,
        UploadError,
        UsageError,
        WorkerError,
    )
    from gockpt.loading.checkpoint import Checkpoint, open
    from gockpt.loading.load import Restored, load
    from gockpt.options import Keep, Options
    from gockpt.packing import pack, unpack
    from gockpt.release import close
    from gockpt.saving.handle import SaveHandle
    from gockpt.uploads import upload

__all__ = [
    "Checkpoint",
    "CheckpointCorrupt",
    "CheckpointNotFound",
    "CheckpointPruned",
    "Checkpointer",
    "ChunkCorrupt",
    "ExistingCheckpoints",
    "FormatTooNew",
    "GockptError",
    "Keep",
    "ManifestCorrupt",
    "NonFiniteCheckpoint",
    "NotACheckpoint",
    "NotFoundError",
    "Options",
    "OptionsError",
    "PathBusy",
    "RemoteError",
    "Restored",
    "SaveAborted",
    "SaveError",
    "SaveHandle",
    "StateMismatch",
    "StateTooLarge",
    "StorageError",
    "TensorNotFound",
    "UnsupportedState",
    "UploadError",
    "UsageError",
    "WorkerError",
    "checkpoints",
    "close",
    "diff",
    "finish",
    "latest",
    "load",
    "open",
    "pack",
    "prune",
    "save_overlapped",
    "steps",
    "unpack",
    "upload",
    "verify",
    "wait",
]

__version__ = "0.1.0"

_HOME = {
    "Checkpoint": "gockpt.loading.checkpoint",
    "Checkpointer": "gockpt.checkpointer",
    "Keep": "gockpt.options",
    "Options": "gockpt.options",
    "Restored": "gockpt.loading.load",
    "SaveHandle": "gockpt.saving.handle",
    "checkpoints": "gockpt.catalog",
    "close": "gockpt.release",
    "diff": "gockpt.catalog",
    "finish": "gockpt.api",
    "latest": "gockpt.catalog",
    "load": "gockpt.loading.load",
    "open": "gockpt.loading.checkpoint",
    "pack": "gockpt.packing",
    "prune": "gockpt.catalog",
    "save_overlapped": "gockpt.api",
    "steps": "gockpt.catalog",
    "unpack": "gockpt.packing",
    "upload": "gockpt.uploads",
    "verify": "gockpt.catalog",
    "wait": "gockpt.api",
}
"""Module of each public name that is not an error; errors live in gockpt.errors."""


if not TYPE_CHECKING:  # a type checker sees the imports above, and a misspelt name as an error

    def __getattr__(name: str) -> object:
        """Load a public name's module at its first use, and keep the name for the next."""
        if name not in __all__:
            msg = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(msg)
        from gockpt.deferred_signals import deferred

        with deferred():  # what is imported by halves, here or in torch, may not be importable any more
            value = getattr(import_module(_HOME.get(name, "gockpt.errors")), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Return the public names."""
    return [*__all__, "__version__"]
