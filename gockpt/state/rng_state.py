"""States of the random number generators, as plain values.

Python's ``random``, NumPy's global generator, torch's CPU generator, and one per CUDA device when CUDA
is in use. Other generators (a loader's, a ``np.random.Generator``) are the user's extras.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gockpt.errors import ManifestCorrupt, StateMismatch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["capture", "check", "restore"]


def capture() -> dict[str, Any]:
    """Return the current states, as values for :mod:`gockpt.state.value_encoder`. Changes none of them."""
    return {
        "python": _pack_python(random.getstate()),
        "numpy": _pack(np.random.get_state(legacy=False)),  # noqa: NPY002 - the legacy state is what users hold
        "torch": _to_bytes(torch.get_rng_state()),
        "cuda": [_to_bytes(state) for state in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        else [],
    }


def check(states: dict[str, Any]) -> None:
    """Raise if these states can't be set on this machine's generators. Changes none of them.

    Raises:
        StateMismatch: If NumPy's global generator is of another kind than the saved one.
        ManifestCorrupt: If :func:`capture` doesn't return such states.
    """
    try:
        saved = states["numpy"]["bit_generator"]
        shaped = type(states["torch"]) is bytes and all(type(state) is bytes for state in states["cuda"])
    except (TypeError, LookupError):
        shaped = False
    if not shaped:
        msg = "the saved random states are not in a known form; load with rng=False to leave them out"
        raise ManifestCorrupt(msg)
    if (live := _live_numpy()) != saved:
        msg = (
            f"NumPy's global generator is {live}, but was {saved} when saved; call "
            f"np.random.set_bit_generator(np.random.{saved}()) first, or load with rng=False"
        )
        raise StateMismatch(msg, mismatched=(f"rng/numpy: saved {saved}, live {live}",))
    with _explained():
        # Tried on new generators first: a load that has changed a model must not fail because of these.
        kind = type(np.random.get_bit_generator())  # type: ignore[attr-defined] # public since NumPy 1.24
        np.random.RandomState(kind()).set_state(_unpack(states["numpy"]))
        random.Random().setstate(_unpack_python(states["python"]))  # noqa: S311 - no secrets are made
        torch.Generator().set_state(_from_bytes(states["torch"]))


def restore(states: dict[str, Any]) -> tuple[str, ...]:
    """Set the generators to states that :func:`capture` returned.

    Returns:
        Names of generators that this machine lacks, such as ``("cuda:3",)``; the others were set.

    Raises:
        StateMismatch: As :func:`check`.
        ManifestCorrupt: As :func:`check`.
    """
    check(states)
    with _explained():
        np.random.set_state(_unpack(states["numpy"]))  # noqa: NPY002 - see capture
        random.setstate(_unpack_python(states["python"]))
        torch.set_rng_state(_from_bytes(states["torch"]))
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        absent = []
        for index, state in enumerate(states["cuda"]):
            if index < devices:
                torch.cuda.set_rng_state(_from_bytes(state), index)
            else:
                absent.append(f"cuda:{index}")
    return tuple(absent)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, LookupError, RuntimeError, OverflowError) as error:
        msg = f"the saved random states can't be set ({error}); load with rng=False to leave them out"
        raise ManifestCorrupt(msg) from error


def _live_numpy() -> str:
    return str(np.random.get_state(legacy=False)["bit_generator"])  # noqa: NPY002 - see capture


def _to_bytes(state: torch.Tensor) -> bytes:
    return bytes(state.cpu().numpy().tobytes())


def _from_bytes(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


def _pack_python(state: tuple[Any, ...]) -> dict[str, Any]:
    # 625 numbers that would each be encoded by itself, at every call that remembers the random states.
    version, words, gauss = state
    return {"version": version, "words": _pack(np.array(words, "<u4")), "gauss": gauss}


def _unpack_python(state: Any) -> tuple[Any, ...]:
    if isinstance(state, dict):
        return state["version"], tuple(_unpack(state["words"]).tolist()), state["gauss"]
    return tuple(state)  # as version 1 of the state document has it


def _pack(value: Any) -> Any:
    # Bytes are written into the document; an array would take two more files for 2.5 KB.
    if isinstance(value, dict):
        return {key: _pack(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return {"dtype": value.dtype.str, "data": value.tobytes()}
    return value


def _unpack(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"dtype", "data"}:
            return np.frombuffer(value["data"], np.dtype(value["dtype"])).copy()
        return {key: _unpack(item) for key, item in value.items()}
    return value
