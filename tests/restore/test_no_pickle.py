"""Nothing is unpickled, whatever is done with a checkpoint: the interpreter itself is asked.

That no module imports pickle is in ``test_architecture.py``; this also sees what other packages would do.
"""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import pickle
import shutil
import sys
import tempfile
from fractions import Fraction

import numpy as np
import torch

import gockpt
from gockpt.storage.read.find import open_checkpoint
from gockpt.storage.local.store import Store

seen = []
watching = False


def watch(event, arguments):
    if watching and event in ("pickle.find_class", "marshal.loads", "code.__new__", "exec"):
        seen.append((event, arguments))


def everything():
    gockpt.load("ckpts", model, optimizer, extra={"epoch": lambda value: None})
    gockpt.load("ckpts", strict=False, model=model)
    assert gockpt.verify("ckpts").ok
    assert gockpt.steps("ckpts") == [1]
    with gockpt.open("ckpts") as opened:
        for name in opened:
            np.asarray(opened[name])
        dict(opened.extra)
    with open_checkpoint("ckpts") as stored:
        stored.state()
        for name, array in stored.arrays.items():
            stored.read_into(name, None, np.empty(array.spec.nbytes, np.uint8))
    copy = tempfile.mkdtemp(dir=".")
    shutil.copytree("ckpts", copy, dirs_exist_ok=True)
    with Store(copy) as store:
        store.prune(1)


model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(2, 3)).sum().backward()
optimizer.step()
extra = {"epoch": 1, "tensor": torch.ones(2), "array": np.ones(2), "set": {1}, "bytes": b"x", "big": 2**80}
gockpt.save_overlapped(model, optimizer, "ckpts", step=1, extra=extra).result()
everything()  # imports and compiles what it needs: that is code of the program's own
sys.addaudithook(watch)
watching = True
everything()
watching = False
assert not seen, seen
# And the watch sees what it is there for.
watching = True
assert pickle.loads(pickle.dumps(Fraction(1, 2))) == Fraction(1, 2)
watching = False
assert [event for event, _ in seen] == ["pickle.find_class"], seen
print("nothing was unpickled")
"""


def test_nothing_is_unpickled():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "nothing was unpickled\n"), done.stderr[-3000:]
