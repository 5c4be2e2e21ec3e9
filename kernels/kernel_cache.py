"""Compiled kernels on the disk, for the next process: one file for each kernel, signature and processor.

Promise: what is loaded is what was compiled from these very sources by this Numba, byte for byte (a checksum
vouches for each file). Whatever goes wrong with the files (no place to write, a full disk, damage, another
process that removes them) means that a kernel is compiled again, and is no error.

Places, in this order: ``NUMBA_CACHE_DIR``; ``__pycache__`` beside the sources; the user's cache directory; a
directory among the temporary files that only this user can enter. A kernel is read from whichever has it, and
written to the first that takes it. Files of the first three are trusted as the sources are.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llvmlite
import numba
from numba.core import serialize
from numba.core.compiler import CompileResult
from numba.misc.appdirs import AppDirs

from gockpt.once import warn_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Kept"]

_HERE = Path(__file__).parent
_COMPILER = (numba.__version__, llvmlite.__version__, sys.version)
_CHECKSUM = hashlib.sha256().digest_size
_unwritable: set[Path] = set()


class Kept:
    """The compiled forms of one kernel on the disk; in the place of Numba's cache of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"
        self._sources = _sources()
        self._enabled = True

    @property
    def cache_path(self) -> str | None:
        """Return the first of the places, or ``None`` if there is none."""
        return next((str(place) for place in _places()), None)

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """Return the compiled form for a signature; ``None`` if no undamaged one is kept."""
        if not self._enabled or not self._sources:
            return None
        target_context.refresh()
        try:
            name = self._file(signature, target_context.codegen())
            for place in _places():
                with suppress(OSError):
                    data = (place / name).read_bytes()
                    if hashlib.sha256(data[_CHECKSUM:]).digest() == data[:_CHECKSUM]:
                        return CompileResult._rebuild(  # noqa: SLF001
                            target_context, *serialize.loads(data[_CHECKSUM:])
                        )
                    warn_once("damage", "%s is damaged; the kernel is compiled again", place / name)
        except Exception as error:  # noqa: BLE001 - whatever Numba makes of it, the kernel can be compiled
            warn_once("unreadable", "kept kernels can't be used (%s); they are compiled again", error)
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep a compiled form, if there is a place for it."""
        if not self._enabled:
            return
        reason = "their sources can't be read"
        try:
            if self._sources and not result.library.has_dynamic_globals:
                name = self._file(signature, result.library.codegen)
                payload = serialize.dumps(result._reduce())  # noqa: SLF001
                reason = self._write(name, hashlib.sha256(payload).digest() + payload)
        except Exception as error:  # noqa: BLE001 - it is compiled: that it can't be kept is no error
            reason = f"{type(error).__name__}: {error}"
        if reason:
            warn_once(
                "not kept",
                "compiled kernels can't be kept on the disk (%s), so each process compiles them again, which "
                "takes some seconds; set NUMBA_CACHE_DIR to a directory that can be written",
                reason,
            )

    def enable(self) -> None:
        """Use the disk."""
        self._enabled = True

    def disable(self) -> None:
        """Leave the disk alone."""
        self._enabled = False

    def flush(self) -> None:
        """Forget what is kept of this kernel, where that can be done."""
        for place in _places():
            self._remove(place, lambda _: True)

    def _file(self, signature: Any, codegen: Any) -> str:
        what = repr((_COMPILER, self._name, self._sources, str(signature), codegen.magic_tuple()))
        return f"{self._name}-{self._sources[:16]}-{hashlib.sha256(what.encode()).hexdigest()[:32]}.kernel"

    def _write(self, name: str, data: bytes) -> str:
        """Write a file to the first place that takes it; return why none did, or nothing."""
        reasons = []
        for place in _places(make=True):
            if place in _unwritable:
                continue
            try:
                _put(place, name, data)
            except OSError as error:
                _unwritable.add(place)
                reasons.append(f"{place}: {error.strerror}")
                continue
            # What was compiled from former sources is of no use in this place any more.
            self._remove(place, lambda old: not old.startswith(f"{self._name}-{self._sources[:16]}-"))
            return ""
        return "; ".join(reasons) or "no place can be written"

    def _remove(self, place: Path, chosen: Callable[[str], bool]) -> None:
        with suppress(OSError):
            for file in place.glob(f"{self._name}-*.kernel"):
                if chosen(file.name):
                    file.unlink(missing_ok=True)


def _put(place: Path, name: str, data: bytes) -> None:
    """Write a file whole or not at all."""
    place.mkdir(parents=True, exist_ok=True)
    temporary = place / f"{name}.{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(data)
        temporary.replace(place / name)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _places(*, make: bool = False) -> Iterator[Path]:
    """Yield the places, first those that are preferred; make the one among temporary files if asked."""
    below = f"gockpt-{hashlib.sha256(os.fsencode(_HERE)).hexdigest()[:16]}"
    if numba.config.CACHE_DIR:
        yield Path(numba.config.CACHE_DIR) / below
    yield _HERE / "__pycache__"
    # Without a home and an entry in the password database, this is a path relative to nowhere.
    users = Path(AppDirs(appname="numba", appauthor=False).user_cache_dir)
    if users.is_absolute() and _is_ours(users):
        yield users / below
    with suppress(OSError):
        private = Path(tempfile.gettempdir()) / f"gockpt-kernels-{os.geteuid()}"
        if make:
            with suppress(FileExistsError):
                private.mkdir(mode=0o700)
                private.chmod(0o700)
        status = private.lstat()
        # Others can put a directory of that name there: what they could write to is not read.
        if (
            stat.S_ISDIR(status.st_mode)
            and status.st_uid == os.geteuid()
            and not stat.S_IMODE(status.st_mode) & 0o077
        ):
            if make:
                warn_once("temporary", "compiled kernels are kept among temporary files, in %s", private)
            yield private / below


def _is_ours(path: Path) -> bool:
    """Whether this user owns a directory, or the one in which it would be made: ``sudo`` may keep HOME."""
    while True:
        try:
            return path.stat().st_uid == os.geteuid()
        except OSError:
            if path == path.parent:
                return False
            path = path.parent


@cache
def _sources() -> str:
    """Return what stands for the sources; empty if they can't be read."""
    digest = hashlib.sha256()
    try:
        # All of them: a kernel is compiled together with those that it calls, in whatever file they are.
        for file in sorted(_HERE.glob("*.py")):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    except OSError:
        return ""
    return digest.hexdigest()
