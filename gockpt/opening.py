"""Opening of a path for writing: its run, its background, and its copies in an object store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gockpt.errors import PathBusy
from gockpt.existing import expect_remote, homes, permitted
from gockpt.storage.local.compression import Compression
from gockpt.storage.local.store import Store
from gockpt.uploads import Uploads
from gockpt.workers.executor import InThreads
from gockpt.workers.orphans import open_store

if TYPE_CHECKING:
    from gockpt.core.runs import Run
    from gockpt.options import Options
    from gockpt.state.lineage import Origin
    from gockpt.storage.local.store import Follow
    from gockpt.uploads import Publications
    from gockpt.validation import Model
    from gockpt.workers.executor import Background

__all__ = ["Opened", "open_path"]


@dataclass(frozen=True, slots=True)
class Opened:
    """A path that is open for writing.

    Attributes:
        run: The run to write as.
        background: The background that writes there.
        uploads: The uploads to ``Options.remote``, if that is set.
    """

    run: Run
    background: Background[Any]
    uploads: Uploads | None


def open_path(path: str, model: Model, origin: Origin | None, options: Options) -> Opened:
    """Take a path for writing, unless it holds other runs' checkpoints.

    Raises:
        ExistingCheckpoints: If the path or ``options.remote`` holds some; nothing was changed then.
        PathBusy: If another writer has the path.
        StorageError: If the path can't be created or written.
        RemoteError: If ``options.remote`` can't be reached.
    """
    parent = origin.seq if origin is not None and origin.path in homes(path, options) else None
    while True:
        follow = permitted(path, model, options)
        if options.remote is not None:
            expect_remote(options.remote, model, follow.run, options)
        try:
            background, publications = _background(path, options, parent=parent, follow=follow)
        except PathBusy:
            # The former writer may have published something before it ended.
            if permitted(path, model, options).newest == follow.newest:
                raise
        else:
            break
    uploads = None
    try:
        if options.remote is not None:
            uploads = Uploads(options.remote, path, publications, follow.run, nice=options.nice)
    except BaseException:
        background.close()
        raise
    return Opened(follow.run, background, uploads)


def _background(
    path: str, options: Options, *, parent: int | None, follow: Follow
) -> tuple[Background[Any], Publications]:
    """Take the path for writing; return the background, and the writer that numbers publications."""
    if options.worker == "process":
        from gockpt.workers.process_executor import InProcess

        worker = InProcess(path, options, parent=parent, follow=follow)
        return worker, worker
    compression = Compression(options.compression, threads=options.worker_threads)

    def make() -> Store:
        return Store(path, follow=follow, parent=parent, compression=compression, layout=options.layout)

    store = open_store(make)
    return InThreads(store, options), store
