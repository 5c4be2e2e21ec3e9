"""Pieces of an upload, made by a thread of their own while earlier ones are sent.

obstore asks for pieces inside its own event loop, where no other request to a store can be made: code that
reads them from a store, or looks something up there, must run in another thread.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from queue import Empty, Queue
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["made_ahead"]

Piece = TypeVar("Piece")


@contextmanager
def made_ahead(pieces: Iterator[Piece]) -> Iterator[Iterator[Piece]]:
    """Give the same pieces, of which up to two are made before they are asked for.

    An error of ``pieces`` is raised, as it is, where the next piece is asked for. When the context ends no
    more pieces are made, and the thread has ended.
    """
    made: Queue[Piece | _End] = Queue(maxsize=2)
    left = threading.Event()

    def make() -> None:
        error: BaseException | None = None
        try:
            for piece in pieces:
                made.put(piece)
                if left.is_set():
                    return
        except BaseException as raised:  # noqa: BLE001 - raised where the pieces are taken
            error = raised
        made.put(_End(error))

    def taken() -> Iterator[Piece]:
        while True:
            piece = made.get()
            if not isinstance(piece, _End):
                yield piece
            elif piece.error is None:
                return
            else:
                raise piece.error

    thread = threading.Thread(target=make, name="gockpt-upload-read", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        left.set()
        # The thread may put one piece more before it looks at the event: there is room for it.
        while True:
            try:
                made.get_nowait()
            except Empty:
                break
        thread.join()


class _End:
    """End of the pieces.

    Attributes:
        error: What they ended by, if that is an error.
    """

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
