"""System calls that Python's ``os`` lacks: calls of libc, and Linux's properties of an open file."""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
from typing import Any

__all__ = ["BTRFS", "EXT4", "XFS", "call", "direct_alignment", "filesystem_type", "libc"]

EXT4, XFS, BTRFS = 0xEF53, 0x58465342, 0x9123683E

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000


@functools.cache
def libc() -> ctypes.CDLL:
    """Return libc, whose calls leave their error in ``ctypes.get_errno()``."""
    return ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    """Call a libc function that returns 0 or sets ``errno``, again when a signal interrupts it."""
    function = getattr(libc(), name, None)
    code = errno.ENOSYS
    while function is not None:
        if function(*arguments) == 0:
            return
        code = ctypes.get_errno()
        if code != errno.EINTR:
            break
    raise OSError(code, os.strerror(code))


def filesystem_type(fd: int) -> int:
    """Return the number of the type of the file system that an open file is on; see ``statfs(2)``."""
    buffer = ctypes.create_string_buffer(256)  # struct statfs; its first long is the type
    call("fstatfs", fd, buffer)
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF


def direct_alignment(fd: int) -> tuple[int, int]:
    """Return what addresses, and what offsets and lengths, of direct I/O must be multiples of.

    Zeros where the file system says that it has none; a page each where nothing is said (Linux before 6.1).
    Source: ``statx(2)``, ``STATX_DIOALIGN``.
    """
    buffer = ctypes.create_string_buffer(256)  # struct statx
    try:
        call("statx", fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
            raise
        return mmap.PAGESIZE, mmap.PAGESIZE
    mask, memory, offset = (ctypes.c_uint32.from_buffer(buffer, at).value for at in (0, 152, 156))
    return (memory, offset) if mask & _STATX_DIOALIGN else (mmap.PAGESIZE, mmap.PAGESIZE)
