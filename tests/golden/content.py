"""What the golden checkpoints hold, computed: bits that follow from a name."""

from __future__ import annotations

import hashlib

import numpy as np


def stream(name: str, nbytes: int) -> np.ndarray:
    """Return bytes that follow from a name: SHA-256 of the name and a counter, one behind the other."""
    blocks = -(-nbytes // 32)
    data = b"".join(hashlib.sha256(f"{name}:{n}".encode()).digest() for n in range(blocks))
    return np.frombuffer(data[:nbytes], np.uint8).copy()


def bits(name: str, dtype: str, nbytes: int) -> np.ndarray:
    """Return the bytes of an array: any bits at all, NaN payloads too; booleans are 0 or 1."""
    data = stream(name, nbytes)
    return data & 1 if dtype == "bool" else data
