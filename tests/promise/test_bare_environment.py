"""A process that was started with next to nothing saves and loads like any other."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

SCRIPT = """
    import os, resource, sys, traceback
    for fd in (0, 1, 2):
        os.close(fd)
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    try:
        import torch, gockpt
        for worker in ("thread", "process"):
            model = torch.nn.Linear(300, 300)
            optimizer = torch.optim.AdamW(model.parameters())
            options = gockpt.Options(window=2, when_busy="wait", worker=worker)
            for step in range(1, 7):
                model(torch.randn(4, 300)).square().sum().backward()
                optimizer.step()
                gockpt.save_overlapped(model, optimizer, worker, step=step, every=3, options=options)
            gockpt.wait()
            weight = model.weight.detach().clone()
            assert gockpt.steps(worker) == [3, 6]
            assert gockpt.verify(worker).ok
            gockpt.load(worker, model, optimizer)
            assert torch.equal(model.weight, weight)
        outcome = "saved and loaded"
    except BaseException:
        outcome = traceback.format_exc()
    with open("outcome", "w") as file:
        file.write(outcome)
"""


def test_without_standard_streams_home_and_room_for_many_descriptors(tmp_path):
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        env=environment,
        cwd=tmp_path,
        timeout=100,
        check=True,
    )
    assert (tmp_path / "outcome").read_text() == "saved and loaded"
