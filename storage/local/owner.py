"""Owner records: the process that writes a partial checkpoint, and the check that it is gone.

Promise: a partial counts as abandoned only if its writer is certainly gone, or has given no sign of life for
:data:`QUIET_SECONDS`. A process id alone proves nothing: every container has a pid 1, and ids are used again;
so the record also holds the host, its boot, the pid namespace and the process's start.
"""

from __future__ import annotations

import functools
import json
import os
import socket
from dataclasses import asdict, dataclass

from gockpt.errors import ManifestCorrupt
from gockpt.storage.format import json_fields, strict_json

__all__ = [
    "MAX_OWNER_BYTES",
    "QUIET_SECONDS",
    "Owner",
    "encode",
    "is_abandoned",
    "myself",
    "parse",
    "stat_fields",
]

QUIET_SECONDS = 600.0
MAX_OWNER_BYTES = 4096

_KEYS = ("host", "boot", "pid_namespace", "pid", "started")
_DEAD_STATES = frozenset("ZXx")


@dataclass(frozen=True, slots=True)
class Owner:
    """One process, told apart from every other one. Texts are empty where the system doesn't tell.

    Attributes:
        host: Host name.
        boot: The kernel's boot id.
        pid_namespace: Which numbering of processes ``pid`` belongs to.
        pid: Process id.
        started: When the process started, in the kernel's clock ticks since boot.
    """

    host: str
    boot: str
    pid_namespace: str
    pid: int
    started: str


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def stat_fields(pid: int) -> list[str]:
    """Return the fields of ``/proc/<pid>/stat`` from the state on; none if there is no such process."""
    # The name in parentheses may hold anything; the fields are counted from behind it.
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()


def started(pid: int) -> str:
    """Return when a process started, or ``""`` if there is no such process, or only its remains."""
    fields = stat_fields(pid)
    return "" if len(fields) < 20 or fields[0] in _DEAD_STATES else fields[19]


@functools.cache
def _identity(pid: int) -> Owner:
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    boot = _read("/proc/sys/kernel/random/boot_id").strip()
    return Owner(socket.gethostname(), boot, namespace, pid, started(pid))


def myself() -> Owner:
    """Return the calling process; a forked child gets its own."""
    return _identity(os.getpid())


def encode(owner: Owner) -> bytes:
    """Return the bytes of an owner file."""
    return json.dumps(asdict(owner)).encode("ascii") + b"\n"


def parse(data: bytes) -> Owner | None:
    """Return the process in an owner file, or ``None`` if the file is damaged or truncated."""
    try:
        host, boot, namespace, pid, start = json_fields.fields(
            strict_json.loads(data, what="an owner file"), "an owner", _KEYS
        )
        return Owner(
            host=json_fields.text(host, "host"),
            boot=json_fields.text(boot, "boot"),
            pid_namespace=json_fields.text(namespace, "pid_namespace"),
            pid=json_fields.integer(pid, "pid"),
            started=json_fields.text(start, "started"),
        )
    except (ManifestCorrupt, json_fields.Broken):
        return None


def is_abandoned(owner: Owner | None, *, observer: Owner, quiet_seconds: float) -> bool:
    """Whether a partial is abandoned: its writer will not continue it.

    The observer holds the path's writer lock, so what it wrote itself in an earlier try is abandoned.

    Args:
        owner: Who wrote it, if known.
        observer: The process that asks.
        quiet_seconds: How long the owner has given no sign of life.
    """
    if owner is not None and owner.boot and owner.host == observer.host:
        if owner.boot != observer.boot:
            return True
        if owner.pid_namespace and owner.pid_namespace == observer.pid_namespace and owner.started:
            return owner == observer or started(owner.pid) != owner.started
    return quiet_seconds >= QUIET_SECONDS
