"""What a save and a load cost per parameter, where a model has many small ones.

All in one run. A model of n parameters of 16 numbers each is trained by AdamW, so that each has two moments
and a step counter. Every round saves it once with gockpt and once with torch, and loads it once with each.
Measured are the call of ``gockpt.save_overlapped`` without ``every``, which copies the state before it
returns; the time until that save is durable; ``torch.save`` of both state dicts, unsynced; ``gockpt.load``;
and ``torch.load`` with both ``load_state_dict``. The first call of a model, at which nothing is known of it
yet, is told apart. Exits with 1 if the bar is broken:

* the call is shorter than ``torch.save``, for each number of parameters.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from bars import parser
from harness import machine_facts, settings_of, table, write_json
from torch import nn

import gockpt

if TYPE_CHECKING:
    from collections.abc import Callable

NUMBERS = 16
"""Elements of a parameter."""
COUNTS = (100, 1000, 10_000)
QUICK_COUNTS = (50, 100)
COLUMNS = ("call", "durable", "torch.save", "load", "torch.load")


def build(count: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model with that many parameters, and its optimizer after one update."""
    model = nn.ParameterDict({f"p{i}": nn.Parameter(torch.randn(NUMBERS)) for i in range(count)})
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.randn(NUMBERS)
    optimizer.step()
    return model, optimizer


def seconds(action: Callable[[], object]) -> float:
    """Return how long an action takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure(count: int, rounds: int, directory: str) -> dict[str, Any]:
    """Return every sample of one number of parameters."""
    model, optimizer = build(count)
    taken: dict[str, list[float]] = {column: [] for column in COLUMNS}

    def load_with_torch() -> None:
        state = torch.load(Path(top, "torch"), weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    with tempfile.TemporaryDirectory(dir=directory, prefix="bench-scale-") as top:
        path = Path(top, "gockpt")
        first = seconds(lambda: gockpt.save_overlapped(model, optimizer, path, step=1))
        gockpt.wait()
        for number in range(2, rounds + 2):
            optimizer.step()
            began = time.perf_counter()
            handle = gockpt.save_overlapped(model, optimizer, path, step=number)
            taken["call"].append(time.perf_counter() - began)
            if handle is not None:
                handle.result()
            taken["durable"].append(time.perf_counter() - began)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            taken["torch.save"].append(seconds(lambda state=state: torch.save(state, Path(top, "torch"))))
            taken["load"].append(seconds(lambda: gockpt.load(path, model, optimizer)))
            taken["torch.load"].append(seconds(load_with_torch))
        gockpt.close(path)
    ratio = median(theirs / mine for theirs, mine in zip(taken["torch.save"], taken["call"], strict=True))
    return {"parameters": count, "first_call": first, "seconds": taken, "ratio": ratio, "held": ratio >= 1}


def show(results: list[dict[str, Any]]) -> None:
    rows = []
    for each in results:
        count = each["parameters"]
        shown = [each["first_call"], *(median(each["seconds"][column]) for column in COLUMNS)]
        rows.append([f"{count:,}", *(f"{1e6 * one / count:.0f}" for one in shown)])
    print("Microseconds per parameter")
    print(table(["parameters", "first call", *COLUMNS], rows))
    for each in results:
        verdict = "held" if each["held"] else "BROKEN"
        print(f"{each['parameters']:,}: the call in {1 / each['ratio']:.2f} of torch.save (bar 1): {verdict}")


def main() -> int:
    made = parser(__doc__, directory="where to write", states=False)
    made.add_argument("--counts", type=int, nargs="+", help=f"parameters (default: {COUNTS})")
    wanted = made.parse_args()
    wanted.rounds = wanted.rounds or (1 if wanted.quick else 5)
    wanted.counts = wanted.counts or list(QUICK_COUNTS if wanted.quick else COUNTS)
    facts = machine_facts(wanted.dir)
    measure(10, 1, wanted.dir)  # what a process does once is no cost of a model
    results = [measure(count, wanted.rounds, wanted.dir) for count in wanted.counts]
    if wanted.json != "-":
        show(results)
    if wanted.json:
        found = {"bench": "scale", "machine": facts, "settings": settings_of(wanted)}
        write_json(wanted.json, {**found, "results": results})
    return 0 if wanted.quick or all(each["held"] for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
