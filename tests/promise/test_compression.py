"""Compressed saves are the same saves: equal bit for bit, whatever was encoded, with windows and without."""

from __future__ import annotations

import pytest
import torch

import gockpt
from gockpt.errors import OptionsError
from gockpt.options import Options

CODECS = ["zstd", "blosc", "auto"]


def build():
    """Matrices of two dtypes; vectors and step counters too small to be encoded."""
    model = torch.nn.ModuleList([torch.nn.Linear(96, 128), torch.nn.Linear(128, 64).to(torch.bfloat16)])
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def update(model, optimizer, step):
    optimizer.zero_grad()
    torch.manual_seed(step)
    hidden = model[0](torch.randn(8, 96))
    model[1](hidden.to(torch.bfloat16)).float().square().mean().backward()
    optimizer.step()


def codecs(path, step):
    arrays = gockpt.open(path, step)._stored.arrays
    return {name: array.entry.codec for name, array in arrays.items()}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("window", [1, 3])
def test_what_is_loaded_equals_what_was_saved(harness, codec, window):
    loop = harness.Loop(build, update, every=3, window=window, compression=codec)
    loop.run(9)
    gockpt.wait()
    assert gockpt.verify(loop.path).ok
    found = codecs(loop.path, 9)
    if codec != "auto":
        assert found["model/0.weight"] == found["optimizer/1.weight/exp_avg"] == codec
    assert found["model/1.bias"] is None
    loop.finish()


def test_a_run_goes_on_with_another_compression_than_it_began_with():
    model, optimizer = build()
    for step, codec in enumerate(["zstd", None, "blosc", "auto"], 1):
        update(model, optimizer, step)
        options = Options(compression=codec)
        with gockpt.Checkpointer(model, optimizer, "ckpts", options=options) as saver:
            saver.after_step(step).result()
        other, its_optimizer = build()
        gockpt.load("ckpts", other, its_optimizer)
        for name, value in model.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), (step, name)
    assert gockpt.steps("ckpts") == [1, 2, 3, 4]


def test_the_memory_that_encoding_takes_is_told_and_bounded():
    model, optimizer = build()
    update(model, optimizer, 1)
    plain = gockpt.save_overlapped(model, optimizer, "plain", step=1).result()
    options = Options(compression="zstd", cpu_threads=1)
    saved = gockpt.save_overlapped(model, optimizer, "coded", step=1, options=options).result()
    largest = 96 * 128 * 4
    assert largest < saved.host_memory - plain.host_memory <= 6.1 * largest
    tight = Options(compression="zstd", cpu_threads=1, host_memory=plain.host_memory + largest)
    with pytest.raises(OptionsError, match=r"compression=None \(\d+ of these bytes\)"):
        gockpt.save_overlapped(model, optimizer, "tight", step=1, options=tight).result()
