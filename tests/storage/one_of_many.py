"""One process of several that use a path at once: ``one_of_many.py VERB PATH ...``; speaks JSON."""

from __future__ import annotations

import json
import mmap
import sys

import numpy as np

from gockpt.core.array_spec import ArraySpec
from gockpt.errors import CheckpointPruned, GockptError
from gockpt.storage.format.chunk_grid import chunked_layout
from gockpt.storage.local.store import Store
from gockpt.storage.read.find import open_checkpoint

LAYOUTS = [chunked_layout(ArraySpec((name,), (6, 4), "int64"), (4, 4)) for name in ("a", "b")]


def say(value):
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def fill(transaction, marker):
    for layout in LAYOUTS:
        for slot in layout.slots:
            arena = mmap.mmap(-1, slot.capacity)
            arena[: slot.nbytes] = np.full(slot.nbytes // 8, marker, "<i8").tobytes()
            transaction.write_chunk(layout, slot, memoryview(arena))


def begin(store, step, marker):
    return store.begin(step, LAYOUTS, state={"marker": marker}, attributes={}, exact=True)


def publish(store, step, marker):
    with begin(store, step, marker) as transaction:
        fill(transaction, marker)
        return transaction.commit()


def save(path, step, marker):
    try:
        with Store(path) as store:
            say({"seq": publish(store, int(step), int(marker)).seq})
    except GockptError as error:
        say({"error": type(error).__name__, "message": str(error)})


def hold(path):
    with Store(path) as store, begin(store, 3, 1) as transaction:
        fill(transaction, 1)
        say("in the middle of a save")
        sys.stdin.readline()
        transaction.commit()
    say("done")


def contend(path, number, times):
    say("ready")
    sys.stdin.readline()
    for turn in range(int(times)):
        save(path, 100 * int(number) + turn, turn)


def write_many(path, times):
    with Store(path) as store:
        publish(store, 0, 0)
        say("published 0")
        sys.stdin.readline()
        for marker in range(1, int(times)):
            publish(store, marker % 5, marker)
            if marker % 3 == 0:
                store.prune(1)
    say("done")


def read_many(path, times):
    """Read the newest until it is the last one; says each value once."""
    say("reading")
    last = None
    while last != int(times) - 1:
        try:
            with open_checkpoint(path) as checkpoint:
                values = {checkpoint.state()["marker"]}
                for name in ("a", "b"):
                    out = np.empty(192, np.uint8)
                    checkpoint.read_into(name, None, out)
                    values |= set(out.view("<i8").tolist())
                report = checkpoint.verify()
        except CheckpointPruned:
            continue
        assert report.ok, report.problems
        (value,) = values
        if value != last:
            say(value)
            last = value


if __name__ == "__main__":
    verbs = {"save": save, "hold": hold, "contend": contend, "publish": write_many, "read": read_many}
    verbs[sys.argv[1]](*sys.argv[2:])
