"""Options: every default works, and a bad value is refused by name with what would do."""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest

from gockpt.errors import OptionsError, UsageError
from gockpt.options import MAX_WINDOW, Keep, Options

GOOD = [
    *[("window", n) for n in (1, 2, MAX_WINDOW, "auto")],
    ("when_busy", "wait"),
    ("verify", "close"),
    ("keep", 2),
    ("keep", None),
    ("keep", Keep()),
    ("keep", Keep(newest=3, every=1000, best=2, metric="val_loss", mode="max")),
    ("host_memory", 1 << 16),
    ("device_memory", 1 << 40),
    ("cpu_threads", 1),
    ("cpu_threads", 256),
    ("nice", 0),
    ("overhead", 0.5),
    ("overhead", 1e-6),
    *[("compression", v) for v in (None, "zstd", "blosc", "auto")],
]
BAD = [
    *[("window", v) for v in (0, -1, MAX_WINDOW + 1, 2.0, True, "4", None, [])],
    *[("when_busy", v) for v in ("later", None, 1)],
    *[("verify", v) for v in ("none", False)],
    *[("keep", v) for v in (0, 1, -3, 2.5, True, "all", Keep(newest=1))],
    *[(name, v) for name in ("host_memory", "device_memory") for v in (0, -1, 1.5, 65535, "1GB", True)],
    *[("cpu_threads", v) for v in (0, -1, 257, 1.0, True)],
    *[("nice", v) for v in (-1, 20, 1.5, None)],
    *[("overhead", v) for v in (0, 1, -0.1, 2, math.nan, math.inf, "1%", None)],
    *[("grad_dtype", v) for v in ("int8", "float16", 16, True)],
    *[("compression", v) for v in ("lz4", "none", 3, True)],
]


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_a_good_value_is_taken_as_it_is(name, value):
    assert getattr(Options(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_by_name(name, value):
    with pytest.raises(OptionsError, match=f"{name}=") as caught:
        Options(**{name: value})
    text = str(caught.value)
    assert repr(value) in text
    assert any(way in text for way in ("expected", "use ", "with ")), text


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *[("newest", {"newest": v}) for v in (0, -1, 2.0, True, None)],
        *[("every", {"every": v}) for v in (0, -5, 1.5, True)],
        *[("best", {"best": v, "metric": "loss"}) for v in (-1, 1.0, True, None)],
        *[("metric", {"best": 1, "metric": v}) for v in (None, "", 3)],
        ("metric", {"metric": "loss"}),
        ("mode", {"mode": "lowest"}),
    ],
)
def test_a_bad_rule_for_keeping_is_refused_by_name(name, given):
    with pytest.raises(OptionsError, match=f"{name}="):
        Keep(**given)


def test_an_options_error_is_a_usage_error_and_a_value_error():
    with pytest.raises(UsageError):
        Options(window=0)
    with pytest.raises(ValueError, match="window=0"):
        Options(window=0)


def test_options_are_frozen_and_by_keyword():
    options = Options()
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.window = 3
    with pytest.raises(TypeError):
        Options(4)


def test_replace_changes_a_copy_and_checks_it():
    options = Options(keep=3)
    changed = options.replace(window=4)
    assert (changed.window, changed.keep, options.window) == (4, 3, "auto")
    with pytest.raises(OptionsError, match="keep=1"):
        options.replace(keep=1)


def test_every_field_is_documented():
    for kind in (Keep, Options):
        lines = inspect.getdoc(kind).splitlines()  # Python 3.13 takes the indentation away, older ones don't
        for field in dataclasses.fields(kind):
            assert any(line.startswith(f"    {field.name}:") for line in lines), field.name


def test_worker_threads_are_the_forced_number_or_half_the_cores(monkeypatch):
    assert Options(cpu_threads=5).worker_threads == 5
    for cores, threads in ((1, 1), (2, 1), (8, 4), (64, 8)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, n=cores: set(range(n)))
        assert Options().worker_threads == threads
