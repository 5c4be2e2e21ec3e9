"""Background thread of the training process: works on batches of small tasks behind the training step.

Whoever must have a batch finished (the next update) helps, and so never waits for more than one task.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["TaskBatch", "TaskThread"]


@dataclass(slots=True)
class TaskBatch:
    """Tasks that are finished together.

    Attributes:
        done: Set when every task ended.
        errors: What tasks raised.
    """

    tasks: deque[Callable[[], None]]
    on_done: Callable[[], None] | None = None
    done: threading.Event = field(default_factory=threading.Event)
    errors: list[BaseException] = field(default_factory=list)
    _left: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._left = len(self.tasks)
        if not self._left:
            self.done.set()

    def work(self) -> bool:
        """Run one task in the calling thread; ``False`` when none is left to take."""
        try:
            task = self.tasks.popleft()
        except IndexError:
            return False
        try:
            task()
        except Exception as error:  # noqa: BLE001 - handed to whoever waits for the batch
            self.errors.append(error)
        finally:
            with self._lock:
                self._left -= 1
                last = self._left == 0
            if last:
                # Whoever is told may know the batch: no cycle may keep memory alive.
                on_done, self.on_done = self.on_done, None
                self.done.set()
                if on_done is not None:
                    on_done()
        return True

    def cancel(self) -> None:
        """Drop what was not begun and wait for what was: afterwards no task touches any memory."""
        self.on_done = None
        dropped = 0
        while self.tasks:
            try:
                self.tasks.popleft()
            except IndexError:  # the background thread took the last one
                break
            dropped += 1
        with self._lock:
            self._left -= dropped
            if self._left == 0:
                self.done.set()
        self.done.wait()

    def finish(self) -> None:
        """Help until nothing is left, then wait for tasks under way; raise what a task raised."""
        while self.work():
            pass
        self.done.wait()
        if self.errors:
            raise self.errors[0]


class TaskThread:
    """One background thread that works on batches. Started when first needed."""

    def __init__(self) -> None:
        self._queue: deque[TaskBatch] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(
        self,
        tasks: Iterable[Callable[[], None]],
        *,
        on_done: Callable[[], None] | None = None,
    ) -> TaskBatch:
        """Start working on ``tasks`` behind the caller. ``on_done`` runs on whichever thread ends last."""
        batch = TaskBatch(deque(tasks), on_done)
        if batch.done.is_set():
            batch.on_done = None
            if on_done is not None:
                on_done()
            return batch
        with self._wake:
            self._queue.append(batch)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_serve, args=(weakref.ref(self), self._queue, self._wake), name="gockpt-transfer"
                )
                self._thread.daemon = True
                self._thread.start()
            self._wake.notify()
        return batch

    def run(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Run ``tasks`` now, on the background thread and the calling one together."""
        self.submit(tasks).finish()

    def close(self) -> None:
        """End the thread once its queue is empty."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed


def _serve(owner: weakref.ref[TaskThread], queue: deque[TaskBatch], wake: threading.Condition) -> None:
    while True:
        with wake:
            while not queue:
                thread = owner()
                if thread is None or thread.closed:
                    return
                del thread
                # The timeout lets the thread notice that its owner was dropped without close().
                wake.wait(1.0)
            batch = queue[0]
        while batch.work():
            pass
        with wake:
            if queue and queue[0] is batch:
                queue.popleft()
        # A waiting thread must not keep the tensors of its last batch alive.
        del batch
