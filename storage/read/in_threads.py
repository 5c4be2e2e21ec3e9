"""Several threads that take their work from one list."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["in_threads"]

Task = TypeVar("Task")
Memory = TypeVar("Memory")

_BRIEF = 0.5


def in_threads(
    work: Callable[[Task, Memory], object],
    tasks: Iterable[Task],
    *,
    threads: int,
    name: str,
    memory: Callable[[], Memory],
    patient: bool = True,
) -> None:
    """Do the work for every task; after the first error no other one is begun, and it is raised.

    Plain threads: a pool of :mod:`concurrent.futures` takes no work while the interpreter ends.

    Args:
        work: Called with a task and the memory of its thread.
        tasks: Taken one at a time, in order; none is ``None``.
        threads: How many threads there are; one is the caller's own.
        name: Beginning of the threads' names.
        memory: Called first in each thread; makes its memory.
        patient: Whether Ctrl-C, too, returns only when the tasks that were begun have ended.
    """
    lock, left, errors = threading.Lock(), iter(tasks), list[BaseException]()

    def run() -> None:
        try:
            own = memory()
            while True:
                with lock:
                    task = None if errors else next(left, None)
                if task is None:
                    return
                work(task, own)
        except BaseException as error:  # noqa: BLE001 - raised below
            with lock:
                errors.append(error)

    if threads <= 1:
        run()
    crew = [
        threading.Thread(target=run, name=f"{name}-{number}", daemon=True)
        for number in range(threads if threads > 1 else 0)
    ]
    try:
        for thread in crew:
            thread.start()
        for thread in crew:
            while thread.is_alive():
                # A signal that comes right before a wait begins does not interrupt it: the next one sees it.
                thread.join(_BRIEF)
    except BaseException as error:  # Ctrl-C arrives here, and a system that has no more threads
        with lock:
            errors.append(error)
        for thread in crew:
            if thread.ident is not None and (patient or isinstance(error, Exception)):
                thread.join()
        raise
    if errors:
        raise errors[0]
