"""Every error gockpt raises, in one tree, grouped by what the caller can do.

::

    GockptError
    ├── UsageError (ValueError)        change the call
    │   ├── OptionsError               an option's value, or two options together
    │   │   └── StateTooLarge (SaveError)  state and extras take more than host_memory allows
    │   ├── ExistingCheckpoints (SaveError)  a path holds checkpoints that the model was not loaded from
    │   └── UnsupportedState (SaveError)   state or an extra that can't be saved as it is
    ├── NotFoundError (LookupError)    look elsewhere
    │   ├── CheckpointNotFound         no complete checkpoint (of that step) there
    │   ├── NotACheckpoint             a directory or file that gockpt did not write
    │   ├── TensorNotFound (KeyError)  no tensor of that name in the checkpoint
    │   └── CheckpointPruned           it was removed while being read: open a newer one
    ├── StateMismatch                  load into another model, or with ``strict=False``
    ├── NonFiniteCheckpoint            load an older checkpoint, or without ``finite=True``
    ├── CheckpointCorrupt              fall back to an older checkpoint
    │   ├── ManifestCorrupt
    │   │   └── FormatTooNew           written by a newer gockpt: upgrade
    │   └── ChunkCorrupt
    ├── PathBusy                       another process saves into this path
    ├── RemoteError                    an object store refused or can't be reached: credentials, URL, network
    └── SaveError                      the run goes on; this save is lost, older ones are intact
        ├── StorageError               the disk refused: full, read-only, gone
        ├── SaveAborted                the window was given up (exception, Ctrl-C, unclosed step)
        ├── UploadError                a copy in the object store is missing; the checkpoint on disk stays
        └── WorkerError                the background ended or failed; the next save is tried afresh
"""

from __future__ import annotations

__all__ = [
    "CheckpointCorrupt",
    "CheckpointNotFound",
    "CheckpointPruned",
    "ChunkCorrupt",
    "ExistingCheckpoints",
    "FormatTooNew",
    "GockptError",
    "ManifestCorrupt",
    "NonFiniteCheckpoint",
    "NotACheckpoint",
    "NotFoundError",
    "OptionsError",
    "PathBusy",
    "RemoteError",
    "SaveAborted",
    "SaveError",
    "StateMismatch",
    "StateTooLarge",
    "StorageError",
    "TensorNotFound",
    "UnsupportedState",
    "UploadError",
    "UsageError",
    "WorkerError",
]


class GockptError(Exception):
    """Base of every error that gockpt raises on purpose."""


class SaveError(GockptError):
    """A save failed, or can't be made. Training and older checkpoints are not affected."""


class UsageError(GockptError, ValueError):
    """The call can't be carried out as written; nothing was started or lost."""


class OptionsError(UsageError):
    """An option has a value that can't work, alone or together with another."""


class StateTooLarge(OptionsError, SaveError):
    """Saving state or extras takes more host memory than ``Options.host_memory`` allows."""


class ExistingCheckpoints(UsageError, SaveError):
    """The path or ``remote`` holds checkpoints that the model was not loaded from; nothing was changed."""


class UnsupportedState(UsageError, SaveError):
    """State or an extra that can't be saved as it is. Names the value, where it is, and the way out."""


class NotFoundError(GockptError, LookupError):
    """A path, checkpoint or tensor that does not exist."""


class CheckpointNotFound(NotFoundError):
    """No complete checkpoint (of the wanted step) in the path. Lists the steps that are there."""


class NotACheckpoint(NotFoundError):
    """The directory or file exists, but gockpt did not write it as a checkpoint."""


class TensorNotFound(NotFoundError, KeyError):
    """The checkpoint holds no tensor of that name."""

    def __str__(self) -> str:
        """Return the message itself; ``KeyError`` would show its repr."""
        return Exception.__str__(self)


class CheckpointPruned(NotFoundError):
    """The checkpoint was removed while it was being read. Open a newer one."""


class StateMismatch(GockptError):
    """Checkpoint and live objects differ in names, shapes or dtypes; nothing was changed.

    Attributes:
        missing: Names the live objects have and the checkpoint lacks.
        unexpected: Names the checkpoint has and the live objects lack.
        mismatched: ``name: saved vs. live`` descriptions of shapes or dtypes.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        mismatched: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message)
        self.missing = missing
        self.unexpected = unexpected
        self.mismatched = mismatched


class NonFiniteCheckpoint(GockptError):
    """Parameters or optimizer state have NaN or Inf, which ``finite=True`` forbids; nothing was changed."""


class CheckpointCorrupt(GockptError):
    """The stored bytes are not what was written. Older checkpoints are untouched."""


class ManifestCorrupt(CheckpointCorrupt):
    """``gockpt.json`` (or a document it vouches for) is damaged or not valid."""


class FormatTooNew(ManifestCorrupt):
    """A newer gockpt wrote it, in a version of the format that this one can't read. Upgrade gockpt.

    Attributes:
        seq: Its number among its path's publications; ``None`` if it can't be told.
    """

    def __init__(self, message: str, *, seq: int | None = None) -> None:
        super().__init__(message)
        self.seq = seq

    def may_be_newer_than(self, seq: int | None) -> bool:
        """Return whether it may be newer than a checkpoint with that ``seq``; ``None``: than none at all."""
        return self.seq is None or seq is None or self.seq > seq


class ChunkCorrupt(CheckpointCorrupt):
    """A chunk's bytes are missing, truncated or differ from their checksum."""


class PathBusy(GockptError):
    """Another living writer holds this path. Use another path, or wait for it.

    Attributes:
        pid: Its process id, where that is known and means the same here.
    """

    def __init__(self, message: str, *, pid: int | None = None) -> None:
        super().__init__(message)
        self.pid = pid


class RemoteError(GockptError):
    """An object store refused, or can't be reached. Names the URL; nothing complete was changed there."""


class StorageError(SaveError):
    """The file system refused. The partial checkpoint is given up; free space or fix the path."""


class SaveAborted(SaveError):
    """The open window was given up and nothing of it was published."""


class WorkerError(SaveError):
    """The background failed unexpectedly, or its process ended. The next save is tried afresh."""


class UploadError(SaveError):
    """A checkpoint could not be uploaded. It is complete on disk; the next upload is tried afresh."""


def wrap(kind: type[SaveError], what: str, error: BaseException, advice: str = "") -> SaveError:
    """Return an error of a kind that says what failed, with the original in its text and as its cause."""
    wrapped = kind(f"{what}: {type(error).__name__}: {error}{advice}")
    wrapped.__cause__ = error
    return wrapped


def as_background_error(error: BaseException) -> GockptError:
    """Return what the background raised as one of gockpt's own, the original as its cause."""
    if isinstance(error, GockptError):
        return error
    return wrap(WorkerError, "the background of a save failed", error)


def as_save_error(error: BaseException) -> GockptError:
    """Return what ended a save in the foreground as one of gockpt's own, the original as its cause."""
    if isinstance(error, GockptError):
        return error
    kind = WorkerError if isinstance(error, Exception) else SaveAborted
    return wrap(kind, "the save was given up", error)
