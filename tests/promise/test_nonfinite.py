"""NaN and Inf are counted in what is published, whichever way it went, and say which checkpoint is of use."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import gockpt
from gockpt.storage.format import manifest

WAYS = {
    "copied": {"window": 1},
    "replayed": {"window": 3},
    "16 bits": {"window": 3, "grad_dtype": "bf16"},
    "encoded": {"window": 3, "compression": "zstd"},
    "worker process": {"window": 3, "worker": "process"},
}


def counted(model, opt):
    """Count in the live state, by name: (NaN, Inf)."""
    found = {f"model/{name}": value for name, value in model.state_dict().items()}
    for name, param in model.named_parameters():
        found |= {f"optimizer/{name}/{key}": value for key, value in opt.state[param].items()}
    found = {name: value for name, value in found.items() if value.is_floating_point()}
    counts = {name: (int(v.isnan().sum()), int(v.isinf().sum())) for name, v in found.items()}
    return {name: pair for name, pair in counts.items() if any(pair)}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(150, 200)
        self.b = torch.nn.Parameter(torch.randn(200, 120))
        self.low = torch.nn.Parameter(torch.randn(40).bfloat16())
        self.register_buffer("mask", torch.full((3,), -torch.inf))

    def forward(self, x):
        return self.a(x) @ self.b + self.low.float().sum()


@pytest.mark.parametrize("way", WAYS)
def test_what_is_published_is_counted_whichever_way_it_went(way, tmp_path, caplog):
    torch.manual_seed(0)
    model = Net()
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    options = gockpt.Options(when_busy="wait", nice=0, **WAYS[way])
    live, handles = {}, set()
    with caplog.at_level(logging.WARNING, "gockpt"):
        for step in range(1, 13):
            opt.zero_grad()
            model(torch.randn(4, 150)).square().sum().backward()
            if step == 6:
                model.a.weight.grad[3, 4] = torch.nan
            opt.step()
            if step == 8:
                with torch.no_grad():
                    model.low[7] = torch.inf
            live[step] = counted(model, opt)
            handles.add(gockpt.save_overlapped(model, opt, tmp_path, step=step, every=4, options=options))
        gockpt.wait()
    handles.discard(None)
    saved = {one.step: one for one in (handle.result(60) for handle in handles)}
    assert sorted(saved) == [4, 8, 12]
    assert set(live[4]) == {"model/mask"}
    assert {"model/mask", "model/low", "model/a.weight", "optimizer/a.weight/exp_avg"} <= set(live[8])
    for step, result in saved.items():
        found = gockpt.open(tmp_path, step).metadata.nonfinite
        assert found == result.nonfinite
        assert (found.nan, found.inf) == tuple(sum(pair[i] for pair in live[step].values()) for i in (0, 1))
        assert found.arrays == len(live[step])
        assert all(live[step][name] == pair for name, pair in found.first.items())
        assert found.finite == (step == 4)
        report = gockpt.verify(tmp_path, step)
        assert report.ok, report.problems
    assert [entry.finite for entry in gockpt.checkpoints(tmp_path)] == [True, False, False]
    told = [record.getMessage() for record in caplog.records if "as training left it" in record.getMessage()]
    assert len(told) == 1  # and not again for step 12
    assert "step 8" in told[0]
    assert "finite=True" in told[0]


def save(model, opt, step, path="ckpts", **options):
    saver = gockpt.Checkpointer(model, opt, path, options=gockpt.Options(window=1, **options))
    with saver:
        saver.after_step(step).result()


@pytest.fixture
def history(tmp_path, monkeypatch):
    """Steps 1 to 4: the third has a NaN in the optimizer's state, the fourth in a parameter, too."""
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Linear(3, 2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with gockpt.Checkpointer(model, opt, "ckpts", options=gockpt.Options(window=1, keep=2)) as saver:
        for step in range(1, 5):
            opt.zero_grad()
            model(torch.ones(2, 3)).sum().backward()
            opt.step()
            if step > 2:
                opt.state[model.bias]["momentum_buffer"][0] = torch.nan
            saver.after_step(step).result()
    return model, opt


def test_the_newest_finite_one_is_kept_and_found(history, caplog):
    model, opt = history
    assert gockpt.steps("ckpts") == [2, 3, 4]
    with caplog.at_level(logging.WARNING, "gockpt"):
        restored = gockpt.load("ckpts", model, opt, finite=True)
    assert (restored.step, [one.step for one in restored.passed_over]) == (2, [4, 3])
    assert "optimizer/bias/momentum_buffer (1 NaN, 0 Inf)" in restored.passed_over[0].why
    assert "loaded step 2; passed over: step 4, step 3" in caplog.text
    assert not opt.state[model.bias]["momentum_buffer"].isnan().any()
    assert gockpt.load("ckpts", model, opt, finite=True, step=2).step == 2
    assert gockpt.load("ckpts", model, opt, finite=True, on_damage="previous").step == 2


def test_without_finite_it_is_the_newest_and_that_is_said(history, caplog):
    with caplog.at_level(logging.WARNING, "gockpt"):
        assert gockpt.load("ckpts", *history).step == 4
    assert "loaded step 4, which was saved with 2 NaN and 0 Inf" in caplog.text


def test_a_step_that_is_not_finite_and_a_path_without_a_finite_one_are_refused(history, tmp_path):
    model, opt = history
    weight = model.weight.detach().clone()
    with pytest.raises(gockpt.NonFiniteCheckpoint, match="step 4 is not finite.*without finite=True"):
        gockpt.load("ckpts", model, opt, finite=True, step=4)
    with torch.no_grad():
        model.weight[0, 0] = torch.inf
    save(model, None, 1, "others")
    model.weight.data.copy_(weight)
    with pytest.raises(gockpt.NonFiniteCheckpoint, match=r"no checkpoint in others is finite.*model/weight"):
        gockpt.load("others", model, finite=True)
    assert torch.equal(model.weight, weight)


def test_integers_buffers_and_extras_do_not_count_as_state(tmp_path):
    model = torch.nn.BatchNorm1d(3)
    model.running_mean[0] = torch.nan
    with gockpt.Checkpointer(model, None, tmp_path, options=gockpt.Options(window=1)) as saver:
        saver.after_step(1, {"x": torch.tensor([torch.nan, torch.inf]), "y": np.full(2, -1)}).result()
    found = gockpt.open(tmp_path).metadata.nonfinite
    assert (found.nan, found.inf, found.state, found.finite) == (2, 1, 0, True)
    assert gockpt.load(tmp_path, model, finite=True).step == 1


def silent(path):
    """Make a checkpoint one that says nothing of NaN, as those of earlier versions do: a directory."""
    import json

    from gockpt.storage.format import checksum

    file = Path(path) / "gockpt.json"
    text = file.read_text()
    document = json.loads(text.splitlines()[0])
    root = Path(path) / "zarr.json"
    group = json.loads(root.read_text())
    for attributes in (document["attributes"], group["attributes"]):
        del attributes["gockpt"]["nonfinite"]
    root.write_text(json.dumps(group))
    for entry in document["files"]:
        if entry["path"] == "zarr.json":
            entry["size"] = root.stat().st_size
            entry["crc32c"] = f"{checksum.crc32c(root.read_bytes()):08x}"
    line = json.dumps(document).encode() + b"\n"
    file.write_bytes(line + b'{"crc32c": "%08x"}\n' % checksum.crc32c(line))
    manifest.parse(file.read_bytes(), where="test")


def test_one_that_does_not_say_is_read(history):
    for step in (2, 3, 4):
        gockpt.unpack("ckpts", f"ckpts/step-{step:010}", step)
        Path(f"ckpts/step-{step:010}.zip").unlink()
        silent(f"ckpts/step-{step:010}")
    assert [entry.finite for entry in gockpt.checkpoints("ckpts")] == [None] * 3
    assert gockpt.open("ckpts").metadata.nonfinite is None
    restored = gockpt.load("ckpts", *history, finite=True)
    assert (restored.step, [one.step for one in restored.passed_over]) == (2, [4, 3])
