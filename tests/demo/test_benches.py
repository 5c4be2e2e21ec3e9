"""The benches run and write what they say; no speed is judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MACHINE = {
    "date",
    "cpu",
    "cores",
    "memory_bytes",
    "load_before",
    "commit",
    "kernel",
    "filesystem",
    "python",
    "versions",
}


def run(script, *options):
    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--dir", ".", "--json", "result.json", *options],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(Path("result.json").read_text())
    assert result["machine"].keys() == MACHINE
    assert result["machine"]["versions"].keys() >= {"gockpt", "torch"}
    assert [path.name for path in Path().iterdir()] == ["result.json"]  # nothing is left behind
    return result, done.stdout


def test_training_bench(bench):
    more = ["--worker", "thread", "process", "--only", "window 4", "+ fsync", "dcp"]
    result, printed = run(bench / "bench_train.py", "--steps", "10", *more)
    savers = ["no saving", "gockpt, window 4", "gockpt, window 4, process"]
    savers += ["torch.save + fsync", "dcp.async_save"]
    assert [row["saver"] for row in result["summary"]] == savers
    assert sorted(sample["saver"] for sample in result["samples"]) == sorted(savers)
    for row in result["summary"]:
        assert row["saver"] in printed
        assert row["tokens_per_second"] > 0
        low, high = row["vs_none_range"]
        assert low <= row["vs_none"] <= high
        assert row["vs_none_beyond_stall"] >= row["vs_none"]
        if row["saver"] == "no saving":
            assert (row["every"], row["saves"], row["durable_seconds"]) == (None, 0, None)
        else:
            assert (row["every"], row["saves"]) == (10, 1)
            assert row["exposed_seconds_per_save"] > 0
            assert row["durable_seconds"] > 0
    for sample in result["samples"]:
        assert sample["tokens"] == 10 * 256
        assert len(sample["step_seconds"]) == len(sample["plain_step_seconds"]) == 10
        assert [save["step"] for save in sample["saves"]] in ([], [10])
    gockpt = next(sample for sample in result["samples"] if sample["saver"].startswith("gockpt"))
    assert gockpt["saves"][0]["window"] == 4


def test_an_interval_that_would_never_come_is_refused(bench):
    done = subprocess.run(
        [sys.executable, str(bench / "bench_train.py"), "--steps", "10", "--every", "50"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "nothing would be saved" in done.stderr


@pytest.mark.alone
def test_memory_bench_and_its_bar(bench):
    result, printed = run(bench / "bench_memory.py")
    assert [sample["window"] for sample in result["samples"]] == [1, 4]
    for sample in result["samples"]:
        assert sample["windows"] == [sample["window"]] * 3
        assert sample["bar_bytes"] == int(sample["state_bytes"] * 1.15) + sample["ring_bytes"]
        assert 0 < sample["growth_bytes"] <= sample["bar_bytes"]
    one, four = result["samples"]
    assert one["ring_bytes"] == 0 < four["ring_bytes"]
    assert printed.count("held") == 2


def test_fingerprint_bench(bench):
    result, printed = run(bench / "bench_fingerprint.py")
    assert {"crc32c", "fingerprint", "copy and fingerprint"} < result["seconds"].keys()
    for name, taken in result["seconds"].items():
        assert name in printed
        assert len(taken) == 3


def test_store_bench(bench):
    result, printed = run(bench / "bench_store.py")
    (tiny,) = result["results"]
    assert (tiny["state"], tiny["arrays"]) == ("tiny", 84)
    assert {"gockpt", "one file, direct", "torch.save + fsync"} < tiny["seconds"].keys()
    assert all(len(taken) == 1 and taken[0] > 0 for taken in tiny["seconds"].values())
    assert [bar["bar"] for bar in tiny["bars"]][:5] == [0.93, 0.9, 1.8, 1.3, 2.2]
    assert all(bar["against"] in printed for bar in tiny["bars"])


def test_load_bench(bench):
    result, printed = run(bench / "bench_load.py")
    (tiny,) = result["results"]
    assert (tiny["state"], tiny["arrays"]) == ("tiny", 84)
    assert {task: list(ways) for task, ways in tiny["seconds"].items()} == {
        "everything, cold": ["gockpt", "dcp.load", "safetensors", "one file, direct"],
        "everything, warm": ["gockpt", "dcp.load", "safetensors"],
        "quarters, cold": ["gockpt", "dcp.load"],
        "100 rows, cold": ["gockpt", "gockpt, verify none", "safetensors"],
        "100 rows, warm": ["gockpt", "gockpt, verify none", "safetensors"],
    }
    for task, ways in tiny["seconds"].items():
        assert all(len(taken) == 1 and taken[0] > 0 for taken in ways.values())
        assert all(f"{task}: {way}" in printed for way in ways)
    assert [(bar["against"], bar["bar"]) for bar in tiny["bars"]] == [
        ("dcp.load", 1.5),
        ("dcp.load", 4.0),
        ("safetensors", 0.8),
    ]


def test_compression_bench(bench):
    result, printed = run(bench / "bench_compression.py")
    assert [each["disk_mb_s"] for each in result["results"]] == [None, 100]
    for each in result["results"]:
        assert list(each["seconds"]) == ["raw", "zstd", "blosc", "auto"]
        assert all(len(taken) == 1 and taken[0] > 0 for taken in each["seconds"].values())
        assert each["stored_bytes"]["blosc"] < each["stored_bytes"]["raw"]
        assert each["bars"][0]["against"] in {"raw", "zstd", "blosc"}
    assert printed.count("the best (bar 0.9)") == 2


def test_scale_bench(bench):
    result, printed = run(bench / "bench_scale.py")
    assert [each["parameters"] for each in result["results"]] == [50, 100]
    for each in result["results"]:
        assert list(each["seconds"]) == ["call", "durable", "torch.save", "load", "torch.load"]
        assert all(len(taken) == 1 and taken[0] > 0 for taken in each["seconds"].values())
        assert each["first_call"] > 0
    assert printed.count("of torch.save (bar 1)") == 2


@pytest.mark.parametrize(
    "name",
    [
        "bench_train.py",
        "bench_memory.py",
        "bench_store.py",
        "bench_load.py",
        "bench_compression.py",
        "bench_scale.py",
        "bench_fingerprint.py",
        "bench_gpu.py",
        "demo.py",
    ],
)
def test_each_says_what_it_does(bench, name):
    done = subprocess.run(
        [sys.executable, str(bench / name), "--help"], check=True, capture_output=True, text=True
    )
    assert "--json" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_device_the_gpu_bench_says_so(bench):
    done = subprocess.run(
        [sys.executable, str(bench / "bench_gpu.py")], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA device" in done.stderr
