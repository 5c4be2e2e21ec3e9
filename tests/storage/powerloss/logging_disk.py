"""A disk that writes down what is done to it: one file, served through FUSE, for a loop device to lie on.

``python logging_disk.py MOUNTPOINT IMAGE LOG`` serves a copy of IMAGE as ``MOUNTPOINT/disk``. Every write
and every flush that reaches it is appended to LOG before it is answered: a header of two little-endian
uint64, offset and length, then the data. A flush is a header of all ones.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys

import mfusepy

HEADER = struct.Struct("<QQ")
FLUSH = HEADER.pack(2**64 - 1, 2**64 - 1)


class Disk(mfusepy.Operations):
    use_ns = True

    def __init__(self, image: str, log: str) -> None:
        with open(image, "rb") as file:
            self.data = bytearray(file.read())
        self.log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def getattr(self, path, fh=None):
        if path == "/":
            return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
        if path == "/disk":
            return {"st_mode": stat.S_IFREG | 0o600, "st_nlink": 1, "st_size": len(self.data)}
        raise mfusepy.FuseOSError(errno.ENOENT)

    def readdir(self, path, fh):
        return [".", "..", "disk"]

    def open(self, path, flags):
        return 0

    def read(self, path, size, offset, fh):
        return bytes(self.data[offset : offset + size])

    def write(self, path, data, offset, fh):
        if offset + len(data) > len(self.data):
            raise mfusepy.FuseOSError(errno.ENOSPC)
        os.write(self.log, HEADER.pack(offset, len(data)) + data)
        self.data[offset : offset + len(data)] = data
        return len(data)

    def fsync(self, path, datasync, fh):
        os.write(self.log, FLUSH)
        return 0


if __name__ == "__main__":
    mountpoint, image, log = sys.argv[1:]
    mfusepy.FUSE(Disk(image, log), mountpoint, foreground=True, nothreads=True, big_writes=True)
