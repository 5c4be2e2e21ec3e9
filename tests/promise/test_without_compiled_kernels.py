"""Where kernels can't be compiled, saves are made all the same, and are exact."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

SCRIPT = """
    import sys
    if {gone}:
        sys.modules["numba"] = None
    import copy, torch, gockpt

    def make(kind):
        torch.manual_seed(0)
        layers = torch.nn.Linear(150, 200), torch.nn.BatchNorm1d(200), torch.nn.Linear(200, 9)
        model = torch.nn.Sequential(*layers)
        return model, kind(model.parameters(), lr=0.01)

    def state(model, optimizer):
        return copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def same(a, b):
        if isinstance(a, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(same, a, b))
        return a == b

    for number, (kind, options) in enumerate((
        (torch.optim.AdamW, dict(window=3)),
        (torch.optim.SGD, dict(window=3, grad_dtype="fp16", compression="zstd")),
        (torch.optim.Adam, dict(worker="process")),
    )):
        model, optimizer = make(kind)
        options = gockpt.Options(when_busy="wait", **options)
        path, kept = f"ckpts-{{number}}", {{}}
        for step in range(1, 9):
            model(torch.randn(4, 150)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            gockpt.save_overlapped(model, optimizer, path, step=step, every=4, options=options)
            kept[step] = state(model, optimizer)
        gockpt.wait()
        for step in gockpt.steps(path):
            again = make(kind)
            gockpt.load(path, *again, step=step)
            assert same(kept[step], state(*again)), (kind, step)
            assert gockpt.verify(path, step).ok
            assert gockpt.open(path, step=step).metadata.exact
        print(gockpt.steps(path))
"""


@pytest.mark.parametrize("how", ["NUMBA_DISABLE_JIT", "no Numba"])
def test_saves_are_exact_and_say_once_that_they_are_slower(tmp_path, how):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT).format(gone=how == "no Numba")],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[4, 8]\n" * 3
    assert done.stderr.count("no optimizer update is replayed") == 1, done.stderr
    assert ("Numba can't be imported" if how == "no Numba" else how) in done.stderr
