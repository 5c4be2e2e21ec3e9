"""What the benches of storage share: measuring states, comparing with bars, exiting with 1 below one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from harness import machine_facts, settings_of, write_json
from states import STATES

if TYPE_CHECKING:
    from collections.abc import Callable

    Result = dict[str, Any]

__all__ = ["compared", "parsed", "parser"]


def parser(description: str | None, *, directory: str, states: bool = True) -> argparse.ArgumentParser:
    """Return a parser of the options that these benches have in common.

    Args:
        description: The bench's documentation.
        directory: What ``--dir`` is for.
        states: Whether it measures some of the states.
    """
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if states:
        made.add_argument("--states", nargs="+", choices=list(STATES), help="default: A B; quick: tiny")
    made.add_argument("--rounds", type=int, help="default: 7; quick: 1")
    made.add_argument("--dir", default=".", help=f"{directory} (default: here)")
    made.add_argument("--json", metavar="FILE", help="write all samples; '-' is standard output")
    made.add_argument("--quick", action="store_true", help="a toy in seconds: shows that it runs, no more")
    return made


def parsed(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Return what the command line asks for, with the defaults that depend on ``--quick``."""
    wanted = made.parse_args()
    wanted.states = wanted.states or (["tiny"] if wanted.quick else ["A", "B"])
    wanted.rounds = wanted.rounds or (1 if wanted.quick else 7)
    return wanted


def compared(
    bench: str,
    wanted: argparse.Namespace,
    *,
    measure: Callable[[str, argparse.Namespace], Result],
    judge: Callable[[Result], list[Result]],
    show: Callable[[Result], None],
) -> int:
    """Measure each state, show and write what came out, and return the exit status.

    Args:
        bench: Its name in the results.
        wanted: From :func:`parsed`.
        measure: Returns a state's result.
        judge: Returns a result's bars, each with whether it is ``"held"``.
        show: Prints a result and its bars.
    """
    facts = machine_facts(wanted.dir)
    results = []
    for kind in wanted.states:
        result = measure(kind, wanted)
        result["bars"] = judge(result)
        results.append(result)
        if wanted.json != "-":
            show(result)
    if wanted.json:
        settings = settings_of(wanted)
        write_json(wanted.json, {"bench": bench, "machine": facts, "settings": settings, "results": results})
    return 0 if wanted.quick or all(bar["held"] for result in results for bar in result["bars"]) else 1
